"""What GPU kernels are made of: launches, group memory, barriers, scalars, reductions, in TIR.

- A launch is one device kernel; several in one PrimFunc run one after the other, so that the
  boundary between two is a barrier for the whole grid.
- Only int32 indices, and only blockIdx.x and blockIdx.y: what WebGPU has.
- Barriers are emitted in uniform control flow alone; conditions on the thread go inside of them.
"""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T

from mlc_compile.targets.gpu_kernels.device import GPUDevice

F32 = "float32"
I32 = "int32"
U32 = "uint32"
# op_pattern 8 is "opaque": relax's fusion leaves the kernel alone.
ATTRS = {"tirx.noalias": True, "tirx.is_scheduled": True, "op_pattern": 8}

Expr = Any  # a tirx expression; TVM ships no types
Buffer = Any
Argument = tuple[str, Sequence[Any], str]


def i32(value: int) -> Expr:
    return tirx.const(value, I32)


def u32(value: int) -> Expr:
    return tirx.const(value, U32)


def f32(value: float) -> Expr:
    """A float32 constant to the last bit: TVM prints seven digits, which not every one survives."""
    (rounded,) = struct.unpack("f", struct.pack("f", value))
    (printed,) = struct.unpack("f", struct.pack("f", float(f"{rounded:.6e}")))
    if printed == rounded:
        return tirx.const(rounded, F32)
    (bits,) = struct.unpack("I", struct.pack("f", value))
    return tirx.reinterpret(F32, u32(bits))


def bind(value: Expr) -> Expr:
    """Name `value`, so that it is computed (and read from memory) here and once."""
    return T.Bind(value)


def cast(value: Expr, dtype: str) -> Expr:
    return value if str(value.ty.dtype) == dtype else tirx.Cast(dtype, value)


def load(buffer: Buffer, *index: Expr | int) -> Expr:
    return tirx.BufferLoad(buffer, [i32(i) if isinstance(i, int) else i for i in index])


def load_f32(buffer: Buffer, *index: Expr | int) -> Expr:
    """An element of a floating buffer as float32."""
    value = load(buffer, *index)
    return value if str(buffer.dtype) == F32 else tirx.Cast(F32, value)


def store(buffer: Buffer, index: Sequence[Expr | int], value: Expr) -> None:
    """Store a value of the buffer's dtype."""
    T.buffer_store(buffer, value, [i32(i) if isinstance(i, int) else i for i in index])


def store_float(buffer: Buffer, index: Sequence[Expr | int], value: Expr) -> None:
    """Round a float32 to the buffer's dtype and store it."""
    dtype = str(buffer.dtype)
    store(buffer, index, value if dtype == F32 else tirx.Cast(dtype, value))


def shared(shape: Sequence[int], dtype: str) -> Buffer:
    """Memory of the group, not initialised."""
    return T.alloc_buffer([i32(s) for s in shape], dtype, scope="shared", layout=None)


def registers(count: int, dtype: str = F32) -> Buffer:
    """An array of one thread. Index it with constants, else it leaves the registers."""
    return T.alloc_buffer([i32(count)], dtype, scope="local", layout=None)


class Cell:
    """A variable of one thread."""

    def __init__(self, dtype: str, value: Expr | float | int) -> None:
        self._dtype = dtype
        self._buffer = registers(1, dtype)
        self.set(value)

    def set(self, value: Expr | float | int) -> None:
        if isinstance(value, int | float):
            value = f32(value) if self._dtype == F32 else tirx.const(value, self._dtype)
        store(self._buffer, [0], value)

    @property
    def value(self) -> Expr:
        return load(self._buffer, 0)


def barrier() -> None:
    """Every thread of the group arrives, with its writes to group memory visible to all."""
    T.evaluate(T.tvm_storage_sync("shared"))


@contextlib.contextmanager
def when(condition: Expr) -> Iterator[None]:
    with T.If(condition), T.Then():
        yield


def loop(extent: Expr | int) -> Any:
    """A counted loop; `with loop(n) as i`."""
    return T.serial(i32(extent) if isinstance(extent, int) else extent)


