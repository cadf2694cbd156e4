"""The architectures a library holds machine code for, and the one of the device it runs on."""

from __future__ import annotations

from dataclasses import dataclass

from tvm import tirx
from tvm.ir import PointerType, PrimType
from tvm.tirx.script.builder import ir as T

from mlc_compile.targets.gpu_kernels._emit import Buffer, Expr, bind, i32, load


@dataclass(frozen=True)
class CudaArchs:
    """Compute capabilities times ten, ascending: (75, 80, 90)."""

    archs: tuple[int, ...]

    @property
    def minimum(self) -> int:
        return self.archs[0]

    @property
    def dependent_launch(self) -> bool:
        """Whether every device has programmatic dependent launches."""
        return self.minimum >= 90

    def only(self, arch: int) -> bool:
        return self.archs == (arch,)


def compute_capability() -> Expr:
    """The capability times ten of the first device, an int32 for host code: 75, 90, 120.

    TVM's runtime gives it as text ("9.0"), in a string object whose fourth word is the address of
    its characters (tvm-ffi 0.1.14: TVMFFIObject, then TVMFFIByteArray). Host code gets the object
    and has to release it.
    """
    cuda, device, version = 2, 0, 4  # kDLCUDA, the first device, kComputeVersion
    call = tirx.call_packed("runtime.GetDeviceAttr", i32(cuda), i32(device), i32(version))
    string = bind(tirx.call_intrin("int64", "tirx.tvm_call_packed", *call.args))
    text = _array(bind(load(_array(string, "int64", 4), 3)), "int8", 4)

    def digit(place: int) -> Expr:
        return bind(tirx.Cast("int32", load(text, place)) - i32(ord("0")))

    first, second, third, fourth = (digit(place) for place in range(4))
    pointer = tirx.call_intrin("handle", "tirx.reinterpret", string)
    T.evaluate(tirx.call_extern("int32", "TVMFFIObjectDecRef", pointer))
    short = second == i32(ord(".") - ord("0"))
    return bind(tirx.Select(short, first * 10 + third, first * 100 + second * 10 + fourth))


def _array(address: Expr, dtype: str, count: int) -> Buffer:
    """What lies at an address of the host."""
    pointer = bind(tirx.call_intrin(PointerType(PrimType(dtype)), "tirx.reinterpret", address))
    return T.decl_buffer((count,), dtype, data=pointer, layout=None)
