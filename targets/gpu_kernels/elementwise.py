"""Norms and gated activations of `[n, width]` rows for GPUs, as TIR PrimFuncs.

Notable features
- A norm is one group a row: each thread holds its elements in registers between the sum of squares
  and the scaling. An activation is one thread an element.
- `rows=None` leaves n symbolic (int32), an int fixes it (1 in decode).
- Storage is float32 or float16, arithmetic float32; None for bfloat16, which WebGPU has not.
"""

from __future__ import annotations

from collections.abc import Callable

from tvm import tirx

from mlc_compile.targets.cpu_kernels.elementwise import ADDED, ERFC_POLYNOMIAL
from mlc_compile.targets.gpu_kernels import _emit as emit
from mlc_compile.targets.gpu_kernels._emit import (
    F32,
    Argument,
    Buffer,
    Cell,
    Expr,
    bind,
    build_kernel,
    f32,
    groups,
    i32,
    launch,
    load,
    load_f32,
    shared,
    store_float,
    symbol,
    when,
)
from mlc_compile.targets.gpu_kernels.device import GPUDevice
from mlc_compile.targets.kernels import LayerNormSpec

DTYPES = ("float32", "float16")
# exp(88) is the last power that float32 holds; WGSL leaves an overflow undefined.
EXP_HIGHEST = 88.0


def _exp(x: Expr) -> Expr:
    return tirx.exp(tirx.min(x, f32(EXP_HIGHEST)))


def _silu(x: Expr) -> Expr:
    """x / (1 + exp(-x))."""
    return x / (f32(1) + _exp(f32(0) - x))


def _gelu_tanh(x: Expr) -> Expr:
    """x/2 (1 + tanh(u)) with u = sqrt(2/pi) (x + 0.044715 x^3).

    As x / (1 + exp(-2u)), so that there is no cancellation for negative x.
    """
    linear = f32(-1.5957691216057308)  # -2 sqrt(2/pi)
    cubic = f32(-0.07135481282562302)  # -2 sqrt(2/pi) 0.044715
    return x / (f32(1) + _exp(x * (linear + cubic * x * x)))


def _gelu(x: Expr) -> Expr:
    """x/2 (1 + erf(x / sqrt(2))), from erfc, so that the negative tail keeps its digits."""
    a = bind(tirx.Select(x > f32(0), x, f32(0) - x) * f32(0.7071067811865476))
    t = bind(f32(1) / (f32(1) + f32(0.5) * a))
    exponent = f32(ERFC_POLYNOMIAL[-1])
    for coefficient in reversed(ERFC_POLYNOMIAL[:-1]):
        exponent = exponent * t + f32(coefficient)
    erfc = bind(t * tirx.exp(exponent - a * a))
    return f32(0.5) * x * tirx.Select(x > f32(0), f32(2) - erfc, erfc)


def _relu(x: Expr) -> Expr:
    return tirx.max(x, f32(0))


# By config.json's names of `hidden_act`. Each takes a bound float32.
ACTIVATIONS: dict[str, Callable[[Expr], Expr]] = {
    "silu": _silu,
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
    "relu": _relu,
}


def _rows(rows: int | None) -> Expr | int:
    return symbol("n") if rows is None else rows


