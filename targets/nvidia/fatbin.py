"""Reads CUDA fat binaries: what machine code and PTX a file really holds.

The container, as nvcc 12 and 13 write it (NVIDIA documents only that it exists; the fields agree
with `cuobjdump --list-elf` and with the ones ZLUDA's sources name):

    magic u32 = 0xBA55ED50, version u16 = 1, header size u16, size of all that follows u64
    entries: kind u16 (1 PTX, 2 ELF), version u16, header size u32, payload size u64 (padding
             included), compressed size u32, ... at 28 the architecture u32, at 40 flags u64

nvcc compresses PTX (flag 1 << 13 or higher), so that neither it nor a source can be found by
searching for text.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

MAGIC = 0xBA55ED50
_MAGIC_BYTES = struct.pack("<I", MAGIC)
_HEADER = struct.Struct("<IHHQ")
_ENTRY = struct.Struct("<HHIQI8xI")
_KINDS = {1: "ptx", 2: "elf"}
_ELF = b"\x7fELF"
_EM_CUDA = 190


@dataclass(frozen=True)
class Code:
    """One entry: kind "elf" (machine code) or "ptx", for an architecture such as 75; bytes."""

    kind: str
    arch: int
    size: int


class FatbinError(ValueError):
    """Bytes that are not a fat binary, or one that is cut off or contradicts itself."""


def read_fatbin(data: bytes, start: int = 0) -> tuple[list[Code], int]:
    """(entries, bytes that it takes) of the fat binary that begins at `start`.

    Raises:
        FatbinError: there is none, or it is damaged.
    """
    if len(data) - start < _HEADER.size:
        raise FatbinError("cut off in its header")
    magic, version, header, size = _HEADER.unpack_from(data, start)
    if magic != MAGIC:
        raise FatbinError("no fat binary: the magic number is not there")
    if version != 1 or header < _HEADER.size:
        raise FatbinError(f"version {version} with a header of {header} bytes is not known")
    at, end = start + header, start + header + size
    if end > len(data):
        raise FatbinError(f"cut off: {size} bytes announced, {max(len(data) - at, 0)} there")
    found = []
    while at < end:
        if end - at < _ENTRY.size:
            raise FatbinError("an entry is cut off in its header")
        kind, _, entry_header, payload, _, arch = _ENTRY.unpack_from(data, at)
        if kind not in _KINDS:
            raise FatbinError(f"an entry of unknown kind {kind}")
        if entry_header < _ENTRY.size or entry_header + payload > end - at or payload == 0:
            raise FatbinError("an entry's size contradicts the container's")
        body = data[at + entry_header : at + entry_header + min(payload, 20)]
        if kind == 2 and body[:4] == _ELF:
            (machine,) = struct.unpack_from("<H", body.ljust(20, b"\0"), 18)
            if machine != _EM_CUDA:
                raise FatbinError(f"machine code of another processor (ELF machine {machine})")
        found.append(Code(_KINDS[kind], arch, payload))
        at += entry_header + payload
    return found, end - start


def find_fatbins(data: bytes) -> list[list[Code]]:
    """The entries of every whole fat binary in the bytes of a library; damaged ones are passed
    over."""
    found = []
    at = data.find(_MAGIC_BYTES)
    while at >= 0:
        try:
            codes, size = read_fatbin(data, at)
        except FatbinError:
            size = len(_MAGIC_BYTES)
        else:
            if codes:
                found.append(codes)
        at = data.find(_MAGIC_BYTES, at + size)
    return found
