"""Whether an architecture that a checkpoint fits by structure computes what its own class does.

- The checkpoint's config.json is made small (widths, layers, vocabulary, windows; every other key
  stays), transformers builds its class of that with random weights, writes them as a checkpoint,
  and each candidate reads that and must give the same logits, in numpy and float32.
- Random are all norms and biases too, so that an offset shows. Weights are larger from seed to
  seed, so that caps and clips are reached; texts are longer than windows and original lengths.
- Only classes of transformers itself, or registered with it in this process. No code of a
  checkpoint runs.
"""

from __future__ import annotations

import importlib.metadata
import math
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final, TypeAlias

import numpy as np

from mlc_compile.config import ModelConfig
from mlc_compile.errors import EnvironmentLacksError, InputError
from mlc_compile.models.detect import read_model
from mlc_compile.models.registry import ARCHITECTURES
from mlc_compile.models.spec import Model
from mlc_compile.models.structure import (
    Candidate,
    Detection,
    Proof,
    Run,
    equal_models,
    match_tensors,
)
from mlc_compile.runtime.formulas import Float32
from mlc_compile.runtime.reference import (
    Attention,
    NumpyReference,
    checkpoint_weights,
    quiet_transformers,
    roughen,
    transformers_missing,
)
from mlc_compile.weights.checkpoint import open_checkpoint

Progress = Callable[[str, int, int], None]
Keys: TypeAlias = "dict[str, Any]"

BOUND: Final = 1e-6
"""What the NMSE of any position may be. Equal maths gives about 1e-10; another rotation, norm, cap
or scale more than 1e-3."""
GAINS: Final = (1.0, 2.0, 4.0)
"""How large random weights are, seed by seed; smaller where rounding alone would move logits, as it
does where scores are large in many layers."""
LENGTHS: Final = (11, 70)
"""Tokens of the texts: within windows and original lengths of RoPE, and beyond."""

_NOISE: Final = BOUND * 1e-4
_WINDOW, _ORIGINAL, _VOCAB = 21, 32, 96
_LAYERS, _MAX_POSITIONS = 8, 512  # layers may differ in what no key says, in periods of 2 to 6


def prove(
    detection: Detection, config_json: Mapping[str, Any], *, progress: Progress | None = None
) -> Detection:
    """The same with a proof of each candidate, or with the reason why there is none.

    Raises:
        EnvironmentLacksError: torch or transformers is not installed.
    """
    if not detection.candidates:
        return detection
    if missing := transformers_missing():
        raise EnvironmentLacksError(
            f"a proof needs {' and '.join(missing)}, not installed here",
            hint="pip install 'mlc-compile[reference]'",
        )
    try:
        kind = _own_class(config_json)
    except InputError as error:
        return replace(detection, unproved=error.message)
    proofs = []
    # Of all candidates alike, so that each sees the layers that only another one has.
    layers = max(_layers_needed(candidate.model.config) for candidate in detection.candidates)
    for number, candidate in enumerate(detection.candidates):
        if progress is not None:
            progress(f"prove {candidate.name}", number, len(detection.candidates))
        proofs.append(_prove(candidate, config_json, kind, layers, detection.where))
    if progress is not None:
        progress("proved", len(proofs), len(proofs))
    return replace(detection, proofs=tuple(proofs))


# ---------------------------------------------------------------------------------------------
# The checkpoint's own class


def _own_class(config_json: Mapping[str, Any]) -> Any:
    """transformers' class of a model type.

    Raises:
        InputError: it has none, or another one than the checkpoint names.
    """
    from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING

    model_type = config_json.get("model_type")
    if model_type not in CONFIG_MAPPING:
        raise InputError(
            f"transformers has no model_type {model_type!r}, and code beside a checkpoint is not "
            "run"
        )
    config = CONFIG_MAPPING[model_type]
    if config not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise InputError(f"transformers has no causal language model for {model_type!r}")
    kind = MODEL_FOR_CAUSAL_LM_MAPPING[config]
    named = config_json.get("architectures") or [kind.__name__]
    if kind.__name__.lower() not in [str(name).lower() for name in named]:
        raise InputError(
            f"transformers' class of {model_type!r} is {kind.__name__}, and the checkpoint's "
            f"{', '.join(named)}"
        )
    return kind


