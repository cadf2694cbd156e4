"""Which launches the switch `cuda_graph` captures, on the graph alone: no compiler, no GPU."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
from compiler_configs import read_inputs, write_config
from decoders import kernel_names, planned_decoder
from tvm import ir, relax
from tvm.ir import IRModule

from mlc_compile.compiler import memory
from mlc_compile.compiler.passes.bounds import upper_bounds
from mlc_compile.nn.export import STACK, STACK_BATCH, STACK_ONE
from mlc_compile.targets.profile import get_target

LAYERS, BATCH = 3, 4
STACKS = (STACK, STACK_ONE, STACK_BATCH)
ATTENTION = "vm.builtin.attention_kv_cache_attention_with_fused_qkv"
CAPTURE = "vm.builtin.cuda_graph.run_or_capture"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("graphs")
    return write_config(folder, num_hidden_layers=LAYERS, tie_word_embeddings=False)


@cache
def planned(folder: Path, opt: str, target: str = "cuda") -> IRModule:
    return planned_decoder(folder, opt, target=target, max_batch_size=BATCH)


def steps(mod: IRModule, function: str) -> list[str]:
    """What a function runs: kernels, ATTENTION, and the captured functions."""
    found = []
    for block in mod[function].body.blocks:
        for binding in block.bindings:
            value = binding.value
            if not isinstance(value, relax.Call):
                continue
            if isinstance(value.op, ir.GlobalVar):
                found.append(str(value.op.name_hint))
            elif isinstance(value.op, relax.ExternFunc):
                found.append(str(value.op.global_symbol))
            elif str(value.op.name) == "relax.call_builtin_with_ctx":
                name, (first, *_) = value.args[0], value.args[1].fields
                if str(name.global_symbol) == CAPTURE:
                    found.append(str(first.name_hint))
    return found


@pytest.mark.parametrize("stack", [STACK_ONE, STACK_BATCH])
def test_all_kernels_between_two_layers_attention_are_one_graph(folder: Path, stack: str) -> None:
    """The first layer reads the function's argument, the last norm writes its result."""
    mod = planned(folder, "O3")
    plain = kernel_names(planned(folder, "O2"), STACK if stack == STACK_BATCH else stack)
    found = steps(mod, stack)
    assert found.count(ATTENTION) == LAYERS
    between = found[found.index(ATTENTION) + 1 :]
    middle = between[between.index(ATTENTION) + 1 :]
    middle = middle[: middle.index(ATTENTION)]
    assert len(middle) == 1  # from the second layer's attention to the third's
    captured = kernel_names(mod, middle[0])
    per_layer = (len(plain) - 1) // LAYERS
    assert len(captured) == per_layer
    # No kernel is lost: those launched alone and those of the graphs are all there are.
    graphs = [name for name in found if "cuda_graph_capture" in name]
    alone = [name for name in found if name not in graphs and name != ATTENTION]
    total = alone + [kernel for graph in graphs for kernel in kernel_names(mod, graph)]
    assert sorted(total) == sorted(plain)
    assert len(alone) <= 3, alone


def test_weights_are_captured_and_prefill_is_not(folder: Path) -> None:
    mod = planned(folder, "O3")
    assert not any("capture" in name for name in steps(mod, STACK))
    graph = next(name for name in steps(mod, STACK_ONE) if "capture" in name)
    dtypes = {str(p.ty.dtype) for p in mod[graph].params if isinstance(p.ty, relax.TensorType)}
    assert "uint32" in dtypes  # packed weights are its arguments
    assert mod[STACK_BATCH].attrs["relax.rewrite_cuda_graph.capture_symbolic_vars"] == [
        "batch_size"
    ]


@pytest.mark.parametrize(("opt", "target"), [("O2", "cuda"), ("O3;cuda_graph=0", "cuda")])
def test_off_there_is_neither_graph_nor_a_stack_of_its_own(
    folder: Path, opt: str, target: str
) -> None:
    names = {gv.name_hint for gv in planned(folder, opt, target).get_global_vars()}
    assert STACK_BATCH not in names
    assert not any("cuda_graph" in name for name in names)


def test_other_devices_have_no_graphs(folder: Path) -> None:
    assert planned(folder, "O3", "cpu").script() == planned(folder, "O2", "cpu").script()


def test_batched_decoding_runs_its_own_stack(folder: Path) -> None:
    mod = planned(folder, "O3")
    assert STACK_BATCH in steps(mod, "batch_decode_any_rows")
    assert STACK in steps(mod, "prefill_any_rows")
    assert STACK in steps(mod, "batch_verify_any_rows")


def test_no_function_keeps_something_in_the_shared_storages_while_it_calls_a_stack(
    folder: Path,
) -> None:
    """All functions share them, so that a stack may write over what its caller has there."""
    mod = planned(folder, "O3")
    callers = 0
    for gv, func in mod.functions_items():
        if not isinstance(func, relax.Function) or gv.name_hint in STACKS:
            continue
        calls = [b.value for block in func.body.blocks for b in block.bindings]
        calls = [call for call in calls if isinstance(call, relax.Call)]
        stacks = [i for i, c in enumerate(calls) if getattr(c.op, "name_hint", "") in STACKS]
        if stacks:
            callers += 1
            kept = "relax.memory.alloc_tensor"
            assert not any(getattr(c.op, "name", "") == kept for c in calls[: stacks[-1]]), gv
    assert callers >= 10


def test_storages_that_are_kept_are_in_the_plan_once(folder: Path) -> None:
    inputs = read_inputs(folder, "cuda", max_batch_size=BATCH)
    bounds = upper_bounds(inputs.config)
    plain, graphs = (memory.static_workspace(planned(folder, opt), bounds) for opt in ("O2", "O3"))
    kept = graphs["cuda_graph_alloc"]
    assert kept > 0
    for name in memory.PLANNED:
        assert graphs[name] >= kept, name
    most = [max(usage[name] for name in memory.PLANNED) for usage in (plain, graphs)]
    assert abs(most[1] - most[0]) <= 0.05 * most[0]
    estimate = memory.estimate_plan(
        inputs.model, inputs.scheme, inputs.config, get_target("cuda")[0]
    )
    assert abs(estimate.workspace - most[1]) <= 0.05 * most[1]
