"""What `verify` does with a library: sequences driven in every way that a runtime drives them.

A scenario is a plain function on a `Driver`. It runs twice: without a library, which notes the
contexts whose logits it will see, and with one, when each of them is compared.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Protocol, TypeAlias

import numpy as np

from mlc_compile.runtime.compare import Float32
from mlc_compile.runtime.reference import CUT, tokens_of

Context: TypeAlias = tuple[int, ...]
"""A text; its last token is the one whose logits are meant. With attention sinks, where logits
depend on how a text is cut into calls (`reference.CUT` says why), each call begins with CUT."""


class Sequencer(Protocol):
    """What scenarios need: the methods of `Engine`, and the functions that it has no use for."""

    def add_sequence(self, sequence: int) -> None: ...
    def remove_sequence(self, sequence: int) -> None: ...
    def fork_sequence(self, parent: int, child: int, position: int = -1) -> None: ...
    def pop(self, sequence: int, count: int) -> None: ...
    def prefill(self, sequence: int, tokens: Sequence[int]) -> Float32: ...
    def decode(self, sequence: int, token: int) -> Float32: ...
    def batch_prefill(self, parts: Mapping[int, Sequence[int]]) -> Float32: ...
    def batch_decode(self, tokens: Mapping[int, int]) -> Float32: ...
    def verify_tokens(self, sequence: int, tokens: Sequence[int]) -> Float32: ...
    def from_embeddings(self, sequence: int, tokens: Sequence[int]) -> Float32: ...
    def from_hidden(self, name: str, parts: Mapping[int, Sequence[int]]) -> Float32: ...


def _first(text: Context, count: int) -> Context:
    """The text up to its token number `count`."""
    ends = [i for i, token in enumerate(text) if token != CUT]
    return text[: ends[count - 1] + 1] if count else ()


class SkipError(Exception):
    """A scenario cannot run here; the text says why."""


class Driver:
    """Keeps the text of every sequence, so that each row of logits has its context.

    Without an engine it only hands the contexts to `see`.
    """

    def __init__(
        self,
        engine: Sequencer | None,
        see: Callable[[Context, Float32 | None], None],
        limits: Limits,
    ) -> None:
        self.engine = engine
        self.see = see
        self.chunk = limits.chunk
        self.cut = (CUT,) if limits.sink else ()
        self.texts: dict[int, Context] = {}

    @contextmanager
    def sequences(self, *ids: int) -> Iterator[None]:
        """Adds sequences; removes all there are at the end."""
        for sequence in ids:
            if self.engine is not None:
                self.engine.add_sequence(sequence)
            self.texts[sequence] = ()
        yield
        for sequence in list(self.texts):
            self.remove(sequence)

    def remove(self, sequence: int) -> None:
        if self.engine is not None:
            self.engine.remove_sequence(sequence)
        del self.texts[sequence]

    def fork(self, parent: int, child: int, position: int = -1) -> None:
        if self.engine is not None:
            self.engine.fork_sequence(parent, child, position)
        text = self.texts[parent]
        self.texts[child] = text if position == -1 else _first(text, position)

    def pop(self, sequence: int, count: int) -> None:
        if self.engine is not None:
            self.engine.pop(sequence, count)
        self.texts[sequence] = _first(self.texts[sequence], self.length(sequence) - count)

    def length(self, sequence: int) -> int:
        """Tokens of a sequence."""
        return len(tokens_of(self.texts[sequence]))

    def prefill(self, sequence: int, tokens: Sequence[int]) -> None:
        """Tokens in as many calls as chunks."""
        self._extend({sequence: tokens}, lambda e: e.prefill(sequence, tokens)[None])

    def decode(self, sequence: int, *tokens: int) -> None:
        """Tokens one by one."""
        for token in tokens:
            self._extend({sequence: [token]}, partial(_decode_one, sequence, token))

    def batch_prefill(self, parts: Mapping[int, Sequence[int]]) -> None:
        self._extend(parts, lambda e: e.batch_prefill(parts))

    def batch_decode(self, tokens: Mapping[int, int]) -> None:
        self._extend({s: [t] for s, t in tokens.items()}, lambda e: e.batch_decode(tokens))

    def embedded(self, sequence: int, tokens: Sequence[int]) -> None:
        """embed, then prefill, or decode for one token."""
        self._extend({sequence: tokens}, lambda e: e.from_embeddings(sequence, tokens)[None])

    def hidden(self, name: str, parts: Mapping[int, Sequence[int]]) -> None:
        """The function of that name that gives hidden states, then get_logits of the last ones."""
        self._extend(parts, lambda e: e.from_hidden(name, parts))

    def verify(self, sequence: int, tokens: Sequence[int]) -> None:
        """batch_verify: logits after each of the tokens."""
        logits = None if self.engine is None else self.engine.verify_tokens(sequence, tokens)
        self.texts[sequence] += self.cut
        for i, token in enumerate(tokens):
            self.texts[sequence] += (token,)
            self.see(self.texts[sequence], None if logits is None else logits[i])

    def _extend(
        self, parts: Mapping[int, Sequence[int]], run: Callable[[Sequencer], Float32]
    ) -> None:
        logits = None if self.engine is None else run(self.engine)
        if logits is not None and len(logits) != len(parts):
            raise RuntimeError(f"{len(logits)} rows of logits for {len(parts)} sequences")
        for i, (sequence, tokens) in enumerate(parts.items()):
            for start in range(0, len(tokens), self.chunk):
                self.texts[sequence] += (*self.cut, *tokens[start : start + self.chunk])
            self.see(self.texts[sequence], None if logits is None else logits[i])


def _decode_one(sequence: int, token: int, engine: Sequencer) -> Float32:
    return engine.decode(sequence, token)[None]


@dataclass(frozen=True)
class Limits:
    """What a library can hold, and how much is asked of it.

    Attributes:
        vocab: token ids below it are used.
        context: most tokens of a sequence; None without a bound (a sliding window).
        longest: most tokens that a text may have, so that the reference is done in time.
    """

    vocab: int
    context: int | None
    chunk: int
    batch: int
    window: int | None
    sink: int
    decode_steps: int
    longest: int

    @property
    def room(self) -> int:
        """Most tokens of a text."""
        return min(self.longest, self.context or self.longest)

    def tokens(self, name: str, count: int) -> Context:
        """Random tokens; another name gives others, a larger count the same and more."""
        # Stored logits need the same tokens for ever, which no library's generator promises.
        digest = hashlib.shake_256(name.encode()).digest(8 * count)
        return tuple(int(t) for t in np.frombuffer(digest, "<u8") % np.uint64(self.vocab))

    def prompt(self, wanted: int) -> int:
        """A prompt length near `wanted` that leaves half of the context free."""
        return max(1, min(wanted, self.room // 2))

    def steps(self, wanted: int, prompt: int, notes: list[str]) -> int:
        """As many decode steps as fit behind a prompt."""
        count = min(wanted, self.room - prompt)
        if count < 1:
            raise SkipError(f"a context of {self.context} tokens has no room for it")
        if count < wanted:
            notes.append(f"{count} steps instead of {wanted} fit the context of {self.room}")
        return count


@dataclass(frozen=True)
class Greedy:
    """A prompt and the reference's own continuation of it."""

    prompt: Context
    continuation: Context


