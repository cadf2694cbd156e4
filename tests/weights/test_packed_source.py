"""Quantised checkpoints: every format's tensors as the packages that define them read them."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlc_compile.errors import InputError
from mlc_compile.quantization.hold import hold, values
from mlc_compile.quantization.scheme import get_scheme
from mlc_compile.weights.packed_source import METHODS, PackedReader, wrap
from mlc_compile.weights.shards import ShardReader
from mlc_compile.weights.st import SafetensorsFile

sys.path.insert(0, str(Path(__file__).parent))
from hf_files import st_bytes
from packed_files import KINDS, NUMPY, Golden, Tensors, golden, pack_model, stream

CASES = golden()


def reader(path: Path, tensors: Tensors) -> ShardReader:
    file = path / "model.safetensors"
    file.write_bytes(st_bytes(tensors))
    return ShardReader([SafetensorsFile(file)])


def opened(path: Path, config: Any, tensors: Tensors, module: str = "m") -> PackedReader:
    """The wrapped reader of tensors that belong to one module."""
    stored = {f"{module}.{suffix}": item for suffix, item in tensors.items()}
    found, rest = wrap(reader(path, stored), {"quantization_config": config, "x": 1})
    assert rest == {"x": 1}
    assert isinstance(found, PackedReader)
    return found


def case(method: str) -> Golden:
    """A small golden case of a method, with zero points where it has them."""
    name = {
        "awq": "awq:g8",
        "gptq": "gptq:b4-g16-asym",
        "compressed-tensors": "compressed_tensors:pack-quantized-4-group-asym",
        "fp8": "fp8:blocks-float32",
    }[method]
    return CASES[name]


def test_every_method_has_golden_tensors() -> None:
    methods = {found.config["quant_method"] for found in CASES.values()}
    assert methods == set(METHODS) - {"fbgemm_fp8"}
    assert len(CASES) >= 25


@pytest.mark.parametrize("name", CASES)
def test_dequantises_bit_for_bit_as_its_own_package(tmp_path: Path, name: str) -> None:
    found = CASES[name]
    source = opened(tmp_path, found.config, found.tensors)
    assert set(source.tensors) == {"m.weight"}
    info = source.tensors["m.weight"]
    assert info.shape == found.expected.shape
    assert info.dtype == "float32"
    assert info.nbytes == sum(array.nbytes for _, array in found.tensors.values())
    whole = source.read("m.weight")
    assert whole.dtype == np.float32
    np.testing.assert_array_equal(whole, found.expected)
    for rows in (slice(0, 1), slice(3, 11), slice(5, None), slice(2, 2)):
        np.testing.assert_array_equal(source.read("m.weight", rows), found.expected[rows])


@pytest.mark.parametrize("name", CASES)
def test_codes_and_scales_make_the_same_numbers(tmp_path: Path, name: str) -> None:
    found = CASES[name]
    source = opened(tmp_path, found.config, found.tensors)
    if "desc_act" in name:
        assert not source.packed
        assert any("desc_act" in note for note in source.notes)
        with pytest.raises(ValueError, match="not in order"):
            source.read_packed("m.weight")
        return
    info = source.packed["m.weight"]
    order = np.array([7, 3, 11, 3])
    for rows, expected in (
        (None, found.expected),
        (slice(2, 9), found.expected[2:9]),
        (order, found.expected[order]),
        (order[:0], found.expected[:0]),
    ):
        packed = source.read_packed("m.weight", rows)
        assert packed.codes.dtype == np.uint8
        assert packed.scales.dtype == np.float32
        if info.codes == "affine":
            assert (packed.zeros is None) == (info.symmetric_zero is not None)
            assert int(packed.codes.max(initial=0)) < 1 << info.bits
        # One product in float32; the package rounds it to the scales' dtype.
        np.testing.assert_allclose(values(packed, info), expected, rtol=2**-8, atol=0)
    with pytest.raises(IndexError):
        source.read_packed("m.weight", np.array([len(found.expected)]))


@pytest.mark.parametrize("kind", KINDS)
def test_the_writers_of_these_tests_agree(tmp_path: Path, kind: str) -> None:
    rng = np.random.default_rng(1)
    weights = {"m.weight": (rng.standard_normal((24, 192)) * 0.1).astype(np.float32)}
    written = pack_model(kind, weights)
    source, _ = wrap(reader(tmp_path, written.tensors), {"quantization_config": written.config})
    np.testing.assert_array_equal(source.read("m.weight"), written.values["m.weight"])
    assert bool(source.packed) == (kind != "gptq-desc_act")
    error = np.abs(written.values["m.weight"] - weights["m.weight"]).max()
    assert 0 < error < 0.06  # it is this weight


def test_plain_tensors_stay_as_they_are(tmp_path: Path) -> None:
    found = case("awq")
    extra = np.arange(6, dtype=np.float16).reshape(2, 3)
    tensors = {f"m.{k}": v for k, v in found.tensors.items()} | {"norm.weight": ("F16", extra)}
    inner = reader(tmp_path, tensors)
    source, _ = wrap(inner, {"quantization_config": found.config})
    assert set(source.tensors) == {"m.weight", "norm.weight"}
    assert source.tensors["norm.weight"] == inner.tensors["norm.weight"]
    np.testing.assert_array_equal(source.read("norm.weight", slice(1, 2)), extra[1:])
    assert source.files == inner.files
    source.release()


def test_without_quantization_config_nothing_changes(tmp_path: Path) -> None:
    inner = reader(tmp_path, {"a": ("F16", np.zeros(3, np.float16))})
    for config in ({"x": 1}, {"x": 1, "quantization_config": None}):
        assert wrap(inner, config) == (inner, config)


def test_compression_config_is_the_old_name(tmp_path: Path) -> None:
    found = case("compressed-tensors")
    config = {k: v for k, v in found.config.items() if k != "quant_method"}
    stored = {f"m.{k}": v for k, v in found.tensors.items()}
    source, rest = wrap(reader(tmp_path, stored), {"compression_config": config})
    assert rest == {}
    np.testing.assert_array_equal(source.read("m.weight"), found.expected)
    with pytest.raises(InputError, match="both quantization_config and compression_config"):
        wrap(source, {"compression_config": config, "quantization_config": found.config})


@pytest.mark.parametrize(
    ("method", "hint"),
    [("bitsandbytes", "unquantised"), ("mxfp4", "dequantize=True"), ("hqq", "read are: awq")],
)
def test_other_methods_are_refused_by_name(tmp_path: Path, method: str, hint: str) -> None:
    inner = reader(tmp_path, {"a": ("F16", np.zeros(3, np.float16))})
    with pytest.raises(InputError, match=method) as caught:
        wrap(inner, {"quantization_config": {"quant_method": method}})
    assert hint in (caught.value.hint or "")


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    *((m, {"surprise": 1}, "surprise = 1") for m in ("awq", "gptq", "compressed-tensors", "fp8")),
    ("awq", {"bits": 8}, "bits is 8; only 4"),
    ("awq", {"version": "gemv"}, 'version is "gemv"'),
    ("awq", {"group_size": "8"}, "group_size must be an integer"),
    ("awq", {"group_size": 0}, "group_size is 0"),
    ("awq", {"backend": "llm-awq"}, "backend"),
    ("awq", {"group_size": 16}, "m.qzeros is"),
    ("awq", {"modules_to_not_convert": ["m"]}, "lists m, which is packed"),
    ("gptq", {"bits": 5}, "bits is 5"),
    ("gptq", {"bits": True}, "bits is true"),
    ("gptq", {"bits": 8}, "m.qweight is"),
    ("gptq", {"group_size": None}, "group_size is missing"),
    ("gptq", {"checkpoint_format": "marlin"}, 'checkpoint_format is "marlin"'),
    ("gptq", {"format": "gptq_v2"}, 'format is "gptq_v2"'),  # and checkpoint_format another
    ("gptq", {"dynamic": {"+:m": {"bits": 8}}}, "dynamic"),
    ("gptq", {"is_marlin_format": True}, "is_marlin_format"),
    ("compressed-tensors", {"format": "marlin-24"}, 'format is "marlin-24"'),
    ("compressed-tensors", {"format": "int-quantized"}, "weight_packed is there"),
    ("compressed-tensors", {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity"),
    ("compressed-tensors", {"transform_config": {"config_groups": {"u": 1}}}, "transform_config"),
    ("compressed-tensors", {"quantization_status": "calibration"}, "quantization_status"),
    ("compressed-tensors", {"config_groups": {}}, "no group of"),
    ("compressed-tensors", {"ignore": ["m"]}, "ignore lists m, which is packed"),
    ("fp8", {"fmt": "e5m2"}, 'fmt is "e5m2"'),
    ("fp8", {"weight_block_size": [0, 16]}, "weight_block_size"),
    ("fp8", {"weight_block_size": [16, 8]}, "m.weight_scale_inv is"),
    ("fp8", {"weight_block_size": None}, "m.weight_scale_inv is"),
    ("fp8", {"modules_to_not_convert": ["m"]}, "lists m, which is packed"),
]


@pytest.mark.parametrize(("method", "change", "message"), REFUSED)
def test_settings_that_are_not_read_are_refused(
    tmp_path: Path, method: str, change: dict[str, Any], message: str
) -> None:
    found = case(method)
    with pytest.raises(InputError) as caught:
        opened(tmp_path, found.config | change, found.tensors)
    assert message in caught.value.message
    assert caught.value.hint or "must be" in caught.value.message


WEIGHTS_REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"num_bits": 3}, "num_bits is 3"),
    ({"type": "float"}, "num_bits is 4"),
    ({"strategy": "tensor_group"}, 'strategy is "tensor_group"'),
    ({"strategy": "block"}, "strategy is 'block'"),
    ({"group_size": None}, "group_size is None"),
    ({"dynamic": True}, "dynamic is true"),
    ({"symmetric": 1}, "symmetric must be true or false"),
    ({"news": 1}, "news = 1"),
]


@pytest.mark.parametrize(("change", "message"), WEIGHTS_REFUSED)
def test_weight_settings_that_are_not_read_are_refused(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    found = case("compressed-tensors")
    config = json.loads(json.dumps(found.config))
    config["config_groups"]["group_0"]["weights"] |= change
    with pytest.raises(InputError) as caught:
        opened(tmp_path, config, found.tensors)
    assert message in caught.value.message


@pytest.mark.parametrize("method", ["awq", "gptq", "compressed-tensors", "fp8"])
def test_a_missing_or_misshapen_part_is_refused(tmp_path: Path, method: str) -> None:
    found = case(method)
    for name, (dtype, array) in found.tensors.items():
        if name in ("g_idx", "weight", "weight_packed", "qweight", "weight_scale"):
            continue  # without these there is no packed weight, or none in order
        with pytest.raises(InputError, match=r"m\.|is e4m3 and has 0 of"):
            rest = {k: v for k, v in found.tensors.items() if k != name}
            opened(tmp_path, found.config, rest)
        with pytest.raises(InputError, match=rf"m\.{name}"):
            short = np.ascontiguousarray(array[:-1])
            opened(tmp_path, found.config, found.tensors | {name: (dtype, short)})
        with pytest.raises(InputError, match=rf"m\.{name}"):
            other = ("F64", array.astype(np.float64))
            opened(tmp_path, found.config, found.tensors | {name: other})


def test_a_weight_both_packed_and_plain_is_refused(tmp_path: Path) -> None:
    found = case("awq")
    plain = ("F16", np.zeros((2, 2), np.float16))
    with pytest.raises(InputError, match="both packed and as it is"):
        opened(tmp_path, found.config, found.tensors | {"weight": plain})


def test_gptq_says_symmetric_and_is_not(tmp_path: Path) -> None:
    found = CASES["gptq:b4-g16-asym"]
    source = opened(tmp_path, found.config | {"sym": True}, found.tensors)
    with pytest.raises(InputError, match="sym = true"):
        source.read("m.weight")


def test_gptq_says_ordered_columns_and_has_none(tmp_path: Path) -> None:
    found = CASES["gptq:b4-g16-asym-desc_act"]
    source = opened(tmp_path, found.config | {"desc_act": False}, found.tensors)
    with pytest.raises(InputError, match="desc_act = false"):
        source.read("m.weight")
    dtype, index = found.tensors["g_idx"]
    bad = opened(tmp_path, found.config, found.tensors | {"g_idx": (dtype, index + 1)})
    with pytest.raises(InputError, match="g_idx names a group"):
        bad.read("m.weight")


def test_gptq_zero_points_wrap_as_the_first_version_masks_them(tmp_path: Path) -> None:
    found = CASES["gptq:b4-g16-asym"]
    words = np.full_like(found.tensors["qzeros"][1], -1)  # 15 in every field
    changed = found.tensors | {"qzeros": ("I32", words)}
    assert not opened(tmp_path, found.config, changed).read_packed("m.weight").zeros.any()
    second = found.config | {"checkpoint_format": "gptq_v2"}
    assert (opened(tmp_path, second, changed).read_packed("m.weight").zeros == 15).all()


def test_gptq_without_g_idx_and_modules_left_out(tmp_path: Path) -> None:
    found = CASES["gptq:b3-g16-asym"]
    rest = {k: v for k, v in found.tensors.items() if k != "g_idx"}
    config = found.config | {"dynamic": {"-:lm_head": {}}, "meta": {"quantizer": ["x"]}}
    source = opened(tmp_path, config, rest)
    np.testing.assert_array_equal(source.read("m.weight"), found.expected)


def test_compressed_tensors_of_older_versions(tmp_path: Path) -> None:
    """weight_g_idx gives each column's group; zero points of symmetric weights are written out."""
    rng = np.random.default_rng(0)
    n, k, size = 4, 64, 16
    codes, index = rng.integers(0, 16, (n, k)), rng.permutation(np.arange(k) // size)
    scales = rng.uniform(0.01, 0.1, (n, k // size)).astype(np.float16)
    config = json.loads(json.dumps(CASES["compressed_tensors:pack-quantized-4-group-sym"].config))
    config["config_groups"]["group_0"]["weights"]["actorder"] = "group"
    tensors: Tensors = {
        "weight_packed": ("I32", np.ascontiguousarray(stream(codes.T, 4).T)),
        "weight_scale": ("F16", scales),
        "weight_shape": ("I64", np.array([n, k])),
        "weight_g_idx": ("I32", index.astype(np.int32)),
        "weight_zero_point": ("I8", np.zeros((n, k // size), np.int8)),
    }
    config["config_groups"]["group_0"]["weights"]["group_size"] = size
    signed = (codes - 8).astype(np.float16)
    source = opened(tmp_path, config, tensors)
    np.testing.assert_array_equal(source.read("m.weight"), signed * scales[:, index])
    assert not source.packed
    unset = tensors | {"weight_g_idx": ("I32", np.full(k, -1, np.int32))}
    plain = opened(tmp_path, config, unset).read("m.weight")
    np.testing.assert_array_equal(plain, signed * scales.repeat(size, axis=1))
    ones = tensors | {"weight_zero_point": ("I8", np.ones((n, k // size), np.int8))}
    with pytest.raises(InputError, match="says symmetric"):
        opened(tmp_path, config, ones).read("m.weight")


def test_compressed_tensors_groups_go_by_name_pattern_and_class(tmp_path: Path) -> None:
    four = CASES["compressed_tensors:pack-quantized-4-group-sym"]
    eight = CASES["compressed_tensors:pack-quantized-8-group-sym"]
    stored = {f"a.mlp.{k}": v for k, v in four.tensors.items()}
    stored |= {f"b.down.{k}": v for k, v in eight.tensors.items()}
    for target in ("re:.*down$", "b.down"):
        groups = {"group_0": four.config["config_groups"]["group_0"]}
        groups["group_1"] = eight.config["config_groups"]["group_0"] | {"targets": [target]}
        config = four.config | {"config_groups": groups}
        source, _ = wrap(reader(tmp_path, stored), {"quantization_config": config})
        np.testing.assert_array_equal(source.read("a.mlp.weight"), four.expected)
        np.testing.assert_array_equal(source.read("b.down.weight"), eight.expected)
        assert [source.packed[f"{m}.weight"].bits for m in ("a.mlp", "b.down")] == [4, 8]


@pytest.mark.parametrize(
    "pattern", ["(a+)+$", "(", ".*.*.*.*.*x", r"(.)\1", "(?P<x>a)", "(a|b){3,}"]
)
def test_patterns_that_may_never_end_are_refused(tmp_path: Path, pattern: str) -> None:
    found = case("compressed-tensors")
    config = json.loads(json.dumps(found.config))
    config["config_groups"]["group_0"]["targets"] = [f"re:{pattern}"]
    with pytest.raises(InputError, match="has the target"):
        opened(tmp_path, config, found.tensors, "a" * 40)


def test_activation_scales_are_dropped_and_said(tmp_path: Path) -> None:
    found = CASES["compressed_tensors:float-quantized-8float-tensor-sym"]
    config = json.loads(json.dumps(found.config))
    group = config["config_groups"]["group_0"]
    group["input_activations"] = {"num_bits": 8, "type": "float", "strategy": "tensor"}
    config["kv_cache_scheme"] = {"num_bits": 8, "type": "float"}
    one = ("F32", np.ones(1, np.float32))
    source = opened(tmp_path, config, found.tensors | {"input_scale": one}, "self_attn.k_proj")
    assert set(source.tensors) == {"self_attn.k_proj.weight"}
    assert [word in " ".join(source.notes) for word in ("activations", "KV cache")] == [True, True]
    block = CASES["fp8:blocks-float32"]
    source = opened(tmp_path, block.config, block.tensors | {"input_scale": one})
    assert set(source.tensors) == {"m.weight"}


@pytest.mark.parametrize("method", ["fp8", "fbgemm_fp8"])
def test_fp8_scales_of_tensors_and_rows(tmp_path: Path, method: str) -> None:
    codes = CASES["fp8:blocks-float32"].tensors["weight"]
    numbers = codes[1].astype(np.float32)
    rows = np.linspace(0.01, 0.02, len(numbers), dtype=np.float32)[:, None]
    for name in ("weight_scale", "weight_scale_inv"):
        for scale in (np.float32([0.5]), np.float32(0.25), rows):
            tensors = {"weight": codes, name: ("F32", np.asarray(scale))}
            source = opened(tmp_path, {"quant_method": method}, tensors)
            np.testing.assert_array_equal(source.read("m.weight"), numbers * scale)
            assert source.packed["m.weight"].group_size == 0


def test_fp8_blocks_at_the_edges(tmp_path: Path) -> None:
    codes = CASES["fp8:blocks-float32"].tensors["weight"]
    part = np.ascontiguousarray(codes[1][:20, :27])
    scales = np.array([[1, 2], [4, 8]], np.float32)
    config = {"quant_method": "fp8", "weight_block_size": [16, 16]}
    tensors = {"weight": ("F8_E4M3", part), "weight_scale_inv": ("F32", scales)}
    source = opened(tmp_path, config, tensors)
    wide = scales.repeat(16, axis=0).repeat(16, axis=1)[:20, :27]
    np.testing.assert_array_equal(source.read("m.weight"), part.astype(np.float32) * wide)


VALUES: list[Any] = [None, True, 0, 1, -1, 3, 16, 4.0, 1e300, 2**40, "", "x", "float", [], {}]
VALUES += [[0, 0], [-1, 2], ["m"], ["re:("], {"a": 1}]


def damaged(found: Golden, rng: random.Random) -> tuple[Any, Tensors]:
    """A case with one value of its config or one of its tensors replaced."""
    config, tensors = json.loads(json.dumps(found.config)), dict(found.tensors)
    inner = [config]
    inner += [config["config_groups"]["group_0"]] if "config_groups" in config else []
    inner += [inner[-1]["weights"]] if len(inner) > 1 else []
    if rng.random() < 0.5:
        place = rng.choice(inner)
        place[rng.choice(list(place))] = rng.choice(VALUES)
        return config, tensors
    name = rng.choice(list(tensors))
    dtype, array = tensors[name]
    noise = np.frombuffer(rng.randbytes(array.nbytes), array.dtype).reshape(array.shape)
    other = rng.choice(["F16", "F32", "I8", "I32", "I64", "F8_E4M3"])
    tensors[name] = rng.choice(
        [
            (dtype, noise),
            (dtype, array.reshape(-1)),
            (dtype, np.ascontiguousarray(array[:-1])),
            (other, np.zeros(array.shape, NUMPY[other])),
        ]
    )
    return config, tensors


def test_damage_anywhere_is_our_error_or_harmless(tmp_path: Path) -> None:
    rng = random.Random(0)
    refused = 0
    for _ in range(400):
        config, tensors = damaged(CASES[rng.choice(list(CASES))], rng)
        stored = {f"m.{suffix}": item for suffix, item in tensors.items()}
        try:
            source, _ = wrap(reader(tmp_path, stored), {"quantization_config": config})
            for name, info in source.tensors.items():
                assert source.read(name).shape == info.shape
            for name, packed in source.packed.items():
                read = source.read_packed(name)
                for scheme in map(get_scheme, ("q4f16_1", "q8f16_pc", "q4f16_awq", "e4m3f16_1")):
                    hold(read, packed, scheme)
        except InputError:
            refused += 1
    assert 200 < refused < 400
