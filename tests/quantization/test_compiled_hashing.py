"""Hashes of many pieces at once: hashlib's, for every length of the last block."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from mlc_compile.quantization import hashing
from mlc_compile.quantization.hashing import Digest, Hasher, Piece, constants, initial

DATA = np.random.default_rng(7).bytes(3 << 20)


@pytest.fixture
def fd(tmp_path: Path) -> Iterator[int]:
    path = tmp_path / "data"
    path.write_bytes(DATA)
    descriptor = os.open(path, os.O_RDONLY)
    yield descriptor
    os.close(descriptor)


def expected(pieces: Sequence[Piece]) -> list[Digest]:
    parts = [DATA[p.offset : p.offset + p.length] for p in pieces]
    return [Digest(hashlib.md5(x).hexdigest(), hashlib.sha256(x).hexdigest()) for x in parts]


def test_constants_are_the_standards() -> None:
    table, state = constants(), initial()
    assert [hex(x) for x in table[[0, 63, 64, 127]]] == [
        "0xd76aa478",
        "0xeb86d391",
        "0x428a2f98",
        "0xc67178f2",
    ]
    assert len(table) == 128
    assert [hex(x) for x in state[[4, 11]]] == ["0x6a09e667", "0x5be0cd19"]


def test_same_as_hashlib(fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hashing, "_LEAST", 0)
    monkeypatch.setattr(hashing, "_alone", lambda lengths: 0)
    lengths = [*range(132), 1000, 65535, 65536, 65537, 200_000, 300_001]
    rng = np.random.default_rng(1)
    pieces = [Piece(fd, int(rng.integers(0, len(DATA) - n)), n) for n in lengths]
    hasher = Hasher(compiled=True)
    assert hasher(pieces) == expected(pieces)
    assert hasher(pieces[100:103]) == expected(pieces[100:103])
    assert hasher([]) == []
    with pytest.raises(OSError, match="ends 5 bytes before"):
        hasher([Piece(fd, len(DATA) - 95, 100)])


@pytest.mark.parametrize("compiled", [True, False])
def test_long_pieces_go_alone(compiled: bool, fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hashing, "_LEAST", 0)
    pieces = [Piece(fd, i, 30_000 + i) for i in range(20)]
    pieces.insert(3, Piece(fd, 0, len(DATA)))
    assert Hasher(compiled=compiled)(pieces) == expected(pieces)


def test_how_many_go_alone() -> None:
    assert hashing._alone([10] * 32) == 0
    assert hashing._alone([10]) == 1
    assert hashing._alone([10, 10]) == 2
    assert hashing._alone([1000, *[10] * 32]) == 1


def test_without_wide_vectors(fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hashing, "_LEAST", 0)
    monkeypatch.setattr(hashing, "load", lambda *_: None)
    pieces = [Piece(fd, i, 5_000) for i in range(20)]
    assert Hasher(compiled=True)(pieces) == expected(pieces)
