"""One row times a weight: kernels that stream the weight once, near the memory's own speed.

- The activations are rearranged once per call to the order in which vectors of packed words deliver
  their elements: lane i of a vector is word i, and field j of all lanes meets as many activations
  side by side.
- A word's sum is sum(q * x) - zero * sum(x). The second term's sum does not depend on the weight
  row: it is prepared once, with a constant zero point, and is where each sum starts, so no field
  needs a subtraction. The sums are short (one word), which keeps the float32 error at that of the
  direct form, within a factor of two.
- The scale is applied once per word, to that sum.
- Several weight rows are in flight, so that loads, conversions and the chains of additions overlap
  and every activation vector is loaded once for all of them.
- Hardware prefetchers stop at page ends and see several short streams here; explicit prefetching
  some kilobytes ahead is worth a third of the speed once the weight is not in the cache.
- One parallel loop over blocks of rows; a last block that would overhang is moved back and overlaps
  (both threads then store the same values).
"""

from __future__ import annotations

from tvm import tirx

from mlc_compile.quantization.scheme import QuantScheme
from mlc_compile.targets.codes import constant_zero
from mlc_compile.targets.cpu_kernels import _vector as vec
from mlc_compile.targets.cpu_kernels._packed import Groups, raw_places, unpack_raw, word_lanes
from mlc_compile.targets.cpu_kernels._vector import F32, Buffer, Expr

ROWS = 4  # weight rows in flight
AHEAD = 8192  # bytes of weight between the use of a cache line and its prefetch


def block_start(block: Expr, width: int, total: int) -> Expr:
    """First index of a block of `width`; the last one ends at `total` (at least `width`)."""
    start = block * vec.i64(width)
    return start if total % width == 0 else vec.bind(tirx.min(start, vec.i64(total - width)))


def _after(base: Expr | None, index: Expr | int) -> Expr | int:
    """`index`, counted from `base` if there is one."""
    return index if base is None else base + (vec.i64(index) if isinstance(index, int) else index)


