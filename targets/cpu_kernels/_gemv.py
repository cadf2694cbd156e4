"""One row times a weight: kernels that stream the weight once, near the memory's own speed.

- The activations are rearranged once per call to the order in which vectors of packed words deliver their
  elements: lane i of a vector is word i, and field j of all lanes meets `lanes` activations side by side.
- Several weight rows are in flight, so that loads, conversions and the chains of additions overlap and
  every activation vector is loaded once for all of them.
- The scale is applied once per word, to the sum over its fields.
- One parallel loop over blocks of rows; a last block that would overhang is moved back and overlaps (both
  threads then store the same values).
"""

from __future__ import annotations

from mlc_compile.quantization.scheme import QuantScheme
from mlc_compile.targets.cpu_kernels import _vector as vec
from mlc_compile.targets.cpu_kernels._packed import fields, unpack, word_lanes
from mlc_compile.targets.cpu_kernels._vector import Buffer, Expr
from tvm import tirx

F32 = "float32"
import os

AHEAD = int(os.environ.get("AHEAD", "2048"))
ROWS = 4  # weight rows in flight


def block_start(block: Expr, width: int, total: int) -> Expr:
    """First index of a block of `width`; the last one ends at `total` (which is at least `width`)."""
    start = block * vec.i64(width)
    return start if total % width == 0 else vec.bind(tirx.min(start, vec.i64(total - width)))


