"""Random matmul operands and their exact product, with what is fused into it: what every target's
kernels are compared with."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np

from mlc_compile.quantization.scheme import SCHEMES, QuantScheme, numpy_dtype
from mlc_compile.targets.kernels import ExpertLinearSpec, LinearSpec

# Error over sum(|x| |w|): rounding of the sums in float32, then of the output.
TOLERANCE = {"float32": 5e-7, "float16": 6e-4, "bfloat16": 5e-3}


def tolerance(spec: LinearSpec | ExpertLinearSpec) -> float:
    """The error that is allowed."""
    # Affine groups may have weights of one sign, and few codes of e4m3 are most of a sum: partial
    # sums, and what they are rounded by, are then as large as the sum of the sizes. Of hundreds of
    # roundings of up to 2^-24 of that, the worst of thousands of sums (4 deviations) has 1e-6.
    uneven = spec.scheme is not None and spec.scheme.codes != "symmetric"
    return TOLERANCE[spec.out_dtype] * (3 if uneven else 1)


def linear_spec(name: str, n: int, k: int, **options: Any) -> LinearSpec:
    """A spec of scheme `name`, activations and output in its model dtype unless told otherwise."""
    scheme = SCHEMES[name]
    dtype = scheme.model_dtype
    options = {"x_dtype": dtype, "out_dtype": dtype, **options}
    if scheme.is_plain:
        return LinearSpec(k, n, None, weight_dtype=dtype, **options)
    return LinearSpec(k, n, scheme, **options)


def random_weight(
    n: int, k: int, scheme: QuantScheme, rng: np.random.Generator
) -> tuple[np.ndarray, ...]:
    """(q_weight, q_scale[, q_zero], exact float64 weight), packed independently of the package.

    All codes of the format, also the one that absmax scales never give (15 of 4 bits), scales of
    either sign and, as the padding past K is not promised to be zero, noise there.
    """
    per_word, bits = scheme.elems_per_word, scheme.bits
    size = scheme.group_size or -(-k // per_word) * per_word
    groups = -(-k // size)
    q = rng.integers(0, 1 << bits, (n, groups * size), dtype=np.uint32)
    sign = rng.choice([-1.0, 1.0], (n, groups))
    scale = (sign * rng.uniform(0.1, 1.0, (n, groups))).astype(numpy_dtype(scheme.model_dtype))
    scale[0, 0] = 0
    zeros = []
    if scheme.codes == "e4m3":
        q = np.where((q & 0x7F) == 0x7F, 0, q)  # NaN
        scale = (scale / 64).astype(scale.dtype)  # sums stay within float16
        numbers = q.astype(np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float64)
    else:
        numbers = q.astype(np.float64)
    numbers = numbers.reshape(n, groups, size)
    if scheme.codes == "affine":
        zero = rng.integers(0, 1 << bits, (n, -(-groups // per_word) * per_word), dtype=np.uint32)
        numbers -= zero[:, :groups, None]
        zeros = [_packed(zero, bits)]
    elif scheme.codes == "symmetric":
        numbers -= (1 << (bits - 1)) - 1
    exact = (numbers * scale.astype(np.float64)[:, :, None]).reshape(n, -1)[:, :k]
    stored = [_packed(q, bits), scale, *zeros]
    if scheme.layout == "KN":
        stored = [np.ascontiguousarray(tensor.T) for tensor in stored]
    return (*stored, exact)


def _packed(fields: np.ndarray, bits: int) -> np.ndarray:
    """Rows of words, the first field in the lowest bits."""
    per_word = 32 // bits
    words = np.zeros((len(fields), fields.shape[1] // per_word), np.uint32)
    for i in range(per_word):
        words |= fields[:, i::per_word] << np.uint32(i * bits)
    return words


@dataclass
class LinearCase:
    """A weight (bias, weight of a norm) for one spec, and the exact output for any x."""

    spec: LinearSpec
    weight: list[np.ndarray]
    exact: np.ndarray
    bias: np.ndarray
    norm_weight: np.ndarray
    rng: np.random.Generator
    residual: np.ndarray = field(default_factory=lambda: np.zeros((1, 1)))

    @classmethod
    def random(cls, spec: LinearSpec, seed: int = 0) -> LinearCase:
        n, k = spec.out_features, spec.in_features
        rng = np.random.default_rng(n * 1009 + k + seed)
        if spec.scheme is None:
            assert spec.weight_dtype is not None
            plain = rng.standard_normal((n, k)).astype(numpy_dtype(spec.weight_dtype))
            weight, exact = [plain], plain.astype(np.float64)
        else:
            *weight, exact = random_weight(n, k, spec.scheme, rng)
        bias = rng.standard_normal(n).astype(numpy_dtype(spec.bias_dtype or spec.x_dtype))
        norm_weight = rng.uniform(0.5, 1.5, k).astype(numpy_dtype(spec.x_dtype))
        return cls(spec, weight, exact, bias, norm_weight, rng)

    def inputs(self, rows: int) -> list[np.ndarray]:
        """x [rows, K] and the other inputs of the kernel, in argument order."""
        # A mean away from zero: sums of the raw codes would cancel here.
        x = (self.rng.standard_normal((rows, self.spec.in_features)) + 1.0).astype(
            numpy_dtype(self.spec.x_dtype)
        )
        named = {"x": x, "norm_weight": self.norm_weight, "bias": self.bias}
        named |= {
            name: weight
            for (name, _, _), weight in zip(self.spec.weight_shapes(), self.weight, strict=True)
        }
        if self.spec.residual:
            shape, dtype = (rows, self.spec.out_width), numpy_dtype(self.spec.out_dtype)
            self.residual = named["residual"] = self.rng.standard_normal(shape).astype(dtype)
        return [named[name] for name, _, _ in self.spec.arguments(rows)[:-1]]

    def poisoned(self, rows: int) -> np.ndarray:
        """An output of which every element must be written."""
        shape = (rows, self.spec.out_width)
        return np.full(shape, 7e3, numpy_dtype(self.spec.out_dtype))

    def error(self, x: np.ndarray, out: np.ndarray) -> float:
        """The largest error of `out` for `x`, and the residual of the last inputs, over the sum of
        the sizes of what is summed up."""
        spec, wide = self.spec, x.astype(np.float64)
        if spec.norm_eps is not None:
            mean = np.mean(wide**2, axis=1, keepdims=True)
            wide = wide / np.sqrt(mean + spec.norm_eps) * self.norm_weight.astype(np.float64)
        expected = wide @ self.exact.T
        magnitude = np.abs(wide) @ np.abs(self.exact).T
        if spec.has_bias:
            expected = expected + self.bias.astype(np.float64)
            magnitude = magnitude + np.abs(self.bias.astype(np.float64))
        if spec.activation is not None:
            assert spec.activation == "silu"
            (gate, up), (size, other) = (np.split(a, 2, axis=1) for a in (expected, magnitude))
            expected = gate / (1 + np.exp(np.minimum(-gate, 700.0))) * up
            magnitude = size * np.abs(up) + np.abs(gate) * other + np.abs(expected)
        if spec.residual:
            residual = self.residual.astype(np.float64)
            expected, magnitude = expected + residual, magnitude + np.abs(residual)
        error = np.abs(out.astype(np.float64) - expected) / (magnitude + 1e-6)
        largest: float = error.max()
        return largest

    def check(self, x: np.ndarray, out: np.ndarray, *context: Any) -> None:
        """Fails unless `out` is right for `x`, within the tolerance."""
        error = self.error(x, out)
        # NaN compares false.
        assert error < tolerance(self.spec), (self.spec, *context, error)
