"""Tiny models of every registered architecture, and how they are proved.

A case is a configuration that the transformers class builds with random weights. Its library is
compiled once, in float32 for cpu, and then run with the weights of several seeds. Where
transformers has no class of a type (its checkpoints bring their own code), a twin writes the
checkpoint in the published layout and gives the logits of a class with the same maths.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from tiny_models import SIZES, TINY

SEEDS = (0, 1, 2)
MECHANISMS = {
    "gemma2": "soft-caps, windows in every other layer, norms on both sides, scaled embeddings",
    "smollm3": "rotation in the graph, layers without",
    "olmo3": "a rotary table for each kind of layer, norms behind attention and MLP",
    "cohere-qk-norm": "attention and MLP in parallel, norms of each head, interleaved rotation",
    "gpt2": "learned positions, biases, transposed weights, an MLP without a gate",
    "bloom": "ALiBi, a norm of the embeddings, query heads grouped with their keys",
    "phi": "partly rotated heads, a bias on the logits",
    "granite": "scaled residuals, scores and logits",
    "qwen2_moe": "experts, and a gated one for every token",
    "granitemoe": "experts that are stored as one tensor, renormalised",
}
"""One case of each mechanism that the Llama family lacks, for tests of schemes and targets."""
TEXT = 70  # tokens that a twin and numpy are compared on; longer than any tiny window


class Twin(Protocol):
    """Writes a checkpoint (config.json and safetensors, no tokenizer) and computes its logits."""

    def __call__(self, path: Path, seed: int) -> Callable[[Sequence[int]], NDArray[np.float32]]: ...


@dataclass(frozen=True)
class Case:
    """One configuration.

    Attributes:
        model_type: config.json's, and the registered name.
        changes: of `tiny_models.TINY`; a value of `...` drops the key.
        sizes: of the library.
        skipped: scenarios of `verify` that do not apply.
        twin: for types that transformers lacks.
    """

    model_type: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    sizes: Mapping[str, int] = field(default_factory=lambda: SIZES)
    skipped: frozenset[str] = frozenset({"window_wrap"})
    twin: Twin | None = None

    @property
    def config(self) -> dict[str, Any]:
        """Keys for AutoConfig.for_model."""
        merged = {**TINY, **self.changes}
        return {key: value for key, value in merged.items() if value is not ...}
