"""All files or none, also when the run is cut off at any move."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mlc_compile.errors import InputError
from mlc_compile.weights import publish
from mlc_compile.weights.publish import STAGING, staged

OLD = {"marker": "old", "a": "old a", "b": "old b"}
NEW = {"marker": "new", "a": "new a", "c": "new c", "d": "new d"}
OTHER = {"config": "kept"}


def owned(name: str) -> bool:
    return name in OLD or name in NEW


def contents(directory: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in directory.iterdir()}


def fill(directory: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (directory / name).write_text(text)


def run(directory: Path) -> None:
    with staged(directory, "marker", owned) as staging:
        fill(staging.new, NEW)
        staging.publish()


class Cut(BaseException):
    """Stands for the end of the process."""


def cut_at(monkeypatch: pytest.MonkeyPatch, move: int, *, error: BaseException) -> list[str]:
    """Lets `move` moves into or out of the directory pass, then raises."""
    real = os.replace
    moved: list[str] = []

    def replace(source: Path, target: Path) -> None:
        if STAGING not in (target.parent.name, source.parent.name):
            if len(moved) == move:
                monkeypatch.setattr(os, "replace", real)
                raise error
            moved.append(target.name)
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    return moved


def test_publishes_beside_other_files(tmp_path: Path) -> None:
    fill(tmp_path, OLD | OTHER)
    run(tmp_path)
    assert contents(tmp_path) == NEW | OTHER


def test_makes_the_directory_and_its_parents(tmp_path: Path) -> None:
    run(tmp_path / "x" / "y")
    assert contents(tmp_path / "x" / "y") == NEW


def test_the_marker_leaves_first_and_comes_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(tmp_path, OLD)
    moved = cut_at(monkeypatch, 99, error=Cut())
    run(tmp_path)
    assert moved[0] == moved[-1] == "marker"
    assert moved.count("marker") == 2


MOVES = len(OLD) + len(NEW)


@pytest.mark.parametrize("move", range(MOVES))
@pytest.mark.parametrize("before", [OLD | OTHER, OTHER, {}], ids=["replaced", "beside", "empty"])
def test_a_failed_move_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, move: int, before: dict[str, str]
) -> None:
    move %= MOVES if "marker" in before else len(NEW)
    fill(tmp_path, before)
    cut_at(monkeypatch, move, error=OSError(28, "No space left on device"))
    with pytest.raises(InputError, match="No space left"):
        run(tmp_path)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("move", range(MOVES))
def test_a_killed_run_is_put_right_by_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, move: int
) -> None:
    fill(tmp_path, OLD | OTHER)
    cut_at(monkeypatch, move, error=Cut())
    with monkeypatch.context() as patch:
        patch.setattr(publish.Staging, "restore", lambda self: None)
        patch.setattr(publish.shutil, "rmtree", lambda path, **_: None)
        with pytest.raises(Cut):
            run(tmp_path)
    assert (tmp_path / STAGING).is_dir()
    if move:  # nobody takes it for complete
        assert not (tmp_path / "marker").exists()
    with pytest.raises(Cut), staged(tmp_path, "marker", owned):
        raise Cut  # the next run fails too: the old files must have been put back
    assert contents(tmp_path) == OLD | OTHER


def test_failure_before_publishing_leaves_no_directory(tmp_path: Path) -> None:
    with pytest.raises(KeyError), staged(tmp_path / "x" / "y", "marker", owned) as staging:
        fill(staging.new, NEW)
        raise KeyError
    assert list(tmp_path.iterdir()) == []


def test_two_runs_at_once(tmp_path: Path) -> None:
    pytest.importorskip("fcntl")
    with staged(tmp_path, "marker", owned) as staging:
        with pytest.raises(InputError, match="another run is writing"):
            run(tmp_path)
        fill(staging.new, NEW)
        staging.publish()
    assert contents(tmp_path) == NEW


def test_a_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("")
    with pytest.raises(InputError, match=r"y: cannot be written"):
        run(tmp_path / "x" / "y")
