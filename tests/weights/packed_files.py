"""Checkpoints in the layouts of quantised formats, from golden tensors or written by hand.

The writers here state the layouts a second time, element by element, so that they share nothing
with the readers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "packed"

NUMPY = {
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "I8": np.dtype(np.int8),
    "I32": np.dtype(np.int32),
    "I64": np.dtype(np.int64),
}
SIZE = 32  # columns of a group, unless another is asked for
Tensors = dict[str, tuple[str, np.ndarray]]


class Golden(NamedTuple):
    """A weight as a package packed it: quantization_config, tensors, and what it stands for."""

    config: dict[str, Any]
    tensors: Tensors
    expected: np.ndarray


def golden() -> dict[str, Golden]:
    """Every case of tests/golden/packed, by file and name."""
    found: dict[str, Golden] = {}
    for path in sorted(GOLDEN.glob("*.npz")):
        with np.load(path) as file:
            arrays = dict(file)
        for key, config in arrays.items():
            case, _, last = key.partition("|")
            if last != "config":
                continue
            tensors: Tensors = {}
            for name, value in arrays.items():
                if name.startswith(f"{case}|") and name.count("|") == 2:
                    _, tensor, dtype = name.split("|")
                    tensors[tensor] = (dtype, value.view(NUMPY[dtype]))
            _, expected = tensors.pop("=")
            found[f"{path.stem}:{case}"] = Golden(
                json.loads(str(config)), tensors, expected.astype(np.float32)
            )
    return found


def stream(fields: np.ndarray, bits: int) -> np.ndarray:
    """int32 [w, n]: the fields [count, n] as a stream of bits along axis 0, lowest first."""
    count, n = fields.shape
    table = (fields[:, None, :] >> np.arange(bits)[None, :, None]) & 1  # [count, bits, n]
    flat = table.reshape(count * bits, n)
    flat = np.pad(flat, ((0, -len(flat) % 32), (0, 0))).reshape(-1, 32, n).astype(np.uint64)
    words = (flat << np.arange(32, dtype=np.uint64)[None, :, None]).sum(axis=1)
    return words.astype(np.uint32).view(np.int32)


def awq_words(fields: np.ndarray) -> np.ndarray:
    """int32 [m, n / 8] of AutoAWQ: fields [m, n] with a word's nibbles in its own order."""
    m, n = fields.shape
    words = np.zeros((m, n // 8), np.uint32)
    for nibble, element in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
        words |= fields[:, element::8].astype(np.uint32) << np.uint32(4 * nibble)
    return words.view(np.int32)


class Written(NamedTuple):
    """A model's linear weights in a packed format, and the numbers that they stand for."""

    config: dict[str, Any]
    tensors: Tensors
    values: dict[str, np.ndarray]


def pack_model(kind: str, weights: Mapping[str, np.ndarray], size: int = SIZE) -> Written:
    """The given matrices [N, K], by name, quantised and written in the layout of `kind` (KINDS).

    size: columns of a group.
    """
    rng = np.random.default_rng(0)
    tensors: Tensors = {}
    values = {}
    for name, weight in sorted(weights.items()):
        base = name.removesuffix(".weight")
        found, value = _WRITERS[kind](weight.astype(np.float32), rng, size)
        tensors |= {f"{base}.{suffix}": item for suffix, item in found.items()}
        values[name] = value
    return Written(_config(kind, size), tensors, values)


def _quantise(
    weight: np.ndarray, bits: int, size: int, index: np.ndarray | None, zero: bool
) -> Any:
    """codes [n, k], float16 scales [n, groups], zeros [n, groups], values float32 [n, k]."""
    n, k = weight.shape
    index = np.arange(k) // size if index is None else index
    groups, top = int(index.max()) + 1, (1 << bits) - 1
    middle = 1 << (bits - 1)
    scales = np.zeros((n, groups), np.float16)
    zeros = np.full((n, groups), middle)
    for group in range(groups):
        part = weight[:, index == group]
        low, high = np.minimum(part.min(axis=1), 0), np.maximum(part.max(axis=1), 0)
        span = (high - low) / top if zero else np.abs(part).max(axis=1) / middle
        scales[:, group] = np.maximum(span, 1e-4)
        if zero:
            zeros[:, group] = np.clip(np.rint(-low / scales[:, group]), 1, top)
    wide = scales.astype(np.float32)[:, index]
    codes = np.clip(np.rint(weight / wide) + zeros[:, index], 0, top).astype(np.int64)
    values = ((codes - zeros[:, index]) * wide).astype(np.float16).astype(np.float32)
    return codes, scales, zeros, values


def _awq(weight: np.ndarray, rng: np.random.Generator, size: int) -> tuple[Tensors, np.ndarray]:
    del rng
    codes, scales, zeros, values = _quantise(weight, 4, size, None, zero=True)
    return {
        "qweight": ("I32", awq_words(codes.T)),
        "qzeros": ("I32", awq_words(zeros.T)),
        "scales": ("F16", np.ascontiguousarray(scales.T)),
    }, values


def _gptq(
    weight: np.ndarray, rng: np.random.Generator, size: int, ordered: bool = False
) -> tuple[Tensors, np.ndarray]:
    index = np.arange(weight.shape[1]) // size
    index = rng.permutation(index) if ordered else index
    codes, scales, zeros, values = _quantise(weight, 4, size, index, zero=ordered)
    return {
        "qweight": ("I32", stream(codes.T, 4)),
        "qzeros": ("I32", np.ascontiguousarray(stream(zeros - 1, 4).T)),
        "scales": ("F16", np.ascontiguousarray(scales.T)),
        "g_idx": ("I32", index.astype(np.int32)),
    }, values


def _gptq_ordered(
    weight: np.ndarray, rng: np.random.Generator, size: int
) -> tuple[Tensors, np.ndarray]:
    return _gptq(weight, rng, size, ordered=True)


def _ct_int4(weight: np.ndarray, rng: np.random.Generator, size: int) -> tuple[Tensors, np.ndarray]:
    del rng
    codes, scales, _, values = _quantise(weight, 4, size, None, zero=False)
    return {
        "weight_packed": ("I32", np.ascontiguousarray(stream(codes.T, 4).T)),
        "weight_scale": ("F16", scales),
        "weight_shape": ("I64", np.array(weight.shape)),
    }, values


def _ct_int8(weight: np.ndarray, rng: np.random.Generator, size: int) -> tuple[Tensors, np.ndarray]:
    del rng
    codes, scales, _, values = _quantise(weight, 8, weight.shape[1], None, zero=False)
    return {
        "weight": ("I8", (codes - 128).astype(np.int8)),
        "weight_scale": ("F16", scales),
    }, values


def _fp8(weight: np.ndarray, scale: np.ndarray, wide: np.ndarray) -> tuple[Any, np.ndarray]:
    codes = (weight / wide).astype(ml_dtypes.float8_e4m3fn)
    return codes, codes.astype(np.float32) * wide


def _ct_fp8(weight: np.ndarray, rng: np.random.Generator, size: int) -> tuple[Tensors, np.ndarray]:
    del rng
    scale = (np.abs(weight).max(axis=1, keepdims=True) / 448).astype(np.float32)
    codes, values = _fp8(weight, scale, scale)
    return {"weight": ("F8_E4M3", codes), "weight_scale": ("F32", scale)}, values


def _fp8_blocks(
    weight: np.ndarray, rng: np.random.Generator, size: int
) -> tuple[Tensors, np.ndarray]:
    del rng
    n, k = weight.shape
    scale = np.zeros((-(-n // 128), -(-k // 128)), np.float32)
    wide = np.zeros(weight.shape, np.float32)
    for i, j in np.ndindex(scale.shape):
        block = (slice(128 * i, 128 * i + 128), slice(128 * j, 128 * j + 128))
        scale[i, j] = wide[block] = np.abs(weight[block]).max() / np.float32(448)
    codes, values = _fp8(weight, scale, wide)
    return {"weight": ("F8_E4M3", codes), "weight_scale_inv": ("F32", scale)}, values


_WRITERS: dict[str, Any] = {
    "awq": _awq,
    "gptq": _gptq,
    "gptq-desc_act": _gptq_ordered,
    "ct-int4": _ct_int4,
    "ct-int8": _ct_int8,
    "ct-fp8": _ct_fp8,
    "fp8-blocks": _fp8_blocks,
}
KINDS = tuple(_WRITERS)


def _compressed(form: str, **weights: Any) -> dict[str, Any]:
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {
            "group_0": {"targets": ["Linear"], "weights": {"symmetric": True, **weights}}
        },
    }


def _config(kind: str, size: int) -> dict[str, Any]:
    """quantization_config of a kind."""
    gptq = {"quant_method": "gptq", "bits": 4, "group_size": size}
    awq = {"quant_method": "awq", "bits": 4, "group_size": size, "zero_point": True}
    return {
        "awq": {**awq, "version": "gemm"},
        "gptq": {**gptq, "desc_act": False, "sym": True},
        "gptq-desc_act": {**gptq, "desc_act": True, "sym": False},
        "ct-int4": _compressed("pack-quantized", num_bits=4, strategy="group", group_size=size),
        "ct-int8": _compressed("int-quantized", num_bits=8, strategy="channel"),
        "ct-fp8": _compressed("float-quantized", num_bits=8, type="float", strategy="channel"),
        "fp8-blocks": {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]},
    }[kind]


MODEL = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 320,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "eos_token_id": 256,
    "torch_dtype": "float16",
}


def write_model(path: Path, kind: str, size: int = SIZE, **changes: Any) -> dict[str, np.ndarray]:
    """A random checkpoint whose layers' linear weights are packed; the rest is float16.

    size: columns of a group. changes: keys of config.json in place of MODEL's. Returns what its
    tensors stand for, by their plain names.
    """
    from hf_files import st_bytes

    from mlc_compile.models.detect import load_model
    from mlc_compile.models.params import expected_shapes

    rng = np.random.default_rng(5)
    specs = load_model(MODEL | changes, where="x").parameters()
    packed = ("linear", "expert")
    linear = {source for spec in specs if spec.role in packed for source in spec.sources}
    plain = {
        name: (rng.standard_normal(shape) * (0.3 if len(shape) == 1 else 0.12)).astype(np.float16)
        for spec in specs
        for name, shape in expected_shapes(spec).items()
    }
    for name in plain:
        if name.endswith("norm.weight"):
            plain[name] += np.float16(1)
    written = pack_model(kind, {name: plain[name] for name in linear}, size)
    rest = {name: ("F16", w) for name, w in plain.items() if name not in linear}
    path.mkdir()
    (path / "model.safetensors").write_bytes(st_bytes(rest | written.tensors))
    config = MODEL | changes | {"quantization_config": written.config}
    (path / "config.json").write_text(json.dumps(config))
    return {name: w.astype(np.float32) for name, (_, w) in rest.items()} | written.values
