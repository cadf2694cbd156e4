"""MSL kernels as TVM writes them, translated to C++ against shim/metal_stdlib.h.

MSL is C++14 with address spaces and attributes, so most of a kernel's text stays as it is:
- pointers to `device` and `threadgroup` memory become types of the shim that check each access;
- arrays of a threadgroup get a place in the group's memory, arrays of a thread check their index;
- an element that is assigned to, or whose address is taken, is marked as such by its index;
- `#line` keeps the numbers of the MSL text, counted from its first line.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import IntEnum

from mlc_compile.errors import InputError


class Mode(IntEnum):
    """What a launch checks beside barriers: nothing, each access, or races as well."""

    UNCHECKED = 0
    CHECKED = 1
    RACES = 2


@dataclass(frozen=True)
class GroupArray:
    """One array in threadgroup memory: `count` elements of an MSL type at a byte offset."""

    type: str
    name: str
    count: int
    offset: int

    @property
    def bytes(self) -> int:
        return type_bytes(self.type) * self.count


@dataclass(frozen=True)
class Buffer:
    """A device buffer: its MSL element type, name, index, and whether the kernel writes it."""

    type: str
    name: str
    index: int
    written: bool


@dataclass(frozen=True)
class Kernel:
    """A parsed kernel: what a launch needs and what the limits apply to.

    text: the translated function with its structs. call: its arguments in C++ from a
    `msl::group g` and a thread's coordinates `t`. constant_bytes: by-value arguments.
    """

    name: str
    source: str
    text: str
    call: str
    buffers: tuple[Buffer, ...]
    arrays: tuple[GroupArray, ...]
    highest_binding: int
    constant_bytes: int
    barriers: bool
    simd: bool
    matrices: bool
    granule: int

    @property
    def group_bytes(self) -> int:
        """Bytes of threadgroup memory, each array aligned to 16."""
        return max((_aligned(a.offset + a.bytes) for a in self.arrays), default=0)

    def cpp(self, mode: Mode) -> str:
        """A translation unit that exports the kernel."""
        return unit([self], mode) + _export(self, mode)


_BASES = {
    "bool": 1, "char": 1, "uchar": 1, "short": 2, "ushort": 2, "half": 2, "bfloat": 2,
    "int": 4, "uint": 4, "float": 4, "long": 8, "ulong": 8, "size_t": 8,
}  # fmt: skip
_TYPE = re.compile(rf"({'|'.join(_BASES)})([234]?)$")
_KERNEL = re.compile(r"\bkernel\s+void\s+(\w+)\s*\(")
_GROUP_ARRAY = re.compile(r"\bthreadgroup\s+(\w+)\s+(\w+)\s*\[\s*(\d+)\s*\]\s*;")
_LOCAL_ARRAY = re.compile(r"(?m)(?<=[;{}\n])(\s*)(?:thread\s+)?(\w+)\s+(\w+)\s*\[\s*(\d+)\s*\]\s*;")
_POINTER = re.compile(
    r"\b(?:(const)\s+)?(?:volatile\s+)?(device|threadgroup|constant|thread)\s+(?:(const)\s+)?(\w+)\s*\*"
)
_ASSIGNED = re.compile(r"\s*(?:=(?!=)|(?:[-+*/%&|^]|<<|>>)=|\+\+|--)")
_POSITIONS = {
    "threadgroup_position_in_grid": "g.at[{i}]",
    "thread_position_in_threadgroup": "t[{i}]",
    "thread_position_in_grid": "g.at[{i}] * g.block[{i}] + t[{i}]",
    "threads_per_threadgroup": "g.block[{i}]",
    "threadgroups_per_grid": "g.grid[{i}]",
    "thread_index_in_threadgroup": "n",
    "thread_index_in_simdgroup": "n % msl::kLanes",
    "simdgroup_index_in_threadgroup": "n / msl::kLanes",
    "threads_per_simdgroup": "msl::kLanes",
}


def type_bytes(name: str) -> int:
    """Size of an MSL scalar or vector type.

    Raises:
        InputError: unknown type.
    """
    match = _TYPE.match(name)
    if match is None:
        matrix = re.match(r"simdgroup_(half|bfloat|float)8x8$", name)
        if matrix:
            return 64 * _BASES[matrix[1]]
        raise InputError(f"unknown MSL type {name!r}")
    lanes = int(match[2] or 1)
    return _BASES[match[1]] * (4 if lanes == 3 else lanes)


def without_comments(source: str) -> str:
    """`source` with blanks for comments; lines keep their numbers."""

    def blank(match: re.Match[str]) -> str:
        return re.sub(r"[^\n]", " ", match[0])

    return re.sub(r"//[^\n]*|/\*.*?\*/", blank, source, flags=re.DOTALL)


def parse(source: str) -> Kernel:
    """The one kernel in an MSL text.

    Raises:
        InputError: no kernel, several, or a form that is not understood; says which.
    """
    code = without_comments(source)
    heads = list(_KERNEL.finditer(code))
    if len(heads) != 1:
        raise InputError(f"{len(heads)} kernels in one MSL text, expected 1")
    name = heads[0][1]
    end = _closing(code, heads[0].end() - 1)
    if end < 0:
        raise InputError(f"kernel {name}: its argument list does not end")
    head, arguments, body = code[: heads[0].start()], code[heads[0].end() : end], code[end:]
    try:
        return _parse(name, source, head, arguments, body)
    except InputError as error:
        raise InputError(f"kernel {name}: {error.message}") from error


def _parse(name: str, source: str, head: str, arguments: str, body: str) -> Kernel:
    names: list[tuple[str, str, int]] = []  # buffers
    constants: list[str] = []  # struct names
    parameters: list[str] = []
    call: list[str] = []
    highest = -1
    for argument in _split(arguments):
        binding = re.search(r"\[\[\s*buffer\s*\(\s*(\d+)\s*\)\s*\]\]", argument)
        attribute = re.search(r"\[\[\s*(\w+)\s*\]\]", argument)
        plain = " ".join(re.sub(r"\[\[.*?\]\]", "", argument, flags=re.DOTALL).split())
        if binding:
            highest = max(highest, int(binding[1]))
        reference = re.match(r"constant (\w+) ?& ?(\w+)$", plain)
        pointer = re.match(r"(const )?(device|constant) (const )?(\w+) ?\* ?(\w+)$", plain)
        if binding and reference:
            if constants:
                raise InputError("two by-value arguments, expected one struct")
            constants.append(reference[1])
            parameters.append(f"const {reference[1]}& {reference[2]}")
            call.append(f"*(const msl_k_{name}::{reference[1]}*)g.constants")
        elif binding and pointer:
            const = "const " if pointer[1] or pointer[3] or pointer[2] == "constant" else ""
            kind = f"msl::device_pointer<{const}{pointer[4]}>"
            parameters.append(f"{kind} {pointer[5]}")
            call.append(f"{kind}(g.buffers[{len(names)}])")
            names.append((pointer[4], pointer[5], int(binding[1])))
        elif attribute and attribute[1] in _POSITIONS and (m := re.match(r"(\w+) (\w+)$", plain)):
            size = re.match(r"(uint|ushort)([23]?)$", m[1])
            if size is None:
                raise InputError(f"[[{attribute[1]}]] of type {m[1]}")
            form = _POSITIONS[attribute[1]]
            values = [form.format(i=i) for i in range(int(size[2] or 1))]
            parameters.append(f"{m[1]} {m[2]}")
            call.append(
                f"({m[1]})({values[0]})" if len(values) == 1 else f"{m[1]}({', '.join(values)})"
            )
        else:
            raise InputError(f"argument {' '.join(argument.split())!r} is not understood")
    arrays: list[GroupArray] = []

    def group_array(match: re.Match[str]) -> str:
        offset = _aligned(arrays[-1].offset + arrays[-1].bytes) if arrays else 0
        arrays.append(GroupArray(match[1], match[2], int(match[3]), offset))
        return f"auto {match[2]} = msl::group_array<{match[1]}>({offset}, {match[3]});"

    shared = _GROUP_ARRAY.sub(group_array, body)
    local = _LOCAL_ARRAY.sub(r"\1msl::local<\2, \4> \3;", shared)
    types = {kind for kind, _, _ in names} | {a.type for a in arrays}
    types |= {m[4] for m in _POINTER.finditer(local) if m[2] != "thread"}
    translated, written = _mark(_POINTER.sub(_pointer, local))
    # A pointer made from a parameter may be written through: say that it is, to be safe.
    aliased = {
        n
        for _, n, _ in names
        if re.search(rf"\*\)\s*\(?\s*{re.escape(n)}\b|=\s*{re.escape(n)}\s*[+;]", body)
    }
    stores = re.search(r"\bsimdgroup_store\s*\(", body) is not None
    buffers = tuple(
        Buffer(kind, n, index, n in written or n in aliased or stores) for kind, n, index in names
    )
    scalars = {m[1] for t in types if (m := _TYPE.match(t))}
    line = head.count("\n") + 1
    text = (
        f'#line 1 "{name}"\n{_struct_text(head)}\n#line {line} "{name}"\n'
        f"static inline void {name}({', '.join(parameters)}"
        + "".join("\n" for _ in range(arguments.count("\n")))
        + translated
    )
    simd = re.search(r"\b(?:simd_\w+|simdgroup_\w+|quad_\w+)\s*[(<]", body) is not None
    matrices = re.search(r"\bsimdgroup_(?!barrier)\w+", body) is not None
    return Kernel(
        name=name,
        source=source,
        text=text,
        call=", ".join(call),
        buffers=buffers,
        arrays=tuple(arrays),
        highest_binding=highest,
        constant_bytes=sum(_struct_bytes(head, c) for c in constants),
        barriers=simd or matrices or "threadgroup_barrier" in body,
        simd=simd,
        matrices=matrices,
        granule=min((_BASES[s] for s in scalars), default=4) if scalars else 1,
    )


def unit(kernels: list[Kernel], mode: Mode) -> str:
    """C++ of kernels, each in a namespace of its own: what a compiler can check the types of."""
    granule = min((k.granule for k in kernels), default=4)
    head = (
        f'#define MSL_MODE {int(mode)}\n#define MSL_GRANULE {granule}\n#include "metal_stdlib.h"\n'
    )
    pieces = [
        f"namespace msl_k_{k.name} {{\nusing namespace metal;\n{k.text}\n}}\n" for k in kernels
    ]
    return head + "".join(pieces)


def _export(k: Kernel, mode: Mode) -> str:
    arrays = ", ".join(f'{{"{a.name}", {a.offset}, {a.bytes}}}' for a in k.arrays)
    names = ", ".join(f'"{b.name}"' for b in k.buffers)
    written = ", ".join("true" if b.written else "false" for b in k.buffers)
    loop = """  for (unsigned i = 0; i < g.threads; i++) {
    unsigned n = g.order ? g.order[i] : i;
    *g.current = n;
    msl_thread(g, n);
  }
