"""The sampling helpers' kernels for the CPU (what they compute: mlc_compile/nn/sampling.py).

Notable features
- Probabilities are summed in float64: at 150 thousand ids a float32 running sum is off by more
  than many a token's share.
- argsort is a radix sort, renormalize_by_top_p a radix select weighted by mass: both linear.
- Rows of a batch run in parallel, single rows on the calling thread.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from mlc_compile.targets.cpu_kernels import _vector as vec
from mlc_compile.targets.cpu_kernels._vector import Buffer, Expr
from mlc_compile.targets.cpu_kernels.elementwise import (
    F32,
    Argument,
    build_kernel,
    copy_row,
    exp,
    for_rows,
    for_vectors,
    hold,
    symbol,
)

F64 = "float64"
I32 = "int32"
U32 = "uint32"
GREEDY_TEMPERATURE = 1e-5
LOWEST = -3.4028234663852886e38  # the lowest finite float32
# Elements summed in float32 lanes before the sum goes to float64.
SUM_BLOCK = 2048
SIGN_BIT = 0x80000000
# Digits of a 32-bit sort key from the lowest: (first bit, bits).
SORT_DIGITS = ((0, 11), (11, 11), (22, 10))
# Below this mass what is left of the model's distribution is rounding, as in MLC.
REJECTION_MASS = 1e-7


class _Cell:
    """A scalar variable of the emitted code."""

    def __init__(self, dtype: str, value: Expr | float | int) -> None:
        self._dtype = dtype
        self._buffer = T.alloc_buffer((1,), dtype, layout=None)
        self.set(value)

    def set(self, value: Expr | float | int) -> None:
        constant = isinstance(value, int | float)
        T.buffer_store(self._buffer, tirx.const(value, self._dtype) if constant else value, [0])

    @property
    def value(self) -> Expr:
        return tirx.BufferLoad(self._buffer, [vec.i64(0)])


def _at(buffer: Buffer, *index: Expr | int) -> Expr:
    return vec.load(buffer, index, 1)


def _put(buffer: Buffer, index: Sequence[Expr | int], value: Expr) -> None:
    vec.store(buffer, index, value, 1)


def _index(value: Expr) -> Expr:
    """An int32 element as an int64 index, bound."""
    return vec.bind(vec.cast(value, "int64", 1))


def _f64(value: Expr) -> Expr:
    return vec.cast(value, F64, 1)


def _const(value: float | int, dtype: str) -> Expr:
    return tirx.const(value, dtype)


def _either(condition: Expr, then: Callable[[], None], otherwise: Callable[[], None]) -> None:
    with T.If(condition):
        with T.Then():
            then()
        with T.Else():
            otherwise()


def _sum(read: Callable[[Expr, int], Expr], width: int, lanes: int) -> Expr:
    """float64 sum of `width` float32 elements; `read` is called once for each vector."""
    total = _Cell(F64, 0.0)
    (partial,) = vec.accumulators(1, lanes)
    per_block = max(1, SUM_BLOCK // lanes)
    block = per_block * lanes

    def add_vectors(count: int, first: Expr) -> None:
        vec.put(partial, vec.const(0, F32, lanes), lanes)
        with vec.serial(count) as j:
            value = read(vec.bind(first + j * vec.i64(lanes)), lanes)
            vec.put(partial, vec.get(partial, lanes) + value, lanes)
        total.set(total.value + _f64(vec.horizontal_sum(vec.get(partial, lanes), lanes)))

    if width >= block:
        with vec.serial(width // block) as i:
            add_vectors(per_block, vec.bind(i * vec.i64(block)))
    if width % block >= lanes:
        add_vectors(width % block // lanes, vec.i64(width // block * block))
    for offset, narrow in vec.pieces(width, lanes):
        total.set(total.value + _f64(vec.horizontal_sum(read(vec.i64(offset), narrow), narrow)))
    return vec.bind(total.value)


def _max(read: Callable[[Expr, int], Expr], width: int, lanes: int) -> Expr:
    """The largest of `width` float32 elements, at least LOWEST; NaNs are passed over."""
    largest = _Cell(F32, LOWEST)
    (running,) = vec.accumulators(1, lanes)
    vec.put(running, vec.const(LOWEST, F32, lanes), lanes)

    def vector(offset: Expr, narrow: int) -> None:
        value = hold(read(offset, narrow), narrow)
        if narrow == lanes:
            old = vec.bind(vec.get(running, lanes))
            vec.put(running, tirx.Select(value > old, value, old), lanes)
            return
        for lane in range(narrow):
            element = vec.bind(vec.shuffle([value], [lane]) if narrow > 1 else value)
            largest.set(tirx.Select(element > largest.value, element, largest.value))

    for_vectors(width, lanes, vector)
    if lanes > 1:
        with vec.serial(lanes) as lane_index:
            element = vec.bind(_at(running, lane_index))
            largest.set(tirx.Select(element > largest.value, element, largest.value))
    else:
        element = vec.bind(_at(running, 0))
        largest.set(tirx.Select(element > largest.value, element, largest.value))
    return vec.bind(largest.value)


def softmax_with_temperature(vocab: int, active: int, lanes: int) -> tirx.PrimFunc:
    """(logits[b, 1, V], temperature[b]) -> probs[b, 1, V]."""
    b = symbol("batch_size")

    def body(logits: Buffer, temperature: Buffer, probs: Buffer) -> None:
        def row(i: Expr) -> None:
            def logit(offset: Expr, narrow: int) -> Expr:
                return vec.load(logits, [i, 0, offset], narrow)

            def fill_zero(first: int, end: int) -> None:
                def vector(offset: Expr, narrow: int) -> None:
                    zero = vec.const(0, F32, narrow)
                    vec.store(probs, [i, 0, offset + vec.i64(first)], zero, narrow)

                for_vectors(end - first, lanes, vector)

            largest = _max(logit, active, lanes)

            def greedy() -> None:
                found = _Cell("int64", 0)
                searching = found.value < vec.i64(active - 1)
                with T.While(tirx.all(searching, _at(logits, i, 0, found.value) != largest)):
                    found.set(found.value + vec.i64(1))
                fill_zero(0, active)
                _put(probs, [i, 0, found.value], _const(1.0, F32))

            def soft() -> None:
                inverse = vec.bind(_const(1.0, F32) / _at(temperature, i))

                def exponential(offset: Expr, narrow: int) -> Expr:
                    shifted = logit(offset, narrow) - vec.splat(largest, narrow)
                    value = hold(exp(shifted * vec.splat(inverse, narrow), narrow), narrow)
                    vec.store(probs, [i, 0, offset], value, narrow)
                    return value

                total = _sum(exponential, active, lanes)
                share = vec.bind(vec.cast(_const(1.0, F64) / total, F32, 1))

                def scale(offset: Expr, narrow: int) -> None:
                    value = vec.load(probs, [i, 0, offset], narrow) * vec.splat(share, narrow)
                    vec.store(probs, [i, 0, offset], value, narrow)

                for_vectors(active, lanes, scale)

            _either(_at(temperature, i) > _const(GREEDY_TEMPERATURE, F32), soft, greedy)
            if active < vocab:
                fill_zero(active, vocab)

        for_rows(b, 4 * vocab, row)

    shape = ((b, 1, vocab), F32)
    arguments = [("logits", *shape), ("temperature", (b,), F32), ("probs", *shape)]
    return build_kernel("softmax_with_temperature", arguments, body)


def apply_logit_bias_inplace(vocab: int) -> tirx.PrimFunc:
    """(logits[b, V], pos2seq_id[n], token_ids[n], logit_bias[n]); one thread: ids may repeat."""
    b, n = symbol("batch_size"), symbol("num_tokens")

    def body(logits: Buffer, pos2seq: Buffer, tokens: Buffer, bias: Buffer) -> None:
        with vec.serial(n) as i:
            row, token = _index(_at(pos2seq, i)), _index(_at(tokens, i))
            _put(logits, [row, token], _at(logits, row, token) + _at(bias, i))

    arguments = [
        ("logits", (b, vocab), F32),
        ("pos2seq_id", (n,), I32),
        ("token_ids", (n,), I32),
        ("logit_bias", (n,), F32),
    ]
    return build_kernel("apply_logit_bias_inplace", arguments, body, private=False)


def apply_penalty_inplace(vocab: int) -> tirx.PrimFunc:
    """(logits[b, V], seq_ids[s], pos2seq_id[n], token_ids[n], token_cnt[n], penalties[s, 3])."""
    b, s, n = symbol("batch_size"), symbol("num_seqs"), symbol("num_tokens")

    def body(
        logits: Buffer,
        seq_ids: Buffer,
        pos2seq: Buffer,
        tokens: Buffer,
        counts: Buffer,
        penalties: Buffer,
    ) -> None:
        with vec.serial(n) as i:
            position, token = _index(_at(pos2seq, i)), _index(_at(tokens, i))
            row = _index(_at(seq_ids, position))
            presence, frequency, repetition = (_at(penalties, position, k) for k in range(3))
            subtracted = presence + vec.cast(_at(counts, i), F32, 1) * frequency
            logit = hold(_at(logits, row, token) - subtracted, 1)
            negative = logit < _const(0.0, F32)
            _put(
                logits,
                [row, token],
                tirx.Select(negative, logit * repetition, logit / repetition),
            )

    arguments = [
        ("logits", (b, vocab), F32),
        ("seq_ids", (s,), I32),
        ("pos2seq_id", (n,), I32),
        ("token_ids", (n,), I32),
        ("token_cnt", (n,), I32),
        ("penalties", (s, 3), F32),
    ]
    return build_kernel("apply_penalty_inplace", arguments, body, private=False)


def apply_bitmask_inplace(vocab: int, lanes: int) -> tirx.PrimFunc:
    """(logits[b, V], seq_ids[s], bitmask[b, ceil(V / 32)])."""
    b, s = symbol("batch_size"), symbol("num_seqs")
    lanes = min(lanes, 32)

    def body(logits: Buffer, seq_ids: Buffer, bitmask: Buffer) -> None:
        def row(i: Expr) -> None:
            sequence = _index(_at(seq_ids, i))

            def mask_word(word: Expr, width: int) -> None:
                bits = vec.bind(_at(bitmask, sequence, word))
                first = vec.bind(word * vec.i64(32))

                with T.If(bits != _const(-1, I32)), T.Then():
                    pieces = [(offset, lanes) for offset in range(0, width - lanes + 1, lanes)]
                    for offset, narrow in [*pieces, *vec.pieces(width, lanes)]:
                        at = [sequence, first + vec.i64(offset)]
                        lane = _const(offset, I32)
                        shift = tirx.Ramp(lane, _const(1, I32), narrow) if narrow > 1 else lane
                        one = vec.const(1, I32, narrow)
                        bit = tirx.bitwise_and(
                            tirx.shift_right(vec.splat(bits, narrow), shift), one
                        )
                        lowest = vec.const(LOWEST, F32, narrow)
                        value = tirx.Select(bit == one, vec.load(logits, at, narrow), lowest)
                        vec.store(logits, at, value, narrow)

            if vocab >= 32:
                with vec.serial(vocab // 32) as word:
                    mask_word(word, 32)
            if vocab % 32:
                mask_word(vec.i64(vocab // 32), vocab % 32)

        for_rows(s, vocab, row)

    arguments = [
        ("logits", (b, vocab), F32),
        ("seq_ids", (s,), I32),
        ("bitmask", (b, (vocab + 31) // 32), I32),
    ]
    return build_kernel("apply_bitmask_inplace", arguments, body, private=False)


def _descending_key(value: Expr) -> Expr:
    """uint32 whose ascending order is the float's descending one; -0 and 0 are equal."""
    bits = vec.bind(vec.bitcast(value, U32, 1))
    negative = bits > _const(SIGN_BIT, U32)
    return tirx.Select(
        negative,
        bits,
        tirx.bitwise_xor(
            tirx.bitwise_and(bits, _const(SIGN_BIT - 1, U32)), _const(SIGN_BIT - 1, U32)
        ),
    )


