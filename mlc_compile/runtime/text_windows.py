"""A text as windows of tokens: what `quality` scores and `calibrate` reads.

As llama.cpp's perplexity tool cuts it: the whole text is one stream of tokens, begun by what the
tokenizer puts before a text (a bos token, or nothing); windows do not overlap; what is left at the
end is dropped; and the first token of every window is overwritten by that prefix, so that each
window is a text of its own.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mlc_compile.errors import InputError
from mlc_compile.weights.tokenizer import load_tokenizer


@dataclass(frozen=True)
class Text:
    """A text file: its content, and what names it in reports."""

    name: str
    content: str
    sha256: str


@dataclass(frozen=True)
class Windows:
    """tokens: int32 [count, size]; prefix: what each row begins with; stream: tokens in all."""

    tokens: NDArray[np.int32]
    prefix: tuple[int, ...]
    stream: int


def read_text(path: Path) -> Text:
    """The file as UTF-8, line ends as they are.

    Raises InputError when it cannot be read or is no UTF-8 text.
    """
    try:
        data = path.read_bytes()
        content = data.decode("utf-8")
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path}: is not UTF-8 text (byte {error.start})", hint="give plain prose as UTF-8"
        ) from error
    return Text(path.name, content, hashlib.sha256(data).hexdigest())


def encode(tokenizer_json: bytes, text: Text, where: str) -> tuple[tuple[int, ...], list[int]]:
    """(prefix, tokens of the text without it) by the tokenizers library.

    Raises InputError when the tokenizer cannot be loaded.
    """
    from tokenizers import Tokenizer

    prefix = load_tokenizer(tokenizer_json, where).bos_prefix
    tokenizer = Tokenizer.from_str(tokenizer_json.decode("utf-8"))
    # Neither may cut a corpus to the length of a training example.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    ids: list[int] = tokenizer.encode(text.content, add_special_tokens=False).ids
    return prefix, ids


def cut(
    prefix: tuple[int, ...],
    tokens: list[int],
    size: int,
    *,
    max_tokens: int | None = None,
    where: str,
) -> Windows:
    """Windows of `size` tokens from the beginning of the text, of at most `max_tokens` in all.

    Raises:
        InputError: fewer tokens than one window, or a window that the prefix fills.
    """
    if size <= len(prefix) + 1:
        raise InputError(f"a window of {size} tokens has no room for text", hint="ask for more")
    stream = [*prefix, *tokens]
    if max_tokens is not None:
        stream = stream[:max_tokens]
    count = len(stream) // size
    if count == 0:
        limited = max_tokens is not None and len(prefix) + len(tokens) >= size
        raise InputError(
            f"--max-tokens {max_tokens} is less than one window of {size} tokens"
            if limited
            else f"{where} has {len(stream)} tokens, less than one window of {size}",
            hint="ask for more tokens" if limited else "give a longer text or a smaller --window",
        )
    windows = np.array(stream[: count * size], np.int32).reshape(count, size)
    windows[:, : len(prefix)] = prefix
    return Windows(windows, prefix, len(stream))