Body: TypeAlias = Callable[[Driver, Limits, Greedy, list[str]], None]


def _prefill(d: Driver, limits: Limits, greedy: Greedy, notes: list[str]) -> None:
    text = limits.tokens("main", limits.room)
    # Around the ends of pages, which hold 16 tokens.
    for length in (1, 2, 15, 16, 17, 33, 64):
        if length <= min(limits.chunk, limits.room):
            with d.sequences(0):
                d.prefill(0, text[:length])


def _chunked(d: Driver, limits: Limits, greedy: Greedy, notes: list[str]) -> None:
    room, chunk = limits.room, limits.chunk
    if room < 4:
        raise SkipError(f"a context of {limits.context} tokens has no room for it")
    if chunk + 1 < room:
        rest = min(37, room - chunk - 1)
        # Two boundaries where that is cheap.
        length = 2 * chunk + rest if chunk <= 256 and 2 * chunk + rest < room else chunk + rest
        with d.sequences(0):
            text = limits.tokens("long", length + 1)
            d.prefill(0, text[:length])
            d.decode(0, text[length])
    else:
        why = "the context" if limits.context and chunk + 1 >= limits.context else "long to compute"
        notes.append(f"prompts were cut by hand: a chunk of {chunk} tokens is {why}")
    with d.sequences(0):
        text, start = limits.tokens("main", room), 0
        for length in (1, 7, 16, 3, 21, 2):
            length = min(length, chunk, room - 1 - start)
            if length > 0:
                d.prefill(0, text[start : start + length])
                start += length
        d.decode(0, *text[start : min(start + 3, room)])


