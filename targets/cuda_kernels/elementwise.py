"""Norms and gated activations of `[n, width]` rows: what calls cuh/elementwise.cuh.

Arguments are those of the portable kernels (gpu_kernels/elementwise.py); every dtype is served, but
bfloat16 only where all devices have it. Where every device has dependent launches, a kernel may
begin before the one before has ended.
"""

from __future__ import annotations

from tvm import tirx

from mlc_compile.targets.cuda_kernels._arch import CudaArchs
from mlc_compile.targets.cuda_kernels._launch import device_call
from mlc_compile.targets.gpu_kernels._emit import (
    Argument,
    Buffer,
    Expr,
    build_kernel,
    f32,
    groups,
    i32,
    symbol,
)

TYPES = {"float32": "float", "float16": "half", "bfloat16": "nv_bfloat16"}
ACTIVATIONS = {
    "silu": "Silu",
    "gelu": "Gelu",
    "gelu_tanh": "GeluTanh",
    "gelu_pytorch_tanh": "GeluTanh",
    "relu": "Relu",
}
BFLOAT16 = 80
"""The first architecture with it: for older ones TVM passes it as uint16."""
THREADS = 256
HELD = 4
"""Vectors that a thread of a norm keeps: more would want more registers than its speed is worth."""
MOST_THREADS = 1024


def rms_norm(
    hidden: int, dtype: str, eps: float, rows: int | None = None, *, archs: CudaArchs
) -> tirx.PrimFunc | None:
    """(x[n, hidden], weight[hidden]) -> out[n, hidden] = x / sqrt(mean(x^2) + eps) * weight."""
    threads = _norm_threads(hidden, dtype, rows)
    if threads is None or not _serves(dtype, archs):
        return None
    n = _rows(rows)

    def body(x: Buffer, weight: Buffer, out: Buffer) -> None:
        function = _function("rms_norm", archs, TYPES[dtype], hidden, threads)
        operands = [x, weight, out, f32(eps)]
        device_call("elementwise.cuh", function, operands, threads=threads, grid=[n])

    x: Argument = ("x", (n, hidden), dtype)
    return build_kernel("rms_norm", [x, ("weight", (hidden,), dtype), ("out", *x[1:])], body)


def add_rms_norm(
    hidden: int, dtype: str, eps: float, rows: int | None = None, *, archs: CudaArchs
) -> tirx.PrimFunc | None:
    """(x[n, hidden], residual[n, hidden], weight[hidden]) -> (normed, total), both [n, hidden].

    total = x + residual rounded to `dtype`; normed = rms_norm(total), from the rounded values.
    """
    threads = _norm_threads(hidden, dtype, rows)
    if threads is None or not _serves(dtype, archs):
        return None
    n = _rows(rows)

    def body(x: Buffer, residual: Buffer, weight: Buffer, normed: Buffer, total: Buffer) -> None:
        function = _function("add_rms_norm", archs, TYPES[dtype], hidden, threads)
        operands = [x, residual, weight, normed, total, f32(eps)]
        device_call("elementwise.cuh", function, operands, threads=threads, grid=[n])

    shape = ((n, hidden), dtype)
    arguments: list[Argument] = [("x", *shape), ("residual", *shape), ("weight", (hidden,), dtype)]
    return build_kernel("add_rms_norm", [*arguments, ("normed", *shape), ("total", *shape)], body)


def qk_norm(
    num_query_heads: int,
    num_key_value_heads: int,
    head_dim: int,
    dtype: str,
    eps: float,
    rows: int | None = None,
    *,
    archs: CudaArchs,
) -> tirx.PrimFunc | None:
    """(x[n, hq + 2 hkv, d], q_weight[d], k_weight[d]) -> out, shaped as x.

    rms_norm over d of the first hq heads with q_weight and of the next hkv with k_weight; the
    value heads are copied.
    """
    if not _serves(dtype, archs) or head_dim // _vector(dtype, head_dim) > 32 * HELD:
        return None
    n, threads = _rows(rows), THREADS // 2
    heads = num_query_heads + 2 * num_key_value_heads
    vectors = head_dim // _vector(dtype, head_dim)
    lanes = next(lanes for lanes in (4, 8, 16, 32) if lanes >= min(vectors, 32))

    def body(x: Buffer, q_weight: Buffer, k_weight: Buffer, out: Buffer) -> None:
        numbers = (head_dim, num_query_heads, num_key_value_heads, threads)
        count = i32(n * heads) if isinstance(n, int) else n * heads
        device_call(
            "elementwise.cuh",
            _function("qk_norm", archs, TYPES[dtype], *numbers),
            [x, q_weight, k_weight, out, count, f32(eps)],
            threads=threads,
            grid=[groups(count, threads // lanes)],
        )

    x: Argument = ("x", (n, heads, head_dim), dtype)
    weights: list[Argument] = [(name, (head_dim,), dtype) for name in ("q_weight", "k_weight")]
    return build_kernel("qk_norm", [x, *weights, ("out", *x[1:])], body)


def gated_activation(
    activation: str, intermediate: int, dtype: str, rows: int | None = None, *, archs: CudaArchs
) -> tirx.PrimFunc | None:
    """(gate_up[n, 2 I]) -> out[n, I] = activation(gate) * up; the fused projection is gate, up."""
    if activation not in ACTIVATIONS or not _serves(dtype, archs):
        return None
    n, vector, threads = _rows(rows), _vector(dtype, intermediate), THREADS
    if rows == 1:  # many threads of little work are done soonest
        vector, threads = min(vector, 2), THREADS // 2

    def body(gate_up: Buffer, out: Buffer) -> None:
        name = f"mlc::{ACTIVATIONS[activation]}"
        device_call(
            "elementwise.cuh",
            _function("gated", archs, name, TYPES[dtype], intermediate, vector, threads),
            [gate_up, out, i32(n) if isinstance(n, int) else n],
            threads=threads,
            grid=[groups(n * (intermediate // vector), threads)],
        )

    arguments: list[Argument] = [
        ("gate_up", (n, 2 * intermediate), dtype),
        ("out", (n, intermediate), dtype),
    ]
    return build_kernel("gated_activation", arguments, body)


def _rows(rows: int | None) -> Expr | int:
    return symbol("n") if rows is None else rows


def _vector(dtype: str, width: int) -> int:
    """vector_size of vector.cuh."""
    n = 4 if dtype == "float32" else 8
    while width % n:
        n //= 2
    return n


def _serves(dtype: str, archs: CudaArchs) -> bool:
    return dtype in TYPES and (dtype != "bfloat16" or archs.minimum >= BFLOAT16)


def _norm_threads(width: int, dtype: str, rows: int | None) -> int | None:
    """Threads of a row's block, a multiple of 32; None where a row is too long for one."""
    vectors = width // _vector(dtype, width)
    # One row waits for its latency: every load at once. Many keep the memory busy anyway.
    wanted = vectors if rows == 1 else -(-vectors // 2)
    threads = min(max(-(-wanted // 32) * 32, 32), MOST_THREADS if rows == 1 else 2 * THREADS)
    return threads if -(-vectors // threads) <= HELD else None


def _function(name: str, archs: CudaArchs, *parameters: str | int) -> str:
    suffix = "_dependent" if archs.dependent_launch else ""
    return f"{name}{suffix}<{', '.join(map(str, parameters))}>"
