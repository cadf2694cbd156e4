"""Every block type of the gguf package: decoded by rows, and as codes where it has them."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import pytest

from mlc_compile.models.detect import load_model
from mlc_compile.models.params import expected_shapes
from mlc_compile.quantization.codec import decode
from mlc_compile.quantization.hold import hold, holding_schemes, values
from mlc_compile.quantization.policy import is_quantized, stored_layout, stored_params
from mlc_compile.quantization.scheme import get_scheme
from mlc_compile.weights.checkpoint import open_checkpoint
from mlc_compile.weights.convert import convert_weight
from mlc_compile.weights.gguf_file import PLAIN_TYPES, GgufFile
from mlc_compile.weights.gguf_packed import packed_info, unpack
from mlc_compile.weights.tensor_cache import load_params

sys.path.insert(0, str(Path(__file__).parent))
from gguf_files import SIZES, write

ROWS = 6
BLOCKS = 2
# Types that the package's own registry of decoders knows.
TYPES = [
    kind.name
    for kind in gguf.GGML_QUANT_SIZES
    if kind.name not in PLAIN_TYPES and kind in gguf.quants._type_traits
]
PACKED = [name for name in TYPES if packed_info(name)]


def random_blocks(name: str) -> np.ndarray:
    """uint8 [ROWS, bytes]: any bits at all, but for scales that are not finite."""
    kind = gguf.GGMLQuantizationType[name]
    size = gguf.GGML_QUANT_SIZES[kind][1]
    rng = np.random.default_rng(sum(name.encode()))
    blocks = rng.integers(0, 256, (64 * ROWS * BLOCKS, size), np.uint8)
    with np.errstate(all="ignore"):
        finite = np.isfinite(gguf.dequantize(blocks, kind)).all(axis=1)
    return blocks[finite][: ROWS * BLOCKS].reshape(ROWS, -1)


class _Tensor:
    """As much of a torch tensor as the writer takes."""

    def __init__(self, array: np.ndarray) -> None:
        self.numpy = lambda: array

    def float(self) -> _Tensor:
        return self


def plain_model() -> Any:
    """As much of a random transformers llama as the writer takes, without importing torch."""
    config = {**SIZES, "tie_word_embeddings": False}
    classes = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    rng = np.random.default_rng(0)
    state = {
        name: _Tensor(rng.standard_normal(shape).astype(np.float32))
        for spec in load_model({**config, **classes}, where="x").parameters()
        for name, shape in expected_shapes(spec).items()
    }
    return SimpleNamespace(
        config=SimpleNamespace(**config, rope_parameters=None), state_dict=lambda: state
    )


def file_of(path: Path, tensors: dict[str, np.ndarray]) -> GgufFile:
    """A container with a tensor of each type, by its name."""
    writer = gguf.GGUFWriter(path, "llama")
    for name, blocks in tensors.items():
        writer.add_tensor(name, blocks, raw_dtype=gguf.GGMLQuantizationType[name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return GgufFile(path)


def test_the_registry_is_not_empty() -> None:
    assert {"Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q6_K", "IQ4_NL"} <= set(TYPES)
    assert len(TYPES) >= 22
    assert set(PACKED) == {"Q4_0", "Q5_0", "Q8_0", "IQ4_NL", "TQ1_0", "TQ2_0", "MXFP4"} & set(TYPES)


def test_every_type_decodes_as_the_package_does_and_by_rows(tmp_path: Path) -> None:
    stored = {name: random_blocks(name) for name in TYPES}
    container = file_of(tmp_path / "m.gguf", stored)
    for name, blocks in stored.items():
        expected = gguf.dequantize(blocks, gguf.GGMLQuantizationType[name])
        tensor = container.raw_tensors[name]
        assert tensor.shape == expected.shape == (ROWS, expected.shape[1])
        bits = expected.view(np.uint32)
        for rows in (slice(0, ROWS), slice(2, 5), slice(3, 3)):
            found = container.read(tensor, rows.start, rows.stop)
            assert found.dtype == np.float32
            np.testing.assert_array_equal(found.view(np.uint32), bits[rows], err_msg=name)
        order = np.array([4, 1, 5])
        found = container.read(tensor, 0, 0, order)
        np.testing.assert_array_equal(found.view(np.uint32), bits[order], err_msg=name)


@pytest.mark.parametrize("name", PACKED)
def test_codes_and_scales_are_the_decoded_numbers(name: str) -> None:
    blocks, info = random_blocks(name), packed_info(name)
    assert info is not None
    packed = unpack(blocks, name)
    expected = gguf.dequantize(blocks, gguf.GGMLQuantizationType[name])
    assert packed.codes.shape == expected.shape
    assert packed.scales.shape == (ROWS, expected.shape[1] // info.group_size)
    assert int(packed.codes.max()) < 1 << info.bits
    np.testing.assert_array_equal(values(packed, info), expected)
    assert unpack(blocks[:0], name).codes.shape == (0, expected.shape[1])


@pytest.mark.parametrize("name", PACKED)
def test_schemes_that_hold_a_type_decode_to_its_numbers(name: str) -> None:
    blocks, info = random_blocks(name), packed_info(name)
    assert info is not None
    if name == "MXFP4":
        blocks.reshape(ROWS, BLOCKS, -1)[..., 0] = 110 + np.arange(BLOCKS)  # powers of two
    else:
        scale = slice(-2, None) if name.startswith("TQ") else slice(0, 2)
        tiny = np.array([0.0123, -0.5], np.float16).view(np.uint8).reshape(BLOCKS, 2)
        blocks.reshape(ROWS, BLOCKS, -1)[..., scale] = tiny
    packed = unpack(blocks, name)
    expected = gguf.dequantize(blocks, gguf.GGMLQuantizationType[name])
    held = holding_schemes(info)
    assert held
    for scheme in map(get_scheme, held):
        arrays = hold(packed, info, scheme)
        assert arrays is not None
        found = decode(arrays, scheme, expected.shape[1])
        if scheme.model_dtype == "bfloat16":
            np.testing.assert_allclose(found.astype(np.float32), expected, rtol=2**-7)
        else:
            np.testing.assert_array_equal(found, expected.astype(found.dtype))


@pytest.mark.parametrize(("quant", "name"), [("Q4_0", "q4f16_1"), ("Q8_0", "q8f16_1")])
def test_a_model_is_converted_without_loss(tmp_path: Path, quant: str, name: str) -> None:
    """Rows of q and k in transformers' order; the embedding and the head too."""
    expected = write(tmp_path / "m.gguf", plain_model(), "llama", quant=quant)
    checkpoint = open_checkpoint(tmp_path / "m.gguf")
    model, scheme = load_model(checkpoint.config, where="x"), get_scheme(name)
    report = convert_weight(checkpoint, model, scheme, tmp_path / "out")
    assert report.notes == ()
    for spec in model.parameters():
        if not is_quantized(spec, scheme):
            continue
        numbers = np.concatenate([expected[source] for source in spec.sources])
        arrays = load_params(tmp_path / "out", [s.name for s in stored_params(spec, scheme)])
        layout = stored_layout(spec, scheme)
        found: Any = decode(tuple(arrays), scheme, spec.shape[-1], layout=layout)
        np.testing.assert_array_equal(found, numbers.astype(np.float16), err_msg=spec.name)
        if quant == "Q4_0":
            # its least code is -8, which is stored negated
            assert (arrays[1] < 0).any()


def test_other_types_are_quantised_again_and_that_is_said(tmp_path: Path) -> None:
    write(tmp_path / "m.gguf", plain_model(), "llama", quant="Q8_0")
    checkpoint = open_checkpoint(tmp_path / "m.gguf")
    model = load_model(checkpoint.config, where="x")
    report = convert_weight(checkpoint, model, get_scheme("q4f16_1"), tmp_path / "out")
    assert any("q8f16_1 keeps them as they are" in note for note in report.notes)


def test_types_that_no_scheme_keeps_are_counted(tmp_path: Path) -> None:
    expected = write(tmp_path / "m.gguf", plain_model(), "llama", quant="Q4_1")
    reader = open_checkpoint(tmp_path / "m.gguf").reader
    count = sum(value.ndim == 2 for value in expected.values())
    (note,) = reader.notes
    assert f"({count} of Q4_1)" in note
    assert not reader.packed
    write(tmp_path / "plain.gguf", plain_model(), "llama", quant="F16")
    assert open_checkpoint(tmp_path / "plain.gguf").reader.notes == ()