"""
    loop = "" if k.barriers else loop  # with barriers, each thread is a fibre
    return f"""#line 1 "launch"
static inline void msl_thread(const msl::group& g, unsigned n) {{
  [[maybe_unused]] unsigned t[3] = {{n % g.block[0], n / g.block[0] % g.block[1],
                                    n / (g.block[0] * g.block[1])}};
  msl_k_{k.name}::{k.name}({k.call});
}}
static void msl_one(const msl::group& g, unsigned n) {{ msl_thread(g, n); }}
static void msl_all([[maybe_unused]] const msl::group& g) {{
{loop}}}
static const msl::array msl_arrays[] = {{{arrays or '{"", 0, 0}'}}};
static const char* const msl_names[] = {{{names or '""'}}};
static const bool msl_written[] = {{{written or "false"}}};
extern "C" __attribute__((visibility("default"))) const msl::kernel msl_kernel = {{
    msl::kAbi, {int(mode)}, MSL_GRANULE, "{k.name}", {str(k.barriers).lower()},
    {str(k.simd or k.matrices).lower()}, {k.group_bytes}, {len(k.arrays)}, msl_arrays,
    {len(k.buffers)}, msl_names, msl_written, msl_one, msl_all}};
"""


def _aligned(size: int) -> int:
    return (size + 15) // 16 * 16


def _pointer(match: re.Match[str]) -> str:
    const = "const " if match[1] or match[3] or match[2] == "constant" else ""
    if match[2] == "thread":
        return f"{const}{match[4]}*"
    space = "group" if match[2] == "threadgroup" else "device"
    return f"msl::{space}_pointer<{const}{match[4]}>"


def _struct_text(head: str) -> str:
    """What stands before the kernel, without what the shim's own inclusion replaces."""
    head = re.sub(r"#include\s*<metal_stdlib>|using\s+namespace\s+metal\s*;", "", head)
    return head.rstrip("\n")


