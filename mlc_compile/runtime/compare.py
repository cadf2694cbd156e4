"""How far one row of logits is from the reference's, and how far it may be."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Float32: TypeAlias = NDArray[np.float32]


@dataclass(frozen=True)
class Thresholds:
    """What logits must keep to, for each scenario.

    Some contexts are ill-conditioned: rounding every weight once moves the reference's own logits a
    thousand times further than usual. Numbers of such a position are divided by its `ease`, which
    depends on the reference alone.

    Attributes:
        nmse: squared error over the variance of the reference's logits, mean over positions.
        worst_nmse: the same at the worst position.
        max_abs: largest error, as a fraction of the reference's largest |logit| at that position.
        max_kl: KL(reference || library) in nats, at the worst position.
        margin: where the reference's first two logits are further apart than this fraction of
            their standard deviation, the library must rank the same token first.
    """

    nmse: float
    worst_nmse: float
    max_abs: float
    max_kl: float
    margin: float

    def ease(self, noise: float) -> float:
        """How much more than usual a position may deviate whose logits have this `Row.noise`."""
        return max(1.0, noise / (self.nmse / _USUAL))


_USUAL = 4
"""The mean NMSE allowed, over what rounding the weights costs where that is nothing unusual
(measured with float16: 4e-6 to 2e-4, and 1e-2 at an ill-conditioned position)."""

ROUNDING: Mapping[str, float] = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
"""Largest relative error of a rounding."""

# Measured with the tiny models of tests/parity and with SmolLM2-135M: 30 layers, and first tokens
# with huge activations. A KV length that is off by one costs an NMSE of 0.04 to 4 on average.
THRESHOLDS: Mapping[str, Thresholds] = {
    # Rounding only. Measured: mean NMSE 5e-10, worst 1.3e-8, error 3e-5, KL 2e-9. The limit of the
    # error is 2e-3 for logits of order 20. Margin: ten times the error of the worst NMSE allowed.
    "float32": Thresholds(1e-8, 1e-6, 1e-4, 1e-6, 1e-2),
    # Activations and KV cache keep 11 bits. Measured: 1.0e-4, 8e-4, 1.3e-2, 4e-4. Margin: five
    # times the error of a difference of two logits at the worst position (0.03 x sqrt 2).
    "float16": Thresholds(5e-4, 5e-3, 3e-2, 3e-3, 0.2),
    # 8 bits. Measured: 1.7e-2, 6e-2, 6e-2, 3e-2. Margin: three times that error (0.24 x sqrt 2).
    "bfloat16": Thresholds(4e-2, 0.2, 0.15, 0.1, 1.0),
}


@dataclass(frozen=True)
class Row:
    """A reference's logits after one context: all of them, or the largest and what sums them up.

    Attributes:
        values: float32 logits, of the token ids `ids`, or of all tokens where `ids` is None.
        log_norm: logarithm of the sum of exp(logit) over all tokens.
        std: standard deviation over all tokens.
        peak: largest |logit|.
        noise: NMSE that rounding every weight once more causes; 0 where it was not computed.
    """

    values: Float32
    ids: NDArray[np.int32] | None
    log_norm: float
    std: float
    peak: float
    noise: float = 0.0

    @classmethod
    def of(cls, logits: Float32, top: int | None = None) -> Row:
        """From all logits [vocab]; `top` keeps only so many, the largest first."""
        wide = logits.astype(np.float64)
        ids = None
        if top is not None and top < len(logits):
            ids = np.argsort(-logits, kind="stable")[:top].astype(np.int32)
        return cls(
            values=logits.copy() if ids is None else logits[ids],
            ids=ids,
            log_norm=_log_norm(wide),
            std=float(wide.std()),
            peak=float(np.abs(wide).max()),
        )

    @functools.cached_property
    def top_two(self) -> tuple[int, float]:
        """The likeliest token, and its distance to the second."""
        order = np.argpartition(-self.values, 1)[:2]
        first, second = sorted(order, key=lambda i: (-self.values[i], i))
        token = int(first) if self.ids is None else int(self.ids[first])
        return token, float(self.values[first]) - float(self.values[second])


def _log_norm(x: NDArray[np.float64]) -> float:
    top = x.max()
    return float(top + np.log(np.exp(x - top).sum()))


@dataclass(frozen=True)
class Deviation:
    """How one position's logits differ from the reference's; see Thresholds for the numbers.

    Attributes:
        lead: the reference's first logit over its second, in standard deviations.
        agrees: the library's first token is the reference's.
        ease: see `Thresholds`.
    """

    nmse: float
    max_error: float
    max_abs: float
    kl: float
    lead: float
    agrees: bool
    finite: bool = True
    ease: float = 1.0

    @property
    def eased_nmse(self) -> float:
        return self.nmse / self.ease

    @property
    def eased_max_abs(self) -> float:
        return self.max_abs / math.sqrt(self.ease)

    @property
    def eased_kl(self) -> float:
        return self.kl / self.ease

    def decided(self, limits: Thresholds) -> bool:
        """Whether the reference's first token leads by more than the error."""
        return self.lead > limits.margin * math.sqrt(self.ease)

    def doubtful(self, limits: Thresholds) -> bool:
        """Whether this position alone could make a scenario fail; NaN could."""
        within = (
            self.eased_nmse <= limits.nmse
            and self.eased_max_abs <= limits.max_abs
            and self.eased_kl <= limits.max_kl
        )
        return not within or (self.decided(limits) and not self.agrees)


def compare(row: Row, logits: Float32, limits: Thresholds) -> Deviation:
    """One position. A value that is not finite makes every number infinite."""
    first, gap = row.top_two
    lead = gap / max(row.std, 1e-15)
    if not np.isfinite(logits).all():
        return Deviation(math.inf, math.inf, math.inf, math.inf, lead, False, finite=False)
    wide = logits.astype(np.float64)
    mine = wide if row.ids is None else wide[row.ids]
    theirs = row.values.astype(np.float64)
    error = np.abs(mine - theirs)
    log_p, log_q = theirs - row.log_norm, mine - _log_norm(wide)
    kl = float(np.exp(log_p) @ (log_p - log_q))
    if row.ids is not None:  # the tokens that are not listed, as one
        p, q = max(0.0, 1 - np.exp(log_p).sum()), max(1e-300, 1 - np.exp(log_q).sum())
        kl += p * math.log(p / q) if p > 0 else 0.0
    return Deviation(
        nmse=float(np.mean(error**2)) / max(row.std**2, 1e-30),
        max_error=float(error.max()),
        max_abs=float(error.max()) / max(row.peak, 1e-15),
        kl=max(kl, 0.0),  # rounding may bring it just below
        lead=lead,
        agrees=int(wide.argmax()) == first,
        ease=limits.ease(row.noise),
    )
