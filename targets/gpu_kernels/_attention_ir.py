"""What the GPU attention kernels share: arguments, scores, rotation of keys, windows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from math import prod
from types import SimpleNamespace
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T

from mlc_compile.targets.cpu_kernels import _attn_math as math
from mlc_compile.targets.gpu_kernels._emit import F32, I32, bind, cast, f32, i32, when
from mlc_compile.targets.kv_cache import PAGE_SIZE, KVCacheSpec

Expr = Any  # a tirx expression; TVM ships no types
Buffer = Any

EMPTY = math.NEGATIVE / 10
"""Running maximum before any key: above a masked score, so that masked keys weigh exactly 0."""

SMALLEST = 1e-37
"""Stands for a softmax sum of 0, so that its logarithm and inverse are finite."""

THREADS = 256
"""Threads of a group."""


class Cells:
    """A flat buffer that is read as float32 or int32 and assigned like a list, rounding."""

    def __init__(self, buffer: Buffer) -> None:
        self.buffer = buffer

    def __getitem__(self, index: Expr | int) -> Expr:
        value = self.buffer[index]
        return value if str(self.buffer.dtype) == I32 else cast(value, F32)

    def __setitem__(self, index: Expr | int, value: Expr | float) -> None:
        value = f32(value) if isinstance(value, int | float) else value
        T.buffer_store(self.buffer, cast(value, str(self.buffer.dtype)), [index])

    def fill(self, count: int, value: float) -> None:
        for i in range(count):
            self[i] = value


def registers(count: int, dtype: str = F32) -> Cells:
    """An array of one thread. Index it with constants, else it leaves the registers."""
    return Cells(T.alloc_buffer((count,), dtype, scope="local", layout=None))


def shared(count: int) -> Cells:
    return Cells(T.alloc_buffer((count,), F32, scope="shared", layout=None))


def hold(value: Expr) -> Expr:
    """`bind` through a register: TVM's simplifier would copy a plain value into all its uses."""
    register = registers(1, str(value.ty.dtype))
    register[0] = value
    return bind(register.buffer[0])


def divide(a: Expr, b: int) -> Expr:
    """a // b of a >= 0, without the sign handling of TVM's floor division."""
    return tirx.shift_right(a, i32(b.bit_length() - 1)) if _power_of_two(b) else tirx.truncdiv(a, b)


def remainder(a: Expr, b: int) -> Expr:
    """a % b of a >= 0."""
    return tirx.bitwise_and(a, i32(b - 1)) if _power_of_two(b) else tirx.truncmod(a, b)


def pieces(a: Expr, b: int) -> Expr:
    """ceil(a / b) of a >= 0."""
    return divide(a + (b - 1), b)


def _power_of_two(n: int) -> bool:
    return n & (n - 1) == 0


def all_of(*conditions: Expr) -> Expr:
    return reduce(tirx.And, conditions)


