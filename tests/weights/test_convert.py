"""Conversion: the plan, the bytes, and everything that must be refused."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from every_model import CASES, config_json
from safetensors.numpy import save_file

from mlc_compile.errors import InputError
from mlc_compile.manifest import check_directory, parameter_schema_id
from mlc_compile.models import ARCHITECTURES, Model, load_model
from mlc_compile.models.params import ParamSpec
from mlc_compile.quantization.codec import decode, encode
from mlc_compile.quantization.hold import Packed, PackedInfo, hold, values
from mlc_compile.quantization.policy import is_quantized, stored_layout, stored_params
from mlc_compile.quantization.scheme import SCHEMES, QuantScheme, numpy_dtype
from mlc_compile.weights import budget, convert, work
from mlc_compile.weights.checkpoint import Checkpoint, TensorInfo, open_checkpoint
from mlc_compile.weights.convert import convert_weight, plan_conversion
from mlc_compile.weights.files import source_file
from mlc_compile.weights.parts import expected_shapes
from mlc_compile.weights.reader import Unpacked
from mlc_compile.weights.sources import SourceHash
from mlc_compile.weights.tensor_cache import load_params

SIZES = {
    "hidden_size": 96,  # no multiple of 40: q3 groups are padded
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 24,
    "vocab_size": 200,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
Tensors = dict[str, np.ndarray]

schemes = pytest.mark.parametrize("scheme", SCHEMES.values(), ids=lambda s: s.name)


def config_of(model_type: str = "llama", **changes: Any) -> dict[str, Any]:
    classes = list(ARCHITECTURES[model_type].hf_classes)
    return {"model_type": model_type, "architectures": classes, **SIZES, **changes}


def model_of(config: Mapping[str, Any]) -> Model:
    return load_model(config, where="config.json")


def random_tensors(model: Model, dtype: Any = np.float32) -> Tensors:
    """The checkpoint tensors that `model` reads."""
    rng = np.random.default_rng(0)
    return {
        name: rng.standard_normal(shape).astype(dtype)
        for spec in model.parameters()
        for name, shape in expected_shapes(spec).items()
    }


def by_hand(spec: ParamSpec, tensors: Tensors) -> np.ndarray:
    """The parameter out of whole tensors, each step as its docstring says."""
    rows = []
    for part in spec.parts:
        tensor = tensors[part.name]
        if len(spec.shape) == 1:
            tensor = tensor.reshape(-1)
        if part.transposed:
            tensor = tensor.swapaxes(-1, -2)
        tensor = tensor.reshape(-1, *spec.shape[1:][-1:])
        if part.rows is not None:
            tensor = tensor[part.rows.indices()]
        if part.add:
            tensor = tensor.astype(np.float32) + np.float32(part.add)
        if part.unit_rows:
            tensor = tensor / np.linalg.norm(tensor, axis=-1, keepdims=True)
        rows.append(tensor)
    return np.ascontiguousarray(np.concatenate(rows).reshape(spec.shape))


class MemoryReader(Unpacked):
    """A checkpoint's weights in memory; notes what was read."""

    def __init__(self, tensors: Tensors, files: tuple[Path, ...] = ()) -> None:
        self.arrays = tensors
        self.files = files
        self.reads: list[tuple[str, int]] = []
        self.releases = 0

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return {
            name: TensorInfo(name, a.shape, str(a.dtype), a.nbytes, "memory")
            for name, a in self.arrays.items()
        }

    def read(self, name: str, rows: slice | None = None) -> np.ndarray:
        array = self.arrays[name] if rows is None else self.arrays[name][rows]
        self.reads.append((name, array.size))
        return array

    def release(self) -> None:
        self.releases += 1


def checkpoint_of(
    config: dict[str, Any], tensors: Tensors, source_files: tuple[Path, ...] = ()
) -> Checkpoint:
    return Checkpoint(
        path=Path("fake"),
        format="safetensors",
        config=config,
        generation_config={},
        sources=tuple(source_file(path) for path in source_files),
        reader=MemoryReader(tensors),
        tokenizer=None,  # type: ignore[arg-type]
    )


def tiny(**changes: Any) -> tuple[Checkpoint, Model]:
    config = config_of(**changes)
    model = model_of(config)
    return checkpoint_of(config, random_tensors(model)), model


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}