def _norm_row(
    tx: Expr,
    threads: int,
    width: int,
    eps: float,
    read: Callable[[Expr], Expr],
    write: Callable[[Expr, Expr], None],
    centre: bool = False,
) -> None:
    """write(i, read(i) / sqrt(mean square + eps)) for every i < width, by one group.

    `read` is called once for each i. To `centre` is to subtract the mean of what is read first.
    """
    held, slots = emit.registers(int(groups(width, threads))), shared([threads], F32)
    total = Cell(F32, 0.0)

    def for_elements(use: Callable[[int, Expr], None]) -> None:
        for k in range(int(groups(width, threads))):
            at = bind(tx + i32(k * threads))
            with when(at < i32(width)):
                use(k, at)

    def mean() -> Expr:
        return emit.fold_all(tx, slots, threads, total.value, emit.add) * f32(1 / width)

    def first(k: int, at: Expr) -> None:
        value = bind(read(at))
        emit.store(held, [k], value)
        total.set(total.value + (value if centre else value * value))

    for_elements(first)
    if centre:
        middle = bind(mean())

        def square(k: int, at: Expr) -> None:
            value = bind(load(held, k) - middle)
            emit.store(held, [k], value)
            total.set(total.value + value * value)

        emit.barrier()  # every thread has read the sum
        total.set(0.0)
        for_elements(square)
    scale = bind(f32(1) / tirx.sqrt(mean() + f32(eps)))
    for_elements(lambda k, at: write(at, load(held, k) * scale))


def _norm_threads(width: int, device: GPUDevice) -> int:
    return min(emit.group_size(device), emit.power_of_two_from(width))


def rms_norm(
    hidden: int, dtype: str, eps: float, rows: int | None = None, *, device: GPUDevice
) -> tirx.PrimFunc | None:
    """(x[n, hidden], weight[hidden]) -> out[n, hidden] = x / sqrt(mean(x^2) + eps) * weight.

    Rounded to `dtype` once, at the end (transformers also rounds before `* weight`).
    """
    if dtype not in DTYPES:
        return None
    n, threads = _rows(rows), _norm_threads(hidden, device)

    def body(x: Buffer, weight: Buffer, out: Buffer) -> None:
        with launch(threads, n) as (tx, row, _):
            _norm_row(
                tx,
                threads,
                hidden,
                eps,
                lambda i: load_f32(x, row, i),
                lambda i, value: store_float(out, [row, i], value * load_f32(weight, i)),
            )

    x: Argument = ("x", (n, hidden), dtype)
    return build_kernel("rms_norm", [x, ("weight", (hidden,), dtype), ("out", *x[1:])], body)


def add_rms_norm(
    hidden: int, dtype: str, eps: float, rows: int | None = None, *, device: GPUDevice
) -> tirx.PrimFunc | None:
    """(x[n, hidden], residual[n, hidden], weight[hidden]) -> (normed, total), both [n, hidden].

    total = x + residual rounded to `dtype`; normed = rms_norm(total), from the rounded values.
    """
    if dtype not in DTYPES:
        return None
    n, threads = _rows(rows), _norm_threads(hidden, device)

    def body(x: Buffer, residual: Buffer, weight: Buffer, normed: Buffer, total: Buffer) -> None:
        with launch(threads, n) as (tx, row, _):

            def read(i: Expr) -> Expr:
                value = load_f32(x, row, i) + load_f32(residual, row, i)
                rounded = bind(emit.cast(value, dtype))
                emit.store(total, [row, i], rounded)
                return emit.cast(rounded, F32)

            _norm_row(
                tx,
                threads,
                hidden,
                eps,
                read,
                lambda i, value: store_float(normed, [row, i], value * load_f32(weight, i)),
            )

    shape = ((n, hidden), dtype)
    arguments: list[Argument] = [("x", *shape), ("residual", *shape), ("weight", (hidden,), dtype)]
    return build_kernel("add_rms_norm", [*arguments, ("normed", *shape), ("total", *shape)], body)


