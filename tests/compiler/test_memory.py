"""The planner: the estimate against the compiler's static plan, and the budget."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from compiler_configs import read_inputs

from mlc_compile.compiler import memory
from mlc_compile.compiler.inputs import CompileInputs
from mlc_compile.config import read_json_strict, resolve_compile_config
from mlc_compile.errors import InputError
from mlc_compile.models import load_model
from mlc_compile.models.registry import ARCHITECTURES
from mlc_compile.quantization.policy import stored_params, with_overrides
from mlc_compile.quantization.scheme import SCHEMES
from mlc_compile.targets.profile import TARGETS, get_target

MakeConfig = Callable[..., Path]
CONFIGS = Path(__file__).parent.parent / "configs"

SHAPES = {
    "as it is": {},
    "wide": {"intermediate_size": 512},
    "narrow": {"intermediate_size": 32, "num_hidden_layers": 3},
    "large vocabulary": {"vocab_size": 4096},
}


def static_workspace(folder: Path, target_name: str) -> tuple[int, int]:
    """(the compiler's planned bytes, the estimate) without generating code."""
    return planned_and_estimated(read_inputs(folder, target_name), target_name)


def planned_and_estimated(inputs: CompileInputs, target_name: str) -> tuple[int, int]:
    """The same of inputs that are read already."""
    from mlc_compile.compiler.opt import parse_opt
    from mlc_compile.compiler.passes.bounds import upper_bounds
    from mlc_compile.compiler.pipeline import PhaseRunner, graph_phases
    from mlc_compile.nn.export import export_decoder
    from mlc_compile.quantization.linear import SchemeLayers
    from mlc_compile.targets.parsing import fast_parsing

    profile, _ = get_target(target_name)
    backend = profile.backend()
    target = backend.tvm_target(None, profile.suffixes[0])
    params = [s for spec in inputs.model.parameters() for s in stored_params(spec, inputs.scheme)]
    with fast_parsing():
        module = export_decoder(
            inputs.model,
            SchemeLayers(inputs.scheme),
            params,
            inputs.config,
            backend.kv_cache_kernels(target),
        )
        phases = graph_phases(target, backend, inputs.config, parse_opt("O2"))
        module = PhaseRunner(target, None).run(module, phases)
    usage = memory.static_workspace(module, upper_bounds(inputs.config))
    estimate = memory.estimate_plan(inputs.model, inputs.scheme, inputs.config, profile)
    return max(usage[name] for name in memory.PLANNED), estimate.workspace


@pytest.mark.parametrize(
    ("model_type", "shape"), [*(("llama", shape) for shape in SHAPES), ("qwen3", "as it is")]
)
def test_estimate_agrees_with_the_static_plan(
    config_dir: MakeConfig, model_type: str, shape: str, target_name: str
) -> None:
    planned, estimated = static_workspace(config_dir(model_type, **SHAPES[shape]), target_name)
    assert abs(estimated - planned) <= 0.05 * planned, (planned, estimated)


# One of each mechanism; .ci/run does all structures.
QUICK = ("gemma2", "gpt2", "cohere", "qwen2_moe")


def published() -> dict[str, Path]:
    """A published configuration of each architecture."""
    found: dict[str, Path] = {}
    for path in sorted(CONFIGS.glob("*.json")):
        if ".refused" not in path.name:
            found.setdefault(load_model(read_json_strict(path), where=path.name).arch.name, path)
    assert set(found) == set(ARCHITECTURES)
    return found


def each_structure() -> dict[str, Path]:
    """Those of QUICK, and of the others one of each kind of layer: biases take no workspace."""
    found = published()
    chosen: dict[object, str] = {}
    for name in (*QUICK, *found):
        model = load_model(read_json_strict(found[name]), where=name)
        arch = model.arch
        parts = (arch.attention, arch.mlp, arch.norm, arch.positions)
        chosen.setdefault((*map(type, parts), arch.block, arch.embed_norm), name)
    return {name: found[name] for name in chosen.values()}


@pytest.mark.parametrize(
    ("name", "path"),
    [
        pytest.param(*item, marks=[] if item[0] in QUICK else pytest.mark.slow, id=item[0])
        for item in each_structure().items()
    ],
)
def test_estimate_agrees_for_every_structure(name: str, path: Path) -> None:
    """Full widths; the workspace does not grow with layers beyond the third."""
    model = load_model(read_json_strict(path), where=path.name)
    layers = min(model.config.num_hidden_layers, 3)
    config = replace(model.config, num_hidden_layers=layers, layers=model.config.layers[:layers])
    inputs = CompileInputs(
        replace(model, config=config),
        SCHEMES["q4f16_1"],
        resolve_compile_config(config),
        config.vocab_size,
    )
    planned, estimated = planned_and_estimated(inputs, "cpu")
    assert abs(estimated - planned) <= 0.05 * planned, (planned, estimated)


@pytest.mark.parametrize("quantization", ["q0f32", "q0bf16", "q3f16_1"])
def test_estimate_agrees_for_other_dtypes(config_dir: MakeConfig, quantization: str) -> None:
    planned, estimated = static_workspace(config_dir(quantization=quantization), "cpu")
    assert abs(estimated - planned) <= 0.05 * planned, (planned, estimated)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("quantization", "target"),
    [("q8f16_pc", "cpu"), ("e4m3f32_1", "webgpu"), ("q4f16_awq", "cuda")],
)
def test_estimate_agrees_for_other_kinds_of_codes(
    config_dir: MakeConfig, quantization: str, target: str
) -> None:
    planned, estimated = static_workspace(config_dir(quantization=quantization), target)
    assert abs(estimated - planned) <= 0.05 * planned, (planned, estimated)


