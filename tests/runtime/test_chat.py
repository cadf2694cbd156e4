"""A session: which tokens reach the model, which text comes out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from built_model import CHECKPOINT, CONTEXT, built_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from mlc_compile.errors import InputError
from mlc_compile.runtime.chat import ChatSession, Detokenizer, StopStrings
from mlc_compile.weights.conv_template import ConvTemplate

BOS, EOS, START, END = "<s>", "</s>", "<|start|>", "<|end|>"
TEXTS = [
    " Paris",
    "Hello there",
    "naïve café",
    "日本語 ✓",
    "a😀b 👩\u200d🚀",
    "  two  spaces\n\nlines",
]


def with_specials(tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer with BOS, EOS, START and END, and BOS before every text."""
    tokenizer.add_special_tokens([BOS, EOS, START, END])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return tokenizer


def byte_level() -> Tokenizer:
    """A token for each byte, as in GPT-2, and a few words."""
    vocab = {char: i for i, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    for left, right in (merges := [("Ġ", "P"), ("H", "e"), ("l", "l")]):
        vocab[left + right] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return with_specials(tokenizer)


def byte_fallback() -> Tokenizer:
    """Characters, ▁ for a space, and bytes for what is not in the vocabulary, as in Llama 2."""
    vocab = {"<unk>": 0} | {f"<0x{i:02X}>": i + 1 for i in range(256)}
    for char in "▁abcdefghijklmnopqrstuvwxyzHP\n":
        vocab[char] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return with_specials(tokenizer)


KINDS = [byte_level, byte_fallback]


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    return ids


# --------------------------------------------------------------------------------------------
# Text out


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("kind", KINDS)
def test_pieces_are_whole_characters_and_make_the_text(
    kind: Callable[[], Tokenizer], text: str
) -> None:
    tokenizer = kind()
    for before in ("The capital is", f"{BOS}{START}user\n"):
        stream = Detokenizer(tokenizer, encode(tokenizer, before))
        pieces = [stream.push(token) for token in encode(tokenizer, text)]
        assert "".join(pieces) == text
        assert "\ufffd" not in "".join(pieces)
        assert stream.flush() == ""


@pytest.mark.parametrize("kind", KINDS)
def test_a_character_comes_out_with_its_last_byte(kind: Callable[[], Tokenizer]) -> None:
    tokenizer = kind()
    stream = Detokenizer(tokenizer, encode(tokenizer, "x"))
    assert [stream.push(token) for token in encode(tokenizer, "😀!")] == ["", "", "", "😀", "!"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_cut_character_comes_out_at_the_end(kind: Callable[[], Tokenizer]) -> None:
    tokenizer = kind()
    stream = Detokenizer(tokenizer, encode(tokenizer, "x"))
    assert [stream.push(token) for token in encode(tokenizer, "é")[:-1]] == [""]
    assert stream.flush() == "\ufffd"


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_have_no_text_and_lose_no_space(kind: Callable[[], Tokenizer]) -> None:
    tokenizer = kind()
    stream = Detokenizer(tokenizer, encode(tokenizer, "Hi"))
    tokens = [tokenizer.token_to_id(START), *encode(tokenizer, " Paris")]
    assert "".join(stream.push(token) for token in tokens) == " Paris"


def test_bytes_that_are_no_text_are_as_the_tokenizer_says() -> None:
    tokenizer = byte_level()
    alphabet = len(pre_tokenizers.ByteLevel.alphabet())
    for seed in range(20):
        tokens = np.random.default_rng(seed).integers(0, alphabet, 40).tolist()
        stream = Detokenizer(tokenizer)
        text = "".join(stream.push(token) for token in tokens) + stream.flush()
        assert text == tokenizer.decode(tokens)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 100])
def test_stop_strings_in_pieces_of_any_size(size: int) -> None:
    text = "one <| two <|end|> three"
    stops = StopStrings(["<|end|>", "never", ""])
    found = ""
    for at in range(0, len(text), size):
        found += stops.push(text[at : at + size])
        assert "one <| two <|end|>".startswith(found)
        if stops.found:
            break
    assert (stops.found, found) == (True, "one <| two ")


