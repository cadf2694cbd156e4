"""Activations and the cap of logits against numpy in float64, as each target compiles them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import tvm
from tvm import relax
from tvm.relax.frontend.nn import Tensor, op

from mlc_compile.nn.activations import ACTIVATIONS, soft_cap
from mlc_compile.runtime import metal_emulator
from mlc_compile.targets.profile import get_target

Array = np.ndarray[Any, Any]

DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
CASES = [(device, dtype) for device in ("cpu", "webgpu", "metal") for dtype in list(DTYPES)[:2]]
CASES.append(("cpu", "bfloat16"))
WIDTH = 64
CAP = 30.0
GATE_TANH = 2 * math.sqrt(2 / math.pi)


def gate(x: Array, slope: Array) -> Array:
    """x sigmoid(slope)"""
    value: Array = x * np.exp(np.minimum(slope, 0)) / (1 + np.exp(-np.abs(slope)))
    return value


def gelu(x: Array) -> Array:
    value: Array = x / 2 * np.vectorize(math.erfc)(-x / math.sqrt(2))
    return value


def gelu_tanh(x: Array) -> Array:
    return gate(x, GATE_TANH * (x + 0.044715 * x**3))


REFERENCES: dict[str, Callable[[Array], Array]] = {
    "silu": lambda x: gate(x, x),
    "swish": lambda x: gate(x, x),
    "gelu": gelu,
    "gelu_new": gelu_tanh,
    "gelu_fast": gelu_tanh,
    "gelu_pytorch_tanh": gelu_tanh,
    "quick_gelu": lambda x: gate(x, 1.702 * x),
    "relu": lambda x: np.maximum(x, 0),
    "relu2": lambda x: np.maximum(x, 0) ** 2,
    "soft_cap": lambda x: CAP * np.tanh(x / CAP),
}
FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    **ACTIVATIONS,
    "soft_cap": lambda x: soft_cap(x, CAP),
}
FUSION = [
    relax.transform.LegalizeOps(),
    relax.transform.AnnotateTIROpPattern(),
    relax.transform.FoldConstant(),
    relax.transform.FuseOps(),
    relax.transform.FuseTIR(),
    relax.transform.DeadCodeElimination(),
]
IN_THE_DTYPE = ("silu", "swish")
"""Relax's own, which round in between unless they are fused with what they gate."""


def inputs(dtype: str) -> Array:
    """[n, WIDTH]: where the functions bend, far out, next to 0, and the zeros."""
    rng = np.random.default_rng(0)
    tiny = 10 ** rng.uniform(-6, 4, 1000)
    far = rng.uniform(-1e4, 1e4, 2000)
    parts: list[Any] = [np.linspace(-12, 12, 8000), far, tiny, -tiny, [0.0, -0.0, 1e4, -1e4]]
    x = np.concatenate(parts)
    return np.resize(x, (-(-len(x) // WIDTH), WIDTH)).astype(DTYPES[dtype])


def module(dtype: str) -> tvm.IRModule:
    """Every function of x / 2, so that there is something to fuse."""
    builder = relax.BlockBuilder()
    for name, function in FUNCTIONS.items():
        n = tvm.tirx.Var("n", "int64")
        x = relax.Var("x", relax.TensorType((n, WIDTH), dtype))
        with builder.function(name, [x]):
            with builder.dataflow():
                half = op.multiply(Tensor(_expr=x), Tensor.from_scalar(0.5, dtype))
                out = builder.emit_output(function(half)._expr)
            builder.emit_func_output(out)
    return builder.get()


@dataclass(frozen=True)
class Compiled:
    dtype: str
    device: tvm.runtime.Device
    machine: relax.VirtualMachine

    def __call__(self, name: str, x: Array) -> Array:
        got: Array = self.machine[name](tvm.runtime.tensor(x, self.device)).numpy()
        return got


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def compiled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    """The functions, compiled for a target as a model's are."""
    name, dtype = request.param
    if name == "webgpu":
        request.getfixturevalue("webgpu")
    elif name == "metal":
        metal_emulator.install()
    backend = get_target({"metal": "macos"}.get(name, name))[0].backend()
    target = backend.tvm_target(None, ".so")
    with target, tvm.transform.PassContext(opt_level=3):
        mod = tvm.tirx.transform.BindTarget(target)(module(dtype))
        # TVM's own pipeline, which follows, takes no function that chooses between two loop nests;
        # for cpu these have a test of their own (tests/targets/test_cpu_fallback.py)
        for step in (*FUSION, *([] if name == "cpu" else [backend.schedule])):
            mod = step(mod)
        built = relax.build(mod, target)
    path: Path = tmp_path_factory.mktemp(name) / "library.so"
    built.export_library(str(path))
    device = tvm.device(name, 0)
    machine = relax.VirtualMachine(tvm.runtime.load_module(str(path)), device)
    return Compiled(dtype, device, machine)


@pytest.fixture(scope="module", autouse=True)
def quiet() -> Iterator[None]:
    with np.errstate(over="ignore", under="ignore"):
        yield


@pytest.mark.parametrize("name", FUNCTIONS)
def test_against_float64(compiled: Compiled, name: str) -> None:
    dtype = compiled.dtype
    x = inputs(dtype)
    got = compiled(name, x * DTYPES[dtype](2)).astype(np.float64)
    want = REFERENCES[name](x.astype(np.float64))
    kind: Any = ml_dtypes.finfo(DTYPES[dtype])  # type: ignore[no-untyped-call]
    fits = np.abs(want) < float(kind.max)
    assert np.isfinite(got[fits]).all() and (got[~fits] == np.inf).all()
    error, size = np.abs(got - want)[fits], np.abs(want)[fits]
    if dtype == "float32":
        assert (error <= 3e-7 * np.maximum(size, 1)).all()
        # The tails keep their digits: there an exponent's last digit is 1e-6.
        assert (error <= 2e-6 * size)[size > 1e-3].all()
    else:
        # Rounded once; near 0 to whole denormals, and no power of 2 is below 2^-126 or above 2^126.
        slack, floor = 0.51, max(float(kind.smallest_subnormal), 1e4 * 2.0**-126)
        if name in IN_THE_DTYPE:
            slack, floor = 8, 2e-4  # exp(12) is infinite in float16, and x / (1 + exp(-x)) 0
        assert (error <= slack * float(kind.eps) * size + floor).all()


def test_every_name_is_tested() -> None:
    assert REFERENCES.keys() == FUNCTIONS.keys()
