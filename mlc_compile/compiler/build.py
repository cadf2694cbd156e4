"""`compile`: from a configuration to a model library on disk."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlc_compile.compiler.inputs import CompileInputs, load_inputs
from mlc_compile.compiler.memory import (
    PLANNED,
    MemoryPlan,
    check_budget,
    estimate_plan,
    format_bytes,
    static_workspace,
)
from mlc_compile.compiler.opt import OptFlags, parse_opt
from mlc_compile.compiler.tvm_pair import require_tvm
from mlc_compile.errors import InputError
from mlc_compile.quantization.policy import stored_params
from mlc_compile.targets.parsing import fast_parsing
from mlc_compile.targets.profile import check_output, get_target

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
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return {
            "library": str(self.library),
            "target": self.target,
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
    progress: Progress | None = None,
) -> CompileReport:
    """Compile the model library of a configuration.

    source: a directory with mlc-chat-config.json, or that file. overrides: sizes of CompileConfig
    that replace the configuration's. Nothing is written unless everything succeeded.

    Raises:
        InputError: a bad configuration, target, output name or option, or a plan above `budget`.
        EnvironmentLacksError: TVM's pair or a linker is missing.
    """
    started = time.monotonic()
    profile, variant = get_target(target)
    check_output(profile, output)
    flags = parse_opt(opt)
    inputs = load_inputs(source, overrides or {})
    if inputs.config.tensor_parallel_shards > profile.max_shards:
        raise InputError(
            f"tensor_parallel_shards is {inputs.config.tensor_parallel_shards} and a library for "
            f"{profile.name} takes at most {profile.max_shards}",
            hint="run gen_config with --tensor-parallel-shards 1, or give --overrides",
        )
    estimate = estimate_plan(inputs.model, inputs.scheme, inputs.config, profile)
    check_budget(estimate, budget)
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
    backend.check_environment()

    try:
        folder = Path(tempfile.mkdtemp(prefix=f".{output.stem}.", dir=output.parent))
    except OSError as error:
        raise InputError(
            f"--output {output}: its folder cannot be written: {error.strerror}"
        ) from error
    try:
        temporary = folder / output.name
        with fast_parsing():
            plan, kernels = _compile(
                inputs, profile.name, variant, flags, temporary, debug_dump, progress
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
        notes=inputs.config.notes,
    )


def _compile(
    inputs: CompileInputs,
    target_name: str,
    variant: str | None,
    flags: OptFlags,
    output: Path,
    debug_dump: Path | None,
    progress: Progress | None,
) -> tuple[MemoryPlan, int]:
    """Build and write the library; (the static plan, number of kernels)."""
    from tvm import relax, tirx

    from mlc_compile.compiler.metadata import attach_metadata, build_metadata
    from mlc_compile.compiler.passes.bounds import upper_bounds
    from mlc_compile.compiler.pipeline import PhaseRunner, graph_phases, lowering_phases
    from mlc_compile.nn.export import STACK, STACK_ONE, export_decoder
    from mlc_compile.nn.sampling import SAMPLING_FUNCTIONS, attach_sampling
    from mlc_compile.quantization.linear import SchemeLayers

    model, scheme, config = inputs.model, inputs.scheme, inputs.config
    profile, _ = get_target(target_name)
    backend = profile.backend()
    target = backend.tvm_target(variant)
    steps = ["export", "bind", "fuse", "legalize", "plan_memory", "lower", "generate", "link"]

    def report(step: str) -> None:
        if progress is not None:
            progress(step, steps.index(step), len(steps))

    report("export")
    params = [stored for spec in model.parameters() for stored in stored_params(spec, scheme)]
    runner = PhaseRunner(target, debug_dump, report)
    mod = export_decoder(
        model, SchemeLayers(scheme), params, config, backend.kv_cache_kernels(target)
    )
    mod = attach_sampling(
        mod,
        backend.sampling_kernels(target),
        vocab_size=model.config.vocab_size,
        active_vocab_size=inputs.active_vocab_size,
    )
    runner.write("export", mod)
    mod = runner.run(mod, graph_phases(target, backend.kernels(target), config, flags))
    usage = static_workspace(mod, upper_bounds(config))
    workspace = max(usage[name] for name in PLANNED)
    plan = estimate_plan(model, scheme, config, profile).with_workspace(workspace)
    exported = {gv.name_hint for gv, f in mod.functions_items() if isinstance(f, relax.Function)}
    exported |= set(SAMPLING_FUNCTIONS)
    functions = sorted(exported - {STACK, STACK_ONE})
    metadata = build_metadata(
        model,
        scheme,
        config,
        params,
        profile,
        plan,
        usage,
        inputs.active_vocab_size,
        {
            "functions": functions,
            "tvm_target": str(target),
            "opt": str(flags),
            "kv_tokens": config.kv_tokens,
        },
    )
    mod = attach_metadata(mod, metadata)
    mod = runner.run(mod, lowering_phases())
    kernels = sum(isinstance(f, tirx.PrimFunc) for _, f in mod.functions_items())
    report("generate")
    with target:
        executable = relax.build(mod, target, relax_pipeline=None)
    report("link")
    backend.export(executable, output)
    return plan, kernels