def _digit(key: Expr, first_bit: int, bits: int) -> Expr:
    shifted = tirx.shift_right(key, _const(first_bit, U32)) if first_bit else key
    return _index(tirx.bitwise_and(shifted, _const((1 << bits) - 1, U32)))


def argsort_probs(vocab: int) -> tirx.PrimFunc:
    """(probs[b, V]) -> (sorted_probs[b, V], sorted_indices[b, V]), descending and stable.

    A least-significant-digit radix sort. Its passes go probs -> out -> spare -> out, so that one
    spare row (8 V bytes a thread) is enough.
    """
    b = symbol("batch_size")

    def body(probs: Buffer, sorted_probs: Buffer, sorted_indices: Buffer) -> None:
        def row(i: Expr) -> None:
            spare_probs = vec.buffer((vocab,), F32)
            spare_indices = vec.buffer((vocab,), I32)
            starts = [vec.buffer((1 << bits,), I32) for _, bits in SORT_DIGITS]

            for table, (_, bits) in zip(starts, SORT_DIGITS, strict=True):
                with vec.serial(1 << bits) as d:
                    _put(table, [d], _const(0, I32))
            with vec.serial(vocab) as j:
                key = vec.bind(_descending_key(hold(_at(probs, i, j), 1)))
                for table, (first_bit, bits) in zip(starts, SORT_DIGITS, strict=True):
                    digit = _digit(key, first_bit, bits)
                    _put(table, [digit], _at(table, digit) + _const(1, I32))
            for table, (_, bits) in zip(starts, SORT_DIGITS, strict=True):
                start = _Cell(I32, 0)
                with vec.serial(1 << bits) as d:
                    count = vec.bind(_at(table, d))
                    _put(table, [d], start.value)
                    start.set(start.value + count)

            out = (lambda j: _at(sorted_probs, i, j), lambda j: _at(sorted_indices, i, j))
            spare = (lambda j: _at(spare_probs, j), lambda j: _at(spare_indices, j))
            given = (lambda j: _at(probs, i, j), lambda j: vec.cast(j, I32, 1))

            def to_out(j: Expr, value: Expr, token: Expr) -> None:
                _put(sorted_probs, [i, j], value)
                _put(sorted_indices, [i, j], token)

            def to_spare(j: Expr, value: Expr, token: Expr) -> None:
                _put(spare_probs, [j], value)
                _put(spare_indices, [j], token)

            passes = ((given, to_out), (out, to_spare), (spare, to_out))
            for table, digit_bits, (source, target) in zip(
                starts, SORT_DIGITS, passes, strict=True
            ):
                with vec.serial(vocab) as j:
                    value = hold(source[0](j), 1)
                    digit = _digit(_descending_key(value), *digit_bits)
                    place = vec.bind(_at(table, digit))
                    _put(table, [digit], place + _const(1, I32))
                    target(_index(place), value, source[1](j))

        for_rows(b, 32 * vocab, row)

    arguments = [
        ("probs", (b, vocab), F32),
        ("sorted_probs", (b, vocab), F32),
        ("sorted_indices", (b, vocab), I32),
    ]
    return build_kernel("argsort_probs", arguments, body)


