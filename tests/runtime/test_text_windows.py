"""Windows of a text: llama.cpp's cut, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from built_model import CHECKPOINT

from mlc_compile.errors import InputError
from mlc_compile.runtime.text_windows import Text, cut, encode, read_text

TOKENIZER = (CHECKPOINT / "tokenizer.json").read_bytes()


def test_each_window_begins_with_the_prefix() -> None:
    """The stream is bos + text; the bos of a later window takes the place of its first token."""
    windows = cut((7,), list(range(100, 111)), 4, where="t")
    np.testing.assert_array_equal(
        windows.tokens, [[7, 100, 101, 102], [7, 104, 105, 106], [7, 108, 109, 110]]
    )
    assert windows.stream == 12
    assert windows.tokens.dtype == np.int32


def test_without_a_prefix_nothing_is_lost() -> None:
    windows = cut((), list(range(11)), 4, where="t")
    np.testing.assert_array_equal(windows.tokens, [[0, 1, 2, 3], [4, 5, 6, 7]])


def test_max_tokens_bounds_the_stream() -> None:
    assert cut((), list(range(100)), 4, max_tokens=11, where="t").tokens.shape == (2, 4)


@pytest.mark.parametrize(
    ("tokens", "size", "most", "message"),
    [
        (10, 16, None, "t.txt has 11 tokens, less than one window of 16; give a longer text"),
        (40, 16, 12, "--max-tokens 12 is less than one window of 16"),
        (40, 2, None, "a window of 2 tokens has no room for text"),
    ],
)
def test_too_short(tokens: int, size: int, most: int | None, message: str) -> None:
    with pytest.raises(InputError, match=message):
        cut((7,), list(range(tokens)), size, max_tokens=most, where="t.txt")


def test_encode_keeps_special_tokens_apart() -> None:
    prefix, tokens = encode(TOKENIZER, Text("t", "Call me Ishmael.", ""), "here")
    assert prefix == (0,)
    assert 0 not in tokens and 1 not in tokens


def test_read_text(tmp_path: Path) -> None:
    path = tmp_path / "t.txt"
    path.write_bytes("é\r\n".encode())
    text = read_text(path)
    assert (text.name, text.content) == ("t.txt", "é\r\n")
    path.write_bytes(b"abc\xff")
    with pytest.raises(InputError, match=r"is not UTF-8 text \(byte 3\)"):
        read_text(path)
    with pytest.raises(InputError, match="cannot be read"):
        read_text(tmp_path)
