"""y = x W^T + b on the CPU, for packed and plain weights, as TIR PrimFuncs.

Notable features
- One entry, `linear_kernel(spec)`: GEMV kernels for one row (`_gemv.py`), a tiled GEMM for any
  number of rows (`_gemm.py`). Both unpack words on the fly; the weight is never materialised.
- Accumulation is always float32 and no activation is rounded: the result is that of the dequantised
  weight (q - M) * scale in float32, up to float32 rounding of the sums.
- Any N and K: K is padded to whole groups as the format says, a last block of columns overlaps the
  one before.
- A GEMV kernel opens one parallel region, the GEMM kernel two (packing x, then the tiles); packing
  a few rows stays on the calling thread.
"""

from __future__ import annotations

from dataclasses import dataclass

from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T

from mlc_compile.quantization.scheme import QuantScheme
from mlc_compile.targets.cpu_kernels import _gemv
from mlc_compile.targets.cpu_kernels import _vector as vec
from mlc_compile.targets.cpu_kernels._gemm import gemm

FLOATS = ("float32", "float16", "bfloat16")


@dataclass(frozen=True)
class LinearSpec:
    """One matmul shape.

    in_features (K), out_features (N): of the weight as the model sees it, without padding.
    scheme: how the weight is packed, None for a plain [N, K] weight. `scheme.layout` is that of
        this weight: `dataclasses.replace(scheme, layout="NK")` for a tied embedding of a "KN" one.
    weight_dtype: of a plain weight; packed weights are uint32, scales `scheme.model_dtype`.
    bias_dtype: dtype of the bias when `has_bias`; x_dtype when None.
    rows: 1 for the GEMV kernel, None for any number n >= 1 of rows (a symbolic int64).
    """

    in_features: int
    out_features: int
    scheme: QuantScheme | None
    x_dtype: str
    out_dtype: str
    has_bias: bool = False
    rows: int | None = None
    weight_dtype: str | None = None
    bias_dtype: str | None = None

    def __post_init__(self) -> None:
        if (self.scheme is None) == (self.weight_dtype is None):
            raise ValueError("give either a scheme or a weight_dtype")
        if self.scheme is not None and self.scheme.is_plain:
            raise ValueError(f"{self.scheme.name} packs nothing: give weight_dtype instead")
        if self.rows not in (1, None):
            raise ValueError(f"rows must be 1 or None, not {self.rows}")
        for dtype in (self.x_dtype, self.out_dtype, self.weight_dtype, self.bias_dtype):
            if dtype is not None and dtype not in FLOATS:
                raise ValueError(f"{dtype} is not one of {', '.join(FLOATS)}")

    def weight_shapes(self) -> list[tuple[str, tuple[int, int], str]]:
        """Name, shape and dtype of the weight's buffers, in argument order (MLC's format)."""
        n, k = self.out_features, self.in_features
        if self.scheme is None:
            assert self.weight_dtype is not None
            return [("weight", (n, k), self.weight_dtype)]
        words, groups = (n, self.scheme.num_words(k)), (n, self.scheme.num_groups(k))
        if self.scheme.layout == "KN":
            words, groups = (words[1], n), (groups[1], n)
        return [
            ("q_weight", words, self.scheme.storage_dtype),
            ("q_scale", groups, self.scheme.model_dtype),
        ]


def linear_kernel(spec: LinearSpec, *, vector_bits: int, num_cores: int) -> tirx.PrimFunc:
    """The kernel for `spec`: (x [n, K], q_weight, q_scale | weight, [bias [N]], out [n, N]).

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
            q_weight, q_scale = weight
            _gemv.packed_nk(
                x, q_weight, q_scale, bias, out, shape=shape, scheme=scheme, lanes=lanes
            )
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
