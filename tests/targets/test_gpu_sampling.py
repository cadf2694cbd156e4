"""The GPU sampling kernels against numpy in float64, run by each device of `gpu_library`.

What the device's float32 sums cannot decide is left open: a drawn token must hold its uniform
between its cumulative bounds to within TOLERANCE.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
import tvm
from gpu_library import DEVICES, Device, build, check_limits, loaded
from sampling_reference import (
    FIRST_CHILD,
    LOWEST,
    NEXT_SIBLING,
    nucleus,
    random_probs,
    reference_bitmask,
    reference_penalties,
    reference_softmax,
    reference_verify,
    sort,
)
from tvm import relax

from mlc_compile.nn.sampling import SAMPLING_FUNCTIONS, attach_sampling
from mlc_compile.targets.gpu_kernels import sampling
from mlc_compile.targets.gpu_kernels.device import GPUDevice

# vocabulary -> active ids. One element, less than a group, one tile and a bit, one round of merges
# (SmolLM2) and two (Llama 3, Qwen 2.5).
VOCABULARIES = {1: 1, 3: 3, 255: 250, 4097: 4001, 49152: 49152, 128256: 128256, 151936: 151665}
LARGE = [pytest.param(v, marks=pytest.mark.slow) for v in (128256, 151936)]
SIZES = [1, 3, 255, 4097, 49152, *LARGE]
sizes = pytest.mark.parametrize("vocab", SIZES)
batches = pytest.mark.parametrize("batch", [1, 3])
TOLERANCE = 3e-6
TOP_P = [0.0, 1e-5, 0.3, 0.9, 0.999, 1.0]


@functools.cache
def kernels(vocab: int, limits: GPUDevice) -> dict[str, Any]:
    sizes = {"vocab_size": vocab, "active_vocab_size": VOCABULARIES[vocab]}
    return {name: sampling.kernel(name, **sizes, device=limits) for name in SAMPLING_FUNCTIONS}


@functools.cache
def built(device: Device, vocab: int) -> Any:
    return build(device, kernels(vocab, device.limits))


@functools.cache
def library(device: Device, vocab: int) -> Any:
    return loaded(built(device, vocab))


def call(device: Device, vocab: int, name: str, *arrays: np.ndarray) -> Any:
    """The outputs, or all arguments after the call of a function without any.

    Outputs and workspaces are poisoned before.
    """
    function, parameters = SAMPLING_FUNCTIONS[name], kernels(vocab, device.limits)[name].params
    symbols: dict[Any, int] = {}
    for parameter, array in zip(parameters, arrays, strict=False):
        symbols |= {e: n for e, n in zip(parameter.shape, array.shape, strict=True)}
    rest = []
    for parameter in parameters[len(arrays) :]:
        shape = [symbols[e] if e in symbols else int(e) for e in parameter.shape]
        dtype = np.dtype(str(parameter.dtype))
        poison = np.nan if dtype == np.float32 else 0x7ABCDEF0
        rest.append(np.full(shape, poison, dtype))
    tensors = [device.tensor(a) for a in (*arrays, *rest)]
    library(device, vocab)[name](*tensors)
    if not function.outputs:
        return [t.numpy() if np.prod(t.shape) else None for t in tensors]
    outputs = tensors[len(arrays) :][: len(function.outputs)]
    return [t.numpy() for t in outputs]


# --- what a kernel may use


@pytest.mark.parametrize("kind", DEVICES.values(), ids=DEVICES)
@pytest.mark.parametrize("vocab", [1, 4097, pytest.param(151936, marks=pytest.mark.slow)])
def test_launches_keep_to_the_device(kind: Device, vocab: int) -> None:
    assert len(check_limits(kind, built(kind, vocab))) >= len(SAMPLING_FUNCTIONS)


@pytest.mark.emulated
def test_smaller_devices_get_smaller_groups(device: Device) -> None:
    small = device.smaller(max_threads=64, shared_bytes=16 << 10)
    for name, code in check_limits(small, built(small, 4097)).items():
        assert small.name != "webgpu" or "@workgroup_size(64, 1, 1)" in code, name
    probs = random_probs(4097, 2)
    with small.strict():
        values, order = call(small, 4097, "argsort_probs", probs)
        np.testing.assert_array_equal(values, sort(probs)[0])
        np.testing.assert_array_equal(order, sort(probs)[1])
        uniform, rows = np.float32([0.1, 0.6, 0.99]), np.int32([1, 0, 1])
        top_p = np.float32([0.9, 1])
        (out,) = call(small, 4097, "sample_with_top_p", values, order, uniform, rows, top_p)
    check_samples(values, order, out, uniform, rows, top_p)


# --- softmax_with_temperature


@pytest.mark.emulated(vocab=4097, batch=3)
@pytest.mark.emulated(vocab=3, batch=1)
@batches
@sizes
def test_softmax(device: Device, vocab: int, batch: int) -> None:
    rng = np.random.default_rng(vocab + batch)
    logits = (rng.standard_normal((batch, 1, vocab)) * 8).astype(np.float32)
    logits[:, :, VOCABULARIES[vocab] :] = 1e4  # padding must neither win nor count
    for temperature in ([1.0, 0.0, 0.7], [2.0, 0.1, 1e-5], [1e-6, 1.3, 0.01]):
        t = np.float32(temperature[:batch])
        (out,) = call(device, vocab, "softmax_with_temperature", logits, t)
        expected = reference_softmax(logits, t, VOCABULARIES[vocab])
        # An exponential of x may be off by 3 + 2 |x| units in the last place in WGSL.
        np.testing.assert_allclose(out, expected, rtol=5e-5, atol=1e-10)
        np.testing.assert_array_equal(out[t <= 1e-5], expected[t <= 1e-5])
        np.testing.assert_allclose(out.sum(-1, dtype=np.float64), 1, rtol=1e-5)


@pytest.mark.emulated(vocab=255)
@sizes
def test_softmax_of_equal_logits(device: Device, vocab: int) -> None:
    active = VOCABULARIES[vocab]
    for value in (0.0, -7.5, 1e30, -1e30, LOWEST):
        logits = np.full((3, 1, vocab), value, np.float32)
        (out,) = call(device, vocab, "softmax_with_temperature", logits, np.float32([1, 0, 1e-4]))
        np.testing.assert_allclose(out[0, 0, :active], 1 / active, rtol=1e-5)
        np.testing.assert_allclose(out[2, 0, :active], 1 / active, rtol=1e-5)
        np.testing.assert_array_equal(np.flatnonzero(out[1]), [0])
        assert not out[:, :, active:].any()


@pytest.mark.emulated
def test_softmax_greedy_ties_go_to_the_first(device: Device) -> None:
    """Within a thread, a tile, and between tiles."""
    for ties in ([17, 18, 3000], [300, 44], [44 + 256, 44], [2047, 2048], [4000, 3999], [2100, 50]):
        logits = np.full((1, 1, 4097), -2, np.float32)
        logits[0, 0, ties] = 5
        logits[0, 0, 4050] = 9  # padding
        (out,) = call(device, 4097, "softmax_with_temperature", logits, np.float32([0]))
        np.testing.assert_array_equal(np.flatnonzero(out), [min(ties)])
        assert out[0, 0, min(ties)] == 1


@pytest.mark.emulated
def test_softmax_after_a_bitmask_and_at_extremes(device: Device) -> None:
    """Masked logits (the lowest float32) get exactly 0, also where dividing overflows."""
    logits = np.full((5, 1, 255), LOWEST, np.float32)
    logits[0, 0, 2] = 30
    logits[1, 0, :5] = [1e30, 2e30, -np.inf, 0, 1]
    logits[3, 0, [7, 9]] = [-1e30, 3e38]
    logits[4, 0, [7, 9]] = [1, 0]
    temperature = np.float32([0.5, 0.1, 1, 2e-5, 2e-5])
    (out,) = call(device, 255, "softmax_with_temperature", logits, temperature)
    for row, winner in ((0, 2), (1, 1), (3, 9), (4, 7)):
        np.testing.assert_array_equal(out[row, 0], np.eye(255, dtype=np.float32)[winner])
    np.testing.assert_allclose(out[2, 0], [1 / 250] * 250 + [0] * 5, rtol=1e-6)


# --- functions in place


@pytest.mark.emulated(vocab=4097)
@sizes
def test_logit_bias(device: Device, vocab: int) -> None:
    rng = np.random.default_rng(3)
    logits = rng.standard_normal((3, vocab)).astype(np.float32)
    pairs = rng.permutation(3 * vocab)[:300].astype(np.int32)
    rows, tokens = pairs // vocab, pairs % vocab
    bias = rng.standard_normal(len(pairs)).astype(np.float32)
    expected = logits.copy()
    np.add.at(expected, (rows, tokens), bias)
    out = call(device, vocab, "apply_logit_bias_inplace", logits, rows, tokens, bias)[0]
    np.testing.assert_array_equal(out, expected)


@pytest.mark.emulated(vocab=4097)
@sizes
def test_penalties(device: Device, vocab: int) -> None:
    rng = np.random.default_rng(4)
    logits = rng.standard_normal((4, vocab)).astype(np.float32)
    seq_ids = np.int32([3, 1])  # rows 0 and 2 belong to sequences without penalties
    penalties = np.float32([[0.5, 0.25, 1.3], [0, 0.1, 0.8]])
    per_sequence = min(vocab, 200)
    tokens = np.concatenate([rng.permutation(vocab)[:per_sequence] for _ in seq_ids])
    position = np.repeat(np.arange(2), per_sequence)
    count = rng.integers(1, 5, len(tokens))
    expected = reference_penalties(logits, seq_ids, position, tokens, count, penalties)
    arguments = [a.astype(np.int32) for a in (seq_ids, position, tokens, count)]
    out = call(device, vocab, "apply_penalty_inplace", logits, *arguments, penalties)[0]
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(out[[0, 2]], logits[[0, 2]])


@pytest.mark.emulated(vocab=4097)
@sizes
def test_bitmask(device: Device, vocab: int) -> None:
    rng = np.random.default_rng(5)
    logits = rng.standard_normal((4, vocab)).astype(np.float32)
    words = (vocab + 31) // 32
    bitmask = rng.integers(-(2**31), 2**31, (4, words), np.int64).astype(np.int32)
    bitmask[2, ::2] = -1
    seq_ids = np.int32([2, 0, 3])
    out = call(device, vocab, "apply_bitmask_inplace", logits, seq_ids, bitmask)[0]
    np.testing.assert_array_equal(out, reference_bitmask(logits, seq_ids, bitmask))


@pytest.mark.emulated
def test_empty_lists_change_nothing(device: Device) -> None:
    logits = random_probs(255, 2)
    none, nothing = np.zeros(0, np.int32), np.zeros(0, np.float32)
    out = call(device, 255, "apply_logit_bias_inplace", logits, none, none, nothing)[0]
    np.testing.assert_array_equal(out, logits)
    penalties = np.zeros((0, 3), np.float32)
    out = call(device, 255, "apply_penalty_inplace", logits, none, none, none, none, penalties)[0]
    np.testing.assert_array_equal(out, logits)


@pytest.mark.emulated(vocab=4097)
@sizes
def test_scatter_and_gather(device: Device, vocab: int) -> None:
    src, dst = random_probs(vocab, 3), np.full((5, vocab), -1, np.float32)
    indices = np.int32([4, 0, 2])
    expected = dst.copy()
    expected[indices] = src
    scattered = call(device, vocab, "scatter_probs", src, indices, dst)[2]
    np.testing.assert_array_equal(scattered, expected)
    gathered = call(device, vocab, "gather_probs", scattered, indices, np.full_like(src, np.nan))[2]
    np.testing.assert_array_equal(gathered, src)


# --- sorting


@pytest.mark.emulated(vocab=4097, batch=3)
@pytest.mark.emulated(vocab=1, batch=1)
@batches
@sizes
def test_argsort(device: Device, vocab: int, batch: int) -> None:
    probs = random_probs(vocab, batch, scale=6)
    if batch > 1:
        probs[1] = np.round(probs[1] * vocab) / vocab  # many ties
        probs[2, ::2] = 0
    values, order = call(device, vocab, "argsort_probs", probs)
    expected_values, expected_order = sort(probs)
    np.testing.assert_array_equal(order, expected_order)
    np.testing.assert_array_equal(values, expected_values)


@pytest.mark.emulated(vocab=4097)
@sizes
def test_argsort_of_ties_and_of_sorted_rows(device: Device, vocab: int) -> None:
    """Equal values keep their order across tiles and runs; sorted and reversed rows."""
    steps = np.arange(vocab, dtype=np.float32) / vocab
    probs = np.stack([np.full(vocab, 1 / vocab, np.float32), steps, steps[::-1]])
    values, order = call(device, vocab, "argsort_probs", probs)
    np.testing.assert_array_equal(order, sort(probs)[1])
    np.testing.assert_array_equal(values, sort(probs)[0])


@pytest.mark.emulated
def test_argsort_orders_any_float(device: Device) -> None:
    """Negative numbers, infinities, denormals; -0 ties with 0."""
    probs = np.zeros((1, 255), np.float32)
    probs[0, :7] = [0.0, -1.5, 1e-42, -0.0, np.inf, -np.inf, 3]
    values, order = call(device, 255, "argsort_probs", probs)
    np.testing.assert_array_equal(order, sort(probs)[1])
    np.testing.assert_array_equal(values, sort(probs)[0])


# --- sampling


def check_samples(
    values: np.ndarray,
    order: np.ndarray,
    out: np.ndarray,
    uniform: np.ndarray,
    rows: np.ndarray,
    top_p: Iterable[float],
) -> None:
    """Each token's cumulative bounds hold uniform * mass of the nucleus, both to TOLERANCE."""
    for token, u, r in zip(out, uniform.astype(np.float64), rows, strict=True):
        p = float(list(top_p)[r])
        row = values[r].astype(np.float64)
        cumulative = np.cumsum(row)
        if p >= 1:
            least = most = len(row)
        else:
            least, most = nucleus(values[r], p - TOLERANCE), nucleus(values[r], p + TOLERANCE)
        (rank,) = np.flatnonzero(order[r] == token)
        where = f"row {r}, u {u}, top_p {p}: token {token} of rank {rank}"
        assert rank < most, where
        assert row[rank] > 0, where
        assert cumulative[rank] >= u * cumulative[least - 1] - TOLERANCE, where
        assert cumulative[rank] - row[rank] <= u * cumulative[most - 1] + TOLERANCE, where


