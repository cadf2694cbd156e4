"""The sampling helpers' kernels for GPUs (what they compute: mlc_compile/nn/sampling.py).

Notable features
- softmax: each group reduces one tile of the row, a second launch combines the tiles.
- argsort: tiles sorted in group memory, then merges by rank; of equal ones the earlier comes first.
- Cumulative sums have four levels, rounded such that they never decrease and never change where a
  probability is 0: the token drawn is unique, and never an impossible one.
- Nothing is drawn by the lanes' order of execution; results do not depend on the device's width.

Float sums are float32 (WebGPU has no float64): the bounds of a token in a cumulative sum are off by
a few 1e-7. Callers give no (row, token) pair twice to the functions in place, and no row twice to
`scatter_probs`: engines keep them in maps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm import tirx

from mlc_compile.targets.gpu_kernels import _emit as emit
from mlc_compile.targets.gpu_kernels._emit import (
    F32,
    I32,
    U32,
    Argument,
    Buffer,
    Cell,
    Expr,
    barrier,
    bind,
    build_kernel,
    f32,
    groups,
    i32,
    launch,
    load,
    loop,
    shared,
    store,
    symbol,
    u32,
    when,
)
from mlc_compile.targets.gpu_kernels.device import GPUDevice

GREEDY_TEMPERATURE = 1e-5
LOWEST = -3.4028234663852886e38  # the lowest finite float32
HUGE = 3e38  # a mass out of reach
# Elements of a tile that one thread handles.
PER_THREAD = 8
# Threads whose sums are scanned one after the other: 16 scans of 16 for 256 threads.
SCAN_BLOCK = 16
# Sorted runs merged at once. A merge by rank searches every other run: more runs, fewer launches.
MERGE_FAN = 8
# Bits of a probability that renormalize_by_top_p fixes in one round, by 2^bits - 1 sums, and the
# bits that a float below 2 has.
PIVOT_BITS = 3
PROBABILITY_BITS = 30
SIGN_BIT = 0x80000000
# Below this mass what is left of the model's distribution is rounding, as in MLC.
REJECTION_MASS = 1e-7


def _uint(value: Expr) -> Expr:
    """The bits of a float32."""
    return tirx.reinterpret(U32, value)


# --- softmax


def _best(
    tx: Expr, values: Buffer, ids: Buffer, width: int, value: Expr, token: Expr
) -> tuple[Expr, Expr]:
    """The largest value of the first `width` threads and the lowest id that has it, for all."""
    largest = emit.fold_all(tx, values, width, value, tirx.max)
    candidate = tirx.Select(value == largest, token, i32(tirx.max_value(I32).value))
    return largest, emit.fold_all(tx, ids, width, candidate, tirx.min)


def _exponential(value: Expr, largest: Expr, inverse: Expr) -> Expr:
    # Bounded, so that nothing overflows: a logit may be the lowest float32.
    return tirx.exp(tirx.max(value - largest, f32(-1e30)) * inverse)


def softmax_with_temperature(vocab: int, active: int, device: GPUDevice) -> tirx.PrimFunc:
    """(logits[b, 1, V], temperature[b]) -> probs[b, 1, V]; workspaces: of each tile the largest
    logit, its id, and the sum of exponentials relative to it."""
    b, threads = symbol("batch_size"), emit.group_size(device)
    tile = threads * PER_THREAD
    tiles = groups(active, tile)
    # Tiles that each thread combines in the second launch, and the threads that do.
    per_thread = groups(tiles, threads)
    width = min(threads, emit.power_of_two_from(tiles))

    def body(
        logits: Buffer,
        temperature: Buffer,
        probs: Buffer,
        tile_max: Buffer,
        tile_id: Buffer,
        tile_sum: Buffer,
    ) -> None:
        def inverse(row: Expr) -> Expr:
            return bind(f32(1) / tirx.max(load(temperature, row), f32(GREEDY_TEMPERATURE)))

        def logit(row: Expr, token: Expr) -> Expr:
            """LOWEST for padding; an infinity becomes finite."""
            value = tirx.max(load(logits, row, 0, tirx.min(token, i32(active - 1))), f32(LOWEST))
            return tirx.Select(token < i32(active), value, f32(LOWEST))

        with launch(threads, tiles, b) as (tx, bx, by):
            values, ids, sums = (
                shared([threads], F32),
                shared([threads], I32),
                shared([threads], F32),
            )
            held = emit.registers(PER_THREAD)
            first = bind(bx * i32(tile) + tx)
            store(held, [0], logit(by, first))
            best, best_id = Cell(F32, load(held, 0)), Cell(I32, first)
            for k in range(1, PER_THREAD):
                token = bind(first + i32(k * threads))
                value = bind(logit(by, token))
                store(held, [k], value)
                with when(value > best.value):
                    best.set(value)
                    best_id.set(token)
            largest, largest_id = _best(tx, values, ids, threads, best.value, best_id.value)
            scale = inverse(by)
            total = Cell(F32, 0.0)
            for k in range(PER_THREAD):
                value = _exponential(load(held, k), largest, scale)
                inside = first + i32(k * threads) < i32(active)
                total.set(total.value + tirx.Select(inside, value, f32(0)))
            total_sum = emit.fold_all(tx, sums, threads, total.value, emit.add)
            with when(tx == i32(0)):
                store(tile_max, [by, bx], largest)
                store(tile_id, [by, bx], largest_id)
                store(tile_sum, [by, bx], total_sum)

        with launch(threads, groups(vocab, tile), b) as (tx, bx, by):
            values, ids = shared([width], F32), shared([width], I32)
            sums = shared([width], F32)
            best, best_id = Cell(F32, LOWEST), Cell(I32, active)

            def for_tiles(use: Callable[[Expr], None]) -> None:
                for k in range(per_thread):
                    at = bind(tx + i32(k * threads))
                    with when(at < i32(tiles)):
                        use(at)

            def larger(at: Expr) -> None:
                value = bind(load(tile_max, by, at))
                value_id = bind(load(tile_id, by, at))
                # A thread's tiles come in order: of equal ones the first stays.
                with when(tirx.any(value > best.value, best_id.value == i32(active))):
                    best.set(value)
                    best_id.set(value_id)

            for_tiles(larger)
            largest, largest_id = _best(tx, values, ids, width, best.value, best_id.value)
            scale = inverse(by)
            total = Cell(F32, 0.0)

            def add(at: Expr) -> None:
                factor = _exponential(load(tile_max, by, at), largest, scale)
                total.set(total.value + load(tile_sum, by, at) * factor)

            for_tiles(add)
            share = bind(f32(1) / emit.fold_all(tx, sums, width, total.value, emit.add))
            greedy = bind(load(temperature, by) <= f32(GREEDY_TEMPERATURE))
            for k in range(PER_THREAD):
                token = bind(bx * i32(tile) + i32(k * threads) + tx)
                with when(token < i32(vocab)):
                    soft = _exponential(logit(by, token), largest, scale) * share
                    soft = tirx.Select(token < i32(active), soft, f32(0))
                    one_hot = tirx.Select(token == largest_id, f32(1), f32(0))
                    store(probs, [by, 0, token], tirx.Select(greedy, one_hot, soft))

    shape = ((b, 1, vocab), F32)
    arguments: list[Argument] = [
        ("logits", *shape),
        ("temperature", (b,), F32),
        ("probs", *shape),
        ("tile_max", (b, tiles), F32),
        ("tile_id", (b, tiles), I32),
        ("tile_sum", (b, tiles), F32),
    ]
    return build_kernel("softmax_with_temperature", arguments, body)


# --- functions in place


def apply_logit_bias_inplace(vocab: int, device: GPUDevice) -> tirx.PrimFunc:
    """(logits[b, V], pos2seq_id[n], token_ids[n], logit_bias[n]); no (row, token) twice."""
    b, n = symbol("batch_size"), symbol("num_tokens")

    def body(logits: Buffer, pos2seq: Buffer, tokens: Buffer, bias: Buffer) -> None:
        def entry(i: Expr) -> None:
            row, token = bind(load(pos2seq, i)), bind(load(tokens, i))
            store(logits, [row, token], load(logits, row, token) + load(bias, i))

        emit.each(device, n, entry)

    arguments: list[Argument] = [
        ("logits", (b, vocab), F32),
        ("pos2seq_id", (n,), I32),
        ("token_ids", (n,), I32),
        ("logit_bias", (n,), F32),
    ]
    return build_kernel("apply_logit_bias_inplace", arguments, body, private=False)


def apply_penalty_inplace(vocab: int, device: GPUDevice) -> tirx.PrimFunc:
    """(logits[b, V], seq_ids[s], pos2seq_id[n], token_ids[n], token_cnt[n], penalties[s, 3]); no
    (sequence, token) twice."""
    b, s, n = symbol("batch_size"), symbol("num_seqs"), symbol("num_tokens")

    def body(
        logits: Buffer,
        seq_ids: Buffer,
        pos2seq: Buffer,
        tokens: Buffer,
        counts: Buffer,
        penalties: Buffer,
    ) -> None:
        def entry(i: Expr) -> None:
            position, token = bind(load(pos2seq, i)), bind(load(tokens, i))
            row = bind(load(seq_ids, position))
            presence, frequency, repetition = (bind(load(penalties, position, k)) for k in range(3))
            count = tirx.Cast(F32, load(counts, i))
            logit = bind(load(logits, row, token) - (presence + count * frequency))
            scaled = tirx.Select(logit < f32(0), logit * repetition, logit / repetition)
            store(logits, [row, token], scaled)

        emit.each(device, n, entry)

    arguments: list[Argument] = [
        ("logits", (b, vocab), F32),
        ("seq_ids", (s,), I32),
        ("pos2seq_id", (n,), I32),
        ("token_ids", (n,), I32),
        ("token_cnt", (n,), I32),
        ("penalties", (s, 3), F32),
    ]
    return build_kernel("apply_penalty_inplace", arguments, body, private=False)


def apply_bitmask_inplace(vocab: int, device: GPUDevice) -> tirx.PrimFunc:
    """(logits[b, V], seq_ids[s], bitmask[b, ceil(V / 32)])."""
    b, s = symbol("batch_size"), symbol("num_seqs")

    def body(logits: Buffer, seq_ids: Buffer, bitmask: Buffer) -> None:
        def entry(i: Expr, token: Expr) -> None:
            row = bind(load(seq_ids, i))
            word = load(bitmask, row, tirx.shift_right(token, i32(5)))
            bit = tirx.bitwise_and(tirx.shift_right(word, tirx.bitwise_and(token, i32(31))), i32(1))
            with when(bit == i32(0)):
                store(logits, [row, token], f32(LOWEST))

        emit.each_element(device, s, vocab, entry)

    arguments: list[Argument] = [
        ("logits", (b, vocab), F32),
        ("seq_ids", (s,), I32),
        ("bitmask", (b, (vocab + 31) // 32), I32),
    ]
    return build_kernel("apply_bitmask_inplace", arguments, body, private=False)


def _copy_rows(name: str, vocab: int, device: GPUDevice, scatter: bool) -> tirx.PrimFunc:
    b, m = symbol("batch_size"), symbol("num_rows")

    def body(src: Buffer, indices: Buffer, dst: Buffer) -> None:
        def entry(i: Expr, token: Expr) -> None:
            other = bind(load(indices, i))
            source, target = (i, other) if scatter else (other, i)
            store(dst, [target, token], load(src, source, token))

        emit.each_element(device, b, vocab, entry)

    source_rows, target_rows = (b, m) if scatter else (m, b)
    arguments: list[Argument] = [
        ("src", (source_rows, vocab), F32),
        ("indices", (b,), I32),
        ("dst", (target_rows, vocab), F32),
    ]
    return build_kernel(name, arguments, body, private=False)


# --- sorting


def _descending_key(value: Expr) -> Expr:
    """uint32 whose ascending order is the float's descending one; -0 and 0 are equal."""
    bits = bind(_uint(value))
    positive = tirx.bitwise_xor(tirx.bitwise_and(bits, u32(SIGN_BIT - 1)), u32(SIGN_BIT - 1))
    return tirx.Select(bits > u32(SIGN_BIT), bits, positive)


