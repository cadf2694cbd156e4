"""Hand-made WebAssembly modules."""

from __future__ import annotations

from collections.abc import Iterable


def u32(value: int) -> bytes:
    """LEB128."""
    out = bytearray()
    while True:
        value, low = value >> 7, value & 0x7F
        out.append(low | (0x80 if value else 0))
        if not value:
            return bytes(out)


def string(text: str | bytes) -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    return u32(len(raw)) + raw


def section(number: int, body: bytes) -> bytes:
    return bytes([number]) + u32(len(body)) + body


def module(*sections: bytes) -> bytes:
    return b"\0asm\x01\0\0\0" + b"".join(sections)


def library(
    *,
    imports: Iterable[tuple[str, str]] = (),
    exports: Iterable[str] = (),
    data: Iterable[bytes] = (),
    memory: bytes = b"\x00\x02",
) -> bytes:
    """A module that imports and exports functions and holds data. It has no code to run."""
    imports, exports, data = list(imports), list(exports), list(data)
    body = u32(len(imports))
    for place, name in imports:
        body += string(place) + string(name) + b"\x00" + u32(0)
    names = u32(len(exports) + 1) + string("memory") + b"\x02" + u32(0)
    for name in exports:
        names += string(name) + b"\x00" + u32(0)
    segments = u32(len(data))
    for content in data:
        segments += b"\x00\x41\x00\x0b" + string(content)
    return module(
        section(2, body), section(5, u32(1) + memory), section(7, names), section(11, segments)
    )
