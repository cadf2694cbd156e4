"""GGUF files, seen as the Hugging Face checkpoint they were made from.

- The container is read by our own bounds-checked parser. The `gguf` package's reader follows
  counts in the file without checking them, so a damaged file can make it loop for hours, and it
  takes seconds where this takes a tenth of one. What the blocks mean is the package's: its
  `dequantize` is the reference implementation of every block type.
- `config` is the config.json that transformers would have, made from the metadata. A metadata
  key of the architecture that isn't understood is an error: it may change the maths.
- Tensors carry their Hugging Face names and row order, and block types read as float32.

Source of the layout: the GGUF specification in the ggml repository.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from mlc_compile.errors import EnvironmentLacksError, InputError
from mlc_compile.weights.reader import Array, MappedFile, TensorInfo, numpy_dtype, row_range

MAGIC = b"GGUF"
VERSIONS = (2, 3)
_DEFAULT_ALIGNMENT = 32
_AGAIN = "download the file again"
_USE_HF = "convert from the model's Hugging Face directory instead"

# GGUF metadata value types by number: struct code, or one of the two composed kinds.
_SCALARS = MappingProxyType(
    {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
)
_STRING, _ARRAY = 8, 9

# GGML types that numpy holds as they are; all others are blocks.
_PLAIN = MappingProxyType(
    {
        "F64": "float64",
        "F32": "float32",
        "F16": "float16",
        "BF16": "bfloat16",
        "I64": "int64",
        "I32": "int32",
        "I16": "int16",
        "I8": "int8",
    }
)


@dataclass(frozen=True)
class GgufTensor:
    """A tensor as the file has it: GGUF name, shape outermost first, type name, bytes."""

    name: str
    shape: tuple[int, ...]
    type: str
    offset: int
    nbytes: int


class _Cursor:
    """Reads little-endian values one after another; the end of the file is an InputError."""

    def __init__(self, file: MappedFile) -> None:
        self._file = file
        self.position = 0

    def corrupt(self, what: str) -> InputError:
        return InputError(
            f"{self._file.path} is not a valid GGUF file: {what} (at byte {self.position})",
            hint=_AGAIN,
        )

    def need(self, nbytes: int, what: str) -> None:
        left = self._file.size - self.position
        if nbytes > left:
            raise InputError(
                f"{self._file.path} is truncated or corrupt: {what} needs {nbytes} bytes at byte "
                f"{self.position} and {left} are left",
                hint=_AGAIN,
            )

    def scalar(self, code: str, what: str) -> Any:
        nbytes = struct.calcsize(f"<{code}")
        self.need(nbytes, what)
        (value,) = struct.unpack_from(f"<{code}", self._file.view, self.position)
        self.position += nbytes
        return value

    def text(self, what: str) -> str:
        nbytes = self.scalar("Q", what)
        self.need(nbytes, what)
        raw = self._file.view[self.position : self.position + nbytes]
        try:
            value = str(raw, "utf-8")
        except UnicodeDecodeError as error:
            raise self.corrupt(f"{what} is not UTF-8 text") from error
        self.position += nbytes
        return value

    def value(self, kind: int, what: str) -> Any:
        """A metadata value; arrays become lists."""
        if kind in _SCALARS:
            return self.scalar(_SCALARS[kind], what)
        if kind == _STRING:
            return self.text(what)
        if kind != _ARRAY:
            raise self.corrupt(f"{what} has the unknown type {kind}")
        item, count = self.scalar("I", what), self.scalar("Q", what)
        if item == _STRING:
            self.need(8 * count, what)  # before looping: the count is not to be trusted
            return [self.text(what) for _ in range(count)]
        if item not in _SCALARS:
            raise self.corrupt(f"{what} is an array of the unsupported type {item}")
        code = _SCALARS[item]
        nbytes = struct.calcsize(f"<{code}") * count
        self.need(nbytes, what)
        dtype = np.dtype(code).newbyteorder("<")
        values = np.frombuffer(self._file.view, dtype, count, self.position).tolist()
        self.position += nbytes
        return values


def is_gguf(path: Path) -> bool:
    """Whether a file starts as GGUF files do."""
    try:
        with path.open("rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


class GgufFile:
    """The container: `metadata` (plain Python values) and `raw_tensors` by GGUF name."""

    def __init__(self, path: Path) -> None:
        """Raises InputError for anything that is not a whole, consistent GGUF file."""
        self.path = path
        self.file = MappedFile(path)
        self._types = _ggml_types()
        cursor = _Cursor(self.file)
        cursor.need(24, "the header")
        if bytes(self.file.view[:4]) != MAGIC:
            raise InputError(f"{path} is not a GGUF file: it doesn't start with 'GGUF'")
        cursor.position = 4
        version = cursor.scalar("I", "the version")
        if version not in VERSIONS:
            big_endian = int.from_bytes(version.to_bytes(4, "little"), "big") in VERSIONS
            raise InputError(
                f"{path} is a GGUF file "
                + ("for big-endian machines" if big_endian else f"of version {version}")
                + ", which is not supported",
                hint="convert the model with a current llama.cpp on a little-endian machine",
            )
        tensor_count = cursor.scalar("Q", "the tensor count")
        key_count = cursor.scalar("Q", "the key count")
        self.metadata: dict[str, Any] = self._read_metadata(cursor, key_count)
        self.raw_tensors: dict[str, GgufTensor] = self._read_tensors(cursor, tensor_count)

    def _read_metadata(self, cursor: _Cursor, count: int) -> dict[str, Any]:
        cursor.need(13 * count, f"metadata of {count} keys")
        metadata: dict[str, Any] = {}
        for index in range(count):
            key = cursor.text(f"metadata key {index}")
            if key in metadata:
                raise cursor.corrupt(f"the key {key!r} is there twice")
            metadata[key] = cursor.value(cursor.scalar("I", key), f"the value of {key!r}")
        return metadata

    def _read_tensors(self, cursor: _Cursor, count: int) -> dict[str, GgufTensor]:
        cursor.need(24 * count, f"a list of {count} tensors")
        alignment = self.metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
        if type(alignment) is not int or alignment < 8 or alignment & (alignment - 1):
            raise cursor.corrupt(f"general.alignment is {alignment!r}, not a power of two >= 8")
        tensors: dict[str, GgufTensor] = {}
        for index in range(count):
            tensor = self._read_tensor(cursor, index, alignment)
            if tensor.name in tensors:
                raise cursor.corrupt(f"the tensor {tensor.name!r} is there twice")
            tensors[tensor.name] = tensor
        start = -(-cursor.position // alignment) * alignment
        end, previous = start, "the header"
        for tensor in sorted(tensors.values(), key=lambda t: t.offset):
            begin = start + tensor.offset
            if begin < end:
                raise cursor.corrupt(f"tensor {tensor.name!r} overlaps {previous!r}")
            end, previous = begin + tensor.nbytes, tensor.name
            if end > self.file.size:
                raise InputError(
                    f"{self.path} is truncated: tensor {tensor.name!r} ends at byte {end} and the "
                    f"file has {self.file.size}",
                    hint=_AGAIN,
                )
        return {
            t.name: GgufTensor(t.name, t.shape, t.type, start + t.offset, t.nbytes)
            for t in tensors.values()
        }

    def _read_tensor(self, cursor: _Cursor, index: int, alignment: int) -> GgufTensor:
        name = cursor.text(f"the name of tensor {index}")
        what = f"tensor {name!r}"
        rank = cursor.scalar("I", what)
        if not 1 <= rank <= 4:
            raise cursor.corrupt(f"{what} has {rank} dimensions")
        # GGUF writes the innermost dimension first.
        shape = tuple(cursor.scalar("Q", what) for _ in range(rank))[::-1]
        if not all(shape):
            raise cursor.corrupt(f"{what} has an empty dimension: {list(shape)}")
        number, offset = cursor.scalar("I", what), cursor.scalar("Q", what)
        if number not in self._types:
            raise InputError(
                f"{self.path}: {what} has the GGML type {number}, which is not supported",
                hint=_USE_HF,
            )
        type_name, elements, nbytes = self._types[number]
        if shape[-1] % elements:
            raise cursor.corrupt(
                f"{what} has rows of {shape[-1]} elements, not whole {type_name} blocks"
            )
        if offset % alignment:
            raise cursor.corrupt(f"{what} starts at {offset}, not a multiple of {alignment}")
        return GgufTensor(name, shape, type_name, offset, math.prod(shape) // elements * nbytes)

    def read(self, tensor: GgufTensor, start: int, stop: int, order: Array | None = None) -> Array:
        """Rows `start:stop` of a tensor, or the rows `order` names where it is given.

        Plain types come as they are (a view of the mapped file unless rows are reordered), block
        types as float32. Only the blocks of the wanted rows are decoded.
        """
        if tensor.type in _PLAIN:
            plain = self.file.array(numpy_dtype(_PLAIN[tensor.type]), tensor.shape, tensor.offset)
            return plain[start:stop] if order is None else plain[order]
        # A vector of blocks is one row that must be decoded whole.
        lead = tensor.shape[:-1] if len(tensor.shape) > 1 else (1,)
        blocks = self.file.array(
            np.dtype(np.uint8), (*lead, tensor.nbytes // math.prod(lead)), tensor.offset
        )
        if len(tensor.shape) == 1:
            vector: Array = _dequantize(blocks, tensor.type)[0]
            return vector[start:stop] if order is None else vector[order]
        if stop == start:
            return np.empty((0, *tensor.shape[1:]), np.float32)
        return _dequantize(blocks[start:stop] if order is None else blocks[order], tensor.type)


def _gguf_package() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise EnvironmentLacksError(
            f"reading GGUF needs the gguf package: {error}", hint="pip install gguf"
        ) from error
    return gguf


def _ggml_types() -> dict[int, tuple[str, int, int]]:
    """GGML type number -> name, elements and bytes of one block."""
    gguf = _gguf_package()
    return {
        int(kind): (kind.name, int(elements), int(nbytes))
        for kind, (elements, nbytes) in gguf.GGML_QUANT_SIZES.items()
    }


def _dequantize(blocks: Array, type_name: str) -> Array:
    gguf = _gguf_package()
    with np.errstate(all="ignore"):  # a block with an infinite scale decodes to what it says
        decoded: Array = gguf.dequantize(blocks, gguf.GGMLQuantizationType[type_name])
    return decoded.astype(np.float32, copy=False)


# --------------------------------------------------------------------------------------------
# The Hugging Face view


@dataclass(frozen=True)
class GgufArchitecture:
    """What a GGUF architecture is called and looks like in transformers.

    `interleaved_rope`: llama.cpp stores the rows of q and k of these models permuted, so that
    the two halves which RoPE rotates lie next to each other.
    `windowed`: model type and class of those with a window, which llama.cpp keeps under one name.
    """

    model_type: str
    hf_class: str
    interleaved_rope: bool = False
    qk_norm: bool = False
    optional_biases: bool = False
    windowed: tuple[str, str] | None = None


ARCHITECTURES: Mapping[str, GgufArchitecture] = MappingProxyType(
    {
        "llama": GgufArchitecture(
            "llama",
            "LlamaForCausalLM",
            interleaved_rope=True,
            optional_biases=True,
            windowed=("mistral", "MistralForCausalLM"),
        ),
        "qwen2": GgufArchitecture("qwen2", "Qwen2ForCausalLM"),
        "qwen3": GgufArchitecture("qwen3", "Qwen3ForCausalLM", qk_norm=True),
    }
)

_TOP_NAMES = MappingProxyType(
    {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
)
_LAYER_NAMES = MappingProxyType(
    {
        "attn_norm": "input_layernorm",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_q_norm": "self_attn.q_norm",
        "attn_k_norm": "self_attn.k_norm",
        "attn_output": "self_attn.o_proj",
        "ffn_norm": "post_attention_layernorm",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    }
)
_ROPE_FREQS = "rope_freqs.weight"


def hf_name(gguf_name: str) -> str | None:
    """The transformers name of a tensor: blk.0.ffn_up.bias -> model.layers.0.mlp.up_proj.bias.

    None for a name that has no counterpart.
    """
    module, _, suffix = gguf_name.rpartition(".")
    if suffix not in ("weight", "bias"):
        return None
    if module in _TOP_NAMES:
        return f"{_TOP_NAMES[module]}.{suffix}"
    block, _, rest = module.partition(".")
    layer, _, part = rest.partition(".")
    # isdecimal and the round trip refuse spellings such as blk.03 or blk.٣.
    if block != "blk" or part not in _LAYER_NAMES:
        return None
    if not layer.isdecimal() or str(int(layer)) != layer:
        return None
    return f"model.layers.{layer}.{_LAYER_NAMES[part]}.{suffix}"


def unpermute_rows(start: int, stop: int, head_dim: int) -> Array:
    """Where the rows `start:stop` of a transformers q or k matrix lie in a llama.cpp one.

    Within a head of d rows, row p*d/2 + i (p in 0, 1) is stored at 2*i + p. Source: `permute`
    of llama.cpp's convert_hf_to_gguf.py, inverted.
    """
    rows = np.arange(start, stop)
    head, row = rows // head_dim * head_dim, rows % head_dim
    half = head_dim // 2
    return head + row % half * 2 + row // half


class GgufReader:
    """A GGUF file as tensors of a transformers checkpoint, with its `config`."""

    def __init__(self, container: GgufFile) -> None:
        """Raises InputError for an architecture, a key or a tensor that isn't supported."""
        self.container = container
        self.files: tuple[Path, ...] = (container.path,)
        self.architecture = _architecture(container)
        names = {name: hf_name(name) for name in container.raw_tensors if name != _ROPE_FREQS}
        unknown = sorted(name for name, found in names.items() if found is None)
        if unknown:
            raise InputError(
                f"{container.path} has tensors that a {self.architecture.model_type} model has no "
                f"place for: {', '.join(unknown[:5])}{' …' if len(unknown) > 5 else ''}",
                hint=_USE_HF,
            )
        self._stored = {
            found: container.raw_tensors[name] for name, found in names.items() if found
        }
        _check_decodable(container)
        self.config = build_config(container, self.architecture)
        self.tensors: Mapping[str, TensorInfo] = MappingProxyType(
            {
                name: TensorInfo(
                    name,
                    tensor.shape,
                    _PLAIN.get(tensor.type, tensor.type),
                    tensor.nbytes,
                    container.path.name,
                )
                for name, tensor in self._stored.items()
            }
        )

    def read(self, name: str, rows: slice | None = None) -> Array:
        """The tensor, or some of its rows, in transformers' row order."""
        start, stop = row_range(self.tensors[name], rows)
        return self.container.read(self._stored[name], start, stop, self._order(name, start, stop))

    def release(self) -> None:
        self.container.file.release()

    def _order(self, name: str, start: int, stop: int) -> Array | None:
        if not self.architecture.interleaved_rope:
            return None
        if ".q_proj." not in name and ".k_proj." not in name:
            return None
        return unpermute_rows(start, stop, int(self.config["head_dim"]))