def _class_config(kind: Any, keys: Mapping[str, Any], **more: Any) -> Any:
    """transformers' configuration object of a config.json."""
    dropped = ("model_type", "auto_map", "dtype", "torch_dtype", "quantization_config")
    return kind.config_class(**{k: v for k, v in keys.items() if k not in dropped}, **more)


def _check_defaults(candidate: Candidate, config_json: Mapping[str, Any], kind: Any) -> None:
    """What the class takes for keys that config.json does not have is what the candidate takes.

    Raises:
        InputError: a key that the candidate does not know, or that makes it another model.
    """
    arch = ARCHITECTURES[candidate.name]
    where = f"with the defaults of {kind.config_class.__name__}"
    completed = read_model(
        _class_config(kind, config_json).to_dict(), arch, where=where, forced=True
    )
    if not equal_models(replace(completed, names=candidate.model.names), candidate.model):
        raise InputError(f"{where}, which config.json leaves out, it is another model")


def _random_class(kind: Any, keys: Keys, seed: int, gain: float, capped: bool) -> Any:
    """The class with random weights, for keys of a config.json.

    capped: scores have caps, which fused attention does not know and leaves out without a word.
    """
    import torch

    torch.manual_seed(seed)
    config = _class_config(kind, keys, **({"attn_implementation": "eager"} if capped else {}))
    model = kind(config).to(torch.float32).eval()
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if tensor.ndim == 1 or "norm" in name.lower():
                tensor += 0.3 * torch.randn_like(tensor)  # about what it was: 0, or 1
            else:
                tensor.normal_(0.0, gain * min(1.0, 1.2 / math.sqrt(tensor.shape[-1])))
    return model


# ---------------------------------------------------------------------------------------------
# Comparing


def _prove(
    candidate: Candidate, config_json: Mapping[str, Any], kind: Any, layers: int, where: str
) -> Proof:
    version = importlib.metadata.version("transformers")
    proof = Proof(candidate.name, f"{kind.__name__} (transformers {version})", BOUND)
    runs: list[Run] = []
    try:
        if candidate.model.standing is not None:
            _check_defaults(candidate, config_json, kind)
        small = shrink(candidate.model, config_json, layers, where=where)
        for seed, gain in enumerate(GAINS):
            found = _compare(small, kind, seed, gain, where=where)
            while gain > 1 and max(noise for _, noise in found) > _NOISE:
                gain /= 2
                found = _compare(small, kind, seed, gain, where=where)
            runs += [run for run, _ in found]
    except InputError as error:
        return replace(proof, fault=error.message.removeprefix(f"{where}: "))
    return replace(proof, runs=tuple(runs))


def _compare(
    small: Small, kind: Any, seed: int, gain: float, *, where: str
) -> list[tuple[Run, float]]:
    """Logits of the class and of the candidate, at every position of texts of each length; with
    each, how far the candidate's own move when weights are rounded in another way.

    Raises:
        InputError: the class cannot be built, or its tensors do not map.
    """
    import torch

    capped = small.model.config.attention_softcap is not None
    with tempfile.TemporaryDirectory(prefix="mlc_compile_") as folder, quiet_transformers():
        try:
            own = _random_class(kind, small.keys, seed, gain, capped)
            own.save_pretrained(folder)
        except Exception as error:  # whatever a class raises for sizes it was not made for
            raise InputError(
                f"{where}: {kind.__name__} cannot be built small: {type(error).__name__}: "
                f"{str(error).strip()[:200]}"
            ) from error
        checkpoint = open_checkpoint(folder)
        match = match_tensors(
            small.model, {name: tensor.shape for name, tensor in checkpoint.tensors.items()}
        )
        if match.faults:
            raise InputError(f"{where}: tensors of a small one: {match.differences()}")
        weights = checkpoint_weights(match.model, checkpoint)
        rough = {name: weight.copy() for name, weight in weights.items()}
        roughen(rough, float(np.finfo(np.float32).eps), seed)
        found = []
        for length in LENGTHS:
            text = np.random.default_rng(seed).integers(0, _VOCAB, length).tolist()
            with torch.inference_mode():
                expected = own(torch.tensor([text]), use_cache=False).logits[0].float().numpy()
            attention = Attention(match.model.config.sliding_window, sink=0, context=length)
            with np.errstate(all="ignore"):  # a wrong candidate may overflow
                exact, moved = (
                    NumpyReference(match.model, given, attention).logits(text, range(length))
                    for given in (weights, rough)
                )
                run = Run(seed, length, _worst_nmse(exact, expected))
                found.append((run, _worst_nmse(moved, exact)))
    return found


