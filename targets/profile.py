"""What a target is: its name, what it writes, the sizes it defaults to, and where its back end
lives.

Profiles are data and need no TVM; `backend()` imports the one module that does.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Protocol

from mlc_compile.errors import InputError

if TYPE_CHECKING:
    from tvm.target import Target

    from mlc_compile.targets.kernels import Kernels


class Backend(Protocol):
    """The part of a target that needs TVM."""

    def tvm_target(self, variant: str | None) -> Target:
        """The TVM target of a variant such as a CPU's name; None is the default."""
        ...

    def kernels(self, target: Target) -> Kernels: ...

    def kv_cache_kernels(self, target: Target) -> Any: ...

    def sampling_kernels(self, target: Target) -> Any: ...

    def check_environment(self) -> None:
        """Raise EnvironmentLacksError before the long work when a tool is missing."""
        ...

    def export(self, executable: Any, output: Path) -> None:
        """Write the library to `output`, a path that nobody else sees yet."""
        ...


@dataclass(frozen=True)
class TargetProfile:
    """One compilation target."""

    name: str
    summary: str
    suffixes: tuple[str, ...]
    backend_module: str
    label: str = "stable"
    variants: str = ""  # what may follow `name:`, for help and errors
    required_features: tuple[str, ...] = ()
    compile_defaults: Mapping[str, int] = field(default_factory=dict)
    max_shards: int = 1  # devices that one model may be spread over
    runtime_reserve_bytes: int = 0  # what the process takes beside weights, cache and workspace

    def backend(self) -> Backend:
        return importlib.import_module(self.backend_module).BACKEND  # type: ignore[no-any-return]


TARGETS: Mapping[str, TargetProfile] = MappingProxyType(
    {
        profile.name: profile
        for profile in (
            TargetProfile(
                name="cpu",
                summary="this machine's processor through LLVM; the default, runs everywhere",
                suffixes=(".so", ".dylib", ".dll"),
                backend_module="mlc_compile.targets.cpu",
                variants="an LLVM CPU name, such as cpu:x86-64-v3 (default: this machine's)",
                compile_defaults=MappingProxyType({"max_batch_size": 4}),
                runtime_reserve_bytes=96 << 20,
            ),
        )
    }
)


def get_target(name: str) -> tuple[TargetProfile, str | None]:
    """(profile, variant) of `NAME` or `NAME:VARIANT`.

    Raises:
        InputError: unknown name; says the closest ones.
    """
    base, colon, variant = name.partition(":")
    profile = TARGETS.get(base)
    if profile is None:
        close = difflib.get_close_matches(base.lower(), TARGETS, n=2, cutoff=0.5)
        raise InputError(
            f"unknown target {base!r}"
            + (f" (closest: {', '.join(close)})" if close else "")
            + f"; known: {', '.join(TARGETS)}",
            hint="`mlc_compile list targets` says more",
        )
    if colon and not variant:
        raise InputError(f"target {name!r} ends in a colon", hint=f"after it: {profile.variants}")
    return profile, variant or None


def check_output(profile: TargetProfile, output: Path) -> None:
    """Refuse a library name whose suffix is not one of the target's.

    Raises:
        InputError: wrong suffix.
    """
    if output.suffix not in profile.suffixes:
        raise InputError(
            f"--output {output.name}: a library for {profile.name} ends in "
            + " or ".join(profile.suffixes),
        )