@contextlib.contextmanager
def launch(threads: int, grid_x: Expr | int, grid_y: Expr | int = 1) -> Iterator[Any]:
    """One device kernel: `with launch(...) as (tx, bx, by)`.

    grid_y is at most 65535 (WebGPU); a larger grid_x is folded by the runtime, which may then
    start a few groups too many: their bx is beyond grid_x.
    """
    with contextlib.ExitStack() as stack:
        one = [i32(g) if isinstance(g, int) else g for g in (grid_x, grid_y)]
        by = stack.enter_context(T.launch_thread("blockIdx.y", one[1]))
        bx = stack.enter_context(T.launch_thread("blockIdx.x", one[0]))
        tx = stack.enter_context(T.launch_thread("threadIdx.x", i32(threads)))
        yield tx, bx, by


def groups(n: Expr | int, size: int) -> Expr | int:
    """Groups of `size` that cover n elements."""
    if isinstance(n, int):
        return -(-n // size)
    return tirx.truncdiv(n + i32(size - 1), i32(size))


def tree(tx: Expr, width: int, combine: Callable[[Expr, Expr], None]) -> None:
    """Fold `width` (a power of two) slots of group memory into slot 0 for every thread.

    combine(i, j) folds slot j into slot i, in one statement each buffer: TVM adds a barrier where
    a statement reads what an earlier one wrote, and cannot inside of the condition here. The slots
    were written before without a barrier; the last barrier here is after the result.
    """
    barrier()
    while width > 1:
        width //= 2
        with when(tx < i32(width)):
            combine(tx, tx + i32(width))
        barrier()


def add(a: Expr, b: Expr) -> Expr:
    return a + b


def fold_all(
    tx: Expr, slots: Buffer, width: int, value: Expr, combine: Callable[[Expr, Expr], Expr]
) -> Expr:
    """combine over the `value`s of the first `width` (a power of two) threads, bound, for all.

    `slots` holds `width` elements of group memory; it may be written again after a barrier.
    """
    with when(tx < i32(width)):
        store(slots, [tx], value)
    tree(tx, width, lambda i, j: store(slots, [i], combine(load(slots, i), load(slots, j))))
    return bind(load(slots, 0))


def group_size(device: GPUDevice) -> int:
    """Threads of a group: a power of two."""
    return 1 << (min(device.max_threads, 256).bit_length() - 1)


def each(device: GPUDevice, n: Expr | int, use: Callable[[Expr], None]) -> None:
    """A launch that calls use(i) for every i < n, one thread each."""
    threads = group_size(device)
    with launch(threads, groups(n, threads)) as (tx, bx, _):
        i = bind(bx * i32(threads) + tx)
        with when(i < n):
            use(i)


def each_element(
    device: GPUDevice, rows: Expr | int, width: int, use: Callable[[Expr, Expr], None]
) -> None:
    """A launch that calls use(row, column) for every element, one thread each; rows <= 65535."""
    threads = min(group_size(device), power_of_two_from(width))
    with launch(threads, groups(width, threads), rows) as (tx, bx, by):
        column = bind(bx * i32(threads) + tx)
        with when(column < i32(width)):
            use(by, column)


def power_of_two_from(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << max(n - 1, 0).bit_length()


def build_kernel(
    name: str, arguments: Sequence[Argument], body: Callable[..., None], private: bool = True
) -> tirx.PrimFunc:
    """A PrimFunc of `arguments` (name, shape, dtype), whose launches `body(*buffers)` emits.

    A public one (`private=False`) carries `name` as its global symbol.
    """
    with IRBuilder() as builder, T.prim_func(is_private=private, s_tir=True):
        T.func_name(name)
        T.func_attr(ATTRS if private else {**ATTRS, "global_symbol": name})
        buffers = []
        for argument, shape, dtype in arguments:
            full = [i32(s) if isinstance(s, int) else s for s in shape]
            buffers.append(T.arg(argument, T.buffer(full, dtype, layout=None)))
        # relax's RewriteDataflowReshape insists on blocks; one around everything asks for nothing.
        with T.sblock(name):
            T.reads([])
            T.writes([])
            body(*buffers)
    return builder.get()


def symbol(name: str) -> Expr:
    """A symbolic extent."""
    return tirx.Var(name, I32)
