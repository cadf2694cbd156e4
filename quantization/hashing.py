"""MD5 and SHA-256 of many pieces of files: sixteen at once where a kernel serves, else hashlib.

One lane of the kernel is slower than hashlib, so the longest pieces go to hashlib where waiting for
them would cost more than is won.
"""

from __future__ import annotations

import ctypes
import hashlib
import math
import os
import struct
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from mlc_compile.quantization.native import Kernel, load

Array = npt.NDArray[Any]

_LANES = 16
_SPEED = 6.0  # sixteen lanes against hashlib (measured on Zen 5: 3.1 against 0.54 GB/s)
_STEP = 64 << 10  # bytes of a lane read at once: all lanes' fit a second-level cache
_LEAST = 8 << 20  # bytes in all that pay for building a kernel
_BUFFER = 1 << 20


@dataclass(frozen=True)
class Piece:
    """`length` bytes of an open file from `offset` on."""

    fd: int
    offset: int
    length: int


class Digest(NamedTuple):
    """Hexadecimal digests."""

    md5: str
    sha256: str


def constants() -> npt.NDArray[np.uint32]:
    """MD5's 64 (sines), then SHA-256's 64 (fractions of cube roots of primes)."""
    primes = [n for n in range(2, 312) if all(n % d for d in range(2, n))]
    sines = [int(abs(math.sin(i + 1)) * 2.0**32) for i in range(64)]
    return np.array([*sines, *(_root(p, 3) for p in primes)], np.uint32)


def initial() -> npt.NDArray[np.uint32]:
    """The state before the first block: MD5's four words, then SHA-256's eight."""
    md5 = [0x67452301, 0xEFCDAB89, 0x98BADCFE, 0x10325476]
    return np.array([*md5, *(_root(p, 2) for p in (2, 3, 5, 7, 11, 13, 17, 19))], np.uint32)


def _root(n: int, degree: int) -> int:
    """The first 32 bits of the fraction of a root, by integers alone."""
    scaled = n << (32 * degree)
    low, high = 0, 1 << 40
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if middle**degree <= scaled else (low, middle)
    return low & 0xFFFFFFFF


class Hasher:
    """Hashes pieces; several threads may call it at once.

    compiled: False leaves everything to hashlib.
    """

    def __init__(self, *, compiled: bool) -> None:
        self._compiled = compiled
        self._lock = threading.Lock()
        self._kernel: tuple[Kernel, Array, Array] | None = None

    def __call__(self, pieces: Sequence[Piece]) -> list[Digest]:
        """The digests of `pieces`, in their order. OSError where a file ends too early."""
        order = sorted(range(len(pieces)), key=lambda i: -pieces[i].length)
        alone = len(order)
        if self._compiled and sum(piece.length for piece in pieces) >= _LEAST:
            alone = _alone([pieces[i].length for i in order])
        found = {i: _hash_alone(pieces[i]) for i in order[:alone]}
        if alone < len(order):
            with self._lock:
                if self._kernel is None:
                    self._kernel = _build()
            if self._kernel is None:
                self._compiled = False
                return [_hash_alone(piece) for piece in pieces]
            together = _Lanes(*self._kernel).run([pieces[i] for i in order[alone:]])
            found.update(zip(order[alone:], together, strict=True))
        return [found[i] for i in range(len(pieces))]


def _alone(lengths: Sequence[int]) -> int:
    """How many of the longest pieces (descending) are to be hashed one by one."""
    costs, before, rest = [], 0, sum(lengths)
    for length in lengths:
        costs.append(before + max(length * _LANES, rest) / _SPEED)
        before, rest = before + length, rest - length
    costs.append(before)
    return costs.index(min(costs))


def _hash_alone(piece: Piece) -> Digest:
    md5, sha256 = hashlib.md5(usedforsecurity=False), hashlib.sha256()
    buffer = np.empty(min(_BUFFER, max(1, piece.length)), np.uint8)
    done = 0
    while done < piece.length:
        part = buffer[: min(len(buffer), piece.length - done)]
        _read(piece, done, part)
        md5.update(part.data)
        sha256.update(part.data)
        done += len(part)
    return Digest(md5.hexdigest(), sha256.hexdigest())


def _read(piece: Piece, at: int, into: Array) -> None:
    done = 0
    while done < len(into):
        count = os.preadv(piece.fd, [into[done:].data], piece.offset + at + done)
        if count == 0:
            raise OSError(f"file ends {len(into) - done} bytes before it should")
        done += count


class _Lanes:
    """The streams in work, one a lane."""

    def __init__(self, kernel: Kernel, table: Array, start: Array) -> None:
        self._kernel = kernel
        self._table = table
        self._start = start  # [12]
        self._state = np.repeat(start[:, None], _LANES, axis=1)  # [12, lanes]
        self._data = np.zeros((_LANES, _STEP), np.uint8)

    def run(self, pieces: Sequence[Piece]) -> list[Digest]:
        found: dict[int, Digest] = {}
        waiting = iter(range(len(pieces)))
        lanes: list[int | None] = [None] * _LANES  # the piece in each lane
        done = [0] * len(pieces)
        while True:
            for lane in range(_LANES):
                current = lanes[lane]
                while current is None or pieces[current].length - done[current] < 64:
                    if current is not None:
                        found[current] = self._finish(lane, pieces[current], done[current])
                    current = lanes[lane] = next(waiting, None)
                    self._state[:, lane] = self._start
                    if current is None:
                        break
            active = [(lane, i) for lane, i in enumerate(lanes) if i is not None]
            if not active:
                return [found[i] for i in range(len(pieces))]
            left = min(pieces[i].length - done[i] for _, i in active)
            step = min(left, _STEP) // 64 * 64
            for lane, i in active:
                _read(pieces[i], done[i], self._data[lane, :step])
                done[i] += step
            self._blocks(self._data, self._state, step // 64)

    def _finish(self, lane: int, piece: Piece, done: int) -> Digest:
        """The digests of a piece of which less than a block is left."""
        tail = np.empty(piece.length - done, np.uint8)
        _read(piece, done, tail)
        padding = b"\x80" + bytes(-(len(tail) + 9) % 64)
        digests = []
        # The padded end differs: MD5 counts its bits little-endian, SHA-256 big-endian.
        for order, words in (("<", slice(0, 4)), (">", slice(4, 12))):
            end = tail.tobytes() + padding + struct.pack(f"{order}Q", 8 * piece.length)
            data = np.zeros((_LANES, len(end)), np.uint8)
            data[lane] = np.frombuffer(end, np.uint8)
            state = self._state.copy()
            self._blocks(data, state, len(end) // 64)
            digests.append(state[words, lane].astype(f"{order}u4").tobytes().hex())
        return Digest(*digests)

    def _blocks(self, data: Array, state: Array, blocks: int) -> None:
        pointers = (ctypes.c_void_p(a.ctypes.data) for a in (data, state, self._table))
        self._kernel(*pointers, data.shape[1] // 4, blocks)


def _build() -> tuple[Kernel, Array, Array] | None:
    """The kernel and its constants; None where vectors of sixteen words are no single register."""
    kernel = load("hash", (), "avx512f", 3, 2)
    return None if kernel is None else (kernel, constants(), initial())
