"""How valid files become hostile ones: at random places of bytes, or of the JSON in them.

A mutation is (what, where, which): numbers that hypothesis draws and can shrink.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from hypothesis import strategies as st

Mutation: TypeAlias = tuple[int, int, int]
"""(operation, place, value), each taken modulo what there is."""

mutations = st.lists(
    st.tuples(*(st.integers(0, 2**32 - 1) for _ in range(3))), min_size=1, max_size=4
)

EXTREMES = (0, 1, 0x7F, 0xFF, 2**15, 2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**63 - 1, 2**64 - 1)


# ---------------------------------------------------------------------------------------------
# Bytes


def _number(data: bytearray, at: int, value: int) -> None:
    """A length or a count, or a part of one, becomes an extreme."""
    width = (1, 2, 4, 8)[value % 4]
    number = EXTREMES[value // 4 % len(EXTREMES)] & ((1 << 8 * width) - 1)
    order = "big" if value % 7 == 0 else "little"
    data[at : at + width] = number.to_bytes(width, order)


def _flip(data: bytearray, at: int, value: int) -> None:
    data[at] ^= 1 << value % 8


def _cut(data: bytearray, at: int, value: int) -> None:
    del data[at:]


def _remove(data: bytearray, at: int, value: int) -> None:
    del data[at : at + 1 + value % 64]


def _repeat(data: bytearray, at: int, value: int) -> None:
    data[at:at] = data[at : at + 1 + value % 200] * (1 + value // 200 % 3)


def _fill(data: bytearray, at: int, value: int) -> None:
    data[at:at] = bytes([value % 256]) * (1 + value // 256 % 5000)


_BYTES: tuple[Callable[[bytearray, int, int], None], ...] = (
    *(_number, _number, _number),
    *(_flip, _flip, _cut, _remove, _repeat, _fill),
)


def mutate_bytes(data: bytes, changes: Sequence[Mutation], *, within: int | None = None) -> bytes:
    """within: only the first so many bytes are touched; the place of most numbers that count."""
    found = bytearray(data)
    for operation, place, value in changes:
        if found:
            limit = min(len(found), within or len(found))
            _BYTES[operation % len(_BYTES)](found, place % limit, value)
    return bytes(found)


# ---------------------------------------------------------------------------------------------
# JSON


class Raw(str):
    """Text that is written as it is, JSON or not."""


class Twice:
    """An object's member whose key stands twice."""

    def __init__(self, first: Any, second: Any) -> None:
        self.values = (first, second)


_HOSTILE: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 0.5, -0.0, 1e308, 5e-324, 2**31, 2**32, 2**53 + 1),
    *(2**63, 2**64, 10**30, 10**400, 1e18, ""),
    *(" ", "0", "a" * 70000, "../../etc/passwd", "/etc/passwd", "a/b", "..", "a\0b", "C:\\x"),
    *(
        "\ud800",
        "\ud800\udc00",
        "é" * 300,
        "%s%n",
        "{}",
        "(a+)+$",
        "[",
        "model.embed_tokens.weight",
    ),
    *([], {}, [[]], [0], [-1], [2**62, 2**62], [0] * 3000, ["a"] * 300, {"a": {}}, {"": None}),
    *map(Raw, ("NaN", "Infinity", "-Infinity", "1e999", "-1e999", "9" * 5000, "1" + "0" * 400)),
    *map(
        Raw, ("[" * 100000, "[" * 400 + "]" * 400, '{"a":' * 5000, '{"a":1,"a":2}', "", ",", "01")
    ),
    *map(Raw, ('"\\ud800"', '"\\u0000"', '"\t"', "\x00", "'a'", "// x", "1.0e+2", "-")),
)


def _nodes(tree: Any) -> list[tuple[Any, Any]]:
    """(container, key) of every value in it, the root's as (None, None)."""
    found: list[tuple[Any, Any]] = [(None, None)]
    waiting = [tree]
    while waiting:
        node = waiting.pop()
        keys = node if isinstance(node, dict) else range(len(node)) if type(node) is list else ()
        for key in keys:
            found.append((node, key))
            waiting.append(node[key])
    return found


def _change(tree: Any, operation: int, place: int, value: int) -> Any:
    nodes = _nodes(tree)
    container, key = nodes[place % len(nodes)]
    hostile = copy.deepcopy(_HOSTILE[value % len(_HOSTILE)])
    if container is None:
        return hostile if operation % 40 == 0 else tree
    old = container[key]
    match operation % 10:
        case 0:
            del container[key]
        case 1 if isinstance(container, dict):
            container[key] = Twice(old, hostile)
        case 2 if isinstance(container, dict):
            container[hostile if type(hostile) is str else str(value)] = container.pop(key)
        case 3 if isinstance(container, dict):
            container[str(value) if value % 2 else "__metadata__"] = hostile
        case 4 if type(old) is int:
            container[key] = old + (1, -1, 7, -2 * old, 2**31, 2**32)[value % 6]
        case 5 if type(old) is int and abs(old) < 2**1000:
            container[key] = float(old)
        case 6:  # another value of the same file
            other, name = nodes[value % len(nodes)]
            container[key] = (
                old if other is None else json.loads(json.dumps(other[name], default=str))
            )
        case 7:
            container[key] = [old] if value % 2 else {"a": old}
        case _:
            container[key] = hostile
    return tree


def _written(value: Any) -> str:
    if isinstance(value, Raw):
        return value
    if isinstance(value, Twice):  # one that another change has moved
        return _written(value.values[0])
    if isinstance(value, dict):
        pairs = []
        for key, item in value.items():
            for one in item.values if isinstance(item, Twice) else (item,):
                pairs.append(f"{json.dumps(key)}:{_written(one)}")
        return "{" + ",".join(pairs) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(_written, value)) + "]"
    return json.dumps(value)


def mutate_json(data: bytes, changes: Sequence[Mutation]) -> bytes:
    """Valid JSON's text after changes of its tree; every fifth also of its bytes."""
    tree = json.loads(data)
    for change in changes:
        tree = _change(tree, *change)
    text = _written(tree).encode("utf-8", "surrogatepass")
    return mutate_bytes(text, changes[-1:]) if changes[0][0] % 5 == 4 else text


def mutate_safetensors(data: bytes, changes: Sequence[Mutation]) -> bytes:
    """The header's JSON, with its length put right; every third time plain bytes instead."""
    size = int.from_bytes(data[:8], "little")
    if changes[0][2] % 3 == 0:
        return mutate_bytes(data, changes, within=8 + size)
    header = mutate_json(data[8 : 8 + size], changes)
    return len(header).to_bytes(8, "little") + header + data[8 + size :]
