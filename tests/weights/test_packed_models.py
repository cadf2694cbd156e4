"""Models in each quantised format, converted: what is kept and what is quantised again."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from mlc_compile.manifest import check_directory
from mlc_compile.models.detect import load_model
from mlc_compile.quantization.codec import decode, encode
from mlc_compile.quantization.policy import is_quantized, stored_layout, stored_params
from mlc_compile.quantization.scheme import get_scheme, numpy_dtype
from mlc_compile.weights.checkpoint import open_checkpoint
from mlc_compile.weights.convert import ConversionReport, convert_weight
from mlc_compile.weights.tensor_cache import load_params

sys.path.insert(0, str(Path(__file__).parent))
from packed_files import KINDS, write_model

# kind, columns of a group, scheme, whether it keeps the codes, a word of the notes
CASES = (
    ("awq", 128, "q4f16_awq", True, ""),
    ("awq", 128, "q4f16_1", False, "q4f16_awq keeps them as they are"),
    ("awq", 32, "q8f16_1", True, ""),
    ("gptq", 128, "q4f16_awq", True, ""),
    ("gptq", 32, "q4f16_1", True, ""),
    ("gptq", 32, "q4f16_0", True, ""),
    ("gptq", 32, "q4bf16_1", True, "float16 scales are rounded to bfloat16"),
    ("gptq-desc_act", 32, "q4f16_1", False, "activation order"),
    ("ct-int4", 32, "q4f16_1", True, ""),
    ("ct-int8", 32, "q8f16_pc", True, ""),
    ("ct-int8", 32, "q8f16_1", True, ""),
    ("ct-int8", 32, "q4f16_1", False, "q8f16_pc keeps them"),
    ("ct-fp8", 32, "e4m3f32_1", True, ""),
    ("ct-fp8", 32, "e4m3f16_1", True, "float32 scales are rounded to float16"),
    ("fp8-blocks", 32, "e4m3f32_1", True, "activations"),
    ("fp8-blocks", 32, "q0f16", False, "activations"),
)


def converted(source: Path, scheme: str, out: Path, jobs: int = 2) -> ConversionReport:
    checkpoint = open_checkpoint(source)
    model = load_model(checkpoint.config, where="x")
    return convert_weight(checkpoint, model, get_scheme(scheme), out, jobs=jobs, scales="absmax")


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_converted(kind: str) -> None:
    assert any(kind == case[0] for case in CASES)


@pytest.mark.parametrize(("kind", "size", "name", "kept", "note"), CASES)
def test_stored_weights_are_those_of_the_source(
    tmp_path: Path, kind: str, size: int, name: str, kept: bool, note: str
) -> None:
    numbers = write_model(tmp_path / "source", kind, size)
    report = converted(tmp_path / "source", name, tmp_path / "out")
    scheme = get_scheme(name)
    dtype = numpy_dtype(scheme.model_dtype)
    assert check_directory(tmp_path / "out").differences == ()
    said = " ".join(report.notes)
    assert note in said
    assert bool(note) == bool(said)
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest.get("notes", []) == list(report.notes)

    checkpoint = open_checkpoint(tmp_path / "source")
    for spec in load_model(checkpoint.config, where="x").parameters():
        expected = np.concatenate([numbers[source] for source in spec.sources])
        arrays = load_params(tmp_path / "out", [s.name for s in stored_params(spec, scheme)])
        if not is_quantized(spec, scheme):
            np.testing.assert_array_equal(arrays[0], expected.astype(dtype), err_msg=spec.name)
            continue
        layout = stored_layout(spec, scheme)
        found = decode(tuple(arrays), scheme, spec.shape[-1], layout=layout).astype(np.float32)
        again = encode(expected, scheme, layout=layout)
        same = all(np.array_equal(a, b) for a, b in zip(arrays, again, strict=True))
        error = report.relative_errors[spec.name]
        if spec.role != "linear" or not kept:
            assert same, spec.name
            assert error > 1e-3
            continue
        # One product, rounded to the narrower of the source's dtype and the model's; a float32
        # scale to the model's dtype too.
        digits = {"float16": 2**-11, "bfloat16": 2**-8, "float32": 2**-11}[scheme.model_dtype]
        np.testing.assert_allclose(found, expected, rtol=2.1 * digits, atol=1e-7)
        if scheme.model_dtype == "float16" and not note:
            np.testing.assert_array_equal(found, expected, err_msg=spec.name)
        assert error < 2 * digits


def test_the_result_does_not_depend_on_jobs(tmp_path: Path) -> None:
    write_model(tmp_path / "source", "awq", 128)
    for jobs in (1, 3):
        converted(tmp_path / "source", "q4f16_awq", tmp_path / f"out{jobs}", jobs)
    one, three = (
        {p.name: p.read_bytes() for p in (tmp_path / f"out{jobs}").glob("*.bin")} for jobs in (1, 3)
    )
    assert one
    assert one == three


# One tensor of q, k and v by groups of heads, of which ours takes rows; experts below one another.
INTERNLM2 = {"model_type": "internlm2", "architectures": ["InternLM2ForCausalLM"], "bias": False}
QWEN3_MOE = {
    "model_type": "qwen3_moe",
    "architectures": ["Qwen3MoeForCausalLM"],
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 128,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "norm_topk_prob": True,
    "head_dim": 32,
}


@pytest.mark.parametrize(
    ("changes", "kind", "size", "name"),
    [
        (INTERNLM2, "awq", 128, "q4f16_awq"),
        (INTERNLM2, "gptq", 32, "q4f16_1"),
        (QWEN3_MOE, "awq", 128, "q4f16_awq"),
        (QWEN3_MOE, "fp8-blocks", 32, "e4m3f32_1"),
    ],
)
def test_rearranged_rows_and_experts_are_kept(
    tmp_path: Path, changes: dict[str, object], kind: str, size: int, name: str
) -> None:
    numbers = write_model(tmp_path / "source", kind, size, **changes)
    report = converted(tmp_path / "source", name, tmp_path / "out")
    assert not any("again" in note for note in report.notes)
    scheme, unusual = get_scheme(name), 0
    checkpoint = open_checkpoint(tmp_path / "source")
    for spec in load_model(checkpoint.config, where="x").parameters():
        if spec.role not in ("linear", "expert"):
            continue
        expected = np.concatenate(
            [
                numbers[p.name] if p.rows is None else numbers[p.name][p.rows.indices()]
                for p in spec.parts
            ]
        )
        unusual += spec.role == "expert" or any(part.rows is not None for part in spec.parts)
        stored = load_params(tmp_path / "out", [s.name for s in stored_params(spec, scheme)])
        arrays = tuple(array.reshape(-1, array.shape[-1]) for array in stored)
        found = decode(arrays, scheme, spec.shape[-1], layout="NK")
        np.testing.assert_array_equal(found, expected.astype(found.dtype), err_msg=spec.name)
    assert unusual
