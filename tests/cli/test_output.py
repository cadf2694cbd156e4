"""Printing: progress lines, verbosity, tables, JSON."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
from click.testing import Result

from mlc_compile.cli._output import Output, PlainProgress, _bar
from mlc_compile.cli.list import REGISTRIES
from mlc_compile.models.registry import ARCHITECTURES
from mlc_compile.quantization.scheme import SCHEMES
from mlc_compile.targets.profile import TARGETS

NAMES = {"models": ARCHITECTURES, "quantizations": SCHEMES, "targets": TARGETS}


class Clock:
    """Time that tests set."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_plain_byte_progress_gives_rate_and_time_left_now_and_then() -> None:
    lines: list[str] = []
    clock = Clock()
    progress = PlainProgress(lines.append, True, clock)
    for clock.now, done in ((1.0, 10), (6.0, 60), (7.0, 70), (10.0, 100)):
        progress("weights", done * 10**6, 100 * 10**6)
    assert lines == [
        "weights: 60.0/100.0 MB, 10.0 MB/s, 4 s left, 6.0 s",
        "weights: 100.0/100.0 MB, 10.0 MB/s, 10.0 s",
    ]


def test_what_an_earlier_run_did_has_no_part_in_the_rate() -> None:
    lines: list[str] = []
    clock = Clock()
    progress = PlainProgress(lines.append, True, clock)
    for clock.now, done in ((0.0, 500), (5.0, 550), (50.0, 1000)):
        progress("weights", done * 10**6, 1000 * 10**6)
    assert lines == [
        "weights: 550.0/1000.0 MB, 10.0 MB/s, 45 s left, 5.0 s",
        "weights: 1000.0/1000.0 MB, 10.0 MB/s, 50.0 s",
    ]


def test_plain_step_progress_gives_each_step_a_line() -> None:
    lines: list[str] = []
    clock = Clock()
    progress = PlainProgress(lines.append, False, clock)
    for clock.now, label, done in ((0.0, "fuse", 0), (0.5, "fuse", 0), (1.0, "plan", 1)):
        progress(label, done, 3)
    assert lines == ["fuse: 0/3, 0.0 s", "plan: 1/3, 1.0 s"]


@pytest.mark.parametrize("of_bytes", [True, False])
def test_bar_takes_the_same_calls(of_bytes: bool) -> None:
    with _bar(of_bytes) as progress:
        progress("one", 0, 10)
        progress("two", 10, 10)


@pytest.mark.parametrize(("verbosity", "said"), [(-1, []), (0, ["info"]), (1, ["info", "detail"])])
def test_verbosity(verbosity: int, said: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    out = Output(verbosity)
    out.info("info")
    out.detail("detail")
    with out.progress() as progress:
        progress("step", 1, 1)
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert lines[: len(said)] == said
    assert len(lines) == len(said) + (verbosity >= 0)


@pytest.mark.parametrize("registry", REGISTRIES)
def test_list_shows_the_whole_registry(registry: str, invoke: Callable[..., Result]) -> None:
    rows = json.loads(invoke("list", registry, "--json").stdout)
    first = next(iter(rows[0]))
    assert [row[first] for row in rows] == list(NAMES[registry])
    assert {row["label"] for row in rows} <= {"stable", "experimental"}
    table = invoke("list", registry).stdout.splitlines()
    assert [line.split()[0] for line in table[2:]] == list(NAMES[registry])


def test_target_of_ci_is_listed(target_name: str, invoke: Callable[..., Result]) -> None:
    assert target_name in invoke("list", "targets").stdout.split()