def assert_converted(directory: Path, tensors: Tensors, model: Model, scheme: QuantScheme) -> None:
    """Each stored parameter equals the numpy reference on the whole concatenated weight."""
    manifest = json.loads((directory / "manifest.json").read_text())
    errors = {t["name"]: t["relative_error"] for t in manifest["tensors"] if "relative_error" in t}
    for spec in model.parameters():
        whole = by_hand(spec, tensors)
        if not is_quantized(spec, scheme):
            (array,) = load_params(directory, [spec.name])
            expected = whole.astype(numpy_dtype(scheme.model_dtype))
            np.testing.assert_array_equal(array.view(np.uint8), expected.view(np.uint8))
            continue
        layout, own = stored_layout(spec, scheme), scheme.of(spec)
        loaded = load_params(directory, [stored.name for stored in stored_params(spec, scheme)])
        if spec.role == "expert":  # below one another
            assert all(array.shape[:2] == spec.shape[:2] for array in loaded)
            loaded = [array.reshape(-1, array.shape[-1]) for array in loaded]
            whole = whole.reshape(-1, whole.shape[-1])
        expected_arrays = encode(whole, own, layout=layout, scales="auto")
        for array, expected in zip(loaded, expected_arrays, strict=True):
            assert array.dtype == expected.dtype
            np.testing.assert_array_equal(array, expected)
        restored = decode(tuple(loaded), own, whole.shape[1], layout=layout)
        source = whole.astype(np.float64)
        error = np.sqrt(
            np.sum(np.square(restored.astype(np.float64) - source)) / np.sum(np.square(source))
        )
        name = stored_params(spec, scheme)[0].name
        assert errors[name] == pytest.approx(error, rel=1e-4)


@schemes
@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2", "qwen2_moe"])
def test_every_scheme(tmp_path: Path, scheme: QuantScheme, name: str) -> None:
    check_conversion(tmp_path, scheme, name)


@pytest.mark.parametrize("name", CASES)
def test_every_architecture(tmp_path: Path, name: str) -> None:
    check_conversion(tmp_path, SCHEMES["q4f16_1"], name)


def check_conversion(tmp_path: Path, scheme: QuantScheme, name: str) -> None:
    """Of random tensors with the shapes that the case's config.json makes."""
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    config = dict(config_json(name))
    model = model_of(config)
    tensors = random_tensors(model)
    checkpoint = checkpoint_of(config, tensors)
    plan = plan_conversion(checkpoint, model, scheme)
    assert checkpoint.reader.reads == []  # type: ignore[attr-defined]
    report = convert_weight(checkpoint, model, scheme, tmp_path / "out")
    assert report.plan == plan
    assert_converted(tmp_path / "out", tensors, model, scheme)
    sizes = {path.name: path.stat().st_size for path in (tmp_path / "out").iterdir()}
    assert sum(size for name, size in sizes.items() if name.endswith(".bin")) == plan.total_bytes
    assert {shard.file: shard.nbytes for shard in plan.shards}.items() <= sizes.items()
    assert plan.source_elements == sum(array.size for array in tensors.values())
    assert plan.effective_bits_per_weight == 8 * plan.total_bytes / plan.source_elements
    assert check_directory(tmp_path / "out").ok


@pytest.mark.parametrize("stored", [np.float32, np.float16, ml_dtypes.bfloat16], ids=str)
@pytest.mark.parametrize("tied", [True, False])
def test_a_hugging_face_directory(tmp_path: Path, stored: Any, tied: bool) -> None:
    config = config_of(tie_word_embeddings=tied)
    model = model_of(config)
    tensors = random_tensors(model, stored)
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(config))
    save_file(tensors, source / "model.safetensors")
    checkpoint = open_checkpoint(source)
    scheme = SCHEMES["q4f16_1"]
    options = {"model_type": "auto"}
    convert_weight(checkpoint, model, scheme, tmp_path / "out", options=options)
    assert_converted(tmp_path / "out", tensors, model, scheme)
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    named = [file["name"] for file in manifest["source"]["files"]]
    assert named == ["config.json", "model.safetensors"]
    assert manifest["options"] == options
    assert str(tmp_path) not in json.dumps(manifest)


