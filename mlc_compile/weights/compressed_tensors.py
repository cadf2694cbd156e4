"""compressed-tensors checkpoints (llm-compressor): integer and e4m3 weights.

    format            tensors of a module X
    pack-quantized    weight_packed int32 [N, K * bits / 32], weight_shape int64 [2],
                      weight_zero_point int32 [N * bits / 32, groups] if asymmetric
    int-quantized     weight int8 [N, K], weight_zero_point int8 like the scales if asymmetric
    float-quantized   weight e4m3 [N, K]
    naive-quantized   either of the last two, by the weights' type

with weight_scale [1], [N, 1] or [N, groups], or [N / rows, K / columns] for blocks. Integers are
signed, and packed with 2**(bits - 1) added. w = (code - zero) * scale in the scales' dtype.
weight_g_idx [K] (actorder "group") is the group of each column.

Source: PackedQuantizationCompressor, NaiveQuantizationCompressor and `dequantize` of
compressed-tensors 0.20.0; weight_g_idx is of versions before.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

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
    modules_with,
    section_of,
    unpack_columns,
    unpack_stream,
    unsupported,
)
from mlc_compile.weights.reader import Array, Packed, PackedInfo, TensorReader

_FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "dense")
_SCALES = ("float16", "bfloat16", "float32")
_AGAIN = "download the checkpoint again"

# Of quantised activations and caches, which are not: activations stay in the model dtype.
_ACTIVATIONS = re.compile(
    r".*\.(input|output)_(scale|zero_point|global_scale|g_idx)|.*_attn\.[qkv]_(scale|zero_point)|"
    r".*\.[qkv]_proj\.output_(scale|zero_point)"
)


@dataclass(frozen=True)
class _Args:
    """How the weights of a group of modules are stored."""

    targets: tuple[str, ...]
    format: str
    bits: int
    is_float: bool
    symmetric: bool
    strategy: str
    group_size: int
    block: tuple[int, int]


def layers(reader: TensorReader, section: ConfigReader) -> Layers:
    """The packed weights of a compressed-tensors checkpoint."""
    found = Layers()
    own = choice(section, "format", "dense", "mixed-precision", *_FORMATS)
    choice(section, "quantization_status", "compressed", "frozen")
    choice(section, "sparsity_config", {}, {"format": "dense"}, hint="save it without sparsity")
    choice(section, "transform_config", {}, hint="its activations need online transforms")
    choice(section, "moe_sparsity_config", {})
    if section.optional_object("kv_cache_scheme"):
        found.notes.append("the KV cache is not quantised here (kv_cache_scheme)")
    kept = section.optional_texts("ignore") or ()
    groups = []
    for name, group in (section.optional_object("config_groups") or {}).items():
        where = f"quantization_config.config_groups.{name}"
        args = _group(section_of(group, where), where, own, found.notes)
        groups += [args] if args else []
    section.finish(("global_compression_ratio", "version", "run_compressed"))

    for module in _modules(reader):
        group = _group_of(module, groups)
        if group is None:
            raise InputError(
                f"config.json: no group of quantization_config.config_groups is for {module}, "
                "which is packed",
                hint="config.json belongs to another checkpoint, or this one is damaged",
            )
        found.matrices[f"{module}.weight"] = _matrix(Parts(reader, module), group)
    check_listed(
        [name.removesuffix(".weight") for name in found.matrices],
        tuple(item for item in kept if not item.startswith("re:")),
        "ignore",
    )
    found.dropped |= {name for name in reader.tensors if _ACTIVATIONS.fullmatch(name)}
    found.notes = list(dict.fromkeys(found.notes))
    return found


def _modules(reader: TensorReader) -> list[str]:
    """Every module with a packed weight: it has scales."""
    return modules_with(reader.tensors, "weight_scale")


def _group(section: ConfigReader, where: str, own: str, notes: list[str]) -> _Args | None:
    """One of config_groups; None where it says nothing of weights."""
    targets = section.optional_texts("targets") or ()
    form = choice(section, "format", own, *_FORMATS)
    for key in ("input_activations", "output_activations"):
        if section.optional_object(key):
            notes.append(f"activations are not quantised here ({key})")
    weights = section.optional_object("weights")
    section.finish()
    if weights is None or form == "dense":
        return None
    if form == "mixed-precision":
        raise unsupported(section, "format")
    args = section_of(weights, f"{where}.weights")
    is_float = choice(args, "type", "int", "float") == "float"
    bits = choice(args, "num_bits", 8) if is_float else choice(args, "num_bits", 8, 4)
    symmetric = args.flag("symmetric", default=True)
    size = args.optional_integer("group_size", low=-1, high=1 << 20)
    default = "tensor" if size is None else "channel" if size == -1 else "group"
    strategy = choice(args, "strategy", default, "tensor", "channel", "group", "block")
    block = args.integers("block_structure") or (0, 0)
    if strategy == "group" and (size is None or size < 1):
        raise unsupported(args, "group_size")
    if strategy == "block" and not is_float:
        raise unsupported(args, "strategy")
    if len(block) != 2 or (strategy == "block" and min(block) < 1):
        raise unsupported(args, "block_structure")
    if is_float and (not symmetric or form == "pack-quantized"):
        raise unsupported(args, "type")
    choice(args, "dynamic", False)
    args.finish(("actorder", "observer", "observer_kwargs", "scale_dtype", "zp_dtype"))
    columns = {"group": size or 0, "block": block[1]}.get(strategy, 0)
    return _Args(targets, form, bits, is_float, symmetric, strategy, columns, (block[0], block[1]))


def _group_of(module: str, groups: list[_Args]) -> _Args | None:
    """The group that a module is in: by its name, else by a pattern, else by its class."""
    tests: tuple[Callable[[str], bool], ...] = (
        lambda target: target == module,
        lambda target: target.startswith("re:") and _matches(target[3:], module),
        lambda target: target in ("Linear", "Embedding") and _is_class(module, target),
    )
    for test in tests:
        for group in groups:
            if any(test(target) for target in group.targets):
                return group
    return None


def _matches(pattern: str, module: str) -> bool:
    """Whether a module's name starts as the pattern says. Patterns are a stranger's: those that can
    take time exponential in the name, or a high power of it, are refused."""
    loops = len(re.findall(r"[*+]|\{\d*,", pattern))
    if re.search(r"\)[*+{]|\\[1-9]|\(\?P", pattern) or loops > 4 or len(module) > 256:
        problem = "which is not read"
    else:
        try:
            return re.match(pattern, module) is not None
        except re.error as error:
            problem = f"which is not a regular expression: {error}"
    raise InputError(
        f"config.json: quantization_config has the target {pattern!r:.80}, {problem}",
        hint=UNQUANTISED,
    )


def _is_class(module: str, target: str) -> bool:
    """Whether a module is a Linear or an Embedding, as far as its name tells."""
    embedding = re.search(r"(^|\.)(embed\w*|wte|wpe|word_embeddings)$", module) is not None
    return embedding == (target == "Embedding")


def _matrix(parts: Parts, args: _Args) -> Matrix:
    if parts.has("weight_packed"):
        codes, shape, sources = _packed_codes(parts, args)
    else:
        codes, shape, sources = _plain_codes(parts, args)
    n, k = shape
    groups = group_count(k, args.group_size)
    scale = _scale_info(parts, args, n, groups)
    middle = 1 << (args.bits - 1)
    info = PackedInfo(
        "e4m3" if args.is_float else "affine",
        args.bits,
        args.group_size,
        scale,
        middle if args.symmetric and not args.is_float else None,
    )
    shuffled = parts.has("weight_g_idx")
    if shuffled:
        parts.check("weight_g_idx", parts.info("weight_g_idx", ("int32",), 1).shape, (k,))
        sources = (*sources, "weight_g_idx")
    if parts.has("weight_zero_point") or not args.symmetric:
        _check_zero_points(parts, args, n, groups)
        sources = (*sources, "weight_zero_point")

    def load(start: int, stop: int) -> Packed:
        zeros = _zero_points(parts, args, start, stop, groups)
        scales = _rows(parts.read("weight_scale"), args, start, stop, groups)
        return Packed(codes(start, stop), scales.astype(np.float32), zeros)

    return Matrix(
        (n, k),
        info,
        tuple(f"{parts.module}.{suffix}" for suffix in (*sources, "weight_scale")),
        load,
        scale,
        (lambda: _column_groups(parts, args, k)) if shuffled else None,
    )


_Codes = Callable[[int, int], Array]


def _packed_codes(parts: Parts, args: _Args) -> tuple[_Codes, tuple[int, int], tuple[str, ...]]:
    """Codes of "pack-quantized", the weight's shape, and the tensors that say them."""
    if args.format not in ("pack-quantized",):
        raise InputError(
            f"{parts.module}.weight_packed is there, but config.json says format {args.format!r}",
            hint=UNQUANTISED,
        )
    stored = parts.info("weight_packed", ("int32",)).shape
    parts.check("weight_shape", parts.info("weight_shape", ("int64",), 1).shape, (2,))
    n, k = (int(item) for item in parts.read("weight_shape"))
    parts.check("weight_packed", stored, (n, -(-k * args.bits // 32)))

    def codes(start: int, stop: int) -> Array:
        words = parts.read("weight_packed", slice(start, stop))
        return np.ascontiguousarray(unpack_stream(words.T, args.bits, k).T)

    return codes, (n, k), ("weight_packed", "weight_shape")


def _plain_codes(parts: Parts, args: _Args) -> tuple[_Codes, tuple[int, int], tuple[str, ...]]:
    """Codes that have a byte each."""
    if args.format == "pack-quantized":
        parts.info("weight_packed", ("int32",))  # says that it is missing
    n, k = parts.info("weight", ("float8_e4m3fn" if args.is_float else "int8",)).shape
    middle = 1 << (args.bits - 1)

    def codes(start: int, stop: int) -> Array:
        found = parts.read("weight", slice(start, stop))
        if args.is_float:
            return np.ascontiguousarray(found).view(np.uint8)
        return _shifted(parts, "weight", found, middle)

    return codes, (n, k), ("weight",)


def _shifted(parts: Parts, suffix: str, signed: Array, middle: int) -> Array:
    """int8 codes of some bits as uint8, the least as 0."""
    found = signed.astype(np.int16) + np.int16(middle)
    if found.size and not 0 <= int(found.min()) <= int(found.max()) < 2 * middle:
        raise InputError(
            f"{parts.module}.{suffix} holds codes outside of {-middle}..{middle - 1}",
            hint=_AGAIN,
        )
    return found.astype(np.uint8)


def _scale_info(parts: Parts, args: _Args, n: int, groups: int) -> str:
    """The scales' dtype, their shape checked."""
    info = parts.reader.tensors[f"{parts.module}.weight_scale"]
    info = parts.info("weight_scale", _SCALES, len(info.shape))
    shapes = {
        "tensor": ((1,), (), (1, 1)),
        "channel": ((n, 1), (n,)),
        "group": ((n, groups),),
        "block": ((-(-n // max(1, args.block[0])), groups),),
    }[args.strategy]
    if info.shape not in shapes:
        parts.check("weight_scale", info.shape, shapes[0])
    return info.dtype


def _rows(stored: Array, args: _Args, start: int, stop: int, groups: int) -> Array:
    """Rows of what is stored like the scales: one value, one a row, or one a block."""
    if args.strategy == "tensor":
        return np.broadcast_to(stored.reshape(1, 1), (stop - start, groups))
    if args.strategy == "block":
        return stored[np.arange(start, stop) // args.block[0]]
    return stored.reshape(-1, groups)[start:stop]


def _check_zero_points(parts: Parts, args: _Args, n: int, groups: int) -> None:
    """InputError unless they are there in the shape and dtype that goes with the scales."""
    if args.symmetric:  # written out by older versions, in a float type too
        return
    expected = parts.reader.tensors[f"{parts.module}.weight_scale"].shape
    dtype = "int8"
    if args.format == "pack-quantized" and args.strategy != "tensor":
        expected, dtype = (-(-n * args.bits // 32), groups), "int32"
    found = parts.info("weight_zero_point", (dtype,), len(expected))
    parts.check("weight_zero_point", found.shape, expected)


def _zero_points(parts: Parts, args: _Args, start: int, stop: int, groups: int) -> Array | None:
    """Rows of the zero points, uint8 [n, groups], or None of a symmetric weight."""
    if not parts.has("weight_zero_point"):
        return None
    stored = parts.read("weight_zero_point")
    if args.symmetric:
        # Older versions wrote the zeros out; signed, whatever their dtype.
        if stored.astype(np.float32).any():
            raise InputError(
                f"{parts.module}.weight_zero_point is not 0, but config.json says symmetric",
                hint=UNQUANTISED,
            )
        return None
    if args.format == "pack-quantized" and stored.dtype == np.int32:
        packed: Array = unpack_columns(stored.T, args.bits, start, stop)
        return np.ascontiguousarray(packed)
    rows = _rows(stored, args, start, stop, groups)
    return _shifted(parts, "weight_zero_point", rows, 1 << (args.bits - 1))


def _column_groups(parts: Parts, args: _Args, k: int) -> Array:
    """The group of each column, [K]; one that is -1 anywhere was never set."""
    found = parts.read("weight_g_idx")
    if (found == -1).any():
        return np.arange(k) // args.group_size
    if found.size and not 0 <= int(found.min()) <= int(found.max()) < k // args.group_size:
        raise InputError(f"{parts.module}.weight_g_idx names a group that isn't there", hint=_AGAIN)
    return found
