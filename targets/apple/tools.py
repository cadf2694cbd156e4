"""Archives and dylibs through ziglang from PyPI, and tar files; the same input gives the same
bytes."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterable, Sequence
from importlib import metadata
from pathlib import Path

from mlc_compile.errors import EnvironmentLacksError
from mlc_compile.targets.apple.platforms import ApplePlatform

Member = tuple[str, bytes]
"""(file name, bytes) of an object."""


def require_zig(what: str) -> None:
    """Raise unless ziglang is installed; `what` it is needed for begins the message.

    Raises:
        EnvironmentLacksError: says how to install it.
    """
    try:
        metadata.version("ziglang")
    except metadata.PackageNotFoundError:
        raise EnvironmentLacksError(
            f"{what} is made with zig, and the package ziglang is not installed",
            hint="pip install 'mlc-compile[metal]'",
        ) from None


def write_archive(members: Sequence[Member], output: Path) -> None:
    """A static archive with an index, in the format of Apple's linker (GNU's is refused there).

    Raises:
        EnvironmentLacksError: no ziglang, or it failed.
    """
    require_zig("a static archive for Apple's linker")
    with tempfile.TemporaryDirectory(prefix="mlc-archive-") as folder:
        for name, data in members:
            (Path(folder) / name).write_bytes(data)
        # D: zero for times and owners
        command = ["ar", "--format=darwin", "rcsD", "model.a", *(name for name, _ in members)]
        _zig(command, Path(folder))
        output.write_bytes((Path(folder) / "model.a").read_bytes())


def write_dylib(members: Sequence[Member], platform: ApplePlatform, output: Path) -> None:
    """A dynamic library; the TVM runtime that loads it provides what it leaves undefined.

    Raises:
        EnvironmentLacksError: no ziglang, or it failed.
    """
    require_zig("a dynamic library for macOS")
    version = ".".join(map(str, platform.minimum))
    with tempfile.TemporaryDirectory(prefix="mlc-dylib-") as folder:
        for name, data in members:
            (Path(folder) / name).write_bytes(data)
        # Nothing of a compiler's runtime is needed, and without -nostdlib zig builds it first.
        flags = ["-target", f"aarch64-macos.{version}", "-shared", "-nostdlib"]
        flags += ["-Wl,-undefined,dynamic_lookup", "-install_name", f"@rpath/{output.name}"]
        _zig(["cc", *flags, *(name for name, _ in members), "-o", output.name], Path(folder))
        output.write_bytes((Path(folder) / output.name).read_bytes())


def write_tar(members: Iterable[Member], output: Path) -> None:
    """A tar file of objects, with nothing of this machine or of the time in it."""
    with tarfile.open(output, "w", format=tarfile.USTAR_FORMAT) as archive:
        for name, data in members:
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = len(data), 0o644
            archive.addfile(entry, io.BytesIO(data))


def read_tar(path: Path) -> list[Member]:
    """The objects in a tar file that `write_tar` wrote."""
    with tarfile.open(path) as archive:
        members = []
        for entry in archive.getmembers():
            file = archive.extractfile(entry)
            if file is not None:
                members.append((entry.name, file.read()))
        return members


def _zig(arguments: Sequence[str], folder: Path) -> None:
    """Run zig in `folder`, with caches of its own there: nothing outside is read or written."""
    done = subprocess.run(
        [sys.executable, "-m", "ziglang", *arguments],
        cwd=folder,
        env={
            **os.environ,
            "ZIG_LOCAL_CACHE_DIR": str(folder / "cache"),
            "ZIG_GLOBAL_CACHE_DIR": os.environ.get("ZIG_GLOBAL_CACHE_DIR", str(folder / "cache")),
        },
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    if done.returncode != 0:
        said = done.stderr.strip() or done.stdout.strip() or "nothing was said"
        raise EnvironmentLacksError(f"zig {arguments[0]} failed: {said[-2000:]}")