def test_names_without_prefix(tmp_path: Path) -> None:
    checkpoint, model = tiny(tie_word_embeddings=True)
    arrays = checkpoint.reader.arrays  # type: ignore[attr-defined]
    bare = {name.removeprefix("model."): array for name, array in arrays.items()}
    convert_weight(checkpoint_of({}, bare), model, SCHEMES["q0f32"], tmp_path)
    assert_converted(tmp_path, arrays, model, SCHEMES["q0f32"])


@pytest.mark.parametrize("name", ["q0f32", "q4f16_0", "q3f16_1"])
def test_blocks_and_threads_do_not_matter(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, model = tiny()
    monkeypatch.setattr(work, "CHUNK_ELEMENTS", 350)
    convert_weight(checkpoint, model, SCHEMES[name], tmp_path / "a", jobs=1)
    convert_weight(checkpoint, model, SCHEMES[name], tmp_path / "b", jobs=5)
    monkeypatch.setattr(budget, "BLOCK_ELEMENTS", 700)
    monkeypatch.setattr(budget, "_MAPPED", 5000)
    reader = checkpoint.reader
    assert isinstance(reader, MemoryReader)
    reader.reads.clear()
    convert_weight(checkpoint, model, SCHEMES[name], tmp_path / "c", jobs=3)
    assert max(size for _, size in reader.reads) <= 700
    assert reader.releases > 0
    assert contents(tmp_path / "a") == contents(tmp_path / "b") == contents(tmp_path / "c")


@pytest.mark.parametrize("name", ["gpt2", "falcon", "cohere-qk-norm", "mixtral", "granitemoe"])
def test_rearranged_blocks_do_not_matter(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Columns, rows of heads, vectors and experts, in pieces that end within any of them."""
    pytest.importorskip("transformers")
    config = dict(config_json(name))
    model = model_of(config)
    checkpoint = checkpoint_of(config, random_tensors(model))
    monkeypatch.setattr(work, "CHUNK_ELEMENTS", 350)
    convert_weight(checkpoint, model, SCHEMES["q4f16_1"], tmp_path / "a", jobs=1)
    monkeypatch.setattr(budget, "BLOCK_ELEMENTS", 700)
    convert_weight(checkpoint, model, SCHEMES["q4f16_1"], tmp_path / "b", jobs=3)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


class PackedReader(MemoryReader):
    """Down projections are 4-bit codes in groups of 128; noted is that something is lost."""

    notes = ("a note of the reader",)

    def __init__(self, tensors: Tensors) -> None:
        super().__init__(tensors)
        names = [name for name in tensors if "down_proj" in name or "q_proj" in name]
        self.packed = dict.fromkeys(names, PackedInfo("affine", 4, 128, "float16"))
        rng = np.random.default_rng(3)
        self.codes = {}
        for name in names:
            n, k = tensors[name].shape
            groups = -(-k // 128)
            scales = rng.random((n, groups), np.float32).astype(np.float16).astype(np.float32)
            self.codes[name] = Packed(
                rng.integers(0, 16, (n, k), np.uint8),
                scales,
                rng.integers(0, 16, (n, groups), np.uint8),
            )
            tensors[name] = values(self.codes[name], self.packed[name])

    def read_packed(self, name: str, rows: Any = None) -> Packed:
        one = self.codes[name]
        assert one.zeros is not None and rows is not None
        return Packed(one.codes[rows], one.scales[rows], one.zeros[rows])


def test_codes_that_fit_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A matrix of random codes cannot be encoded again without a loss; kept, it has none."""
    model = model_of(config_of())
    checkpoint = dataclasses.replace(
        checkpoint_of(config_of(), {}), reader=PackedReader(random_tensors(model))
    )
    monkeypatch.setattr(work, "CHUNK_ELEMENTS", 350)
    monkeypatch.setattr(budget, "BLOCK_ELEMENTS", 700)
    report = convert_weight(checkpoint, model, SCHEMES["q4f16_awq"], tmp_path / "a", jobs=3)
    kept = [name for name in report.relative_errors if "down_proj" in name]
    assert kept and all(report.relative_errors[name] < 1e-3 for name in kept)
    assert report.relative_errors["model.layers.0.mlp.gate_up_proj.weight"] > 0.02
    for spec in model.parameters():
        if spec.name in kept:
            (source,) = spec.sources
            stored = [one.name for one in stored_params(spec, SCHEMES["q4f16_awq"])]
            reader = checkpoint.reader
            found = hold(
                reader.read_packed(source, slice(None)),
                reader.packed[source],
                SCHEMES["q4f16_awq"],
                layout="NK",
            )
            assert found is not None
            for one, expected in zip(load_params(tmp_path / "a", stored), found, strict=True):
                np.testing.assert_array_equal(one, expected)
    manifest = json.loads((tmp_path / "a" / "manifest.json").read_text())
    assert manifest["notes"] == ["a note of the reader"]
    assert "a note of the reader" in report.to_text()
    # Another scheme cannot hold them: they are decoded, encoded again, and that is said.
    report = convert_weight(checkpoint, model, SCHEMES["q4f16_1"], tmp_path / "b")
    assert min(report.relative_errors[name] for name in kept) > 0.02
    assert len(report.notes) == 2


def test_progress_reaches_the_total(tmp_path: Path) -> None:
    checkpoint, model = tiny()
    seen: list[tuple[str, int, int]] = []
    report = convert_weight(
        checkpoint,
        model,
        SCHEMES["q4f16_1"],
        tmp_path,
        progress=lambda *step: seen.append(step),
    )
    arrays = checkpoint.reader.arrays  # type: ignore[attr-defined]
    total = sum(array.nbytes for array in arrays.values())  # of the source
    assert report.kept == 0
    assert [done for _, done, _ in seen] == sorted({done for _, done, _ in seen})
    assert seen[0] == ("model.embed_tokens.weight", 0, total)
    assert seen[-1][1:] == (total, total)


def test_manifests(tmp_path: Path) -> None:
    checkpoint, model = tiny()
    plan = convert_weight(checkpoint, model, SCHEMES["q4f16_1"], tmp_path).plan
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["architecture"] == {"name": "llama", "label": model.arch.label}
    assert manifest["quantization"]["name"] == "q4f16_1"
    assert manifest["parameter_bytes"] == plan.total_bytes
    assert [t["name"] for t in manifest["tensors"]] == [s.name for s in plan.stored]
    assert {f["name"] for f in manifest["files"]} == contents(tmp_path).keys() - {"manifest.json"}
    package = json.loads((tmp_path / "mlc-model-manifest.json").read_text())
    assert package["weights"]["parameter_schema_id"] == parameter_schema_id(plan.stored)


# Of 102,400 bytes 0, 1, ... 250, 0, 1, ...: one of the test vectors that BLAKE3's authors publish.
BLAKE3 = "bc3e3d41a1146b069abffad3c0d44860cf664390afce4d9661f7902e7943e085"


def test_sources_are_hashed_as_told(tmp_path: Path) -> None:
    found, model = tiny()
    here = tmp_path / "source.bin"
    here.write_bytes((bytes(range(251)) * 408)[:102400])
    checkpoint = dataclasses.replace(found, sources=(source_file(here),))
    plain = {"name": here.name, "nbytes": here.stat().st_size}
    sha256 = hashlib.sha256(here.read_bytes()).hexdigest()
    cases: dict[SourceHash, dict[str, str]] = {
        "blake3": {"blake3": BLAKE3},
        "sha256": {"sha256": sha256},
        "none": {},
    }
    for kind, digest in cases.items():
        out, expected = tmp_path / kind, {**plain, **digest}
        convert_weight(checkpoint, model, SCHEMES["q4f16_1"], out, source_hash=kind)
        manifest = json.loads((out / "manifest.json").read_text())
        assert manifest["source"]["files"] == [expected]
        assert check_directory(out).ok


def test_reports_are_for_people_and_machines(tmp_path: Path) -> None:
    checkpoint, model = tiny()
    report = convert_weight(checkpoint, model, SCHEMES["q4f16_1"], tmp_path)
    for shown in (report.plan, report):
        data = json.loads(json.dumps(shown.to_json()))
        assert data["parameter_bytes"] == report.plan.total_bytes
        assert "q4f16_1" in shown.to_text() and "bits per weight" in shown.to_text()


# --- tensors that do not fit ---------------------------------------------------------------


def refused(change: Callable[[Tensors], object], **config: Any) -> str:
    checkpoint, model = tiny(**config)
    change(checkpoint.reader.arrays)  # type: ignore[attr-defined]
    with pytest.raises(InputError) as error:
        plan_conversion(checkpoint, model, SCHEMES["q4f16_1"])
    assert checkpoint.reader.reads == []  # type: ignore[attr-defined]
    return str(error.value)


LAYER = "model.layers.1.mlp.down_proj.weight"
ONE = np.ones((4, 4), np.float32)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop("lm_head.weight"), ("1 missing (lm_head.weight)", "tie_word_embeddings")),
        (lambda t: t.pop(LAYER), (f"1 missing ({LAYER})", "layer 1 is not whole")),
        (lambda t: t.clear(), ("21 missing", "and 16 more", "tie_word_embeddings")),
        (
            lambda t: t.update({LAYER.replace(".1.", ".2."): ONE}),
            ("1 unused (model.layers.2", "num_hidden_layers = 2, layer 2"),
        ),
        (
            lambda t: t.update({LAYER.replace("weight", "bias"): ONE}),
            ("1 unused", "mlp_bias"),
        ),
        (
            lambda t: t.update({"model.layers.0.self_attn.q_norm.weight": ONE}),
            ("1 unused", "another model_type"),
        ),
        (
            lambda t: t.update({LAYER.replace("weight", "qweight"): t.pop(LAYER)}),
            ("1 missing", "1 unused", "quantised already"),
        ),
        (
            lambda t: t.update({LAYER + "_scale_inv": ONE}),
            ("1 unused", "quantised already"),
        ),
        (
            lambda t: t.update({"base_model.lora_A.weight": ONE}),
            ("1 unused", "merge them"),
        ),
        (
            lambda t: t.update({"model.layers.0.mlp.experts.0.w.weight": ONE}),
            ("1 unused", "mixture of experts"),
        ),
        (lambda t: t.update({"visual.w": ONE}), ("1 unused (visual.w)", "does not belong")),
    ],
)
def test_names_that_do_not_fit(change: Callable[[Tensors], object], said: tuple[str, ...]) -> None:
    message = refused(change)
    assert "\n" not in message
    for part in said:
        assert part in message


