"""The CPU kernels of sparse experts against numpy in float64."""

from __future__ import annotations

import dataclasses
from functools import lru_cache
from typing import Any

import pytest
import tvm
from expert_reference import ROUTES, ExpertCase, expert_spec

from mlc_compile.quantization.scheme import SCHEMES
from mlc_compile.targets.cpu_kernels.experts import expert_kernel
from mlc_compile.targets.kernels import ExpertLinearSpec


@lru_cache
def host_target() -> tvm.target.Target:
    return tvm.target.Target(
        {"kind": "llvm", "mcpu": tvm.target.codegen.llvm_get_system_cpu(), "num-cores": 2}
    )


def compiled(func: tvm.tirx.PrimFunc, target: tvm.target.Target | None = None) -> Any:
    module = tvm.IRModule({"main": func.with_attr("global_symbol", "main")})
    return tvm.compile(module, target or host_target())


def check(
    spec: ExpertLinearSpec,
    *,
    rows: tuple[int, ...],
    vector_bits: int = 512,
    routes: tuple[str, ...] = ("random",),
) -> None:
    """Compile `spec` and compare with numpy for each number of rows and each kind of routes."""
    case = ExpertCase.random(spec)
    kernel = compiled(expert_kernel(spec, vector_bits=vector_bits)).jit()["main"]
    for count in rows:
        for kind in routes:
            arguments = case.inputs(count, kind)
            out = tvm.runtime.tensor(case.poisoned(count))
            kernel(*(tvm.runtime.tensor(a) for a in arguments), out)
            case.check(arguments[0], arguments[1], out.numpy(), count, kind)


QUICK = ("q4f16_1", "q0f32", "q3f16_1")  # .ci/run does all
# One token; with 5 experts, of which each token has 2: GEMVs up to 60 tokens, tiles above.
ROWS = {1: (1,), None: (1, 2, 7, 60, 61, 75)}


@pytest.mark.parametrize("rows", [1, None])
@pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in SCHEMES]
)
def test_every_scheme(name: str, rows: int | None) -> None:
    # N and K that no vector divides, K not a whole number of groups either.
    spec = expert_spec(name, 5, 2, 75, 200, out_dtype="float32", rows=rows)
    check(spec, rows=ROWS[rows])


@pytest.mark.parametrize("rows", [1, None])
@pytest.mark.parametrize("shared_x", [True, False])
@pytest.mark.parametrize("name", ["q4f16_1", "q3f16_1", "q0f16"])
def test_routes(name: str, shared_x: bool, rows: int | None) -> None:
    spec = expert_spec(name, 5, 2, 48, 96, rows=rows, shared_x=shared_x)
    check(spec, rows=ROWS[rows], vector_bits=256, routes=ROUTES)


@pytest.mark.parametrize("rows", [1, None])
@pytest.mark.parametrize("name", ["q4f16_1", "q3f16_1", "q0f16"])
def test_narrow_vectors(name: str, rows: int | None) -> None:
    check(expert_spec(name, 5, 2, 64, 168, rows=rows), rows=ROWS[rows], vector_bits=128)


@pytest.mark.parametrize("rows", [1, None])
@pytest.mark.parametrize(
    ("name", "experts", "per_token", "n", "k"),
    [
        ("q4f16_1", 1, 1, 1, 64),
        ("q4f16_1", 3, 1, 3, 7),
        ("q4f16_1", 2, 2, 5, 1000),
        ("q4f16_1", 130, 8, 20, 64),
        ("q0f32", 3, 2, 3, 7),
        ("q0f32", 4, 3, 49, 150),
    ],
)
def test_odd_shapes(
    name: str, experts: int, per_token: int, n: int, k: int, rows: int | None
) -> None:
    spec = expert_spec(name, experts, per_token, n, k, rows=rows)
    check(spec, rows=(1,) if rows else (1, 9, 97), routes=("random", "one"))


@pytest.mark.parametrize("out_dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("x_dtype", ["float32", "float16", "bfloat16"])
def test_activation_and_output_dtypes(x_dtype: str, out_dtype: str) -> None:
    spec = expert_spec("q4f16_1", 2, 1, 20, 96, x_dtype=x_dtype, out_dtype=out_dtype)
    check(spec, rows=(3, 50), vector_bits=256)
    check(dataclasses.replace(spec, rows=1), rows=(1,), vector_bits=256)


def test_unused_experts_are_not_read() -> None:
    """Their scales are NaN here."""
    spec = expert_spec("q4f16_1", 6, 2, 40, 64)
    case = ExpertCase.random(spec)
    kernel = compiled(expert_kernel(spec, vector_bits=256)).jit()["main"]
    for count in (3, 80):
        x, experts, words, scales = case.inputs(count)
        experts[:] = experts % 3 * 2
        scales = scales.copy()
        scales[1::2] = float("nan")
        out = tvm.runtime.tensor(case.poisoned(count))
        kernel(*(tvm.runtime.tensor(a) for a in (x, experts, words, scales)), out)
        case.check(x, experts, out.numpy(), count)


@pytest.mark.parametrize("mtriple", ["aarch64-linux-gnu", "x86_64-linux-gnu"])
@pytest.mark.parametrize("rows", [1, None])
def test_other_targets_compile(mtriple: str, rows: int | None) -> None:
    func = expert_kernel(expert_spec("q4f16_1", 8, 2, 64, 96, rows=rows), vector_bits=128)
    target = tvm.target.Target({"kind": "llvm", "mtriple": mtriple})
    assert "parallel" in compiled(func, target).mod.inspect_source("asm")


@pytest.mark.parametrize(
    "wrong", [{"scheme": SCHEMES["q4f16_0"]}, {"per_token": 0}, {"x_dtype": "int8"}, {"rows": 2}]
)
def test_wrong_specs_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        dataclasses.replace(expert_spec("q4f16_1", 4, 2, 64, 64), **wrong)