def _architecture(container: GgufFile) -> GgufArchitecture:
    name = container.metadata.get("general.architecture")
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise InputError(
            f"{container.path} holds a model of the GGUF architecture {name!r}",
            hint=f"supported in GGUF files: {', '.join(ARCHITECTURES)}",
        )
    if container.metadata.get("split.count", 1) not in (0, 1):
        raise InputError(
            f"{container.path} is one part of a split GGUF file",
            hint="join the parts with llama.cpp's llama-gguf-split --merge",
        )
    return ARCHITECTURES[name]


def _check_decodable(container: GgufFile) -> None:
    """Refuse block types the gguf package can't decode, before any long work starts."""
    gguf = _gguf_package()
    for tensor in container.raw_tensors.values():
        if tensor.type in _PLAIN:
            continue
        nbytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[tensor.type]][1]
        try:
            _dequantize(np.zeros((1, nbytes), np.uint8), tensor.type)
        except NotImplementedError as error:
            raise InputError(
                f"{container.path}: tensor {tensor.name!r} has the type {tensor.type}, which "
                "can't be decoded",
                hint=_USE_HF,
            ) from error


class _Keys:
    """Metadata keys of the architecture, taken one by one; what nobody took is an error."""

    def __init__(self, container: GgufFile) -> None:
        self.path = container.path
        self.prefix = f"{container.metadata['general.architecture']}."
        self._left = {
            key.removeprefix(self.prefix): value
            for key, value in container.metadata.items()
            if key.startswith(self.prefix)
        }

    def take(self, key: str, kind: type, default: Any = None) -> Any:
        """The value under `key`, of the Python type `kind`; InputError if absent and no default.

        A per-layer list whose items are all equal counts as that one value.
        """
        value = self._left.pop(key, default)
        if isinstance(value, list) and value and all(item == value[0] for item in value):
            value = value[0]
        if value is None:
            raise InputError(f"{self.path} lacks the metadata key {self.prefix}{key}", hint=_USE_HF)
        if type(value) is not kind:
            raise self.unsupported(key, value)
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A positive finite float32. 9.999999747378752e-06 is given back as the 1e-05 it was."""
        value = self.take(key, float, default)
        if not (math.isfinite(value) and value > 0):
            raise self.unsupported(key, value)
        return float(str(np.float32(value)))

    def count(self, key: str, default: int | None = None) -> int:
        value: int = self.take(key, int, default)
        if value <= 0:
            raise self.unsupported(key, value)
        return value

    def only(self, key: str, *allowed: Any) -> None:
        """Take a key that may only have one of these values, or be absent."""
        value = self._left.pop(key, allowed[0])
        if value not in allowed:
            raise self.unsupported(key, value)

    def optional(self, key: str) -> Any:
        return self._left.pop(key, None)

    def finish(self) -> None:
        for key, value in self._left.items():
            raise self.unsupported(key, value)

    def unsupported(self, key: str, value: Any) -> InputError:
        return InputError(
            f"{self.path}: {self.prefix}{key} = {value!r:.80} is not supported", hint=_USE_HF
        )


def build_config(container: GgufFile, architecture: GgufArchitecture) -> dict[str, Any]:
    """config.json as transformers would have it, from the metadata and the tensors.

    Raises InputError where the metadata is incomplete, inconsistent or not understood.
    """
    keys = _Keys(container)
    tensors = container.raw_tensors
    if "token_embd.weight" not in tensors:
        raise InputError(f"{container.path} has no tensor token_embd.weight", hint=_AGAIN)
    rows = tensors["token_embd.weight"].shape[0]

    hidden, heads = keys.count("embedding_length"), keys.count("attention.head_count")
    head_dim = keys.count("attention.key_length", hidden // heads)
    config: dict[str, Any] = {
        "architectures": [architecture.hf_class],
        "model_type": architecture.model_type,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": keys.count("feed_forward_length"),
        "num_hidden_layers": keys.count("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": keys.count("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "vocab_size": keys.count("vocab_size", rows),
        "max_position_embeddings": keys.count("context_length"),
        "rms_norm_eps": keys.number("attention.layer_norm_rms_epsilon"),
        "rope_theta": keys.number("rope.freq_base", 10000.0),
    }
    if head_dim % 2:
        raise keys.unsupported("attention.key_length", head_dim)
    keys.only("attention.value_length", head_dim)
    keys.only("rope.dimension_count", head_dim)
    keys.only("expert_count", 0)
    keys.only("expert_used_count", 0)
    keys.only("attention.causal", True)
    keys.only("use_parallel_residual", False)
    keys.only("tensor_data_layout", "Meta AI original pth")
    if config["vocab_size"] != rows:
        raise InputError(
            f"{container.path} states a vocabulary of {config['vocab_size']} and has "
            f"{rows} rows in token_embd.weight",
            hint=_AGAIN,
        )
    config["rope_scaling"] = _rope_scaling(container, keys, config)
    window = keys.optional("attention.sliding_window")
    if window:
        if architecture.windowed is None or type(window) is not int:
            raise keys.unsupported("attention.sliding_window", window)
        model_type, hf_class = architecture.windowed
        config.update(architectures=[hf_class], model_type=model_type, sliding_window=window)
    keys.finish()

    config["tie_word_embeddings"] = "output.weight" not in tensors
    if architecture.optional_biases and not window:
        config["attention_bias"] = any(".attn_q.bias" in name for name in tensors)
        config["mlp_bias"] = any(".ffn_gate.bias" in name for name in tensors)
    if architecture.qk_norm:
        config["attention_bias"] = any(".attn_q.bias" in name for name in tensors)
    for key, source in (
        ("bos_token_id", "bos_token_id"),
        ("eos_token_id", "eos_token_id"),
        ("pad_token_id", "padding_token_id"),
    ):
        value = container.metadata.get(f"tokenizer.ggml.{source}")
        if value is not None:
            config[key] = value
    return config


def _rope_scaling(
    container: GgufFile, keys: _Keys, config: Mapping[str, Any]
) -> dict[str, Any] | None:
    """transformers' `rope_scaling`, from the metadata or from a rope_freqs tensor."""
    kind = keys.optional("rope.scaling.type") or "none"
    old_linear = keys.optional("rope.scale_linear") or 1.0
    factor = keys.optional("rope.scaling.factor") or old_linear
    original = keys.optional("rope.scaling.original_context_length")
    keys.only("rope.scaling.attn_factor", 1.0)
    keys.optional("rope.scaling.finetuned")  # says how the model was trained, changes no maths
    if kind == "none" and factor != 1.0:
        kind = "linear"  # files older than scaling.type
    freqs = container.raw_tensors.get(_ROPE_FREQS)
    if freqs is not None:
        if kind not in ("none", "llama3"):
            raise InputError(
                f"{container.path} has both {_ROPE_FREQS} and rope scaling of type {kind!r}",
                hint=_USE_HF,
            )
        return _llama3_scaling(container, freqs, config)
    if kind == "none" or (kind == "linear" and factor == 1.0):
        return None
    if type(factor) is not float or not (math.isfinite(factor) and factor >= 1.0):
        raise keys.unsupported("rope.scaling.factor", factor)
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    if kind == "yarn" and type(original) is int and original > 0:
        return {
            "rope_type": "yarn",
            "factor": factor,
            "original_max_position_embeddings": original,
        }
    raise keys.unsupported("rope.scaling.type", kind)


