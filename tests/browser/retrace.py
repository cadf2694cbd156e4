"""Retraces with the `cpu` library what web-llm fed into its cache and sampled from it.

The answer of run.mjs lists the tokens fed in each forward call and the token sampled after it, with
the random number and the grammar mask that were used. The same tokens go through the cpu library
of the same weights; each choice must be the one that its logits and numpy's formulas give.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from mlc_compile.runtime.engine import Engine, Logits
from mlc_compile.runtime.sampling import Sampling, penalise_by_numpy, sample_by_numpy

SEQUENCE = 0

# Both libraries compute in float32 and add in different orders. Cumulative probabilities differ
# by less than this; a random number closer than this to a boundary may fall on either side.
NEAR = 1e-4


@dataclass
class Retraced:
    """How a retraced answer compares. margins: of the two likeliest tokens, in logits."""

    tokens: list[int] = field(default_factory=list)
    expected: list[int] = field(default_factory=list)
    margins: list[float] = field(default_factory=list)
    ambiguous: int = 0

    def differences(self) -> list[str]:
        return [
            f"token {i}: {a} in the browser, {b} by cpu (margin {margin:.2g})"
            for i, (a, b, margin) in enumerate(
                zip(self.tokens, self.expected, self.margins, strict=True)
            )
            if a != b
        ]


def retrace(
    engine: Engine, answers: Sequence[Mapping[str, Any]], requests: Sequence[Mapping[str, Any]]
) -> list[Retraced]:
    """Of answers that follow one another in one cache."""
    # What lies beyond is padding of the logits, which the library's softmax leaves out.
    active = engine.library.metadata["active_vocab_size"]
    engine.clear()
    found = []
    for answer, request in zip(answers, requests, strict=True):
        assert "error" not in answer, answer
        assert len(answer["fed"]) == len(answer["tokens"]) == len(answer["uniforms"])
        result = Retraced()
        counts: Counter[int] = Counter()
        for step, (fed, token) in enumerate(zip(answer["fed"], answer["tokens"], strict=True)):
            if answer["cached"][step] == 0:
                engine.clear()
                engine.add_sequence(SEQUENCE)
            assert engine.lengths[SEQUENCE] == answer["cached"][step]
            logits = engine.prefill(SEQUENCE, fed)
            mask = answer["masks"][step] if answer["masks"] else None
            logits = adjusted(logits, request, counts, mask)[:active]
            top = np.partition(logits, -2)[-2:]
            result.margins.append(float(top[1] - top[0]))
            result.tokens.append(token)
            result.expected.append(choose(logits, request, answer["uniforms"][step], token, result))
            counts[token] += 1
        found.append(result)
    return found


def adjusted(
    logits: Logits,
    request: Mapping[str, Any],
    counts: Mapping[int, int],
    mask: Sequence[int] | None,
) -> Logits:
    """Logits after the grammar's mask, the bias and the penalties, in web-llm's order."""
    logits = logits.copy()
    if mask is not None:
        bits = np.asarray(mask, np.int64).astype(np.uint32).view(np.uint8)
        allowed = np.unpackbits(bits, bitorder="little")[: len(logits)].astype(bool)
        logits[~allowed] = np.finfo(np.float32).min
    for token, bias in request.get("logit_bias", {}).items():
        logits[int(token)] += bias
    sampling = Sampling(
        presence_penalty=request.get("presence_penalty", 0.0),
        frequency_penalty=request.get("frequency_penalty", 0.0),
        repetition_penalty=request.get("repetition_penalty", 1.0),
    )
    return penalise_by_numpy(logits, counts, sampling) if sampling.penalises and counts else logits


def choose(
    logits: Logits, request: Mapping[str, Any], uniform: float, token: int, result: Retraced
) -> int:
    """The token to expect; `token` itself where the random number is too near to a boundary."""
    if request["temperature"] == 0:
        return int(np.argmax(logits))
    sampling = Sampling(temperature=request["temperature"], top_p=request.get("top_p", 1.0))
    ranks = possible_ranks(logits, sampling, uniform, NEAR)
    order = np.argsort(-logits, kind="stable")
    if len(ranks) > 1 and token in order[ranks.start : ranks.stop]:
        result.ambiguous += 1
        return token
    return sample_by_numpy(logits, sampling, uniform)


def possible_ranks(logits: Logits, sampling: Sampling, uniform: float, near: float) -> range:
    """Ranks (0: the likeliest token) that a draw may give when cumulative shares are off by `near`.

    Raising top_p or lowering it moves every boundary, hence all pairs.
    """
    order = np.argsort(-logits, kind="stable")
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    found = [
        rank[
            sample_by_numpy(
                logits,
                replace(sampling, top_p=float(np.clip(sampling.top_p + p, 1e-6, 1.0))),
                float(np.clip(uniform + u, 0.0, 1.0 - 1e-9)),
            )
        ]
        for u in (-near, 0.0, near)
        for p in (-near, 0.0, near)
    ]
    return range(int(min(found)), int(max(found)) + 1)
