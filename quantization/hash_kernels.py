"""MD5 (RFC 1321) and SHA-256 (FIPS 180-4) of sixteen streams at once, one in each vector lane.

A hash is one chain of dependent operations, which leaves most of a processor idle: MD5 runs at
about 0.8 GB/s. Sixteen chains side by side run many times as fast together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T

from mlc_compile.targets.cpu_kernels import _vector as vec

LANES = 16
U32 = "uint32"
Expr = Any  # a tirx expression; TVM ships no types
Buffer = Any

_SHIFTS = ((7, 12, 17, 22), (5, 9, 14, 20), (4, 11, 16, 23), (6, 10, 15, 21))
_ORDER = ((1, 0), (5, 1), (3, 5), (7, 0))  # round r of MD5 reads word a * i + b in step i


def hash_kernel() -> Any:
    """A PrimFunc (data, state, constants, stride, blocks), the first three addresses of uint32.

    data: lane l's blocks of 64 bytes from word l * stride on. state: [12, 16], changed in place.
    """
    with IRBuilder() as builder, T.prim_func(is_private=False, s_tir=True):
        T.func_name("hash")
        T.func_attr({"global_symbol": "hash", "tirx.noalias": True})
        pointers = [T.arg(name, T.handle(U32)) for name in ("data", "state", "table")]
        stride, blocks = tirx.Var("stride", "int64"), tirx.Var("blocks", "int64")
        T.arg("stride", stride)
        T.arg("blocks", blocks)
        data, state, table = (
            T.decl_buffer((vec.i64(1 << 40),), U32, data=p, layout=None) for p in pointers
        )
        kept = [_register() for _ in range(12)]
        for i, register in enumerate(kept):
            vec.put(register, vec.load(state, [i * LANES], LANES), LANES)
        words = [_register() for _ in range(16)]
        with vec.serial(blocks) as block:
            first = vec.bind(block * vec.i64(16))
            rows = [
                vec.bind(vec.load(data, [first + stride * vec.i64(lane)], LANES))
                for lane in range(LANES)
            ]
            for register, value in zip(words, vec.transpose(rows, LANES), strict=True):
                vec.put(register, value, LANES)
            _add(kept[:4], lambda now: _md5(now, words, table))
            _add(kept[4:], lambda now: _sha256(now, words, table))
        for i, register in enumerate(kept):
            vec.store(state, [i * LANES], vec.get(register, LANES), LANES)
    return builder.get()


def _register() -> Buffer:
    return T.alloc_buffer((LANES,), U32, layout=None)


def _add(kept: Sequence[Buffer], body: Callable[[list[Buffer]], None]) -> None:
    now = [_register() for _ in kept]
    for register, old in zip(now, kept, strict=True):
        vec.put(register, vec.get(old, LANES), LANES)
    body(now)
    for register, old in zip(now, kept, strict=True):
        vec.put(old, vec.get(old, LANES) + vec.get(register, LANES), LANES)


def _rotate(x: Expr, left: int) -> Expr:
    amount = vec.const(left % 32, U32, LANES)
    return tirx.call_llvm_pure_intrin(vec.vtype(U32, LANES), "llvm.fshl.v16i32", x, x, amount)


def _constant(table: Buffer, index: Expr | int) -> Expr:
    return vec.splat(vec.load(table, [index], 1), LANES)


def _md5(now: list[Buffer], words: Sequence[Buffer], table: Buffer) -> None:
    for step in range(64):
        turn = -step % 4
        a, b, c, d = (now[(turn + i) % 4] for i in range(4))
        x, y, z = (vec.get(register, LANES) for register in (b, c, d))
        kind = step // 16
        if kind == 0:
            mixed = z ^ (x & (y ^ z))
        elif kind == 1:
            mixed = y ^ (z & (x ^ y))
        elif kind == 2:
            mixed = x ^ y ^ z
        else:
            mixed = y ^ (x | ~z)
        factor, offset = _ORDER[kind]
        word = vec.get(words[(factor * step + offset) % 16], LANES)
        total = vec.get(a, LANES) + (word + _constant(table, step)) + mixed
        vec.put(a, total, LANES)
        rotated = _rotate(vec.get(a, LANES), _SHIFTS[kind][step % 4])
        vec.put(a, x + rotated, LANES)


def _sha256(now: list[Buffer], words: Sequence[Buffer], table: Buffer) -> None:
    for word in words:
        swapped = tirx.call_llvm_pure_intrin(
            vec.vtype(U32, LANES), "llvm.bswap.v16i32", vec.get(word, LANES)
        )
        vec.put(word, swapped, LANES)

    def get(register: Buffer) -> Expr:
        return vec.get(register, LANES)

    def sigma(x: Expr, first: int, second: int, third: int, *, shift: bool) -> Expr:
        last = x >> vec.const(third, U32, LANES) if shift else _rotate(x, -third)
        return _rotate(x, -first) ^ _rotate(x, -second) ^ last

    def steps(start: Expr) -> None:
        for i in range(16):
            a, b, c, d, e, f, g, h = (now[(j - i) % 8] for j in range(8))
            choice = get(g) ^ (get(e) & (get(f) ^ get(g)))
            mixed = sigma(get(e), 6, 11, 25, shift=False)
            word = get(words[i]) + _constant(table, start + vec.i64(64 + i))
            vec.put(h, get(h) + word + choice + mixed, LANES)
            vec.put(d, get(d) + get(h), LANES)
            majority = (get(a) & get(b)) | (get(c) & (get(a) | get(b)))
            vec.put(h, get(h) + majority + sigma(get(a), 2, 13, 22, shift=False), LANES)

    steps(vec.i64(0))
    with vec.serial(3) as more:
        for i in range(16):
            low = sigma(get(words[(i + 1) % 16]), 7, 18, 3, shift=True)
            high = sigma(get(words[(i + 14) % 16]), 17, 19, 10, shift=True)
            vec.put(words[i], get(words[i]) + low + get(words[(i + 9) % 16]) + high, LANES)
        steps(vec.bind((more + vec.i64(1)) * vec.i64(16)))