def _limit(top_p: Expr) -> Expr:
    """top_p as a mass to reach, float64; from 1 on it is out of reach, so that nothing is cut."""
    whole = top_p >= _const(1.0, F32)
    return vec.bind(tirx.Select(whole, _const(float("inf"), F64), _f64(top_p)))


def sample_with_top_p(vocab: int) -> tirx.PrimFunc:
    """(sorted_probs, sorted_indices, uniform[n], sample_indices[n], top_p[b]) -> sampled[n]."""
    b, n = symbol("batch_size"), symbol("num_samples")

    def body(
        sorted_probs: Buffer,
        sorted_indices: Buffer,
        uniform: Buffer,
        sample_indices: Buffer,
        top_p: Buffer,
        sampled: Buffer,
    ) -> None:
        def sample(i: Expr) -> None:
            row = _index(_at(sample_indices, i))
            limit = _limit(_at(top_p, row))
            mass = _Cell(F64, _f64(_at(sorted_probs, row, 0)))
            count = _Cell("int64", 1)
            with T.While(tirx.all(count.value < vec.i64(vocab), mass.value < limit)):
                mass.set(mass.value + _f64(_at(sorted_probs, row, count.value)))
                count.set(count.value + vec.i64(1))
            wanted = vec.bind(_f64(_at(uniform, i)) * mass.value)
            # The same additions again, so that the last sum is exactly `mass`.
            reached = _Cell(F64, _f64(_at(sorted_probs, row, 0)))
            rank = _Cell("int64", 0)
            with T.While(tirx.all(rank.value < count.value - vec.i64(1), reached.value <= wanted)):
                rank.set(rank.value + vec.i64(1))
                reached.set(reached.value + _f64(_at(sorted_probs, row, rank.value)))
            _put(sampled, [i], _at(sorted_indices, row, rank.value))

        for_rows(n, vocab, sample)

    arguments = [
        ("sorted_probs", (b, vocab), F32),
        ("sorted_indices", (b, vocab), I32),
        ("uniform_samples", (n,), F32),
        ("sample_indices", (n,), I32),
        ("top_p", (b,), F32),
        ("sampled", (n,), I32),
    ]
    return build_kernel("sample_with_top_p", arguments, body)


