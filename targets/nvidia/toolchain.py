"""Finds nvcc: a CUDA toolkit of this machine, else the packages of PyPI that make one up."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path

from mlc_compile.errors import EnvironmentLacksError
from mlc_compile.targets.nvidia.archs import CUDA12_ONLY, names

EXTRA = "pip install 'mlc-compile[cuda]'"
PACKAGES = (
    "nvidia-cuda-nvcc",
    "nvidia-nvvm",
    "nvidia-cuda-crt",
    "nvidia-cuda-runtime",
    "nvidia-cuda-cccl",
)
"""What the extra `cuda` installs; nvcc starts without the others and fails in the middle."""
SYSTEM = Path("/usr/local/cuda")
"""Where NVIDIA's installers put a toolkit."""
NEWEST = (13, 0)
"""The CUDA version that TVM's runtime is of, and so the newest that a driver must know."""

_VERSION = re.compile(r"release (\d+)\.(\d+), V([\d.]+)")


@dataclass(frozen=True)
class Nvcc:
    """A compiler that ran.

    version: (13, 0); full: "13.0.88", part of the cache's key. origin: where it was found.
    host_compiler: what it is to preprocess with, None for its own choice (gcc on the PATH).
    """

    path: Path
    version: tuple[int, int]
    full: str
    origin: str
    host_compiler: str | None = None

    @property
    def command(self) -> list[str]:
        """What calls it; source and flags follow."""
        if self.host_compiler is None:
            return [str(self.path)]
        return [str(self.path), "-ccbin", self.host_compiler]

    @property
    def notes(self) -> list[str]:
        if self.version <= NEWEST:
            return []
        found, newest = (".".join(map(str, v)) for v in (self.version, NEWEST))
        return [
            f"{self.path} is of CUDA {found}: a driver older than that refuses its PTX, so that "
            f"only the architectures named run everywhere (the extra `cuda` has {newest})"
        ]

    def require(self, archs: Sequence[int]) -> None:
        """Raise unless it compiles for all of `archs`.

        Raises:
            EnvironmentLacksError: it doesn't; says which compiler does.
        """
        old = [arch for arch in archs if arch in CUDA12_ONLY]
        if old and self.version >= (13, 0):
            raise EnvironmentLacksError(
                f"CUDA {self.version[0]} compiles for sm_75 and later, not for {names(old)} "
                f"(found {self.path})",
                hint="install a CUDA 12 toolkit and set CUDA_HOME to it, or leave these out",
            )
        run = _run([str(self.path), "--list-gpu-arch"])
        listed = {int(n) for n in re.findall(r"compute_(\d+)", run.stdout)}
        missing = [arch for arch in archs if arch not in listed]
        if listed and missing:
            raise EnvironmentLacksError(
                f"nvcc {self.full} ({self.path}) does not compile for {names(missing)}",
                hint=f"take a newer CUDA toolkit (the extra `cuda` has 13.0: {EXTRA}), or leave "
                "these out",
            )


def find_nvcc() -> Nvcc:
    """The compiler to use: of $CUDA_HOME, $CUDA_PATH, the PATH, /usr/local/cuda, or PyPI's.

    Raises:
        EnvironmentLacksError: none of CUDA 12 or 13 is there, or no host compiler that nvcc calls
            to preprocess; says what to install.
    """
    passed = []
    for origin, path in _candidates():
        if not os.access(path, os.X_OK):
            if origin.startswith("$"):
                passed.append(f"{origin} has no {path}")
            continue
        run = _run([str(path), "--version"])
        match = _VERSION.search(run.stdout)
        if run.returncode or match is None:
            said = (run.stderr.strip() or run.stdout.strip() or "nothing was said").splitlines()
            passed.append(f"{path} does not run: {said[-1]}")
            continue
        version = (int(match[1]), int(match[2]))
        if version[0] not in (12, 13):
            passed.append(f"{path} is of CUDA {match[1]}.{match[2]}")
            continue
        return Nvcc(path, version, match[3], origin, _host_compiler())
    missing = missing_packages()
    what = "no CUDA compiler: no nvcc of CUDA 12 or 13 in $CUDA_HOME, on the PATH or in "
    what += str(SYSTEM)
    if len(missing) < len(PACKAGES):
        what += f", and of PyPI's packages {', '.join(missing)} is missing"
    if passed:
        what += f" ({'; '.join(passed)})"
    raise EnvironmentLacksError(what, hint=EXTRA)


def _host_compiler() -> str | None:
    """A C++ compiler where nvcc wouldn't find one by itself.

    Raises:
        EnvironmentLacksError: there is none.
    """
    chosen = os.environ.get("NVCC_CCBIN") or "-ccbin" in os.environ.get("NVCC_PREPEND_FLAGS", "")
    if chosen or (shutil.which("gcc") and shutil.which("g++")):
        return None
    for name in ("g++", "clang++", "c++"):
        if path := shutil.which(name):
            return path
    raise EnvironmentLacksError(
        "nvcc preprocesses with a C++ compiler, and neither g++, clang++ nor c++ is on the PATH",
        hint="install one; Debian: apt-get install g++",
    )


def missing_packages() -> list[str]:
    """Those of PACKAGES that are not installed."""

    def installed(package: str) -> bool:
        try:
            metadata.version(package)
        except metadata.PackageNotFoundError:
            return False
        return True

    return [package for package in PACKAGES if not installed(package)]


def package_folder() -> Path | None:
    """Where PyPI's packages of CUDA 13 put bin, include and lib; None without them."""
    spec = util.find_spec("nvidia")
    for place in (spec.submodule_search_locations or ()) if spec else ():
        folder = Path(place) / "cu13"
        if folder.is_dir():
            return folder
    return None


def _candidates() -> list[tuple[str, Path]]:
    name = "nvcc.exe" if os.name == "nt" else "nvcc"
    found = [
        (f"${variable}", Path(os.environ[variable]) / "bin" / name)
        for variable in ("CUDA_HOME", "CUDA_PATH")
        if os.environ.get(variable)
    ]
    if on_path := shutil.which("nvcc"):
        found.append(("PATH", Path(on_path)))
    found.append((str(SYSTEM), SYSTEM / "bin" / name))
    folder = package_folder()
    # A part of the packages alone starts, and fails in the middle with another message.
    if folder is not None and not missing_packages():
        found.append(("PyPI", folder / "bin" / name))
    return found


def _run(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )
    except OSError as error:
        return subprocess.CompletedProcess(command, 1, "", str(error.strerror))