def _llama3_scaling(
    container: GgufFile, tensor: GgufTensor, config: Mapping[str, Any]
) -> dict[str, Any]:
    """The Llama 3 parameters whose frequency divisors are the ones in the file.

    llama.cpp bakes `rope_type: llama3` into a tensor of divisors. The largest is the factor; the
    rest is checked against the formula with the constants that every Llama 3 release uses, so
    other divisors are refused rather than approximated.
    """
    half = config["head_dim"] // 2
    stored = container.read(tensor, 0, tensor.shape[0]).astype(np.float64)
    params = {
        "rope_type": "llama3",
        "factor": float(stored.max()) if stored.size else 1.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    if stored.shape == (half,) and np.isfinite(stored).all():
        expected = _llama3_divisors(config["rope_theta"], half, params)
        if np.allclose(stored, expected, rtol=1e-4, atol=0):
            return params
    raise InputError(
        f"{container.path}: {_ROPE_FREQS} doesn't hold Llama 3 frequency factors", hint=_USE_HF
    )


def _llama3_divisors(theta: float, half: int, params: Mapping[str, Any]) -> Array:
    """What Llama 3 scaling divides each of the `half` frequencies by.

    Source: `_compute_llama3_parameters` of transformers (there as scaled frequencies).
    """
    low, high = params["low_freq_factor"], params["high_freq_factor"]
    turns = (  # of the original context, at each frequency
        params["original_max_position_embeddings"]
        * theta ** (-np.arange(half) / half)
        / (2 * math.pi)
    )
    smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
    divisors: Array = 1.0 / ((1.0 - smooth) / params["factor"] + smooth)
    return divisors


def generation_config(container: GgufFile) -> dict[str, Any]:
    """generation_config.json as far as the metadata has one: stop tokens and sampling."""
    get: Callable[[str], Any] = container.metadata.get
    found: dict[str, Any] = {}
    ends = [get("tokenizer.ggml.eos_token_id"), get("tokenizer.ggml.eot_token_id")]
    stops = sorted({end for end in ends if type(end) is int})
    if len(stops) > 1:
        found["eos_token_id"] = stops
    for key, source in (("temperature", "temp"), ("top_p", "top_p")):
        value = get(f"general.sampling.{source}")
        if isinstance(value, float):
            found[key] = float(str(np.float32(value)))
    return found
