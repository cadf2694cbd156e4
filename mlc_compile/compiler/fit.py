"""`plan --fit`: the scheme and the context window to choose for a memory budget."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlc_compile.chat_config import FILE_NAME
from mlc_compile.compiler.inputs import CompileInputs, load_plan_inputs
from mlc_compile.compiler.memory import MemoryPlan, check_budget, estimate_plan, format_bytes
from mlc_compile.config import CompileConfig, resolve_compile_config
from mlc_compile.errors import InputError
from mlc_compile.models.spec import Model
from mlc_compile.quantization.scheme import QuantScheme, get_scheme
from mlc_compile.targets.profile import TargetProfile, get_target

# From the most to the least exact. Every one keeps 16-bit activations; what each costs in quality
# is in the README's guide.
PREFERENCE = ("q0f16", "q8f16_1", "q4f16_1", "q3f16_1")
# Contexts that are tried before a less exact scheme is: below 4096 tokens a chat soon loses its
# beginning.
USEFUL_CONTEXTS = (4096, 2048, 1024, 512, 256)
PAGE = 16


@dataclass(frozen=True)
class Choice:
    """One scheme with the largest context that fits it."""

    scheme: str
    config: CompileConfig
    plan: MemoryPlan


@dataclass(frozen=True)
class FitReport:
    """The choice, and what each scheme would have allowed."""

    source: Path
    target: str
    budget: int
    chosen: Choice
    largest_context: Mapping[str, int]  # 0: not even the smallest context fits

    def commands(self) -> list[str]:
        """What to type for the choice."""
        configured = self.source.name == FILE_NAME or (self.source / FILE_NAME).is_file()
        source, out = "MODEL" if configured else shlex.quote(str(self.source)), "out"
        c = self.chosen.config
        window = (
            f"--sliding-window-size {c.sliding_window_size}"
            if c.sliding_window_size > 0
            else f"--context-window-size {c.context_window_size}"
        )
        return [
            f"mlc_compile convert_weight {source} --quantization {self.chosen.scheme} -o {out}",
            f"mlc_compile gen_config {source} --quantization {self.chosen.scheme} -o {out} "
            f"{window} --prefill-chunk-size {c.prefill_chunk_size} "
            f"--max-batch-size {c.max_batch_size}",
            f"mlc_compile compile {out} --target {self.target} "
            f"-o {out}/model{get_target(self.target)[0].suffixes[0]} --budget {self.budget}B",
        ]

    def to_json(self) -> dict[str, Any]:
        return {
            "budget": self.budget,
            "scheme": self.chosen.scheme,
            "context_window_size": self.chosen.config.context_window_size,
            "sliding_window_size": self.chosen.config.sliding_window_size,
            "prefill_chunk_size": self.chosen.config.prefill_chunk_size,
            "max_batch_size": self.chosen.config.max_batch_size,
            "memory_plan": self.chosen.plan.to_json(),
            "largest_context": dict(self.largest_context),
            "commands": self.commands(),
        }

    def to_text(self) -> str:
        c = self.chosen.config
        lines = [
            f"{self.chosen.scheme}, {_window_words(c)}: {format_bytes(self.chosen.plan.total)} of "
            f"{format_bytes(self.budget)}",
            self.chosen.plan.to_text(),
            "largest context by scheme:",
        ]
        for scheme, context in self.largest_context.items():
            lines.append(f"  {scheme:<8} {context if context else 'does not fit'}")
        return "\n".join([*lines, "", *self.commands()])


def fit_plan(source: Path, target: str, *, budget: int, overrides: Mapping[str, int]) -> FitReport:
    """The most exact scheme that leaves room for a useful context, and the largest context with it.

    One sequence at a time unless `overrides` sets max_batch_size; other sizes in it are kept as
    given.

    Raises:
        InputError: not even the smallest scheme fits; says what it needs.
    """
    profile, _ = get_target(target)
    inputs = load_plan_inputs(source, profile, PREFERENCE[0], {})
    trained = inputs.model.config.max_position_embeddings
    fixed = {"max_batch_size": 1, **overrides}
    fits = {
        name: _largest(inputs, profile, get_scheme(name), fixed, trained, budget)
        for name in PREFERENCE
    }
    for context in [c for c in USEFUL_CONTEXTS if c < trained] + [0]:
        wanted = min(context or 1, trained)
        for choice in fits.values():
            if choice is not None and choice.config.kv_tokens >= wanted:
                return FitReport(
                    source,
                    target,
                    budget,
                    choice,
                    {s: c.config.kv_tokens if c else 0 for s, c in fits.items()},
                )
    least = _choice(inputs.model, profile, get_scheme(PREFERENCE[-1]), fixed, PAGE)
    raise InputError(
        f"no scheme fits {format_bytes(budget)}: the smallest, {least.scheme}, needs "
        f"{format_bytes(least.plan.total)} for {PAGE} tokens (weights "
        f"{format_bytes(least.plan.weights)}, reserve {format_bytes(least.plan.reserve)})",
        hint="take a smaller model or a larger budget",
    )


def check_fits(
    inputs: CompileInputs, profile: TargetProfile, plan: MemoryPlan, budget: int | None
) -> None:
    """Refuse a plan above the budget (bytes).

    Raises:
        InputError: says the parts, and which scheme with which context would fit.
    """
    if budget is not None and plan.total > budget:
        check_budget(plan, budget, what_fits(inputs, profile, budget))


def what_fits(inputs: CompileInputs, profile: TargetProfile, budget: int) -> str:
    """The largest context of this scheme and of each less exact one, in words."""
    own, config, trained = inputs.scheme, inputs.config, inputs.model.config
    fixed = {
        "max_batch_size": config.max_batch_size,
        "prefill_chunk_size": config.prefill_chunk_size,
        "tensor_parallel_shards": config.tensor_parallel_shards,
    }
    found = []
    # The scheme as it is, then those below it; a scheme that is not in PREFERENCE has them all.
    below = PREFERENCE[PREFERENCE.index(own.name) + 1 :] if own.name in PREFERENCE else PREFERENCE
    schemes = [own, *map(get_scheme, below)]
    for scheme in schemes:
        choice = _largest(inputs, profile, scheme, fixed, trained.max_position_embeddings, budget)
        if choice is not None:
            found.append(f"{scheme} with a context of {choice.config.kv_tokens}")
    if found:
        return f"what fits: {', or '.join(found)} tokens"
    least = _choice(inputs.model, profile, schemes[-1], fixed, PAGE)
    return (
        f"nothing fits: {least.scheme} with a context of {PAGE} tokens needs "
        f"{format_bytes(least.plan.total)}; take a smaller model"
    )


def largest_context(
    inputs: CompileInputs, profile: TargetProfile, budget: int
) -> CompileConfig | None:
    """The sizes of `inputs` with the largest context up to theirs that fits the budget (bytes);
    None when not even one page does."""
    config = inputs.config
    if estimate_plan(inputs.model, inputs.scheme, config, profile).total <= budget:
        return config
    fixed = {
        "max_batch_size": config.max_batch_size,
        "prefill_chunk_size": config.prefill_chunk_size,
        "tensor_parallel_shards": config.tensor_parallel_shards,
    }
    limit = max(config.context_window_size, config.sliding_window_size)
    choice = _largest(inputs, profile, inputs.scheme, fixed, limit, budget)
    return None if choice is None else choice.config


def _largest(
    inputs: CompileInputs,
    profile: TargetProfile,
    scheme: QuantScheme,
    fixed: Mapping[str, int],
    trained: int,
    budget: int,
) -> Choice | None:
    """The choice with the most pages of context, by bisection: the plan grows with the context."""
    if {"context_window_size", "sliding_window_size"} & fixed.keys():
        choice = _choice(inputs.model, profile, scheme, fixed, None)
        return choice if choice.plan.total <= budget else None
    low, high = 0, max(trained // PAGE, 1)
    best: Choice | None = None
    while low < high:
        middle = (low + high + 1) // 2
        choice = _choice(inputs.model, profile, scheme, fixed, min(middle * PAGE, trained))
        if choice.plan.total <= budget:
            low, best = middle, choice
        else:
            high = middle - 1
    return best


def _choice(
    model: Model,
    profile: TargetProfile,
    scheme: QuantScheme,
    fixed: Mapping[str, int],
    context: int | None,
) -> Choice:
    sizes: dict[str, Any] = dict(fixed)
    if context is not None:
        sizes["context_window_size"] = context
        chunk = sizes.get("prefill_chunk_size")
        if chunk is not None:
            sizes["prefill_chunk_size"] = min(chunk, context)
    config = resolve_compile_config(model.config, target_defaults=profile.compile_defaults, **sizes)
    plan = estimate_plan(model, scheme, config, profile)
    return Choice(str(scheme), config, plan)


def _window_words(config: CompileConfig) -> str:
    if config.sliding_window_size > 0:
        return f"a sliding window of {config.sliding_window_size} tokens"
    return f"a context of {config.context_window_size} tokens"
