"""Sparse experts, the one module of `models.options.SparseMLP`.

A router scores all experts for each token; the token goes through the k best, and their outputs are
summed by weight (Shazeer et al., "Outrageously Large Neural Networks", 2017). With n tokens and k
experts each, a pair p is token p // k and its slot p % k; what an expert sees and gives has a row
for each pair.

Nothing here waits for the host or depends on how tokens spread over experts: all shapes are
multiples of n.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from tvm import te, tirx
from tvm.relax.frontend import nn
from tvm.relax.frontend.nn import Tensor, op

Score = Literal["softmax", "sigmoid"]


def route(
    logits: Tensor, k: int, *, score: Score, renormalize: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """(weights float32 [n, k], experts int32 [n, k]) of the router's logits, float32 [n, experts].

    The k largest, in falling order, of equal ones the lower index first. A weight is the expert's
    probability (`score` over all experts), divided by the sum of the chosen ones where
    `renormalize` (softmax: the same as a softmax of the chosen logits alone), times `scale`.

    Each step is one loop nest for every target's generic rules: an expert's rank is the number of
    those before it, which sorts without any dependence between threads. NaN gives some experts that
    exist.
    """
    n, count = logits.shape[0], int(logits.shape[1])

    def ranks(x: te.Tensor) -> te.Tensor:
        other = te.reduce_axis((0, count), "other")

        def rank(i: tirx.Var, e: tirx.Var) -> tirx.Expr:
            a, b = x[i, other], x[i, e]
            before = tirx.any(a > b, tirx.all(a == b, other < e))
            return te.sum(before.astype("int32"), axis=other)

        return te.compute((n, count), rank, name="ranks")

    def best(rank: te.Tensor) -> te.Tensor:
        e = te.reduce_axis((0, count), "e")
        zero = tirx.const(0, "int32")
        # te.max starts from the least int32, which is no literal of WGSL
        largest = te.comm_reducer(lambda a, b: tirx.max(a, b), lambda dtype: tirx.const(0, dtype))

        def expert(i: tirx.Var, j: tirx.Var) -> tirx.Expr:
            found = tirx.Select(rank[i, e] == j.astype("int32"), e.astype("int32"), zero)
            return largest(found, axis=e)

        return te.compute((n, k), expert, name="best")

    def term(x: te.Tensor, experts: te.Tensor, i: tirx.Var, e: tirx.Expr) -> tirx.Expr:
        """The probability of expert e, up to softmax's divisor."""
        if score == "sigmoid":
            return tirx.sigmoid(x[i, e])
        return tirx.exp(x[i, e] - x[i, experts[i, 0]])

    def totals(x: te.Tensor, experts: te.Tensor) -> te.Tensor:
        over = te.reduce_axis((0, k if renormalize else count), "over")

        def total(i: tirx.Var) -> tirx.Expr:
            e = experts[i, over] if renormalize else over
            return te.sum(term(x, experts, i, e), axis=over)

        return te.compute((n,), total, name="totals")

    def weigh(x: te.Tensor, experts: te.Tensor, *total: te.Tensor) -> te.Tensor:
        def weight(i: tirx.Var, j: tirx.Var) -> tirx.Expr:
            value = term(x, experts, i, experts[i, j])
            for divisor in total:
                value = value / divisor[i]
            return value * tirx.const(scale, "float32")

        return te.compute((n, k), weight, name="weights")

    experts = op.tensor_expr_op(best, "best", [op.tensor_expr_op(ranks, "ranks", [logits])])
    divided = renormalize or score == "softmax"
    divisor = [op.tensor_expr_op(totals, "totals", [logits, experts])] if divided else []
    return op.tensor_expr_op(weigh, "weights", [logits, experts, *divisor]), experts


def combine(weights: Tensor, y: Tensor, shared: Tensor | None, gate: Tensor | None) -> Tensor:
    """sum over j of weights[:, j] * y[pair of j], + sigmoid(gate) * shared: in float32, rounded
    once.

    weights: float32 [n, k], y: [n * k, hidden], shared: [n, hidden], gate: float32 [n, 1], without
    which `shared` is added as it is -> [n, hidden].
    """
    n, k = weights.shape[0], int(weights.shape[1])

    def compute(weights: te.Tensor, y: te.Tensor, *others: te.Tensor) -> te.Tensor:
        def value(i: tirx.Var, h: tirx.Var) -> tirx.Expr:
            # k terms and no reduction: one loop over h that LLVM makes vectors of
            terms = [weights[i, j] * y[i * k + j, h].astype("float32") for j in range(k)]
            if others:
                term = others[0][i, h].astype("float32")
                terms += [tirx.sigmoid(others[1][i, 0]) * term if len(others) == 2 else term]
            total = terms[0]
            for term in terms[1:]:
                total = total + term
            return total.astype(y.dtype)

        return te.compute((n, y.shape[1]), value, name="combine")

    found = [x for x in (weights, y, shared, gate) if x is not None]
    return op.tensor_expr_op(compute, "combine", found)


class ExpertPair(nn.Module):
    """The two projections of all experts, under the name `experts`."""

    def __init__(self, gate_up_proj: nn.Module, down_proj: nn.Module) -> None:
        self.gate_up_proj = gate_up_proj
        self.down_proj = down_proj


class SparseMLP(nn.Module):
    """sum over the chosen experts of weight * down(act(gate(x)) * up(x)), plus a shared expert.

    gate: the router, [n, hidden] -> float32 logits [n, experts].
    gate_up_proj, down_proj: `Experts`; gate and up are one weight.
    activation: of the gate.
    k: experts of a token.
    score, renormalize, scale: see `route`.
    shared_expert: a gated MLP that every token takes, if there is one.
    shared_expert_gate: [n, hidden] -> float32 [n, 1], whose sigmoid multiplies it, if there is one.
    """

    def __init__(
        self,
        gate: nn.Module,
        gate_up_proj: nn.Module,
        down_proj: nn.Module,
        activation: Callable[[Tensor], Tensor],
        *,
        k: int,
        score: Score,
        renormalize: bool,
        scale: float = 1.0,
        shared_expert: nn.Module | None = None,
        shared_expert_gate: nn.Module | None = None,
    ) -> None:
        self.gate = gate
        self.experts = ExpertPair(gate_up_proj, down_proj)
        self.activation = activation
        self.k, self.score, self.renormalize, self.scale = k, score, renormalize, scale
        self.shared_expert = shared_expert
        self.shared_expert_gate = shared_expert_gate

    def forward(self, x: Tensor) -> Tensor:
        """x: [n, hidden] -> [n, hidden]."""
        weights, chosen = route(
            self.gate(x), self.k, score=self.score, renormalize=self.renormalize, scale=self.scale
        )
        gate, up = op.split(self.experts.gate_up_proj(x, chosen), 2, axis=-1)  # [n * k, inner]
        y = self.experts.down_proj(op.multiply(self.activation(gate), up), chosen)
        shared = None if self.shared_expert is None else self.shared_expert(x)
        shared_gate = None if self.shared_expert_gate is None else self.shared_expert_gate(x)
        return combine(weights, y, shared, shared_gate)