def _worst_nmse(found: Float32, expected: Float32) -> float:
    """Of the worst row; shapes that differ and NaN give infinity."""
    if found.shape != expected.shape:
        return math.inf
    wide, exact = found.astype(np.float64), expected.astype(np.float64)
    nmse = np.square(wide - exact).mean(axis=-1) / np.square(exact).mean(axis=-1)
    return float(nmse.max()) if np.isfinite(nmse).all() else math.inf


# ---------------------------------------------------------------------------------------------
# Making small


@dataclass(frozen=True)
class Small:
    """A small config.json and the candidate of it."""

    keys: Keys
    model: Model


def shrink(model: Model, config_json: Mapping[str, Any], layers: int, *, where: str) -> Small:
    """Sizes made small, every other key kept: the structure stays what it is.

    layers: how many, if that can be.

    Raises:
        InputError: no small configuration has the same structure.
    """
    fault = ""
    for count in dict.fromkeys((layers, model.config.num_hidden_layers)):
        for head_dim in _head_dims(model.config):
            keys = _small_keys(model, config_json, count, head_dim)
            declared = ARCHITECTURES[model.arch.name]
            try:
                small = read_model(keys, declared, where=where, forced=True)
            except InputError as error:
                fault = fault or error.message.removeprefix(f"{where}: ")
                continue
            if small.arch.structure == model.arch.structure and _kinds(small) == _kinds(model):
                return Small(keys, small)
            fault = fault or "a small one is built in another way"
    raise InputError(f"{where}: config.json cannot be made small: {fault}")


def _kinds(model: Model) -> set[tuple[bool, bool, bool]]:
    """Which kinds of layers there are."""
    return {(k.window is not None, k.rope is not None, k.sparse) for k in model.config.layers}


def _layers_needed(config: ModelConfig) -> int:
    """The first so many layers are of every kind that there is."""
    kinds = set(config.layers)
    count = next(n for n in range(1, len(config.layers) + 1) if set(config.layers[:n]) == kinds)
    return min(max(count, _LAYERS), len(config.layers))


def _head_dims(config: ModelConfig) -> list[int]:
    """Small head sizes of which the same part rotates; last the size that it is."""
    whole = config.head_dim
    rotary = config.rope.rotary_dim or whole
    fitting = [d for d in range(16, min(whole, 96), 4) if d * rotary % (2 * whole) == 0]
    return [*fitting[:3], whole]


