"""A compiled model -> a checked WebGPU library."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from mlc_compile.targets.profile import Progress
from mlc_compile.targets.web.check import MAX_BINDING_BYTES, check_library, split_kernels
from mlc_compile.targets.web.link import fcompile


def export_wasm(
    executable: Any,
    output: Path,
    *,
    metadata: Mapping[str, Any],
    functions: Collection[str],
    toolchain: str = "zig",
    f16: bool = False,
    subgroups: bool = False,
    max_storage_buffer_binding_size: int = MAX_BINDING_BYTES,
    progress: Progress | None = None,
) -> list[str]:
    """Link `executable`, check the result and only then write `output`; warnings for the user.

    executable: what relax.build made with `system_lib=True` for a webgpu target whose host is
    `wasm32-unknown-unknown-wasm`. The other arguments are those of `check_library` and `link`.

    Raises:
        CheckFailedError: the library would not work.
        EnvironmentLacksError: no toolchain, no place for the runtime's objects, a failed link.
    """
    with tempfile.TemporaryDirectory(prefix="mlc-export-") as scratch:
        made = Path(scratch) / "model.wasm"
        executable.export_library(
            str(made), fcompile=fcompile(toolchain=toolchain, progress=progress)
        )
        warnings = check_library(
            made,
            functions=functions,
            wgsl=kernels(executable),
            metadata=metadata,
            f16=f16,
            subgroups=subgroups,
            max_storage_buffer_binding_size=max_storage_buffer_binding_size,
        )
        # Beside the output first: the scratch folder may be on another file system.
        beside = output.with_name(f".{output.name}.{os.getpid()}.tmp")
        try:
            shutil.copyfile(made, beside)
            beside.replace(output)
        finally:
            beside.unlink(missing_ok=True)
    return warnings


def kernels(executable: Any) -> dict[str, str]:
    """Name -> WGSL of every kernel in a relax executable."""
    found: dict[str, str] = {}
    pending: list[Any] = [executable.mod]
    while pending:
        module = pending.pop()
        if module.kind == "webgpu":
            found.update(split_kernels(module.inspect_source()))
        pending.extend(module.imports)
    return found
