"""A reader of WebAssembly binaries: what a module asks for, offers and holds.

Follows the WebAssembly core specification, version 2, chapter 5 (binary format). Every length and
index is checked against the bytes that are there.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from mlc_compile.errors import InputError

_KINDS = ("function", "table", "memory", "global", "tag")
_SECTIONS = (
    "custom",
    "type",
    "import",
    "function",
    "table",
    "memory",
    "global",
    "export",
    "start",
    "element",
    "code",
    "data",
    "data count",
    "tag",
)
# The order in which sections must come (specification, 5.5.2); custom sections may be anywhere.
_ORDER = (1, 2, 3, 4, 5, 13, 6, 7, 8, 9, 12, 10, 11)


@dataclass(frozen=True)
class Section:
    """`start` and `size` in bytes. `title`: the name in front of a custom section's content."""

    name: str
    start: int
    size: int
    title: str = ""


@dataclass(frozen=True)
class Import:
    module: str
    name: str
    kind: str


@dataclass(frozen=True)
class Export:
    name: str
    kind: str
    index: int


@dataclass(frozen=True)
class Memory:
    """Limits in pages of 64 KiB; `maximum` is None when there is none."""

    minimum: int
    maximum: int | None
    imported: bool


@dataclass(frozen=True)
class Module:
    """A parsed module. `data` are the contents of the data segments, in order."""

    sections: tuple[Section, ...] = ()
    imports: tuple[Import, ...] = ()
    exports: tuple[Export, ...] = ()
    memories: tuple[Memory, ...] = ()
    data: tuple[bytes, ...] = field(default=(), repr=False)


