"""A reader of 64-bit Mach-O files and of static archives in Darwin's format.

Follows <mach-o/loader.h>, <mach-o/nlist.h>, <ar.h> and <mach-o/ranlib.h>; only what the checks of a
model library need. Every offset and length is checked against the bytes that are there.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass

from mlc_compile.errors import InputError

MAGIC = b"\xcf\xfa\xed\xfe"
ARCHIVE_MAGIC = b"!<arch>\n"
ARM64 = 0x0100000C
OBJECT, DYLIB = 1, 6

_LC_SYMTAB, _LC_ID_DYLIB, _LC_SEGMENT_64, _LC_BUILD_VERSION = 0x2, 0xD, 0x19, 0x32
# LC_LOAD_DYLIB and its weak, re-exporting and upward forms
_LC_LOADS = (0xC, 0x80000018, 0x8000001F, 0x80000023)
_N_STAB, _N_PEXT, _N_TYPE, _N_EXT = 0xE0, 0x10, 0x0E, 0x01
_N_UNDF, _N_WEAK_DEF = 0x0, 0x0080


@dataclass(frozen=True)
class Symbol:
    """An entry of the symbol table that other files can see. weak: may be defined in several."""

    name: str
    defined: bool
    weak: bool


@dataclass(frozen=True)
class MachO:
    """One Mach-O file. platform and minimum are None without LC_BUILD_VERSION.

    sections: (segment, section) -> bytes. libraries: install names of the libraries it needs.
    """

    cpu: int
    filetype: int
    platform: int | None
    minimum: tuple[int, int] | None
    symbols: tuple[Symbol, ...]
    sections: Mapping[tuple[str, str], int]
    install_name: str | None
    libraries: tuple[str, ...]

    @property
    def defined(self) -> dict[str, Symbol]:
        return {s.name: s for s in self.symbols if s.defined}

    @property
    def undefined(self) -> set[str]:
        return {s.name for s in self.symbols if not s.defined}


@dataclass(frozen=True)
class Archive:
    """members: (offset of the header, name, bytes). index: symbol -> offset of its member's
    header; None when the archive has no index."""

    members: tuple[tuple[int, str, bytes], ...]
    index: Mapping[str, int] | None


class _Bytes:
    """Reads at offsets; whatever is missing is an InputError."""

    def __init__(self, data: bytes, where: str) -> None:
        self.data, self.where = data, where

    def fail(self, what: str) -> InputError:
        return InputError(f"{self.where}: damaged: {what}")

    def slice(self, offset: int, size: int, what: str) -> bytes:
        if offset < 0 or size < 0 or offset + size > len(self.data):
            raise self.fail(f"{what} lies outside the file")
        return self.data[offset : offset + size]

    def unpack(self, layout: str, offset: int, what: str) -> tuple[int, ...]:
        found = self.slice(offset, struct.calcsize(layout), what)
        return struct.unpack(layout, found)

    def text(self, offset: int, end: int, what: str) -> str:
        """A string that ends with a zero byte, or at `end`."""
        raw = self.slice(offset, end - offset, what)
        return raw.split(b"\0", 1)[0].decode("utf-8", "replace")


def parse(data: bytes, where: str) -> MachO:
    """Read one Mach-O file; `where` names it in errors.

    Raises:
        InputError: not a 64-bit little-endian Mach-O file, or a damaged one.
    """
    file = _Bytes(data, where)
    if data[:4] != MAGIC:
        raise InputError(f"{where}: not a 64-bit Mach-O file")
    _, cpu, _, filetype, count, _, _, _ = file.unpack("<8I", 0, "the header")
    platform: int | None = None
    minimum: tuple[int, int] | None = None
    install_name: str | None = None
    symbols: tuple[Symbol, ...] = ()
    sections: dict[tuple[str, str], int] = {}
    libraries: list[str] = []
    at = 32
    for _ in range(count):
        command, size = file.unpack("<2I", at, "a load command")
        if size < 8:
            raise file.fail("a load command of no size")
        file.slice(at, size, "a load command")
        if command == _LC_BUILD_VERSION:
            platform, version = file.unpack("<2I", at + 8, "LC_BUILD_VERSION")
            minimum = (version >> 16, version >> 8 & 0xFF)
        elif command == _LC_SYMTAB:
            symbols = _symbols(file, *file.unpack("<4I", at + 8, "LC_SYMTAB"))
        elif command == _LC_SEGMENT_64:
            sections.update(_sections(file, at))
        elif command == _LC_ID_DYLIB or command in _LC_LOADS:
            (start,) = file.unpack("<I", at + 8, "a library's name")
            name = file.text(at + start, at + size, "a library's name")
            if command == _LC_ID_DYLIB:
                install_name = name
            else:
                libraries.append(name)
        at += size
    return MachO(
        cpu, filetype, platform, minimum, symbols, sections, install_name, tuple(libraries)
    )


def _symbols(file: _Bytes, offset: int, count: int, start: int, size: int) -> tuple[Symbol, ...]:
    """The external symbols of a table of `count` nlist_64 and of a string table."""
    found = []
    table = file.slice(offset, 16 * count, "the symbol table")
    strings = file.slice(start, size, "the string table")
    for name_at, kind, _, description, _ in struct.iter_unpack("<IBBHQ", table):
        if kind & _N_STAB or not kind & _N_EXT:
            continue
        if name_at >= size:
            raise file.fail("a symbol's name lies outside the string table")
        end = strings.find(b"\0", name_at)
        name = strings[name_at : end if end >= 0 else size].decode("utf-8", "replace")
        defined = kind & _N_TYPE != _N_UNDF
        hidden = bool(kind & _N_PEXT)
        if not hidden or not defined:
            found.append(Symbol(name, defined, defined and bool(description & _N_WEAK_DEF)))
    return tuple(found)


def _sections(file: _Bytes, at: int) -> dict[tuple[str, str], int]:
    (count,) = file.unpack("<I", at + 64, "a segment's sections")
    found = {}
    for number in range(count):
        start = at + 72 + 80 * number
        section = file.slice(start, 80, "a section")
        segment, name = (
            raw.split(b"\0", 1)[0].decode("utf-8", "replace")
            for raw in (section[16:32], section[:16])
        )
        (found[segment, name],) = struct.unpack_from("<Q", section, 40)
    return found


def parse_archive(data: bytes, where: str) -> Archive:
    """Read an archive in Darwin's format.

    Raises:
        InputError: no archive, one in GNU's format (which Apple's linker refuses), or damaged.
    """
    if not data.startswith(ARCHIVE_MAGIC):
        raise InputError(f"{where}: not a static archive")
    file = _Bytes(data, where)
    members: list[tuple[int, str, bytes]] = []
    index: dict[str, int] | None = None
    at = len(ARCHIVE_MAGIC)
    while at < len(data):
        header = file.slice(at, 60, "a member's header")
        name = header[:16].decode("ascii", "replace").rstrip()
        try:
            size = int(header[48:58])
            long_name = int(name[3:]) if name.startswith("#1/") else 0
        except ValueError:
            raise file.fail(f"the header of member {name!r}") from None
        if header[58:60] != b"`\n" or long_name > size:
            raise file.fail(f"the header of member {name!r}")
        if name.startswith("/") or name.endswith("/"):
            raise InputError(f"{where}: an archive in GNU's format, which Apple's linker refuses")
        body = file.slice(at + 60, size, f"member {name!r}")
        if long_name:
            name = body[:long_name].rstrip(b"\0").decode("utf-8", "replace")
        content = body[long_name:]
        if name.startswith("__.SYMDEF"):
            index = _index(_Bytes(content, f"{where}: the archive's index"))
        else:
            members.append((at, name, content))
        at += 60 + size + size % 2
    return Archive(tuple(members), index)


def _index(file: _Bytes) -> dict[str, int]:
    """struct ranlib: (offset of the name, offset of the member's header), then the names."""
    (size,) = file.unpack("<I", 0, "its size")
    table = file.slice(4, size, "its entries")
    (text,) = file.unpack("<I", 4 + size, "the size of its names")
    start = 8 + size
    if size % 8:
        raise file.fail("entries of an odd size")
    found = {}
    for name_at, member in struct.iter_unpack("<2I", table):
        if name_at >= text:
            raise file.fail("a name outside its names")
        found[file.text(start + name_at, start + text, "a name")] = member
    return found
