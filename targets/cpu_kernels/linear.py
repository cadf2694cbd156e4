"""y = x W^T + b on the CPU, for packed and plain weights, as TIR PrimFuncs.

Notable features
- One entry, `linear_kernel(spec)`: GEMV kernels for one row (`_gemv.py`), a tiled GEMM for any
  number of rows (`_gemm.py`). Both unpack words on the fly; the weight is never materialised.
- Accumulation is always float32 and no activation is rounded: the result is that of the dequantised
  weight (number - zero) * scale (targets/codes.py) in float32, up to float32 rounding of the sums.
- Any N and K: K is padded to whole groups as the format says, a last block of columns overlaps the
  one before.
- A GEMV kernel opens one parallel region, the GEMM kernel two (packing x, then the tiles); packing
  a few rows stays on the calling thread.
"""

from __future__ import annotations

from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T

from mlc_compile.targets.cpu_kernels import _gemv
from mlc_compile.targets.cpu_kernels import _vector as vec
from mlc_compile.targets.cpu_kernels._gemm import gemm
from mlc_compile.targets.kernels import LinearSpec


def linear_kernel(spec: LinearSpec, *, vector_bits: int, num_cores: int) -> tirx.PrimFunc:
    """The kernel for `spec`: (x [n, K], weight's buffers, [bias [N]], out [n, N]).

    vector_bits: widest vector registers of the target (512, 256 or 128).
    num_cores: threads that will share the work.
    """
    n, k = spec.out_features, spec.in_features
    lanes = max(vector_bits // 32, 1)
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("linear")
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True})
        rows = vec.i64(1) if spec.rows == 1 else T.int64()
        x = vec.argument("x", (rows, k), spec.x_dtype)
        weight = tuple(vec.argument(*entry) for entry in spec.weight_shapes())
        bias = None
        if spec.has_bias:
            bias = vec.argument("bias", (n,), spec.bias_dtype or spec.x_dtype)
        out = vec.argument("out", (rows, n), spec.out_dtype)

        scheme, shape = spec.scheme, (n, k)
        if spec.rows is None:
            gemm(
                x,
                weight,
                bias,
                out,
                n_rows=rows,
                shape=shape,
                scheme=scheme,
                vector_bits=vector_bits,
                num_cores=num_cores,
            )
        elif scheme is None:
            _gemv.plain_nk(x, weight[0], bias, out, shape=shape, lanes=lanes)
        elif scheme.layout == "NK":
            _gemv.packed_nk(x, weight, bias, out, shape=shape, scheme=scheme, lanes=lanes)
        else:
            q_weight, q_scale = weight
            _gemv.packed_kn(
                x,
                q_weight,
                q_scale,
                bias,
                out,
                shape=shape,
                scheme=scheme,
                lanes=lanes,
                num_cores=num_cores,
            )
    return builder.get()