def build(
    name: str,
    spec: KVCacheSpec,
    arguments: str,
    body: Callable[[SimpleNamespace], None],
    *,
    flat_order: bool = False,
) -> tirx.PrimFunc:
    """A kernel whose launches `body(a)` emits; `a` has the arguments by name, tensors as `Cells`,
    and `a.extent` the symbolic sizes: rows, kv_rows, batch, ends (batch + 1), id_count, moves.

    int32 tensors may be views into larger ones at any offset. `flat_order` is the shape of tree
    orders: the runtime hands them over as [m, 2] where it gathers its small arrays in one buffer
    (CUDA), as [2 m] where it does not (attn_utils.h).
    """
    q, kv, d, dtype = spec.num_qo_heads, spec.num_kv_heads, spec.head_dim, spec.dtype
    names = ("rows", "kv_rows", "batch", "ends", "id_count", "moves", "num_pages", "order")
    extent = SimpleNamespace(**{n: tirx.Var(n, I32) for n in names})
    rows, kv_rows, batch, ends = extent.rows, extent.kv_rows, extent.batch, extent.ends
    tensors: dict[str, tuple[str, tuple[Expr | int, ...]]] = {
        **dict.fromkeys(("q", "out", "other_out"), (dtype, (rows, q, d))),
        **dict.fromkeys(("lse", "other_lse"), (F32, (rows, q))),
        **dict.fromkeys(("k", "v"), (dtype, (kv_rows, kv, d))),
        **dict.fromkeys(("new_k", "new_v"), (dtype, (rows, kv, d))),
        **dict.fromkeys(("all_k", "all_v"), (dtype, (spec.num_layers, kv_rows, kv, d))),
        "qkv": (dtype, (rows, q + 2 * kv, d)),
        "pages": (dtype, (extent.num_pages, 2, kv, PAGE_SIZE, d)),
        "inv_freq": (F32, (max(spec.rotary_dim // 2, 1),)),
        "q_position": (I32, (rows,)),
        "k_offset": (I32, (batch,)),
        **dict.fromkeys(("qo_indptr", "kv_indptr", "page_indptr", "tree_indptr"), (I32, (ends,))),
        "copy_indptr": (I32, (ends,)),
        "page_indices": (I32, (extent.id_count,)),
        "length_info": (I32, (batch,) if spec.sliding_window is None else (3, batch)),
        "tree_order": (I32, (extent.order,) if flat_order else (extent.order, 2)),
        "slot": (I32, (kv_rows,)),
        "slots": (I32, (2, extent.moves)),
    }
    floats = ("rope_scale", "rope_theta", "sm_scale")
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name(name)
        T.func_attr({"tirx.is_scheduled": True, "tirx.noalias": True, "global_symbol": name})
        a: dict[str, Any] = {"extent": extent}
        offsets = {}
        for argument in arguments.split():
            if argument in tensors:
                kind, shape = tensors[argument]
                if kind == I32:
                    offsets[argument] = tirx.Var(f"{argument}_offset", I32)
                value = T.buffer(shape, kind, elem_offset=offsets.get(argument), layout=None)
            else:
                value = T.float32() if argument in floats else T.int32()
            a[argument] = T.arg(argument, value)
        for argument in [name for name in a if name in tensors]:  # a view ends the arguments
            kind, shape = tensors[argument]
            flat = a[argument]
            if len(shape) > 1:
                size, offset = prod(shape, start=i32(1)), offsets.get(argument)
                flat = T.decl_buffer((size,), kind, flat.data, elem_offset=offset, layout=None)
            a[argument] = Cells(flat)
        body(SimpleNamespace(**a))
    return builder.get()


def _polynomial(coefficients: Sequence[float], x: Expr) -> Expr:
    return reduce(lambda sum_, c: sum_ * x + f32(c), coefficients[-2::-1], f32(coefficients[-1]))


def sine_and_cosine(angle: Expr) -> tuple[Expr, Expr]:
    """Both within about 1e-7 plus the angle's own rounding, for |angle| < 1e5.

    WGSL promises 2**-11 only, and that only between -pi and pi.
    """
    whole = hold(T.floor(angle * f32(0.6366197723675814) + f32(0.5)))  # 2 / pi
    n = hold(tirx.Cast(I32, whole))
    r = angle
    for term in math.HALF_PI_TERMS:
        r = hold(r - whole * f32(term))
    square = hold(r * r)
    s = hold(_polynomial(math.SIN_COEFFICIENTS, square) * r)
    c = hold(_polynomial(math.COS_COEFFICIENTS, square))
    odd = tirx.bitwise_and(n, i32(1)) == 1

    def signed(value: Expr, quadrant: Expr) -> Expr:
        return hold(T.Select(tirx.bitwise_and(quadrant, i32(2)) == 0, value, f32(0) - value))

    return signed(T.Select(odd, c, s), n), signed(T.Select(odd, s, c), n + 1)


def tanh(x: Expr) -> Expr:
    """Within 2e-7 of its own size, for any finite x: devices have at best a few bits, and some
    overflow to NaN."""
    size = hold(T.min(T.max(x, f32(0) - x), f32(10)))  # tanh(10) is 1 in float32
    near = hold(T.min(size, f32(math.TANH_NEAR)))
    small = near * _polynomial(math.TANH_COEFFICIENTS, near * near)
    large = f32(1) - f32(2) / (T.exp2(size * f32(2 * math.LOG2_E)) + f32(1))
    value = hold(T.Select(size < f32(math.TANH_NEAR), small, large))
    return T.Select(x < f32(0), f32(0) - value, value)


def score_scale(spec: KVCacheSpec, sm_scale: Expr) -> Expr:
    """The factor of q.k in what `capped` takes."""
    if spec.layer_window is not None:  # its sign says whether the layer is windowed
        sm_scale = T.max(sm_scale, f32(0) - sm_scale)
    return sm_scale * f32(math.LOG2_E if spec.softcap is None else 1 / spec.softcap)


def capped(spec: KVCacheSpec, score: Expr) -> Expr:
    """The score in base 2, softcap * tanh(score / softcap) where the model bounds it (Gemma 2,
    arXiv 2408.00118)."""
    if spec.softcap is None:
        return score
    return hold(tanh(hold(score)) * f32(spec.softcap * math.LOG2_E))


def frequency(spec: KVCacheSpec, index: Expr) -> Expr:
    """inv_freq[index] of a compiled-in table, as a tree of selections."""

    def pick(low: int, high: int) -> Expr:
        if high - low == 1:
            return f32(spec.inv_freq[low])
        middle = (low + high) // 2
        return T.Select(index < middle, pick(low, middle), pick(middle, high))

    return pick(0, len(spec.inv_freq))


class KeyLoader:
    """Loads keys. A sliding window's are cached as they came, because the runtime numbers tokens
    anew as the window slides: they are rotated here. A barrier must follow its creation."""

    def __init__(self, spec: KVCacheSpec, thread: Expr) -> None:
        self.spec, self.half = spec, spec.rotary_dim // 2
        self.rotates = spec.sliding_window is not None and self.half > 0
        if self.rotates:
            self.table = shared(self.half)
            with when(thread < self.half):
                self.table[thread] = frequency(spec, thread)

    def one(self, source: Cells, row: Expr, e: Expr, position: Expr) -> Expr:
        """Dimension `e` of the key whose first element is source[row]."""
        if not self.rotates:
            return source[row + e]
        low, turns = e < self.half, e < self.spec.rotary_dim
        partner = T.Select(turns, T.Select(low, e + self.half, e - self.half), e)
        s, c = self._turn(T.Select(low, e, T.min(e - self.half, i32(self.half - 1))), position)
        x, y = bind(source[row + e]), source[row + partner]
        return T.Select(turns, x * c + T.Select(low, f32(0) - y, y) * s, x)

    def some(
        self, source: Cells, row: Expr, dimensions: Sequence[Expr], stride: int, position: Expr
    ) -> Iterator[tuple[int, Expr]]:
        """`dimensions`, which lie `stride` apart, in any order: (index, value)."""
        steps, rest = self.half // stride, range(len(dimensions))
        if self.rotates and self.half % stride == 0:
            for i in range(steps):  # a pair shares its sine and cosine
                x, y = (bind(source[row + dimensions[j]]) for j in (i, i + steps))
                s, c = self._turn(dimensions[i], position)
                yield i, x * c - y * s
                yield i + steps, y * c + x * s
            rest = range(2 * steps, len(dimensions))
            yield from ((i, source[row + dimensions[i]]) for i in rest)
        else:
            yield from ((i, self.one(source, row, dimensions[i], position)) for i in rest)

    def _turn(self, i: Expr, position: Expr) -> tuple[Expr, Expr]:
        s, c = sine_and_cosine(hold(tirx.Cast(F32, position) * self.table[i]))
        factor = self.spec.attention_factor
        return (s, c) if factor == 1 else (s * f32(factor), c * f32(factor))


@dataclass(frozen=True)
class Span:
    """The keys that a group visits, numbered 0 to total - 1 without gaps.

    A slot is a place in the sequence; slot + shift is the runtime's number of the token in it. With
    a window the `sinks` first slots come first, then, `gap` further on, those of the window; a
    layer's window has no sinks.

    Attributes:
        end: the sequence's slots in use.
        begin: the first slot of the window.
    """

    total: Expr
    end: Expr
    begin: Expr = 0
    sinks: Expr | None = None
    gap: Expr = 0
    sink_shift: Expr = 0
    shift: Expr = 0

    def slot(self, n: Expr) -> Expr:
        if self.sinks is None:
            return n if isinstance(self.gap, int) else n + self.gap
        return n + T.Select(n < self.sinks, i32(0), self.gap)

    def position(self, n: Expr, slot: Expr) -> Expr:
        """The runtime's number of key n; 0 where nothing depends on it."""
        if self.sinks is None:
            return i32(0)
        return slot + T.Select(n < self.sinks, self.sink_shift, self.shift)


def paged_span(spec: KVCacheSpec, a: SimpleNamespace, b: Expr, position: Expr | None) -> Span:
    """Cached keys of sequence b for rows from the runtime's number `position` on, which only
    windows need.

    Before a sequence first slides the runtime says no sink; the first `attention_sink` tokens are.
    """
    count = bind(a.page_indptr[b + 1] - a.page_indptr[b])
    end = hold(T.Select(count > 0, (count - 1) * PAGE_SIZE + a.length_info[b], i32(0)))
    if spec.layer_window is not None:
        return layer_span(spec, a, end, position, a.k_offset[b])
    if spec.sliding_window is None:
        return Span(end, end)
    batch = a.extent.batch
    start, sink, offset = a.length_info[b + batch], a.length_info[b + batch * 2], a.k_offset[b]
    start, sink, offset = bind(start), bind(sink), bind(offset)
    slid = tirx.any(sink > 0, start > 0)
    natural = hold(T.max(T.min(spec.attention_sink - offset, end), i32(0)))
    sinks = hold(T.Select(slid, sink, natural))
    begin = hold(T.Select(slid, start, natural))
    shift = hold(offset + sinks - begin)
    first = hold(window_start(spec, position, shift, begin))
    total = hold(sinks + T.max(end - first, i32(0)))
    return Span(total, end, begin, sinks, hold(first - sinks), offset, shift)


def window_start(spec: KVCacheSpec, position: Expr, shift: Expr, begin: Expr) -> Expr:
    """The first slot after the sinks that a row of this position sees."""
    reach = (spec.sliding_window or 0) - spec.attention_sink
    return T.max(position - shift - (reach - 1), begin)


def layer_start(spec: KVCacheSpec, a: SimpleNamespace, position: Expr | None, offset: Expr) -> Expr:
    """The first slot that a row of this position sees, where slot 0 has position `offset`: 0 in
    layers without the window.

    A node of a tree may come later than its position says: its row sees no key too few.
    """
    first = T.max(position - offset - ((spec.layer_window or 0) - 1), i32(0))
    return hold(T.Select(a.sm_scale < f32(0), first, i32(0)))


def layer_span(
    spec: KVCacheSpec, a: SimpleNamespace, end: Expr, position: Expr | None, offset: Expr
) -> Span:
    """The keys that rows from `position` on may see, where slot 0 has position `offset`."""
    offset = hold(offset)
    first = hold(T.min(layer_start(spec, a, position, offset), end))
    return Span(hold(end - first), end, gap=first, shift=offset)


def page_element(spec: KVCacheSpec, page: Expr, head: Expr, slot: Expr) -> Expr:
    """Index of the first element of the key in `slot` of a page (or of the sequence)."""
    block = (page * (2 * spec.num_kv_heads) + head) * PAGE_SIZE
    return (block + remainder(slot, PAGE_SIZE)) * spec.head_dim


def value_distance(spec: KVCacheSpec) -> int:
    """From a key's element in its page to the value's."""
    return spec.num_kv_heads * PAGE_SIZE * spec.head_dim
