"""Threads for the loops that no kernel of ours covers: row selection, casts, an operation whose
fusing pass is switched off."""

from __future__ import annotations

from tvm.ir import IRModule


def schedule_loops(mod: IRModule) -> IRModule:
    """Bind the parallel loops of every PrimFunc that is not scheduled yet; each output element is
    one thread's, reductions included. Slow but right; called under a target."""
    from tvm.s_tir import dlight

    return dlight.ApplyDefaultSchedule(dlight.gpu.Fallback())(mod)