def multinomial_from_uniform(vocab: int) -> tirx.PrimFunc:
    """(probs[b, V], uniform[n], sample_indices[n]) -> sampled[n].

    When rounding leaves the sum of a row below uniform: the last id with a positive probability.
    """
    b, n = symbol("batch_size"), symbol("num_samples")

    def body(probs: Buffer, uniform: Buffer, sample_indices: Buffer, sampled: Buffer) -> None:
        def sample(i: Expr) -> None:
            row = _index(_at(sample_indices, i))
            wanted = vec.bind(_f64(_at(uniform, i)))
            reached, last = _Cell(F64, 0.0), _Cell("int64", 0)
            token = _Cell("int64", 0)
            with T.While(tirx.all(token.value < vec.i64(vocab), reached.value <= wanted)):
                probability = hold(_at(probs, row, token.value), 1)
                reached.set(reached.value + _f64(probability))
                positive = probability > _const(0.0, F32)
                last.set(tirx.Select(positive, token.value, last.value))
                token.set(token.value + vec.i64(1))
            _put(sampled, [i], vec.cast(last.value, I32, 1))

        for_rows(n, vocab, sample)

    arguments = [
        ("probs", (b, vocab), F32),
        ("uniform_samples", (n,), F32),
        ("sample_indices", (n,), I32),
        ("sampled", (n,), I32),
    ]
    return build_kernel("multinomial_from_uniform", arguments, body)


