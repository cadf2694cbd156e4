"""Where tokens stand, as layers see it: what is not left to the cache's own rotation.

- The cache rotates q and k itself where all layers rotate alike; that is the fast way.
- Layers that differ are rotated here, from tables of cosines made once for each kind of layer.
- Learned positions and ALiBi need the positions only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from tvm import relax, te, tirx
from tvm.relax.frontend.nn import Tensor, op

from mlc_compile.nn.kv_cache import PagedKVCache

Table = tuple[NDArray[np.float32], float]
"""Inverse frequencies in radians per token, and what cos and sin are multiplied with."""

_LOW = 64
"""ALiBi's low part of a position: both parts are exact in float16 up to position 131,072."""


@dataclass
class Round:
    """One call of the stack: its cache, and what layers share.

    Attributes:
        tokens: n, rows of this call.
        tables: the rotary tables of the model's layers that the cache does not rotate, by number.
    """

    cache: PagedKVCache
    tokens: tirx.Expr
    tables: Sequence[Table] = ()
    _made: dict[str, Tensor] = field(default_factory=dict)

    @property
    def positions(self) -> Tensor:
        """int32 [n]: each token's position in its text."""
        if "positions" not in self._made:
            call = relax.call_pure_packed(
                "vm.builtin.attention_kv_cache_get_query_positions",
                self.cache._expr,
                ty_args=relax.TensorType((self.tokens,), "int32"),
            )
            self._made["positions"] = Tensor(_expr=relax.BlockBuilder.current().emit(call))
        return self._made["positions"]

    def turns(self, number: int) -> Tensor:
        """float32 [2, n, rotary_dim / 2]: cosines and sines of table `number`."""
        key = f"turns {number}"
        if key not in self._made:
            self._made[key] = _turns(self.positions, *self.tables[number])
        return self._made[key]


def constant(values: NDArray[np.generic]) -> Tensor:
    """A constant of the graph."""
    return Tensor(_expr=relax.BlockBuilder.current().emit(relax.const(values)))


def _turns(positions: Tensor, inv_freq: NDArray[np.float32], factor: float) -> Tensor:
    """Angles are float32 products, as in transformers; their sine and cosine are taken after the
    whole turns are gone, which not every target's own function does well.

    Source of the reduction: Cody & Waite, 1980, 2 pi in three parts.
    """
    parts = [np.float32(6.28125), np.float32(2 * math.pi - 6.28125)]
    parts.append(np.float32(2 * math.pi - float(parts[0]) - float(parts[1])))

    def compute(at: te.Tensor, freq: te.Tensor) -> te.Tensor:
        def element(which: tirx.Var, t: tirx.Var, i: tirx.Var) -> tirx.Expr:
            angle = at[t].astype("float32") * freq[i]
            whole = tirx.floor(angle * tirx.const(0.5 / math.pi, "float32") + 0.5)
            for part in parts:
                angle = angle - whole * tirx.const(float(part), "float32")
            turned = tirx.Select(which == 0, tirx.cos(angle), tirx.sin(angle))
            return turned * tirx.const(factor, "float32")

        return te.compute((2, at.shape[0], freq.shape[0]), element, name="rope_turns")

    return op.tensor_expr_op(compute, "rope_turns", [positions, constant(inv_freq)])


def rotate(qkv: Tensor, turns: Tensor, heads: int) -> Tensor:
    """The first `heads` heads of qkv [n, q + 2 kv, d], turned; dimension i turns with
    i + rotary_dim / 2 (RoFormer, half-split as in GPT-NeoX)."""

    def compute(x: te.Tensor, table: te.Tensor) -> te.Tensor:
        half = table.shape[2]

        def element(t: tirx.Var, h: tirx.Var, e: tirx.Var) -> tirx.Expr:
            first = e < half
            i = tirx.if_then_else(first, e, tirx.min(e - half, half - 1))
            partner = tirx.if_then_else(first, e + half, tirx.max(e - half, 0))
            sign = tirx.if_then_else(first, tirx.const(-1, "float32"), tirx.const(1, "float32"))
            a, b = x[t, h, e].astype("float32"), x[t, h, partner].astype("float32")
            turned = a * table[0, t, i] + sign * b * table[1, t, i]
            inside = tirx.all(h < heads, e < 2 * half)
            return tirx.if_then_else(inside, turned.astype(x.dtype), x[t, h, e])

        return te.compute(x.shape, element, name="rope_rotate")

    return op.tensor_expr_op(compute, "rope_rotate", [qkv, turns])


