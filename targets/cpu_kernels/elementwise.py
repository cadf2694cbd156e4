"""Norms, activations, additions and gathers for the CPU, as TIR PrimFuncs over `[n, width]` rows.

Notable features
- Every factory returns a scheduled, destination-passing PrimFunc for `relax.call_tir`: tensors in,
  then out. `rows=None` leaves n symbolic (int64), an int fixes it (1 in decode).
- Storage is float32, float16 or bfloat16; the arithmetic in between is always float32.
- Rows run on the calling thread until there is enough work to pay for waking the others.
- Any width: what the full vectors leave over is done by narrower ones.
- `exp` is our own: LLVM would call libm's once per vector lane.

Vectors have `vector_bits / 32` float32 lanes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T

from mlc_compile.targets.cpu_kernels import _vector as vec
from mlc_compile.targets.cpu_kernels._vector import Buffer, Expr
from mlc_compile.targets.kernels import LayerNormSpec

F32 = "float32"
# op_pattern 8 is "opaque": relax's fusion leaves the kernel alone.
ATTRS = {"tirx.noalias": True, "tirx.is_scheduled": True, "op_pattern": 8}

# Waking the thread pool takes microseconds; one core handles 64 Ki elements in about 10.
PARALLEL_ELEMENTS = 1 << 16
# Vectors in flight in a reduction: hides the latency of the additions.
REDUCTION_VECTORS = 4

# exp(x) = 2^n exp(r), |r| <= ln(2)/2. ln(2) = LN2_HIGH + LN2_LOW, where LN2_HIGH = 355/512 has so
# few bits that n * LN2_HIGH is exact (Cody and Waite's reduction).
LOG2_E = 1.4426950408889634
LN2_HIGH = 0.693359375
LN2_LOW = -2.1219444005471377e-4
# exp(r) = 1 + r + r^2 P(r). P is our own fit: least squares at Chebyshev nodes of |r| <= ln(2)/2,
# reweighted (Lawson) towards the minimax solution for the relative error of exp, which is 3.1e-9.
EXP_POLYNOMIAL = (
    0.4999999403953552,
    0.1666652113199234,
    0.04166838899254799,
    0.008368710055947304,
    0.0013814610429108143,
)
# Adding 1.5 * 2^23 rounds |x| < 2^22 to the nearest integer, which the low bits of the sum then
# are: no rounding instruction, on any machine.
ROUNDER = 12582912.0
ROUNDER_BITS = 0x4B400000
# exp underflows to 0 below -104 and overflows to infinity above 89.
EXP_LOWEST = -104.0
EXP_HIGHEST = 89.0

# erfc(a) = t exp(Q(t) - a^2), t = 1 / (1 + a/2), a >= 0: the classic rational substitution, with
# our own fit of Q on 0 <= a <= 10 (same method as above, error of Q 4.5e-8).
ERFC_POLYNOMIAL = (
    -1.2654414176940918,
    0.9984924793243408,
    0.3878999352455139,
    0.028356052935123444,
    0.02019905112683773,
    -0.1167932078242302,
    -0.6512417197227478,
    1.1223959922790527,
    -0.6660610437393188,
    0.14219388365745544,
)


def _horner(coefficients: Sequence[float], x: Expr, lanes: int) -> Expr:
    """The polynomial sum(coefficients[i] * x^i); `x` must be bound."""
    value = vec.const(coefficients[-1], F32, lanes)
    for coefficient in reversed(coefficients[:-1]):
        value = value * x + vec.const(coefficient, F32, lanes)
    return value


def hold(value: Expr, lanes: int) -> Expr:
    """A float32 vector through a register buffer: like `vec.bind`, but opaque to TVM.

    Its simplifier sees through a chain of bindings again and again (an erf took 12 s to compile),
    and its bfloat16 legalisation misses casts in a binding (wrong values, no error).
    """
    (register,) = vec.accumulators(1, lanes)
    vec.put(register, value, lanes)
    return vec.bind(vec.get(register, lanes))


def exp(x: Expr, lanes: int) -> Expr:
    """exp(x) for float32 vectors, within 1.5 ulp; denormals, 0, infinity and NaN as libm."""

    def f32(value: float) -> Expr:
        return vec.const(value, F32, lanes)

    def i32(value: int) -> Expr:
        return vec.const(value, "int32", lanes)

    def power_of_two(n: Expr) -> Expr:  # from its exponent bits, -126 <= n <= 127
        return vec.bitcast(tirx.shift_left(n + i32(127), i32(23)), F32, lanes)

    x = hold(x, lanes)
    # Selects, not min and max: these let a NaN through.
    x = hold(tirx.Select(x > f32(EXP_HIGHEST), f32(EXP_HIGHEST), x), lanes)
    x = hold(tirx.Select(x < f32(EXP_LOWEST), f32(EXP_LOWEST), x), lanes)
    shifted = hold(x * f32(LOG2_E) + f32(ROUNDER), lanes)
    n = vec.bind(vec.bitcast(shifted, "int32", lanes) - i32(ROUNDER_BITS))
    # Not shifted - ROUNDER: TVM's simplifier cancels (a + b) - b even for floats.
    whole = vec.bind(vec.cast(n, F32, lanes))
    r = hold(x - whole * f32(LN2_HIGH) - whole * f32(LN2_LOW), lanes)
    value = _horner(EXP_POLYNOMIAL, r, lanes) * r * r + r + f32(1)
    # Two factors, because 2^n itself leaves the normal range at both ends (2^-150, 2^128).
    half = vec.bind(tirx.shift_right(n, i32(1)))
    return value * power_of_two(half) * power_of_two(n - half)


def _silu(x: Expr, lanes: int) -> Expr:
    """x / (1 + exp(-x))."""
    one = vec.const(1, F32, lanes)
    return x / (one + exp(vec.const(0, F32, lanes) - x, lanes))


def _gelu_tanh(x: Expr, lanes: int) -> Expr:
    """x/2 (1 + tanh(u)) with u = sqrt(2/pi) (x + 0.044715 x^3).

    As x / (1 + exp(-2u)), so that there is no cancellation for negative x.
    """
    linear = vec.const(-1.5957691216057308, F32, lanes)  # -2 sqrt(2/pi)
    cubic = vec.const(-0.07135481282562302, F32, lanes)  # -2 sqrt(2/pi) 0.044715
    return x / (vec.const(1, F32, lanes) + exp(x * (linear + cubic * x * x), lanes))


def _gelu(x: Expr, lanes: int) -> Expr:
    """x/2 (1 + erf(x / sqrt(2))), from erfc, so that the negative tail keeps its digits."""

    def f32(value: float) -> Expr:
        return vec.const(value, F32, lanes)

    positive = x > f32(0)
    a = hold(tirx.Select(positive, x, f32(0) - x) * f32(0.7071067811865476), lanes)
    t = hold(f32(1) / (f32(1) + f32(0.5) * a), lanes)
    erfc = hold(t * exp(_horner(ERFC_POLYNOMIAL, t, lanes) - a * a, lanes), lanes)
    return f32(0.5) * x * tirx.Select(positive, f32(2) - erfc, erfc)


def _relu(x: Expr, lanes: int) -> Expr:
    """max(x, 0); a NaN stays."""
    zero = vec.const(0, F32, lanes)
    return tirx.Select(x < zero, zero, x)


# By config.json's names of `hidden_act`. Each takes a bound float32 vector and its lanes.
ACTIVATIONS: dict[str, Callable[[Expr, int], Expr]] = {
    "silu": _silu,
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
    "relu": _relu,
}

# What a LayerNormSpec adds up.
ADDED = ("x", "residual")

Argument = tuple[str, Sequence[Any], str]


def build_kernel(
    name: str, arguments: Sequence[Argument], body: Callable[..., None], private: bool = True
) -> tirx.PrimFunc:
    """A PrimFunc of `arguments` (name, shape, dtype), whose code `body(*buffers)` emits.

    A public one (`private=False`) carries `name` as its global symbol.
    """
    with IRBuilder() as builder, T.prim_func(is_private=private, s_tir=True):
        T.func_name(name)
        T.func_attr(ATTRS if private else {**ATTRS, "global_symbol": name})
        buffers = []
        for argument, shape, dtype in arguments:
            full = [vec.i64(s) if isinstance(s, int) else s for s in shape]
            buffers.append(T.arg(argument, T.buffer(full, dtype, layout=None)))
        # relax's RewriteDataflowReshape insists on blocks; one around everything asks for nothing.
        with T.sblock(name):
            T.reads([])
            T.writes([])
            body(*buffers)
    return builder.get()


def symbol(name: str) -> Expr:
    """A symbolic extent."""
    return tirx.Var(name, "int64")


def for_rows(n: Expr | int, row_elements: int, row: Callable[[Expr], None]) -> None:
    """Emit row(i) for i < n, on all threads when n * row_elements pays for waking them.

    An int n decides that now, an expression at run time.
    """
    parallel_from = max(2, PARALLEL_ELEMENTS // row_elements)

    def rows_in(loop: Callable[[Any], Any]) -> None:
        with loop(n) as i:
            row(i)

    if isinstance(n, int):
        rows_in(vec.serial if n < parallel_from else vec.parallel)
        return
    with T.If(n < vec.i64(parallel_from)):
        with T.Then():
            rows_in(vec.serial)
        with T.Else():
            rows_in(vec.parallel)


def for_vectors(width: int, lanes: int, body: Callable[[Expr, int], None]) -> None:
    """Emit body(offset, lanes) over `width` elements: full vectors, then narrower ones."""
    if width >= lanes:
        with vec.serial(width // lanes) as j:
            body(vec.bind(j * vec.i64(lanes)), lanes)
    for offset, narrow in vec.pieces(width, lanes):
        body(vec.i64(offset), narrow)


def load_f32(buffer: Buffer, index: Sequence[Expr | int], lanes: int) -> Expr:
    """A vector of `buffer` as float32."""
    return vec.cast(vec.load(buffer, index, lanes), F32, lanes)


def _store(
    buffer: Buffer, index: Sequence[Expr | int], value: Expr, dtype: str, lanes: int
) -> None:
    """Round a float32 vector to `dtype` and store it."""
    if dtype == "bfloat16":
        value = hold(value, lanes)  # the lowered rounding mentions it several times
    vec.store(buffer, index, vec.cast(value, dtype, lanes), lanes)


def _sum(value: Callable[[Expr, int], Expr], width: int, lanes: int) -> Expr:
    """sum(value(offset, lanes)) over `width` float32 elements, a bound scalar."""
    step = REDUCTION_VECTORS * lanes
    sums = vec.accumulators(REDUCTION_VECTORS, lanes)
    for register in sums:
        vec.put(register, vec.const(0, F32, lanes), lanes)

    def accumulate(register: Buffer, offset: Expr) -> None:
        term = value(offset, lanes)
        vec.put(register, vec.get(register, lanes) + term, lanes)

    if width >= step:
        with vec.serial(width // step) as j:
            for u, register in enumerate(sums):
                accumulate(register, j * vec.i64(step) + vec.i64(u * lanes))
    for offset in range(width // step * step, width // lanes * lanes, lanes):
        accumulate(sums[0], vec.i64(offset))
    total = vec.get(sums[0], lanes)
    for register in sums[1:]:
        total = total + vec.get(register, lanes)
    total = vec.horizontal_sum(total, lanes)
    for narrow_offset, narrow in vec.pieces(width, lanes):
        total = total + vec.horizontal_sum(value(vec.i64(narrow_offset), narrow), narrow)
    return vec.bind(total)


def _normalise(
    read: Callable[[Expr, int], Expr],
    write: Callable[[Expr, Expr, int], None],
    width: int,
    eps: float,
    lanes: int,
    centre: bool = False,
) -> None:
    """write(offset, read(offset) / sqrt(mean square + eps), lanes) over one row.

    `read` is called for every element first for the squares, then for the values; to `centre`, it
    is called before that for their mean, which is then subtracted.
    """

    def mean_of(value: Callable[[Expr, int], Expr]) -> Expr:
        return _sum(value, width, lanes) * vec.const(1 / width, F32, 1)

    middle = vec.bind(mean_of(lambda i, narrow: hold(read(i, narrow), narrow))) if centre else None

    def centred(offset: Expr, narrow: int) -> Expr:
        value = read(offset, narrow)
        return value if middle is None else value - vec.splat(middle, narrow)

    def square(offset: Expr, narrow: int) -> Expr:
        value = hold(centred(offset, narrow), narrow)
        return value * value

    mean = mean_of(square)
    scale = vec.bind(vec.const(1, F32, 1) / tirx.sqrt(mean + vec.const(eps, F32, 1)))

    def scaled(offset: Expr, narrow: int) -> None:
        write(offset, centred(offset, narrow) * vec.splat(scale, narrow), narrow)

    for_vectors(width, lanes, scaled)


def rms_norm(
    hidden: int, dtype: str, eps: float, rows: int | None = None, vector_bits: int = 256
) -> tirx.PrimFunc:
    """(x[n, hidden], weight[hidden]) -> out[n, hidden] = x / sqrt(mean(x^2) + eps) * weight.

    Rounded to `dtype` once, at the end (transformers also rounds before `* weight`).
    """
    lanes = max(1, vector_bits // 32)
    n = symbol("n") if rows is None else rows

    def body(x: Buffer, weight: Buffer, out: Buffer) -> None:
        def row(i: Expr) -> None:
            def write(offset: Expr, value: Expr, narrow: int) -> None:
                value = value * load_f32(weight, [offset], narrow)
                _store(out, [i, offset], value, dtype, narrow)

            _normalise(lambda j, narrow: load_f32(x, [i, j], narrow), write, hidden, eps, lanes)

        for_rows(n, hidden, row)

    x = ("x", (n, hidden), dtype)
    return build_kernel("rms_norm", [x, ("weight", (hidden,), dtype), ("out", *x[1:])], body)


def add_rms_norm(
    hidden: int, dtype: str, eps: float, rows: int | None = None, vector_bits: int = 256
) -> tirx.PrimFunc:
    """(x[n, hidden], residual[n, hidden], weight[hidden]) -> (normed, total), both [n, hidden].

    total = x + residual rounded to `dtype`; normed = rms_norm(total), from the rounded values, so
    that the pair equals `add` followed by `rms_norm` to the bit.
    """
    lanes = max(1, vector_bits // 32)
    n = symbol("n") if rows is None else rows

    def body(x: Buffer, residual: Buffer, weight: Buffer, normed: Buffer, total: Buffer) -> None:
        def row(i: Expr) -> None:
            def add_up(offset: Expr, narrow: int) -> None:
                value = load_f32(x, [i, offset], narrow) + load_f32(residual, [i, offset], narrow)
                _store(total, [i, offset], value, dtype, narrow)

            def write(offset: Expr, value: Expr, narrow: int) -> None:
                value = value * load_f32(weight, [offset], narrow)
                _store(normed, [i, offset], value, dtype, narrow)

            # A pass of its own: the row stays in the first-level cache.
            for_vectors(hidden, lanes, add_up)
            _normalise(lambda j, narrow: load_f32(total, [i, j], narrow), write, hidden, eps, lanes)

        for_rows(n, hidden, row)

    shape = ((n, hidden), dtype)
    arguments = [("x", *shape), ("residual", *shape), ("weight", (hidden,), dtype)]
    return build_kernel("add_rms_norm", [*arguments, ("normed", *shape), ("total", *shape)], body)


def layer_norm(
    spec: LayerNormSpec, rows: int | None = None, vector_bits: int = 256
) -> tirx.PrimFunc:
    """The kernel of a LayerNormSpec."""
    lanes = max(1, vector_bits // 32)
    n, dtype, size = symbol("n") if rows is None else rows, spec.dtype, spec.size
    arguments = spec.arguments(n)

    def body(*given: Buffer) -> None:
        buffers = {a[0]: buffer for a, buffer in zip(arguments, given, strict=True)}

        def norm(at: list[Expr], first: Expr | None) -> None:
            """The row at this index; its tables begin at `first`."""

            def table(name: str, offset: Expr, narrow: int) -> Expr:
                place = offset if first is None else first + offset
                return load_f32(buffers[name], [place], narrow)

            def add_up(offset: Expr, narrow: int) -> None:
                terms = [load_f32(buffers[name], [*at, offset], narrow) for name in ADDED]
                _store(buffers["total"], [*at, offset], terms[0] + terms[1], dtype, narrow)

            def read(offset: Expr, narrow: int) -> Expr:
                return load_f32(buffers["total" if spec.added else "x"], [*at, offset], narrow)

            def write(offset: Expr, value: Expr, narrow: int) -> None:
                if spec.weight:
                    value = value * table("weight", offset, narrow)
                if spec.bias:
                    value = value + table("bias", offset, narrow)
                _store(buffers["normed"], [*at, offset], value, dtype, narrow)

            if spec.added:
                for_vectors(size, lanes, add_up)
            _normalise(read, write, size, spec.eps, lanes, spec.centre)

        def row(i: Expr) -> None:
            if spec.heads is None:
                norm([i], None)
                return
            with vec.serial(spec.heads) as h:
                norm([i, h], vec.bind(h * vec.i64(size)) if spec.own_tables else None)

        for_rows(n, (spec.heads or 1) * size, row)

    return build_kernel("layer_norm", arguments, body)


def qk_norm(
    num_query_heads: int,
    num_key_value_heads: int,
    head_dim: int,
    dtype: str,
    eps: float,
    rows: int | None = None,
    vector_bits: int = 256,
) -> tirx.PrimFunc:
    """(x[n, hq + 2 hkv, d], q_weight[d], k_weight[d]) -> out, shaped as x.

    rms_norm over d of the first hq heads with q_weight and of the next hkv with k_weight; the
    value heads are copied.
    """
    normed_heads = num_query_heads + num_key_value_heads
    heads = normed_heads + num_key_value_heads
    lanes = max(1, vector_bits // 32)
    n = symbol("n") if rows is None else rows

    def body(x: Buffer, q_weight: Buffer, k_weight: Buffer, out: Buffer) -> None:
        def row(i: Expr) -> None:
            def norm(first: int, count: int, weight: Buffer) -> None:
                with vec.serial(count) as h:
                    head = vec.bind(h + vec.i64(first))

                    def write(offset: Expr, value: Expr, narrow: int) -> None:
                        value = value * load_f32(weight, [offset], narrow)
                        _store(out, [i, head, offset], value, dtype, narrow)

                    def read(offset: Expr, narrow: int) -> Expr:
                        return load_f32(x, [i, head, offset], narrow)

                    _normalise(read, write, head_dim, eps, lanes)

            norm(0, num_query_heads, q_weight)
            norm(num_query_heads, num_key_value_heads, k_weight)
            with vec.serial(num_key_value_heads) as h:
                head = vec.bind(h + vec.i64(normed_heads))

                def copy(offset: Expr, narrow: int) -> None:
                    value = vec.load(x, [i, head, offset], narrow)
                    vec.store(out, [i, head, offset], value, narrow)

                for_vectors(head_dim, lanes, copy)

        for_rows(n, heads * head_dim, row)

    x = ("x", (n, heads, head_dim), dtype)
    weights = [(name, (head_dim,), dtype) for name in ("q_weight", "k_weight")]
    return build_kernel("qk_norm", [x, *weights, ("out", *x[1:])], body)


def gated_activation(
    activation: str,
    intermediate: int,
    dtype: str,
    rows: int | None = None,
    vector_bits: int = 256,
) -> tirx.PrimFunc | None:
    """(gate_up[n, 2 I]) -> out[n, I] = activation(gate) * up; the fused projection is gate, up.

    `activation` is a key of ACTIVATIONS (config.json's `hidden_act`); None for others.
    """
    if activation not in ACTIVATIONS:
        return None
    activate = ACTIVATIONS[activation]
    lanes = max(1, vector_bits // 32)
    n = symbol("n") if rows is None else rows

    def body(gate_up: Buffer, out: Buffer) -> None:
        def row(i: Expr) -> None:
            def vector(offset: Expr, narrow: int) -> None:
                gate = activate(hold(load_f32(gate_up, [i, offset], narrow), narrow), narrow)
                value = gate * load_f32(gate_up, [i, offset + vec.i64(intermediate)], narrow)
                _store(out, [i, offset], value, dtype, narrow)

            for_vectors(intermediate, lanes, vector)

        # An exponential is worth about four loads and stores.
        for_rows(n, 4 * intermediate, row)

    arguments = [("gate_up", (n, 2 * intermediate), dtype), ("out", (n, intermediate), dtype)]
    return build_kernel(f"gated_{activation}", arguments, body)


def add(hidden: int, dtype: str, rows: int | None = None, vector_bits: int = 256) -> tirx.PrimFunc:
    """(x[n, hidden], y[n, hidden]) -> out[n, hidden] = x + y."""
    lanes = max(1, vector_bits // 32)
    n = symbol("n") if rows is None else rows

    def body(x: Buffer, y: Buffer, out: Buffer) -> None:
        def row(i: Expr) -> None:
            def vector(offset: Expr, narrow: int) -> None:
                value = load_f32(x, [i, offset], narrow) + load_f32(y, [i, offset], narrow)
                _store(out, [i, offset], value, dtype, narrow)

            for_vectors(hidden, lanes, vector)

        for_rows(n, hidden, row)

    return build_kernel("add", [(name, (n, hidden), dtype) for name in ("x", "y", "out")], body)


def copy_row(
    source: Buffer, i: Expr | int, target: Buffer, k: Expr | int, hidden: int, lanes: int
) -> None:
    """target[k] = source[i]."""

    def copy(offset: Expr, narrow: int) -> None:
        vec.store(target, [k, offset], vec.load(source, [i, offset], narrow), narrow)

    for_vectors(hidden, lanes, copy)