def sampler_take_probs(vocab: int) -> tirx.PrimFunc:
    """(unsorted_probs, sorted_indices, sample_indices[n], sampling_results[n], offsets[p])
    -> (sampled_values[n], top_prob_probs[p], top_prob_indices[p])."""
    b, n, p = symbol("batch_size"), symbol("num_samples"), symbol("num_positions")

    def body(
        probs: Buffer,
        sorted_indices: Buffer,
        sample_indices: Buffer,
        results: Buffer,
        offsets: Buffer,
        sampled_values: Buffer,
        top_probs: Buffer,
        top_indices: Buffer,
    ) -> None:
        with vec.serial(n) as i:
            row, token = _index(_at(sample_indices, i)), _index(_at(results, i))
            _put(sampled_values, [i], _at(probs, row, token))
        with vec.serial(p) as i:
            offset = _index(_at(offsets, i))
            row = vec.bind(tirx.truncdiv(offset, vec.i64(vocab)))
            rank = vec.bind(tirx.truncmod(offset, vec.i64(vocab)))
            top = vec.bind(_at(sorted_indices, row, rank))
            _put(top_indices, [i], top)
            _put(top_probs, [i], _at(probs, row, _index(top)))

    arguments = [
        ("unsorted_probs", (b, vocab), F32),
        ("sorted_indices", (b, vocab), I32),
        ("sample_indices", (n,), I32),
        ("sampling_results", (n,), I32),
        ("top_prob_offsets", (p,), I32),
        ("sampled_values", (n,), F32),
        ("top_prob_probs", (p,), F32),
        ("top_prob_indices", (p,), I32),
    ]
    return build_kernel("sampler_take_probs", arguments, body)


