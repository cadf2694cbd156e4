"""Kernels for fused products on the cpu, slow and plain, so that the passes that ask for them can
be run there. The cpu target itself has none."""

from __future__ import annotations

from typing import Any

from tvm import te, tirx

from mlc_compile.targets.cpu import CPUKernels
from mlc_compile.targets.kernels import LinearSpec

WITHOUT_KERNELS = {
    "fuse_residual": "_residual",
    "fuse_linear_norm": "_norm",
    "fuse_linear_gated": "_gated",
}
"""The switches that do nothing on the cpu, and what their kernels have in their names."""

own_linear = CPUKernels.linear


def fused_linear(spec: LinearSpec) -> tirx.PrimFunc:
    """The kernel of any spec with one row, written as the formula stands in LinearSpec."""
    names = [name for name, _, _ in spec.arguments(1)]
    tensors = {
        name: te.placeholder([tirx.IntImm("int64", extent) for extent in shape], dtype, name=name)
        for name, shape, dtype in spec.arguments(1)[:-1]
    }
    scheme, k_size = spec.scheme, spec.in_features

    def f32(value: Any) -> Any:
        return value.astype("float32")

    def axis(size: int) -> Any:
        return te.reduce_axis((tirx.IntImm("int64", 0), tirx.IntImm("int64", size)))

    def wide(*extents: int) -> list[Any]:
        return [tirx.IntImm("int64", e) for e in extents]

    def weight(row: Any, k: Any) -> Any:
        if scheme is None:
            return f32(tensors["weight"][row, k])
        word, group = k // scheme.elems_per_word, k // scheme.group_size
        nk = scheme.layout == "NK"
        packed = tensors["q_weight"][(row, word) if nk else (word, row)]
        scale = tensors["q_scale"][(row, group) if nk else (group, row)]
        shift = (k % scheme.elems_per_word * scheme.bits).astype("uint32")
        mask = tirx.const((1 << scheme.bits) - 1, "uint32")
        field = tirx.bitwise_and(tirx.shift_right(packed, shift), mask)
        return (field.astype("float32") - tirx.const(scheme.max_int, "float32")) * f32(scale)

    x = tensors["x"]
    row = te.compute(wide(1, k_size), lambda i, k: f32(x[i, k]), "row")
    if spec.norm_eps is not None:
        j = axis(k_size)
        squares = te.compute(wide(1), lambda i: te.sum(f32(x[i, j]) * f32(x[i, j]), axis=j), "sq")
        k, eps = (tirx.const(value, "float32") for value in (k_size, spec.norm_eps))
        row = te.compute(
            wide(1, k_size),
            lambda i, j: (
                f32(x[i, j]) * tirx.rsqrt(squares[i] / k + eps) * f32(tensors["norm_weight"][j])
            ),
            "normed",
        )
    j = axis(k_size)
    product = te.compute(
        wide(1, spec.out_features),
        lambda i, n: te.sum(row[i, j] * weight(n, j), axis=j),
        "product",
    )

    def biased(i: Any, n: Any) -> Any:
        return product[i, n] + f32(tensors["bias"][n]) if spec.has_bias else product[i, n]

    def element(i: Any, n: Any) -> Any:
        value = biased(i, n)
        if spec.activation is not None:
            value = value * tirx.sigmoid(value) * biased(i, n + spec.out_width)
        if spec.residual:
            value = value + f32(tensors["residual"][i, n])
        return value.astype(spec.out_dtype)

    out = te.compute(wide(1, spec.out_width), element, "out")
    return te.create_prim_func([*(tensors[name] for name in names[:-1]), out])


class FusedKernels(CPUKernels):
    """The cpu's kernels and, for one row, every fused product."""

    def __init__(self, vector_bits: int = 256) -> None:
        super().__init__(vector_bits)

    def linear(self, spec: LinearSpec) -> tirx.PrimFunc | None:
        if spec.fused:
            return fused_linear(spec) if spec.rows == 1 else None
        return own_linear(self, spec)
