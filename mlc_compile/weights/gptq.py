"""GPTQ checkpoints of AutoGPTQ and GPTQModel, bits 2, 3, 4 and 8.

    X.qweight  int32 [K * bits / 32, N]       codes, packed along K
    X.qzeros   int32 [groups, N * bits / 32]  zero points, packed along N
    X.scales   float16 [groups, N]
    X.g_idx    int32 [K]                      the group of each input channel

    w[n, k] = (code[k, n] - zero[g_idx[k], n]) * scale[g_idx[k], n]    in the scales' dtype

- Format "gptq" (v1) stores `zero - 1` modulo 2**bits, "gptq_v2" the zero itself.
- With desc_act the groups are those of the order in which channels were quantised; they have no
  place in a layout of contiguous groups, so such weights are dequantised.

Source: `QuantLinear` of AutoGPTQ 0.7.1 (qlinear_cuda_old, qlinear_cuda) and `dequantize_weight` of
GPTQModel 7.7.0.
"""

from __future__ import annotations

import numpy as np

from mlc_compile.config import ConfigReader
from mlc_compile.errors import InputError
from mlc_compile.weights.packed_layers import (
    Layers,
    Matrix,
    Parts,
    choice,
    group_count,
    group_size_of,
    modules_with,
    unpack_columns,
    unpack_stream,
    unsupported,
)
from mlc_compile.weights.reader import Array, Packed, PackedInfo, TensorReader

# How the codes were found and by whom; the tensors say the rest.
_HISTORY = (
    "act_group_aware",
    "auto_forward_data_parallel",
    "backend",
    "batch_size",
    "block_name_to_quantize",
    "cache_block_outputs",
    "compression_ratio",
    "damp_auto_increment",
    "damp_percent",
    "dataset",
    "disable_exllama",
    "exllama_config",
    "hyb_act",
    "lm_head",
    "max_input_length",
    "meta",
    "model_file_base_name",
    "model_name_or_path",
    "model_seqlen",
    "module_name_preceding_first_block",
    "modules_in_block_to_quantize",
    "mse",
    "offload_to_disk",
    "pad_token_id",
    "parallel_packing",
    "static_groups",
    "tokenizer",
    "true_sequential",
    "use_cuda_fp16",
    "use_exllama",
)
_REMEDY = "save it in the format 'gptq' (GPTQModel), or convert from the unquantised checkpoint"


def layers(reader: TensorReader, section: ConfigReader) -> Layers:
    """The packed weights of a GPTQ checkpoint."""
    bits = choice(section, "bits", 4, 2, 3, 8)
    size = group_size_of(section)
    symmetric = section.flag("sym", default=True)
    ordered = section.flag("desc_act")
    name = choice(section, "checkpoint_format", "gptq", "gptq_v2", hint=_REMEDY)
    choice(section, "format", name, hint=_REMEDY)
    choice(section, "is_marlin_format", False, hint=_REMEDY)
    choice(section, "pack_dtype", "int32", hint=_REMEDY)
    # "-:" names modules that were left as they are; others have settings of their own.
    if not all(pattern.startswith("-:") for pattern in section.optional_object("dynamic") or {}):
        raise unsupported(section, "dynamic")
    section.finish(_HISTORY)
    found = Layers()
    for module in modules_with(reader.tensors, "qweight"):
        matrix = _matrix(Parts(reader, module), bits, size, symmetric, ordered, name == "gptq")
        found.matrices[f"{module}.weight"] = matrix
    shuffled = sum(matrix.column_groups is not None for matrix in found.matrices.values())
    if shuffled:
        found.notes.append(
            f"{shuffled} weights have groups in activation order (desc_act): dequantised and "
            "quantised again, which loses precision a second time; no scheme keeps them"
        )
    return found


def _matrix(
    parts: Parts, bits: int, size: int, symmetric: bool, ordered: bool, minus_one: bool
) -> Matrix:
    words, n = parts.info("qweight", ("int32",)).shape
    k = words * 32 // bits
    if parts.has("g_idx"):
        # Exact where 32 channels don't fill whole words.
        (k,) = parts.info("g_idx", ("int32", "int64"), 1).shape
        parts.check("qweight", (words, n), (-(-k * bits // 32), n))
    groups = group_count(k, size)
    zeros = parts.info("qzeros", ("int32",))
    parts.check("qzeros", zeros.shape, (groups, -(-n * bits // 32)))
    scales = parts.info("scales", ("float16", "bfloat16", "float32"))
    parts.check("scales", scales.shape, (groups, n))
    middle = 1 << (bits - 1) if symmetric else None

    def load(start: int, stop: int) -> Packed:
        if not ordered:
            _check_order(parts, k, size)
        codes = unpack_stream(parts.read("qweight")[:, start:stop], bits, k)
        zero = unpack_columns(parts.read("qzeros"), bits, start, stop)
        if minus_one:
            zero = zero + np.uint8(1) & np.uint8((1 << bits) - 1)
        if middle is not None and (zero != middle).any():
            raise InputError(
                f"{parts.module}.qzeros holds other zero points than {middle}, but config.json "
                "says quantization_config.sym = true",
                hint="set it to false if the checkpoint is sound",
            )
        return Packed(
            np.ascontiguousarray(codes.T),
            np.ascontiguousarray(parts.read("scales")[:, start:stop].T.astype(np.float32)),
            np.ascontiguousarray(zero) if middle is None else None,
        )

    suffixes = [s for s in ("qweight", "qzeros", "scales", "g_idx") if parts.has(s)]
    shuffled = ordered and groups > 1 and parts.has("g_idx")
    return Matrix(
        (n, k),
        PackedInfo("affine", bits, size, scales.dtype, middle),
        tuple(f"{parts.module}.{suffix}" for suffix in suffixes),
        load,
        scales.dtype,
        (lambda: _column_groups(parts, groups)) if shuffled else None,
    )


def _column_groups(parts: Parts, groups: int) -> Array:
    """g_idx, [K]."""
    found = parts.read("g_idx")
    if found.size and not 0 <= int(found.min()) <= int(found.max()) < groups:
        raise InputError(
            f"{parts.module}.g_idx names a group that isn't one of {groups}",
            hint="download the checkpoint again",
        )
    return found


def _check_order(parts: Parts, k: int, size: int) -> None:
    """InputError if g_idx has another order than the columns' own."""
    if not parts.has("g_idx"):
        return
    expected = np.arange(k) // size if size else np.zeros(k, np.int64)
    if not np.array_equal(parts.read("g_idx"), expected):
        raise InputError(
            f"{parts.module}.g_idx is in activation order, but config.json says "
            "quantization_config.desc_act = false",
            hint="set it to true if the checkpoint is sound",
        )
