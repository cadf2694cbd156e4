"""CUDA C++ -> a fat binary: machine code for each architecture, PTX for the newest.

Fat binaries are kept in `cuda-kernels` of the cache folder (see targets/web/runtime.py), under a
hash of all they follow from: two models of one shape, or a second run, compile nothing.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mlc_compile.errors import CheckFailedError, EnvironmentLacksError
from mlc_compile.targets.nvidia.archs import machine_code
from mlc_compile.targets.nvidia.fatbin import FatbinError, read_fatbin
from mlc_compile.targets.nvidia.toolchain import Nvcc
from mlc_compile.targets.web.runtime import CACHE_VARIABLE, cache_folder

HEADERS = Path(__file__).resolve().parents[1] / "cuda_kernels" / "cuh"
"""Our device functions, which the generated source includes by name."""

FLAGS = ("-O3", "--std=c++17", "-diag-suppress=177,550", "-allow-unsupported-compiler")
"""177, 550: unused variables, of which generated code is full. The host compiler does nothing but
preprocess, which a version newer than nvcc knows does as well."""

CACHE_BYTES = 512 << 20
"""What the cache keeps; the oldest entries go first."""
_LAYOUT = 1  # part of the key: a change of the cache's own layout
_SOURCE = "kernels.cu"


@dataclass(frozen=True)
class Compiled:
    """A fat binary; report: what ptxas said of registers and spills, when it was asked for."""

    fatbin: bytes
    report: str = ""


def compile_cuda(
    source: str,
    archs: Sequence[int],
    nvcc: Nvcc,
    *,
    headers: Path = HEADERS,
    cache: Path | None = None,
    report: bool = False,
) -> Compiled:
    """Compile for `archs` (ascending), or take what was compiled before.

    report: compile in any case and return ptxas's report.

    Raises:
        EnvironmentLacksError: nvcc can't be started, or fails: everything it said, and where the
            source lies.
        CheckFailedError: it wrote something else than what was asked for.
    """
    folder = (cache or cache_folder()) / "cuda-kernels"
    flags = [*FLAGS, *generate(archs)]
    key = _key(source, headers, nvcc, flags)
    entry = folder / f"{key}.fatbin"
    if not report and (found := _load(entry)) is not None:
        return Compiled(found)
    with tempfile.TemporaryDirectory(prefix="mlc-cuda-") as work:
        written = Path(work) / _SOURCE
        written.write_text(source, encoding="utf-8")
        output = Path(work) / "kernels.fatbin"
        # One thread an architecture. --split-compile would share one among several, but what it
        # makes for sm_100 and later differs from run to run.
        threads = str(max(1, min(os.cpu_count() or 1, len(archs) + 1)))
        command = [*nvcc.command, "--fatbin", *flags, "-I", str(headers)]
        command += ["--threads", threads, "-o", str(output), _SOURCE]
        if report:
            command.append("-Xptxas=-v")
        try:
            done = subprocess.run(
                command,
                cwd=work,
                env={**os.environ, "TMPDIR": work},
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                check=False,
            )
        except OSError as error:
            raise EnvironmentLacksError(f"cannot run {nvcc.path}: {error.strerror}") from error
        if done.returncode:
            kept = _keep(source, key, folder)
            said = "\n".join(filter(None, (done.stdout.strip(), done.stderr.strip())))
            raise EnvironmentLacksError(
                f"nvcc {nvcc.full} ({nvcc.path}) failed (exit {done.returncode}) on {kept}:\n"
                f"{said or 'nothing was said'}"
            )
        fatbin = output.read_bytes()
    check_fatbin(fatbin, archs)
    _store(entry, fatbin)
    return Compiled(fatbin, done.stderr if report else "")


def generate(archs: Sequence[int]) -> list[str]:
    """nvcc's flags: machine code for each of `archs`, and PTX for the newest.

    PTX is that of the plain architecture: PTX of sm_90a runs on no other.
    """
    flags = []
    for arch in archs:
        name = machine_code(arch)
        flags += ["-gencode", f"arch=compute_{name},code=sm_{name}"]
    newest = archs[-1]
    return [*flags, "-gencode", f"arch=compute_{newest},code=compute_{newest}"]


def check_fatbin(fatbin: bytes, archs: Sequence[int]) -> None:
    """Raise unless it holds machine code for exactly `archs` and PTX for the newest.

    Raises:
        CheckFailedError: it holds something else.
    """
    try:
        codes, size = read_fatbin(fatbin)
    except FatbinError as error:
        raise CheckFailedError(f"nvcc wrote a fat binary that cannot be read: {error}") from error
    found = sorted((code.kind, code.arch) for code in codes)
    wanted = [*(("elf", arch) for arch in archs), ("ptx", archs[-1])]
    if found != wanted:
        text = ", ".join(f"{kind} {arch}" for kind, arch in found) or "nothing"
        raise CheckFailedError(f"nvcc wrote {text} where {wanted} was asked for")
    if size != len(fatbin):
        raise CheckFailedError(f"{len(fatbin) - size} bytes follow nvcc's fat binary")


def _key(source: str, headers: Path, nvcc: Nvcc, flags: Sequence[str]) -> str:
    # nvcc takes more flags from NVCC_APPEND_FLAGS and the like.
    given = sorted(f"{k}={v}" for k, v in os.environ.items() if k.startswith("NVCC_"))
    digest = hashlib.sha256("\0".join([str(_LAYOUT), nvcc.full, *flags, *given, ""]).encode())
    for file in sorted(f for f in headers.rglob("*") if f.is_file()):
        digest.update(f"{file.relative_to(headers).as_posix()}\0".encode())
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    digest.update(source.encode())
    return digest.hexdigest()[:24]


def _load(entry: Path) -> bytes | None:
    """An entry's fat binary, None where there is none or not what was written."""
    try:
        data = entry.read_bytes()
        # Used lately: what is old goes first.
        os.utime(entry)
    except OSError:
        return None
    digest, fatbin = data[:32], data[32:]
    return fatbin if hashlib.sha256(fatbin).digest() == digest else None


def _store(entry: Path, fatbin: bytes) -> None:
    """Write an entry whole or not at all; a cache that can't be written is none."""
    with contextlib.suppress(OSError):
        entry.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            dir=entry.parent, prefix=f"{entry.stem}.", suffix=".tmp", delete=False
        ) as file:
            try:
                file.write(hashlib.sha256(fatbin).digest() + fatbin)
                file.close()
                os.chmod(file.name, 0o644)
                os.replace(file.name, entry)
            except BaseException:
                file.close()
                os.unlink(file.name)
                raise
        _shrink(entry.parent)


def _shrink(folder: Path) -> None:
    """Keep CACHE_BYTES, those used last; refused sources and what dead processes left count."""
    files = [(f.stat().st_mtime, f.stat().st_size, f) for f in folder.iterdir() if f.is_file()]
    total = 0
    for _, size, file in sorted(files, reverse=True):
        total += size
        if total > CACHE_BYTES:
            file.unlink(missing_ok=True)


def _keep(source: str, key: str, folder: Path) -> Path:
    """The source that nvcc refused, in a file that stays."""
    name = f"failed-{key}.cu"
    for place in (folder, Path(tempfile.gettempdir())):
        try:
            place.mkdir(parents=True, exist_ok=True)
            (place / name).write_text(source, encoding="utf-8")
            return place / name
        except OSError:
            continue
    raise EnvironmentLacksError(
        f"neither {folder} nor {tempfile.gettempdir()} can be written",
        hint=f"set {CACHE_VARIABLE} to a folder that can",
    )
