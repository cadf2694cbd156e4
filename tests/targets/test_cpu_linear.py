"""The CPU matmul and embedding kernels against numpy in float64."""

from __future__ import annotations

import dataclasses
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
import tvm
from linear_reference import LinearCase, linear_spec, random_weight
from tvm import relax

from mlc_compile.quantization.scheme import SCHEMES, numpy_dtype
from mlc_compile.targets.cpu_kernels._packed import fields, raw_fields
from mlc_compile.targets.cpu_kernels.embedding import embedding_kernel
from mlc_compile.targets.cpu_kernels.linear import linear_kernel
from mlc_compile.targets.kernels import EmbeddingSpec, LinearSpec

# Of the dtypes of the newer kinds of codes one each; .ci/run does all of them.
LATE = ("q8f16_pc", "e4m3bf16_1", "e4m3f32_1")
EVERY = [pytest.param(n, marks=pytest.mark.slow) if n in LATE else n for n in SCHEMES]


@lru_cache
def host_target() -> tvm.target.Target:
    return tvm.target.Target(
        {"kind": "llvm", "mcpu": tvm.target.codegen.llvm_get_system_cpu(), "num-cores": 2}
    )


def compiled(func: tvm.tirx.PrimFunc, target: tvm.target.Target | None = None) -> Any:
    module = tvm.IRModule({"main": func.with_attr("global_symbol", "main")})
    return tvm.compile(module, target or host_target())


def check(spec: LinearSpec, *, rows: tuple[int, ...], vector_bits: int, num_cores: int = 2) -> None:
    """Compile `spec` and compare with numpy for each number of rows."""
    case = LinearCase.random(spec)
    func = linear_kernel(spec, vector_bits=vector_bits, num_cores=num_cores)
    kernel = compiled(func).jit()["main"]
    for count in rows:
        arguments = case.inputs(count)
        out = tvm.runtime.tensor(case.poisoned(count))
        kernel(*(tvm.runtime.tensor(a) for a in arguments), out)
        case.check(arguments[0], out.numpy(), count)


# One row, and more rows than one panel with each kind of remainder (8 a panel at 512 bits).
ROWS = {1: (1,), None: (1, 2, 3, 5, 8, 20, 29)}


@pytest.mark.parametrize("rows", [1, None])
@pytest.mark.parametrize("name", EVERY)
def test_every_scheme(name: str, rows: int | None) -> None:
    # N and K that no vector divides, K not a whole number of groups either.
    spec = linear_spec(name, 75, 200, out_dtype="float32", has_bias=True, rows=rows)
    check(spec, rows=ROWS[rows], vector_bits=512)


@pytest.mark.parametrize("rows", [1, None])
@pytest.mark.parametrize("vector_bits", [128, 256])
@pytest.mark.parametrize("name", ["q4f16_1", "q3f16_1", "q4f16_0", "q0f16"])
def test_narrow_vectors(name: str, vector_bits: int, rows: int | None) -> None:
    check(linear_spec(name, 64, 168, rows=rows), rows=ROWS[rows], vector_bits=vector_bits)


@pytest.mark.parametrize("rows", [1, None])
@pytest.mark.parametrize(
    ("name", "n", "k"),
    [
        ("q4f16_1", 1, 64),
        ("q4f16_1", 3, 7),
        ("q4f16_1", 5, 1000),
        ("q4f16_1", 192, 576),
        ("q0f32", 3, 7),
        ("q0f32", 49, 150),
    ],
)
def test_odd_shapes(name: str, n: int, k: int, rows: int | None) -> None:
    check(linear_spec(name, n, k, rows=rows), rows=(1,) if rows else (1, 9), vector_bits=512)


@pytest.mark.parametrize("out_dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("x_dtype", ["float32", "float16", "bfloat16"])
def test_activation_and_output_dtypes(x_dtype: str, out_dtype: str) -> None:
    spec = linear_spec("q4f16_1", 20, 96, x_dtype=x_dtype, out_dtype=out_dtype)
    check(spec, rows=(3,), vector_bits=256)
    check(dataclasses.replace(spec, rows=1), rows=(1,), vector_bits=256)


def test_group_wider_than_a_vector() -> None:
    scheme = dataclasses.replace(SCHEMES["q4f16_1"], group_size=128)
    spec = LinearSpec(384, 24, scheme, "float16", "float32")
    check(spec, rows=(4,), vector_bits=256)
    check(dataclasses.replace(spec, rows=1), rows=(1,), vector_bits=256)


def test_many_cores_split_the_rows_too() -> None:
    check(linear_spec("q4f32_1", 96, 64), rows=(1, 9, 40, 70), vector_bits=512, num_cores=16)


def test_relax_call_tir_with_symbolic_rows() -> None:
    spec = linear_spec("q0f32", 12, 24)
    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType((tvm.tirx.Var("n", "int64"), 24), "float32"))
    w = relax.Var("w", relax.TensorType((12, 24), "float32"))
    kernel = builder.add_func(linear_kernel(spec, vector_bits=256, num_cores=2), "linear")
    with builder.function("main", [x, w]):
        out = relax.TensorType((x.ty.shape[0], 12), "float32")
        builder.emit_func_output(builder.emit(relax.call_tir(kernel, [x, w], out)))
    built = relax.build(builder.get(), host_target())
    machine = relax.VirtualMachine(built, tvm.cpu())
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal(shape).astype(np.float32) for shape in ((11, 24), (12, 24)))
    got = machine["main"](tvm.runtime.tensor(a), tvm.runtime.tensor(b)).numpy()
    np.testing.assert_allclose(got, a @ b.T, rtol=1e-5, atol=1e-5)


