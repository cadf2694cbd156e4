"""How far one model's next-token distributions are from another's: formulas of the quality report.

Per scored position, with p the reference's distribution, q the candidate's and t the text's next
token: -ln p[t], -ln q[t], KL(p || q) = sum p (ln p - ln q), q[t] - p[t], and whether both rank
the same token first. These few float64 numbers are kept for every position; distributions are not.

Sums follow llama.cpp's perplexity tool, so that figures can be set beside its own:
- perplexity exp(mean); its standard error is perplexity x the error of the mean;
- the ln-ratio's error is that of the mean of the *paired* differences, far smaller than the errors
  of the two perplexities, which see the same text;
- percentiles interpolate linearly; same-top-1 has the binomial error sqrt(p (1 - p) / (n - 1)).
Positions of one text are not independent, so the errors are a little too small; so are llama.cpp's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlc_compile.errors import InputError

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]

_BLOCK_ELEMENTS = 1 << 21  # float64 values of one temporary: 16 MB
PERCENTILES = (0, 1, 5, *range(10, 91, 10), 95, 99, 99.9, 100)
"""Percentiles of the KL divergence that the plot draws."""


@dataclass(frozen=True)
class Estimate:
    """A number and its standard error."""

    value: float
    error: float


def mean(x: Float64) -> Estimate:
    """The mean and its standard error; a single value has no error, here 0."""
    n = len(x)
    value = float(x.mean())
    variance = float(np.square(x - value).sum()) / (n - 1) if n > 1 else 0.0
    return Estimate(value, math.sqrt(variance / n))


def perplexity(nll: Float64) -> Estimate:
    """exp of the mean, with its error to first order."""
    found = mean(nll)
    value = math.inf if found.value > 700 else math.exp(found.value)
    return Estimate(value, value * found.error)


@dataclass(frozen=True)
class Positions:
    """What is kept of each scored position, float64 [n]; see the module's docstring.

    nll, base_nll: -ln q[t] and -ln p[t]. kld: KL(p || q). delta: q[t] - p[t]. same: 0 or 1.
    """

    nll: Float64
    base_nll: Float64
    kld: Float64
    delta: Float64
    same: Float64

    @classmethod
    def joined(cls, parts: list[Positions]) -> Positions:
        """One after the other."""
        return cls(
            *(np.concatenate([getattr(part, f.name) for part in parts]) for f in fields(cls))
        )


def log_softmax(logits: Float32) -> Float64:
    """Over the last axis, in float64: the largest logit is taken off before exp."""
    x = logits.astype(np.float64)
    x -= x.max(axis=-1, keepdims=True)
    x -= np.log(np.exp(x).sum(axis=-1, keepdims=True))
    return x


def compare_logits(base: Float32, logits: Float32, targets: NDArray[np.int32]) -> Positions:
    """base, logits: [n, vocab] of the reference and the candidate; targets: [n] tokens that came.

    Works in blocks of rows, whose float64 temporaries are bounded. Where a logit of either is NaN
    or infinite, that position's figures are NaN, and so is every mean.
    """
    step = max(1, _BLOCK_ELEMENTS // base.shape[1])
    parts = []
    for start in range(0, len(base), step):
        rows = slice(start, start + step)
        parts.append(_compare_block(base[rows], logits[rows], targets[rows]))
    return Positions.joined(parts)


def _compare_block(base: Float32, logits: Float32, targets: NDArray[np.int32]) -> Positions:
    each = np.arange(len(base))
    with np.errstate(invalid="ignore", over="ignore"):
        log_p, log_q = log_softmax(base), log_softmax(logits)
        p = np.exp(log_p)
        # A probability that underflows to 0 adds nothing, whatever the candidate says there.
        kld = np.einsum("nv,nv->n", p, log_p - log_q)
        base_nll, nll = -log_p[each, targets], -log_q[each, targets]
    bad = ~(np.isfinite(base).all(axis=1) & np.isfinite(logits).all(axis=1))
    found = Positions(
        nll=nll,
        base_nll=base_nll,
        kld=np.maximum(kld, 0.0),  # rounding may bring it just below
        delta=np.exp(-nll) - np.exp(-base_nll),
        same=(base.argmax(axis=1) == logits.argmax(axis=1)).astype(np.float64),
    )
    for f in fields(found):
        getattr(found, f.name)[bad] = np.nan
    return found


@dataclass(frozen=True)
class Figures:
    """What `quality` reports of one candidate; every number of nats is of natural logarithms.

    perplexity: exp of the mean negative log-likelihood. ln_ratio: ln(perplexity / reference's).
    kld: mean; the percentiles and the maximum follow. top1: fraction of positions where both rank
    the same token first. rms_delta: root of the mean square of q[t] - p[t], as a fraction.
    curve: KL divergence at PERCENTILES.
    """

    perplexity: Estimate
    ln_ratio: Estimate
    kld: Estimate
    kld_median: float
    kld_p90: float
    kld_p99: float
    kld_p999: float
    kld_max: float
    top1: Estimate
    rms_delta: Estimate
    curve: tuple[float, ...]

    @property
    def ppl_ratio(self) -> float:
        """Perplexity over the reference's."""
        ratio = self.ln_ratio.value
        return math.inf if ratio > 700 else math.exp(ratio)

    def to_json(self) -> dict[str, Any]:
        """JSON-ready; numbers that are not finite become null."""
        return {key: finite(x) for key, x in (asdict(self) | {"ppl_ratio": self.ppl_ratio}).items()}


def finite(x: Any) -> Any:
    """The same with None for every number that JSON does not have."""
    if isinstance(x, dict):
        return {key: finite(value) for key, value in x.items()}
    if isinstance(x, tuple | list):
        return [finite(value) for value in x]
    return x if not isinstance(x, float) or math.isfinite(x) else None


def summarize(found: Positions) -> Figures:
    """The figures of all scored positions."""
    n = len(found.nll)
    same = float(found.same.mean())
    square = mean(np.square(found.delta))
    rms = math.sqrt(square.value)
    curve = tuple(float(x) for x in np.percentile(found.kld, PERCENTILES))
    at = dict(zip(PERCENTILES, curve, strict=True))
    return Figures(
        perplexity=perplexity(found.nll),
        ln_ratio=mean(found.nll - found.base_nll),
        kld=mean(found.kld),
        kld_median=at[50],
        kld_p90=at[90],
        kld_p99=at[99],
        kld_p999=at[99.9],
        kld_max=at[100],
        top1=Estimate(same, math.sqrt(same * (1 - same) / max(1, n - 1))),
        # The error of a root is that of the square over twice the root.
        rms_delta=Estimate(rms, square.error / (2 * rms) if rms else 0.0),
        curve=curve,
    )


# ---------------------------------------------------------------------------------------------
# Gates

GATES: Mapping[str, tuple[str, bool]] = {
    "kld": ("mean KL divergence", False),
    "kld_median": ("median KL divergence", False),
    "kld_p99": ("99th percentile of the KL divergence", False),
    "kld_p999": ("99.9th percentile of the KL divergence", False),
    "kld_max": ("largest KL divergence", False),
    "top1": ("same top-1", True),
    "ppl": ("perplexity", False),
    "ppl_ratio": ("perplexity over the reference's", False),
    "rms_delta": ("RMS difference of probability", False),
}
"""Gate -> (what it is, whether larger is better)."""


def parse_gates(text: str) -> dict[str, float]:
    """`kld=0.05,top1=0.9` -> limits.

    Raises InputError for an unknown name, a number that is none, or a gate given twice.
    """
    gates: dict[str, float] = {}
    for item in filter(None, (part.strip() for part in text.split(","))):
        name, _, number = (part.strip() for part in item.partition("="))
        if name not in GATES:
            raise InputError(
                f"--gate: there is no {name!r}", hint=f"gates: {', '.join(GATES)}, as kld=0.05"
            )
        try:
            limit = float(number)
        except ValueError:
            limit = math.nan
        if not math.isfinite(limit):
            raise InputError(f"--gate: '{item}' has no number", hint="write for example kld=0.05")
        if name in gates:
            raise InputError(f"--gate: {name} is given twice")
        gates[name] = limit
    return gates


def missed_gates(figures: Figures, gates: Mapping[str, float]) -> list[str]:
    """A sentence for each limit that is missed; NaN misses every one."""
    values = {
        "kld": figures.kld.value,
        "kld_median": figures.kld_median,
        "kld_p99": figures.kld_p99,
        "kld_p999": figures.kld_p999,
        "kld_max": figures.kld_max,
        "top1": figures.top1.value,
        "ppl": figures.perplexity.value,
        "ppl_ratio": figures.ppl_ratio,
        "rms_delta": figures.rms_delta.value,
    }
    missed = []
    for name, limit in gates.items():
        what, larger = GATES[name]
        value = values[name]
        if not (value >= limit if larger else value <= limit):
            missed.append(f"{what} {value:.5g} {'<' if larger else '>'} {limit:g} ({name})")
    return missed