def _decode(d: Driver, limits: Limits, greedy: Greedy, notes: list[str]) -> None:
    prompt = limits.prompt(29)
    steps = limits.steps(limits.decode_steps, prompt, notes)
    text = limits.tokens("main", prompt + steps)
    with d.sequences(0):
        d.prefill(0, text[:prompt])
        d.decode(0, *text[prompt:])


def _greedy(d: Driver, limits: Limits, greedy: Greedy, notes: list[str]) -> None:
    if not greedy.continuation:
        raise SkipError(f"a context of {limits.context} tokens has no room for it")
    with d.sequences(0):
        d.prefill(0, greedy.prompt)
        d.decode(0, *greedy.continuation[:-1])


def _batch(d: Driver, limits: Limits, greedy: Greedy, notes: list[str]) -> None:
    count = min(4, limits.batch)
    if count < 2:
        raise SkipError("the library takes one sequence at a time (max_batch_size 1)")
    share = min(limits.chunk // count, limits.room - 12)
    if share < 1:
        raise SkipError(
            f"chunks of {limits.chunk} and contexts of {limits.context} tokens are too small"
        )
    lengths = [min(n, share) for n in (5, 17, 1, 33)[:count]]
    ids = range(count)
    texts = [limits.tokens(f"batch {i}", n + 12) for i, n in enumerate(lengths)]
    at = list(lengths)

    def next_tokens(chosen: Sequence[int], n: int) -> dict[int, Context]:
        parts = {i: texts[i][at[i] : at[i] + n] for i in chosen}
        for i in chosen:
            at[i] += n
        return parts

    with d.sequences(*ids):
        d.batch_prefill({i: texts[i][: lengths[i]] for i in ids})
        for _ in range(4):
            d.batch_decode({i: part[0] for i, part in next_tokens(ids, 1).items()})
        # More text for some, in one ragged call, behind what the cache holds.
        d.batch_prefill({1: next_tokens([1], 1)[1], **next_tokens([0], min(3, share))})
        d.remove(0)
        rest = list(reversed(ids[1:]))  # and the order of a batch is free
        for _ in range(3):
            d.batch_decode({i: part[0] for i, part in next_tokens(rest, 1).items()})


def _verify(d: Driver, limits: Limits, greedy: Greedy, notes: list[str]) -> None:
    before = limits.prompt(20)
    count = min(17, limits.chunk, limits.room - before - 1)
    if count < 1:
        raise SkipError(f"a context of {limits.context} tokens has no room for it")
    text = limits.tokens("main", before + count + 1)
    with d.sequences(0):
        d.verify(0, text[: min(before, limits.chunk)])
    with d.sequences(0):
        d.prefill(0, text[:before])
        d.verify(0, text[before : before + count])
        d.decode(0, text[-1])


def _functions(d: Driver, limits: Limits, greedy: Greedy, notes: list[str]) -> None:
    few = min(3, limits.chunk)
    if limits.room < 2 + 4 * few:
        raise SkipError(f"a context of {limits.context} tokens has no room for it")
    text = limits.tokens("main", 2 + 4 * few)
    with d.sequences(0):
        d.embedded(0, text[:few])
        d.embedded(0, text[few : few + 1])
        at = few + 1
        for name, count in (("decode", 1), ("prefill", few), ("batch_verify", few)):
            d.hidden(name, {0: text[at : at + count]})
            at += count
    with d.sequences(0):  # a batch of one, which runs the functions of one row
        d.batch_prefill({0: text[:few]})
        d.batch_decode({0: text[few]})
        d.hidden("batch_decode", {0: text[few + 1 : few + 2]})
    if limits.batch < 2 or limits.chunk < 2:
        notes.append("without batches: one sequence, or one token, at a time")
        return
    other = limits.tokens("batch 0", 2)
    with d.sequences(0, 1):
        d.hidden("batch_prefill", {0: text[: few - 1], 1: other[:1]})
        d.hidden("batch_decode", {1: other[1:], 0: text[few - 1 : few]})


def _fork(d: Driver, limits: Limits, greedy: Greedy, notes: list[str]) -> None:
    if limits.batch < 2:
        raise SkipError("the library takes one sequence at a time (max_batch_size 1)")
    length = limits.prompt(35)
    steps = limits.steps(4, length, notes)
    text, other = limits.tokens("main", length + steps), limits.tokens("fork", steps)
    points = [-1]
    points += [p for p in (16, 19) if p < length] or [max(1, length // 2)]
    if limits.window is not None:
        if not limits.sink:
            raise SkipError("the runtime forks a text with a sliding window only within its sinks")
        points = [limits.sink]
    for point in points:
        with d.sequences(0):
            d.prefill(0, text[:length])
            d.fork(0, 1, point)
            for mine, others in zip(text[length:], other, strict=True):
                d.decode(1, others)
                d.decode(0, mine)
            d.remove(0)  # the child must not need it
            if d.length(1) < limits.room:
                d.decode(1, text[0])


def _rollback(d: Driver, limits: Limits, greedy: Greedy, notes: list[str]) -> None:
    length = limits.prompt(33)
    if limits.window is not None:
        if limits.window < 2:
            raise SkipError("a window of one token has nothing to go back to")
        notes.append("within the window only: the runtime does not keep what has left it")
        length = min(length, limits.window // 2)
    steps = limits.steps(5 if limits.window is None else min(5, length), length, notes)
    text, other = limits.tokens("main", length + steps), limits.tokens("fork", steps)
    with d.sequences(0):
        d.prefill(0, text[:length])
        d.decode(0, *other)
        d.pop(0, steps)
        d.decode(0, *text[length:])
        # Back over the end of a page, then another text in one call.
        back = min(steps + 4, length + steps - 1)
        d.pop(0, back)
        d.prefill(0, other[: min(steps, back, limits.chunk)])


def _wrap(d: Driver, limits: Limits, greedy: Greedy, notes: list[str]) -> None:
    if limits.window is None:
        raise SkipError("the library has full attention")
    window, chunk = limits.window, limits.chunk
    steps = min(limits.decode_steps, window + 8)
    length = 2 * window + min(chunk, 64) + 5
    if length + steps + chunk > limits.longest:
        length = window + 5
    if length + steps > limits.longest:
        raise SkipError(
            f"a text longer than the window of {window} tokens takes this model long; --thorough "
            "does it"
        )
    text = limits.tokens("long", length + steps + min(chunk, 64))
    with d.sequences(0):
        d.prefill(0, text[:length])
        d.decode(0, *text[length : length + steps])
        if len(text) <= limits.longest:
            d.prefill(0, text[length + steps :])
    # And over the edge one token at a time.
    start = max(1, window - 5)
    with d.sequences(0):
        d.prefill(0, text[:start])
        d.decode(0, *text[start : start + min(steps, 24)])


def _full(d: Driver, limits: Limits, greedy: Greedy, notes: list[str]) -> None:
    if limits.context is None:
        raise SkipError("a sliding window has no end")
    if limits.context > limits.longest:
        raise SkipError(
            f"a text of all {limits.context} tokens takes this model long; --thorough does it"
        )
    text = limits.tokens("long", limits.context)
    start = max(1, len(text) - 3)
    with d.sequences(0):
        d.prefill(0, text[:start])
        d.decode(0, *text[start:])


SCENARIOS: tuple[tuple[str, str, Body], ...] = (
    ("prefill", "prompts around page ends", _prefill),
    ("chunked_prefill", "prompts read in several chunks, odd remainders", _chunked),
    ("decode", "a random text token by token", _decode),
    ("greedy", "the reference's greedy text token by token", _greedy),
    ("ragged_batch", "sequences of unequal length in one call", _batch),
    ("batch_verify", "logits of every position of a part", _verify),
    ("functions", "the other functions: from embeddings, to hidden states, get_logits", _functions),
    ("fork", "two sequences that share a beginning", _fork),
    ("rollback", "tokens taken back, another continuation", _rollback),
    ("window_wrap", "far past the sliding window", _wrap),
    ("full_context", "up to the last token of the context", _full),
)


def _note(seen: list[Context], context: Context, logits: Float32 | None) -> None:
    seen.append(context)


def plan_contexts(limits: Limits, greedy: Greedy) -> dict[str, list[Context]]:
    """The contexts that each scenario will compare; none for one that is skipped."""
    plan: dict[str, list[Context]] = {}
    for name, _, body in SCENARIOS:
        seen: list[Context] = []
        with suppress(SkipError):
            body(Driver(None, partial(_note, seen), limits), limits, greedy, [])
        plan[name] = seen
    return plan
