"""Objects of a model and of the runtime -> one WebAssembly module."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mlc_compile.errors import InputError
from mlc_compile.targets.profile import Progress
from mlc_compile.targets.web.runtime import cache_folder, runtime_objects
from mlc_compile.targets.web.toolchain import EXPORTS, get_toolchain, run


def link(
    objects: Sequence[Path],
    output: Path,
    *,
    toolchain: str = "zig",
    progress: Progress | None = None,
) -> None:
    """Link a model's `objects` and the runtime to a reactor module at `output`.

    The module exports memory, `_initialize` and `toolchain.EXPORTS`. The same objects in the same
    order give the same bytes, wherever they lie.

    Raises:
        EnvironmentLacksError: no toolchain, no place for the runtime's objects, or the linker
            refused: its whole text is in the message.
        InputError: an object is not there.
    """
    for file in objects:
        if not file.is_file():
            raise InputError(f"{file}: no such object file")
    tools = get_toolchain(toolchain)
    runtime = runtime_objects(tools, progress=progress)
    with tempfile.TemporaryDirectory(prefix="mlc-link-") as scratch:
        folder = Path(scratch)
        made = folder / "model.wasm"
        command = [*tools.compiler("c++"), *tools.link_flags(EXPORTS)]
        command += [str(file.absolute()) for file in (*objects, *runtime)]
        run([*command, "-o", str(made)], tools.variables(cache_folder(), folder), cwd=folder)
        shutil.copyfile(made, output)


def fcompile(*, toolchain: str = "zig", progress: Progress | None = None) -> Callable[..., None]:
    """The `fcompile` argument of a relax executable's `export_library`, which then writes a module.

    For an executable built with `system_lib=True` for a webgpu target whose host is
    `wasm32-unknown-unknown-wasm`.
    """

    def link_objects(output: str, objects: Sequence[str], *_: Any, **__: Any) -> None:
        # TVM's order and file names are its own affair: sort by name, so that bytes don't depend
        # on it.
        ordered = sorted(map(Path, objects), key=lambda file: file.name)
        link(ordered, Path(output), toolchain=toolchain, progress=progress)

    link_objects.object_format = "o"  # type: ignore[attr-defined]
    link_objects.output_format = "wasm"  # type: ignore[attr-defined]
    return link_objects