def read(path: Path) -> Module:
    """Read the module at `path`.

    Raises:
        InputError: no such file, or not a well-formed module.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from error
    return parse(content, str(path))


def parse(content: bytes, where: str = "wasm module") -> Module:
    """Parse a module; `where` names it in errors.

    Raises:
        InputError: it is not a well-formed module.
    """
    cursor = _Cursor(content, 0, len(content), where)
    if cursor.take(4, "the magic number") != b"\0asm":
        raise InputError(f"{where}: not a WebAssembly module (it does not begin with \\0asm)")
    version = int.from_bytes(cursor.take(4, "the version"), "little")
    if version != 1:
        raise InputError(f"{where}: WebAssembly version {version}, only version 1 is known")
    sections: list[Section] = []
    imports: list[Import] = []
    exports: list[Export] = []
    memories: list[Memory] = []
    data: list[bytes] = []
    last = -1
    while cursor.left:
        at = cursor.at
        number = cursor.byte("a section's number")
        body = cursor.sub(cursor.u32("a section's size"), f"section {number}")
        if number >= len(_SECTIONS):
            raise InputError(f"{where}: unknown section {number} at byte {at}")
        title = ""
        if number == 0:
            title = body.name("a custom section's name")
        else:
            place = _ORDER.index(number)
            if place <= last:
                raise InputError(f"{where}: {_SECTIONS[number]} section out of order at byte {at}")
            last = place
        sections.append(Section(_SECTIONS[number], body.at, body.left, title))
        if number == 2:
            for _ in range(body.count("imports")):
                imports.append(_import(body, memories))
        elif number == 5:
            for _ in range(body.count("memories")):
                memories.append(_memory(body, imported=False))
        elif number == 7:
            for _ in range(body.count("exports")):
                name = body.name("an export's name")
                exports.append(Export(name, _kind(body), body.u32("an export's index")))
        elif number == 11:
            for _ in range(body.count("data segments")):
                data.append(_segment(body))
        else:
            continue
        if body.left:
            raise InputError(
                f"{where}: {body.left} bytes too many in the {_SECTIONS[number]} section"
            )
    names = [export.name for export in exports]
    if len(set(names)) != len(names):
        raise InputError(f"{where}: two exports of one name")
    return Module(tuple(sections), tuple(imports), tuple(exports), tuple(memories), tuple(data))


class _Cursor:
    """Reads from `content[at:end]`; whatever is missing is an InputError."""

    def __init__(self, content: bytes, at: int, end: int, where: str) -> None:
        self.content, self.at, self.end, self.where = content, at, end, where

    @property
    def left(self) -> int:
        return self.end - self.at

    def fail(self, what: str) -> InputError:
        return InputError(f"{self.where}: damaged WebAssembly module: {what} at byte {self.at}")

    def take(self, size: int, what: str) -> bytes:
        if size > self.left:
            raise self.fail(f"the file ends in {what}")
        self.at += size
        return self.content[self.at - size : self.at]

    def byte(self, what: str) -> int:
        return self.take(1, what)[0]

    def leb(self, bits: int, signed: bool, what: str) -> int:
        """A LEB128 number of at most `bits` bits."""
        value = shift = 0
        while True:
            if shift >= bits:
                raise self.fail(f"{what} is longer than {bits} bits")
            byte = self.byte(what)
            value |= (byte & 0x7F) << shift
            shift += 7
            if not byte & 0x80:
                break
        if signed and byte & 0x40:
            value -= 1 << shift
        low, high = (-(1 << bits - 1), 1 << bits - 1) if signed else (0, 1 << bits)
        if not low <= value < high:
            raise self.fail(f"{what} does not fit in {bits} bits")
        return value

    def u32(self, what: str) -> int:
        return self.leb(32, False, what)

    def count(self, what: str) -> int:
        number = self.u32(f"the number of {what}")
        # Each takes at least one byte: refuse a number that would only waste memory.
        if number > self.left:
            raise self.fail(f"{number} {what} in {self.left} bytes")
        return number

    def sub(self, size: int, what: str) -> _Cursor:
        start = self.at
        if size > self.left:
            raise self.fail(f"the file ends in {what}")
        self.at += size
        return _Cursor(self.content, start, self.at, self.where)

    def name(self, what: str) -> str:
        raw = self.take(self.u32(f"the length of {what}"), what)
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.fail(f"{what} is not UTF-8") from error


def _kind(cursor: _Cursor) -> str:
    kind = cursor.byte("a kind")
    if kind >= len(_KINDS):
        raise cursor.fail(f"unknown kind {kind}")
    return _KINDS[kind]


def _limits(cursor: _Cursor) -> tuple[int, int | None]:
    flags = cursor.byte("limits")
    if flags > 7:
        raise cursor.fail(f"unknown limits {flags}")
    # Bit 0: a maximum follows; bit 1: shared; bit 2: 64-bit addresses.
    bits = 64 if flags & 4 else 32
    minimum = cursor.leb(bits, False, "a minimum")
    maximum = cursor.leb(bits, False, "a maximum") if flags & 1 else None
    if maximum is not None and maximum < minimum:
        raise cursor.fail(f"a maximum of {maximum} below the minimum of {minimum}")
    return minimum, maximum


def _memory(cursor: _Cursor, *, imported: bool) -> Memory:
    minimum, maximum = _limits(cursor)
    return Memory(minimum, maximum, imported)


def _import(cursor: _Cursor, memories: list[Memory]) -> Import:
    module = cursor.name("an import's module")
    name = cursor.name("an import's name")
    kind = _kind(cursor)
    if kind == "function":
        cursor.u32("a type's index")
    elif kind == "table":
        cursor.byte("a reference type")
        _limits(cursor)
    elif kind == "memory":
        memories.append(_memory(cursor, imported=True))
    elif kind == "global":
        cursor.take(2, "a global's type")
    else:
        cursor.byte("a tag's attribute")
        cursor.u32("a type's index")
    return Import(module, name, kind)


def _segment(cursor: _Cursor) -> bytes:
    flags = cursor.u32("a data segment's flags")
    if flags > 2:
        raise cursor.fail(f"unknown data segment {flags}")
    if flags == 2:
        cursor.u32("a memory's index")
    if flags != 1:
        _constant(cursor)
    return cursor.take(cursor.u32("a data segment's size"), "a data segment")


def _constant(cursor: _Cursor) -> None:
    """Skip the expression that places a data segment: one constant instruction and `end`."""
    code = cursor.byte("an instruction")
    if code in (0x41, 0x42):  # i32.const, i64.const
        cursor.leb(32 if code == 0x41 else 64, True, "a constant")
    elif code == 0x23:  # global.get
        cursor.u32("a global's index")
    else:
        raise cursor.fail(f"instruction {code:#04x} in a data segment's place")
    if cursor.byte("the end of an expression") != 0x0B:
        raise cursor.fail("a data segment's place is more than one instruction")
