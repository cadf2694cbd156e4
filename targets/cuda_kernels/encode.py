"""Group encoding of weights: what calls cuh/encode.cuh.

One kernel serves every dtype, width and rule: what limits it is the way to the GPU and back.
"""

from __future__ import annotations

from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T

from mlc_compile.targets.cuda_kernels._launch import device_call
from mlc_compile.targets.gpu_kernels._emit import ATTRS, i32

THREADS = 128
NAME = "encode"
ARGUMENTS = (
    "parameters",
    "results",
    "groups",
    "size",
    "a_row",
    "candidates",
    "weighted",
    "source",
    "model",
    "bits",
    "rule",
)
"""The numbers (int32) that follow the memory; their meaning: encode.cuh."""


def encode_kernel() -> tirx.PrimFunc:
    """(memory uint8 [bytes], the numbers of ARGUMENTS)."""
    with IRBuilder() as builder, T.prim_func(is_private=False, s_tir=True):
        T.func_name(NAME)
        T.func_attr({**ATTRS, "global_symbol": NAME})
        size = tirx.Var("bytes", "int32")
        memory = T.arg("memory", T.buffer([size], "uint8", layout=None))
        numbers = {name: tirx.Var(name, "int32") for name in ARGUMENTS}
        for name, number in numbers.items():
            T.arg(name, number)
        grid = (numbers["groups"] + i32(THREADS - 1)) // i32(THREADS)
        with T.sblock(NAME):
            T.reads([])
            T.writes([])
            operands = [memory, *numbers.values()]
            device_call("encode.cuh", "encode", operands, threads=THREADS, grid=[grid])
    return builder.get()
