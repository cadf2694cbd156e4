"""Routing, the sum over experts, and a whole sparse block against numpy, generic route and
kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tvm
from tvm import relax
from tvm.ir import IRModule
from tvm.relax.frontend import nn
from tvm.relax.frontend.nn import Tensor, op

from mlc_compile.compiler.passes.fuse_experts import fuse_experts
from mlc_compile.models.params import ParamSpec
from mlc_compile.nn.moe import Score, SparseMLP, route
from mlc_compile.quantization.codec import decode, encode
from mlc_compile.quantization.linear import SchemeLayers
from mlc_compile.quantization.scheme import SCHEMES, numpy_dtype
from mlc_compile.targets.profile import get_target

Array = np.ndarray[Any, Any]
Body = Callable[..., Tensor | tuple[Tensor, ...]]
E, K, H, INNER, SHARED = 6, 3, 48, 40, 24
SCORES: tuple[Score, ...] = ("softmax", "sigmoid")


def module(body: Body, *inputs: tuple[list[Any], str]) -> IRModule:
    """One function `main` over tensors of the given shapes and dtypes."""
    builder = relax.BlockBuilder()
    args = [
        relax.Var(f"x{i}", relax.TensorType(shape, dtype))
        for i, (shape, dtype) in enumerate(inputs)
    ]
    with builder.function("main", args):
        with builder.dataflow():
            result = body(*(Tensor(_expr=arg) for arg in args))
            parts = result if isinstance(result, tuple) else (result,)
            out = builder.emit_output(relax.Tuple([part._expr for part in parts]))
        builder.emit_func_output(out)
    return builder.get()


def compiled(mod: IRModule) -> Callable[..., list[Array]]:
    target = get_target("cpu")[0].backend().tvm_target(None, ".so")
    machine = relax.VirtualMachine(relax.build(mod, target), tvm.cpu())

    def run(*arrays: Array) -> list[Array]:
        return [t.numpy() for t in machine["main"](*map(tvm.runtime.tensor, arrays))]

    return run


def expected_routes(
    logits: Array, k: int, score: Score, renormalize: bool, scale: float
) -> tuple[Array, Array]:
    wide = logits.astype(np.float64)
    if score == "softmax":
        probabilities = np.exp(wide - wide.max(axis=1, keepdims=True))
        probabilities /= probabilities.sum(axis=1, keepdims=True)
    else:
        probabilities = 1 / (1 + np.exp(-wide))
    experts = np.argsort(-logits, axis=1, kind="stable")[:, :k]
    weights = np.take_along_axis(probabilities, experts, axis=1)
    if renormalize:
        weights = weights / weights.sum(axis=1, keepdims=True)
    return weights * scale, experts


@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("n", ["n", 1])
def test_route(n: str | int, score: Score, renormalize: bool) -> None:
    rows = tvm.tirx.Var(n, "int64") if isinstance(n, str) else n
    run = compiled(
        module(
            lambda x: route(x, K, score=score, renormalize=renormalize, scale=1.5),
            ([rows, E], "float32"),
        )
    )
    rng = np.random.default_rng(0)
    for count in (1,) if n == 1 else (1, 7, 64):
        logits = (4 * rng.standard_normal((count, E))).astype(np.float32)
        logits[0, 2:5] = logits[0].max() + 1  # ties: the lower index first
        weights, experts = run(logits)
        wanted, chosen = expected_routes(logits, K, score, renormalize, 1.5)
        np.testing.assert_array_equal(experts, chosen)
        np.testing.assert_allclose(weights, wanted, rtol=2e-6)


def test_nan_gives_experts_that_exist() -> None:
    run = compiled(
        module(
            lambda x: route(x, K, score="softmax", renormalize=True, scale=1.0),
            ([2, E], "float32"),
        )
    )
    logits = np.full((2, E), np.nan, np.float32)
    logits[1, 1:] = np.inf
    _, experts = run(logits)
    assert experts.min() >= 0 and experts.max() < E


class Block(nn.Module):
    """A sparse block of a scheme, named as in a model."""

    def __init__(self, scheme: str, shared: str | None, score: Score, renormalize: bool) -> None:
        factory = SchemeLayers(SCHEMES[scheme])

        def linear(name: str, n: int, k: int, role: Any = "linear") -> nn.Module:
            spec = ParamSpec(f"mlp.{name}.weight", (n, k), role, ())
            out = "float32" if role == "router" else None
            return factory.linear(spec, bias=False, out_dtype=out)

        def experts(name: str, n: int, k: int) -> nn.Module:
            return factory.experts(ParamSpec(f"mlp.experts.{name}.weight", (E, n, k), "expert", ()))

        self.mlp = SparseMLP(
            linear("gate", E, H, "router"),
            experts("gate_up_proj", 2 * INNER, H),
            experts("down_proj", H, INNER),
            op.silu,
            k=K,
            score=score,
            renormalize=renormalize,
            scale=2.0,
            shared_expert=Shared(linear) if shared else None,
            shared_expert_gate=linear("shared_expert_gate", 1, H, "router")
            if shared == "gated"
            else None,
        )


class Shared(nn.Module):
    def __init__(self, linear: Callable[[str, int, int], nn.Module]) -> None:
        self.gate_up_proj = linear("shared_expert.gate_up_proj", 2 * SHARED, H)
        self.down_proj = linear("shared_expert.down_proj", H, SHARED)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = op.split(self.gate_up_proj(x), 2, axis=-1)
        return self.down_proj(op.multiply(op.silu(gate), up))


def silu(x: Array) -> Array:
    return x / (1 + np.exp(-x))


def gated(gate_up: Array) -> Array:
    gate, up = np.split(gate_up, 2, axis=-1)
    return silu(gate) * up


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(
    ("scheme", "shared", "score", "renormalize"),
    [
        ("q4f32_1", "gated", "softmax", False),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ("q0f32", None, "softmax", True),
                ("q8f32_1", "plain", "sigmoid", True),
                ("q3f16_1", "gated", "softmax", True),
                ("q4f16_0", None, "sigmoid", False),
                ("q0f16", "plain", "softmax", True),
            )
        ),
    ],
)
def test_block(
    scheme: str, shared: str | None, score: Score, renormalize: bool, fused: bool
) -> None:
    block = Block(scheme, shared, score, renormalize)
    described = SCHEMES[scheme]
    dtype = described.model_dtype
    parameters = list(block.named_parameters())
    rng = np.random.default_rng(1)
    weights: dict[str, Array] = {}
    stored: dict[str, Array] = {}
    for name, shape in {
        "gate": (E, H),
        "experts.gate_up_proj": (E, 2 * INNER, H),
        "experts.down_proj": (E, H, INNER),
        "shared_expert.gate_up_proj": (2 * SHARED, H),
        "shared_expert.down_proj": (H, SHARED),
        "shared_expert_gate": (1, H),
    }.items():
        weight = (rng.standard_normal(shape) / shape[-1] ** 0.5).astype(np.float32)
        if f"mlp.{name}.q_weight" in dict(parameters):
            layout: Any = "NK" if "expert" in name.split(".")[0] and len(shape) == 3 else None
            rows = weight.reshape(-1, shape[-1])
            words, scales = encode(rows, described, layout=layout)
            wide = decode((words, scales), described, shape[-1], layout=layout)
            weights[name] = wide.astype(np.float64).reshape(shape)
            if len(shape) == 3:
                words, scales = (a.reshape(*shape[:2], -1) for a in (words, scales))
            stored |= {f"mlp.{name}.q_weight": words, f"mlp.{name}.q_scale": scales}
        else:
            stored[f"mlp.{name}.weight"] = weight.astype(numpy_dtype(dtype))
            weights[name] = stored[f"mlp.{name}.weight"].astype(np.float64)
    assert all(stored[name].shape == tuple(map(int, p.shape)) for name, p in parameters)

    backend = get_target("cpu")[0].backend()
    target = backend.tvm_target(None, ".so")
    for extent, counts in ((tvm.tirx.Var("n", "int64"), (1, 2, 7, 64)), (1, (1,))):

        def body(x: Tensor, *values: Tensor) -> Tensor:
            for (_, parameter), value in zip(parameters, values, strict=True):
                parameter._expr = value._expr
            return block.mlp(x)

        types = [(list(p.shape), str(p.dtype)) for _, p in parameters]
        mod = module(body, ([extent, H], dtype), *types)
        if fused:
            mod = fuse_experts(mod, backend.kernels(target))
            text = mod["main"].script()
            assert "expert_linear" not in text and text.count("experts_") == 2
        run = compiled(mod)
        for count in counts:
            x = rng.standard_normal((count, H)).astype(numpy_dtype(dtype))
            (got,) = run(x, *(stored[name] for name, _ in parameters))
            wanted = expected_block(x.astype(np.float64), weights, shared, score, renormalize)
            error = np.abs(got.astype(np.float64) - wanted).max() / np.abs(wanted).max()
            assert error < (2e-6 if dtype == "float32" else 4e-3), error


def expected_block(
    x: Array, weights: dict[str, Array], shared: str | None, score: Score, renormalize: bool
) -> Array:
    logits = (x @ weights["gate"].T).astype(np.float32)
    scores, chosen = expected_routes(logits, K, score, renormalize, 2.0)
    out = np.zeros_like(x)
    for token, (row, experts) in enumerate(zip(x, chosen, strict=True)):
        for weight, e in zip(scores[token], experts, strict=True):
            inner = gated(weights["experts.gate_up_proj"][e] @ row)
            out[token] += weight * (weights["experts.down_proj"][e] @ inner)
    if shared:
        y = gated(x @ weights["shared_expert.gate_up_proj"].T)
        y = y @ weights["shared_expert.down_proj"].T
        if shared == "gated":
            y /= 1 + np.exp(-x @ weights["shared_expert_gate"].T)
        out += y
    return out
