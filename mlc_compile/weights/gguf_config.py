"""config.json as transformers would have it, from a GGUF file's metadata.

A metadata key of the architecture that isn't understood is an error: it may change the maths.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np

from mlc_compile.errors import InputError
from mlc_compile.weights.gguf_file import DOWNLOAD_AGAIN, USE_HF, GgufFile, GgufTensor
from mlc_compile.weights.reader import Array


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

ROPE_FREQS = "rope_freqs.weight"


def architecture_of(container: GgufFile) -> GgufArchitecture:
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
            raise InputError(f"{self.path} lacks the metadata key {self.prefix}{key}", hint=USE_HF)
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
            f"{self.path}: {self.prefix}{key} = {value!r:.80} is not supported", hint=USE_HF
        )


def build_config(container: GgufFile, architecture: GgufArchitecture) -> dict[str, Any]:
    """config.json as transformers would have it, from the metadata and the tensors.

    Raises InputError where the metadata is incomplete, inconsistent or not understood.
    """
    keys = _Keys(container)
    tensors = container.raw_tensors
    if "token_embd.weight" not in tensors:
        raise InputError(f"{container.path} has no tensor token_embd.weight", hint=DOWNLOAD_AGAIN)
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
            hint=DOWNLOAD_AGAIN,
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
    freqs = container.raw_tensors.get(ROPE_FREQS)
    if freqs is not None:
        if kind not in ("none", "llama3"):
            raise InputError(
                f"{container.path} has both {ROPE_FREQS} and rope scaling of type {kind!r}",
                hint=USE_HF,
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
        f"{container.path}: {ROPE_FREQS} doesn't hold Llama 3 frequency factors", hint=USE_HF
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
