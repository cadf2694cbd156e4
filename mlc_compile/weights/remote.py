"""Checkpoints behind a URL, read by ranges through fsspec (the extra `remote`).

- Nothing is downloaded whole: headers and the rows that are asked for come in pieces, through a
  small cache that all the files of a checkpoint share.
- A file is what it was when it was first looked at (size, ETag, time), or an error: with HTTP every
  request says so (If-Match), and `SourceFile.check` asks once more at the end.
- A server must serve ranges; an answer that is too short is asked for again, then an error.
- User names, passwords and queries of a URL (tokens) stay out of every message and of `str`.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar
from urllib.parse import unquote, urlsplit, urlunsplit

import numpy as np

from mlc_compile.errors import EnvironmentLacksError, InputError
from mlc_compile.weights.files import Array, Location, SourceFile, TensorFile, UnreadableError

T = TypeVar("T")

CHUNK = 4 << 20
"""Bytes of a cached piece; a request is for one or several neighbours."""

CACHE_BYTES = 64 << 20
"""What is kept of all the files of a checkpoint."""

MAX_SMALL_BYTES = 128 << 20
"""The largest configuration or tokenizer file; those known have a third of it."""

_CHUNKS_AT_ONCE = 4
_ATTEMPTS = 4
_FIRST_WAIT = 0.25  # seconds, doubled for each attempt
_FILES = (".safetensors", ".gguf", ".bin", ".pt", ".pth", ".ckpt")
# What file systems call the things that change with a file's content.
_MARKS = [
    "ETag",
    "etag",
    "Content-MD5",
    "Digest",
    "Last-Modified",
    "LastModified",
    "last_modified",
    "modified",
    "mtime",
    "created",
    "md5Hash",
    "content_md5",
    "generation",
    "checksum",
    "ino",
]


def locate_url(where: str) -> Location:
    """`locate` of a URL."""
    if where.startswith("file://"):
        from urllib.request import url2pathname  # imports half of the network, slowly

        return Path(url2pathname(urlsplit(where).path))
    if "::" in where:  # one URL in another; not shown, for either may hold a secret
        raise InputError("chained URLs (with ::) are not supported", hint="give a plain URL")
    shown = _without_secrets(where)
    try:
        import fsspec
    except ImportError as error:
        raise EnvironmentLacksError(
            f"reading {shown} needs the package fsspec", hint="pip install 'mlc-compile[remote]'"
        ) from error
    url = urlsplit(where)
    base = urlunsplit((url.scheme, url.netloc, url.path.rstrip("/"), "", ""))
    try:
        system, path = fsspec.core.url_to_fs(base)
    except ImportError as error:  # its message names the package and holds no URL
        raise EnvironmentLacksError(
            f"reading {url.scheme}:// URLs needs another package: {error}",
            hint="pip install 'mlc-compile[remote]', or what it names",
        ) from error
    except Exception as error:
        raise InputError(
            f"{shown}: cannot be opened ({type(error).__name__})",
            hint="check the URL; fsspec knows https://, s3://, gs:// and others",
        ) from error
    http = url.scheme in ("http", "https")
    store = _Store(system, http, f"?{url.query}" if http and url.query else "")
    return RemotePath(store, path, _without_secrets(base))


def _without_secrets(url: str) -> str:
    """The URL without user, password, query and fragment."""
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


@dataclass(frozen=True, repr=False)
class RemotePath:
    """A file or directory elsewhere, with the part of Path's interface that is used here.

    Whether it is a file is known by asking for it, whether it is a directory by its name alone:
    not every server lists directories.
    """

    _store: _Store
    _path: str
    _shown: str

    def __str__(self) -> str:
        return self._shown

    __repr__ = __str__  # the path itself may have a password in it

    @property
    def name(self) -> str:
        return unquote(PurePosixPath(self._shown).name)

    @property
    def suffix(self) -> str:
        return PurePosixPath(self._shown).suffix

    @property
    def parent(self) -> RemotePath:
        return RemotePath(
            self._store, self._path.rpartition("/")[0], self._shown.rpartition("/")[0]
        )

    def __truediv__(self, name: str) -> RemotePath:
        return RemotePath(self._store, f"{self._path}/{name}", f"{self._shown}/{name}")

    def absolute(self) -> RemotePath:
        return self

    def exists(self) -> bool:
        return self.is_dir() or self.is_file()

    def is_dir(self) -> bool:
        return self.suffix not in _FILES

    def is_file(self) -> bool:
        return self._store.info(self._path, self._shown) is not None

    def glob(self, pattern: str) -> Iterable[RemotePath]:
        """The files in here whose names match, as `*.SUFFIX` does; nothing where HTTP is."""
        return [path for path in self.iterdir() if PurePosixPath(path.name).match(pattern)]

    def iterdir(self) -> Iterable[RemotePath]:
        return [self / name for name in self._store.names(self._path, self._shown)]

    def read_bytes(self) -> bytes:
        """A small file. InputError if it is too large; FileNotFoundError as Path has it."""
        if not self.is_file():
            raise FileNotFoundError(str(self))
        size = self._store.size(self._path, self._shown)
        if size > MAX_SMALL_BYTES:
            raise InputError(f"{self} has {size} bytes, too many for a file of its kind")
        return self._store.fetch(self._path, self._shown, 0, size)

    def read_text(self, encoding: str = "utf-8") -> str:
        return self.read_bytes().decode(encoding)

    def ranged(self) -> TensorFile:
        """Its bytes by offset; InputError if they can't be read by ranges."""
        return RangedFile(self)

    def source(self) -> SourceFile:
        return RemoteFile(self)


