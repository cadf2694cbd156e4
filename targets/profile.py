"""What a target is: its name, what it writes, the sizes it defaults to, and where its back end
lives.

Profiles are data and need no TVM; `backend()` imports the one module that does.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Protocol

from mlc_compile.errors import InputError
from mlc_compile.targets.nvidia.archs import cuda_dtypes

if TYPE_CHECKING:
    from tvm.ir import IRModule
    from tvm.target import Target

    from mlc_compile.targets.kernels import Kernels

Progress = Callable[[str, int, int], None]
"""(what is done now, steps done, steps in all)."""


@dataclass(frozen=True)
class ExportRequest:
    """What an exporter is to write, and what it may check the result against.

    output: nobody else sees this path yet. metadata: what `_metadata()` says. functions: the
    exported names. web_toolchain: "zig" or "emscripten", for targets that link WebAssembly.
    system_lib_prefix: what a statically linked library registers itself under. max_binding_bytes:
    largest buffer that a kernel may bind, None for no limit. debug_dump: a folder for generated
    sources and what their compiler said of them.
    """

    output: Path
    metadata: Mapping[str, Any]
    functions: Sequence[str]
    web_toolchain: str = "zig"
    progress: Progress | None = None
    system_lib_prefix: str = ""
    max_binding_bytes: int | None = None
    debug_dump: Path | None = None


class Backend(Protocol):
    """The part of a target that needs TVM.

    A library's suffix may choose its host code: `.wasm` or `.so` for webgpu.
    """

    def tvm_target(self, variant: str | None, suffix: str) -> Target:
        """The TVM target of a variant such as a CPU's name; None is the default."""
        ...

    def kernels(self, target: Target) -> Kernels: ...

    def kv_cache_kernels(self, target: Target) -> Any: ...

    def sampling_kernels(self, target: Target) -> Any: ...

    def schedule(self, mod: IRModule) -> IRModule:
        """Give loops that no kernel of ours covers a form the target can run; called under the
        target. On a CPU they can stay as they are."""
        ...

    def check_environment(self, suffix: str, web_toolchain: str) -> None:
        """Raise EnvironmentLacksError before the long work when a tool is missing."""
        ...

    def export(self, mod: IRModule, target: Target, request: ExportRequest) -> list[str]:
        """Generate code for a lowered module and write the library; warnings for the user."""
        ...


@dataclass(frozen=True)
class TargetProfile:
    """One compilation target."""

    name: str
    summary: str
    suffixes: tuple[str, ...]
    backend_module: str  # "module", whose BACKEND it is, or "module:NAME"
    label: str = "stable"
    device: str = "cpu"  # TVM's name of the device that runs it
    variants: str = ""  # what may follow `name:`, for help and errors
    dtypes: tuple[str, ...] = ("float32", "float16", "bfloat16")  # of activations and cache
    variant_dtypes: Callable[[str], tuple[str, ...]] | None = None
    """`dtypes` of a variant where they differ. Raises InputError for a variant that is none."""
    dtypes_hint: str = ""  # what to do about a dtype that is not among them
    weight_kinds: tuple[str, ...] = ("plain", "symmetric", "per channel", "affine", "e4m3")
    """What its kernels read: the `kind` of quantisation schemes."""
    features: Mapping[str, str] = field(default_factory=dict)  # dtype or variant -> device feature
    max_binding_bytes: int | None = None  # largest buffer that a kernel may see
    imposed: Mapping[str, int] = field(default_factory=dict)
    """Sizes that stand above the configuration's (not above --overrides): what the runtimes that
    load this target's libraries always ask for."""
    compile_defaults: Mapping[str, int] = field(default_factory=dict)
    caps: Mapping[str, int] = field(default_factory=dict)
    """Sizes that a configuration's are lowered to (not those of --overrides)."""
    static_suffixes: tuple[str, ...] = ()  # those of `suffixes` that an app links statically
    max_shards: int = 1  # devices that one model may be spread over
    max_windowed_sequences: int | None = None
    """Sequences at once with a sliding window. TVM 0.27's cache uploads its tables in one piece on
    CUDA and the CPU only; elsewhere a second windowed sequence in a call fails at run time."""
    runtime_reserve_bytes: int = 0  # what the process takes beside weights, cache and workspace

    def required_features(self, dtype: str, variant: str | None) -> list[str]:
        """Optional features of a device that a library of this dtype and variant needs."""
        return sorted(
            {self.features[key] for key in (dtype, variant) if key and key in self.features}
        )

    def backend(self) -> Backend:
        module, _, name = self.backend_module.partition(":")
        found: Backend = getattr(importlib.import_module(module), name or "BACKEND")
        return found


