"""`plan --fit`: the choice fits, one page more does not, and the printed commands say it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from mlc_compile.compiler.fit import PREFERENCE, fit_plan
from mlc_compile.compiler.inputs import load_plan_inputs
from mlc_compile.compiler.memory import estimate_plan
from mlc_compile.errors import InputError
from mlc_compile.quantization.scheme import get_scheme
from mlc_compile.targets.profile import TARGETS, get_target

MakeConfig = Callable[..., Path]

ONE = {"max_batch_size": 1, "prefill_chunk_size": 1024}  # what --fit plans for by default


def total(source: Path, target: str, scheme: str, **sizes: int) -> int:
    profile, _ = get_target(target)
    inputs = load_plan_inputs(source, profile, scheme, sizes)
    return estimate_plan(inputs.model, get_scheme(scheme), inputs.config, profile).total


@pytest.fixture
def source(config_dir: MakeConfig) -> Path:
    return config_dir(
        max_position_embeddings=8192, hidden_size=256, num_hidden_layers=4, vocab_size=8192
    )


@pytest.mark.parametrize("target", TARGETS)
def test_the_choice_is_the_largest_that_fits(source: Path, target: str) -> None:
    need = total(source, target, "q0f16", context_window_size=1024, **ONE)
    report = fit_plan(source, target, budget=need, overrides={})
    context = report.chosen.config.context_window_size
    assert report.chosen.plan.total <= need
    sizes = {"max_batch_size": 1, "prefill_chunk_size": report.chosen.config.prefill_chunk_size}
    scheme = report.chosen.scheme
    assert total(source, target, scheme, context_window_size=context + 16, **sizes) > need
    commands = "\n".join(report.commands())
    assert f"--quantization {scheme}" in commands
    assert f"--context-window-size {context} " in commands and f"--budget {need}" in commands


def test_more_memory_buys_exactness_and_then_context(source: Path) -> None:
    sizes = [total(source, "cpu", s, context_window_size=4096, **ONE) for s in PREFERENCE]
    for scheme, budget in zip(PREFERENCE, sizes, strict=True):
        report = fit_plan(source, "cpu", budget=budget, overrides={})
        assert report.chosen.scheme == scheme
        assert report.chosen.config.context_window_size >= 4096
    report = fit_plan(source, "cpu", budget=1 << 40, overrides={})
    assert (report.chosen.scheme, report.chosen.config.context_window_size) == ("q0f16", 8192)
    assert set(report.largest_context.values()) == {8192}


def test_given_sizes_are_kept(source: Path) -> None:
    report = fit_plan(source, "cpu", budget=1 << 40, overrides={"context_window_size": 512})
    assert report.chosen.config.context_window_size == 512
    report = fit_plan(source, "cpu", budget=1 << 40, overrides={"max_batch_size": 8})
    assert report.chosen.config.max_batch_size == 8


def test_a_budget_for_nothing_says_what_the_smallest_needs(source: Path) -> None:
    with pytest.raises(InputError, match=r"no scheme fits 1\.0 KiB: the smallest, q3f16_1, needs"):
        fit_plan(source, "cpu", budget=1024, overrides={})