def _from_key(key: Expr) -> Expr:
    """The float of a key; 0 for -0."""
    positive = tirx.bitwise_xor(key, u32(SIGN_BIT - 1))
    return tirx.reinterpret(F32, tirx.Select(key < u32(SIGN_BIT), positive, key))


def _sort_tiles(
    probs: Buffer, out: Buffer, out_ids: Buffer, b: Expr, vocab: int, tile: int
) -> None:
    """Sort each `tile` (a power of two, at least PER_THREAD) of every row, in group memory.

    Every thread sorts PER_THREAD neighbours by counting which come before which; then runs are
    merged two and two. As in `_merge_runs`, an element's place is what it has in its own run plus
    how many of the other run come before it, so that nothing depends on the order of threads.
    """
    threads = tile // PER_THREAD
    first_bits = PER_THREAD.bit_length() - 1
    with launch(threads, groups(vocab, tile), b) as (tx, bx, by):
        keys, ids = shared([tile], U32), shared([tile], I32)
        held, held_ids = emit.registers(PER_THREAD, U32), emit.registers(PER_THREAD, I32)
        first = bind(tx * i32(PER_THREAD))
        for k in range(PER_THREAD):
            token = bind(bx * i32(tile) + first + i32(k))
            key = bind(_descending_key(load(probs, by, tirx.min(token, i32(vocab - 1)))))
            # Padding has the last key, and comes last.
            store(held, [k], tirx.Select(token < i32(vocab), key, u32(0xFFFFFFFF)))
        for k in range(PER_THREAD):
            place = first
            for j in range(PER_THREAD):
                if j != k:
                    other, own = load(held, j), load(held, k)
                    before = other <= own if j < k else other < own
                    place = place + tirx.Cast(I32, before)
            place = bind(place)
            store(keys, [place], load(held, k))
            store(ids, [place], bx * i32(tile) + first + i32(k))
        barrier()
        places = emit.registers(PER_THREAD, I32)
        with loop(tile.bit_length() - 1 - first_bits) as level:
            run_bits = bind(level + i32(first_bits))
            run = bind(tirx.shift_left(i32(1), run_bits))
            slots = [bind(tx + i32(k * threads)) for k in range(PER_THREAD)]
            for k, slot in enumerate(slots):
                store(held, [k], load(keys, slot))
                store(held_ids, [k], load(ids, slot))
                store(places, [k], i32(0))
            # All searches side by side: one alone would wait for memory at every step.
            with loop(run_bits + i32(1)) as step:
                size = bind(tirx.shift_right(run, step))
                for k, slot in enumerate(slots):
                    end = bind(load(places, k) + size)
                    other_run = tirx.bitwise_and(tirx.bitwise_xor(slot, run), i32(-1) * run)
                    probe = tirx.min(end, run) - i32(1)
                    found, own = bind(load(keys, other_run + probe)), load(held, k)
                    later = tirx.bitwise_and(slot, run) != i32(0)
                    precedes = tirx.any(found < own, tirx.all(found == own, later))
                    with when(tirx.all(end <= run, precedes)):
                        store(places, [k], end)
            barrier()
            for k, slot in enumerate(slots):
                place = bind(tirx.bitwise_and(slot, tirx.bitwise_not(run)) + load(places, k))
                store(keys, [place], load(held, k))
                store(ids, [place], load(held_ids, k))
            barrier()
        for k in range(PER_THREAD):
            slot = bind(tx + i32(k * threads))
            token = bind(bx * i32(tile) + slot)
            with when(token < i32(vocab)):
                store(out, [by, token], _from_key(load(keys, slot)))
                store(out_ids, [by, token], load(ids, slot))