def _metal(
    name: str, summary: str, suffixes: tuple[str, ...], caps: Mapping[str, int], **sizes: Any
) -> TargetProfile:
    """One of Apple's platforms."""
    return TargetProfile(
        name=name,
        summary=summary,
        suffixes=suffixes,
        backend_module=f"mlc_compile.targets.metal:{name.upper().replace('-', '_')}_BACKEND",
        label="experimental",  # nothing here has run on a device: docs/ios.md
        device="metal",
        max_windowed_sequences=1,
        dtypes=("float32", "float16"),
        static_suffixes=(".tar", ".a"),
        caps=MappingProxyType(caps),
        runtime_reserve_bytes=64 << 20,
        **sizes,
    )


def _ios(name: str, summary: str, **more: Any) -> TargetProfile:
    """MLC's iOS engine serves one sequence (its mode "interactive"), and what its app ships with
    has chunks of 128 tokens and, mostly, contexts of 2048."""
    return _metal(
        name,
        summary,
        (".tar", ".a", ".so"),
        {"prefill_chunk_size": 128},
        imposed=MappingProxyType({"max_batch_size": 1}),
        compile_defaults=MappingProxyType(
            {"context_window_size": 2048, "prefill_chunk_size": 128, "max_batch_size": 1}
        ),
        # A phone of 8 GB refused a buffer of 2.25 GB (docs/ios.md).
        max_binding_bytes=10**9,
        **more,
    )


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
            TargetProfile(
                name="webgpu",
                summary="browsers: a .wasm library for web-llm (or a .so for `verify` here)",
                suffixes=(".wasm", ".so"),
                backend_module="mlc_compile.targets.webgpu",
                device="webgpu",
                max_windowed_sequences=1,
                dtypes=("float32", "float16"),
                features=MappingProxyType({"float16": "shader-f16"}),
                # What web-llm 0.2.86 asks an adapter for (maxStorageBufferBindingSize).
                max_binding_bytes=1 << 30,
                imposed=MappingProxyType({"max_batch_size": 1}),
                runtime_reserve_bytes=64 << 20,
            ),
            TargetProfile(
                name="cuda",
                summary="NVIDIA GPUs, sm_75 and later, compiled with neither a GPU nor a driver",
                suffixes=(".so",),
                backend_module="mlc_compile.targets.cuda",
                label="experimental",
                device="cuda",
                dtypes=("float32", "float16"),
                variant_dtypes=cuda_dtypes,
                dtypes_hint="bfloat16 needs sm_80: --target cuda:sm_80,sm_90",
                variants="architectures, such as sm_80,sm_90, or auto for this machine's GPU "
                "(default: sm_75,sm_80,sm_90)",
                compile_defaults=MappingProxyType({"max_batch_size": 8}),
                # The context, and workspaces of kernels beside the plan: benchmarks/NOTES.md.
                runtime_reserve_bytes=768 << 20,
            ),
            _ios(
                "iphone",
                "iPhone and iPad: .tar or .a for an app (or a .so for `verify` here)",
                variants="apple7, for A14, M1 and later: faster prefill (default: A12 and later)",
                features=MappingProxyType({"apple7": "apple7"}),
            ),
            _ios("iphone-simulator", "the iOS simulator on Apple silicon, as iphone"),
            _ios("macabi", "Mac Catalyst on Apple silicon, as iphone"),
            _metal(
                "macos",
                "Apple silicon Macs: a .dylib, or .tar or .a for an app",
                (".dylib", ".tar", ".a", ".so"),
                {},
                compile_defaults=MappingProxyType({"max_batch_size": 1}),
            ),
        )
    }
)


def get_target(name: str) -> tuple[TargetProfile, str | None]:
    """(profile, variant) of `NAME` or `NAME:VARIANT`.

    Raises:
        InputError: unknown name (says the closest ones), or, for cuda, unknown architectures.
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
    if variant and profile.variant_dtypes is not None:
        profile = replace(profile, dtypes=profile.variant_dtypes(variant))
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
