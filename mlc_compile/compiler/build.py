"""`compile`: from a configuration to a model library on disk."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mlc_compile.compiler.fit import check_fits
from mlc_compile.compiler.inputs import CompileInputs, load_inputs
from mlc_compile.compiler.memory import (
    PLANNED,
    MemoryPlan,
    check_binding,
    check_budget,
    estimate_plan,
    format_bytes,
    largest_binding,
    static_workspace,
)
from mlc_compile.compiler.opt import OptFlags, parse_opt
from mlc_compile.compiler.tvm_pair import require_tvm
from mlc_compile.errors import InputError
from mlc_compile.models.structure import check_allowed
from mlc_compile.quantization.policy import is_quantized, stored_params
from mlc_compile.targets.apple.prefix import check_prefix, derived_prefix
from mlc_compile.targets.parsing import fast_parsing
from mlc_compile.targets.profile import ExportRequest, TargetProfile, check_output, get_target

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class CompileReport:
    """What was made."""

    library: Path
    target: str
    plan: MemoryPlan
    estimate: MemoryPlan
    seconds: float
    nbytes: int
    kernels: int
    architecture: Mapping[str, str]
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return {
            "library": str(self.library),
            "target": self.target,
            "architecture": dict(self.architecture),
            "bytes": self.nbytes,
            "seconds": round(self.seconds, 2),
            "kernels": self.kernels,
            "memory_plan": self.plan.to_json(),
            "estimated_workspace": self.estimate.workspace,
        }

    def to_text(self) -> str:
        lines = [
            f"{self.library}: {format_bytes(self.nbytes)}, {self.kernels} kernels "
            f"for {self.target}, {self.seconds:.1f} s",
            self.plan.to_text(),
        ]
        if "evidence" in self.architecture:
            lines.append("  architecture {name}, {label}: {evidence}".format(**self.architecture))
        return "\n".join(lines)


def compile_library(
    source: Path,
    target: str,
    output: Path,
    *,
    opt: str = "O2",
    overrides: Mapping[str, int] | None = None,
    budget: int | None = None,
    debug_dump: Path | None = None,
    max_binding_bytes: int | None = None,
    web_toolchain: str = "zig",
    system_lib_prefix: str | None = None,
    allow_experimental: bool = False,
    progress: Progress | None = None,
) -> CompileReport:
    """Compile the model library of a configuration.

    source: a directory with mlc-chat-config.json, or that file. overrides: sizes of CompileConfig
    that replace the configuration's. max_binding_bytes: replaces the target's own limit.
    web_toolchain: what links WebAssembly. system_lib_prefix: what a statically linked library
    registers itself under; None derives it. allow_experimental: also an architecture that is
    matched by structure alone. Nothing is written unless everything succeeded.

    Raises:
        InputError: a bad configuration, target, output name or option, an architecture that must
            be allowed, or a plan above `budget`.
        EnvironmentLacksError: TVM's pair or a linker is missing.
    """
    started = time.monotonic()
    profile, variant = get_target(target)
    check_output(profile, output)
    if web_toolchain != "zig" and output.suffix != ".wasm":
        raise InputError(
            f"--web-toolchain {web_toolchain} is for .wasm libraries, and {output.name} is none",
            hint="leave it out",
        )
    flags = parse_opt(opt)
    inputs = load_inputs(source, profile, overrides or {})
    check_allowed(inputs.model, allow_experimental, where=str(source))
    prefix = library_prefix(inputs, profile, output.suffix, flags, system_lib_prefix)
    estimate = check_inputs(inputs, profile, budget, max_binding_bytes)
    output = output.resolve()
    if not output.parent.is_dir() or not os.access(output.parent, os.W_OK):
        raise InputError(f"--output {output}: its folder does not exist or cannot be written")
    if output.is_dir():
        raise InputError(f"--output {output} is a directory", hint="name the library file")
    if debug_dump is not None:
        try:
            debug_dump.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(
                f"--debug-dump {debug_dump}: cannot be made: {error.strerror}"
            ) from error
    require_tvm()
    backend = profile.backend()
    backend.check_environment(output.suffix, web_toolchain)

    try:
        folder = Path(tempfile.mkdtemp(prefix=f".{output.stem}.", dir=output.parent))
    except OSError as error:
        raise InputError(
            f"--output {output}: its folder cannot be written: {error.strerror}"
        ) from error
    try:
        temporary = folder / output.name
        with fast_parsing():
            plan, kernels, warnings = _compile(
                inputs,
                profile.name,
                variant,
                flags,
                temporary,
                web_toolchain,
                prefix,
                max_binding_bytes or profile.max_binding_bytes,
                debug_dump,
                progress,
            )
        check_budget(plan, budget)
        nbytes = temporary.stat().st_size
        os.replace(temporary, output)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return CompileReport(
        library=output,
        target=target,
        plan=plan,
        estimate=estimate,
        seconds=time.monotonic() - started,
        nbytes=nbytes,
        kernels=kernels,
        architecture=inputs.model.identity(),
        notes=(*inputs.config.notes, *warnings),
    )


def check_inputs(
    inputs: CompileInputs,
    profile: TargetProfile,
    budget: int | None = None,
    max_binding_bytes: int | None = None,
) -> MemoryPlan:
    """The estimated plan of what can be compiled for a target; see compile_library.

    Raises:
        InputError: the target cannot compute in the scheme's dtype, or has not the devices or the
            memory.
    """
    if inputs.scheme.model_dtype not in profile.dtypes:
        raise InputError(
            f"{inputs.scheme.name} computes in {inputs.scheme.model_dtype}, which {profile.name} "
            "cannot",
            hint=f"take a scheme of {' or '.join(profile.dtypes)}; see `list quantizations`"
            + (profile.dtypes_hint and f" ({profile.dtypes_hint})"),
        )
    for spec in inputs.model.parameters():
        held = inputs.scheme.of(spec)
        if is_quantized(spec, held) and held.kind not in profile.weight_kinds:
            raise InputError(
                f"{spec.name} is held by {held.name}, whose weights ({held.kind}) {profile.name} "
                "cannot read",
                hint="take a scheme of another kind; see `list quantizations`",
            )
    if inputs.config.tensor_parallel_shards > profile.max_shards:
        raise InputError(
            f"tensor_parallel_shards is {inputs.config.tensor_parallel_shards} and a library for "
            f"{profile.name} takes at most {profile.max_shards}",
            hint="run gen_config with --tensor-parallel-shards 1, or give --overrides",
        )
    config, most = inputs.config, profile.max_windowed_sequences
    if config.sliding_window_size > 0 and most is not None and config.max_batch_size > most:
        raise InputError(
            f"max_batch_size is {config.max_batch_size}, and with a sliding window a library for "
            f"{profile.name} serves {most} sequence at a time",
            hint=f"leave max_batch_size={config.max_batch_size} out of --overrides",
        )
    estimate = estimate_plan(inputs.model, inputs.scheme, inputs.config, profile)
    check_fits(inputs, profile, estimate, budget)
    largest = largest_binding(inputs.model, inputs.scheme, inputs.config)
    check_binding(largest, max_binding_bytes or profile.max_binding_bytes, profile.name)
    return estimate


def library_prefix(
    inputs: CompileInputs, profile: TargetProfile, suffix: str, flags: OptFlags, given: str | None
) -> str:
    """The system-library prefix of a library: `given`, or one that differs wherever the library
    does; "" for a library that is loaded by its path.

    Raises:
        InputError: `given` cannot be one, or the library takes none.
    """
    if suffix not in profile.static_suffixes:
        if given is None:
            return ""
        raise InputError(
            f"--system-lib-prefix is for libraries that an app links statically, and a {suffix} "
            f"for {profile.name} is none",
            hint="leave it out",
        )
    if given is not None:
        return check_prefix(given)
    from mlc_compile.compiler.metadata import config_fingerprint

    sizes = asdict(inputs.config)
    del sizes["notes"]
    identity = {
        "config": config_fingerprint(inputs.model, inputs.scheme),
        "sizes": sizes,
        "active_vocab_size": inputs.active_vocab_size,
        "target": profile.name,
        "opt": str(flags),
    }
    return derived_prefix(inputs.model.arch.name, inputs.scheme.name, identity)


def _compile(
    inputs: CompileInputs,
    target_name: str,
    variant: str | None,
    flags: OptFlags,
    output: Path,
    web_toolchain: str,
    prefix: str,
    max_binding_bytes: int | None,
    debug_dump: Path | None,
    progress: Progress | None,
) -> tuple[MemoryPlan, int, list[str]]:
    """Build and write the library; (the static plan, number of kernels, warnings)."""
    from tvm import relax, tirx

    from mlc_compile.compiler.metadata import attach_metadata, build_metadata
    from mlc_compile.compiler.passes.bounds import upper_bounds
    from mlc_compile.compiler.pipeline import (
        PhaseRunner,
        captures_graphs,
        graph_phases,
        lowering_phases,
        register_under,
    )
    from mlc_compile.nn.export import export_decoder, is_private
    from mlc_compile.nn.sampling import SAMPLING_FUNCTIONS, attach_sampling
    from mlc_compile.quantization.linear import SchemeLayers

    model, scheme, config = inputs.model, inputs.scheme, inputs.config
    profile, _ = get_target(target_name)
    backend = profile.backend()
    target = backend.tvm_target(variant, output.suffix)
    steps = ["export", "bind", "fuse", "legalize", "plan_memory", "lower", "generate", "link"]

    def report(step: str) -> None:
        if progress is not None:
            progress(step, steps.index(step), len(steps))

    report("export")
    params = [stored for spec in model.parameters() for stored in stored_params(spec, scheme)]
    runner = PhaseRunner(target, debug_dump, report)
    mod = export_decoder(
        model,
        SchemeLayers(scheme),
        params,
        config,
        backend.kv_cache_kernels(target),
        captured_batch=captures_graphs(target, flags) and config.max_batch_size > 1,
    )
    mod = attach_sampling(
        mod,
        backend.sampling_kernels(target),
        vocab_size=model.config.vocab_size,
        active_vocab_size=inputs.active_vocab_size,
    )
    runner.write("export", mod)
    names = {str(gv.name_hint) for gv, f in mod.functions_items() if isinstance(f, relax.Function)}
    exported = {name for name in names if not is_private(name)}
    functions = sorted(exported | set(SAMPLING_FUNCTIONS))
    mod = runner.run(mod, graph_phases(target, backend, config, flags))
    usage = static_workspace(mod, upper_bounds(config))
    workspace = max(usage[name] for name in PLANNED)
    plan = estimate_plan(model, scheme, config, profile).with_workspace(workspace)
    metadata = build_metadata(
        model,
        scheme,
        config,
        params,
        profile,
        plan,
        {name: nbytes for name, nbytes in usage.items() if name in exported},
        inputs.active_vocab_size,
        profile.required_features(scheme.model_dtype, variant),
        largest_binding(model, scheme, config)[1],
        {
            "functions": functions,
            "tvm_target": str(target),
            "opt": str(flags),
            **({"variant": variant} if variant else {}),
            "kv_tokens": config.kv_tokens,
            **({"system_lib_prefix": prefix} if prefix else {}),
        },
    )
    mod = attach_metadata(mod, metadata)
    mod = runner.run(mod, lowering_phases())
    if prefix:
        mod = register_under(mod, prefix)
    kernels = sum(isinstance(f, tirx.PrimFunc) for _, f in mod.functions_items())
    report("generate")

    def linking(what: str, done: int, total: int) -> None:
        if progress is not None:
            progress(f"link: {what}", steps.index("link"), len(steps))

    request = ExportRequest(
        output,
        metadata,
        [*functions, "_metadata"],
        web_toolchain,
        linking,
        prefix,
        max_binding_bytes,
        debug_dump,
    )
    warnings = backend.export(mod, target, request)
    return plan, kernels, warnings
