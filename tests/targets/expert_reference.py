"""Random experts, choices of them, and their exact products: what every target's kernels are
compared with."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from linear_reference import random_weight, tolerance

from mlc_compile.quantization.scheme import SCHEMES, numpy_dtype
from mlc_compile.targets.kernels import ExpertLinearSpec

ROUTES = ("random", "one", "two", "last")
"""Which experts tokens choose: any, all the same one, one of two far apart, the last ones."""


def expert_spec(
    name: str, experts: int, per_token: int, n: int, k: int, **options: Any
) -> ExpertLinearSpec:
    """A spec of scheme `name`, activations and output in its model dtype unless told otherwise."""
    scheme = SCHEMES[name]
    dtype = scheme.model_dtype
    options = {"x_dtype": dtype, "out_dtype": dtype, **options}
    if scheme.is_plain:
        options = {"weight_dtype": dtype, **options}
        return ExpertLinearSpec(experts, per_token, k, n, None, **options)
    packed = dataclasses.replace(scheme, layout="NK")
    return ExpertLinearSpec(experts, per_token, k, n, packed, **options)


@dataclasses.dataclass
class ExpertCase:
    """The weights for one spec, and the exact product of any x with them."""

    spec: ExpertLinearSpec
    weight: list[np.ndarray]
    exact: np.ndarray
    rng: np.random.Generator

    @classmethod
    def random(cls, spec: ExpertLinearSpec, seed: int = 0) -> ExpertCase:
        e, n, k = spec.experts, spec.out_features, spec.in_features
        rng = np.random.default_rng(n * 1009 + k + seed)
        if spec.scheme is None:
            assert spec.weight_dtype is not None
            plain = rng.standard_normal((e, n, k)).astype(numpy_dtype(spec.weight_dtype))
            return cls(spec, [plain], plain.astype(np.float64), rng)
        *weight, exact = random_weight(e * n, k, spec.scheme, rng)
        return cls(spec, [w.reshape(e, n, -1) for w in weight], exact.reshape(e, n, k), rng)

    def routes(self, rows: int, kind: str = "random") -> np.ndarray:
        """int32 [rows, per_token]: the experts of each token, as one of ROUTES."""
        count, k = self.spec.experts, self.spec.per_token
        if kind == "random":
            chosen = self.rng.integers(0, count, (rows, k))
        elif kind == "one":
            chosen = np.full((rows, k), count // 2)
        elif kind == "two":
            chosen = self.rng.choice([0, count - 1], (rows, k))
        else:
            chosen = np.broadcast_to(np.arange(count)[-k:], (rows, k))
        return np.ascontiguousarray(chosen, np.int32)

    def inputs(self, rows: int, kind: str = "random") -> list[np.ndarray]:
        """x, experts and the weights, in argument order."""
        count = rows if self.spec.shared_x else rows * self.spec.per_token
        # A mean away from zero: sums of the raw codes would cancel here.
        x = (self.rng.standard_normal((count, self.spec.in_features)) + 1.0).astype(
            numpy_dtype(self.spec.x_dtype)
        )
        return [x, self.routes(rows, kind), *self.weight]

    def poisoned(self, rows: int) -> np.ndarray:
        """An output of which every element must be written."""
        shape = (rows * self.spec.per_token, self.spec.out_features)
        return np.full(shape, 7e3, numpy_dtype(self.spec.out_dtype))

    def check(self, x: np.ndarray, experts: np.ndarray, out: np.ndarray, *context: Any) -> None:
        """Fails unless `out` is the product for `x`, within the tolerance."""
        wide = x.astype(np.float64)
        if self.spec.shared_x:
            wide = np.repeat(wide, self.spec.per_token, axis=0)
        chosen = self.exact[experts.reshape(-1)]  # [pairs, N, K]
        expected = np.einsum("pk,pnk->pn", wide, chosen)
        magnitude = np.einsum("pk,pnk->pn", np.abs(wide), np.abs(chosen))
        error = np.abs(out.astype(np.float64) - expected) / (magnitude + 1e-6)
        # NaN compares false.
        assert error.max() < tolerance(self.spec), (self.spec, *context, error.max())
