"""TVM's web runtime as object files, compiled once from the installed wheels and cached.

The cache is `$MLC_COMPILE_CACHE`, else `$XDG_CACHE_HOME/mlc-compile`, else `~/.cache/mlc-compile`
(`%LOCALAPPDATA%\\mlc-compile` on Windows); the objects lie in `web-runtime/KEY`. KEY hashes all
that the objects follow from: our sources, the wheels' sources, versions and flags.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path
from threading import Event
from typing import IO

from mlc_compile.errors import EnvironmentLacksError
from mlc_compile.targets.profile import Progress
from mlc_compile.targets.web.toolchain import Toolchain, run

CACHE_VARIABLE = "MLC_COMPILE_CACHE"
# Part of the key: a change of the cache's own layout.
_LAYOUT = 1
_LIST = "objects.json"


@dataclass(frozen=True)
class Sources:
    """What is compiled.

    roots: label and folder; every file that a unit can include lies below one of them. Messages in
        the objects name `label/…` in place of the folder's path.
    quoted: folders searched for `#include "…"` only. angled: folders searched for both forms.
    defines: preprocessor definitions.
    """

    units: tuple[Path, ...]
    roots: tuple[tuple[str, Path], ...]
    quoted: tuple[Path, ...] = ()
    angled: tuple[Path, ...] = ()
    defines: tuple[str, ...] = ()


def wheel_sources(toolchain: Toolchain) -> Sources:
    """Our translation units and the wheels' sources that they include.

    Raises:
        EnvironmentLacksError: a wheel without the sources, such as another version.
    """
    own = Path(__file__).parent / "runtime" / "src"
    tvm, ffi = _package("tvm"), _package("tvm_ffi")
    roots = (
        ("mlc_compile", own),
        ("tvm/src/runtime", tvm / "src" / "runtime"),
        ("tvm/web/emcc", tvm / "web" / "emcc"),
        ("tvm/include", tvm / "include"),
        ("tvm_ffi/src", ffi / "src"),
        ("tvm_ffi/include", ffi / "include"),
        ("dlpack", ffi / "3rdparty" / "dlpack" / "include"),
    )
    for label, folder in roots:
        if not folder.is_dir():
            raise EnvironmentLacksError(
                f"the installed packages lack the C++ sources of {label} ({folder} is not there)",
                hint="install the wheels of apache-tvm and apache-tvm-ffi that mlc-compile pins",
            )
    include = own / "include"
    return Sources(
        units=tuple(toolchain.units(own)),
        roots=roots,
        # Relative includes of the wheel's sources lead from `include` and `include/tvm` to
        # `support` (see runtime/README.md).
        quoted=(include, include / "tvm", tvm, ffi),
        angled=(
            include,
            *(folder for label, folder in roots if "include" in label or label == "dlpack"),
        ),
        defines=(
            "TVM_LOG_DEBUG=0",
            "TVM_LOG_CUSTOMIZE=1",
            "TVM_FFI_USE_LIBBACKTRACE=0",
            "TVM_FFI_BACKTRACE_ON_SEGFAULT=0",
            "TVM_FFI_CMAKE_LITTLE_ENDIAN=1",
        ),
    )


def runtime_objects(
    toolchain: Toolchain,
    *,
    cache: Path | None = None,
    progress: Progress | None = None,
    sources: Sources | None = None,
) -> list[Path]:
    """The runtime's object files, from the cache or built into it.

    Two processes may ask at once: one builds, the other waits. Objects that don't have the bytes
    that were written are built again. Anything interrupted leaves no entry.

    Raises:
        EnvironmentLacksError: the cache folder can't be written, the sources are missing, or the
            compiler failed: all that it said is in the message.
    """
    report = progress or _silent
    cache = cache or cache_folder()
    sources = sources or wheel_sources(toolchain)
    key = cache_key(toolchain, sources)
    folder = cache / "web-runtime"
    entry = folder / key
    total = len(sources.units) + 1
    found = _load(entry)
    if found is None:
        _make_writable(folder)
        with _locked(
            folder / f"{key}.lock",
            lambda: report("waiting for another process to build the runtime", 0, total),
        ):
            found = _load(entry)  # by the process that was waited for
            if found is None:
                found = _build(toolchain, sources, cache, entry, report)
    report("runtime", total, total)
    return found


def cache_folder() -> Path:
    """Where builds are kept between runs (see the module's text). It need not exist."""
    if named := os.environ.get(CACHE_VARIABLE):
        return Path(named).expanduser().absolute()
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home()) / "mlc-compile"
    base = os.environ.get("XDG_CACHE_HOME")
    # The XDG specification: a relative path is to be ignored.
    root = Path(base) if base and os.path.isabs(base) else Path("~/.cache").expanduser()
    return root / "mlc-compile"


