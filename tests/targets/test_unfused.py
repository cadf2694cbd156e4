"""Layers of packed weights by TVM's generic rules alone, which is what remains where a target has
no kernel: against numpy in float64, on the CPU and on every device of `gpu_library`."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import tvm
from gpu_library import Device, loaded
from linear_reference import random_weight, tolerance
from tvm import relax
from tvm.relax.frontend.nn import Tensor, op

from mlc_compile.models.params import ParamSpec
from mlc_compile.quantization.linear import SchemeLayers, dequantize
from mlc_compile.quantization.overrides import Override
from mlc_compile.quantization.policy import stored_params
from mlc_compile.quantization.scheme import SCHEMES, QuantScheme, get_scheme, numpy_dtype
from mlc_compile.targets.cpu_kernels import fallback as cpu_fallback
from mlc_compile.targets.gpu_kernels import fallback as gpu_fallback
from mlc_compile.targets.kernels import LinearSpec

N, K = 21, 202  # no number of groups, words or lanes
EXPERTS, PER_TOKEN = 3, 2
KINDS = ("q3f16_1", "q4f16_0", "q8f32_pc", "q4f16_awq", "e4m3f16_1", "e4m3f32_1")
"""One of each way in which a number comes from a word."""
ON_CPU = (*KINDS, "q8f16_pc", "e4m3bf16_1", "q4bf16_0")


def _function(builder: relax.BlockBuilder, name: str) -> None:
    """`name`: (x, ids, experts, stored...) -> weight, x W^T, rows `ids` of it, and the products
    with the experts that it holds below each other."""
    scheme = SCHEMES[name]
    dtype, n = scheme.model_dtype, tvm.tirx.Var("n", "int64")
    spec = ParamSpec("w.weight", (EXPERTS * N, K), "linear", ())
    inputs = [("x", [n, K], dtype), ("ids", [n], "int32"), ("experts", [n, PER_TOKEN], "int32")]
    inputs += [(s.name, list(s.shape), s.dtype) for s in stored_params(spec, scheme)]
    args = [relax.Var(name, relax.TensorType(s, d)) for name, s, d in inputs]
    x, ids, experts, *stored = (Tensor(_expr=arg) for arg in args)
    with builder.function(name, args):
        with builder.dataflow():
            weight = dequantize(stored, spec.shape, scheme, scheme.layout)
            parts = [
                weight,
                op.matmul(x, op.permute_dims(weight, [1, 0]), out_dtype="float32"),
                op.take(weight, ids, axis=0),
            ]
            if scheme.layout == "NK":
                layer = SchemeLayers(scheme).experts(
                    ParamSpec("e.weight", (EXPERTS, N, K), "expert", ())
                )
                for (_, parameter), tensor in zip(layer.named_parameters(), stored, strict=True):
                    shape = [EXPERTS, N, int(tensor.shape[-1])]
                    parameter._expr = op.reshape(tensor, shape)._expr
                parts.append(layer(x, experts))
            out = builder.emit_output(relax.Tuple([part._expr for part in parts]))
        builder.emit_func_output(out)


def _machine(names: tuple[str, ...], target: tvm.target.Target, device: Any, rules: Any) -> Any:
    builder = relax.BlockBuilder()
    for name in names:
        _function(builder, name)
    with target:
        mod = rules.schedule_loops(relax.transform.LegalizeOps()(builder.get()))
    return relax.VirtualMachine(loaded(relax.build(mod, target)), device)


def _check(machine: Any, tensor: Any, name: str, *, rounds_to_nearest: bool = True) -> None:
    scheme = SCHEMES[name]
    dtype, rng = numpy_dtype(scheme.model_dtype), np.random.default_rng(len(name))
    *stored, exact = random_weight(EXPERTS * N, K, scheme, rng)
    x = (rng.standard_normal((5, K)) + 1).astype(dtype)
    ids = rng.integers(0, EXPERTS * N, 5).astype(np.int32)
    chosen = rng.integers(0, EXPERTS, (5, PER_TOKEN)).astype(np.int32)
    found = machine[name](*(tensor(a) for a in (x, ids, chosen, *stored)))
    weight, product, rows, *by_expert = (np.asarray(part.numpy(), np.float64) for part in found)
    rounded = exact.astype(np.float32).astype(dtype).astype(np.float64)
    if rounds_to_nearest:  # of the exact product, once
        np.testing.assert_array_equal(weight, rounded)
    else:  # WGSL may round to float16 either way
        np.testing.assert_allclose(weight, rounded, rtol=2**-10, atol=2**-24)
    np.testing.assert_array_equal(rows, weight[ids])
    wide, spec = x.astype(np.float64), LinearSpec(K, N, scheme, scheme.model_dtype, "float32")
    bound = tolerance(spec) * (np.abs(wide) @ np.abs(weight.T))
    assert (np.abs(product - wide @ weight.T) <= bound).all()
    for given in by_expert:
        of = exact.reshape(EXPERTS, N, K)[chosen.reshape(-1)]
        pairs = np.repeat(wide, PER_TOKEN, axis=0)
        error = np.abs(given - np.einsum("pk,pnk->pn", pairs, of))
        bound = np.einsum("pk,pnk->pn", np.abs(pairs), np.abs(of))
        # The weight is rounded to the model dtype here, then the output.
        spec = dataclasses.replace(spec, out_dtype=scheme.model_dtype)
        assert (error <= 2 * tolerance(spec) * bound + 1e-6).all()


def test_on_the_cpu() -> None:
    target = tvm.target.Target({"kind": "llvm", "mcpu": "x86-64-v3"})
    machine = _machine(ON_CPU, target, tvm.cpu(), cpu_fallback)
    for name in ON_CPU:
        _check(machine, tvm.runtime.tensor, name)


def test_on_devices(device: Device) -> None:
    machine = _machine(KINDS, device.target, tvm.device(device.name, 0), gpu_fallback)
    for name in KINDS:
        nearest = device.name != "webgpu" or SCHEMES[name].model_dtype == "float32"
        _check(machine, device.tensor, name, rounds_to_nearest=nearest)


@pytest.mark.parametrize("name", [n for n, s in SCHEMES.items() if not s.is_plain])
def test_weights_of_these_tests_have_every_code_and_both_signs(name: str) -> None:
    scheme = dataclasses.replace(SCHEMES[name], layout="NK")
    words, scales, *zeros, exact = random_weight(75, 202, scheme, np.random.default_rng(0))
    places = range(0, scheme.elems_per_word * scheme.bits, scheme.bits)
    mask = (1 << scheme.bits) - 1
    codes = set(range(mask + 1))
    if scheme.codes == "e4m3":
        codes -= {0x7F, 0xFF}  # NaN
    assert set(np.concatenate([words.ravel() >> p & mask for p in places])) == codes
    assert (scales < 0).any() and (scales > 0).any() and (scales == 0).any()
    if zeros:
        assert len(set(np.concatenate([zeros[0].ravel() >> p & mask for p in places]))) == mask + 1
    assert np.isfinite(exact).all()


def test_layers_of_overrides() -> None:
    base = dataclasses.replace(
        get_scheme("q4f16_1"),
        overrides=(Override("layers.0.*", "q8f16_pc"), Override("*", "q4f16_awq")),
    )
    layers = SchemeLayers(base)

    def tensors(layer: Any) -> dict[str, tuple[int, ...]]:
        return {n: tuple(int(e) for e in p.shape) for n, p in layer.named_parameters()}

    def linear(name: str) -> dict[str, tuple[int, ...]]:
        spec = ParamSpec(f"model.layers.{name}.weight", (24, 202), "linear", ())
        return tensors(layers.linear(spec, bias=True))

    assert linear("0.q") == {"q_weight": (24, 51), "q_scale": (24, 1), "bias": (24,)}
    assert linear("1.q") == {
        "q_weight": (24, 32),
        "q_scale": (24, 2),
        "q_zero": (24, 1),
        "bias": (24,),
    }
    # q4f16_awq packs no embedding.
    table = layers.embedding(ParamSpec("model.embed_tokens.weight", (24, 202), "embedding", ()))
    assert tensors(table) == {"weight": (24, 202)}


def test_a_scheme_keeps_its_own_row_length() -> None:
    """Of one scheme, weights of different K have groups of different sizes."""
    scheme: QuantScheme = SCHEMES["q8f16_pc"]
    sizes = [LinearSpec(k, 8, scheme, "float16", "float16").scheme for k in (64, 202)]
    assert [s.group_size for s in sizes if s] == [64, 204]
