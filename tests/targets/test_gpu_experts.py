"""The GPU kernels of sparse experts against numpy in float64, run by each device of
`gpu_library`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import tvm
from expert_reference import ROUTES, ExpertCase, expert_spec
from gpu_library import Device, build, check_limits, loaded
from tvm import relax
from tvm.relax.frontend.nn import Tensor

from mlc_compile.nn.moe import route
from mlc_compile.quantization.scheme import SCHEMES
from mlc_compile.targets.gpu_kernels._gemm import GemmConfig
from mlc_compile.targets.gpu_kernels.device import WEBGPU
from mlc_compile.targets.gpu_kernels.experts import expert_kernel
from mlc_compile.targets.gpu_kernels.fallback import schedule_loops
from mlc_compile.targets.kernels import ExpertLinearSpec

# WGSL has no bfloat16.
NAMES = [name for name, scheme in SCHEMES.items() if scheme.model_dtype != "bfloat16"]
EVERY = [n for n in NAMES if SCHEMES[n].kind in ("plain", "symmetric")] + [
    pytest.param(n, marks=pytest.mark.slow) for n in ("q8f32_pc", "q4f16_awq", "e4m3f16_1")
]
# Software adapters compile a product with few sums in a thread much faster than the chosen one.
QUICK = GemmConfig(32, 32, 32, 4, 4)
# One token; with 5 experts and 2 of them each: pair by pair up to 5 tokens, sorted by expert above.
ROWS = {1: (1,), None: (1, 2, 5, 6, 7, 64)}


def check(
    device: Device,
    spec: ExpertLinearSpec,
    counts: Sequence[int],
    routes: tuple[str, ...] = ("random",),
    gemm: GemmConfig | None = QUICK,
) -> None:
    """Build the kernel of `spec` and compare with numpy for each number of rows and each kind of
    routes."""
    built = build(device, {"experts": expert_kernel(spec, device=device.limits, gemm=gemm)})
    check_limits(device, built)
    run = loaded(built)["experts"]
    case = ExpertCase.random(spec)
    for count in counts:
        for kind in routes:
            inputs = case.inputs(count, kind)
            out = device.tensor(case.poisoned(count))
            _, size, dtype = spec.workspace(count)
            table = [device.tensor(np.full(size, 1 << 30, dtype))] if spec.rows is None else []
            with device.strict():
                run(*(device.tensor(a) for a in inputs), out, *table)
            case.check(inputs[0], inputs[1], out.numpy(), count, kind, gemm)


@pytest.mark.emulated(name="q4f16_1")
@pytest.mark.emulated(name="q3f16_1")
@pytest.mark.emulated(name="q0f16")
@pytest.mark.parametrize("rows", [1, None])
@pytest.mark.parametrize("name", EVERY)
def test_every_scheme(device: Device, name: str, rows: int | None) -> None:
    # N and K that no tile and no vector divides, K not a whole number of groups either.
    spec = expert_spec(name, 5, 2, 75, 202, out_dtype="float32", rows=rows)
    check(device, spec, ROWS[rows])


@pytest.mark.emulated(name="q4f16_1", shared_x=True)
@pytest.mark.parametrize("shared_x", [True, False])
@pytest.mark.parametrize("name", ["q4f16_1", "q3f16_1", "q0f16"])
def test_routes(device: Device, name: str, shared_x: bool) -> None:
    spec = expert_spec(name, 5, 2, 48, 96, shared_x=shared_x)
    check(device, spec, (1, 7, 64), ROUTES)


@pytest.mark.emulated(experts=130)
@pytest.mark.parametrize("rows", [1, None])
@pytest.mark.parametrize(
    ("name", "experts", "per_token", "n", "k"),
    [
        ("q4f16_1", 1, 1, 1, 64),
        ("q4f16_1", 3, 1, 3, 7),
        ("q4f16_1", 2, 2, 5, 1000),
        ("q4f16_1", 130, 8, 20, 64),
        ("q0f32", 3, 2, 3, 7),
        ("q0f32", 4, 3, 49, 150),
    ],
)
def test_odd_shapes(
    device: Device, name: str, experts: int, per_token: int, n: int, k: int, rows: int | None
) -> None:
    spec = expert_spec(name, experts, per_token, n, k, rows=rows)
    check(device, spec, (1,) if rows else (1, 9, 40), ("random", "one"))


@pytest.mark.emulated(name="q4f16_1")
@pytest.mark.parametrize("name", ["q4f16_1", "q3f16_1"])
def test_chosen_product_of_many_rows(device: Device, name: str) -> None:
    check(device, expert_spec(name, 4, 2, 136, 120), (64, 129, 300), ("random", "two"), gemm=None)


@pytest.mark.emulated(name="q4f16_1")
@pytest.mark.parametrize("name", ["q4f16_1", "q0f32"])
def test_a_smaller_device(device: Device, name: str) -> None:
    small = device.smaller(max_threads=64, shared_bytes=8 << 10)
    check(small, expert_spec(name, 5, 2, 75, 200), (1, 7, 64), gemm=None)
    check(small, expert_spec(name, 5, 2, 75, 200, rows=1), (1,))


@pytest.mark.emulated
def test_routing_lowers_without_kernels(device: Device) -> None:
    """The loop nests of nn/moe.py by TVM's generic rules."""
    count, k, n = 9, 3, tvm.tirx.Var("n", "int64")
    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType([n, count], "float32"))
    with builder.function("main", [x]):
        with builder.dataflow():
            parts = route(Tensor(_expr=x), k, score="softmax", renormalize=False, scale=2.0)
            out = builder.emit_output(relax.Tuple([part._expr for part in parts]))
        builder.emit_func_output(out)
    with device.target:
        mod = schedule_loops(relax.transform.LegalizeOps()(builder.get()))
    machine = relax.VirtualMachine(
        loaded(relax.build(mod, device.target)), tvm.device(device.name, 0)
    )
    rng = np.random.default_rng(0)
    for rows in (1, 70):
        logits = rng.standard_normal((rows, count)).astype(np.float32)
        weights, experts = (part.numpy() for part in machine["main"](device.tensor(logits)))
        order = np.argsort(-logits, axis=1, kind="stable")[:, :k]
        np.testing.assert_array_equal(experts, order)
        wide = np.exp(logits.astype(np.float64))
        wide = 2 * wide / wide.sum(axis=1, keepdims=True)
        np.testing.assert_allclose(weights, np.take_along_axis(wide, order, axis=1), rtol=1e-5)


@pytest.mark.parametrize("name", [n for n in SCHEMES if n not in NAMES])
def test_no_kernel_for_bfloat16(name: str) -> None:
    assert expert_kernel(expert_spec(name, 4, 2, 64, 64), device=WEBGPU) is None


def test_no_kernel_beyond_32_bits() -> None:
    spec: dict[str, Any] = {"experts": 256, "per_token": 8, "n": 4096, "k": 4096}
    assert expert_kernel(expert_spec("q0f16", **spec), device=WEBGPU) is None
    assert expert_kernel(expert_spec("q4f16_1", **spec), device=WEBGPU) is not None
