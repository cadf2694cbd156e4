"""The decoder of a tiny configuration, compiled in memory without its sampling functions."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tvm
from compiler_configs import read_inputs
from tvm import relax
from tvm.ir import IRModule

from mlc_compile.compiler.opt import parse_opt
from mlc_compile.compiler.pipeline import (
    PhaseRunner,
    captures_graphs,
    graph_phases,
    lowering_phases,
)
from mlc_compile.nn.export import export_decoder
from mlc_compile.quantization.codec import encode
from mlc_compile.quantization.linear import SchemeLayers
from mlc_compile.quantization.policy import is_quantized, stored_layout, stored_params
from mlc_compile.targets.parsing import fast_parsing
from mlc_compile.targets.profile import get_target


class WithKernels:
    """A back end whose fusing kernels are others'."""

    def __init__(self, backend: Any, kernels: Any) -> None:
        self._backend = backend
        self.kernels = lambda target: kernels

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)


def planned_decoder(
    folder: Path,
    opt: str,
    *,
    target: str = "cpu",
    kernels: Any = None,
    entries: Sequence[str] | None = None,
    **overrides: int,
) -> IRModule:
    """The decoder after the graph phases: memory is planned, nothing is lowered.

    kernels: instead of the target's. entries: the functions to keep with what they call; all.
    """
    inputs = read_inputs(folder, target, **overrides)
    backend = get_target(target)[0].backend()
    tvm_target = backend.tvm_target(None, ".so")
    if kernels is not None:
        backend = WithKernels(backend, kernels)
    flags = parse_opt(opt)
    params = [s for spec in inputs.model.parameters() for s in stored_params(spec, inputs.scheme)]
    with fast_parsing():
        mod = export_decoder(
            inputs.model,
            SchemeLayers(inputs.scheme),
            params,
            inputs.config,
            backend.kv_cache_kernels(tvm_target),
            captured_batch=captures_graphs(tvm_target, flags),
        )
        if entries is not None:
            mod = relax.transform.DeadCodeElimination(list(entries))(mod)
        phases = graph_phases(tvm_target, backend, inputs.config, flags)
        return PhaseRunner(tvm_target, None).run(mod, phases)


@dataclasses.dataclass
class Decoder:
    """A cpu decoder with seeded random parameters and an empty cache."""

    vm: Any
    params: list[Any]
    cache: Any

    @classmethod
    def build(cls, folder: Path, opt: str, **options: Any) -> Decoder:
        mod = planned_decoder(folder, opt, **options)
        target = get_target("cpu")[0].backend().tvm_target(None, ".so")
        mod = PhaseRunner(target, None).run(mod, lowering_phases())
        vm = relax.VirtualMachine(relax.build(mod, target, relax_pipeline=None), tvm.cpu())
        inputs = read_inputs(folder)
        config, batch = inputs.config, inputs.config.max_batch_size
        sizes = (batch, config.kv_tokens * batch, config.prefill_chunk_size, 16, 0)
        shapes = [tvm.runtime.ShapeTuple([size]) for size in sizes]
        cache = vm["create_tir_paged_kv_cache"](*shapes)
        rng = np.random.default_rng(0)
        params: list[Any] = []
        for spec in inputs.model.parameters():
            weight = (rng.standard_normal(spec.shape) * 0.2).astype(np.float32)
            weight += spec.role == "norm"
            if is_quantized(spec, inputs.scheme):
                layout = stored_layout(spec, inputs.scheme)
                params += encode(weight, inputs.scheme, layout=layout, name=spec.name)
            else:
                params.append(weight.astype(stored_params(spec, inputs.scheme)[0].dtype))
        return cls(vm, [tvm.runtime.tensor(p) for p in params], cache)

    def add(self, sequence: int) -> None:
        self._state("add_sequence", sequence)

    def forward(
        self, name: str, sequences: Sequence[int], lengths: Sequence[int], *args: Any
    ) -> np.ndarray[Any, Any]:
        """The first result of an exported function, between the cache's begin and end."""
        shapes = [tvm.runtime.ShapeTuple(list(s)) for s in (sequences, lengths)]
        self._state("begin_forward", *shapes)
        out = self.vm[name](*args, self.cache, self.params)
        self._state("end_forward")
        return np.array(out[0].numpy())

    def embed(self, tokens: Sequence[int], *lead: int) -> Any:
        """Embeddings [*lead, H]."""
        x = self.vm["embed"](self.ids(tokens), self.params)
        return x._create_view([*lead, x.shape[-1]])

    def ids(self, tokens: Sequence[int]) -> Any:
        return tvm.runtime.tensor(np.asarray(tokens, np.int32))

    def _state(self, name: str, *args: Any) -> None:
        function: Callable[..., Any] = tvm.get_global_func(f"vm.builtin.kv_state_{name}")
        function(self.cache, *args)


def kernel_names(mod: IRModule, function: str) -> list[str]:
    """Kernels that a planned function calls, in order."""
    return [
        binding.value.op.name_hint
        for block in mod[function].body.blocks
        for binding in block.bindings
        if isinstance(binding.value, relax.Call)
        and isinstance(binding.value.op, tvm.ir.GlobalVar)
        and not isinstance(mod[binding.value.op], relax.Function)
    ]