def renormalize_by_top_p(vocab: int, lanes: int) -> tirx.PrimFunc:
    """(probs[b, V], top_p[b], init_pivots[b, 3]) -> renormalized[b, V]; init_pivots is unused.

    The bits of a positive float order as the float does. Three rounds of summing the mass by the
    next digit of the bits, from the highest, find the pivot exactly.
    """
    b = symbol("batch_size")

    def body(probs: Buffer, top_p: Buffer, _init_pivots: Buffer, out: Buffer) -> None:
        def row(i: Expr) -> None:
            limit = _limit(_at(top_p, i))
            mass = vec.buffer((1 << 11,), F64)
            above = _Cell(F64, 0.0)  # mass of everything larger than the current digit
            kept = _Cell(F64, 0.0)  # `above` plus the mass of the current digit
            prefix = _Cell(U32, 0)
            for first_bit, bits in ((22, 10), (11, 11), (0, 11)):
                with vec.serial(1 << bits) as d:
                    _put(mass, [d], _const(0.0, F64))
                with vec.serial(vocab) as j:
                    value = hold(_at(probs, i, j), 1)
                    value_bits = vec.bind(vec.bitcast(value, U32, 1))
                    # Level 0 has no digits above: 32 bits are not a legal shift, so 31 it is, and
                    # probabilities have no sign.
                    above_digit = _const(min(first_bit + bits, 31), U32)
                    higher = tirx.shift_right(value_bits, above_digit)
                    with T.If(higher == prefix.value), T.Then():
                        digit = _digit(value_bits, first_bit, bits)
                        _put(mass, [digit], _at(mass, digit) + _f64(value))
                digit_cell, chosen = _Cell("int64", (1 << bits) - 1), _Cell("int64", -1)
                kept.set(above.value)
                unsatisfied = tirx.any(kept.value < limit, chosen.value < vec.i64(0))
                with T.While(tirx.all(digit_cell.value >= vec.i64(0), unsatisfied)):
                    digit_mass = vec.bind(_at(mass, digit_cell.value))
                    with T.If(digit_mass > _const(0.0, F64)), T.Then():
                        chosen.set(digit_cell.value)
                        above.set(kept.value)
                        kept.set(kept.value + digit_mass)
                    digit_cell.set(digit_cell.value - vec.i64(1))
                low = vec.cast(tirx.max(chosen.value, vec.i64(0)), U32, 1)
                shifted = tirx.shift_left(prefix.value, _const(bits, U32))
                prefix.set(tirx.bitwise_or(shifted, low))
            pivot = vec.bind(vec.bitcast(prefix.value, F32, 1))
            safe = tirx.max(kept.value, _const(1e-300, F64))
            share = vec.bind(vec.cast(_const(1.0, F64) / safe, F32, 1))

            def scale(offset: Expr, narrow: int) -> None:
                value = vec.bind(vec.load(probs, [i, offset], narrow))
                keep = value >= vec.splat(pivot, narrow)
                scaled = value * vec.splat(share, narrow)
                zero = vec.const(0, F32, narrow)
                vec.store(out, [i, offset], tirx.Select(keep, scaled, zero), narrow)

            for_vectors(vocab, lanes, scale)

        for_rows(b, 16 * vocab, row)

    arguments = [
        ("probs", (b, vocab), F32),
        ("top_p", (b,), F32),
        ("init_pivots", (b, 3), F32),
        ("renormalized", (b, vocab), F32),
    ]
    return build_kernel("renormalize_by_top_p", arguments, body)


