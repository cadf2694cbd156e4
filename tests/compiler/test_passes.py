"""Each fusing pass on the smallest module: the pattern is rewritten, near misses are left alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from tvm import ir, relax
from tvm.ir import IRModule
from tvm.relax.frontend.nn import Tensor, op

from mlc_compile.compiler.passes.fuse_embedding import fuse_embedding
from mlc_compile.compiler.passes.fuse_gated import fuse_gated
from mlc_compile.compiler.passes.fuse_linear import fuse_linear
from mlc_compile.compiler.passes.fuse_norm import fuse_norm
from mlc_compile.compiler.passes.fuse_qk_norm import fuse_qk_norm
from mlc_compile.quantization.linear import dequantize
from mlc_compile.quantization.scheme import SCHEMES
from mlc_compile.targets.cpu import CPUKernels

N, H = 5, 64
Body = Callable[..., Tensor | tuple[Tensor, ...]]


class Recorder(CPUKernels):
    """The cpu's kernels, and what was asked of them; `refuse` names those that it lacks."""

    def __init__(self, refuse: tuple[str, ...] = ()) -> None:
        super().__init__(256)
        self.asked: list[tuple[str, Any]] = []
        self.refuse = refuse

    def __getattribute__(self, name: str) -> Any:
        value = super().__getattribute__(name)
        if name not in ("linear", "embedding", "rms_norm", "add_rms_norm", "qk_norm", "gated"):
            return value

        def ask(*args: Any) -> Any:
            self.asked.append((name, args))
            return None if name in self.refuse else value(*args)

        return ask


def module(body: Body, *inputs: tuple[list[int], str]) -> IRModule:
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


@pytest.mark.parametrize("name", ["q4f32_1", "q3f16_1", "q4f16_0"])
def test_matmul_takes_the_packed_weight(name: str) -> None:
    scheme = SCHEMES[name]
    shape = (24, scheme.num_words(H)), (24, scheme.num_groups(H))
    if scheme.layout == "KN":
        shape = shape[0][::-1], shape[1][::-1]

    def body(x: Tensor, words: Tensor, scales: Tensor) -> Tensor:
        weight = dequantize(words, scales, (24, H), scheme, scheme.layout)
        return op.matmul(x, op.permute_dims(weight, [1, 0]), out_dtype=F32)

    kernels = Recorder()
    dtype = scheme.model_dtype
    inputs = ([1, H], dtype), (list(shape[0]), "uint32"), (list(shape[1]), dtype)
    mod = fuse_linear(module(body, *inputs), kernels)
    assert calls(mod) == ["linear_24x64_gemv"]  # nothing materialises the weight
    ((_, (spec,)),) = kernels.asked
    assert (spec.scheme, spec.rows, spec.out_dtype) == (scheme, 1, F32)


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


def test_a_kernel_that_the_target_lacks_leaves_the_operators() -> None:
    def body(x: Tensor, w: Tensor) -> Tensor:
        return op.matmul(x, op.permute_dims(w, [1, 0]))

    before = module(body, ([1, H], F32), ([32, H], F32))
    after = fuse_linear(before, Recorder(refuse=("linear",)))
    ir.assert_structural_equal(after["main"], before["main"])


def test_embedding() -> None:
    scheme = SCHEMES["q4f16_1"]

    def body(ids: Tensor, words: Tensor, scales: Tensor) -> Tensor:
        return op.take(dequantize(words, scales, (100, H), scheme, "NK"), ids, axis=0)

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