def test_estimate_agrees_for_schemes_mixed_in_one_model(config_dir: MakeConfig) -> None:
    folder = config_dir(tie_word_embeddings=False)
    inputs = read_inputs(folder, "webgpu")
    mixed = "lm_head=q8f16_pc,embed_tokens=e4m3f16_1,layers.0.*=q4f16_awq,layers.1.mlp.*=q0f16"
    scheme = with_overrides(inputs.scheme, mixed, inputs.model)
    planned, estimated = planned_and_estimated(replace(inputs, scheme=scheme), "webgpu")
    assert planned_and_estimated(inputs, "webgpu") == (planned, estimated)
    assert abs(estimated - planned) <= 0.05 * planned, (planned, estimated)


@pytest.mark.parametrize("name", SCHEMES)
def test_weights_are_the_stored_bytes(config_dir: MakeConfig, name: str) -> None:
    inputs = read_inputs(config_dir(quantization=name))
    stored = [s for spec in inputs.model.parameters() for s in stored_params(spec, inputs.scheme)]
    assert memory.weight_bytes(inputs.model, inputs.scheme) == sum(s.nbytes for s in stored)


def test_kv_cache_of_known_numbers(config_dir: MakeConfig) -> None:
    inputs = read_inputs(config_dir(quantization="q0f16"))
    # 2 sequences x 128 tokens = 16 pages and one spare; 2 layers x (k, v) x 2 heads x 16 x 16 x 2 B
    pages = 17 * 2 * 2 * 2 * 16 * 16 * 2
    chunk = 32 * (2 * 4 * 16 * 2 + 2 * 2 * 16 * 2 + 2 * 4 * 4)
    assert memory.kv_cache_bytes(inputs.model, "float16", inputs.config) == pages + chunk


def test_sliding_window_bounds_the_cache(config_dir: MakeConfig) -> None:
    folder = config_dir("mistral", sliding_window=32)
    full = read_inputs(folder, context_window_size=32)
    slid = read_inputs(folder, sliding_window_size=32)
    assert slid.config.context_window_size == -1
    # window + chunk - 1 tokens and two partly used pages for each sequence
    assert memory.kv_cache_pages(slid.config) == -(-2 * (32 + 32 - 1) // 16) + 1 + 2 * 2
    assert memory.kv_cache_pages(full.config) == 2 * 32 // 16 + 1


@pytest.mark.parametrize("target", TARGETS)
def test_budget_is_kept_to_the_byte(config_dir: MakeConfig, target: str) -> None:
    inputs = read_inputs(config_dir())
    profile, _ = get_target(target)
    plan = memory.estimate_plan(inputs.model, inputs.scheme, inputs.config, profile)
    memory.check_budget(plan, plan.total)
    memory.check_budget(plan, None)
    with pytest.raises(InputError, match=r"the plan needs .* and the budget is .*weights"):
        memory.check_budget(plan, plan.total - 1)


def test_the_largest_buffer_is_named_and_limited(config_dir: MakeConfig) -> None:
    inputs = read_inputs(config_dir(vocab_size=3200), "webgpu", context_window_size=16)
    found = memory.largest_binding(inputs.model, inputs.scheme, inputs.config)
    assert found == ("the parameter model.embed_tokens.q_weight", 3200 * 64 // 8 * 4)
    memory.check_binding(found, found[1], "webgpu")
    memory.check_binding(found, None, "cpu")
    with pytest.raises(InputError, match=r"embed_tokens.* takes 100\.0 KiB.* at most 100\.0 KiB"):
        memory.check_binding(found, found[1] - 1, "webgpu")


def test_a_long_context_makes_the_cache_the_largest_buffer(config_dir: MakeConfig) -> None:
    folder = config_dir(quantization="q0f16", max_position_embeddings=1 << 16)
    inputs = read_inputs(folder, "webgpu", context_window_size=1 << 16)
    what, nbytes = memory.largest_binding(inputs.model, inputs.scheme, inputs.config)
    assert what == "one layer of the KV cache"
    assert nbytes == ((1 << 16) // 16 + 1) * 2 * 2 * 16 * 16 * 2


def test_a_target_imposes_sizes_that_overrides_can_lift(config_dir: MakeConfig) -> None:
    folder = config_dir()
    assert read_inputs(folder).config.max_batch_size == 2
    assert read_inputs(folder, "webgpu").config.max_batch_size == 1
    assert read_inputs(folder, "webgpu", max_batch_size=3).config.max_batch_size == 3


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (3 << 30, "3.0 GiB")]
)
def test_bytes_for_people(count: int, text: str) -> None:
    assert memory.format_bytes(count) == text