def _merge_runs(
    source: tuple[Buffer, Buffer],
    target: tuple[Buffer, Buffer],
    b: Expr,
    vocab: int,
    run: int,
    fan: int,
    threads: int,
) -> None:
    """Merge every `fan` neighbouring sorted runs of length `run`, both powers of two.

    An element's place is its place in its run plus how many of each other run come before it; of
    equal ones those of earlier runs do.
    """
    (values, ids), (out, out_ids) = source, target
    run_bits = run.bit_length() - 1
    family_bits = run_bits + fan.bit_length() - 1
    with launch(threads, groups(vocab, threads), b) as (tx, bx, by):
        at = bind(bx * i32(threads) + tx)
        with when(at < i32(vocab)):
            value = bind(load(values, by, at))
            key = bind(_descending_key(value))
            first = bind(tirx.shift_left(tirx.shift_right(at, i32(family_bits)), i32(family_bits)))
            own = bind(tirx.shift_right(at - first, i32(run_bits)))
            others = range(min(fan, int(groups(vocab, run))))
            starts = [bind(first + i32(other * run)) for other in others]
            # Nothing to find in its own run; the last one may be short, or not there.
            lengths = [
                bind(tirx.Select(own == i32(j), i32(0), tirx.min(i32(vocab) - start, i32(run))))
                for j, start in enumerate(starts)
            ]
            before = emit.registers(len(starts), I32)
            for j in others:
                store(before, [j], i32(0))
            # All searches side by side: one alone would wait for memory at every step.
            with loop(run_bits + 1) as step:
                size = bind(tirx.shift_right(i32(run), step))
                for j in others:
                    end = bind(load(before, j) + size)
                    probe = tirx.min(starts[j] + end - i32(1), i32(vocab - 1))
                    found = bind(_descending_key(load(values, by, probe)))
                    precedes = tirx.any(found < key, tirx.all(found == key, i32(j) < own))
                    with when(tirx.all(end <= lengths[j], precedes)):
                        store(before, [j], end)
            place = first + tirx.bitwise_and(at, i32(run - 1))
            for j in others:
                place = place + load(before, j)
            place = bind(place)
            store(out, [by, place], value)
            store(out_ids, [by, place], load(ids, by, at))