def cache_key(toolchain: Toolchain, sources: Sources) -> str:
    """24 hex digits that change with anything the objects follow from, and not with paths."""
    digest = hashlib.sha256()
    for label, root in sources.roots:
        for file in sorted(root.rglob("*")):
            if file.suffix in (".c", ".cc", ".h"):
                name = f"{label}/{file.relative_to(root).as_posix()}"
                digest.update(f"{name}\0{_sha256(file)}\n".encode())
    what = {
        "layout": _LAYOUT,
        "toolchain": [toolchain.name, toolchain.version],
        "packages": {name: _version(name) for name in ("apache-tvm", "apache-tvm-ffi")},
        "units": [unit.name for unit in sources.units],
        "flags": [
            toolchain.compile_flags(Path("src"), "c++"),
            toolchain.compile_flags(Path("src"), "c"),
            sources.defines,
        ],
    }
    digest.update(json.dumps(what, sort_keys=True, default=str).encode())
    return digest.hexdigest()[:24]


def _package(name: str) -> Path:
    """The folder of an installed package, found without importing it."""
    spec = util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise EnvironmentLacksError(f"the package {name} is not installed")
    return Path(next(iter(spec.submodule_search_locations)))


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "none"


def _silent(what: str, done: int, total: int) -> None:
    pass


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _load(entry: Path) -> list[Path] | None:
    """The entry's objects in link order; None when it is not there or not what was written."""
    try:
        hashes: dict[str, str] = json.loads((entry / _LIST).read_text(encoding="utf-8"))
        good = bool(hashes) and all(_sha256(entry / n) == h for n, h in hashes.items())
    except (OSError, ValueError, AttributeError):
        return None
    return [entry / name for name in hashes] if good else None


def _build(
    toolchain: Toolchain, sources: Sources, cache: Path, entry: Path, report: Progress
) -> list[Path]:
    # Under the lock: whatever of this key lies here is damaged, or left by a process that died.
    for stale in [entry, *entry.parent.glob(f"{entry.name}.*.tmp")]:
        shutil.rmtree(stale, ignore_errors=True)
    work = Path(tempfile.mkdtemp(prefix=f"{entry.name}.", suffix=".tmp", dir=entry.parent))
    try:
        objects = _compile_all(toolchain, sources, cache, work, report)
        hashes = {file.name: _sha256(file) for file in objects}
        (work / _LIST).write_text(json.dumps(hashes, indent=1), encoding="utf-8")
        work.chmod(0o755)  # mkdtemp's 0o700 would hide a shared cache from other users
        work.rename(entry)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return [entry / name for name in hashes]


def _compile_all(
    toolchain: Toolchain, sources: Sources, cache: Path, work: Path, report: Progress
) -> list[Path]:
    scratch = work / "scratch"
    scratch.mkdir()
    variables = toolchain.variables(cache, scratch)
    total = len(sources.units) + 1
    done = 0
    stop = Event()

    def step(command: list[str]) -> None:
        if not stop.is_set():
            run(command, variables, cwd=work)

    commands = {"C and C++ library": _link_nothing(toolchain, scratch)}
    objects = []
    for unit in sources.units:
        objects.append(work / f"{unit.stem}.o")
        commands[unit.name] = _compile(toolchain, sources, unit, objects[-1])
    report("compiling TVM's runtime (once)", 0, total)
    with ThreadPoolExecutor(max_workers=max(1, min(4, os.cpu_count() or 1))) as pool:
        futures = {pool.submit(step, command): what for what, command in commands.items()}
        try:
            for future in as_completed(futures):
                future.result()
                done += 1
                report(futures[future], done, total)
        finally:
            stop.set()  # after an error or Ctrl-C: what has not begun does not begin
    shutil.rmtree(scratch)
    return objects


def _compile(toolchain: Toolchain, sources: Sources, unit: Path, output: Path) -> list[str]:
    language = "c" if unit.suffix == ".c" else "c++"
    own = dict(sources.roots).get("mlc_compile", unit.parent)
    flags = toolchain.compile_flags(own, language)
    # No path of this machine may get into the objects: TVM's checks quote __FILE__.
    flags += [f"-ffile-prefix-map={root}={label}" for label, root in sources.roots]
    flags += [f"-D{define}" for define in sources.defines]
    for folder in sources.quoted:
        flags += ["-iquote", str(folder)]
    for folder in sources.angled:
        flags += ["-I", str(folder)]
    return [*toolchain.compiler(language), *flags, "-c", str(unit), "-o", str(output)]


def _link_nothing(toolchain: Toolchain, folder: Path) -> list[str]:
    """A link of nothing: it makes zig build its C++ library, which the real links then find."""
    source = folder / "empty.cc"
    source.write_text("", encoding="utf-8")
    flags = toolchain.link_flags(())
    return [*toolchain.compiler("c++"), *flags, str(source), "-o", str(folder / "empty.wasm")]


def _make_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise EnvironmentLacksError(
            f"the cache folder {folder} cannot be written: {error.strerror}",
            hint=f"set {CACHE_VARIABLE} to a folder that can",
        ) from error


@contextlib.contextmanager
def _locked(path: Path, waiting: Callable[[], None]) -> Iterator[None]:
    """Hold the lock file at `path`. The system frees the lock of a process that dies.

    `waiting` is called once when another process holds it.
    """
    with open(path, "a+b") as file:
        if not _try_lock(file):
            waiting()
            while not _try_lock(file):
                time.sleep(0.2)
        # The file stays: removing it could let two others lock two files of one name.
        yield


def _try_lock(file: IO[bytes]) -> bool:
    try:
        if sys.platform == "win32":
            import msvcrt

            file.seek(0)
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN, errno.EDEADLK):
            return False
        raise
    return True