def test_the_first_of_several_stop_strings_counts_and_a_started_one_is_given_back() -> None:
    stops = StopStrings(["cd", "b"])
    assert (stops.push("abcd"), stops.found) == ("a", True)
    stops = StopStrings(["abc"])
    assert (stops.push("xab"), stops.flush(), stops.found) == ("x", "ab", False)


# --------------------------------------------------------------------------------------------
# Tokens in: a model that says what it is told to

CHAT = ConvTemplate(
    name="test",
    roles={"user": f"{START}user", "assistant": f"{START}assistant"},
    seps=(f"{END}\n",),
    system_template=f"{START}system\n{{system_message}}{END}\n",
    system_message="Be brief.",
    role_content_sep="\n",
    role_empty_sep="\n",
    system_prefix_token_ids=(),
)


class Scripted:
    """An engine whose cache is a list, and which replies with the tokens of `replies` in turn.

    `fed`: how many tokens each call to the model was given. A reply starts with each prompt that
    is prefilled, and ends with END.
    """

    window = -1

    def __init__(self, tokenizer: Tokenizer, replies: Sequence[str], context: int = 10_000) -> None:
        self.replies = [[*encode(tokenizer, r), tokenizer.token_to_id(END)] for r in replies]
        self.context, self.vocab = context, tokenizer.get_vocab_size()
        self.cache: list[int] | None = None
        self.fed: list[int] = []
        self.popped = 0
        self.prompts: list[list[int]] = []
        self.fail = False

    @property
    def library(self) -> Any:
        return self

    def has(self, _name: str) -> bool:
        return False

    def add_sequence(self, _sequence: int) -> None:
        assert self.cache is None
        self.cache = []

    def remove_sequence(self, _sequence: int) -> None:
        assert self.cache is not None
        self.cache = None

    def pop(self, _sequence: int, count: int) -> None:
        assert self.cache is not None and 0 < count < len(self.cache)
        assert self.window <= 0
        self.popped += count
        del self.cache[-count:]

    def prefill(self, _sequence: int, tokens: Sequence[int]) -> np.ndarray:
        assert self.cache is not None and tokens
        self.cache.extend(tokens)
        self.fed.append(len(tokens))
        if self.fail:
            raise KeyboardInterrupt
        self.prompts.append(list(self.cache))
        self.rest = list(self.replies.pop(0))
        return self._next()

    def decode(self, _sequence: int, token: int) -> np.ndarray:
        assert self.cache is not None
        self.cache.append(token)
        self.fed.append(1)
        return self._next()

    def _next(self) -> np.ndarray:
        logits = np.zeros(self.vocab, np.float32)
        logits[self.rest.pop(0)] = 1.0
        return logits


def session(
    replies: Sequence[str],
    template: ConvTemplate = CHAT,
    *,
    kind: Callable[[], Tokenizer] = byte_level,
    **options: Any,
) -> tuple[ChatSession, Scripted]:
    tokenizer = kind()
    engine = Scripted(tokenizer, replies, **options)
    stops = frozenset({tokenizer.token_to_id(END), tokenizer.token_to_id(EOS)})
    chat = ChatSession(engine, tokenizer, template, stop_token_ids=stops, active_vocab=engine.vocab)
    return chat, engine


def say(chat: ChatSession, text: str, **options: Any) -> str:
    return "".join(chat.generate(text, **options))


@pytest.mark.parametrize("kind", KINDS)
def test_every_turn_sees_the_tokens_of_a_fresh_conversation(
    kind: Callable[[], Tokenizer],
) -> None:
    replies = ["Hello 😀", "Paris", " café\n"]
    chat, engine = session(replies, kind=kind)
    messages: list[tuple[str, str | None]] = []
    for number, reply in enumerate(replies):
        assert say(chat, f"question {number}") == reply
        assert chat.stats.finish == "stop"
        messages.append(("user", f"question {number}"))
        prompt = CHAT.render([*messages, ("assistant", None)])
        assert engine.prompts[-1] == encode(chat.tokenizer, prompt)
        assert chat.stats.cached_tokens + chat.stats.prompt_tokens == len(engine.prompts[-1])
        messages.append(("assistant", reply))
    assert chat.messages == messages
    # All that was said before is still in the cache.
    assert engine.popped == 0
    assert chat.stats.cached_tokens > chat.stats.prompt_tokens
    assert sum(engine.fed) == len(engine.cache or ())


