"""AutoAWQ checkpoints, version "gemm".

    X.qweight  int32 [K, N/8]        codes, eight neighbours along N in a word
    X.qzeros   int32 [K/group, N/8]  zero points, packed alike
    X.scales   float16 [K/group, N]

    w = (code - zero) * scale        rounded to the scales' dtype

The element of a word's nibble i is 8 * word + _ORDER[i].
Source: WQLinear_GEMM and `dequantize_gemm` of AutoAWQ 0.2.9.
"""

from __future__ import annotations

import numpy as np

from mlc_compile.config import ConfigReader
from mlc_compile.weights.packed_layers import (
    Layers,
    Matrix,
    Parts,
    check_listed,
    choice,
    group_count,
    group_size_of,
    modules_with,
)
from mlc_compile.weights.reader import Array, Packed, PackedInfo, TensorReader

_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)

# How the codes were found and how AutoAWQ runs them.
_HISTORY = (
    "damp_percent",
    "do_fuse",
    "exllama_config",
    "fuse_max_seq_len",
    "lm_head",
    "meta",
    "modules_to_fuse",
    "mse",
    "static_groups",
    "true_sequential",
)
_REMEDY = "re-export it with version 'gemm', or convert from the unquantised checkpoint"


def layers(reader: TensorReader, section: ConfigReader) -> Layers:
    """The packed weights of an AutoAWQ checkpoint."""
    choice(section, "bits", 4)
    size = group_size_of(section, 128)
    choice(section, "version", "gemm", "GEMM", hint=_REMEDY)
    choice(section, "format", "gemm", hint=_REMEDY)
    choice(section, "checkpoint_format", "gemm", hint=_REMEDY)
    choice(section, "backend", "autoawq", "auto", hint=_REMEDY)
    choice(section, "zero_point", True, False)  # the zero points are stored in either case
    choice(section, "sym", False, True)
    choice(section, "desc_act", False)
    choice(section, "pack_dtype", "int32")
    kept = section.optional_texts("modules_to_not_convert") or ()
    section.finish(_HISTORY)
    modules = modules_with(reader.tensors, "qweight")
    check_listed(modules, kept, "modules_to_not_convert")
    return Layers({f"{m}.weight": _matrix(Parts(reader, m), size) for m in modules})


def _matrix(parts: Parts, size: int) -> Matrix:
    k, words = parts.info("qweight", ("int32",)).shape
    n, groups = 8 * words, group_count(k, size)
    parts.check("qzeros", parts.info("qzeros", ("int32",)).shape, (groups, words))
    scales = parts.info("scales", ("float16", "bfloat16", "float32"))
    parts.check("scales", scales.shape, (groups, n))

    def load(start: int, stop: int) -> Packed:
        return Packed(
            _unpack(parts.read("qweight"), start, stop),
            np.ascontiguousarray(parts.read("scales")[:, start:stop].T.astype(np.float32)),
            _unpack(parts.read("qzeros"), start, stop),
        )

    return Matrix(
        (n, k),
        PackedInfo("affine", 4, size, scales.dtype),
        tuple(f"{parts.module}.{suffix}" for suffix in ("qweight", "qzeros", "scales")),
        load,
        scales.dtype,
    )


def _unpack(words: Array, start: int, stop: int) -> Array:
    """Columns start to stop of the unpacked matrix, as rows: int32 [m, w] -> uint8 [n, m]."""
    first, last = start // 8, -(-stop // 8)
    part = np.ascontiguousarray(words[:, first:last].T).view(np.uint32)
    found = np.empty((last - first, 8, len(words)), np.uint8)
    for nibble, element in enumerate(_ORDER):
        found[:, element] = part >> np.uint32(4 * nibble) & np.uint32(15)
    return found.reshape(-1, len(words))[start - 8 * first : stop - 8 * first]
