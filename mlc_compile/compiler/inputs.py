"""What a compilation or a plan starts from: a configuration on disk, or a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mlc_compile.chat_config import COMPILE_KEYS, FILE_NAME, ChatConfig
from mlc_compile.config import CompileConfig, resolve_compile_config
from mlc_compile.errors import InputError
from mlc_compile.models.spec import Model
from mlc_compile.models.structure import declared_model, identify
from mlc_compile.quantization.policy import with_overrides
from mlc_compile.quantization.scheme import QuantScheme, get_scheme
from mlc_compile.targets.profile import TargetProfile


@dataclass(frozen=True)
class CompileInputs:
    """The model, its scheme, and the sizes to plan for."""

    model: Model
    scheme: QuantScheme
    config: CompileConfig
    active_vocab_size: int


def load_inputs(
    source: Path, profile: TargetProfile, overrides: Mapping[str, int]
) -> CompileInputs:
    """Read a directory with mlc-chat-config.json, or that file; `overrides` replace its sizes, and
    those that the target imposes.

    Raises:
        InputError: no such configuration, or one that says something impossible.
    """
    chat = ChatConfig.read(source)
    model = chat.model()
    sizes = {key: min(size, profile.caps.get(key, size)) for key, size in chat.sizes.items()}
    notes = tuple(
        f"{key} is {size}, not the configuration's {chat.sizes[key]}: a default of "
        f"{profile.name}; --overrides changes it."
        for key, size in sizes.items()
        if size != chat.sizes[key] and key not in overrides
    )
    config = _resolve(model, sizes, {**profile.imposed, **overrides})
    return CompileInputs(
        model=model,
        scheme=chat.scheme(model),
        config=replace(config, notes=(*notes, *config.notes)),
        active_vocab_size=int(chat.raw.get("active_vocab_size") or model.config.vocab_size),
    )


def load_plan_inputs(
    source: Path,
    profile: TargetProfile,
    quantization: str | None,
    overrides: Mapping[str, int],
    model_type: str = "auto",
    held_otherwise: str = "",
) -> CompileInputs:
    """As load_inputs, and from a checkpoint too, whose scheme then is `quantization`, and whose
    architecture `model_type` may name. held_otherwise: overrides of the scheme, in place of the
    configuration's.

    Raises:
        InputError: as load_inputs; a checkpoint without a scheme.
    """
    if source.name == FILE_NAME or (source / FILE_NAME).is_file():
        inputs = load_inputs(source, profile, overrides)
        if quantization is None and not held_otherwise:
            return inputs
        scheme = inputs.scheme if quantization is None else get_scheme(quantization)
        return replace(inputs, scheme=with_overrides(scheme, held_otherwise, inputs.model))
    from mlc_compile.weights.checkpoint import open_checkpoint

    if quantization is None:
        raise InputError(
            f"{source} is a checkpoint and names no scheme", hint="give --quantization NAME"
        )
    checkpoint = open_checkpoint(source)
    model = declared_model(checkpoint.config, model_type=model_type, where=str(source))
    if model is None:
        shapes = {name: tensor.shape for name, tensor in checkpoint.tensors.items()}
        # A plan makes nothing, so what matches by structure will do.
        detection = identify(checkpoint.config, shapes, where=str(source))
        model = detection.chosen(allow_experimental=True)
    _check_keys(overrides)
    config = resolve_compile_config(
        model.config,
        target_defaults=profile.compile_defaults,
        **{**profile.imposed, **overrides},
    )
    scheme = with_overrides(get_scheme(quantization), held_otherwise, model)
    return CompileInputs(model, scheme, config, model.config.vocab_size)


def _resolve(model: Model, sizes: Mapping[str, int], overrides: Mapping[str, int]) -> CompileConfig:
    _check_keys(overrides)
    merged: dict[str, Any] = {**sizes, **overrides}
    # One window replaces the other; what follows from the old one is chosen anew unless it is
    # given.
    if overrides.get("context_window_size", -1) > 0 and "sliding_window_size" not in overrides:
        merged["sliding_window_size"] = None
    if overrides.get("sliding_window_size", -1) > 0 and "context_window_size" not in overrides:
        merged["context_window_size"] = None
    if {"context_window_size", "sliding_window_size"} & overrides.keys():
        limit = max(
            v
            for k in ("context_window_size", "sliding_window_size")
            if (v := merged[k]) is not None
        )
        if "prefill_chunk_size" not in overrides:
            merged["prefill_chunk_size"] = min(sizes["prefill_chunk_size"], limit)
        if "attention_sink_size" not in overrides:
            merged["attention_sink_size"] = None
    return resolve_compile_config(model.config, **merged)


def _check_keys(overrides: Mapping[str, int]) -> None:
    unknown = sorted(overrides.keys() - set(COMPILE_KEYS))
    if unknown:
        raise InputError(
            f"--overrides: unknown size {unknown[0]!r}", hint=f"known: {', '.join(COMPILE_KEYS)}"
        )
