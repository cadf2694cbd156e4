"""Writing a set of files into a directory that other commands write to as well: all or nothing.

Files are made in a hidden folder inside the directory (so that moving them is a rename, also where
the directory is a mount of its own). Publishing moves the old ones aside, then the new ones in,
with the marker file moved out first and in last: a directory with its marker is always complete.
A failure moves the old files back; a killed run is put right by the next one.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from mlc_compile.errors import InputError, MlcError

try:
    import fcntl
except ImportError:  # Windows: two runs at once into one directory are not noticed there
    fcntl = None  # type: ignore[assignment]

STAGING = ".mlc_compile.partial"


class Staging:
    """New files in `new`, on their way into `directory`.

    marker: the file that tells a complete directory.
    owned: whether a file name belongs to this set, so that an old one is replaced.
    """

    def __init__(self, directory: Path, marker: str, owned: Callable[[str], bool]) -> None:
        self.directory = directory
        self.new = directory / STAGING / "new"
        self._old = directory / STAGING / "old"
        self._moves = directory / STAGING / "moves.json"
        self._marker = marker
        self._owned = owned

    def publish(self) -> None:
        """Replaces the owned files of the directory by those in `new`."""
        names = [path.name for path in self.new.iterdir()]
        for name in names:
            _sync(self.new / name)
        self._old.mkdir()
        draft = self._moves.with_suffix(".draft")
        draft.write_text(json.dumps(names))
        os.replace(draft, self._moves)  # whole or not there, and before the first move
        leaving = owned_files(self.directory, self._owned)
        for name in sorted(leaving, key=self._is_marker, reverse=True):
            os.replace(self.directory / name, self._old / name)
        for name in sorted(names, key=self._is_marker):
            os.replace(self.new / name, self.directory / name)
        _sync(self.directory)

    def clear(self) -> None:
        """Removes what a killed run left and makes `new` anew."""
        self._moves.unlink(missing_ok=True)
        for folder in (self.new, self._old):
            shutil.rmtree(folder, ignore_errors=True)
        self.new.mkdir()

    def restore(self) -> None:
        """Undoes a `publish` that did not reach its end, in this run or in one that was killed."""
        if not self._moves.is_file() or not any(self.new.iterdir()):
            return
        for name in json.loads(self._moves.read_text()):
            if not (self.new / name).exists():
                (self.directory / name).unlink(missing_ok=True)
        for name in sorted((path.name for path in self._old.iterdir()), key=self._is_marker):
            os.replace(self._old / name, self.directory / name)

    def _is_marker(self, name: str) -> bool:
        return name == self._marker


def owned_files(directory: Path, owned: Callable[[str], bool]) -> list[str]:
    """Names in `directory` for which `owned` holds, sorted; none when it does not exist."""
    if not directory.is_dir():
        return []
    return sorted(path.name for path in directory.iterdir() if owned(path.name))


@contextmanager
def staged(directory: Path, marker: str, owned: Callable[[str], bool]) -> Iterator[Staging]:
    """A `Staging` of `directory`, which is made if need be and, after a failure, unmade.

    Raises InputError when the directory cannot be written or another run is writing to it.
    """
    staging = Staging(directory, marker, owned)
    root = directory / STAGING
    made: list[Path] = []
    try:
        made = _make_directories(directory)
        root.mkdir(exist_ok=True)
        lock = _lock(root, directory)
    except OSError as error:
        _remove_empty(made)
        raise cannot_write(directory, error) from error
    try:
        try:
            staging.restore()
            staging.clear()
            yield staging
        except BaseException as error:
            staging.restore()
            if isinstance(error, OSError):
                raise cannot_write(directory, error) from error
            raise
    finally:
        shutil.rmtree(root, ignore_errors=True)
        if lock is not None:
            os.close(lock)
        _remove_empty(made)


def cannot_write(directory: Path, error: OSError) -> MlcError:
    """The user's form of an OSError met while writing to `directory`."""
    return InputError(
        f"{directory}: cannot be written ({error.strerror or error})",
        hint="choose another output directory or free some space",
    )


def _make_directories(directory: Path) -> list[Path]:
    """Makes `directory` and its parents; returns those that were made, outermost first."""
    missing = [path for path in (directory, *directory.parents) if not path.exists()]
    made: list[Path] = []
    try:
        for path in reversed(missing):
            path.mkdir()
            made.append(path)
    except OSError:
        _remove_empty(made)
        raise
    return made


def _remove_empty(directories: list[Path]) -> None:
    for path in reversed(directories):
        try:
            path.rmdir()
        except OSError:  # not empty: the run succeeded, or somebody else uses it
            return


def _lock(root: Path, directory: Path) -> int | None:
    if fcntl is None:
        return None
    handle = os.open(root, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(handle)
        raise InputError(
            f"{directory}: another run is writing to this directory",
            hint="wait for it to end or choose another output directory",
        ) from error
    return handle


def _sync(path: Path) -> None:
    """Waits until a file or a directory has reached the disk."""
    if path.is_dir() and os.name == "nt":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
