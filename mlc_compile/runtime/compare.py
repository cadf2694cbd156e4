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


THRESHOLDS: Mapping[str, Thresholds] = {
    "float32": Thresholds(1e-8, 1e-6, 1e-4, 1e-6, 2e-3),
    "float16": Thresholds(1e-3, 1e-2, 5e-2, 1e-2, 0.3),
    "bfloat16": Thresholds(4e-2, 0.2, 0.3, 0.2, 1.5),
}


@dataclass(frozen=True)
class Row:
    """A reference's logits after one context: all of them, or the largest and what sums them up.

    Attributes:
        values: float32 logits, of the token ids `ids`, or of all tokens where `ids` is None.
        log_norm: logarithm of the sum of exp(logit) over all tokens.
        std: standard deviation over all tokens.
        peak: largest |logit|.
    """

    values: Float32
    ids: NDArray[np.int32] | None
    log_norm: float
    std: float
    peak: float

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
    """How one position's logits differ from the reference's; see Thresholds for the fields."""

    nmse: float
    max_error: float
    max_abs: float
    kl: float
    decided: bool
    agrees: bool
    finite: bool


def compare(row: Row, logits: Float32, margin: float) -> Deviation:
    """One position. A value that is not finite makes every number infinite."""
    first, gap = row.top_two
    decided = gap > margin * row.std
    if not np.isfinite(logits).all():
        return Deviation(math.inf, math.inf, math.inf, math.inf, decided, False, False)
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
        decided=decided,
        agrees=int(wide.argmax()) == first,
        finite=True,
    )
