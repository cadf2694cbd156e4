"""Threads for the element-by-element loops that no kernel of ours covers: activations, scales,
additions, casts. LLVM makes vectors of them by itself."""

from __future__ import annotations

from typing import Any

from tvm import s_tir, tirx
from tvm.ir import IRModule
from tvm.tirx import PrimFunc

# Waking the other threads takes microseconds: as long as this many elements of something between an
# addition and an exponential.
PARALLEL_ELEMENTS = 1 << 15
# A thread's share of a row at least.
CHUNK = 1 << 12


def schedule_loops(mod: IRModule) -> IRModule:
    """Every PrimFunc that only computes elements, and is not scheduled yet, on all threads where
    there is enough work; of a symbolic shape that is decided at run time. Others stay as they are.
    """
    for gv, func in mod.functions_items():
        if isinstance(func, PrimFunc) and not func.attrs.get("tirx.is_scheduled"):
            parallel = _parallel(func)
            if parallel is not None:
                mod.update_func(gv, parallel.with_attr("tirx.is_scheduled", True))
    return mod


def _parallel(func: PrimFunc) -> PrimFunc | None:
    if not isinstance(func.body, s_tir.SBlockRealize):
        return None
    schedule = s_tir.Schedule(func)
    blocks = schedule.get_child_blocks(schedule.get_sblock("root"))
    if not blocks or not all(_computes_elements(schedule, block) for block in blocks):
        return None
    if len(blocks) > 1 and any(p.dtype == "bfloat16" for p in func.params):
        return None  # see nn/activations.py: inlined casts of it come out wrong
    try:
        for block in blocks[:-1]:
            schedule.compute_inline(block)
    except s_tir.ScheduleError:  # another result of the function
        return None
    *outer, inner = schedule.get_loops(blocks[-1])
    elements: Any = 1
    for extent in (schedule.get(loop).extent for loop in (*outer, inner)):
        elements = elements * (int(extent) if isinstance(extent, tirx.IntImm) else extent)
    if isinstance(elements, int) and elements < PARALLEL_ELEMENTS:
        return None
    serial = schedule.mod["main"]
    width = schedule.get(inner).extent
    if isinstance(width, tirx.IntImm):
        share = max(c for c in range(1, min(int(width), CHUNK) + 1) if int(width) % c == 0)
        if CHUNK // 8 <= share < int(width):
            first, _ = schedule.split(inner, [None, share])
            outer.append(first)
    schedule.parallel(schedule.fuse(*outer) if outer else inner)
    parallel = schedule.mod["main"]
    return parallel if isinstance(elements, int) else _by_work(elements, serial, parallel)


def _computes_elements(schedule: s_tir.Schedule, block: Any) -> bool:
    """Whether a block is one store for each of its loops' iterations, without a reduction."""
    found, loops = schedule.get(block), schedule.get_loops(block)
    spatial = all(var.iter_type == tirx.IterVar.DataPar for var in found.iter_vars)
    stores = isinstance(found.body, tirx.BufferStore)
    return bool(stores and spatial and loops and len(loops) == len(found.iter_vars))


def _by_work(elements: tirx.Expr, serial: PrimFunc, parallel: PrimFunc) -> PrimFunc:
    """One of two schedules of the same function."""
    few = elements < tirx.IntImm("int64", PARALLEL_ELEMENTS)
    body = tirx.IfThenElse(few, serial.body, parallel.body)
    both = PrimFunc(serial.params, body, serial.ret_type, serial.attrs)
    # No variable may be bound twice.
    return tirx.transform.ConvertSSA()(IRModule({"main": both}))["main"]