def sampler_verify_draft_tokens(vocab: int, lanes: int) -> tirx.PrimFunc:
    """(draft_probs[m, V], draft_tokens[m], model_probs[m, V], first_child[m], next_sibling[m],
    uniform[m], parent_ptr[b]); model_probs and parent_ptr change in place."""
    m, b = symbol("num_nodes"), symbol("batch_size")

    def body(
        draft_probs: Buffer,
        draft_tokens: Buffer,
        model_probs: Buffer,
        first_child: Buffer,
        next_sibling: Buffer,
        uniform: Buffer,
        parent_ptr: Buffer,
    ) -> None:
        def tree(i: Expr) -> None:
            parent = _Cell("int64", _index(_at(parent_ptr, i)))
            child = _Cell("int64", _index(_at(first_child, parent.value)))
            with T.While(child.value >= vec.i64(0)):
                # Bound: the cells change below.
                node, node_parent = vec.bind(child.value), vec.bind(parent.value)
                token = _index(_at(draft_tokens, node))
                model = _at(model_probs, node_parent, token)
                # A product, not a quotient: the draft's probability may be 0.
                accepted = model >= _at(uniform, node) * _at(draft_probs, node, token)

                def accept() -> None:
                    parent.set(node)
                    child.set(_index(_at(first_child, node)))

                def excess(offset: Expr, narrow: int) -> Expr:
                    difference = hold(
                        vec.load(model_probs, [node_parent, offset], narrow)
                        - vec.load(draft_probs, [node, offset], narrow),
                        narrow,
                    )
                    zero = vec.const(0, F32, narrow)
                    return tirx.Select(difference > zero, difference, zero)

                def reject() -> None:
                    mass = _sum(excess, vocab, lanes)

                    def renormalise() -> None:
                        share = vec.bind(vec.cast(_const(1.0, F64) / mass, F32, 1))

                        def scale(offset: Expr, narrow: int) -> None:
                            value = excess(offset, narrow) * vec.splat(share, narrow)
                            vec.store(model_probs, [node_parent, offset], value, narrow)

                        for_vectors(vocab, lanes, scale)
                        child.set(_index(_at(next_sibling, node)))

                    _either(mass < _const(REJECTION_MASS, F64), accept, renormalise)

                _either(accepted, accept, reject)
            _put(parent_ptr, [i], vec.cast(parent.value, I32, 1))

        for_rows(b, vocab, tree)

    arguments = [
        ("draft_probs", (m, vocab), F32),
        ("draft_tokens", (m,), I32),
        ("model_probs", (m, vocab), F32),
        ("token_tree_first_child", (m,), I32),
        ("token_tree_next_sibling", (m,), I32),
        ("uniform_samples", (m,), F32),
        ("token_tree_parent_ptr", (b,), I32),
    ]
    return build_kernel("sampler_verify_draft_tokens", arguments, body)


def _copy_rows(name: str, vocab: int, lanes: int, scatter: bool) -> tirx.PrimFunc:
    b, m = symbol("batch_size"), symbol("num_rows")

    def body(src: Buffer, indices: Buffer, dst: Buffer) -> None:
        def row(i: Expr) -> None:
            other = _index(_at(indices, i))
            source, target = (i, other) if scatter else (other, i)
            copy_row(src, source, dst, target, vocab, lanes)

        for_rows(b, vocab, row)

    source_rows, target_rows = (b, m) if scatter else (m, b)
    arguments: list[Argument] = [
        ("src", (source_rows, vocab), F32),
        ("indices", (b,), I32),
        ("dst", (target_rows, vocab), F32),
    ]
    return build_kernel(name, arguments, body, private=False)


def kernel(
    name: str, *, vocab_size: int, active_vocab_size: int, vector_bits: int = 256
) -> tirx.PrimFunc:
    """The kernel of a function of `nn.sampling.SAMPLING_FUNCTIONS`; KeyError for another name."""
    lanes = max(1, vector_bits // 32)
    makers: dict[str, Callable[[], Any]] = {
        "softmax_with_temperature": lambda: softmax_with_temperature(
            vocab_size, active_vocab_size, lanes
        ),
        "apply_logit_bias_inplace": lambda: apply_logit_bias_inplace(vocab_size),
        "apply_penalty_inplace": lambda: apply_penalty_inplace(vocab_size),
        "apply_bitmask_inplace": lambda: apply_bitmask_inplace(vocab_size, lanes),
        "argsort_probs": lambda: argsort_probs(vocab_size),
        "sample_with_top_p": lambda: sample_with_top_p(vocab_size),
        "multinomial_from_uniform": lambda: multinomial_from_uniform(vocab_size),
        "sampler_take_probs": lambda: sampler_take_probs(vocab_size),
        "renormalize_by_top_p": lambda: renormalize_by_top_p(vocab_size, lanes),
        "sampler_verify_draft_tokens": lambda: sampler_verify_draft_tokens(vocab_size, lanes),
        "scatter_probs": lambda: _copy_rows("scatter_probs", vocab_size, lanes, scatter=True),
        "gather_probs": lambda: _copy_rows("gather_probs", vocab_size, lanes, scatter=False),
    }
    return makers[name]()
