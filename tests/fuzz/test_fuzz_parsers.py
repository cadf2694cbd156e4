"""Whatever a file holds: its parser ends with a result or one of our errors, and takes little.

`MLC_COMPILE_FUZZ_MINUTES=30 python -m pytest tests/fuzz -n2 -k long` gives each half an hour.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

sys.path.append(str(Path(__file__).parent))
from mutations import mutations
from parsers import NAMES, Parser, parsers

from mlc_compile.errors import MlcError

pytest.importorskip("torch")

MINUTES = float(os.environ.get("MLC_COMPILE_FUZZ_MINUTES", 0))
SECONDS = 60
"""After which a parser hangs; it takes milliseconds, and machines may be busy."""
MEMORY = 48 << 20
"""Peak of a parser's own allocations: this, and so many times the size of its files."""
TIMES = 40


@contextmanager
def guarded() -> Iterator[None]:
    """Breaks off what hangs."""

    def hangs(*_: object) -> None:
        raise AssertionError(f"not done after {SECONDS} seconds")

    if not hasattr(signal, "SIGALRM"):
        yield
        return
    before = signal.signal(signal.SIGALRM, hangs)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def prepared(parser: Parser, folder: Path) -> Path:
    """The valid files in a folder, once read: whatever is imported, is by now."""
    if not folder.exists():
        for name, data in parser.files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(data)
        parser.read(folder)
    return folder


def check(parser: Parser, folder: Path, data: bytes) -> None:
    """The property."""
    (folder / parser.victim).write_bytes(data)
    size = sum(map(len, parser.files.values())) + len(data)
    tracemalloc.start(1)
    try:
        with guarded():
            try:
                parser.read(folder)
            except MlcError as error:
                assert "\n" not in str(error.message), error
                assert len(str(error)) < 60_000
                str(error).encode()  # a terminal can show it
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < MEMORY + TIMES * size, f"{peak >> 20} MiB for {size} bytes"


def search(parser: Parser, folder: Path, examples: int, *, derandomize: bool = True) -> None:
    folder = prepared(parser, folder)
    valid = parser.files[parser.victim]

    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=derandomize,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
    @given(mutations)
    def mutated(changes: list[tuple[int, int, int]]) -> None:
        check(parser, folder, parser.mutate(valid, changes))

    @settings(
        max_examples=max(2, examples // 10),
        deadline=None,
        database=None,
        derandomize=derandomize,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.binary(max_size=300), st.sampled_from((0, 1, 4, 8, 16, 200)))
    def foreign(noise: bytes, kept: int) -> None:
        check(parser, folder, valid[:kept] + noise)

    mutated()
    foreign()


@pytest.mark.parametrize("name", NAMES)
def test_only_our_errors(name: str, tmp_path: Path) -> None:
    search(parsers()[name], tmp_path / "files", 10)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_only_our_errors_at_length(name: str, tmp_path: Path) -> None:
    search(parsers()[name], tmp_path / "files", 60)


if MINUTES:

    @pytest.mark.parametrize("name", NAMES)
    def test_for_long(name: str, tmp_path: Path) -> None:
        end = time.monotonic() + 60 * MINUTES
        while time.monotonic() < end:
            search(parsers()[name], tmp_path / "files", 200, derandomize=False)


START = b'{"active_vocab_size":'
# What searches have found, and what they are unlikely to: (parser, old text, new text).
FOUND = {
    "a longer name than file systems take": ("torch index", b"1-of-1.bin", b"f" * 300 + b".bin"),
    "a folder in an index": ("safetensors index", b"model-1-of", b"../model-1-of"),
    "another drive in an index": ("torch index", b'"pytorch_model', b'"C:\\\\pytorch_model'),
    "a name of zero bytes": ("safetensors index", b"model-2-of", b"\\u0000model-2-of"),
    "a path in tensor-cache.json": ("tensor-cache.json", b"params_shard_0", b"../params_shard_0"),
    "an absolute path in tensor-cache.json": ("tensor-cache.json", b'"params_shard_0', b'"/params'),
    "a path in manifest.json": ("manifest.json", b'"tensor-cache.json', b'"../tensor-cache.json'),
    "sizes beyond floats": ("manifest.json", b'"nbytes": ', b'"nbytes": ' + b"9" * 400),
    "sources that are no list": ("manifest.json", b'"files": [', b'"files": 7, "other": ['),
    "added tokens that are no list": (
        "tokenizer.json",
        b'"added_tokens": [',
        b'"added_tokens": 1, "x": [',
    ),
    "a plan beyond floats": ("library .so", b'"kv_cache":2', b'"kv_cache":2' + b"0" * 400),
    "a number of too many digits": ("library .wasm", b'"total":10', b'"total":1' + b"0" * 5000),
    "parameters without a shape": ("library .tar", b'"shape":', b'"form":'),
    "nothing but beginnings": ("library .so", START, START * 60_000),
    "deep nesting": ("library .so", b'"artifact":{}', b'"artifact":' + b"[" * 90_000),
    "millions of layers": ("config", b'"num_hidden_layers": 1', b'"num_hidden_layers": 99999999'),
    "a long name in a message": ("config", b'"llama"', b'"' + b"a" * 90_000 + b'"'),
    "what a terminal obeys": ("config", b'"llama"', b'"\\u001b[2J\\ud800\\r"'),
}


@pytest.mark.parametrize("name", FOUND)
def test_found_before(name: str, tmp_path: Path) -> None:
    parser, old, new = parsers()[FOUND[name][0]], *FOUND[name][1:]
    folder = prepared(parser, tmp_path / "files")
    valid = parser.files[parser.victim]
    assert old in valid
    check(parser, folder, valid.replace(old, new))
    with pytest.raises(MlcError):
        parser.read(folder)


def test_every_parser_is_named() -> None:
    assert tuple(parsers()) == NAMES


def test_what_does_not_hold_is_found(tmp_path: Path) -> None:
    """Foreign exceptions and large allocations of a parser."""

    def careless(folder: Path) -> object:
        data = (folder / "x").read_bytes()
        return bytearray(int.from_bytes(data[:4], "little")), {b"valid": 1}[data[4:]]

    parser = Parser("x", {"x": b"\1\0\0\0valid"}, "x", lambda data, _: data, careless)
    folder = prepared(parser, tmp_path / "files")
    check(parser, folder, b"\1\0\0\0valid")
    with pytest.raises(KeyError):
        check(parser, folder, b"\1\0\0\0other")
    with pytest.raises(AssertionError, match="256 MiB for"):
        check(parser, folder, b"\0\0\0\x10valid")
    shutil.rmtree(folder)