class RemoteFile:
    """A file elsewhere as a SourceFile."""

    path = None

    def __init__(self, remote: RemotePath) -> None:
        self._remote = remote
        self.name = remote.name
        self.size = remote._store.size(remote._path, str(remote))
        self.identity = f"{remote}:{remote._store.identity(remote._path, str(remote))}"

    def readinto(self, offset: int, buffer: memoryview) -> int:
        end = min(self.size, offset + len(buffer))
        if end <= offset:
            return 0
        remote = self._remote
        buffer[: end - offset] = remote._store.fetch(remote._path, str(remote), offset, end)
        return end - offset

    def check(self) -> None:
        self._remote._store.check(self._remote._path, str(self._remote))


class RangedFile:
    """A file elsewhere as a TensorFile. Arrays are copies, not views."""

    def __init__(self, path: RemotePath) -> None:
        """Raises InputError for a file that isn't there, is empty, or can't be read by ranges."""
        self.path = path
        self._store = path._store
        if not path.is_file():
            raise InputError(f"there is no file {path}")
        self.size = self._store.size(path._path, str(path))
        if self.size == 0:
            raise InputError(f"cannot read {path}: it is empty")
        # The last byte alone: a server without ranges is found here, before it sends a whole file.
        self._store.fetch(path._path, str(path), self.size - 1, self.size)
        self._latest: tuple[int, memoryview] = (0, memoryview(b""))

    def bytes(self, offset: int, nbytes: int) -> memoryview:
        """So many bytes; fewer at the end of the file."""
        nbytes = max(0, min(nbytes, self.size - offset))
        start, latest = self._latest  # headers are read value by value
        if start <= offset and offset + nbytes <= start + len(latest):
            return latest[offset - start : offset - start + nbytes]
        found = memoryview(bytearray(nbytes))
        self._read(offset, found)
        return found

    def array(self, dtype: np.dtype[Any], shape: tuple[int, ...], offset: int) -> Array:
        """`shape` elements of `dtype`, `offset` bytes into the file."""
        made = np.empty(shape, dtype)
        if made.nbytes:
            if not 0 <= offset <= self.size - made.nbytes:
                raise ValueError(f"bytes outside {self.path}")
            self._read(offset, made.reshape(-1).view(np.uint8).data)
        made.flags.writeable = False
        return made

    def release(self) -> None:
        """Nothing to give back: the cache is bounded."""

    def _read(self, offset: int, out: memoryview) -> None:
        position, end = offset, offset + len(out)
        while position < end:
            index = position // CHUNK
            chunk = self._store.chunk(
                self.path._path, str(self.path), index, (end - 1) // CHUNK, self.size
            )
            first = position - index * CHUNK
            count = min(len(chunk) - first, end - position)
            out[position - offset : position - offset + count] = chunk[first : first + count]
            position += count
            self._latest = (index * CHUNK, chunk)


