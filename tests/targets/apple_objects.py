"""A library of one small kernel for an Apple platform, made by the real exporter in a second."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from mlc_compile.targets.apple.platforms import ApplePlatform
from mlc_compile.targets.profile import ExportRequest, get_target

METADATA = {"active_vocab_size": 7, "mlc_compile": {"format_version": 1}}


def lowered(target: Any, schedule: Any, prefix: str) -> Any:
    """A module with one function `double`, lowered as build.py does it."""
    from tvm import relax
    from tvm.relax.frontend import nn

    from mlc_compile.compiler.metadata import attach_metadata
    from mlc_compile.compiler.pipeline import lowering_phases, register_under

    class Double(nn.Module):
        def double(self, x: nn.Tensor) -> nn.Tensor:
            return nn.op.add(x, x)

    spec = {"double": {"x": nn.spec.Tensor([8, "n"], "float16")}}
    mod, _ = Double().export_tvm(spec=spec)
    x = relax.transform
    graph = [x.LegalizeOps(), x.AnnotateTIROpPattern(), schedule, x.ToNonDataflow()]
    graph += [x.RemovePurityChecking(), x.CallTIRRewrite()]
    graph += [lambda m: attach_metadata(m, METADATA)]
    with target:
        for step in (*graph, *lowering_phases()[0].passes):
            mod = step(mod)
    return register_under(mod, prefix) if prefix else mod


def export(platform: ApplePlatform, output: Path, prefix: str = "toy_model_") -> Path:
    """Write `output` for a platform."""
    profile, _ = get_target(platform.name)
    backend = profile.backend()
    if output.suffix not in profile.static_suffixes:
        prefix = ""
    target = backend.tvm_target(None, output.suffix)
    request = ExportRequest(output, METADATA, ["double", "_metadata"], system_lib_prefix=prefix)
    backend.export(lowered(target, backend.schedule, prefix), target, request)
    return output


def lld(platform_name: str, archives: Sequence[Path], output: Path) -> None:
    """Link a dylib from whole archives with LLVM's Mach-O linker, as an app's link does.

    Skips without the linker (Debian: package lld), or fails where MLC_COMPILE_REQUIRE_LLD is set.
    """
    names = ["ld64.lld", *(f"ld64.lld-{version}" for version in range(22, 13, -1))]
    linker = next(filter(None, map(shutil.which, names)), None)
    if linker is None:
        if os.environ.get("MLC_COMPILE_REQUIRE_LLD"):
            pytest.fail("no ld64.lld on the PATH")
        pytest.skip("no ld64.lld on the PATH; Debian: apt-get install lld")
    command = [linker, "-dylib", "-arch", "arm64", "-platform_version", platform_name]
    command += ["16.0", "16.0", "-undefined", "dynamic_lookup", "-o", str(output)]
    for archive in archives:
        command += ["-force_load", str(archive)]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0 and not run.stderr, run.stderr
