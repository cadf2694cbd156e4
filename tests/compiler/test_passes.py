"""Each fusing pass on the smallest module: the pattern is rewritten, near misses are left alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tvm
from fused_kernels import FusedKernels
from tvm import ir, relax, tirx
from tvm.ir import IRModule
from tvm.relax.frontend.nn import Tensor, op

from mlc_compile.compiler.passes.fuse_embedding import fuse_embedding
from mlc_compile.compiler.passes.fuse_experts import fuse_experts
from mlc_compile.compiler.passes.fuse_gated import fuse_gated
from mlc_compile.compiler.passes.fuse_linear import fuse_linear
from mlc_compile.compiler.passes.fuse_linear_gated import fuse_linear_gated
from mlc_compile.compiler.passes.fuse_linear_norm import fuse_linear_norm
from mlc_compile.compiler.passes.fuse_norm import fuse_norm
from mlc_compile.compiler.passes.fuse_qk_norm import fuse_qk_norm
from mlc_compile.compiler.passes.fuse_residual import fuse_residual
from mlc_compile.models.params import ParamSpec
from mlc_compile.quantization.linear import SchemeLayers, dequantize
from mlc_compile.quantization.policy import stored_params
from mlc_compile.quantization.scheme import SCHEMES
from mlc_compile.targets.kernels import LinearSpec, along

N, H = 5, 64
Body = Callable[..., Tensor | tuple[Tensor, ...]]
ASKED = ("linear", "expert_linear", "embedding", "rms_norm", "add_rms_norm", "qk_norm", "gated")


class Recorder(FusedKernels):
    """The cpu's kernels, and what was asked of them; `refuse` names those that it lacks."""

    def __init__(self, refuse: tuple[str, ...] = ()) -> None:
        super().__init__()
        self.asked: list[tuple[str, Any]] = []
        self.refuse = refuse

    def __getattribute__(self, name: str) -> Any:
        value = super().__getattribute__(name)
        if name not in ASKED:
            return value

        def ask(*args: Any) -> Any:
            self.asked.append((name, args))
            return None if name in self.refuse else value(*args)

        return ask


def module(body: Body, *inputs: tuple[list[Any], str]) -> IRModule:
    """One function over tensors of the given shapes and dtypes."""
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


def calls(mod: IRModule) -> list[str]:
    """Operators and kernels of main in order, without tuple plumbing."""
    names = []
    for block in mod["main"].body.blocks:
        for binding in block.bindings:
            value = binding.value
            if isinstance(value, relax.Call):
                kernel = value.op.name == "relax.call_tir"
                names.append(value.args[0].name_hint if kernel else value.op.name)
    return [name.removeprefix("relax.") for name in names]


F32 = "float32"


