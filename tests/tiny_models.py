"""Tiny random checkpoints, and how tests convert and compile them.

The checkpoints are written by transformers, with every norm and bias made random: what is left at
its initial value (ones, zeros) would hide that it is not read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

VOCAB = 320

# Small, and still: query groups of two, a head size that is no power of two times the lanes of
# any register, an intermediate size that is no multiple of the hidden size.
TINY: Mapping[str, Any] = {
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "vocab_size": VOCAB,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": 256,
    "pad_token_id": None,
    "initializer_range": 0.15,
}
SIZES: Mapping[str, int] = {
    "context_window_size": 192,
    "prefill_chunk_size": 48,
    "max_batch_size": 4,
}


def save_checkpoint(
    path: Path,
    model_type: str,
    seed: int = 0,
    *,
    config: Mapping[str, Any] | None = None,
    **changes: Any,
) -> Path:
    """A random checkpoint with a byte-level tokenizer, as save_pretrained writes it.

    config: its keys, in place of TINY with `changes`.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    keys = {**TINY, **changes} if config is None else dict(config)
    config = AutoConfig.for_model(model_type, **keys)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    randomize(model)
    model.save_pretrained(path)
    save_tokenizer(path)
    return path


def randomize(model: Any) -> None:
    """Norms and biases of a transformers model, which it initialises with ones and zeros."""
    import torch

    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if tensor.ndim == 1 or "norm" in name:
                scale = "norm" in name or ".ln_" in name or "layernorm" in name
                tensor.normal_(1.0 if scale and name.endswith("weight") else 0.0, 0.3)


def save_tokenizer(path: Path) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<|end|>", special=True)])
    tokenizer.save(str(path / "tokenizer.json"))
    settings = {"eos_token": "<|end|>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (path / "tokenizer_config.json").write_text(json.dumps(settings))


@dataclass(frozen=True)
class Built:
    """A checkpoint, its converted parameters and its library."""

    checkpoint: Path
    directory: Path
    library: Path


def convert(
    checkpoint: Path,
    scheme: str,
    out: Path,
    sizes: Mapping[str, int],
    *,
    overwrite: bool = False,
    override: str = "",
    scales: str = "absmax",
) -> None:
    """convert_weight and gen_config, as the commands do it."""
    from mlc_compile.chat_config import gen_config
    from mlc_compile.config import resolve_compile_config
    from mlc_compile.models.detect import load_model
    from mlc_compile.quantization.policy import with_overrides
    from mlc_compile.quantization.scheme import get_scheme
    from mlc_compile.weights.checkpoint import open_checkpoint
    from mlc_compile.weights.convert import convert_weight

    source = open_checkpoint(checkpoint)
    model = load_model(source.config, where=str(checkpoint))
    held = with_overrides(get_scheme(scheme), override, model)
    convert_weight(source, model, held, out, overwrite=overwrite, scales=scales)
    config = resolve_compile_config(model.config, **sizes)
    gen_config(source, model, held, config, out, conv_template="raw", overwrite=overwrite)


def build(
    checkpoint: Path,
    scheme: str,
    out: Path,
    sizes: Mapping[str, int],
    opt: str = "O2",
    target: str = "cpu",
    **conversion: Any,
) -> Built:
    """Convert and compile to a library for this machine, of exactly these sizes.

    conversion: options of `convert`.
    """
    from mlc_compile.compiler.build import compile_library

    convert(checkpoint, scheme, out, sizes, **conversion)
    compile_library(out, target, out / "model.so", opt=opt, overrides=sizes)
    return Built(checkpoint, out, out / "model.so")
