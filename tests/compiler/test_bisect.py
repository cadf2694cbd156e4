"""`verify --bisect`: the switch to blame is named, whatever depends on it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from built_model import CHECKPOINT, BuiltModel, built_model
from click.testing import CliRunner
from tvm import te, tirx

from mlc_compile.cli import main
from mlc_compile.compiler.build import compile_library
from mlc_compile.runtime.bisect import Bisection, find_culprits
from mlc_compile.targets.cpu import CPUKernels

ON = ("fuse_linear", "fuse_residual", "fuse_linear_norm", "fuse_norm", "cuda_graph")


def blame(broken: Callable[[frozenset[str]], bool], on: tuple[str, ...] = ON) -> Bisection:
    """broken: whether the library with these switches on misses parity."""
    asked = []

    def attempt(off: frozenset[str]) -> str:
        asked.append(off)
        return "decode: NaN" if broken(frozenset(on) - off) else ""

    found = find_culprits(on, attempt)
    assert [trial.off for trial in found.trials] == asked  # nothing is tried twice
    assert len(asked) == len(set(asked))
    return found


@pytest.mark.parametrize("culprit", ON)
def test_the_faulty_switch_is_named(culprit: str) -> None:
    # What widens a linear kernel does nothing without fuse_linear.
    needs_linear = culprit in ("fuse_residual", "fuse_linear_norm")
    found = blame(lambda on: culprit in on and ("fuse_linear" in on or not needs_linear))
    assert found.culprits == (culprit,)
    assert f"{culprit} breaks parity; it holds with --opt '{culprit}=0'" in found.verdict


def test_two_faulty_switches_are_both_named() -> None:
    pair = {"fuse_residual", "fuse_norm"}
    found = blame(lambda on: bool(pair & on))
    assert found.culprits == ("fuse_residual", "fuse_norm")
    assert "--opt 'fuse_residual=0;fuse_norm=0'" in found.verdict


def test_two_switches_that_fail_only_together_blame_the_later_one() -> None:
    found = blame(lambda on: {"fuse_residual", "fuse_norm"} <= on)
    assert found.culprits == ("fuse_norm",)


def test_a_fault_behind_every_switch_blames_none() -> None:
    for on in (ON, ()):
        found = blame(lambda on: True, on)
        assert found.culprits == () and "no switch is to blame" in found.verdict
        assert len(found.trials) <= 2


def test_a_fault_that_is_gone_when_compiled_again_is_the_other_compilers() -> None:
    found = blame(lambda on: False)
    assert found.culprits == () and "of another compiler" in found.verdict


# The command, with a planted fault


def gate_without_activation(
    self: CPUKernels, activation: str, size: int, dtype: str, rows: int | None
) -> tirx.PrimFunc:
    n = tirx.IntImm("int64", 1) if rows == 1 else tirx.Var("n", "int64")
    half = tirx.IntImm("int64", size)
    x = te.placeholder([n, half * 2], dtype, name="x")
    out = te.compute([n, half], lambda i, j: x[i, j] * x[i, j + half], "out")
    return te.create_prim_func([x, out])


@pytest.fixture
def built() -> BuiltModel:
    return built_model()


def bisect(built: BuiltModel, library: Path, *options: str) -> Any:
    return CliRunner().invoke(
        main,
        [
            *("verify", str(built.directory), "--lib", str(library), "--reference"),
            *(str(CHECKPOINT), "--engine", "numpy", "--decode-steps", "8", "--bisect", "-q"),
            *options,
        ],
    )


@pytest.mark.slow
def test_the_command_names_a_planted_fault(
    built: BuiltModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CPUKernels, "gated", gate_without_activation)
    library = tmp_path / "model.so"
    sizes = {"max_batch_size": 1, "context_window_size": 48, "prefill_chunk_size": 16}
    compile_library(built.directory, "cpu", library, opt="O0;fuse_gated=1", overrides=sizes)
    result = bisect(built, library)
    assert result.exit_code == 1
    table = result.stdout.split("turned off")[1]
    rows = dict(line.split(maxsplit=1) for line in table.splitlines()[1:3])
    assert rows.keys() == {"nothing", "fuse_gated"}
    assert rows["fuse_gated"] == "holds"
    assert rows["nothing"].startswith("prefill: ")
    assert "bisect: fuse_gated breaks parity; it holds with --opt 'fuse_gated=0'" in result.stdout
    assert "fuse_gated breaks parity" in result.stderr


def test_a_library_in_order_has_nothing_to_look_for(built: BuiltModel) -> None:
    result = bisect(built, built.library, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["ok"]
    assert found["bisect"] == {"culprits": [], "verdict": "nothing to look for", "trials": []}