def layer_norm(
    spec: LayerNormSpec, rows: int | None = None, *, device: GPUDevice
) -> tirx.PrimFunc | None:
    """The kernel of a LayerNormSpec; for bfloat16 only where the device has it."""
    if spec.dtype not in DTYPES and not device.bfloat16:
        return None
    n, threads = _rows(rows), _norm_threads(spec.size, device)
    arguments: list[Argument] = list(spec.arguments(n))

    def body(*given: Buffer) -> None:
        buffers = {a[0]: buffer for a, buffer in zip(arguments, given, strict=True)}

        def norm(tx: Expr, at: list[Expr], first: Expr | None) -> None:
            """The row at this index; its tables begin at `first`."""

            def table(name: str, i: Expr) -> Expr:
                return load_f32(buffers[name], i if first is None else first + i)

            def read(i: Expr) -> Expr:
                if not spec.added:
                    return load_f32(buffers["x"], *at, i)
                terms = [load_f32(buffers[name], *at, i) for name in ADDED]
                rounded = bind(emit.cast(terms[0] + terms[1], spec.dtype))
                emit.store(buffers["total"], [*at, i], rounded)
                return emit.cast(rounded, F32)

            def write(i: Expr, value: Expr) -> None:
                if spec.weight:
                    value = value * table("weight", i)
                if spec.bias:
                    value = value + table("bias", i)
                store_float(buffers["normed"], [*at, i], value)

            _norm_row(tx, threads, spec.size, spec.eps, read, write, spec.centre)

        if spec.heads is None:
            with launch(threads, n) as (tx, row, _):
                norm(tx, [row], None)
            return
        with launch(threads, spec.heads, n) as (tx, head, row):
            norm(tx, [row, head], head * i32(spec.size) if spec.own_tables else None)

    return build_kernel("layer_norm", arguments, body)


def qk_norm(
    num_query_heads: int,
    num_key_value_heads: int,
    head_dim: int,
    dtype: str,
    eps: float,
    rows: int | None = None,
    *,
    device: GPUDevice,
) -> tirx.PrimFunc | None:
    """(x[n, hq + 2 hkv, d], q_weight[d], k_weight[d]) -> out, shaped as x.

    rms_norm over d of the first hq heads with q_weight and of the next hkv with k_weight; the
    value heads are copied.
    """
    if dtype not in DTYPES:
        return None
    normed_heads = num_query_heads + num_key_value_heads
    heads = normed_heads + num_key_value_heads
    n, threads = _rows(rows), _norm_threads(head_dim, device)

    def body(x: Buffer, q_weight: Buffer, k_weight: Buffer, out: Buffer) -> None:
        # One group a head. Value heads do the sum as well: its barriers are for all groups.
        with launch(threads, heads, n) as (tx, head, row):

            def write(i: Expr, value: Expr) -> None:
                weight = tirx.Select(
                    head < i32(num_query_heads), load_f32(q_weight, i), load_f32(k_weight, i)
                )
                copied = load_f32(x, row, head, i)
                result = tirx.Select(head < i32(normed_heads), value * weight, copied)
                store_float(out, [row, head, i], result)

            _norm_row(tx, threads, head_dim, eps, lambda i: load_f32(x, row, head, i), write)

    x: Argument = ("x", (n, heads, head_dim), dtype)
    weights: list[Argument] = [(name, (head_dim,), dtype) for name in ("q_weight", "k_weight")]
    return build_kernel("qk_norm", [x, *weights, ("out", *x[1:])], body)


def gated_activation(
    activation: str,
    intermediate: int,
    dtype: str,
    rows: int | None = None,
    *,
    device: GPUDevice,
) -> tirx.PrimFunc | None:
    """(gate_up[n, 2 I]) -> out[n, I] = activation(gate) * up; the fused projection is gate, up.

    `activation` is a key of ACTIVATIONS (config.json's `hidden_act`); None for others.
    """
    if activation not in ACTIVATIONS or dtype not in DTYPES:
        return None
    activate = ACTIVATIONS[activation]
    n = _rows(rows)

    def body(gate_up: Buffer, out: Buffer) -> None:
        def element(row: Expr, column: Expr) -> None:
            gate = activate(bind(load_f32(gate_up, row, column)))
            up = load_f32(gate_up, row, column + i32(intermediate))
            store_float(out, [row, column], gate * up)

        emit.each_element(device, n, intermediate, element)

    arguments: list[Argument] = [
        ("gate_up", (n, 2 * intermediate), dtype),
        ("out", (n, intermediate), dtype),
    ]
    return build_kernel("gated_activation", arguments, body)
