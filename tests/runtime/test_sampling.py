"""Sampling: numpy against the definition, the library's helpers against numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from built_model import built_model

from mlc_compile.errors import CheckFailedError, InputError
from mlc_compile.runtime.engine import Library
from mlc_compile.runtime.sampling import (
    HELPERS,
    Sampler,
    Sampling,
    penalise_by_library,
    penalise_by_numpy,
    sample_by_library,
    sample_by_numpy,
)

VOCAB = 50


def logits(size: int = VOCAB, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 3, size).astype(np.float32)


def test_greedy_takes_the_first_largest_of_the_active_vocabulary() -> None:
    scores = np.zeros(VOCAB, np.float32)
    scores[[7, 9]], scores[45] = 2.0, 5.0
    assert Sampler(Sampling(), VOCAB)(scores) == 45
    assert Sampler(Sampling(), 40)(scores) == 7


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_logits_that_are_not_numbers_are_refused(temperature: float, bad: float) -> None:
    scores = logits()
    scores[3] = bad
    with pytest.raises(CheckFailedError, match=r"token 3.*mlc_compile verify"):
        Sampler(Sampling(temperature), VOCAB)(scores)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("repetition_penalty", 0.0),
        ("presence_penalty", float("inf")),
        ("seed", -1),
    ],
)
def test_numbers_out_of_range_are_refused(field: str, value: float) -> None:
    with pytest.raises(InputError, match=f"{field} is {value}"):
        Sampling(**{field: value})  # type: ignore[arg-type]


def test_samples_are_distributed_as_softmax() -> None:
    scores, temperature, draws = logits(8), 1.7, 20_000
    probs = np.exp(scores / temperature) / np.exp(scores / temperature).sum()
    sampler = Sampler(Sampling(temperature, seed=1), 8)
    found = np.bincount([sampler(scores) for _ in range(draws)], minlength=8) / draws
    # Four standard deviations of a share.
    np.testing.assert_allclose(found, probs, atol=4 * 0.5 / draws**0.5)


@pytest.mark.parametrize("top_p", [0.1, 0.5, 0.9, 1.0])
def test_top_p_keeps_the_shortest_prefix_that_reaches_it(top_p: float) -> None:
    scores = logits() / 4
    probs = np.exp(scores.astype(np.float64))
    probs /= probs.sum()
    order = np.argsort(-probs)
    kept = next(
        (n for n in range(1, VOCAB) if probs[order[:n]].sum() >= top_p),
        VOCAB,
    )
    sampling = Sampling(1.0, top_p)
    shares = np.cumsum(probs[order[:kept]]) / probs[order[:kept]].sum()
    # Just below and above each border between two tokens.
    for n, share in enumerate(shares):
        assert sample_by_numpy(scores, sampling, share - 1e-6) == order[n]
        if n + 1 < kept:
            assert sample_by_numpy(scores, sampling, share + 1e-6) == order[n + 1]
    assert sample_by_numpy(scores, sampling, np.nextafter(1.0, 0.0)) == order[kept - 1]


def test_penalties_are_as_defined() -> None:
    scores, counts = logits(), {3: 1, 8: 4, 20: 2}
    sampling = Sampling(presence_penalty=0.5, frequency_penalty=0.25, repetition_penalty=1.3)
    before = scores.copy()
    found = penalise_by_numpy(scores, counts, sampling)
    np.testing.assert_array_equal(scores, before)
    for token, score in enumerate(before):
        expected = float(score)
        if token in counts:
            expected -= 0.5 + counts[token] * 0.25
            expected = expected * 1.3 if expected < 0 else expected / 1.3
        assert found[token] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("penalty", "chosen"),
    [("presence_penalty", [0, 1, 0, 0]), ("frequency_penalty", [0, 1, 0, 2])],
)
def test_a_sampler_penalises_what_it_chose_itself(penalty: str, chosen: list[int]) -> None:
    scores = np.asarray([1.0, 0.9, 0.8], np.float32)
    sampler = Sampler(Sampling(**{penalty: 0.15}), 3)  # type: ignore[arg-type]
    assert [sampler(scores) for _ in chosen] == chosen


def test_a_seed_fixes_the_text_and_another_changes_it() -> None:
    def tokens(seed: int) -> list[int]:
        sampler = Sampler(Sampling(1.0, 0.9, seed=seed), VOCAB)
        return [sampler(logits(seed=step)) for step in range(20)]

    assert tokens(1) == tokens(1) != tokens(2)


def test_a_library_without_all_helpers_is_not_asked() -> None:
    class Partial:
        def has(self, name: str) -> bool:
            return name != HELPERS[-1]

    partial: Any = Partial()
    assert Sampler(Sampling(1.0), VOCAB, partial).library is None


def test_the_library_chooses_as_numpy_does() -> None:
    library = Library(built_model().library)
    vocab = 2048
    random = np.random.default_rng(0)
    assert Sampler(Sampling(), vocab, library).library is library
    for seed in range(100):
        scores = logits(vocab, seed)
        sampling = Sampling(
            temperature=random.uniform(0.2, 1.5),
            top_p=random.uniform(0.1, 1.0),
            presence_penalty=0.3,
            frequency_penalty=0.2,
            repetition_penalty=1.3,
        )
        chosen = random.choice(vocab, 20, replace=False)
        counts = {int(token): int(random.integers(1, 4)) for token in chosen}
        ours = penalise_by_numpy(scores, counts, sampling)
        theirs = penalise_by_library(scores, counts, sampling, library)
        np.testing.assert_allclose(theirs, ours, rtol=1e-6)
        uniform = float(random.random(dtype=np.float32))
        # Where a border is that near, rounding decides.
        near = {sample_by_numpy(ours, sampling, uniform + d) for d in (-1e-5, 0.0, 1e-5)}
        assert sample_by_library(ours, sampling, uniform, library) in near
        assert len(near) < 3
