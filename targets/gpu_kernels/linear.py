"""y = x W^T + b on a GPU, for packed and plain weights, as scheduled TIR PrimFuncs.

Notable features
- One entry, `linear_kernel(spec)`: GEMV kernels for one row (`_gemv.py`); for any number of rows
  the same with a few rows at once while there are few (batched decode), else a tiled product
  (`_gemm.py`, or `_gemm_simdgroup.py` where the device has matrix units): the host chooses at each
  call. The weight is never materialised.
- Accumulation is always float32 and no activation is rounded: the result is that of the dequantised
  weight (number - zero) * scale (targets/codes.py) in float32, up to float32 rounding of the sums.
  Matrix units round the dequantised weight of a float16 model to float16.
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
    """The kernel for `spec`, of the buffers that `spec.arguments` lists.

    gemv, gemm: instead of what `choose` of either module finds; gemm also instead of matrix units.
    None where the device lacks a dtype of `spec` (bfloat16), for fused products of more rows than
    one or of weights in layout "KN", for codes in that layout that are not symmetric, and for a
    norm where it costs more inside than apart.
    """
    dtypes = {spec.x_dtype, spec.out_dtype, spec.weight_dtype, spec.bias_dtype}
    if spec.scheme is not None:
        dtypes.add(spec.scheme.model_dtype)
    if "bfloat16" in dtypes and not device.bfloat16:
        return None
    n, k, scheme = spec.out_features, spec.in_features, spec.scheme
    if scheme is not None and scheme.layout == "KN" and scheme.codes != "symmetric":
        return None
    if spec.fused and not _can_fuse(spec):
        return None
    rows = 1 if spec.rows == 1 else symbol("n")
    arguments: list[Argument] = list(spec.arguments(rows))

    def body(*buffers: Buffer) -> None:
        named = {name: b for (name, _, _), b in zip(arguments, buffers, strict=True)}

        def operands(m: int) -> _gemv.Operands:
            return _gemv.Operands(
                x=named["x"],
                weight=[named[name] for name, _, _ in spec.weight_shapes()],
                bias=named.get("bias"),
                out=named["out"],
                n=n,
                k=k,
                n_rows=rows,
                m=m,
                norm=named.get("norm_weight"),
                norm_eps=spec.norm_eps or 0.0,
                residual=named.get("residual"),
                gated=spec.activation is not None,
            )

        def few(m: int) -> None:
            config = gemv or _gemv.choose(n, k, scheme, m, device, normed="norm_weight" in named)
            config = _gemv.fit(config, m, device, gated=spec.activation is not None)
            if scheme is not None and scheme.layout == "KN":
                _gemv.gemv_kn(operands(m), scheme, config, device)
            else:
                _gemv.gemv_nk(operands(m), scheme, config, device)

        if spec.rows == 1:
            few(1)
            return
        with T.If(rows <= i32(FEW_ROWS)):
            with T.Then():
                few(FEW_ROWS_TILE)
            with T.Else():
                matrices = None if gemm else _gemm_simdgroup.choose(operands(0), scheme, device)
                if matrices is not None:
                    _gemm_simdgroup.gemm(operands(0), scheme, matrices)
                    return
                config = gemm or _gemm.choose(n, k, scheme, device)
                _gemm.gemm(operands(0), scheme, _gemm.fit(config, scheme, device))

    return build_kernel("linear", arguments, body)


def _can_fuse(spec: LinearSpec) -> bool:
    """Whether the kernel for one row takes what is fused into `spec`, and should."""
    if spec.rows != 1 or (spec.scheme is not None and spec.scheme.layout != "NK"):
        return False
    return spec.norm_eps is None or spec.out_features * spec.in_features <= _gemv.NORMED_WEIGHT