def _merge_fans(tiles: int) -> list[int]:
    """How many runs each merge takes: powers of two up to MERGE_FAN, whose product is >= tiles."""
    bits = (tiles - 1).bit_length()
    merges = -(-bits // (MERGE_FAN.bit_length() - 1))
    return [1 << ((bits + i) // merges) for i in reversed(range(merges))]


def argsort_probs(vocab: int, device: GPUDevice) -> tirx.PrimFunc:
    """(probs[b, V]) -> (sorted_probs[b, V], sorted_indices[b, V]), descending and stable."""
    b, threads = symbol("batch_size"), emit.group_size(device)
    # Half of the group memory at most, so that two groups fit a core.
    most = min(threads * PER_THREAD, 1 << ((device.shared_bytes // 16).bit_length() - 1))
    tile = max(PER_THREAD, min(most, emit.power_of_two_from(vocab)))
    fans = _merge_fans(int(groups(vocab, tile)))

    def body(
        probs: Buffer,
        sorted_probs: Buffer,
        sorted_ids: Buffer,
        spare_probs: Buffer | None = None,
        spare_ids: Buffer | None = None,
    ) -> None:
        out, spare = (sorted_probs, sorted_ids), (spare_probs, spare_ids)
        # Merges go to and fro; the last one writes the output.
        target, source = (out, spare) if len(fans) % 2 == 0 else (spare, out)
        _sort_tiles(probs, *target, b, vocab, tile)
        run = tile
        for fan in fans:
            source, target = target, source
            _merge_runs(source, target, b, vocab, run, fan, threads)
            run *= fan

    row = (b, vocab)
    arguments: list[Argument] = [
        ("probs", row, F32),
        ("sorted_probs", row, F32),
        ("sorted_indices", row, I32),
    ]
    if fans:
        arguments += [("spare_probs", row, F32), ("spare_indices", row, I32)]
    return build_kernel("argsort_probs", arguments, body)


# --- cumulative sums


class _Cumulative:
    """The cumulative sums of rows of probabilities, in tiles of a group.

    With T the sum of the tiles before, B of the blocks of threads before in the tile, W of the
    threads before in the block and e of the thread's elements up to this one, the cumulative sum is
    T + (B + (W + e)), each of them summed one by one. Every level's total is, to the bit, the last
    sum below it, and rounding is monotone: hence no sum is less than the one before.
    """

    def __init__(self, vocab: int, device: GPUDevice) -> None:
        self.vocab = vocab
        self.threads = emit.group_size(device)
        self.tile = self.threads * PER_THREAD
        self.tiles = int(groups(vocab, self.tile))
        self.block = min(SCAN_BLOCK, self.threads)
        self.blocks = self.threads // self.block

    def _allocate(self, tx: Expr) -> None:
        self._tx = tx
        self._sums = shared([self.threads], F32)
        self._before = shared([self.threads], F32)
        self._block_sums = shared([self.blocks], F32)
        self._block_before = shared([self.blocks + 1], F32)
        self._held = emit.registers(PER_THREAD)

    def _scan_tile(self, probs: Buffer, row: Expr, tile: Expr) -> None:
        """Fill in everything below T; `_held` gets the e of this thread. Ends in a barrier."""
        first = bind(tile * i32(self.tile) + self._tx * i32(PER_THREAD))
        so_far = Cell(F32, 0.0)
        for k in range(PER_THREAD):
            token = bind(first + i32(k))
            value = load(probs, row, tirx.min(token, i32(self.vocab - 1)))
            so_far.set(so_far.value + tirx.Select(token < i32(self.vocab), value, f32(0)))
            store(self._held, [k], so_far.value)
        store(self._sums, [self._tx], so_far.value)
        barrier()
        self._serial_scan(self._sums, self._before, self._block_sums, self.block, self.blocks)
        barrier()
        with when(self._tx == i32(0)):
            total = Cell(F32, 0.0)
            with loop(self.blocks) as k:
                store(self._block_before, [k], total.value)
                total.set(total.value + load(self._block_sums, k))
            store(self._block_before, [self.blocks], total.value)
        barrier()

    def _serial_scan(
        self, values: Buffer, before: Buffer, totals: Buffer, count: int, workers: int
    ) -> None:
        with when(self._tx < i32(workers)):
            total = Cell(F32, 0.0)
            with loop(count) as k:
                at = bind(self._tx * i32(count) + k)
                store(before, [at], total.value)
                total.set(total.value + load(values, at))
            store(totals, [self._tx], total.value)

    def sum_tiles(self, probs: Buffer, sums: Buffer, b: Expr) -> None:
        """A launch: sums[b, tiles] of the rows' tiles."""
        with launch(self.threads, self.tiles, b) as (tx, bx, by):
            self._allocate(tx)
            self._scan_tile(probs, by, bx)
            with when(tx == i32(0)):
                store(sums, [by, bx], load(self._block_before, self.blocks))

    def open_row(self, tx: Expr, sums: Buffer, row: Expr) -> Expr:
        """In a launch of one group a row: prepare `find`. The row's total, bound."""
        self._allocate(tx)
        self._row = row
        self._tile_sums = shared([self.tiles], F32)
        self._tile_before = shared([self.tiles + 1], F32)
        self._found = shared([2], I32)
        self._found_sum = shared([1], F32)
        for k in range(int(groups(self.tiles, self.threads))):
            at = bind(tx + i32(k * self.threads))
            with when(at < i32(self.tiles)):
                store(self._tile_sums, [at], load(sums, row, at))
        barrier()
        with when(tx == i32(0)):
            total = Cell(F32, 0.0)
            with loop(self.tiles) as k:
                store(self._tile_before, [k], total.value)
                total.set(total.value + load(self._tile_sums, k))
            store(self._tile_before, [self.tiles], total.value)
        barrier()
        return bind(load(self._tile_before, self.tiles))

    def find(self, probs: Buffer, reached: Callable[[Expr], Expr]) -> tuple[Expr, Expr]:
        """The first index whose cumulative sum is `reached`, and that sum, for every thread.

        `reached` must be false up to some sum and true from there on, true of the total.
        """
        tx = self._tx
        for k in range(int(groups(self.tiles, self.threads))):
            at = bind(tx + i32(k * self.threads))
            with when(at < i32(self.tiles)):
                before = bind(load(self._tile_before, at))
                upto = bind(load(self._tile_before, at + i32(1)))
                # Sums are monotone: one thread writes.
                new = tirx.any(at == i32(0), tirx.Not(reached(before)))
                with when(tirx.all(reached(upto), new)):
                    store(self._found, [0], at)
        barrier()
        tile = bind(load(self._found, 0))
        self._scan_tile(probs, self._row, tile)
        tile_before = bind(load(self._tile_before, tile))
        block_before = bind(load(self._block_before, tirx.truncdiv(tx, i32(self.block))))
        thread_before = bind(load(self._before, tx))

        def cumulative(own: Expr) -> Expr:
            return tile_before + (block_before + (thread_before + own))

        last = bind(cumulative(load(self._held, PER_THREAD - 1)))
        before = bind(cumulative(f32(0)))
        new = tirx.any(tirx.all(tx == i32(0), tile == i32(0)), tirx.Not(reached(before)))
        with when(tirx.all(reached(last), new)):
            place, total = Cell(I32, PER_THREAD - 1), Cell(F32, last)
            for k in reversed(range(PER_THREAD - 1)):
                upto = bind(cumulative(load(self._held, k)))
                with when(reached(upto)):
                    place.set(k)
                    total.set(upto)
            at = tile * i32(self.tile) + tx * i32(PER_THREAD) + place.value
            store(self._found, [1], at)
            store(self._found_sum, [0], total.value)
        barrier()
        return bind(load(self._found, 1)), bind(load(self._found_sum, 0))


def _limit(top_p: Expr) -> Expr:
    """top_p as a mass to reach; from 1 on it is out of reach, so that nothing is cut."""
    return bind(tirx.Select(top_p >= f32(1), f32(HUGE), top_p))


def sample_with_top_p(vocab: int, device: GPUDevice) -> tirx.PrimFunc:
    """(sorted_probs, sorted_indices, uniform[n], sample_indices[n], top_p[b]) -> sampled[n];
    workspace: the sums of the rows' tiles."""
    b, n = symbol("batch_size"), symbol("num_samples")
    cumulative = _Cumulative(vocab, device)

    def body(
        sorted_probs: Buffer,
        sorted_indices: Buffer,
        uniform: Buffer,
        sample_indices: Buffer,
        top_p: Buffer,
        sampled: Buffer,
        tile_sums: Buffer,
    ) -> None:
        cumulative.sum_tiles(sorted_probs, tile_sums, b)
        with launch(cumulative.threads, n) as (tx, i, _):
            row = bind(load(sample_indices, i))
            total = cumulative.open_row(tx, tile_sums, row)
            limit = _limit(load(top_p, row))
            last, mass = cumulative.find(
                sorted_probs, lambda upto: tirx.any(upto >= limit, upto >= total)
            )
            wanted = bind(load(uniform, i) * mass)
            # Rounding may take `wanted` up to the mass itself.
            rank, _sum = cumulative.find(
                sorted_probs, lambda upto: tirx.any(upto > wanted, upto >= mass)
            )
            with when(tx == i32(0)):
                store(sampled, [i], load(sorted_indices, row, tirx.min(rank, last)))

    arguments: list[Argument] = [
        ("sorted_probs", (b, vocab), F32),
        ("sorted_indices", (b, vocab), I32),
        ("uniform_samples", (n,), F32),
        ("sample_indices", (n,), I32),
        ("top_p", (b,), F32),
        ("sampled", (n,), I32),
        ("tile_sums", (b, cumulative.tiles), F32),
    ]
    return build_kernel("sample_with_top_p", arguments, body)


def multinomial_from_uniform(vocab: int, device: GPUDevice) -> tirx.PrimFunc:
    """(probs[b, V], uniform[n], sample_indices[n]) -> sampled[n]; workspace: the tiles' sums.

    When rounding leaves the sum of a row below uniform: the last id that adds to the sum.
    """
    b, n = symbol("batch_size"), symbol("num_samples")
    cumulative = _Cumulative(vocab, device)

    def body(
        probs: Buffer,
        uniform: Buffer,
        sample_indices: Buffer,
        sampled: Buffer,
        tile_sums: Buffer,
    ) -> None:
        cumulative.sum_tiles(probs, tile_sums, b)
        with launch(cumulative.threads, n) as (tx, i, _):
            row = bind(load(sample_indices, i))
            total = cumulative.open_row(tx, tile_sums, row)
            wanted = bind(load(uniform, i))
            token, _sum = cumulative.find(
                probs, lambda upto: tirx.any(upto > wanted, upto >= total)
            )
            with when(tx == i32(0)):
                store(sampled, [i], token)

    arguments: list[Argument] = [
        ("probs", (b, vocab), F32),
        ("uniform_samples", (n,), F32),
        ("sample_indices", (n,), I32),
        ("sampled", (n,), I32),
        ("tile_sums", (b, cumulative.tiles), F32),
    ]
    return build_kernel("multinomial_from_uniform", arguments, body)


def sampler_take_probs(vocab: int, device: GPUDevice) -> tirx.PrimFunc:
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
        def sample(i: Expr) -> None:
            row, token = bind(load(sample_indices, i)), bind(load(results, i))
            store(sampled_values, [i], load(probs, row, token))

        def position(i: Expr) -> None:
            offset = bind(load(offsets, i))
            row = bind(tirx.truncdiv(offset, i32(vocab)))
            top = bind(load(sorted_indices, row, offset - row * i32(vocab)))
            store(top_indices, [i], top)
            store(top_probs, [i], load(probs, row, top))

        emit.each(device, n, sample)
        emit.each(device, p, position)

    arguments: list[Argument] = [
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


def renormalize_by_top_p(vocab: int, device: GPUDevice) -> tirx.PrimFunc:
    """(probs[b, V], top_p[b], init_pivots[b, 3]) -> renormalized[b, V]; init_pivots is unused.

    The bits of a positive float order as the float does, and the mass from a pivot on falls with
    it, also as rounded. One group a row finds the pivot PIVOT_BITS bits at a time: the mass from
    each candidate on, all in one reading of the row. Workspaces: the pivots' bits, their masses.
    """
    b, threads = symbol("batch_size"), emit.group_size(device)
    candidates = (1 << PIVOT_BITS) - 1

    def body(
        probs: Buffer,
        top_p: Buffer,
        _init_pivots: Buffer,
        out: Buffer,
        pivots: Buffer,
        masses: Buffer,
    ) -> None:
        with launch(threads, b) as (tx, row, _):
            # One buffer each: TVM's analysis of barriers does not tell parts of a buffer apart.
            slots = [shared([threads], F32) for _ in range(candidates)]
            limit = _limit(load(top_p, row))
            pivot = Cell(U32, 0)
            sums = emit.registers(candidates)

            def add_up(count: int, first: Callable[[int], Expr]) -> None:
                """slots[d][0] = the row's mass from the pivot first(d) on, for d < count."""
                for d in range(count):
                    store(sums, [d], f32(0))
                with loop(groups(vocab, threads)) as k:
                    token = bind(k * i32(threads) + tx)
                    value = load(probs, row, tirx.min(token, i32(vocab - 1)))
                    inside = bind(tirx.Select(token < i32(vocab), value, f32(0)))
                    bits = bind(_uint(inside))
                    for d in range(count):
                        kept = tirx.Select(bits >= first(d), inside, f32(0))
                        store(sums, [d], load(sums, d) + kept)
                for d in range(count):
                    store(slots[d], [tx], load(sums, d))

                def add(i: Expr, j: Expr) -> None:
                    for slot in slots[:count]:
                        store(slot, [i], load(slot, i) + load(slot, j))

                emit.tree(tx, threads, add)

            with loop(PROBABILITY_BITS // PIVOT_BITS) as step:
                top = i32(PROBABILITY_BITS - PIVOT_BITS)
                shift = bind(tirx.Cast(U32, top - step * i32(PIVOT_BITS)))
                base = bind(pivot.value)
                add_up(
                    candidates,
                    lambda d: tirx.bitwise_or(base, tirx.shift_left(u32(d + 1), shift)),
                )
                digit = Cell(U32, 0)
                for d in range(candidates):
                    reached = bind(load(slots[d], 0))
                    # Nothing lies above the largest probability: a top_p of 0 keeps that one.
                    with when(tirx.all(reached >= limit, reached > f32(0))):
                        digit.set(u32(d + 1))
                pivot.set(tirx.bitwise_or(base, tirx.shift_left(digit.value, shift)))
                barrier()
            found = bind(pivot.value)
            add_up(1, lambda d: found)
            with when(tx == i32(0)):
                store(pivots, [row], found)
                store(masses, [row], load(slots[0], 0))

        def scale(row: Expr, token: Expr) -> None:
            value = bind(load(probs, row, token))
            keep = _uint(value) >= load(pivots, row)
            store(out, [row, token], tirx.Select(keep, value / load(masses, row), f32(0)))

        emit.each_element(device, b, vocab, scale)

    arguments: list[Argument] = [
        ("probs", (b, vocab), F32),
        ("top_p", (b,), F32),
        ("init_pivots", (b, 3), F32),
        ("renormalized", (b, vocab), F32),
        ("pivots", (b,), U32),
        ("masses", (b,), F32),
    ]
    return build_kernel("renormalize_by_top_p", arguments, body)


# --- speculative decoding


def sampler_verify_draft_tokens(vocab: int, device: GPUDevice) -> tirx.PrimFunc:
    """(draft_probs[m, V], draft_tokens[m], model_probs[m, V], first_child[m], next_sibling[m],
    uniform[m], parent_ptr[b]); model_probs and parent_ptr change in place.

    One group a tree. A walk visits a node at most once: m rounds are enough, and a loop of m
    rounds keeps the barriers in uniform control flow. Thread t reads and writes the ids t,
    t + threads, ... of a row only, so that no order of storage accesses between threads is asked.
    """
    m, b, threads = symbol("num_nodes"), symbol("batch_size"), emit.group_size(device)

    def body(
        draft_probs: Buffer,
        draft_tokens: Buffer,
        model_probs: Buffer,
        first_child: Buffer,
        next_sibling: Buffer,
        uniform: Buffer,
        parent_ptr: Buffer,
    ) -> None:
        with launch(threads, b) as (tx, bx, _):
            slots, accepted_slot = shared([threads], F32), shared([1], I32)
            # Every thread walks by itself, on the same decisions.
            parent = Cell(I32, load(parent_ptr, bx))
            child = Cell(I32, load(first_child, parent.value))
            with loop(m):
                node, above = bind(tirx.max(child.value, i32(0))), bind(parent.value)
                walking = bind(child.value >= i32(0))
                token = bind(load(draft_tokens, node))
                with when(tirx.truncmod(token, i32(threads)) == tx):
                    bound = load(uniform, node) * load(draft_probs, node, token)
                    # A product, not a quotient: the draft's probability may be 0.
                    fits = load(model_probs, above, token) >= bound
                    store(accepted_slot, [0], tirx.Select(fits, i32(1), i32(0)))
                barrier()
                rejected = bind(tirx.all(walking, load(accepted_slot, 0) == i32(0)))

                def for_excess(use: Callable[[Expr, Expr], None]) -> None:
                    with loop(groups(vocab, threads)) as k:
                        at = bind(k * i32(threads) + tx)
                        with when(at < i32(vocab)):
                            difference = load(model_probs, above, at) - load(draft_probs, node, at)
                            use(at, bind(tirx.max(difference, f32(0))))

                total = Cell(F32, 0.0)
                with when(rejected):
                    for_excess(lambda at, value: total.set(total.value + value))
                mass = emit.fold_all(tx, slots, threads, total.value, emit.add)
                moves_on = bind(tirx.all(rejected, mass >= f32(REJECTION_MASS)))
                with when(moves_on):
                    for_excess(lambda at, value: store(model_probs, [above, at], value / mass))
                # The slots are read before the next round writes them.
                barrier()
                with when(moves_on):
                    child.set(load(next_sibling, node))
                with when(tirx.all(walking, tirx.Not(moves_on))):
                    parent.set(node)
                    child.set(load(first_child, node))
            with when(tx == i32(0)):
                store(parent_ptr, [bx], parent.value)

    arguments: list[Argument] = [
        ("draft_probs", (m, vocab), F32),
        ("draft_tokens", (m,), I32),
        ("model_probs", (m, vocab), F32),
        ("token_tree_first_child", (m,), I32),
        ("token_tree_next_sibling", (m,), I32),
        ("uniform_samples", (m,), F32),
        ("token_tree_parent_ptr", (b,), I32),
    ]
    return build_kernel("sampler_verify_draft_tokens", arguments, body)


def kernel(
    name: str, *, vocab_size: int, active_vocab_size: int, device: GPUDevice
) -> tirx.PrimFunc:
    """The kernel of a function of `nn.sampling.SAMPLING_FUNCTIONS`; KeyError for another name."""
    vocab = vocab_size
    makers: dict[str, Callable[[], Any]] = {
        "softmax_with_temperature": lambda: softmax_with_temperature(
            vocab, active_vocab_size, device
        ),
        "apply_logit_bias_inplace": lambda: apply_logit_bias_inplace(vocab, device),
        "apply_penalty_inplace": lambda: apply_penalty_inplace(vocab, device),
        "apply_bitmask_inplace": lambda: apply_bitmask_inplace(vocab, device),
        "argsort_probs": lambda: argsort_probs(vocab, device),
        "sample_with_top_p": lambda: sample_with_top_p(vocab, device),
        "multinomial_from_uniform": lambda: multinomial_from_uniform(vocab, device),
        "sampler_take_probs": lambda: sampler_take_probs(vocab, device),
        "renormalize_by_top_p": lambda: renormalize_by_top_p(vocab, device),
        "sampler_verify_draft_tokens": lambda: sampler_verify_draft_tokens(vocab, device),
        "scatter_probs": lambda: _copy_rows("scatter_probs", vocab, device, scatter=True),
        "gather_probs": lambda: _copy_rows("gather_probs", vocab, device, scatter=False),
    }
    return makers[name]()