def test_reasoning_is_forgotten_in_the_cache_too() -> None:
    from dataclasses import replace

    template = replace(CHAT, strip_reasoning_in_history=True)
    chat, engine = session(["<think>\nhm\n</think>\n\nyes", "no"], template)
    say(chat, "Really?")
    say(chat, "Sure?")
    text = chat.tokenizer.decode(engine.prompts[-1], skip_special_tokens=False)
    assert "hm" not in text and "yes" in text
    assert engine.popped > 0


def test_a_sliding_window_is_never_rolled_back() -> None:
    chat, engine = session(["a", "b"])
    engine.window = 64
    say(chat, "abc", raw=True)
    say(chat, "abd", raw=True)
    assert chat.stats.cached_tokens == 0
    assert engine.prompts[-1] == [chat.tokenizer.token_to_id(BOS), *encode(chat.tokenizer, "abd")]


@pytest.mark.parametrize("kind", KINDS)
def test_prefixes(kind: Callable[[], Tokenizer]) -> None:
    """A template says what comes first; a raw text starts as the tokenizer says."""
    from dataclasses import replace

    eos = kind().token_to_id(EOS)
    chat, engine = session(["x", "y"], replace(CHAT, system_prefix_token_ids=(eos,)), kind=kind)
    say(chat, "Hi")
    assert engine.prompts[0][:2] == [eos, chat.tokenizer.token_to_id(START)]
    say(chat, "Hi", raw=True)
    assert engine.prompts[1] == [chat.tokenizer.token_to_id(BOS), *encode(chat.tokenizer, "Hi")]
    assert [role for role, _ in chat.messages] == ["user", "assistant"]


def test_system_message() -> None:
    chat, engine = session(["x"])
    chat.system = "Be long."
    say(chat, "Hi")
    text = chat.tokenizer.decode(engine.prompts[0], skip_special_tokens=False)
    assert "Be long." in text and "Be brief." not in text


def test_a_space_that_the_template_has_is_not_part_of_the_reply() -> None:
    template = ConvTemplate(
        name="inst", roles={"user": "[INST]", "assistant": "[/INST]"}, seps=("", END),
        role_content_sep=" ",
    )  # fmt: skip
    chat, engine = session([" Paris", " yes", "no"], template)
    assert say(chat, "Capital?") == "Paris"
    assert say(chat, "Sure?") == "yes"
    assert engine.popped == 0
    text = chat.tokenizer.decode(engine.prompts[1], skip_special_tokens=False)
    assert text == f"[INST] Capital?[/INST] Paris{END}[INST] Sure?[/INST]"
    assert say(chat, "Really?") == "no"


def test_limits() -> None:
    chat, engine = session(["abcdef", "abcdef"])
    assert say(chat, "Hi", max_tokens=3) == "abc"
    assert (chat.stats.finish, chat.stats.generated_tokens) == ("length", 3)
    # The last token is not fed: nobody asks what follows it.
    assert engine.fed[1:] == [1, 1]
    engine.context = len(engine.prompts[0]) + 4
    chat.reset()
    assert say(chat, "Ho") == "abcd"
    assert chat.stats.finish == "context"


def test_stop_string_of_the_template_ends_the_reply() -> None:
    from dataclasses import replace

    chat, engine = session(["one STOP two", "x"], replace(CHAT, stop_str=("STOP",)))
    assert say(chat, "Count.") == "one "
    assert chat.stats.finish == "stop"
    say(chat, "Go on.")
    text = chat.tokenizer.decode(engine.prompts[1], skip_special_tokens=False)
    assert f"one {END}" in text


