"""The pickles of PyTorch checkpoints, read without executing them.

A pickle is a program for a small stack machine; `pickle.load` lets it import and call anything.
Here the few instructions that `torch.save` needs for tensors in dictionaries work on stand-ins:
a global is a name of a short list, "calling" one makes a `TorchTensor` or an empty dict, and any
other instruction or name is refused with that name. Nothing is imported, nothing is called.

Bounded: length, instructions, stack and memo; no recursion; numbers are only ever compared.

Sources: the opcodes as documented in the standard library's pickletools, and what torch.save
writes (`torch._utils._rebuild_tensor_v2` and its kin, persistent ids of storages).
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from mlc_compile.errors import InputError

MAX_PICKLE_BYTES = 64 << 20
"""Names and shapes of a hundred thousand tensors take a tenth of it."""

_MAX_INSTRUCTIONS = 8_000_000
_MAX_DIMENSIONS = 16
_AGAIN = "download the file again"
_REFUSED = "convert the checkpoint to safetensors where it comes from"

_DTYPES: Mapping[str, str] = MappingProxyType(
    {
        "float64": "float64",
        "float32": "float32",
        "float16": "float16",
        "bfloat16": "bfloat16",
        "float8_e4m3fn": "float8_e4m3fn",
        "float8_e5m2": "float8_e5m2",
        "float8_e8m0fnu": "float8_e8m0fnu",
        "int64": "int64",
        "int32": "int32",
        "int16": "int16",
        "int8": "int8",
        "uint64": "uint64",
        "uint32": "uint32",
        "uint16": "uint16",
        "uint8": "uint8",
        "bool": "bool",
    }
)
_STORAGES: Mapping[str, str] = MappingProxyType(
    {
        "DoubleStorage": "float64",
        "FloatStorage": "float32",
        "HalfStorage": "float16",
        "BFloat16Storage": "bfloat16",
        "LongStorage": "int64",
        "IntStorage": "int32",
        "ShortStorage": "int16",
        "CharStorage": "int8",
        "ByteStorage": "uint8",
        "BoolStorage": "bool",
    }
)


@dataclass(frozen=True)
class TorchStorage:
    """A run of `numel` elements, stored under `key`. dtype None: untyped, `numel` bytes."""

    key: str
    dtype: str | None
    numel: int


@dataclass(frozen=True)
class TorchTensor:
    """A tensor in a storage; `stride` and `offset` in elements of `dtype`."""

    storage: TorchStorage
    dtype: str
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


@dataclass(frozen=True)
class _Global:
    """What a name of the allow-list stands for."""

    kind: str  # "dict", "tensor", "typed tensor", "parameter", "storage", "dtype", "size"
    name: str
    dtype: str | None = None


_GLOBALS: Mapping[str, _Global] = MappingProxyType(
    {
        found.name: found
        for found in (
            _Global("dict", "collections.OrderedDict"),
            _Global("tensor", "torch._utils._rebuild_tensor"),
            _Global("tensor", "torch._utils._rebuild_tensor_v2"),
            _Global("typed tensor", "torch._utils._rebuild_tensor_v3"),
            _Global("parameter", "torch._utils._rebuild_parameter"),
            _Global("parameter", "torch._utils._rebuild_parameter_with_state"),
            _Global("size", "torch.Size"),
            _Global("storage", "torch.UntypedStorage"),
            _Global("storage", "torch.storage.UntypedStorage"),
            *(_Global("storage", f"torch.{name}", dtype) for name, dtype in _STORAGES.items()),
            *(_Global("dtype", f"torch.{name}", dtype) for name, dtype in _DTYPES.items()),
        )
    }
)

_CONSTANTS = MappingProxyType({"NONE": None, "NEWTRUE": True, "NEWFALSE": False})
_EMPTY: Mapping[str, Callable[[], Any]] = MappingProxyType(
    {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}
)
_LITERALS = frozenset(
    [
        "BININT",
        "BININT1",
        "BININT2",
        "INT",
        "LONG",
        "LONG1",
        "LONG4",
        "FLOAT",
        "BINFLOAT",
        "UNICODE",
        "SHORT_BINUNICODE",
        "BINUNICODE",
        "BINUNICODE8",
        "STRING",
        "SHORT_BINSTRING",
        "BINSTRING",
        "SHORT_BINBYTES",
        "BINBYTES",
        "BINBYTES8",
    ]
)
_TUPLES = MappingProxyType({"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3})


class _Mark:
    """On the stack, where a MARK was."""


def unpickle(data: bytes | memoryview, where: str) -> tuple[Any, int]:
    """The object that a pickle at the start of `data` describes, and the pickle's length.

    Dicts, lists, tuples, numbers, text and None are Python's own, tensors TorchTensor.

    Raises:
        InputError: damaged, too long, or asking for more than tensors in dictionaries.
    """
    return _Machine(where).run(bytes(data[:MAX_PICKLE_BYTES]))


class _Machine:
    """The stack machine; one use."""

    def __init__(self, where: str) -> None:
        self._where = where
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}

    def run(self, data: bytes) -> tuple[Any, int]:
        position: int | None = 0
        try:
            for count, (opcode, argument, position) in enumerate(pickletools.genops(data)):
                if count >= _MAX_INSTRUCTIONS:
                    raise InputError(f"{self._where} has too many instructions", hint=_REFUSED)
                if opcode.name == "STOP":
                    if len(self._stack) != 1:
                        raise ValueError("STOP with a full stack")
                    return self._pop(), (position or 0) + 1
                self._step(opcode.name, argument)
        except InputError:
            raise
        # Whatever a damaged program does to the stack or the decoder of its arguments.
        except (ValueError, IndexError, KeyError, TypeError, OverflowError) as error:
            raise InputError(
                f"{self._where} is damaged at byte {position}: {str(error)[:100]}", hint=_AGAIN
            ) from error
        raise InputError(f"{self._where} is truncated", hint=_AGAIN)

    def _step(self, name: str, argument: Any) -> None:
        stack = self._stack
        if name in _LITERALS:
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in _EMPTY:
            stack.append(_EMPTY[name]())
        elif name == "MARK":
            stack.append(_Mark)
        elif name in ("BINPUT", "LONG_BINPUT", "PUT"):
            self._memo[argument] = self._top()
        elif name == "MEMOIZE":
            self._memo[len(self._memo)] = self._top()
        elif name in ("BINGET", "LONG_BINGET", "GET"):
            stack.append(self._memo[argument])
        elif name in _TUPLES:
            self._push_tuple(_TUPLES[name])
        elif name == "TUPLE":
            stack.append(tuple(self._pop_mark()))
        elif name == "LIST":
            stack.append(self._pop_mark())
        elif name == "DICT":
            items, made = self._pop_mark(), dict[Any, Any]()
            self._set_items(made, items)
            stack.append(made)
        elif name in ("SETITEM", "SETITEMS"):
            items = self._pop_mark() if name == "SETITEMS" else self._pop_many(2)
            self._set_items(self._top(), items)
        elif name in ("APPEND", "APPENDS"):
            items = self._pop_mark() if name == "APPENDS" else self._pop_many(1)
            if type(self._top()) is not list:
                raise ValueError(f"{name} to something else than a list")
            self._top().extend(items)
        elif name == "GLOBAL":
            stack.append(self._global(argument.replace(" ", ".", 1)))
        elif name == "STACK_GLOBAL":
            module, attribute = self._pop_many(2)
            if type(module) is not str or type(attribute) is not str:
                raise ValueError("STACK_GLOBAL without names")
            stack.append(self._global(f"{module}.{attribute}"))
        elif name == "BINPERSID":
            stack.append(self._storage(self._pop()))
        elif name == "REDUCE":
            callee, arguments = self._pop_many(2)
            stack.append(self._call(callee, arguments))
        elif name == "BUILD":
            self._build()
        elif name not in ("PROTO", "FRAME"):
            raise InputError(
                f"{self._where} would run code: it has the instruction {name}", hint=_REFUSED
            )

    # --- the stack

    def _top(self) -> Any:
        if self._stack[-1] is _Mark:
            raise ValueError("a mark in place of a value")
        return self._stack[-1]

    def _pop(self) -> Any:
        value = self._top()
        self._stack.pop()
        return value

    def _pop_many(self, count: int) -> list[Any]:
        return [self._pop() for _ in range(count)][::-1]

    def _push_tuple(self, count: int) -> None:
        self._stack.append(tuple(self._pop_many(count)))

    def _pop_mark(self) -> list[Any]:
        found = []
        while self._stack[-1] is not _Mark:
            found.append(self._stack.pop())
        self._stack.pop()
        return found[::-1]

    def _set_items(self, target: Any, items: list[Any]) -> None:
        if type(target) is not dict or len(items) % 2:
            raise ValueError("items for something else than a dict")
        for key, value in zip(items[::2], items[1::2], strict=True):
            # Nothing else: hashing a nested tuple recurses, and other keys name no tensors.
            if type(key) is not str and type(key) is not int:
                raise InputError(
                    f"{self._where} has a dict with keys of the type {type(key).__name__}",
                    hint=_REFUSED,
                )
            if key in target:
                raise InputError(f"{self._where} has the key {key!r:.80} twice", hint=_AGAIN)
            target[key] = value

    # --- stand-ins

    def _global(self, name: str) -> _Global:
        found = _GLOBALS.get(name)
        if found is None:
            raise InputError(
                f"{self._where} would run code: it asks for {name[:80]!r}", hint=_REFUSED
            )
        return found

    def _build(self) -> None:
        """State for the last object: an OrderedDict's attributes, which say nothing of tensors."""
        state = self._pop()
        if type(self._top()) is not dict or type(state) is not dict:
            raise InputError(
                f"{self._where} would run code: it sets the state of something else than a dict",
                hint=_REFUSED,
            )

    def _call(self, callee: Any, arguments: Any) -> Any:
        if type(callee) is not _Global or type(arguments) is not tuple:
            raise InputError(
                f"{self._where} would run code: it calls what is no function", hint=_REFUSED
            )
        if callee.kind == "dict" and not arguments:
            return {}
        if callee.kind == "size" and len(arguments) == 1:
            return tuple(_naturals(arguments[0]))
        if callee.kind == "parameter" and arguments and type(arguments[0]) is TorchTensor:
            return arguments[0]
        if callee.kind == "tensor" and 4 <= len(arguments) <= 7:
            storage, offset, shape, stride = arguments[:4]
            return _tensor(storage, offset, shape, stride, None)
        if callee.kind == "typed tensor" and 7 <= len(arguments) <= 8:
            storage, offset, shape, stride, _, _, dtype = arguments[:7]
            return _tensor(storage, offset, shape, stride, dtype)
        raise InputError(
            f"{self._where} would run code: it calls {callee.name} with {len(arguments)} arguments",
            hint=_REFUSED,
        )

    def _storage(self, identity: Any) -> TorchStorage:
        """A persistent id: ("storage", type, key, location, numel[, view])."""
        if type(identity) is not tuple or not 5 <= len(identity) <= 6 or identity[0] != "storage":
            raise ValueError("a persistent id that is no storage")
        kind, key, numel = identity[1], identity[2], identity[4]
        if type(kind) is not _Global or kind.kind != "storage" or type(key) is not str:
            raise ValueError("a storage without type or key")
        if len(identity) == 6 and identity[5] is not None:
            raise InputError(f"{self._where} has a storage that is part of another", hint=_REFUSED)
        return TorchStorage(key, kind.dtype, *_naturals([numel]))


def _tensor(storage: Any, offset: Any, shape: Any, stride: Any, dtype: Any) -> TorchTensor:
    if type(storage) is not TorchStorage:
        raise ValueError("a tensor without storage")
    if dtype is None:
        name = storage.dtype
    else:
        name = dtype.dtype if type(dtype) is _Global and dtype.kind == "dtype" else None
    if name is None:
        raise ValueError("a tensor without dtype")
    (start,) = _naturals([offset])
    sizes, strides = _naturals(shape), _naturals(stride)
    if len(sizes) != len(strides) or len(sizes) > _MAX_DIMENSIONS:
        raise ValueError("a tensor whose shape and stride do not go together")
    return TorchTensor(storage, name, start, sizes, strides)


def _naturals(values: Any) -> tuple[int, ...]:
    """Sizes that int64 holds, or ValueError."""
    if type(values) not in (tuple, list) or len(values) > _MAX_DIMENSIONS:
        raise ValueError("no list of sizes")
    if not all(type(value) is int and 0 <= value < 1 << 63 for value in values):
        raise ValueError("a size that is none")
    return tuple(values)
