"""A compiled model -> a checked library for an Apple platform."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mlc_compile.targets.apple.check import (
    check_archive,
    check_contents,
    check_dylib,
    check_objects,
    check_system_library,
)
from mlc_compile.targets.apple.platforms import ApplePlatform
from mlc_compile.targets.apple.tools import Member, write_archive, write_dylib, write_tar
from mlc_compile.targets.profile import ExportRequest


def export_library(executable: Any, platform: ApplePlatform, request: ExportRequest) -> None:
    """Write `request.output` (.tar, .a or .dylib).

    executable: what relax.build made for a metal target whose host is the platform's; with
    `system_lib=True` and the module attribute `system_lib_prefix` for .tar and .a.

    Raises:
        CheckFailedError: the library would not link or load there.
        EnvironmentLacksError: no ziglang, or it failed.
    """
    output = request.output
    if request.progress is not None:
        request.progress("objects", 0, 1)
    prefix = request.system_lib_prefix
    members = objects(executable, output.parent, prefix)
    check_objects(members, platform)
    for name, data in members:
        if name.endswith("devc.o"):
            check_contents(data, name, request.metadata, request.functions)
    if output.suffix == ".dylib":
        write_dylib(members, platform, output)
        check_dylib(output.read_bytes(), platform, output.name)
        return
    check_system_library(members, prefix)
    if output.suffix == ".tar":
        write_tar(members, output)
    else:
        write_static(members, output)


def write_static(members: Sequence[Member], output: Path) -> None:
    """A checked static archive of objects that were checked before.

    Raises:
        CheckFailedError: the archive is not what it should be.
        EnvironmentLacksError: no ziglang, or it failed.
    """
    write_archive(members, output)
    check_archive(output.read_bytes(), members, output.name)


def objects(executable: Any, scratch: Path, prefix: str) -> list[Member]:
    """The objects of an executable, sorted by name; names begin with `prefix`, because linkers
    warn of members of one name."""
    made: list[Member] = []

    def collect(output: str, files: Sequence[str], *_: Any, **__: Any) -> None:
        for file in map(Path, files):
            name = "devc.o" if file.name.endswith("devc.o") else file.name
            made.append((f"{prefix}{name}", file.read_bytes()))

    collect.object_format = "o"  # type: ignore[attr-defined]
    collect.output_format = "o"  # type: ignore[attr-defined]
    executable.export_library(str(scratch / "objects.o"), fcompile=collect)
    return sorted(made)