def test_a_conversation_that_does_not_fit_is_refused_and_stays_as_it_was() -> None:
    chat, engine = session(["ok", "ok", "ok"])
    say(chat, "Hi")
    before = list(chat.messages)
    engine.context = len(engine.prompts[0]) + 40
    with pytest.raises(InputError, match=r"prompt has \d+ tokens.*--context-window-size"):
        say(chat, "long " * 30)
    assert chat.messages == before
    engine.context = 10_000
    assert say(chat, "Hi") == "ok"
    assert len(chat.messages) == 4


def test_a_reply_that_is_left_early_counts_as_far_as_it_was_read() -> None:
    chat, engine = session(["abcdef", "x"])
    reply = chat.generate("Hi")
    assert [next(reply), next(reply)] == ["a", "b"]
    reply.close()
    assert chat.messages[-1] == ("assistant", "ab")
    say(chat, "More")
    fresh = CHAT.render(
        [("user", "Hi"), ("assistant", "ab"), ("user", "More"), ("assistant", None)]
    )
    assert engine.prompts[-1] == encode(chat.tokenizer, fresh)


def test_a_cache_that_was_left_in_between_is_not_used_again() -> None:
    chat, engine = session(["x", "y"])
    say(chat, "Hi")
    engine.fail = True
    with pytest.raises(KeyboardInterrupt):
        say(chat, "More")
    engine.fail = False
    assert len(chat.messages) == 2
    assert say(chat, "More") == "y"
    assert chat.stats.cached_tokens == 0
    assert engine.prompts[-1] == engine.cache[: len(engine.prompts[-1])]  # type: ignore[index]


# --------------------------------------------------------------------------------------------
# The real thing


def load() -> ChatSession:
    model = built_model()
    return ChatSession.load(model.library, model.directory)


def test_the_compiled_model_continues_with_words() -> None:
    chat = load()
    text = say(chat, "It was a dark night, and the ship", raw=True, max_tokens=24)
    words = (CHECKPOINT / "words.txt").read_text("utf-8").split()
    found = [word.strip(".,;:!?\"'").lower() for word in text.split()[1:-1]]
    assert len(found) >= 5
    assert sum(word in words for word in found) >= 0.7 * len(found)
    assert chat.stats.generated_tokens == 24 and chat.stats.decoded_tokens == 23
    assert text.startswith((" ", "'", ",", ".", "s"))


def test_a_kept_cache_gives_the_logits_of_a_fresh_one() -> None:
    """After a longer text was partly forgotten, and across a chunk boundary."""
    first = "It was a dark night, and the ship was going down with all her men. " * 5
    second = first[:150] + "The captain stood upon the deck, and said nothing at all. " * 4
    chat, fresh = load(), load()
    logits = {}
    for one, texts in ((chat, [first, second]), (fresh, [second])):
        for text in texts:
            tokens = one._own_prefix + one._encode(text)
            kept = one._keep(tokens)
            logits[one] = one._feed(tokens[kept:])
        assert (kept > 20) == (one is chat)
    assert np.abs(logits[fresh]).max() > 5
    np.testing.assert_allclose(logits[chat], logits[fresh], atol=0.1)


def test_too_long_a_prompt_for_the_compiled_model() -> None:
    with pytest.raises(InputError, match=f"context window holds {CONTEXT}"):
        say(load(), "the ship and " * 200, raw=True)


def test_missing_parts_are_named(tmp_path: Path) -> None:
    model = built_model()
    with pytest.raises(InputError, match=r"no .*mlc-chat-config\.json; make it with .*gen_config"):
        ChatSession.load(model.library, tmp_path)
    config = (model.directory / "mlc-chat-config.json").read_bytes()
    (tmp_path / "mlc-chat-config.json").write_bytes(config)
    with pytest.raises(InputError, match=r"no .*tokenizer\.json"):
        ChatSession.load(model.library, tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match=r"can't read .*tokenizer\.json"):
        ChatSession.load(model.library, tmp_path)
