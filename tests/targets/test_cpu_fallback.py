"""Element-by-element loops on the cpu: the same numbers, and threads only where they pay."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tvm
from tvm import relax, te, tirx

from mlc_compile.targets.cpu_kernels.fallback import PARALLEL_ELEMENTS, schedule_loops

TARGET = tvm.target.Target({"kind": "llvm", "mcpu": "x86-64-v3"})
Shape = tuple[Any, ...]


def function(shape: Shape, compute: Callable[[te.Tensor], list[te.Tensor]]) -> tirx.PrimFunc:
    extents = [tirx.IntImm("int64", e) if isinstance(e, int) else e for e in shape]
    x = te.placeholder(extents, "float32", name="x")
    return te.create_prim_func([x, *compute(x)])


def chained(x: te.Tensor) -> list[te.Tensor]:
    """x * x, then 1 more: two loop nests."""
    square = te.compute(x.shape, lambda *i: x(*i) * x(*i), "square")
    return [te.compute(x.shape, lambda *i: square(*i) + tirx.const(1, "float32"), "more")]


def scheduled(func: tirx.PrimFunc) -> tirx.PrimFunc:
    return schedule_loops(tvm.IRModule({"main": func}))["main"]


def symbolic() -> tirx.Var:
    return tirx.Var("n", "int64")


@pytest.mark.parametrize(
    ("shape", "given"),
    [
        ((None, 1000), [(0, 1000), (1, 1000), (32, 1000), (33, 1000), (300, 1000)]),
        ((None, 16384), [(1, 16384), (2, 16384), (40, 16384)]),
        ((None, 3, 80), [(5, 3, 80), (500, 3, 80)]),
        ((1, 160_000), [(1, 160_000)]),
        ((1, 100_003), [(1, 100_003)]),
        ((1, 256), [(1, 256)]),
    ],
    ids=str,
)
def test_the_numbers_stay(tmp_path: Path, shape: Shape, given: list[tuple[int, ...]]) -> None:
    whole = tuple(symbolic() if extent is None else extent for extent in shape)
    func = scheduled(function(whole, chained)).with_attr("global_symbol", "main")
    bb, var = relax.BlockBuilder(), symbolic()
    whole = tuple(var if extent is None else extent for extent in shape)
    x = relax.Var("x", relax.TensorType(list(whole), "float32"))
    with bb.function("run", [x]):
        kernel = bb.add_func(func.without_attr("global_symbol"), "kernel")
        bb.emit_func_output(bb.emit(relax.call_tir(kernel, [x], out_ty=x.ty)))
    relax.build(bb.get(), TARGET).export_library(str(tmp_path / "lib.so"))
    library = tvm.runtime.load_module(str(tmp_path / "lib.so"))
    vm = relax.VirtualMachine(library, tvm.cpu())
    for extents in given:
        values = np.random.default_rng(0).standard_normal(extents).astype(np.float32)
        found = vm["run"](tvm.runtime.tensor(values)).numpy()
        np.testing.assert_allclose(found, values * values + 1, rtol=2e-7)


def test_little_work_takes_no_threads() -> None:
    few = function((1, PARALLEL_ELEMENTS - 1), chained)
    assert scheduled(few).same_as(few)
    assert "T.parallel" in scheduled(function((1, PARALLEL_ELEMENTS), chained)).script()
    # decided when the number of rows is known
    script = scheduled(function((symbolic(), 256), chained)).script()
    assert f"< T.int64({PARALLEL_ELEMENTS})" in script
    assert script.count("T.parallel") == 1


def test_reductions_and_further_results_stay_as_they_are() -> None:
    def total(x: te.Tensor) -> list[te.Tensor]:
        k = te.reduce_axis((0, x.shape[1]), name="k")
        return [te.compute((x.shape[0],), lambda i: te.sum(x[i, k], axis=k), "total")]

    def both(x: te.Tensor) -> list[te.Tensor]:
        twice = te.compute(x.shape, lambda *i: x(*i) + x(*i), "twice")
        return [twice, te.compute(x.shape, lambda *i: twice(*i) * x(*i), "product")]

    for compute in (total, both):
        func = function((symbolic(), 1 << 16), compute)
        assert scheduled(func).same_as(func)