def test_missing_biases_name_the_config_keys() -> None:
    model = model_of(config_of(attention_bias=True))
    tensors = random_tensors(model)
    plain = {name: array for name, array in tensors.items() if not name.endswith(".bias")}
    with pytest.raises(InputError, match=r"8 missing.*attention_bias"):
        plan_conversion(checkpoint_of({}, plain), model, SCHEMES["q0f16"])


def test_shapes_that_do_not_fit() -> None:
    def cut(name: str, rows: int, columns: int) -> Callable[[Tensors], object]:
        return lambda t: t.update({name: t[name][:rows, :columns]})

    message = refused(cut(LAYER, 50, 128))
    assert LAYER in message and "shape [50, 128]" in message and "[96, 128]" in message
    message = refused(cut("model.embed_tokens.weight", 199, 96))
    assert "vocab_size = 200, the tensor has 199" in message
    message = refused(cut("model.layers.0.mlp.up_proj.weight", 10, 96))
    assert "0.mlp.up_proj.weight: shape [10, 96], config.json makes [128, 96]" in message
    message = refused(cut("model.layers.1.self_attn.k_proj.weight", 40, 96))
    assert "k_proj.weight: shape [40, 96], config.json makes [48, 96]" in message
    message = refused(lambda t: t.update({"model.norm.weight": np.float32(1)[None][0]}))
    assert "model.norm.weight" in message and "shape []" in message