def stage(
    x: Buffer, row: Expr | int, k: int, padded: int, lanes: int, into: Buffer, base: Expr | None
) -> None:
    """A row of x as float32, padded with zeros, to `into` from `base` on (None: its begin)."""
    if k >= lanes:
        with vec.serial(k // lanes) as i:
            at = i * vec.i64(lanes)
            vec.store(into, [_after(base, at)], vec.load_float(x, [row, at], lanes), lanes)
    for offset, width in vec.pieces(k, lanes):
        vec.store(into, [_after(base, offset)], vec.load_float(x, [row, offset], width), width)
    if padded > k:
        with vec.serial(padded - k) as i:
            vec.store(into, [_after(base, i + vec.i64(k))], vec.const(0.0, F32, 1), 1)


def slots(scheme: QuantScheme, words: int) -> int:
    """Elements of a row that `by_field` has rearranged."""
    return words * (scheme.elems_per_word + 1)


def by_field(
    staged: Buffer, scheme: QuantScheme, words: int, lanes: int, into: Buffer, base: Expr | None
) -> None:
    """The staged activations in the order of `unpack_raw`, to `into` from `base` on.

    For every vector of words: one vector per field, times 2^-position, then one of -zero * sum(x),
    where zero points are of each group -sum(x).
    """
    per_word = scheme.elems_per_word

    def place(word: Expr, width: int) -> None:
        source = vec.bind(word * vec.i64(per_word))
        target = vec.bind(_after(base, word * vec.i64(per_word + 1)))
        total = None
        for field in raw_places(scheme):
            at = source + vec.i64(field.element)
            value = vec.bind(vec.load(staged, [at], width, per_word))
            total = value if total is None else vec.bind(total + value)
            value = value * vec.const(field.descale, F32, width)
            vec.store(into, [target + vec.i64(field.element * width)], value, width)
        zero = constant_zero(scheme)
        total = total * vec.const(-1.0 if zero is None else -float(zero), F32, width)
        vec.store(into, [target + vec.i64(per_word * width)], total, width)

    if words >= lanes:
        with vec.serial(words // lanes) as chunk:
            place(chunk * vec.i64(lanes), lanes)
    for offset, width in vec.pieces(words, lanes):
        place(vec.i64(offset), width)


def _staged(x: Buffer, k: int, padded: int, lanes: int) -> Buffer:
    """Row 0 of x; see `stage`."""
    staged = vec.buffer((padded,), F32)
    stage(x, 0, k, padded, lanes, staged, None)
    return staged


def _ordered(staged: Buffer, scheme: QuantScheme, words: int, lanes: int) -> Buffer:
    """See `by_field`."""
    ordered = vec.buffer((slots(scheme, words),), F32)
    by_field(staged, scheme, words, lanes, ordered, None)
    return ordered


def finish(
    sums: list[Expr],
    lanes: int,
    row: Expr,
    bias: Buffer | None,
    out: Buffer,
    out_row: Expr | int = 0,
) -> None:
    """Add up the lanes of each row's sum, add the bias, store to out[out_row, row:]."""
    if len(sums) == 4 and lanes >= 4:
        groups = [(0, 4, vec.horizontal_sums4(sums, lanes))]
    else:
        groups = [(r, 1, vec.horizontal_sum(total, lanes)) for r, total in enumerate(sums)]
    for r, width, value in groups:
        at = row + vec.i64(r)
        if bias is not None:
            value = value + vec.load_float(bias, [at], width)
        vec.store_float(out, [out_row, at], value, width)


def packed_sums(
    ordered: Buffer,
    base: Expr | None,
    weight: tuple[Buffer, ...],
    row: Expr,
    *,
    rows: int,
    words: int,
    scheme: QuantScheme,
    lanes: int,
) -> list[Expr]:
    """The products of `rows` weight rows from `row` on with what `by_field` put at `base` of
    `ordered`: a vector for each, whose lanes are still to be added."""
    q_weight, q_scale, *_ = weight
    groups, zero = Groups(weight, scheme), constant_zero(scheme)
    per_word = scheme.elems_per_word
    ahead = -(-AHEAD // (4 * words * rows)) * rows  # AHEAD in whole blocks of rows
    sums = vec.accumulators(rows, lanes)
    for r, total in enumerate(sums):
        vec.put(total, vec.const(0.0, F32, lanes), lanes)
        vec.prefetch(q_scale, [row + vec.i64(r + ahead), 0])

    def add(word: Expr, width: int) -> None:
        """`width` words of every row; narrow ones of several rows share a vector."""
        for r in range(rows):
            vec.prefetch(q_weight, [row + vec.i64(r + ahead), word])
        share = lanes // width if rows % (lanes // width) == 0 else 1
        full = width * share
        batches = [range(r, r + share) for r in range(0, rows, share)]
        first = vec.bind(_after(base, word * vec.i64(per_word + 1)))

        def activations(slot: int) -> Expr:
            value = vec.load(ordered, [first + vec.i64(slot * width)], width)
            return vec.bind(vec.concat([value] * share, width))

        streams = []
        for batch in batches:
            parts = [vec.load(q_weight, [row + vec.i64(r), word], width) for r in batch]
            streams.append(unpack_raw(vec.concat(parts, width), scheme, full))
        per_row = [groups.of_words(row + vec.i64(r), word, width) for r in range(rows)]
        start = vec.const(0.0, F32, full) if zero == 0 else activations(per_word)
        partial = [start] * len(batches)
        if zero is None:
            zeros = [vec.concat([per_row[r][1] for r in batch], width) for batch in batches]
            partial = [vec.bind(start * each) for each in zeros]
        for field in raw_places(scheme):
            activation = activations(field.element)
            partial = [
                vec.bind(value + next(stream)[1] * activation)
                for value, stream in zip(partial, streams, strict=True)
            ]
        for batch, value in zip(batches, partial, strict=True):
            parts = [per_row[r][0] for r in batch]
            scaled = vec.bind(value * vec.concat(parts, width))
            for i, r in enumerate(batch):
                part = vec.widen(scaled, full, i * width, width, lanes)
                vec.put(sums[r], vec.get(sums[r], lanes) + part, lanes)

    if words >= lanes:
        with vec.serial(words // lanes) as chunk:
            add(chunk * vec.i64(lanes), lanes)
    for offset, width in vec.pieces(words, lanes):
        add(vec.i64(offset), width)
    return [vec.get(total, lanes) for total in sums]


def packed_nk(
    x: Buffer,
    weight: tuple[Buffer, ...],
    bias: Buffer | None,
    out: Buffer,
    *,
    shape: tuple[int, int],
    scheme: QuantScheme,
    lanes: int,
) -> None:
    """x [1, K], a weight packed in layout "NK" -> out [1, N]; shape is (N, K)."""
    n, k = shape
    words = scheme.num_words(k)
    lanes = word_lanes(scheme, lanes, words)
    staged = _staged(x, k, words * scheme.elems_per_word, lanes)
    ordered = _ordered(staged, scheme, words, lanes)
    rows = min(ROWS, n)
    with vec.parallel(-(-n // rows)) as block:
        row = block_start(block, rows, n)
        sums = packed_sums(
            ordered,
            None,
            weight,
            row,
            rows=rows,
            words=words,
            scheme=scheme,
            lanes=lanes,
        )
        finish(sums, lanes, row, bias, out)


def plain_sums(
    staged: Buffer, base: Expr | None, weight: Buffer, row: Expr, *, rows: int, k: int, lanes: int
) -> list[Expr]:
    """As `packed_sums`, of a plain weight and what `stage` put at `base` of `staged`."""
    depth = 2 if k >= 2 * lanes else 1  # vectors of one row per step, each with its own sum
    bits = int(str(weight.dtype).removeprefix("b").removeprefix("float"))
    ahead = -(-AHEAD * 8 // (bits * k * rows)) * rows
    sums = [vec.accumulators(depth, lanes) for _ in range(rows)]
    for total in (t for per_row in sums for t in per_row):
        vec.put(total, vec.const(0.0, F32, lanes), lanes)

    def add(at: Expr, width: int, part: int) -> None:
        activation = vec.bind(vec.load(staged, [_after(base, at)], width))
        for r, per_row in enumerate(sums):
            if part * lanes * bits % 512 == 0:  # once per cache line
                vec.prefetch(weight, [row + vec.i64(r + ahead), at])
            term = vec.load_float(weight, [row + vec.i64(r), at], width) * activation
            if width < lanes:
                term = vec.widen(vec.bind(term), width, 0, width, lanes)
            vec.put(per_row[part], vec.get(per_row[part], lanes) + term, lanes)

    step = depth * lanes
    if k >= step:
        with vec.serial(k // step) as i:
            for part in range(depth):
                add(i * vec.i64(step) + vec.i64(part * lanes), lanes, part)
    left = k - k % step
    if k - left >= lanes:
        add(vec.i64(left), lanes, 0)
    for offset, width in vec.pieces(k, lanes):
        add(vec.i64(offset), width, 0)
    finals = [vec.get(per_row[0], lanes) for per_row in sums]
    if depth == 2:
        finals = [
            first + vec.get(per_row[1], lanes) for first, per_row in zip(finals, sums, strict=True)
        ]
    return finals


def plain_nk(
    x: Buffer,
    weight: Buffer,
    bias: Buffer | None,
    out: Buffer,
    *,
    shape: tuple[int, int],
    lanes: int,
) -> None:
    """x [1, K], weight [N, K] -> out [1, N]; shape is (N, K)."""
    n, k = shape
    staged = _staged(x, k, k, lanes)
    rows = min(ROWS, n)
    with vec.parallel(-(-n // rows)) as block:
        row = block_start(block, rows, n)
        sums = plain_sums(staged, None, weight, row, rows=rows, k=k, lanes=lanes)
        finish(sums, lanes, row, bias, out)


def packed_kn(
    x: Buffer,
    q_weight: Buffer,
    q_scale: Buffer,
    bias: Buffer | None,
    out: Buffer,
    *,
    shape: tuple[int, int],
    scheme: QuantScheme,
    lanes: int,
    num_cores: int,
) -> None:
    """x [1, K], q_weight [words, N], q_scale [groups, N] -> out [1, N]; lanes run along N. Codes
    are symmetric."""
    n, k = shape
    words = scheme.num_words(k)
    per_word, per_group = scheme.elems_per_word, scheme.words_per_group
    staged = _staged(x, k, words * per_word, lanes)
    ordered = _ordered(staged, scheme, words, 1)
    lanes = min(lanes, vec.power_of_two(n))
    # Long runs along N suit the memory, but every core needs some blocks.
    vectors = 4
    while vectors > 1 and n < vectors * lanes * num_cores * 4:
        vectors //= 2
    width = vectors * lanes
    ahead = 2 * per_group

    with vec.parallel(-(-n // width)) as block:
        column = block_start(block, width, n)
        columns = [column + vec.i64(v * lanes) for v in range(vectors)]
        sums = vec.accumulators(vectors, lanes)
        partials = vec.accumulators(vectors, lanes)
        for total, at in zip(sums, columns, strict=True):
            start = vec.const(0.0, F32, lanes)
            if bias is not None:
                start = vec.load_float(bias, [at], lanes)
            vec.put(total, start, lanes)
        with vec.serial(words // per_group) as group:
            for partial in partials:
                vec.put(partial, vec.const(0.0, F32, lanes), lanes)
            with vec.serial(per_group) as w:
                word = vec.bind(group * vec.i64(per_group) + w)
                slots = vec.bind(word * vec.i64(per_word + 1))

                def activations(slot: int) -> Expr:
                    value = vec.load(ordered, [slots + vec.i64(slot)], 1)
                    return vec.bind(vec.splat(value, lanes))

                start = activations(per_word)
                streams = []
                for partial, at in zip(partials, columns, strict=True):
                    vec.prefetch(q_weight, [word + vec.i64(ahead), at])
                    streams.append(unpack_raw(vec.load(q_weight, [word, at], lanes), scheme, lanes))
                    vec.put(partial, vec.get(partial, lanes) + start, lanes)
                for field in raw_places(scheme):
                    activation = activations(field.element)
                    for partial, stream in zip(partials, streams, strict=True):
                        term = next(stream)[1] * activation
                        vec.put(partial, vec.get(partial, lanes) + term, lanes)
            for total, partial, at in zip(sums, partials, columns, strict=True):
                scale = vec.load_float(q_scale, [group, at], lanes)
                scaled = vec.get(partial, lanes) * scale
                vec.put(total, vec.get(total, lanes) + scaled, lanes)
        for total, at in zip(sums, columns, strict=True):
            vec.store_float(out, [0, at], vec.get(total, lanes), lanes)