class _Store:
    """A file system with the query that its URLs carry, what its files were, and the cache."""

    def __init__(self, system: Any, http: bool, query: str) -> None:
        self._system = system
        self._http = http
        self._query = query
        self._infos: dict[str, Mapping[str, Any] | None] = {}
        self._handles = threading.local()
        self._untagged: set[str] = set()
        self._cache: OrderedDict[tuple[str, int], memoryview] = OrderedDict()
        self._pending: set[tuple[str, int]] = set()
        self._changed = threading.Condition()

    def info(self, path: str, shown: str) -> Mapping[str, Any] | None:
        """What the file is; None if there is none. Asked once."""
        if path not in self._infos:
            self._infos[path] = self._ask(path, shown)
        return self._infos[path]

    def _ask(self, path: str, shown: str) -> Mapping[str, Any] | None:
        def ask() -> Mapping[str, Any] | None:
            try:
                found: Mapping[str, Any] = self._system.info(path + self._query)
            except FileNotFoundError as error:
                # With HTTP any failure comes as this one; what it was is its cause.
                cause = error.__cause__
                if cause is None or getattr(cause, "status", None) in (404, 410):
                    return None
                raise cause from error
            return found if found.get("type", "file") == "file" else None

        return _persistent(ask, shown)

    def size(self, path: str, shown: str) -> int:
        """Bytes of a file that is there."""
        size = (self.info(path, shown) or {}).get("size")
        if type(size) is not int or size < 0:
            raise InputError(f"{shown}: the server does not say how large the file is")
        return size

    def identity(self, path: str, shown: str) -> str:
        """Changes with the content, as far as the file system tells."""
        return _marks(self.info(path, shown) or {})

    def check(self, path: str, shown: str) -> None:
        """Raises InputError if the file is no longer what it was."""
        self._system.invalidate_cache(path)
        if _marks(self._ask(path, shown) or {}) != self.identity(path, shown):
            raise _was_changed(shown)

    def names(self, path: str, shown: str) -> list[str]:
        """Of the files in a directory. HTTP has none."""
        if self._http:
            return []

        def ask() -> list[str]:
            try:
                found = self._system.ls(path, detail=False)
            except FileNotFoundError:
                return []
            return sorted(str(name).rstrip("/").rpartition("/")[2] for name in found)

        return _persistent(ask, shown)

    def fetch(self, path: str, shown: str, start: int, end: int) -> bytes:
        """The bytes `start:end`, exactly so many. InputError if they can't be had."""
        if start == end:
            return b""

        def ask() -> bytes:
            try:
                found = bytes(self._get(path, start, end))
            except Exception as error:
                if getattr(error, "status", None) != 412 or path in self._untagged:
                    raise
                # A server may refuse the condition itself, for a redirection's tag is another's.
                self.check(path, shown)
                self._untagged.add(path)
                self._handles.__dict__.pop(path, None)
                found = bytes(self._get(path, start, end))
            if len(found) != end - start:
                raise _TooShortError(f"{len(found)} bytes came of {end - start}")
            return found

        return _persistent(ask, shown)

    def _get(self, path: str, start: int, end: int) -> bytes:
        if not self._http:
            found: bytes = self._system.cat_file(path, start=start, end=end)
            return found
        # Opened files tell an answer without range from one with; `cat_file` does not. Each thread
        # has its own, for they have a position.
        handles = self._handles.__dict__
        if path not in handles:
            info = self._infos.get(path) or {}
            tag = "W/" if path in self._untagged else info.get("ETag", "W/")
            handles[path] = self._system.open(
                path + self._query,
                cache_type="none",
                size=info["size"],
                headers={"Accept-Encoding": "identity"}
                | ({} if tag.startswith("W/") else {"If-Match": tag}),
            )
        handles[path].seek(start)
        data: bytes = handles[path].read(end - start)
        return data

    def chunk(self, path: str, shown: str, index: int, last: int, size: int) -> memoryview:
        """A piece of a file of `size` bytes, cached; up to `last` are wanted too."""
        key = (path, index)
        with self._changed:
            while key in self._pending:
                self._changed.wait()
            if key in self._cache:
                self._cache.move_to_end(key)
                return self._cache[key]
            run = [key]
            while len(run) < _CHUNKS_AT_ONCE and run[-1][1] < last:
                following = (path, run[-1][1] + 1)
                if following in self._cache or following in self._pending:
                    break
                run.append(following)
            self._pending.update(run)
        try:
            start, end = index * CHUNK, min(size, (run[-1][1] + 1) * CHUNK)
            data = self.fetch(path, shown, start, end)
            with self._changed:
                for place, found in enumerate(run):
                    piece = data[place * CHUNK : (place + 1) * CHUNK]  # a copy: evicted alone
                    self._cache[found] = memoryview(piece)
                while len(self._cache) * CHUNK > CACHE_BYTES:
                    self._cache.popitem(last=False)
        finally:
            with self._changed:
                self._pending.difference_update(run)
                self._changed.notify_all()
        return memoryview(data)[:CHUNK]


class _TooShortError(Exception):
    """An answer was cut off."""


def _marks(info: Mapping[str, Any]) -> str:
    return "|".join(f"{key}={info[key]}" for key in ("size", *_MARKS) if key in info)


def _was_changed(shown: str) -> InputError:
    return InputError(f"{shown} was changed while it was read", hint="run the command again")


def _persistent(ask: Callable[[], T], shown: str) -> T:
    """`ask()`, again after a failure that may pass. InputError, without secrets, at the end."""
    for attempt in range(_ATTEMPTS):
        try:
            return ask()
        except InputError:
            raise
        except ValueError as error:
            # fsspec's answer when a server sends a whole file for a range.
            raise InputError(
                f"{shown}: the server does not serve ranges of files",
                hint="download the checkpoint and convert the local copy",
            ) from error
        except Exception as error:
            status = getattr(error, "status", None)
            if status in (412, 416):
                raise _was_changed(shown) from None
            lasting = isinstance(error, PermissionError) or status in (400, 401, 403, 404, 410)
            if not lasting and attempt + 1 < _ATTEMPTS:
                time.sleep(_FIRST_WAIT * 2**attempt)
                continue
            # Only this of the error: its text may hold the URL with what is secret in it.
            what = str(error) if isinstance(error, _TooShortError) else type(error).__name__
            raise UnreadableError(
                f"cannot read {shown}: {f'HTTP status {status}' if status else what}",
                hint="check the URL and the access to it",
            ) from None
    raise AssertionError