def _struct_bytes(head: str, name: str) -> int:
    match = re.search(rf"\bstruct\s+{re.escape(name)}\s*\{{(.*?)\}}", head, re.DOTALL)
    if match is None:
        raise InputError(f"struct {name} is not defined before the kernel")
    total = 0
    for field in filter(None, (f.strip() for f in match[1].split(";"))):
        parts = re.match(r"(\w+)\s+(\w+)\s*(?:\[\s*(\d+)\s*\])?$", field)
        if parts is None:
            raise InputError(f"field {field!r} of struct {name} is not understood")
        size = type_bytes(parts[1])
        total = (total + size - 1) // size * size + size * int(parts[3] or 1)
    return total


def _closing(code: str, at: int) -> int:
    """Where the bracket that opens at `at` closes; -1 when it does not."""
    pairs = {"(": ")", "[": "]"}
    stack = []
    for i in range(at, len(code)):
        if code[i] in pairs:
            stack.append(pairs[code[i]])
        elif stack and code[i] == stack[-1]:
            stack.pop()
            if not stack:
                return i
    return -1


def _split(arguments: str) -> list[str]:
    """An argument list at its top-level commas."""
    parts, depth, start = [], 0, 0
    for i, c in enumerate(arguments):
        depth += (c in "([") - (c in ")]")
        if c == "," and depth == 0:
            parts.append(arguments[start:i])
            start = i + 1
    return [p for p in (*parts, arguments[start:]) if p.strip()]


