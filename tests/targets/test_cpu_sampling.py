"""The sampling helpers of the library ABI on the CPU, through a built and loaded library, against
numpy in float64."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tvm
from sampling_reference import (
    FIRST_CHILD,
    LOWEST,
    NEXT_SIBLING,
    inverse_cdf,
    nucleus,
    random_probs,
    reference_bitmask,
    reference_penalties,
    reference_softmax,
    reference_verify,
    sort,
)
from tvm import relax, tirx

from mlc_compile.nn.sampling import SAMPLING_FUNCTIONS, attach_sampling
from mlc_compile.targets.cpu_kernels import _vector as vec
from mlc_compile.targets.cpu_kernels import elementwise, sampling

# vocabulary -> active ids. 1 and 7 are all tail, 4099 has full vectors and a tail; the large ones
# are SmolLM2's and Qwen2.5's.
VOCABULARIES = {1: 1, 7: 5, 4099: 4001, 49152: 49152, 152064: 151669}
TARGET = tvm.target.Target({"kind": "llvm", "mcpu": "x86-64-v3"})


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], relax.VirtualMachine]:
    @functools.cache
    def build(vocab: int) -> relax.VirtualMachine:
        module = attach_sampling(
            tvm.IRModule(),
            sampling.kernel,
            vocab_size=vocab,
            active_vocab_size=VOCABULARIES[vocab],
        )
        path = tmp_path_factory.mktemp("lib") / f"sampling_{vocab}.so"
        relax.build(module, TARGET).export_library(str(path))
        return relax.VirtualMachine(tvm.runtime.load_module(str(path)), tvm.cpu())

    return build


@pytest.fixture(params=VOCABULARIES, ids=str)
def vocab(request: pytest.FixtureRequest) -> int:
    return int(request.param)


def call(vm: relax.VirtualMachine, name: str, *arrays: np.ndarray) -> list[np.ndarray]:
    """The results; for a function without any, its arguments after the call."""
    tensors = [tvm.runtime.tensor(a) for a in arrays]
    # The functions in place are PrimFuncs: they live in the module that the VM's imports.
    result = vm.module.get_function(name, query_imports=True)(*tensors)
    if result is None:
        return [t.numpy() for t in tensors]
    return [result.numpy()] if hasattr(result, "numpy") else [r.numpy() for r in result]


def test_every_function_of_the_abi_is_exported(library: Any) -> None:
    vm = library(7)
    for name in SAMPLING_FUNCTIONS:
        assert vm.module.implements_function(name, True), name


# --- softmax_with_temperature


def test_softmax(library: Any, vocab: int) -> None:
    rng = np.random.default_rng(1)
    logits = (rng.standard_normal((4, 1, vocab)) * 8).astype(np.float32)
    logits[:, :, VOCABULARIES[vocab] :] = 1e4  # padding must neither win nor count
    temperature = np.float32([1.0, 0.0, 0.7, 1.9])
    (out,) = call(library(vocab), "softmax_with_temperature", logits, temperature)
    expected = reference_softmax(logits, temperature, VOCABULARIES[vocab])
    np.testing.assert_allclose(out, expected, rtol=2e-5, atol=1e-37)
    np.testing.assert_array_equal(out[1], expected[1])


def test_softmax_of_one_row(library: Any) -> None:
    """A batch of one takes the branch without threads."""
    logits = np.random.default_rng(2).standard_normal((1, 1, 49152)).astype(np.float32)
    for temperature in (np.float32([0.5]), np.float32([1e-5])):
        (out,) = call(library(49152), "softmax_with_temperature", logits, temperature)
        np.testing.assert_allclose(
            out, reference_softmax(logits, temperature, 49152), rtol=1e-5, atol=1e-37
        )


def test_softmax_greedy_ties_go_to_the_first(library: Any) -> None:
    logits = np.full((1, 1, 4099), -2, np.float32)
    logits[0, 0, [17, 18, 3000, 4050]] = [5, 5, 5, 9]  # 4050 is padding
    (out,) = call(library(4099), "softmax_with_temperature", logits, np.float32([0]))
    np.testing.assert_array_equal(np.flatnonzero(out), [17])
    assert out[0, 0, 17] == 1


def test_softmax_after_a_bitmask_and_at_extremes(library: Any) -> None:
    """Masked logits (the lowest float32) get exactly 0, also where dividing overflows."""
    logits = np.full((3, 1, 7), LOWEST, np.float32)
    logits[0, 0, 2] = 30
    logits[1, 0, :5] = [1e30, 2e30, -np.inf, 0, 1]
    (out,) = call(library(7), "softmax_with_temperature", logits, np.float32([0.5, 0.1, 1]))
    np.testing.assert_array_equal(out[0, 0], np.eye(7, dtype=np.float32)[2])
    np.testing.assert_array_equal(out[1, 0], np.eye(7, dtype=np.float32)[1])
    np.testing.assert_allclose(out[2, 0], [0.2] * 5 + [0, 0], rtol=1e-6)


# --- functions in place


def test_logit_bias(library: Any, vocab: int) -> None:
    rng = np.random.default_rng(3)
    logits = rng.standard_normal((3, vocab)).astype(np.float32)
    n = 20  # with V = 1 or 7 the same token comes up several times: biases add up
    rows, tokens = rng.integers(0, 3, n, np.int32), rng.integers(0, vocab, n, np.int32)
    bias = rng.standard_normal(n).astype(np.float32)
    expected = logits.copy()
    np.add.at(expected, (rows, tokens), bias)
    out = call(library(vocab), "apply_logit_bias_inplace", logits, rows, tokens, bias)[0]
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-6)


def test_penalties(library: Any, vocab: int) -> None:
    rng = np.random.default_rng(4)
    logits = rng.standard_normal((4, vocab)).astype(np.float32)
    seq_ids = np.int32([3, 1])  # rows 0 and 2 belong to sequences without penalties
    penalties = np.float32([[0.5, 0.25, 1.3], [0, 0.1, 0.8]])
    per_sequence = min(vocab, 30)
    tokens = np.concatenate([rng.permutation(vocab)[:per_sequence] for _ in seq_ids])
    position = np.repeat(np.arange(2), per_sequence)
    count = rng.integers(1, 5, len(tokens))
    expected = reference_penalties(logits, seq_ids, position, tokens, count, penalties)
    arguments = [a.astype(np.int32) for a in (seq_ids, position, tokens, count)]
    out = call(library(vocab), "apply_penalty_inplace", logits, *arguments, penalties)[0]
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(out[[0, 2]], logits[[0, 2]])


def test_bitmask(library: Any, vocab: int) -> None:
    rng = np.random.default_rng(5)
    logits = rng.standard_normal((4, vocab)).astype(np.float32)
    words = (vocab + 31) // 32
    bitmask = rng.integers(-(2**31), 2**31, (4, words), np.int64).astype(np.int32)
    bitmask[2, ::2] = -1
    seq_ids = np.int32([2, 0, 3])
    expected = reference_bitmask(logits, seq_ids, bitmask)
    out = call(library(vocab), "apply_bitmask_inplace", logits, seq_ids, bitmask)[0]
    np.testing.assert_array_equal(out, expected)


def test_empty_lists_change_nothing(library: Any) -> None:
    logits = random_probs(7, 2)
    none, nothing = np.zeros(0, np.int32), np.zeros(0, np.float32)
    vm = library(7)
    out = call(vm, "apply_logit_bias_inplace", logits, none, none, nothing)[0]
    np.testing.assert_array_equal(out, logits)
    penalties = np.zeros((0, 3), np.float32)
    out = call(vm, "apply_penalty_inplace", logits, none, none, none, none, penalties)[0]
    np.testing.assert_array_equal(out, logits)


def test_scatter_and_gather(library: Any, vocab: int) -> None:
    src, dst = random_probs(vocab, 3), np.zeros((5, vocab), np.float32)
    indices = np.int32([4, 0, 2])
    expected = dst.copy()
    expected[indices] = src
    scattered = call(library(vocab), "scatter_probs", src, indices, dst)[2]
    np.testing.assert_array_equal(scattered, expected)
    gathered = call(library(vocab), "gather_probs", scattered, indices, np.zeros_like(src))[2]
    np.testing.assert_array_equal(gathered, src)


# --- sorting


def test_argsort(library: Any, vocab: int) -> None:
    probs = random_probs(vocab, 3, scale=6)
    probs[1] = np.round(probs[1] * vocab) / vocab  # many ties
    probs[2, ::2] = 0
    values, order = call(library(vocab), "argsort_probs", probs)
    expected_values, expected_order = sort(probs)
    np.testing.assert_array_equal(values, expected_values)
    np.testing.assert_array_equal(order, expected_order)


def test_argsort_orders_any_float(library: Any) -> None:
    """Negative numbers, infinities, denormals; -0 ties with 0."""
    probs = np.float32([[0.0, -1.5, 1e-42, -0.0, np.inf, -np.inf, 3]])
    values, order = call(library(7), "argsort_probs", probs)
    np.testing.assert_array_equal(order, sort(probs)[1])
    np.testing.assert_array_equal(values, sort(probs)[0])


# --- sampling


@pytest.mark.parametrize("top_p", [0.0, 1e-6, 0.3, 0.9, 0.999, 1.0])
def test_sample_with_top_p(library: Any, vocab: int, top_p: float) -> None:
    rng = np.random.default_rng(6)
    probs = random_probs(vocab, 3)
    values, order = sort(probs)
    uniform = rng.random(40).astype(np.float32)
    uniform[:2] = [0, np.float32(1) - np.float32(2**-24)]  # both ends of [0, 1)
    rows = rng.integers(0, 3, 40, np.int32)
    p = np.float32([top_p, 0.5, top_p])
    (out,) = call(library(vocab), "sample_with_top_p", values, order, uniform, rows, p)
    for token, u, r in zip(out, uniform, rows, strict=True):
        kept = values[r, : nucleus(values[r], float(p[r]))]
        assert token == order[r, min(inverse_cdf(kept, float(u)), len(kept) - 1)]


def test_top_p_cuts_at_the_first_prefix_that_reaches_it(library: Any) -> None:
    """0.5 + 0.25 reaches 0.75: the third token is out; just above, it is in."""
    values = np.float32([[0.5, 0.25, 0.125, 0.0625, 0.0625, 0, 0]])
    order = np.arange(7, dtype=np.int32)[None]
    uniform = np.linspace(0, 1, 64, endpoint=False, dtype=np.float32)
    rows = np.zeros(64, np.int32)
    for top_p, tokens in ((0.5, 1), (0.75, 2), (0.7500001, 3), (1.0, 5)):
        p = np.float32([top_p])
        (out,) = call(library(7), "sample_with_top_p", values, order, uniform, rows, p)
        assert set(out) == set(range(tokens))


def test_multinomial(library: Any, vocab: int) -> None:
    rng = np.random.default_rng(7)
    probs = random_probs(vocab, 3)
    uniform, rows = rng.random(60).astype(np.float32), rng.integers(0, 3, 60, np.int32)
    (out,) = call(library(vocab), "multinomial_from_uniform", probs, uniform, rows)
    for token, u, r in zip(out, uniform, rows, strict=True):
        cumulative = np.cumsum(probs[r].astype(np.float64))
        assert token == min(np.searchsorted(cumulative, u, side="right"), vocab - 1)


def test_multinomial_frequencies(library: Any) -> None:
    """Evenly spread uniforms draw each id in proportion, to within one draw."""
    probs = np.float32([[0, 0.1, 0.4, 0, 0.25, 0.25, 0]])
    draws = 1000
    uniform = ((np.arange(draws) + 0.5) / draws).astype(np.float32)
    (out,) = call(library(7), "multinomial_from_uniform", probs, uniform, np.zeros(draws, np.int32))
    assert np.abs(np.bincount(out, minlength=7) - draws * probs[0]).max() <= 1


def test_multinomial_never_draws_an_impossible_id(library: Any) -> None:
    """A row that sums to less than uniform falls back to the last possible id."""
    probs = np.float32([[0.5, 0, 0.4999, 0, 0, 0, 0]])
    uniform = np.float32([0.99999, 0.0])
    rows = np.zeros(2, np.int32)
    (out,) = call(library(7), "multinomial_from_uniform", probs, uniform, rows)
    np.testing.assert_array_equal(out, [2, 0])


def test_take_probs(library: Any, vocab: int) -> None:
    rng = np.random.default_rng(8)
    probs = random_probs(vocab, 3)
    _, order = sort(probs)
    rows, results = rng.integers(0, 3, 9, np.int32), rng.integers(0, vocab, 9, np.int32)
    offsets = rng.integers(0, 3 * vocab, 11, np.int32)
    offsets[0] = 3 * vocab - 1
    sampled, top_probs, top_indices = call(
        library(vocab), "sampler_take_probs", probs, order, rows, results, offsets
    )
    np.testing.assert_array_equal(sampled, probs[rows, results])
    np.testing.assert_array_equal(top_indices, order.reshape(-1)[offsets])
    np.testing.assert_array_equal(top_probs, probs[offsets // vocab, top_indices])


@pytest.mark.parametrize("top_p", [0.0, 1e-6, 0.3, 0.9, 0.999, 1.0])
def test_renormalize_by_top_p(library: Any, vocab: int, top_p: float) -> None:
    probs = random_probs(vocab, 2)
    pivots = np.zeros((2, 3), np.float32)
    p = np.float32([top_p, 0.5])
    (out,) = call(library(vocab), "renormalize_by_top_p", probs, p, pivots)
    for i, row in enumerate(probs):
        values = np.sort(row)[::-1]
        pivot = values[nucleus(values, float(p[i])) - 1]
        kept = np.where(row >= pivot, row, 0).astype(np.float64)
        np.testing.assert_array_equal(out[i] > 0, kept > 0)
        np.testing.assert_allclose(out[i], kept / kept.sum(), rtol=1e-6)


def test_renormalize_keeps_all_of_a_tie(library: Any) -> None:
    probs = np.float32([[0.25, 0.125, 0.25, 0.125, 0.25, 0, 0]])
    (out,) = call(
        library(7), "renormalize_by_top_p", probs, np.float32([0.4]), np.zeros((1, 3), np.float32)
    )
    np.testing.assert_allclose(out[0], np.float32([1, 0, 1, 0, 1, 0, 0]) / 3, rtol=1e-6)


# --- speculative decoding


@pytest.mark.parametrize("size", [7, 4099])
def test_verify_draft_tokens(library: Any, size: int) -> None:
    outcomes = set()
    for seed in range(12):
        rng = np.random.default_rng(seed)
        draft, model = random_probs(size, 12, seed, 1.0), random_probs(size, 12, seed + 99, 1.0)
        tokens = np.int32([rng.choice(size, p=d / d.sum(dtype=np.float64)) for d in draft * 1.0])
        uniform = rng.random(12).astype(np.float32)
        roots = np.int32([0, 6])
        arguments = (draft, tokens, model, FIRST_CHILD, NEXT_SIBLING, uniform, roots)
        expected_model, expected_ptr = reference_verify(*arguments)
        new_model, new_ptr = call(library(size), "sampler_verify_draft_tokens", *arguments)
        np.testing.assert_array_equal(new_ptr, expected_ptr)
        np.testing.assert_allclose(new_model, expected_model, rtol=1e-4, atol=1e-8)
        outcomes |= {int(p) % 6 for p in new_ptr}
    assert len(outcomes) >= 4  # accepted at the first, at a later sibling, below; none accepted


def test_verify_changes_its_arguments_in_place(library: Any) -> None:
    draft = np.tile(np.float32([0.5, 0.5, 0, 0, 0, 0, 0]), (12, 1))
    model = np.tile(np.float32([0, 0.25, 0.75, 0, 0, 0, 0]), (12, 1))
    arguments = [
        tvm.runtime.tensor(a)
        for a in (
            draft,
            np.zeros(12, np.int32),  # token 0: impossible for the model, so rejected
            model,
            FIRST_CHILD,
            NEXT_SIBLING,
            np.full(12, 0.5, np.float32),
            np.int32([0]),
        )
    ]
    library(7)["sampler_verify_draft_tokens"](*arguments)
    np.testing.assert_array_equal(arguments[6].numpy(), [0])
    np.testing.assert_allclose(arguments[2].numpy()[0], np.eye(7)[2])
    np.testing.assert_array_equal(arguments[2].numpy()[1:], model[1:])


# --- attaching


def test_a_tensor_of_another_vocabulary_is_refused(library: Any) -> None:
    with pytest.raises(Exception, match="argsort_probs"):
        call(library(7), "argsort_probs", random_probs(8, 1))


@pytest.mark.parametrize("active", [0, 8])
def test_active_vocabulary_out_of_range_is_refused(active: int) -> None:
    with pytest.raises(ValueError, match=f"active_vocab_size {active} is not in 1..7"):
        attach_sampling(tvm.IRModule(), sampling.kernel, vocab_size=7, active_vocab_size=active)


def test_a_kernel_that_does_not_fit_is_refused() -> None:
    def swapped(name: str, **sizes: int) -> tirx.PrimFunc:
        name = {"scatter_probs": "argsort_probs"}.get(name, name)
        return sampling.kernel(name, **sizes)

    with pytest.raises(ValueError, match="scatter_probs: parameter"):
        attach_sampling(tvm.IRModule(), swapped, vocab_size=7, active_vocab_size=7)


def test_a_kernel_may_ask_for_workspaces(tmp_path: Any) -> None:
    """Buffers after the outputs are allocated for the kernel, and are not part of the result."""
    vocab = 7

    def twice_copied(name: str, **sizes: int) -> tirx.PrimFunc:
        if name != "renormalize_by_top_p":
            return sampling.kernel(name, **sizes)
        b = elementwise.symbol("rows")

        def body(probs: Any, _top_p: Any, _pivots: Any, out: Any, spare: Any) -> None:
            with vec.serial(b) as i:
                elementwise.copy_row(probs, i, spare, i, vocab, 8)
                elementwise.copy_row(spare, i, out, i, vocab, 8)

        wide = ((b, vocab), "float32")
        arguments = [("probs", *wide), ("top_p", (b,), "float32"), ("p", (b, 3), "float32")]
        return elementwise.build_kernel(
            "copy", [*arguments, ("out", *wide), ("spare", *wide)], body
        )

    module = attach_sampling(
        tvm.IRModule(), twice_copied, vocab_size=vocab, active_vocab_size=vocab
    )
    relax.build(module, TARGET).export_library(str(tmp_path / "workspace.so"))
    loaded = tvm.runtime.load_module(str(tmp_path / "workspace.so"))
    vm, probs = relax.VirtualMachine(loaded, tvm.cpu()), random_probs(vocab, 2)
    pivots = np.zeros((2, 3), np.float32)
    results = call(vm, "renormalize_by_top_p", probs, np.ones(2, np.float32), pivots)
    assert len(results) == 1
    np.testing.assert_array_equal(results[0], probs)
