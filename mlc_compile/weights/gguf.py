"""GGUF files, seen as the Hugging Face checkpoint they were made from.

Tensors carry their Hugging Face names and row order, and block types read as float32. `config` is
the config.json that transformers would have, made from the metadata.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np

from mlc_compile.errors import InputError
from mlc_compile.weights.files import Location
from mlc_compile.weights.gguf_config import (
    ARCHITECTURES,
    ROPE_FREQS,
    GgufArchitecture,
    architecture_of,
    build_config,
    generation_config,
)
from mlc_compile.weights.gguf_file import (
    PLAIN_TYPES,
    USE_HF,
    GgufFile,
    dequantize,
    gguf_package,
)
from mlc_compile.weights.gguf_packed import packed_info, unpack
from mlc_compile.weights.reader import (
    Array,
    Packed,
    PackedInfo,
    Rows,
    TensorInfo,
    row_numbers,
    row_range,
)
from mlc_compile.weights.tokenizer import GgufTokenizer

__all__ = [
    "ARCHITECTURES",
    "GgufArchitecture",
    "GgufFile",
    "GgufReader",
    "generation_config",
    "hf_name",
    "open_gguf",
    "unpermute_rows",
]

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


def unpermute_rows(rows: Array, head_dim: int) -> Array:
    """Where rows of a transformers q or k matrix lie in a llama.cpp one.

    Within a head of d rows, row p*d/2 + i (p in 0, 1) is stored at 2*i + p. Source: `permute`
    of llama.cpp's convert_hf_to_gguf.py, inverted.
    """
    head, row = rows // head_dim * head_dim, rows % head_dim
    half = head_dim // 2
    found: Array = head + row % half * 2 + row // half
    return found


def open_gguf(path: Location) -> tuple[GgufReader, dict[str, Any], GgufTokenizer]:
    """A GGUF file's weights and config.json, its generation_config.json and its tokenizer.

    Raises InputError for a damaged file and for whatever isn't supported.
    """
    container = GgufFile(path)
    reader = GgufReader(container)
    return reader, generation_config(container), GgufTokenizer(container.metadata, path)


class GgufReader:
    """A GGUF file as tensors of a transformers checkpoint, with its `config`."""

    def __init__(self, container: GgufFile) -> None:
        """Raises InputError for an architecture, a key or a tensor that isn't supported."""
        self.container = container
        self.files: tuple[Location, ...] = (container.path,)
        self.architecture = architecture_of(container)
        names = {name: hf_name(name) for name in container.raw_tensors if name != ROPE_FREQS}
        unknown = sorted(name for name, found in names.items() if found is None)
        if unknown:
            raise InputError(
                f"{container.path} has tensors that a {self.architecture.model_type} model has no "
                f"place for: {', '.join(unknown[:5])}{' …' if len(unknown) > 5 else ''}",
                hint=USE_HF,
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
                    PLAIN_TYPES.get(tensor.type, tensor.type),
                    tensor.nbytes,
                    container.path.name,
                )
                for name, tensor in self._stored.items()
            }
        )

        self.packed: Mapping[str, PackedInfo] = MappingProxyType(
            {
                name: info
                for name, tensor in self._stored.items()
                if len(tensor.shape) == 2 and (info := packed_info(tensor.type)) is not None
            }
        )
        self.notes: tuple[str, ...] = self._notes()

    def _notes(self) -> tuple[str, ...]:
        """What is said of blocks that no scheme keeps as they are."""
        types = Counter(
            tensor.type
            for name, tensor in self._stored.items()
            if tensor.type not in PLAIN_TYPES and name not in self.packed
        )
        if not types:
            return ()
        listed = ", ".join(f"{count} of {name}" for name, count in sorted(types.items()))
        return (
            f"weights in GGUF blocks that no scheme keeps ({listed}) are dequantised; packing them "
            "again loses precision a second time",
        )

    def read(self, name: str, rows: slice | None = None) -> Array:
        """The tensor, or some of its rows, in transformers' row order."""
        start, stop = row_range(self.tensors[name], rows)
        order = self._order(name, np.arange(start, stop)) if self._permuted(name) else None
        return self.container.read(self._stored[name], start, stop, order)

    def read_packed(self, name: str, rows: Rows = None) -> Packed:
        """Codes and scales of a matrix of `packed`, in transformers' row order."""
        tensor, info = self._stored[name], self.tensors[name]
        if (rows is None or isinstance(rows, slice)) and not self._permuted(name):
            return unpack(self.container.rows(tensor, *row_range(info, rows)), tensor.type)
        order = self._order(name, row_numbers(info, rows))
        start, stop = (int(order.min()), int(order.max()) + 1) if order.size else (0, 0)
        return unpack(self.container.rows(tensor, start, stop)[order - start], tensor.type)

    def release(self) -> None:
        self.container.file.release()

    def _permuted(self, name: str) -> bool:
        return self.architecture.interleaved_rope and (".q_proj." in name or ".k_proj." in name)

    def _order(self, name: str, rows: Array) -> Array:
        """Where transformers' rows lie in the file."""
        if not self._permuted(name):
            return rows
        return unpermute_rows(rows, int(self.config["head_dim"]))


def _check_decodable(container: GgufFile) -> None:
    """Refuse block types the gguf package can't decode, before any long work starts."""
    gguf = gguf_package()
    for tensor in container.raw_tensors.values():
        if tensor.type in PLAIN_TYPES:
            continue
        nbytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[tensor.type]][1]
        try:
            dequantize(np.zeros((1, nbytes), np.uint8), tensor.type)
        except NotImplementedError as error:
            raise InputError(
                f"{container.path}: tensor {tensor.name!r} has the type {tensor.type}, which "
                "can't be decoded",
                hint=USE_HF,
            ) from error