def _mark(code: str) -> tuple[str, set[str]]:
    """Mark indexes of elements that are written or addressed; the names that are written."""
    opens: list[int] = []
    match_of: dict[int, int] = {}
    for i, c in enumerate(code):
        if c in "[(":
            opens.append(i)
        elif c in "])" and opens:
            match_of[opens.pop()] = i
    inserts: list[tuple[int, str]] = []
    written: set[str] = set()
    for start, end in match_of.items():
        if code[start] == "(":
            # `*(type)(address) = …;`, `*(address) = …;`
            before = code[:start].rstrip()
            if before.endswith("*") and before[:-1].rstrip().endswith((";", "{", "}")):
                stop = end
                while (m := re.compile(r"\s*\(").match(code, stop + 1)) and m.end() - 1 in match_of:
                    stop = match_of[m.end() - 1]
                tail = re.compile(r"\s*(\w+)").match(code, stop + 1)
                if tail and code[start + 1 : end].rstrip().endswith(("*", ">")):
                    stop = tail.end() - 1  # (type)name
                if _ASSIGNED.match(code, stop + 1):
                    star = before.rindex("*")
                    inserts += [(star, "\0msl::target("), (stop + 1, ")")]
                    written |= set(re.findall(r"\b[A-Za-z_]\w*", code[start : stop + 1]))
            continue
        before = code[:start].rstrip()
        if not before or not re.match(r"[\w\])]", before[-1]) or code[start + 1 : start + 2] == "[":
            continue
        owner = _owner(code, len(before) - 1)
        after = end + 1
        while m := re.compile(r"\s*(?:\.\s*\w+|\[)").match(code, after):
            if code[m.end() - 1] != "[":
                after = m.end()
            elif m.end() - 1 in match_of:
                after = match_of[m.end() - 1] + 1
            else:
                break
        prefix = code[: owner[0]].rstrip()
        # brackets that only wrap the element: `(x[i]) = …` does not occur in TVM's code
        mark = ""
        if _ASSIGNED.match(code, after) or prefix.endswith(("++", "--")):
            mark = "msl::written"
            written |= owner[1]
        elif _takes_address(prefix):
            mark = "msl::addressed"
            written |= owner[1]
        if mark:
            inserts += [(start + 1, mark + "("), (end, ")")]
    out, at = [], 0
    for where, what in sorted(inserts, key=lambda x: x[0]):
        out.append(code[at:where])
        if what.startswith("\0"):
            what, where = what[1:], where + 1  # instead of the star
        out.append(what)
        at = where
    return "".join([*out, code[at:]]), written


def _takes_address(prefix: str) -> bool:
    """Whether code ends with a unary `&`, or with one and a parenthesis."""
    before = prefix.removesuffix("(")
    return before.endswith("&") and before[:-1].rstrip()[-1:] in ("", *"(,=;{}?:")


def _owner(code: str, last: int) -> tuple[int, set[str]]:
    """Where the expression begins whose last character is at `last`, and the names in it."""
    i = last
    while i >= 0:
        if code[i] in ")]":
            depth, j = 0, i
            while j >= 0:
                depth += (code[j] in ")]") - (code[j] in "([")
                if depth == 0:
                    break
                j -= 1
            i = j - 1
        elif code[i].isalnum() or code[i] == "_":
            while i >= 0 and (code[i].isalnum() or code[i] == "_"):
                i -= 1
        else:
            break
        if i < 0 or not (code[i].isalnum() or code[i] in "_])"):
            break
    start = i + 1
    return start, set(re.findall(r"\b[A-Za-z_]\w*", code[start : last + 1]))