def _stage(x: Buffer, k: int, padded: int, lanes: int) -> Buffer:
    """Row 0 of x as float32, padded with zeros."""
    staged = vec.buffer((padded,), F32)
    with vec.serial(k // lanes) as i:
        at = i * vec.i64(lanes)
        vec.store(staged, [at], vec.load_float(x, [0, at], lanes), lanes)
    for offset, width in vec.pieces(k, lanes):
        value = vec.load_float(x, [0, offset], width)
        vec.store(staged, [offset], value, width)
    if padded > k:
        with vec.serial(padded - k) as i:
            vec.store(staged, [i + vec.i64(k)], vec.const(0.0, F32, 1), 1)
    return staged


def _by_field(staged: Buffer, scheme: QuantScheme, words: int, lanes: int) -> Buffer:
    """The staged activations in the order of `unpack`: [vector of words][field][lane], times 2^-position."""
    per_word = scheme.elems_per_word
    ordered = vec.buffer((words * per_word,), F32)

    def place(first: Expr, width: int) -> None:
        for field in fields(scheme.bits):
            value = vec.load(staged, [first + vec.i64(field.element)], width, per_word)
            value = value * vec.const(field.descale, F32, width)
            vec.store(ordered, [first + vec.i64(field.element * width)], value, width)

    if words >= lanes:
        with vec.serial(words // lanes) as chunk:
            place(chunk * vec.i64(lanes * per_word), lanes)
    for offset, width in vec.pieces(words, lanes):
        place(vec.i64(offset * per_word), width)
    return ordered


def _row_scales(q_scale: Buffer, row: Expr, word: Expr, scheme: QuantScheme, lanes: int) -> Expr:
    """The scale of each of `lanes` words of one row, from `word` on."""
    group = scheme.words_per_group
    first = tirx.floordiv(word, vec.i64(group))
    if lanes <= group:
        scale = vec.load_float(q_scale, [row, first], 1)
        return vec.splat(scale, lanes)
    count = lanes // group
    scales = vec.load_float(q_scale, [row, first], count)
    if group == 1:
        return scales
    return vec.shuffle([scales], [lane // group for lane in range(lanes)])


def _finish(sums: list[Expr], lanes: int, row: Expr, bias: Buffer | None, out: Buffer) -> None:
    """Add up the lanes of each row's sum, add the bias, store to out[0, row:]."""
    count = len(sums)
    if count == 4 and lanes >= 4:
        groups = [(0, 4, vec.horizontal_sums4(sums, lanes))]
    else:
        groups = [(r, 1, vec.horizontal_sum(total, lanes)) for r, total in enumerate(sums)]
    for r, width, value in groups:
        at = row + vec.i64(r)
        if bias is not None:
            value = value + vec.load_float(bias, [at], width)
        vec.store_float(out, [0, at], value, width)


def packed_nk(
    x: Buffer,
    q_weight: Buffer,
    q_scale: Buffer,
    bias: Buffer | None,
    out: Buffer,
    *,
    shape: tuple[int, int],
    scheme: QuantScheme,
    lanes: int,
) -> None:
    """x [1, K], q_weight [N, words], q_scale [N, groups] -> out [1, N]; shape is (N, K)."""
    n, k = shape
    words = scheme.num_words(k)
    lanes = word_lanes(scheme, lanes)
    per_word = scheme.elems_per_word
    staged = _stage(x, k, words * per_word, lanes)
    ordered = _by_field(staged, scheme, words, lanes)
    rows = min(ROWS, n)
    ahead = -(-AHEAD // (4 * words * rows)) * rows

    with vec.parallel(-(-n // rows)) as block:
        row = block_start(block, rows, n)
        sums = vec.accumulators(rows, lanes)
        for total in sums:
            vec.put(total, vec.const(0.0, F32, lanes), lanes)

        if AHEAD:
            for r in range(rows):
                vec.prefetch(q_scale, [row + vec.i64(r + ahead), vec.i64(0)])

        def add(word: Expr, width: int) -> None:
            if AHEAD:
                for r in range(rows):
                    vec.prefetch(q_weight, [row + vec.i64(r + ahead), word])
            streams = [
                unpack(vec.load(q_weight, [row + vec.i64(r), word], width), scheme, width)
                for r in range(rows)
            ]
            partial: list[Expr] = []
            for field in fields(scheme.bits):
                at = word * vec.i64(per_word) + vec.i64(field.element * width)
                activation = vec.bind(vec.load(ordered, [at], width))
                terms = [next(stream)[1] * activation for stream in streams]
                partial = [
                    vec.bind(term if not partial else partial[r] + term)
                    for r, term in enumerate(terms)
                ]
            for r, total in enumerate(sums):
                scale = _row_scales(q_scale, row + vec.i64(r), word, scheme, width)
                scaled = partial[r] * scale
                if width < lanes:
                    scaled = vec.widen(vec.bind(scaled), width, lanes)
                vec.put(total, vec.get(total, lanes) + scaled, lanes)

        if words >= lanes:
            with vec.serial(words // lanes) as chunk:
                add(chunk * vec.i64(lanes), lanes)
        for offset, width in vec.pieces(words, lanes):
            add(vec.i64(offset), width)
        _finish([vec.get(total, lanes) for total in sums], lanes, row, bias, out)


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
    staged = _stage(x, k, k, lanes)
    rows = min(ROWS, n)
    depth = 2 if k >= 2 * lanes else 1  # vectors of one row per step, each with its own sum

    with vec.parallel(-(-n // rows)) as block:
        row = block_start(block, rows, n)
        sums = [vec.accumulators(depth, lanes) for _ in range(rows)]
        for total in (t for per_row in sums for t in per_row):
            vec.put(total, vec.const(0.0, F32, lanes), lanes)

        def add(at: Expr, width: int, part: int) -> None:
            activation = vec.bind(vec.load(staged, [at], width))
            for r, per_row in enumerate(sums):
                value = vec.load_float(weight, [row + vec.i64(r), at], width)
                term = value * activation
                if width < lanes:
                    term = vec.widen(vec.bind(term), width, lanes)
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
                f + vec.get(per_row[1], lanes) for f, per_row in zip(finals, sums, strict=True)
            ]
        _finish(finals, lanes, row, bias, out)


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
    """x [1, K], q_weight [words, N], q_scale [groups, N] -> out [1, N]; lanes run along N."""
    n, k = shape
    words = scheme.num_words(k)
    per_word, per_group = scheme.elems_per_word, scheme.words_per_group
    staged = _stage(x, k, words * per_word, lanes)
    ordered = _by_field(staged, scheme, words, 1)
    lanes = min(lanes, vec.power_of_two(n))
    # Long runs along N suit the memory, but every core needs some blocks.
    vectors = 4
    while vectors > 1 and n < vectors * lanes * num_cores * 4:
        vectors //= 2
    width = vectors * lanes

    with vec.parallel(-(-n // width)) as block:
        column = block_start(block, width, n)
        sums = vec.accumulators(vectors, lanes)
        partials = vec.accumulators(vectors, lanes)
        for v, total in enumerate(sums):
            first = vec.const(0.0, F32, lanes)
            if bias is not None:
                first = vec.load_float(bias, [column + vec.i64(v * lanes)], lanes)
            vec.put(total, first, lanes)
        with vec.serial(words // per_group) as group:
            for partial in partials:
                vec.put(partial, vec.const(0.0, F32, lanes), lanes)
            with vec.serial(per_group) as w:
                word = vec.bind(group * vec.i64(per_group) + w)
                streams = [
                    unpack(
                        vec.load(q_weight, [word, column + vec.i64(v * lanes)], lanes),
                        scheme,
                        lanes,
                    )
                    for v in range(vectors)
                ]
                for field in fields(scheme.bits):
                    at = word * vec.i64(per_word) + vec.i64(field.element)
                    activation = vec.bind(vec.splat(vec.load(ordered, [at], 1), lanes))
                    for partial, stream in zip(partials, streams, strict=True):
                        term = next(stream)[1] * activation
                        vec.put(partial, vec.get(partial, lanes) + term, lanes)
            for v, (total, partial) in enumerate(zip(sums, partials, strict=True)):
                scale = vec.load_float(q_scale, [group, column + vec.i64(v * lanes)], lanes)
                scaled = vec.get(partial, lanes) * scale
                vec.put(total, vec.get(total, lanes) + scaled, lanes)
        for v, total in enumerate(sums):
            vec.store_float(out, [0, column + vec.i64(v * lanes)], vec.get(total, lanes), lanes)