@pytest.mark.parametrize(
    ("name", "tensor", "said"),
    [
        # Conv1D, named as it is stored.
        ("gpt2", "transformer.h.0.mlp.c_fc.weight", "shape [160, 96], config.json makes [96, 160]"),
        # All heads in one.
        ("bloom", "transformer.h.0.self_attention.query_key_value.weight", "config.json makes"),
        ("mixtral", "model.layers.1.block_sparse_moe.experts.3.w1.weight", "makes [160, 96]"),
        ("granitemoe", "model.layers.0.block_sparse_moe.input_linear.weight", "makes [5, 320, 96]"),
    ],
)
def test_shapes_of_other_layouts(name: str, tensor: str, said: str) -> None:
    pytest.importorskip("transformers")
    config = dict(config_json(name))
    model = model_of(config)
    tensors = random_tensors(model)
    assert tensor in tensors
    tensors[tensor] = np.ascontiguousarray(tensors[tensor].swapaxes(-1, -2))
    with pytest.raises(InputError) as error:
        plan_conversion(checkpoint_of(config, tensors), model, SCHEMES["q4f16_1"])
    assert f"{tensor}: shape" in str(error.value) and said in str(error.value)


def test_more_experts_than_config_json_says() -> None:
    pytest.importorskip("transformers")
    config = dict(config_json("mixtral"))
    tensors = random_tensors(model_of(config))
    fewer = model_of({**config, "num_local_experts": 4})
    tensors |= {n: t[:4] for n, t in tensors.items() if n.endswith("moe.gate.weight")}
    with pytest.raises(InputError, match="4 experts in a layer, expert 4 is there"):
        plan_conversion(checkpoint_of(config, tensors), fewer, SCHEMES["q4f16_1"])


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, ml_dtypes.float8_e4m3fn], ids=str)
def test_packed_source_dtypes(dtype: Any) -> None:
    message = refused(lambda t: t.update({LAYER: t[LAYER].astype(dtype)}))
    assert LAYER in message and "quantised already" in message


