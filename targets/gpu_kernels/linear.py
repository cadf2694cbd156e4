"""y = x W^T + b on a GPU, for packed and plain weights, as scheduled TIR PrimFuncs.

Notable features
- One entry, `linear_kernel(spec)`: GEMV kernels for one row (`_gemv.py`); for any number of rows
  the same with a few rows at once while there are few (batched decode), else a tiled product
  (`_gemm.py`, or `_gemm_simdgroup.py` where the device has matrix units): the host chooses at each
  call. The weight is never materialised.
- Accumulation is always float32 and no activation is rounded: the result is that of the dequantised
  weight (q - M) * scale in float32, up to float32 rounding of the sums. Matrix units round the
  dequantised weight of a float16 model to float16.
- Any N and K: K is padded to whole groups as the format says, threads beyond N repeat the last row.
"""

from __future__ import annotations

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from mlc_compile.targets.gpu_kernels import _gemm, _gemm_simdgroup, _gemv
from mlc_compile.targets.gpu_kernels._emit import Argument, Buffer, build_kernel, i32, symbol
from mlc_compile.targets.gpu_kernels.device import GPUDevice
from mlc_compile.targets.kernels import LinearSpec

FEW_ROWS = 8
"""Up to here, all rows of x go through GEMV kernels."""
FEW_ROWS_TILE = 4


def linear_kernel(
    spec: LinearSpec,
    *,
    device: GPUDevice,
    gemv: _gemv.GemvConfig | None = None,
    gemm: _gemm.GemmConfig | None = None,
) -> tirx.PrimFunc | None:
    """The kernel for `spec`: (x [n, K], q_weight, q_scale | weight, [bias [N]], out [n, N]).

    gemv, gemm: instead of what `choose` of either module finds; gemm also instead of matrix units.
    None where the device lacks a dtype of `spec` (bfloat16).
    """
    dtypes = {spec.x_dtype, spec.out_dtype, spec.weight_dtype, spec.bias_dtype}
    if spec.scheme is not None:
        dtypes.add(spec.scheme.model_dtype)
    if "bfloat16" in dtypes and not device.bfloat16:
        return None
    n, k, scheme = spec.out_features, spec.in_features, spec.scheme
    rows = 1 if spec.rows == 1 else symbol("n")
    arguments: list[Argument] = [("x", (rows, k), spec.x_dtype), *spec.weight_shapes()]
    if spec.has_bias:
        arguments.append(("bias", (n,), spec.bias_dtype or spec.x_dtype))
    arguments.append(("out", (rows, n), spec.out_dtype))

    def body(x: Buffer, *others: Buffer) -> None:
        *weight, out = others
        bias = weight.pop() if spec.has_bias else None

        def few(m: int) -> None:
            operands = _gemv.Operands(x, weight, bias, out, n, k, rows, m)
            config = _gemv.fit(gemv or _gemv.choose(n, k, scheme, m, device), m, device)
            if scheme is not None and scheme.layout == "KN":
                _gemv.gemv_kn(operands, scheme, config)
            else:
                _gemv.gemv_nk(operands, scheme, config, device)

        if spec.rows == 1:
            few(1)
            return
        with T.If(rows <= i32(FEW_ROWS)):
            with T.Then():
                few(FEW_ROWS_TILE)
            with T.Else():
                operands = _gemv.Operands(x, weight, bias, out, n, k, rows, 0)
                matrices = None if gemm else _gemm_simdgroup.choose(operands, scheme, device)
                if matrices is not None:
                    _gemm_simdgroup.gemm(operands, scheme, matrices)
                    return
                config = gemm or _gemm.choose(n, k, scheme, device)
                _gemm.gemm(operands, scheme, _gemm.fit(config, scheme, device))

    return build_kernel("linear", arguments, body)
