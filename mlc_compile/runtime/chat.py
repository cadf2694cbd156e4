"""Text in, text out: a conversation, or the continuation of a text, on one KV cache.

- A prompt is the template's text encoded as a whole, after `system_prefix_token_ids`: the tokens a
  fresh conversation would have. What the cache already holds of them is kept, the rest is
  forgotten and fed anew, so a second turn costs what is new and means the same.
- Text comes out as soon as it is certain: no half characters, and nothing of a stop string.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol

from mlc_compile.chat_config import ChatConfig
from mlc_compile.errors import InputError
from mlc_compile.runtime.sampling import Sampler, Sampling
from mlc_compile.weights.conv_template import ConvTemplate, Message

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from mlc_compile.runtime.engine import Library, Logits

SEQUENCE: Final = 0
REPLACEMENT: Final = "\N{REPLACEMENT CHARACTER}"
"""What a decoder writes for bytes that are not, or not yet, a character."""

# Tokens of the prompt that the first piece of a reply is decoded after. Enough to hold a visible
# one, before which a space would be dropped as the start of a text.
_BEFORE = 16


class Decoding(Protocol):
    """What a session needs of `runtime.engine.Engine`."""

    window: int

    @property
    def context(self) -> int: ...
    @property
    def library(self) -> Library: ...
    def add_sequence(self, sequence: int) -> None: ...
    def remove_sequence(self, sequence: int) -> None: ...
    def pop(self, sequence: int, count: int) -> None: ...
    def prefill(self, sequence: int, tokens: Sequence[int]) -> Logits: ...
    def decode(self, sequence: int, token: int) -> Logits: ...


class Detokenizer:
    """The text of tokens as they come, in whole characters, continuing the tokens `before`.

    Each new token is decoded together with the ones last given out, because decoders drop a space
    at the start of a text. Special tokens have no text.
    """

    def __init__(self, tokenizer: Tokenizer, before: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._ids = list(before[-_BEFORE:])
        self._start, self._given = 0, len(self._ids)

    def push(self, token: int) -> str:
        """What `token` adds; "" while its last character is incomplete."""
        self._ids.append(token)
        return self._take(final=False)

    def flush(self) -> str:
        """What was held back, an incomplete character as U+FFFD."""
        return self._take(final=True)

    def _take(self, final: bool) -> str:
        text, given = self._text(len(self._ids)), self._text(self._given)
        if text.endswith(REPLACEMENT) and not final:
            return ""
        piece = text[len(given) :]
        if piece:  # a window must hold visible text, see _BEFORE
            self._start, self._given = self._given, len(self._ids)
        return piece

    def _text(self, end: int) -> str:
        text: str = self._tokenizer.decode(self._ids[self._start : end], skip_special_tokens=True)
        return text


class StopStrings:
    """Passes text on up to the first of `stops`; holds back what may be the start of one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(filter(None, stops))
        self._held = ""
        self.found = False

    def push(self, text: str) -> str:
        """The text that is certain not to belong to a stop string."""
        text = self._held + text
        at = min((i for stop in self._stops if (i := text.find(stop)) >= 0), default=-1)
        if at >= 0:
            self.found, self._held = True, ""
            return text[:at]
        keep = max(
            (n for stop in self._stops for n in range(1, len(stop)) if text.endswith(stop[:n])),
            default=0,
        )
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """What was held back; the text ends here."""
        text, self._held = self._held, ""
        return text


FINISHES: Final = {
    "stop": "the model ended the text",
    "length": "--max-tokens reached",
    "context": "the context window is full",
    "interrupted": "interrupted",
}