def test_harmless_extras_are_ignored_and_listed(tmp_path: Path) -> None:
    checkpoint, model = tiny(tie_word_embeddings=True)
    arrays = checkpoint.reader.arrays  # type: ignore[attr-defined]
    arrays["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(3, np.float32)
    arrays["lm_head.weight"] = arrays["model.embed_tokens.weight"].copy()
    plan = convert_weight(checkpoint, model, SCHEMES["q4f16_1"], tmp_path).plan
    assert plan.ignored == ("lm_head.weight", "model.layers.0.self_attn.rotary_emb.inv_freq")
    assert "inv_freq" in plan.to_text()


@pytest.mark.parametrize("shape", [(200, 96), (199, 96)])
def test_a_tied_head_that_differs(tmp_path: Path, shape: tuple[int, int]) -> None:
    checkpoint, model = tiny(tie_word_embeddings=True)
    arrays = checkpoint.reader.arrays  # type: ignore[attr-defined]
    other = arrays["model.embed_tokens.weight"][: shape[0]].copy()
    other[-1, -1] += 1
    arrays["lm_head.weight"] = other
    with pytest.raises(InputError, match=r"lm_head\.weight differs.*tie_word_embeddings"):
        convert_weight(checkpoint, model, SCHEMES["q4f16_1"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- the output ----------------------------------------------------------------------------


@schemes
@pytest.mark.parametrize("value", [np.nan, 1e30])
def test_a_bad_value_leaves_nothing(tmp_path: Path, scheme: QuantScheme, value: float) -> None:
    checkpoint, model = tiny()
    weight = checkpoint.reader.arrays["lm_head.weight"]  # type: ignore[attr-defined]
    weight[-1, 5] = value
    if value == 1e30 and scheme.model_dtype != "float16":
        convert_weight(checkpoint, model, scheme, tmp_path / "out")
        return
    with pytest.raises(InputError, match=r"lm_head\.weight"):
        convert_weight(checkpoint, model, scheme, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_existing_output(tmp_path: Path) -> None:
    checkpoint, model = tiny()
    (tmp_path / "mlc-chat-config.json").write_text("{}")  # gen_config came first
    (tmp_path / "tokenizer.json").write_text("{}")
    convert_weight(checkpoint, model, SCHEMES["q0f32"], tmp_path)
    before = contents(tmp_path)
    assert {"mlc-chat-config.json", "tokenizer.json"} <= before.keys()
    with pytest.raises(InputError, match=r"holds parameters already.*--overwrite"):
        convert_weight(checkpoint, model, SCHEMES["q4f16_1"], tmp_path)
    assert contents(tmp_path) == before
    (tmp_path / "params_shard_7.bin").write_bytes(b"stale")
    convert_weight(checkpoint, model, SCHEMES["q4f16_1"], tmp_path, overwrite=True)
    after = contents(tmp_path)
    assert "params_shard_7.bin" not in after
    assert after["tokenizer.json"] == b"{}"
    assert check_directory(tmp_path).ok
    assert json.loads(after["manifest.json"])["quantization"]["name"] == "q4f16_1"


def test_a_failed_overwrite_keeps_the_old(tmp_path: Path) -> None:
    checkpoint, model = tiny()
    convert_weight(checkpoint, model, SCHEMES["q0f32"], tmp_path)
    before = contents(tmp_path)
    head = checkpoint.reader.arrays["lm_head.weight"]  # type: ignore[attr-defined]
    good, head[0, 0] = head[0, 0], np.inf
    with pytest.raises(InputError, match="not finite"):
        convert_weight(checkpoint, model, SCHEMES["q4f16_1"], tmp_path, overwrite=True)
    assert not (tmp_path / convert.STAGING).exists()
    head[0, 0] = good

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert_weight(
            checkpoint, model, SCHEMES["q4f16_1"], tmp_path, overwrite=True, progress=interrupt
        )
    # What was done waits for the same command, hidden; the directory is as it was.
    assert (tmp_path / convert.STAGING).is_dir()
    assert contents(tmp_path) == before
    report = convert_weight(checkpoint, model, SCHEMES["q0f16"], tmp_path, overwrite=True)
    assert report.kept == 0  # of another scheme
    assert not (tmp_path / convert.STAGING).exists()


@pytest.mark.parametrize("overwrite", [False, True])
def test_source_files_are_not_replaced(tmp_path: Path, overwrite: bool) -> None:
    config = config_of()
    model = model_of(config)
    (tmp_path / "params_shard_0.bin").write_bytes(b"weights of the source")
    checkpoint = checkpoint_of(config, random_tensors(model), (tmp_path / "params_shard_0.bin",))
    before = contents(tmp_path)
    with pytest.raises(InputError, match="is a source file"):
        convert_weight(checkpoint, model, SCHEMES["q0f16"], tmp_path, overwrite=overwrite)
    assert contents(tmp_path) == before


def test_a_foreign_manifest_is_not_replaced(tmp_path: Path) -> None:
    checkpoint, model = tiny()
    (tmp_path / "manifest.json").write_text('{"name": "my web app"}')
    with pytest.raises(InputError, match="not ours"):
        convert_weight(checkpoint, model, SCHEMES["q0f16"], tmp_path, overwrite=True)
    assert contents(tmp_path) == {"manifest.json": b'{"name": "my web app"}'}


def test_output_that_cannot_be_written(tmp_path: Path) -> None:
    checkpoint, model = tiny()
    (tmp_path / "file").write_text("")
    for place, said in ((tmp_path / "file", "is a file"), (tmp_path / "file" / "x", "cannot be")):
        with pytest.raises(InputError, match=said):
            convert_weight(checkpoint, model, SCHEMES["q0f16"], place)
    assert contents(tmp_path) == {"file": b""}


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root writes anywhere")
def test_read_only_output(tmp_path: Path) -> None:
    checkpoint, model = tiny()
    tmp_path.chmod(0o500)
    with pytest.raises(InputError, match="Permission denied"):
        convert_weight(checkpoint, model, SCHEMES["q0f16"], tmp_path / "out")


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint, model = tiny()
    usage = convert.shutil.disk_usage(tmp_path)._replace(free=1 << 20)
    monkeypatch.setattr(convert.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(InputError, match=r"needs \d+ MB, 1 MB are free"):
        convert_weight(checkpoint, model, SCHEMES["q0f16"], tmp_path / "new" / "out")
    assert checkpoint.reader.reads == []  # type: ignore[attr-defined]
    assert list(tmp_path.iterdir()) == []


# --- resources -----------------------------------------------------------------------------

MEASURE = """
import json, resource, sys
from pathlib import Path
from mlc_compile.models import load_model
from mlc_compile.quantization.scheme import get_scheme
from mlc_compile.weights.checkpoint import open_checkpoint
from mlc_compile.weights.convert import convert_weight
source, out, scheme = sys.argv[1:]
checkpoint = open_checkpoint(source)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
model = load_model(checkpoint.config, where=source)
convert_weight(checkpoint, model, get_scheme(scheme), Path(out))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, "tvm" in sys.modules)
"""


LARGE = [
    config_of(
        hidden_size=512, head_dim=128, num_hidden_layers=1, vocab_size=50_000, hidden_act="silu"
    ),
    # Read by columns.
    {
        "model_type": "gpt2",
        "n_embd": 1536,
        "n_head": 12,
        "n_layer": 1,
        "n_positions": 64,
        "vocab_size": 20_000,
    },
    config_of("mixtral", hidden_size=512, head_dim=128, vocab_size=1000)
    | {"intermediate_size": 4096, "num_hidden_layers": 1}
    | {"num_local_experts": 9, "num_experts_per_tok": 2},
]


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux")
@pytest.mark.parametrize("name", ["q0f32", "q4f16_1"])
@pytest.mark.parametrize("config", LARGE, ids=lambda config: str(config["model_type"]))
def test_memory_is_bounded_and_tvm_stays_out(
    tmp_path: Path, name: str, config: Mapping[str, Any]
) -> None:
    """A float32 checkpoint of more than 200 MB takes less than 120 MiB over an idle process."""
    model = model_of(config)
    header: dict[str, Any] = {}
    end = 0
    for spec in model.parameters():
        for source, shape in expected_shapes(spec).items():
            start, end = end, end + 4 * int(np.prod(shape))
            header[source] = {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}
    source_dir = tmp_path / "source"
    source_dir.mkdir()
    (source_dir / "config.json").write_text(json.dumps(config))
    text = json.dumps(header).encode()
    with (source_dir / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)  # zeros that take no space
    assert end > 200e6
    grown, tvm = "", "True"
    for out in ("first", "second"):  # the first may build kernels, which the user's cache keeps
        if tvm == "True":
            done = subprocess.run(
                [sys.executable, "-c", MEASURE, str(source_dir), str(tmp_path / out), name],
                capture_output=True,
                text=True,
                check=True,
            )
            grown, tvm = done.stdout.split()
    assert int(grown) / 1024 < 120
    assert tvm == "False"


def test_memory_is_planned_within_what_is_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer workers and smaller blocks, until not even one small block fits."""
    model = model_of(config_of(hidden_size=512, head_dim=128, vocab_size=50_000))
    shapes = {name: s for spec in model.parameters() for name, s in expected_shapes(spec).items()}
    empty = {name: np.broadcast_to(np.float32(0), shape) for name, shape in shapes.items()}
    checkpoint = checkpoint_of({}, empty)
    plan = plan_conversion(checkpoint, model, SCHEMES["q4f16_1"])
    monkeypatch.setattr(budget, "resident", lambda: 50 << 20)
    monkeypatch.setattr(budget, "peak_resident", lambda: 60 << 20)
    free = budget.plan_budget(plan, checkpoint, 8, None)
    assert (free.workers, free.block_elements) == (8, work.BLOCK_ELEMENTS)
    assert budget.plan_budget(plan, checkpoint, 8, free.peak) == free
    last = free
    for allowed in range(free.peak, 60 << 20, -(8 << 20)):
        try:
            found = budget.plan_budget(plan, checkpoint, 8, allowed)
        except InputError as error:
            (least,) = re.findall(r"works is --max-ram (\d+)MiB", str(error))
            assert allowed < int(least) << 20 < last.peak + (2 << 20)
            assert budget.plan_budget(plan, checkpoint, 8, int(least) << 20).workers == 1
            break
        assert found.peak <= allowed and found.workers <= last.workers
        last = found
    else:
        raise AssertionError("nothing was refused")
    assert last.workers <= 2
    compiled = budget.plan_budget(plan, checkpoint, 8, None, compiled=True)
    assert "tvm" in sys.modules or compiled.peak > free.peak


def test_plans_compare_equal() -> None:
    checkpoint, model = tiny()
    plan = plan_conversion(checkpoint, model, SCHEMES["q4f16_1"])
    assert dataclasses.replace(plan) == plan
    assert plan != plan_conversion(checkpoint, model, SCHEMES["q4f16_0"])