def _small_keys(model: Model, config_json: Mapping[str, Any], layers: int, head_dim: int) -> Keys:
    """config.json with small sizes, in the spelling that it has them in."""
    config, schema = model.config, model.arch.schema
    heads, kv_heads = _small_heads(config)
    hidden = heads * head_dim
    if config.hidden_size != config.num_attention_heads * config.head_dim:
        hidden = hidden * 3 // 2
    ratio = config.intermediate_size / config.hidden_size
    inner = 4 * hidden if ratio == 4 else hidden * 3 // 2
    rotary = config.rope.rotary_dim * head_dim // config.head_dim
    sizes: Keys = {
        "hidden_size": hidden,
        "word_embed_proj_dim": hidden,
        "intermediate_size": inner,
        "both_intermediate_sizes": 2 * inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "num_kv_heads": kv_heads,
        "head_dim": head_dim,
        "rotary_dim": rotary,
        "vocab_size": _VOCAB,
        "sliding_window": _WINDOW,
    }
    if config.experts is not None:
        sizes |= _small_experts(model, hidden)
    keys = {
        key: _shortened(value, config.num_hidden_layers, layers, rotary // 2)
        for key, value in config_json.items()
    }
    for canonical, size in sizes.items():
        own = schema.spelling.get(canonical, canonical)
        for name in {own, canonical} if canonical not in schema.ignored else {own}:
            if type(config_json.get(name)) is int and config_json[name] > 0:
                keys[name] = size
    if config.sliding_window is not None or config.layer_window is not None:
        # Also where it is the candidate's default: a class without windows does not heed the key.
        keys[schema.spelling.get("sliding_window", "sliding_window")] = _WINDOW
    _shorten_positions(keys, config, schema.spelling.get("max_position_embeddings"))
    # Embeddings refuse ids that they do not have.
    tokens = {"pad_token_id": None, "bos_token_id": 1, "eos_token_id": 1}
    return keys | {key: token for key, token in tokens.items() if key in keys}


def _small_heads(config: ModelConfig) -> tuple[int, int]:
    """Query and KV heads: as many groups as can be told from one, as large; and for ALiBi, a power
    of two only where there was one."""
    group = config.num_attention_heads // config.num_key_value_heads
    power = math.log2(config.num_attention_heads).is_integer()
    if group == 1:
        return (4, 4) if power else (6, 6)
    kv_heads = 1 if config.num_key_value_heads == 1 else 2
    per_kv = (4 if kv_heads == 1 else 2) if power else 3
    return kv_heads * per_kv, kv_heads


def _small_experts(model: Model, hidden: int) -> Keys:
    """By the keys that the schema reads them under."""
    experts, names = model.config.experts, model.arch.schema.experts
    assert experts is not None
    found = {
        names["count"]: min(experts.count, max(8, 2 * experts.per_token)),
        names["intermediate_size"]: hidden // 2,
    }
    if experts.shared_intermediate_size and "shared_intermediate_size" in names:
        found[names["shared_intermediate_size"]] = hidden
    return found


def _shortened(value: Any, layers: int, count: int, pairs: int) -> Any:
    """Lists with an entry for each layer, or (in RoPE's settings) for each rotated pair."""
    if isinstance(value, list) and len(value) == layers and layers > 1:
        return value[:count]
    if isinstance(value, Mapping):
        return {key: _fewer_pairs(key, inner, pairs) for key, inner in value.items()}
    if (kinds := _unrolled(value)) and len(kinds) == layers:
        return [[kinds[:count], 1]]
    return value


def _unrolled(value: Any) -> list[Any]:
    """[[[a, b], 2]] as a, b, a, b (GPT-Neo's layers)."""
    try:
        return [kind for kinds, times in value for _ in range(times) for kind in kinds]
    except (TypeError, ValueError):
        return []


def _fewer_pairs(key: str, value: Any, pairs: int) -> Any:
    if isinstance(value, Mapping):  # settings of one kind of layer
        return {inner: _fewer_pairs(inner, of, pairs) for inner, of in value.items()}
    if key in ("short_factor", "long_factor") and isinstance(value, list) and pairs:
        return value[:: max(1, len(value) // pairs)][:pairs]
    return value


def _shorten_positions(keys: Keys, config: ModelConfig, spelling: str | None) -> None:
    """Lengths, so that short texts pass what RoPE was trained for; their ratio is kept."""
    trained = config.max_position_embeddings
    scaling = [keys.get(name) for name in ("rope_scaling", "rope_parameters")]
    outer = [of for of in scaling if isinstance(of, dict)]
    by_kind = [of for settings in outer for of in settings.values() if isinstance(of, dict)]
    settings = [keys, *outer, *by_kind]
    name = "original_max_position_embeddings"
    original = next((of[name] for of in settings if type(of.get(name)) is int), None)
    dynamic = any(kind.rope is not None and kind.rope.kind == "dynamic" for kind in config.layers)
    if original is not None:
        length = max(_ORIGINAL, round(trained * _ORIGINAL / original))
        for of in settings:
            if type(of.get(name)) is int:
                of[name] = max(2, round(of[name] * _ORIGINAL / original))
    else:
        length = _ORIGINAL if dynamic else min(trained, _MAX_POSITIONS)
    for own in {"max_position_embeddings", spelling}:
        if own is not None and type(keys.get(own)) is int:
            keys[own] = length
