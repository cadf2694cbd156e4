"""Writing a set of files into a directory that other commands write to as well: all or nothing.

Files are made in a hidden folder inside the directory (so that moving them is a rename, also where
the directory is a mount of its own). Publishing moves the old ones aside, then the new ones in,
with the marker file moved out first and in last: a directory with its marker is always complete.
A failure moves the old files back; a killed run is put right by the next one.

What was made may outlive a failure (`Staging.keep`), so that the next run can go on with it.
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
    keep: whether `root` stays when the run fails; True when an earlier run left something there.
    """

    def __init__(self, root: Path, marker: str, owned: Callable[[str], bool]) -> None:
        self.directory = root.parent
        self.root = root
        self.new = root / "new"
        self.keep = False
        self._old = root / "old"
        self._moves = root / "moves.json"
        self._marker = marker
        self._owned = owned

    def publish(self) -> None:
        """Replaces the owned files of the directory by those in `new`."""
        names = [path.name for path in self.new.iterdir()]
        for name in names:
            _sync(self.new / name)
        _sync(self.new)
        self._old.mkdir(exist_ok=True)
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
        for path in self.root.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
        self.new.mkdir()

    def restore(self) -> None:
        """Undoes a `publish` that did not reach its end, in this run or in one that was killed."""
        if not self._moves.is_file():
            return
        if any(self.new.iterdir()):
            # The new ones back first: a restore that is cut off is then taken up by the next.
            moves = json.loads(self._moves.read_text())
            for name in sorted(moves, key=self._is_marker, reverse=True):
                if not (self.new / name).exists():
                    os.replace(self.directory / name, self.new / name)
            for name in sorted((path.name for path in self._old.iterdir()), key=self._is_marker):
                os.replace(self._old / name, self.directory / name)
            _sync(self.directory)
            self._moves.unlink()
        else:  # it did reach its end
            self.clear()

    def _is_marker(self, name: str) -> bool:
        return name == self._marker


def owned_files(directory: Path, owned: Callable[[str], bool]) -> list[str]:
    """Names in `directory` for which `owned` holds, sorted; none when it does not exist."""
    if not directory.is_dir():
        return []
    return sorted(path.name for path in directory.iterdir() if owned(path.name))


@contextmanager
def staged(
    directory: Path, marker: str, owned: Callable[[str], bool], *, folder: str = STAGING
) -> Iterator[Staging]:
    """A `Staging` of `directory`, which is made if need be and, after a failure, unmade.

    folder: where the files are made. In STAGING what a killed run left is removed; in one of
    another name it stays for the caller to look at, with `keep` set.

    Raises InputError when the directory cannot be written or another run is writing to it.
    """
    staging = Staging(directory / folder, marker, owned)
    root = staging.root
    made: list[Path] = []
    try:
        made = _make_directories(directory)
        lock = _lock(directory)
    except OSError as error:
        _remove_empty(made)
        raise cannot_write(directory, error) from error
    try:
        try:
            root.mkdir(exist_ok=True)
            staging.restore()
            if folder == STAGING or not staging.new.is_dir():
                staging.clear()
            else:
                staging.keep = any(staging.new.iterdir())
            yield staging
            staging.keep = False
        except BaseException as error:
            staging.restore()
            if isinstance(error, OSError):
                raise cannot_write(directory, error, kept=staging.keep) from error
            raise
    finally:
        if not staging.keep:
            shutil.rmtree(root, ignore_errors=True)
        if lock is not None:
            os.close(lock)
        _remove_empty(made)


def cannot_write(directory: Path, error: OSError, *, kept: bool = False) -> MlcError:
    """The user's form of an OSError met while writing to `directory`.

    kept: what was made so far is still there.
    """
    hint = "choose another output directory or free some space"
    if kept:
        hint = "make room, and the same command goes on where this one stopped"
    return InputError(f"{directory}: cannot be written ({error.strerror or error})", hint=hint)


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


def _lock(directory: Path) -> int | None:
    """A lock of the directory, whatever set of files is written to it."""
    if fcntl is None:
        return None
    handle = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.path.samestat(os.fstat(handle), os.stat(directory)):
            raise BlockingIOError  # that run has just ended and removed it
    except (BlockingIOError, FileNotFoundError) as error:
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