def test_bfloat16_output_rounds_to_even_and_keeps_nan() -> None:
    spec = LinearSpec(1, 1, None, "float32", "bfloat16", weight_dtype="float32")
    kernel = compiled(linear_kernel(spec, vector_bits=256, num_cores=2)).jit()["main"]
    bits = np.array([0x3F808000, 0x3F818000, 0x3F808001, 0x7FFFFFFF, 0x7F800000], np.uint32)
    x = bits.view(np.float32).reshape(-1, 1)
    out = tvm.runtime.tensor(np.zeros((5, 1), numpy_dtype("bfloat16")))
    kernel(tvm.runtime.tensor(x), tvm.runtime.tensor(np.ones((1, 1), np.float32)), out)
    got = out.numpy()[:, 0]
    assert got.view(np.uint16)[:3].tolist() == [0x3F80, 0x3F82, 0x3F81]
    assert np.isnan(got[3].astype(np.float32))
    assert np.isposinf(got[4].astype(np.float32))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_fields_cover_a_word_once(bits: int) -> None:
    for places, top in ((fields(bits), 23), (raw_fields(bits), 31)):
        assert [f.shift + f.position for f in places] == [bits * i for i in range(32 // bits)]
        assert all(f.position + bits <= top for f in places)


@pytest.mark.parametrize(
    "target",
    [
        {"kind": "llvm", "mtriple": "aarch64-linux-gnu"},
        {"kind": "llvm", "mtriple": "x86_64-linux-gnu"},
        {"kind": "llvm", "mtriple": "x86_64-linux-gnu", "mcpu": "haswell"},
    ],
    ids=["aarch64", "x86-64", "avx2"],
)
@pytest.mark.parametrize("rows", [1, None])
def test_other_targets_compile(target: dict[str, str], rows: int | None) -> None:
    bits = 256 if "mcpu" in target else 128
    func = linear_kernel(linear_spec("q4f16_1", 64, 96, rows=rows), vector_bits=bits, num_cores=4)
    assert "parallel" in compiled(func, tvm.target.Target(target)).mod.inspect_source("asm")


@pytest.mark.parametrize(
    "wrong",
    [
        {"scheme": None},
        {"weight_dtype": "float16"},
        {"scheme": SCHEMES["q0f16"]},
        {"rows": 2},
        {"x_dtype": "int8"},
    ],
    ids=lambda w: "-".join(w),
)
def test_wrong_specs_are_refused(wrong: dict[str, Any]) -> None:
    right: dict[str, Any] = {"scheme": SCHEMES["q4f16_1"], "x_dtype": "float16"}
    with pytest.raises(ValueError):
        LinearSpec(64, 64, **{**right, **wrong}, out_dtype="float16")


@pytest.mark.parametrize("hidden", [64, 83])
@pytest.mark.parametrize("name", EVERY)
def test_embedding(name: str, hidden: int) -> None:
    scheme, vocab = dataclasses.replace(SCHEMES[name], layout="NK"), 50
    dtype = scheme.model_dtype
    rng = np.random.default_rng(hidden)
    if scheme.is_plain:
        plain = rng.standard_normal((vocab, hidden)).astype(numpy_dtype(dtype))
        table, exact = [plain], plain.astype(np.float64)
    else:
        *table, exact = random_weight(vocab, hidden, scheme, rng)
    packed = None if scheme.is_plain else scheme
    for rows, counts in ((1, (1,)), (None, (1, 5, 700))):
        spec = EmbeddingSpec(vocab, hidden, packed, dtype, rows)
        kernel = compiled(embedding_kernel(spec, vector_bits=256)).jit()["main"]
        for count in counts:
            ids = rng.integers(0, vocab, count).astype(np.int32)
            out = tvm.runtime.tensor(np.zeros((count, hidden), numpy_dtype(dtype)))
            kernel(*(tvm.runtime.tensor(a) for a in (ids, *table)), out)
            # One rounding of the exact product: numpy's own cast, bit for bit.
            np.testing.assert_array_equal(
                out.numpy(), exact[ids].astype(np.float32).astype(numpy_dtype(dtype))
            )
