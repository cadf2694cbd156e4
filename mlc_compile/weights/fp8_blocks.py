"""fp8 checkpoints: e4m3 weights with a scale for each block, row or tensor.

    X.weight             e4m3 [N, K]
    X.weight_scale_inv   [N / rows, K / columns] of weight_block_size, rounded up (DeepSeek, Qwen3);
                         the inverse of what the weight was multiplied with: w = code * scale_inv
    X.weight_scale       [] or [1], of the whole tensor; [N, 1], of each row (fbgemm_fp8)

The product is rounded to the scales' dtype; to bfloat16 where those are powers of two (e8m0).
Source: `Fp8Dequantize` of transformers 5 (integrations/finegrained_fp8.py).
"""

from __future__ import annotations

import re

import numpy as np

from mlc_compile.config import ConfigReader
from mlc_compile.errors import InputError
from mlc_compile.weights.packed_layers import (
    UNQUANTISED,
    Layers,
    Matrix,
    Parts,
    check_listed,
    choice,
    group_count,
    unsupported,
)
from mlc_compile.weights.reader import Array, Packed, PackedInfo, TensorReader

_SCALES = ("float32", "bfloat16", "float16", "float8_e8m0fnu")
_ACTIVATIONS = re.compile(
    r".*\.(activation_scale|input_scale|output_scale|input_scale_ub)|.*_attn\.[qkv]_scale"
)


def layers(reader: TensorReader, section: ConfigReader) -> Layers:
    """The packed weights of an fp8 checkpoint."""
    found = Layers()
    choice(section, "activation_scheme", "dynamic", "static")
    choice(section, "fmt", "e4m3", "float8_e4m3fn")
    choice(section, "scale_fmt", "float", "ue8m0")
    choice(section, "expert_dtype", "fp8")
    block = section.integers("weight_block_size")
    if block and (len(block) != 2 or not all(0 < size < 1 << 20 for size in block)):
        raise unsupported(section, "weight_block_size")
    kept = section.optional_texts("modules_to_not_convert") or ()
    kept += section.optional_texts("ignored_layers") or ()
    choice(section, "modules_to_convert", [])
    section.finish(("activation_scale_ub", "dequantize"))
    for name, info in reader.tensors.items():
        if info.dtype == "float8_e4m3fn" and name.endswith(".weight"):
            parts = Parts(reader, name.removesuffix(".weight"))
            found.matrices[name] = _matrix(parts, (block[0], block[1]) if block else None)
    check_listed(
        [n.removesuffix(".weight") for n in found.matrices], kept, "modules_to_not_convert"
    )
    found.dropped |= {name for name in reader.tensors if _ACTIVATIONS.fullmatch(name)}
    if found.matrices:
        found.notes.append("activations are not quantised here (activation_scheme)")
    return found


def _matrix(parts: Parts, block: tuple[int, int] | None) -> Matrix:
    n, k = parts.info("weight", ("float8_e4m3fn",)).shape
    suffixes = [s for s in ("weight_scale_inv", "weight_scale") if parts.has(s)]
    if len(suffixes) != 1:
        raise InputError(
            f"{parts.module}.weight is e4m3 and has {len(suffixes)} of weight_scale_inv and "
            "weight_scale, expected one",
            hint=UNQUANTISED,
        )
    (suffix,) = suffixes
    shape = parts.reader.tensors[f"{parts.module}.{suffix}"].shape
    dtype = parts.info(suffix, _SCALES, len(shape)).dtype
    if shape in ((), (1,), (1, 1)) and (block is None or shape != (1, 1)):
        rows, columns = n, 0
    elif shape in ((n, 1), (n,)) and block is None:
        rows, columns = 1, 0
    else:
        rows, columns = block or (n, 0)
        parts.check(suffix, shape, (-(-n // rows), group_count(k, columns)))

    def load(start: int, stop: int) -> Packed:
        scales = parts.read(suffix).reshape(-(-n // rows), -1)
        codes: Array = np.ascontiguousarray(parts.read("weight", slice(start, stop)))
        own = scales[np.arange(start, stop) // rows].astype(np.float32)
        return Packed(codes.view(np.uint8), own)

    return Matrix(
        (n, k),
        PackedInfo("e4m3", 8, columns, dtype),
        (f"{parts.module}.weight", f"{parts.module}.{suffix}"),
        load,
        "bfloat16" if dtype == "float8_e8m0fnu" else dtype,
    )