@dataclass
class ChatStats:
    """Of one reply. `prompt_tokens` were fed, `cached_tokens` before them were in the cache.

    finish: a key of FINISHES. Decode time covers the model and the choice of tokens.
    """

    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    decoded_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    finish: str = "interrupted"

    @property
    def prefill_rate(self) -> float:
        """Prompt tokens per second."""
        return self.prompt_tokens / self.prefill_seconds if self.prefill_seconds else 0.0

    @property
    def decode_rate(self) -> float:
        """Tokens per second after the first, which comes out of the prompt."""
        return self.decoded_tokens / self.decode_seconds if self.decode_seconds else 0.0

    def to_json(self) -> dict[str, Any]:
        """JSON-ready data."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "cached_tokens": self.cached_tokens,
            "generated_tokens": self.generated_tokens,
            "prefill_tokens_per_second": round(self.prefill_rate, 2),
            "decode_tokens_per_second": round(self.decode_rate, 2),
            "finish": self.finish,
        }

    def to_text(self) -> str:
        """One line for people."""
        cached = f" (and {self.cached_tokens} cached)" if self.cached_tokens else ""
        decode = f", {self.decode_rate:.1f} tok/s" if self.decoded_tokens else ""
        return (
            f"prompt: {self.prompt_tokens} tokens{cached}, {self.prefill_rate:.1f} tok/s; "
            f"generated: {self.generated_tokens} tokens{decode}; {FINISHES[self.finish]}"
        )


@dataclass(frozen=True)
class Reply:
    """A whole reply."""

    text: str
    stats: ChatStats

    def to_json(self) -> dict[str, Any]:
        """JSON-ready data."""
        return {"text": self.text, **self.stats.to_json()}


class ChatSession:
    """A conversation with one model. `system` replaces the template's system message.

    `stats` are those of the latest reply.
    """

    def __init__(
        self,
        engine: Decoding,
        tokenizer: Tokenizer,
        template: ConvTemplate,
        *,
        stop_token_ids: frozenset[int],
        active_vocab: int,
        system: str | None = None,
    ) -> None:
        self.engine = engine
        self.tokenizer = tokenizer
        self.template = template
        self.stop_token_ids = stop_token_ids
        self.active_vocab = active_vocab
        self.system = system
        self.messages: list[Message] = []
        self.stats = ChatStats()
        self._own_prefix = _prefix_ids(tokenizer)
        # A reply's text in the transcript follows role_content_sep, but role_empty_sep when it is
        # generated; what the first has more, the model itself writes at the start of its reply.
        content, empty = template.role_content_sep, template.role_empty_sep
        self._lead = content.removeprefix(empty) if content.startswith(empty) else ""
        self._cached: list[int] | None = None  # tokens in the cache; None: no usable sequence
        self._added = False

    @classmethod
    def load(cls, library: Path, directory: Path, *, system: str | None = None) -> ChatSession:
        """A session of the library with the parameters and configuration of `directory`.

        Raises:
            InputError: one of the three is missing, damaged or does not belong to the others.
        """
        config = ChatConfig.read(directory)
        tokenizer = load_tokenizer(directory)
        from mlc_compile.runtime.engine import Engine

        engine = Engine.load(library, directory, max_batch=1)
        engine.start_pool()
        eos = config.raw.get("eos_token_id")
        stops = {*config.conv_template.stop_token_ids, *(eos if isinstance(eos, list) else [eos])}
        return cls(
            engine,
            tokenizer,
            config.conv_template,
            stop_token_ids=frozenset(stops - {None}),
            active_vocab=int(engine.library.metadata["active_vocab_size"]),
            system=system,
        )

    def generate(
        self,
        text: str,
        *,
        raw: bool = False,
        max_tokens: int = 128,
        sampling: Sampling | None = None,
    ) -> Iterator[str]:
        """The reply to the user message `text`, piece by piece, within the conversation.

        raw: continue `text` itself instead; the conversation neither counts nor changes. sampling:
        greedy by default. A reply that is not read to its end counts as far as it was read.

        Raises:
            InputError: the prompt is empty or leaves no room in the context window.
            CheckFailedError: the library computes logits that are not numbers.
        """
        if raw:
            tokens = self._own_prefix + self._encode(text)
            yield from self._generate(tokens, max_tokens, sampling, (), "", [])
            return
        turn: list[Message] = [*self.messages, ("user", text)]
        prompt = self.template.render([*turn, ("assistant", None)], self.system)
        tokens = [*self.template.system_prefix_token_ids, *self._encode(prompt)]
        reply: list[str] = []
        try:
            yield from self._generate(
                tokens, max_tokens, sampling, self.template.stop_str, self._lead, reply
            )
        finally:
            if self.stats.prefill_seconds:  # the prompt was accepted
                self.messages = [*turn, ("assistant", "".join(reply))]

    def reset(self) -> None:
        """Start a new conversation."""
        self.messages = []

    def _encode(self, text: str) -> list[int]:
        # The template or the prefix says which special tokens there are, not the tokenizer.
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def _generate(
        self,
        tokens: list[int],
        max_tokens: int,
        sampling: Sampling | None,
        stop_strings: Sequence[str],
        lead: str,
        reply: list[str],
    ) -> Iterator[str]:
        """Pieces of text after the prompt `tokens`, each appended to `reply` before it is given.

        lead: left out where the reply starts with it.
        """
        stats = self.stats = ChatStats()
        room = self.engine.context - len(tokens)
        if room <= 0:
            raise InputError(
                f"the prompt has {len(tokens)} tokens and the context window holds "
                f"{self.engine.context}",
                hint="shorten it, start a new conversation, or compile with a larger "
                "--context-window-size",
            )
        choose = Sampler(sampling or Sampling(), self.active_vocab, self.engine.library)
        detokenizer, stops = Detokenizer(self.tokenizer, tokens), StopStrings(stop_strings)
        stats.cached_tokens = self._keep(tokens)
        stats.prompt_tokens = len(tokens) - stats.cached_tokens
        started = time.perf_counter()
        logits = self._feed(tokens[stats.cached_tokens :])
        stats.prefill_seconds = time.perf_counter() - started

        def given(piece: str) -> Iterator[str]:
            nonlocal lead
            if lead and piece:
                # Drop as much of it as is there; it may come in more than one piece.
                same = _in_common(lead, piece)
                piece, lead = piece[same:], lead[same:] if same == len(piece) else ""
            if piece:
                reply.append(piece)
                yield piece

        limit = min(max_tokens, room)
        while True:
            started = time.perf_counter()
            token = choose(logits)
            stats.decode_seconds += time.perf_counter() - started
            if token in self.stop_token_ids:
                stats.finish = "stop"
                break
            stats.generated_tokens += 1
            yield from given(stops.push(detokenizer.push(token)))
            if stops.found:
                stats.finish = "stop"
                return
            if stats.generated_tokens == limit:
                stats.finish = "length" if limit == max_tokens else "context"
                break
            started = time.perf_counter()
            logits = self._feed([token])
            stats.decode_seconds += time.perf_counter() - started
            stats.decoded_tokens += 1
        yield from given(stops.push(detokenizer.flush()))
        if not stops.found:
            yield from given(stops.flush())

    def _keep(self, tokens: list[int]) -> int:
        """Make the cache hold a proper prefix of `tokens` and nothing else; its length."""
        cached = self._cached or []
        # One token at least must be fed, for its logits.
        keep = _in_common(cached, tokens[:-1])
        drop = len(cached) - keep
        # A sliding window has overwritten what it would have to go back to.
        if self._cached is None or keep == 0 or (drop and self.engine.window > 0):
            if self._added:
                self.engine.remove_sequence(SEQUENCE)
            self.engine.add_sequence(SEQUENCE)
            self._added, keep = True, 0
        elif drop:
            self.engine.pop(SEQUENCE, drop)
        self._cached = tokens[:keep]
        return keep

    def _feed(self, tokens: Sequence[int]) -> Logits:
        """Logits after `tokens`, which are then in the cache."""
        cached, self._cached = self._cached or [], None  # None while the cache is in between
        if len(tokens) == 1:
            logits = self.engine.decode(SEQUENCE, tokens[0])
        else:
            logits = self.engine.prefill(SEQUENCE, tokens)
        cached.extend(tokens)
        self._cached = cached
        return logits


def _in_common(a: Sequence[Any], b: Sequence[Any]) -> int:
    """How many items the two start with alike."""
    length = min(len(a), len(b))
    return next((i for i in range(length) if a[i] != b[i]), length)


def load_tokenizer(directory: Path) -> Tokenizer:
    """The tokenizer.json that gen_config copied. Raises InputError if there is none to load."""
    from tokenizers import Tokenizer

    file = directory / "tokenizer.json"
    if not file.is_file():
        raise InputError(f"there is no {file}", hint="make it with mlc_compile gen_config")
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises plain Exception
        raise InputError(
            f"the tokenizers library can't read {file}: {error}", hint="run gen_config again"
        ) from error


def _prefix_ids(tokenizer: Tokenizer) -> list[int]:
    """What the tokenizer itself puts before a text, which is what a raw prompt starts with."""
    plain = tokenizer.encode("a", add_special_tokens=False).ids
    whole: list[int] = tokenizer.encode("a", add_special_tokens=True).ids
    starts = (i for i in range(len(whole)) if whole[i : i + len(plain)] == plain)
    return whole[: next(starts, 0)]