def some_uniform(rng: np.random.Generator, count: int) -> np.ndarray:
    uniform = rng.random(count).astype(np.float32)
    uniform[:2] = [0, np.float32(1) - np.float32(2**-24)]  # both ends of [0, 1)
    return uniform


@pytest.mark.emulated(vocab=4097, top_p=0.9)
@pytest.mark.emulated(vocab=3, top_p=0.3)
@pytest.mark.parametrize("top_p", TOP_P)
@sizes
def test_sample_with_top_p(device: Device, vocab: int, top_p: float) -> None:
    rng = np.random.default_rng(6)
    probs = random_probs(vocab, 3)
    probs[1] = np.float32(1 / vocab)  # uniform: wide nuclei
    probs[2, vocab // 2 + 1 :] = 0  # less than a mass of 1, and impossible ids
    values, order = sort(probs)
    uniform, rows = some_uniform(rng, 40), rng.integers(0, 3, 40, np.int32)
    p = np.float32([top_p, top_p, 0.5])
    (out,) = call(device, vocab, "sample_with_top_p", values, order, uniform, rows, p)
    check_samples(values, order, out, uniform, rows, p)


@pytest.mark.emulated(count=5)
@pytest.mark.parametrize("count", [1, 5])
def test_one_sample_of_one_row(device: Device, count: int) -> None:
    """What a browser asks for."""
    probs = random_probs(49152, 1, 8)
    values, order = sort(probs)
    uniform = np.random.default_rng(count).random(count).astype(np.float32)
    rows, p = np.zeros(count, np.int32), np.float32([0.95])
    (out,) = call(device, 49152, "sample_with_top_p", values, order, uniform, rows, p)
    check_samples(values, order, out, uniform, rows, p)


@pytest.mark.emulated
def test_top_p_cuts_at_the_first_prefix_that_reaches_it(device: Device) -> None:
    """0.5 + 0.25 reaches 0.75: the third token is out; just above, it is in."""
    values = np.zeros((1, 255), np.float32)
    values[0, :5] = [0.5, 0.25, 0.125, 0.0625, 0.0625]
    order = np.arange(255, dtype=np.int32)[None]
    uniform = np.linspace(0, 1, 64, endpoint=False, dtype=np.float32)
    rows = np.zeros(64, np.int32)
    for top_p, tokens in ((0.5, 1), (0.75, 2), (0.7500001, 3), (1.0, 5)):
        p = np.float32([top_p])
        (out,) = call(device, 255, "sample_with_top_p", values, order, uniform, rows, p)
        assert set(out) == set(range(tokens))


def test_sums_of_every_level_are_exact_where_float32_is(device: Device) -> None:
    """With 2^-16 each, every bound is exact: thread, block, tile and row bounds alike."""
    vocab = 49152
    values = np.full((1, vocab), 2**-16, np.float32)
    order = np.random.default_rng(0).permutation(vocab).astype(np.int32)[None]
    edges = np.int64([0, 1, 7, 8, 127, 128, 2047, 2048, 2049, 8192, 49151 - 2048, 49150, 49151])
    # Right on the lower bound of each rank, as u * 0.75 with the mass of the whole row.
    uniform = np.float64(edges) / vocab
    assert (uniform.astype(np.float32) * np.float32(0.75) == edges * 2.0**-16).mean() > 0.5
    exact = uniform.astype(np.float32) * np.float32(0.75) == edges * 2.0**-16
    edges, uniform = edges[exact], uniform[exact].astype(np.float32)
    rows = np.zeros(len(edges), np.int32)
    (out,) = call(device, vocab, "sample_with_top_p", values, order, uniform, rows, np.float32([1]))
    np.testing.assert_array_equal(out, order[0, edges])
    ranks = np.arange(1, vocab, 997)
    uniform, rows = (ranks * 2.0**-16).astype(np.float32), np.zeros(len(ranks), np.int32)
    (out,) = call(device, vocab, "multinomial_from_uniform", values, uniform, rows)
    np.testing.assert_array_equal(out, ranks)


@pytest.mark.emulated(vocab=4097)
@sizes
def test_multinomial(device: Device, vocab: int) -> None:
    rng = np.random.default_rng(7)
    probs = random_probs(vocab, 3)
    probs[1, ::2] = 0
    uniform, rows = some_uniform(rng, 60), rng.integers(0, 3, 60, np.int32)
    (out,) = call(device, vocab, "multinomial_from_uniform", probs, uniform, rows)
    for token, u, r in zip(out, uniform, rows, strict=True):
        cumulative = np.cumsum(probs[r].astype(np.float64))
        assert 0 <= token < vocab
        assert probs[r, token] > 0 or not probs[r].any()
        assert cumulative[token] >= min(u, cumulative[-1]) - TOLERANCE
        assert cumulative[token] - probs[r, token] <= u + TOLERANCE


@pytest.mark.emulated
def test_multinomial_never_draws_an_impossible_id(device: Device) -> None:
    """A row that sums to less than uniform falls back to the last possible id."""
    probs = np.zeros((1, 4097), np.float32)
    probs[0, [5, 3000]] = [0.5, 0.4999]
    uniform, rows = np.float32([0.99999, 0.0]), np.zeros(2, np.int32)
    (out,) = call(device, 4097, "multinomial_from_uniform", probs, uniform, rows)
    np.testing.assert_array_equal(out, [3000, 5])


@pytest.mark.parametrize("vocab", [255, 4097])
def test_draws_follow_the_distribution(device: Device, vocab: int) -> None:
    """Random draws through softmax, sort and top-p: Pearson's chi-square of 20,000 of them."""
    rng = np.random.default_rng(11)
    logits = (rng.standard_normal((1, 1, vocab)) * 2).astype(np.float32)
    temperature, top_p, draws = np.float32([0.8]), np.float32([0.9]), 20_000
    (probs,) = call(device, vocab, "softmax_with_temperature", logits, temperature)
    values, order = call(device, vocab, "argsort_probs", probs[:, 0])
    uniform, rows = rng.random(draws).astype(np.float32), np.zeros(draws, np.int32)
    (out,) = call(device, vocab, "sample_with_top_p", values, order, uniform, rows, top_p)
    exact = reference_softmax(logits, temperature, VOCABULARIES[vocab])[0, 0]
    kept = np.sort(exact)[::-1][: nucleus(np.sort(exact)[::-1], float(top_p[0]))]
    chances = np.where(exact >= kept[-1], exact, 0) / kept.sum()
    counts = np.bincount(out, minlength=vocab)
    assert not counts[chances == 0].any()
    often = chances * draws >= 5  # the test wants that many in a class; the rest is one class
    expected = np.append(chances[often], chances[~often].sum()) * draws
    observed = np.append(counts[often], counts[~often].sum())[expected > 0]
    expected = expected[expected > 0]
    freedom = len(expected) - 1
    statistic = ((observed - expected) ** 2 / expected).sum()
    # Four standard deviations either way: too even is as wrong as too uneven.
    assert abs(statistic - freedom) < 4 * np.sqrt(2 * freedom)


@pytest.mark.emulated(vocab=4097)
@sizes
def test_take_probs(device: Device, vocab: int) -> None:
    rng = np.random.default_rng(8)
    probs = random_probs(vocab, 3)
    _, order = sort(probs)
    rows, results = rng.integers(0, 3, 9, np.int32), rng.integers(0, vocab, 9, np.int32)
    offsets = rng.integers(0, 3 * vocab, 300, np.int32)
    offsets[0] = 3 * vocab - 1
    sampled, top_probs, top_indices = call(
        device, vocab, "sampler_take_probs", probs, order, rows, results, offsets
    )
    np.testing.assert_array_equal(sampled, probs[rows, results])
    np.testing.assert_array_equal(top_indices, order.reshape(-1)[offsets])
    np.testing.assert_array_equal(top_probs, probs[offsets // vocab, top_indices])


@pytest.mark.emulated(vocab=4097, top_p=0.9)
@pytest.mark.parametrize("top_p", TOP_P)
@sizes
def test_renormalize_by_top_p(device: Device, vocab: int, top_p: float) -> None:
    probs = random_probs(vocab, 3)
    probs[2] = np.round(probs[2] * 64) / 64
    probs[2, 0] += np.float32(1e-3)
    p = np.float32([top_p, 0.5, top_p])
    (out,) = call(
        device, vocab, "renormalize_by_top_p", probs, p, np.full((3, 3), np.nan, np.float32)
    )
    for i, row in enumerate(probs):
        kept = out[i] > 0
        values = np.sort(row)[::-1]
        if p[i] >= 1:
            np.testing.assert_array_equal(kept, row > 0)
        else:
            pivot = row[kept].min()
            np.testing.assert_array_equal(kept, row >= pivot)
            # A row may have less mass than top_p: then all of it is kept.
            last = row[row > 0].min()
            most = max(values[nucleus(values, float(p[i]) - TOLERANCE) - 1], last)
            least = max(values[nucleus(values, float(p[i]) + TOLERANCE) - 1], last)
            assert least <= pivot <= most
        mass = row[kept].sum(dtype=np.float64)
        np.testing.assert_allclose(out[i], np.where(kept, row, 0) / mass, rtol=1e-5)


@pytest.mark.emulated
def test_renormalize_keeps_all_of_a_tie(device: Device) -> None:
    probs = np.zeros((1, 255), np.float32)
    probs[0, :5] = [0.25, 0.125, 0.25, 0.125, 0.25]
    pivots = np.zeros((1, 3), np.float32)
    (out,) = call(device, 255, "renormalize_by_top_p", probs, np.float32([0.4]), pivots)
    np.testing.assert_allclose(out[0, :5], np.float32([1, 0, 1, 0, 1]) / 3, rtol=1e-6)
    assert not out[0, 5:].any()


# --- speculative decoding


@pytest.mark.emulated(vocab=255)
@pytest.mark.parametrize("vocab", [3, 255, 4097])
def test_verify_draft_tokens(device: Device, vocab: int) -> None:
    outcomes = set()
    for seed in range(12):
        rng = np.random.default_rng(seed)
        draft = random_probs(vocab, 12, seed, 1.0)
        model = random_probs(vocab, 12, seed + 99, 1.0)
        tokens = np.int32([rng.choice(vocab, p=d / d.sum(dtype=np.float64)) for d in draft * 1.0])
        uniform = rng.random(12).astype(np.float32)
        roots = np.int32([0, 6])
        arguments = (draft, tokens, model, FIRST_CHILD, NEXT_SIBLING, uniform, roots)
        expected_model, expected_ptr = reference_verify(*arguments)
        changed = call(device, vocab, "sampler_verify_draft_tokens", *arguments)
        np.testing.assert_array_equal(changed[6], expected_ptr)
        np.testing.assert_allclose(changed[2], expected_model, rtol=1e-4, atol=1e-8)
        for i in (0, 1, 3, 4, 5):
            np.testing.assert_array_equal(changed[i], arguments[i])
        outcomes |= {int(p) % 6 for p in changed[6]}
    assert len(outcomes) >= 4  # accepted at the first, at a later sibling, below; none accepted


@pytest.mark.emulated
def test_verify_accepts_when_nothing_is_left_of_the_model(device: Device) -> None:
    """Equal distributions leave no excess; an impossible draft token is then taken, as in MLC."""
    probs = np.tile(np.float32([0, 0.5, 0.5]), (12, 1))
    uniform = np.full(12, np.nextafter(np.float32(1), np.float32(2)), np.float32)
    tokens = np.ones(12, np.int32)  # 0.5 >= 0.50000006 fails
    arguments = (probs, tokens, probs, FIRST_CHILD, NEXT_SIBLING, uniform, np.int32([0, 6]))
    changed = call(device, 3, "sampler_verify_draft_tokens", *arguments)
    np.testing.assert_array_equal(changed[6], reference_verify(*arguments)[1])
    np.testing.assert_array_equal(changed[2], probs)


# --- attached to a library


@pytest.mark.emulated
def test_the_attached_functions_sample(device: Device) -> None:
    """Through relax: workspaces allocated, in-place functions called as PrimFuncs."""
    vocab = 4097

    module = attach_sampling(
        tvm.IRModule(),
        functools.partial(sampling.kernel, device=device.limits),
        vocab_size=vocab,
        active_vocab_size=4001,
    )
    vm = relax.VirtualMachine(
        loaded(relax.build(module, device.target)), tvm.device(device.name, 0)
    )
    for name in SAMPLING_FUNCTIONS:
        assert vm.module.implements_function(name, True), name
    rng = np.random.default_rng(12)

    logits = rng.standard_normal((2, vocab)).astype(np.float32)
    bitmask = rng.integers(-(2**31), 2**31, (2, (vocab + 31) // 32), np.int64).astype(np.int32)
    masked, rows = device.tensor(logits), np.int32([0, 1])
    vm.module.get_function("apply_bitmask_inplace", True)(
        masked, device.tensor(rows), device.tensor(bitmask)
    )
    expected = reference_bitmask(logits, rows, bitmask)
    np.testing.assert_array_equal(masked.numpy(), expected)
    t, p = np.float32([0.7, 1.5]), np.float32([0.9, 0.2])
    probs = vm["softmax_with_temperature"](device.tensor(expected[:, None]), device.tensor(t))
    exact = reference_softmax(expected[:, None], t, 4001)
    np.testing.assert_allclose(probs.numpy(), exact, rtol=5e-5, atol=1e-10)
    values, order = vm["argsort_probs"](device.tensor(probs.numpy()[:, 0]))
    uniform = rng.random(2).astype(np.float32)
    out = vm["sample_with_top_p"](
        values, order, device.tensor(uniform), device.tensor(rows), device.tensor(p)
    )
    check_samples(values.numpy(), order.numpy(), out.numpy(), uniform, rows, p)