@dataclass(frozen=True)
class Penalty:
    """ALiBi of one model.

    Attributes:
        slopes: [heads], float32.
        rounded: as `models.options.Alibi`.
    """

    slopes: NDArray[np.float32]
    rounded: bool = False


def alibi_slopes(heads: int) -> NDArray[np.float32]:
    """[heads]: powers of 2^(-8 / n) for n the power of two not above `heads`; further heads take
    every other power of the next finer series (Press et al., ALiBi, 2021, appendix). MPT makes the
    same of the finer series alone."""
    near = 2 ** math.floor(math.log2(heads))
    slopes = [2.0 ** (-8.0 * (i + 1) / near) for i in range(near)]
    slopes += [2.0 ** (-4.0 * (2 * i + 1) / near) for i in range(heads - near)]
    return np.array(slopes, np.float32)


def _bfloat16(x: tirx.Expr) -> tirx.Expr:
    """A positive float32 rounded to bfloat16's precision, to even where it lies between two."""
    bits = tirx.reinterpret("uint32", x)
    odd = tirx.bitwise_and(
        tirx.shift_right(bits, tirx.const(16, "uint32")), tirx.const(1, "uint32")
    )
    bits = bits + tirx.const(0x7FFF, "uint32") + odd
    return tirx.reinterpret("float32", tirx.bitwise_and(bits, tirx.const(0xFFFF0000, "uint32")))


def with_alibi(
    qkv: Tensor, positions: Tensor, penalty: Penalty, kv_heads: int, scale: float, extra: int
) -> Tensor:
    """qkv [n, q + 2 kv, d] -> [n, q + 2 kv, d + extra], so that q.k * scale holds slope * position
    of the key as well; at most two of the extra dimensions are used, values have zeros there.

    A rounded penalty is what bfloat16 makes of slope * position: k holds that number of its head,
    and q a one.
    """
    slopes = penalty.slopes if penalty.rounded else penalty.slopes / np.float32(scale)
    q = len(slopes)
    zero, one = tirx.const(0, "float32"), tirx.const(1, "float32")

    def compute(x: te.Tensor, at: te.Tensor, slope: te.Tensor) -> te.Tensor:
        n, heads, d = x.shape

        def query(t: tirx.Var, h: tirx.Expr, low: tirx.Expr) -> tirx.Expr:
            if penalty.rounded:
                return tirx.if_then_else(low, zero, one)
            return slope[h] * tirx.if_then_else(low, one, tirx.const(_LOW, "float32"))

        def key(t: tirx.Var, h: tirx.Expr, low: tirx.Expr) -> tirx.Expr:
            if penalty.rounded:
                product = _bfloat16(slope[h]) * _bfloat16(at[t].astype("float32"))
                return tirx.if_then_else(low, zero, _bfloat16(product))
            part = tirx.if_then_else(low, tirx.floormod(at[t], _LOW), tirx.floordiv(at[t], _LOW))
            return part.astype("float32")

        def element(t: tirx.Var, h: tirx.Var, e: tirx.Var) -> tirx.Expr:
            low = e == d + 1
            of_query = query(t, tirx.min(h, q - 1), low)
            of_key = key(t, tirx.min(tirx.max(h - q, 0), q - 1), low)
            used = tirx.all(e < d + 2, h < q + kv_heads)
            added = tirx.if_then_else(used, tirx.if_then_else(h < q, of_query, of_key), zero)
            return tirx.if_then_else(e < d, x[t, h, tirx.min(e, d - 1)], added.astype(x.dtype))

        return te.compute((n, heads, d + extra), element, name="alibi")

    table = constant(slopes.astype(np.float32))
    return op.tensor_expr_op(compute, "alibi", [qkv, positions, table])
