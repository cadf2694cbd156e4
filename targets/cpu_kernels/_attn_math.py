"""Expressions and loop shapes shared by the CPU attention and rotary kernels.

Polynomials are Chebyshev interpolations made for these kernels: the function is sampled in float64
at the Chebyshev nodes of the interval, `numpy.polynomial.chebyshev.chebfit` gives the interpolant,
and its power-basis coefficients are rounded to float32. tests/targets/test_cpu_attention.py
recomputes their errors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from tvm import tirx
from tvm.script import tirx as T

LOG2_E = math.log2(math.e)
NEGATIVE = -1e30
"""The score of a masked key. Finite, so that no difference of two scores is NaN."""

# 2**t on [-1/2, 1/2], relative error 1.9e-8.
EXP2_COEFFICIENTS = (
    1.0,
    0.6931471824645996,
    0.24022650718688965,
    0.05550327152013779,
    0.009618056938052177,
    0.0013400427997112274,
    0.00015461444854736328,
)
# sin(sqrt(t))/sqrt(t) and cos(sqrt(t)) on [0, 1.01 (pi/4)**2], absolute error 3.5e-9 and 2.2e-9.
SIN_COEFFICIENTS = (
    1.0,
    -0.1666666716337204,
    0.008333328180015087,
    -0.00019839161541312933,
    2.7169642180524534e-06,
)
COS_COEFFICIENTS = (
    1.0,
    -0.5,
    0.04166661575436592,
    -0.0013886572560295463,
    2.4375645807594992e-05,
)
# tanh(sqrt(t))/sqrt(t) on [0, 1.01 * 0.625**2], relative error 8.4e-9.
TANH_COEFFICIENTS = (
    1.0,
    -0.3333325684070587,
    0.13331033289432526,
    -0.05371357873082161,
    0.020566919818520546,
    -0.005633150693029165,
)
TANH_NEAR = 0.625
"""Up to here tanh is its polynomial: 1 - 2 / (exp(2x) + 1) would cancel."""
# pi/2 as a sum whose first two terms have 8 bits each, so that their products with a quadrant
# number below 2**16 are exact in float32 (Cody and Waite's reduction), with or without FMA.
HALF_PI_TERMS = (1.5703125, 0.0004825592041015625, 1.2675908465098473e-06)


def f32(value: float) -> tirx.Expr:
    return tirx.const(value, "float32")


def let(value: tirx.Expr, body: Callable[[tirx.Expr], tirx.Expr], dtype: str) -> tirx.Expr:
    """Name a subexpression, so that using it many times does not copy it many times."""
    name = tirx.Var("t", dtype)
    return tirx.Let(name, value, body(name))


def polynomial(coefficients: Sequence[float], x: tirx.Expr) -> tirx.Expr:
    result = f32(coefficients[-1])
    for coefficient in coefficients[-2::-1]:
        result = result * x + f32(coefficient)
    return result


def exp2(x: tirx.Expr) -> tirx.Expr:
    """2**x in float32 for x <= 127, relative error 1e-7; exactly 0 below -125."""

    def scaled(clamped: tirx.Expr, whole: tirx.Expr) -> tirx.Expr:
        bits = T.reinterpret("int32", polynomial(EXP2_COEFFICIENTS, clamped - whole))
        # The polynomial is in [0.7, 1.5), so adding to its exponent field multiplies by 2**whole.
        shifted = bits + T.shift_left(T.Cast("int32", whole), tirx.const(23, "int32"))
        return T.reinterpret("float32", shifted)

    clamped = T.max(x, f32(-125.0))
    value = let(
        clamped,
        lambda c: let(T.floor(c + f32(0.5)), lambda w: scaled(c, w), "float32"),
        "float32",
    )
    return T.Select(x < f32(-125.0), f32(0.0), value)


def _reduced(x: tirx.Expr, body: Callable[[tirx.Expr, tirx.Expr], tirx.Expr]) -> tirx.Expr:
    """body(r, n) with x = n pi/2 + r, |r| <= pi/4, for |x| < 1e5 or so."""

    def remainder(n: tirx.Expr) -> tirx.Expr:
        r = x
        for term in HALF_PI_TERMS:
            r = r - n * f32(term)
        return let(r, lambda v: body(v, T.Cast("int32", n)), "float32")

    return let(T.floor(x * f32(2 / math.pi) + f32(0.5)), remainder, "float32")


def _quadrant(r: tirx.Expr, n: tirx.Expr) -> tirx.Expr:
    """sin(r + n pi/2)."""
    square = r * r
    sine = polynomial(SIN_COEFFICIENTS, square) * r
    cosine = polynomial(COS_COEFFICIENTS, square)
    one, two = tirx.const(1, "int32"), tirx.const(2, "int32")
    value = T.Select(T.bitwise_and(n, one) == 0, sine, cosine)
    return T.Select(T.bitwise_and(n, two) == 0, value, -value)


def sin(x: tirx.Expr) -> tirx.Expr:
    """Absolute error about 1e-7 plus x's own rounding; the angle is in radians."""
    return _reduced(x, _quadrant)


def cos(x: tirx.Expr) -> tirx.Expr:
    return _reduced(x, lambda r, n: _quadrant(r, n + tirx.const(1, "int32")))


def tanh(x: tirx.Expr) -> tirx.Expr:
    """tanh(x) in float32, relative error 3e-7."""

    def value(v: tirx.Expr, size: tirx.Expr) -> tirx.Expr:
        near = v * polynomial(TANH_COEFFICIENTS, v * v)
        far = f32(1.0) - f32(2.0) / (exp2(size * f32(2 * LOG2_E)) + f32(1.0))

        def choice(f: tirx.Expr) -> tirx.Expr:
            signed = T.Select(v < f32(0.0), f32(0.0) - f, f)
            return T.Select(size < f32(TANH_NEAR), near, signed)

        return let(far, choice, "float32")

    # From 10 on tanh rounds to 1; the bound keeps exp2 finite.
    return let(
        x,
        lambda v: let(T.min(T.max(v, f32(0.0) - v), f32(10.0)), lambda a: value(v, a), "float32"),
        "float32",
    )


def lanes_for(extent: int, lanes: int) -> int:
    """The widest vector that divides `extent`, at most `lanes` (a power of two)."""
    return math.gcd(extent, lanes)
