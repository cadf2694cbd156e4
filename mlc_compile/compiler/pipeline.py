"""The compiler's phases by name, from exported Relax to what code generation takes.

Each phase is a list of passes; `--debug-dump` writes the module after each, and an `--opt` switch
turns a fusing pass off (the operation then takes TVM's generic, slow and independent route).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import tvm
from tvm import relax, tirx
from tvm.ir import IRModule
from tvm.target import Target

from mlc_compile.compiler.opt import CUDA_GRAPH, OptFlags
from mlc_compile.compiler.passes.bounds import attach_bounds
from mlc_compile.compiler.passes.fuse_embedding import fuse_embedding
from mlc_compile.compiler.passes.fuse_experts import fuse_experts
from mlc_compile.compiler.passes.fuse_gated import fuse_gated
from mlc_compile.compiler.passes.fuse_linear import fuse_linear
from mlc_compile.compiler.passes.fuse_linear_gated import fuse_linear_gated
from mlc_compile.compiler.passes.fuse_linear_norm import fuse_linear_norm
from mlc_compile.compiler.passes.fuse_norm import fuse_norm
from mlc_compile.compiler.passes.fuse_qk_norm import fuse_qk_norm
from mlc_compile.compiler.passes.fuse_residual import fuse_residual
from mlc_compile.compiler.passes.rewrite import MadeOnce
from mlc_compile.config import CompileConfig
from mlc_compile.targets.kernels import Kernels
from mlc_compile.targets.profile import Backend

Pass = Callable[[IRModule], IRModule]

FUSING: dict[str, Callable[[IRModule, Kernels], IRModule]] = {
    "fuse_linear": fuse_linear,
    "fuse_residual": fuse_residual,
    "fuse_linear_norm": fuse_linear_norm,
    "fuse_linear_gated": fuse_linear_gated,
    "fuse_experts": fuse_experts,
    "fuse_embedding": fuse_embedding,
    "fuse_qk_norm": fuse_qk_norm,
    "fuse_norm": fuse_norm,
    "fuse_gated": fuse_gated,
}
"""The passes that `--opt` can switch; compiler/opt.py names them. Those that widen a product's
kernel come right after the one that makes it, before passes that would take its neighbours."""


@dataclass(frozen=True)
class Phase:
    """A named step; its passes run in order."""

    name: str
    passes: Sequence[Pass]


def captures_graphs(target: Target, opt: OptFlags) -> bool:
    """Whether the launches of decoding become CUDA graphs."""
    return opt.enabled(CUDA_GRAPH) and str(target.kind.name) == "cuda"


def capture_graphs(mod: IRModule) -> IRModule:
    """Kernels between two calls into the KV cache become one graph, for one row and, with the
    attribute `nn.export.CAPTURED_ROWS`, for each number of rows.

    A graph's kernels read and write memory that stays where it is: the parameters, and storages
    that all functions then share and never free. What reads a function's own argument, such as the
    first layer's norm, is launched by itself.
    """
    config = {"relax.backend.use_cuda_graph": True}
    with tvm.transform.PassContext(opt_level=3, config=config):
        return relax.transform.RewriteCUDAGraph()(mod)


def graph_phases(
    target: Target, backend: Backend, config: CompileConfig, opt: OptFlags
) -> list[Phase]:
    """Exported module -> a module whose memory is planned (its storages are what memory.py
    reads)."""
    kernels: Kernels = MadeOnce(backend.kernels(target))
    fusing = [
        (lambda mod, f=function: f(mod, kernels))
        for name, function in FUSING.items()
        if opt.enabled(name)
    ]
    x = relax.transform
    return [
        Phase("bind", [tirx.transform.BindTarget(target), lambda m: attach_bounds(m, config)]),
        Phase("fuse", fusing),
        Phase(
            "legalize",
            [
                # reshape stays: the runtime makes a view of it, without a kernel
                x.LegalizeOps(skip_ops=["relax.reshape"]),
                x.AnnotateTIROpPattern(),
                x.FoldConstant(),
                x.FuseOps(),
                x.FuseTIR(),
                x.DeadCodeElimination(),
                backend.schedule,
            ],
        ),
        Phase(
            "plan_memory",
            [
                x.ToNonDataflow(),
                x.RemovePurityChecking(),
                x.CallTIRRewrite(),
                x.StaticPlanBlockMemory(),
                *([capture_graphs] if captures_graphs(target, opt) else []),
            ],
        ),
    ]


def lowering_phases() -> list[Phase]:
    """A planned module -> what `relax.build` generates code from."""
    x = relax.transform
    return [
        Phase(
            "lower",
            [
                x.LowerAllocTensor(),
                x.KillAfterLastUse(),
                x.LowerRuntimeBuiltin(),
                x.ComputePrimValue(),
                x.VMShapeLower(),
                x.AttachGlobalSymbol(),
            ],
        )
    ]


def register_under(mod: IRModule, prefix: str) -> IRModule:
    """A lowered module whose kernels' symbols and registration carry a system-library prefix.

    AttachGlobalSymbol would do it for a module with this attribute, but it renames GlobalVars too,
    and that fails on kernels with buffer views (TVM 0.27). The runtime finds both: it looks for a
    function's name behind the prefix.
    """
    for var, func in mod.functions_items():
        if isinstance(func, tirx.PrimFunc):
            mod.update_func(var, func.with_attr("global_symbol", prefix + var.name_hint))
    return mod.with_attrs({"system_lib_prefix": prefix})


class PhaseRunner:
    """Runs phases under one target, numbering the dumps."""

    def __init__(
        self,
        target: Target,
        dump: Path | None,
        progress: Callable[[str], None] | None = None,
    ) -> None:
        self.target = target
        self.dump = dump
        self.progress = progress
        self._number: Iterator[int] = iter(range(1, 100))

    def run(self, mod: IRModule, phases: Sequence[Phase]) -> IRModule:
        """The module after all `phases`; each is dumped as NN_name.py when a dump folder was
        given."""
        for phase in phases:
            if self.progress is not None:
                self.progress(phase.name)
            with self.target, tvm.transform.PassContext(opt_level=3):
                for step in phase.passes:
                    mod = step(mod)
            self.write(phase.name, mod)
        return mod

    def write(self, name: str, mod: IRModule) -> None:
        """Dump `mod` under the next number."""
        number = next(self._number)
        if self.dump is not None:
            self.dump.mkdir(parents=True, exist_ok=True)
            text = mod.script(show_meta=False)
            (self.dump / f"{number:02d}_{name}.py").write_text(text, encoding="utf-8")