def test_matmul_with_a_plain_weight_and_a_bias() -> None:
    def body(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return op.add(op.matmul(x, op.permute_dims(w, [1, 0])), b)

    kernels = Recorder()
    mod = fuse_linear(module(body, ([1, H], F32), ([32, H], F32), ([32], F32)), kernels)
    assert len(calls(mod)) == 1 and calls(mod)[0].startswith("linear_32x64")
    ((_, (spec,)),) = kernels.asked
    assert (spec.in_features, spec.out_features, spec.has_bias) == (H, 32, True)
    assert (spec.scheme, spec.weight_dtype, spec.bias_dtype) == (None, F32, F32)


@pytest.mark.parametrize(
    "name", ["q4f32_1", "q3f16_1", "q4f16_0", "q8f32_pc", "q4f16_awq", "e4m3bf16_1"]
)
def test_matmul_takes_the_packed_weight(name: str) -> None:
    scheme = SCHEMES[name]
    stored = stored_params(ParamSpec("w.weight", (24, H), "linear", ()), scheme)

    def body(x: Tensor, *packed: Tensor) -> Tensor:
        weight = dequantize(packed, (24, H), scheme, scheme.layout)
        return op.matmul(x, op.permute_dims(weight, [1, 0]), out_dtype=F32)

    kernels = Recorder()
    dtype = scheme.model_dtype
    inputs = ([1, H], dtype), *((list(s.shape), s.dtype) for s in stored)
    mod = fuse_linear(module(body, *inputs), kernels)
    assert calls(mod) == ["linear_24x64_gemv"]  # nothing materialises the weight
    ((_, (spec,)),) = kernels.asked
    assert (spec.scheme, spec.rows, spec.out_dtype) == (along(scheme, H), 1, F32)
    assert [shape for _, shape, _ in spec.weight_shapes()] == [s.shape for s in stored]


def test_other_products_stay() -> None:
    def not_transposed(x: Tensor, w: Tensor) -> Tensor:
        return op.matmul(x, w)

    def residual(x: Tensor, w: Tensor, r: Tensor) -> Tensor:
        return op.add(op.matmul(x, op.permute_dims(w, [1, 0])), r)

    kernels = Recorder()
    assert calls(fuse_linear(module(not_transposed, ([1, H], F32), ([H, 8], F32)), kernels)) == [
        "matmul"
    ]
    assert not kernels.asked
    mod = module(residual, ([1, H], F32), ([32, H], F32), ([1, 32], F32))
    assert calls(fuse_linear(mod, kernels))[-1] == "add"  # a matrix is no bias


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("rows", ["n", 1])
@pytest.mark.parametrize("name", ["q0f32", "q4f16_0"])
def test_experts(name: str, rows: str | int, shared: bool) -> None:
    layer = SchemeLayers(SCHEMES[name]).experts(ParamSpec("w.weight", (6, 24, H), "expert", ()))
    n = tirx.Var(rows, "int64") if isinstance(rows, str) else rows
    parameters = [p for _, p in layer.named_parameters()]

    def body(x: Tensor, experts: Tensor, *weight: Tensor) -> Tensor:
        for parameter, value in zip(parameters, weight, strict=True):
            parameter._expr = value._expr
        return layer(x, experts)

    dtype = SCHEMES[name].model_dtype
    weights = [(list(p.shape), str(p.dtype)) for p in parameters]
    inputs = ([n if shared else n * 3, H], dtype), ([n, 3], "int32"), *weights
    kernels = Recorder()
    mod = fuse_experts(module(body, *inputs), kernels)
    assert calls(mod) == ["experts_24x64" + ("_gemv" if rows == 1 else "")]
    ((_, (spec,)),) = kernels.asked
    assert (spec.experts, spec.per_token, spec.in_features, spec.out_features) == (6, 3, H, 24)
    assert (spec.shared_x, spec.rows) == (shared, 1 if rows == 1 else None)
    assert (spec.scheme is None) == (name == "q0f32")
    assert calls(fuse_experts(module(body, *inputs), Recorder(("expert_linear",)))) == [
        "expert_linear"
    ]


def test_a_kernel_that_the_target_lacks_leaves_the_operators() -> None:
    def body(x: Tensor, w: Tensor) -> Tensor:
        return op.matmul(x, op.permute_dims(w, [1, 0]))

    before = module(body, ([1, H], F32), ([32, H], F32))
    after = fuse_linear(before, Recorder(refuse=("linear",)))
    ir.assert_structural_equal(after["main"], before["main"])


def test_embedding() -> None:
    scheme = SCHEMES["q4f16_1"]

    def body(ids: Tensor, words: Tensor, scales: Tensor) -> Tensor:
        return op.take(dequantize([words, scales], (100, H), scheme, "NK"), ids, axis=0)

    inputs = ([N], "int32"), ([100, H // 8], "uint32"), ([100, H // 32], "float16")
    assert calls(fuse_embedding(module(body, *inputs), Recorder())) == ["embedding"]

    def columns(x: Tensor, ids: Tensor) -> Tensor:
        return op.take(x, ids, axis=1)

    kept = fuse_embedding(module(columns, ([N, H], F32), ([3], "int32")), Recorder())
    assert calls(kept) == ["take"]


def test_add_joins_the_norm_and_its_sum_serves_the_next_residual() -> None:
    def body(x: Tensor, y: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        total = op.add(x, y)
        normed = op.rms_norm(total, w, axes=[-1], epsilon=1e-5)
        return normed, op.add(total, normed)

    inputs = ([N, H], F32), ([N, H], F32), ([H], F32)
    kernels = Recorder()
    assert calls(fuse_norm(module(body, *inputs), kernels)) == ["add_rms_norm", "add"]
    assert kernels.asked[0] == ("add_rms_norm", (H, 1e-5, F32, N))
    alone = fuse_norm(module(body, *inputs), Recorder(refuse=("add_rms_norm",)))
    assert calls(alone) == ["add", "rms_norm", "add"]


def test_a_broadcast_add_is_no_residual() -> None:
    def body(x: Tensor, b: Tensor, w: Tensor) -> Tensor:
        return op.rms_norm(op.add(x, b), w, axes=[-1], epsilon=1e-5)

    mod = fuse_norm(module(body, ([N, H], F32), ([H], F32), ([H], F32)), Recorder())
    assert calls(mod) == ["add", "rms_norm"]


def test_qk_norm() -> None:
    def body(qkv: Tensor, wq: Tensor, wk: Tensor) -> Tensor:
        q, k, v = op.split(qkv, [4, 6], axis=1)
        normed = [op.rms_norm(t, w, axes=[-1], epsilon=1e-6) for t, w in ((q, wq), (k, wk))]
        return op.concat([*normed, v], dim=1)

    def swapped(qkv: Tensor, wq: Tensor, wk: Tensor) -> Tensor:
        q, k, v = op.split(qkv, [4, 6], axis=1)
        normed = [op.rms_norm(t, w, axes=[-1], epsilon=1e-6) for t, w in ((k, wk), (q, wq))]
        return op.concat([*normed, v], dim=1)

    inputs = ([N, 8, 16], F32), ([16], F32), ([16], F32)
    kernels = Recorder()
    assert calls(fuse_qk_norm(module(body, *inputs), kernels)) == ["qk_norm"]
    assert kernels.asked[0][1][0] == (4, 2, 16)
    assert "concat" in calls(fuse_qk_norm(module(swapped, *inputs), Recorder()))


def test_gated() -> None:
    def body(x: Tensor) -> Tensor:
        gate, up = op.split(x, 2, axis=-1)
        return op.multiply(op.silu(gate), up)

    def other_half(x: Tensor) -> Tensor:
        gate, up = op.split(x, 2, axis=-1)
        return op.multiply(op.silu(up), gate)

    def other_function(x: Tensor) -> Tensor:
        gate, up = op.split(x, 2, axis=-1)
        return op.multiply(op.sigmoid(gate), up)

    inputs = ([N, 2 * H], F32)
    assert calls(fuse_gated(module(body, inputs), Recorder())) == ["gated"]
    for near in (other_half, other_function):
        assert "multiply" in calls(fuse_gated(module(near, inputs), Recorder()))


# Passes that widen the kernel of a one-row product


def times(x: Tensor, w: Tensor) -> Tensor:
    return op.matmul(x, op.permute_dims(w, [1, 0]))


def norm(x: Tensor, w: Tensor) -> Tensor:
    return op.rms_norm(x, w, axes=[-1], epsilon=1e-5)


def gate(x: Tensor) -> Tensor:
    first, second = op.split(x, 2, axis=-1)
    return op.multiply(op.silu(first), second)


ROW = ([1, H], F32)
SQUARE = ([H, H], F32)


def fused(body: Body, *inputs: tuple[list[Any], str], kernels: Recorder | None = None) -> IRModule:
    """The module after fuse_linear and the three passes that widen its kernels."""
    mod = module(body, *inputs)
    kernels = kernels or Recorder()
    for function in (fuse_linear, fuse_residual, fuse_linear_norm, fuse_linear_gated):
        mod = function(mod, kernels)
    return mod


def test_the_norm_of_its_input_joins_a_product() -> None:
    kernels = Recorder()
    mod = fused(
        lambda x, g, w: times(norm(x, g), w), ROW, ([H], F32), ([32, H], F32), kernels=kernels
    )
    assert calls(mod) == ["linear_32x64_gemv_norm"]
    spec = kernels.asked[-1][1][0]
    assert (spec.norm_eps, spec.residual, spec.activation) == (1e-5, False, None)


def test_a_norm_stays_for_its_other_readers_and_the_sum_before_it_stays() -> None:
    def body(x: Tensor, y: Tensor, g: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        total = op.add(x, y)
        normed = norm(total, g)
        return times(normed, w), op.silu(normed), total

    assert calls(fused(body, ROW, ROW, ([H], F32), SQUARE)) == [
        "add",
        "nn.rms_norm",
        "linear_64x64_gemv_norm",
        "nn.silu",
    ]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("first", [False, True])
def test_the_residual_joins_a_product(bias: bool, first: bool) -> None:
    def body(x: Tensor, w: Tensor, r: Tensor, b: Tensor) -> Tensor:
        product = op.add(times(x, w), b) if bias else times(x, w)
        return op.add(product, r) if first else op.add(r, product)

    kernels = Recorder()
    mod = fused(body, ROW, ([32, H], F32), ([1, 32], F32), ([32], F32), kernels=kernels)
    assert calls(mod) == ["linear_32x64_gemv_residual"]
    spec = kernels.asked[-1][1][0]
    assert (spec.residual, spec.has_bias) == (True, bias)


def test_a_second_residual_is_added_apart() -> None:
    def body(x: Tensor, w: Tensor, r: Tensor) -> Tensor:
        return op.add(op.add(r, times(x, w)), r)

    assert calls(fused(body, ROW, SQUARE, ROW)) == ["linear_64x64_gemv_residual", "add"]


def test_gate_and_up_join_their_product() -> None:
    kernels = Recorder()
    mod = fused(lambda x, w: gate(times(x, w)), ROW, ([2 * H, H], F32), kernels=kernels)
    assert calls(mod) == ["linear_128x64_gemv_gated"]
    spec = kernels.asked[-1][1][0]
    assert (spec.activation, spec.out_features, spec.out_width) == ("silu", 2 * H, H)


def test_near_misses_of_the_widening_passes() -> None:
    def per_head(x: Tensor, g: Tensor, w: Tensor) -> Tensor:
        return times(op.reshape(norm(op.reshape(x, (1, 4, H // 4)), g), (1, H)), w)

    def gated_residual(x: Tensor, w: Tensor, r: Tensor) -> Tensor:
        return op.add(r, gate(times(x, w)))

    def rounded(x: Tensor, w: Tensor, r: Tensor) -> Tensor:
        return op.add(r, op.astype(times(x, w), "float16"))

    def weight_of_another_type(x: Tensor, g: Tensor, w: Tensor) -> Tensor:
        return times(norm(x, op.astype(g, F32)), w)

    for body, inputs, wanted in (
        (per_head, (ROW, ([H // 4], F32), SQUARE), "linear_64x64_gemv"),
        (gated_residual, (ROW, ([2 * H, H], F32), ROW), "linear_128x64_gemv_gated"),
        (rounded, (ROW, SQUARE, ([1, H], "float16")), "linear_64x64_gemv"),
        (weight_of_another_type, (ROW, ([H], "float16"), SQUARE), "linear_64x64_gemv_norm"),
    ):
        assert [c for c in calls(fused(body, *inputs)) if "linear" in c] == [wanted]


def chain(x: Tensor, g: Tensor, w: Tensor, v: Tensor, b: Tensor) -> Tensor:
    """A feed-forward block with a bias."""
    inner = gate(times(norm(x, g), w))
    return op.add(x, op.add(times(inner, v), b))


CHAIN = (([H], F32), ([2 * H, H], F32), ([H, H], F32), ([H], F32))


def test_more_rows_are_left_alone() -> None:
    kernels = Recorder()
    several = ([tirx.Var("n", "int64"), H], F32)
    mod = fused(chain, several, *CHAIN, kernels=kernels)
    assert calls(mod) == [
        "nn.rms_norm",
        "linear_128x64",
        "split",
        "nn.silu",
        "multiply",
        "linear_64x64",
        "add",
    ]
    assert not any(args[0].fused for _, args in kernels.asked)


@pytest.mark.parametrize(
    "refused", [("norm_eps",), ("residual",), ("activation",), ("norm_eps", "activation")]
)
def test_what_the_target_lacks_stays_apart(refused: tuple[str, ...]) -> None:
    class Lacking(Recorder):
        def linear(self, spec: LinearSpec) -> Any:
            return None if any(getattr(spec, name) for name in refused) else super().linear(spec)

    assert calls(fused(chain, ROW, *CHAIN)) == [
        "linear_128x64_gemv_norm_gated",
        "linear_64x64_gemv_residual",
    ]
    left = calls(fused(chain, ROW, *CHAIN, kernels=Lacking()))
    apart = {"norm_eps": "nn.rms_norm", "residual": "add", "activation": "multiply"}
    assert {name for name in left if name in apart.values()} == {apart[name] for name in refused}
    linears = " ".join(name for name in left if name.startswith("linear"))
    for name, part in {
        "norm_eps": "_norm",
        "residual": "_residual",
        "activation": "_gated",
    }.items():
        assert (part in linears) == (name not in refused)


def run(mod: IRModule, arrays: list[np.ndarray]) -> np.ndarray:
    """The first result of main on the cpu."""
    built = tvm.compile(relax.transform.LegalizeOps()(mod), "llvm")
    machine = relax.VirtualMachine(built, tvm.cpu())
    return np.asarray(machine["main"](*(tvm.runtime.tensor(a) for a in arrays))[0].numpy())


@pytest.mark.parametrize("name", [None, "q4f32_1", "q3f16_1", "q4f16_0", "q8f16_1"])
def test_a_widened_product_computes_the_same(name: str | None) -> None:
    """Every argument reaches the place in the kernel that it had in the graph."""
    scheme = SCHEMES[name] if name else None
    dtype = scheme.model_dtype if scheme else F32
    rng = np.random.default_rng(1)
    inputs: list[tuple[list[int], str]] = [([1, H], dtype), ([H], dtype), ([H], dtype)]
    for n in (2 * H, H):
        if scheme is None:
            inputs.append(([n, H], dtype))
            continue
        for count, kind in ((scheme.num_words(H), "uint32"), (scheme.num_groups(H), dtype)):
            inputs.append(([n, count] if scheme.layout == "NK" else [count, n], kind))

    def body(x: Tensor, g: Tensor, b: Tensor, *weights: Tensor) -> Tensor:
        if scheme is None:
            return chain(x, g, *weights, b)
        wide = [
            dequantize(weights[2 * i : 2 * i + 2], (n, H), scheme, scheme.layout)
            for i, n in enumerate((2 * H, H))
        ]
        return chain(x, g, *wide, b)

    arrays = [
        rng.integers(0, 1 << 32, shape, np.uint32)
        if kind == "uint32"
        else (rng.standard_normal(shape) + 0.5).astype(kind)
        for shape, kind in inputs
    ]
    for i, array in enumerate(arrays[3:], start=3):  # weights or scales
        if array.dtype != np.uint32:
            arrays[i] = array * array.dtype.type(0.2 / (scheme.max_int if scheme else 1))
    widened = fused(body, *inputs)
    assert calls(widened) == ["linear_128x64_gemv_norm_gated", "linear_64x64_gemv_residual"]
    plain, found = run(module(body, *inputs), arrays), run(widened, arrays)
    scale = np.abs(plain.astype(np.float64)).max()
    bound = {"float32": 1e-5, "float16": 1e-2}[dtype] * scale
    assert np.abs(plain.astype(np.float64) - found).max() <= bound, scale
