"""The formulas of the quality report, against torch, closed forms and simulated repetition."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest

from mlc_compile.errors import InputError
from mlc_compile.runtime import quality_stats
from mlc_compile.runtime.quality_stats import (
    GATES,
    PERCENTILES,
    Positions,
    compare_logits,
    log_softmax,
    mean,
    missed_gates,
    parse_gates,
    summarize,
)


def logits(n: int, vocab: int, seed: int, scale: float = 5.0) -> np.ndarray:
    return (scale * np.random.default_rng(seed).standard_normal((n, vocab))).astype(np.float32)


def test_positions_are_those_of_torch() -> None:
    torch = pytest.importorskip("torch")
    base, mine = logits(37, 101, 0), logits(37, 101, 1)
    targets = np.random.default_rng(2).integers(0, 101, 37).astype(np.int32)
    found = compare_logits(base, mine, targets)
    p, q = (torch.log_softmax(torch.from_numpy(x).double(), -1) for x in (base, mine))
    kld = torch.nn.functional.kl_div(q, p, log_target=True, reduction="none").sum(-1)
    t = torch.from_numpy(targets).long()
    nll, base_nll = (torch.nn.functional.nll_loss(x, t, reduction="none") for x in (q, p))
    np.testing.assert_allclose(found.kld, kld, rtol=1e-12)
    np.testing.assert_allclose(found.nll, nll, rtol=1e-12)
    np.testing.assert_allclose(found.base_nll, base_nll, rtol=1e-12)
    np.testing.assert_allclose(found.delta, (-nll).exp() - (-base_nll).exp(), atol=1e-14)
    np.testing.assert_array_equal(found.same, base.argmax(1) == mine.argmax(1))
    assert kld.min() > 0.1  # so that the comparison above compares something


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    base, mine, targets = logits(19, 64, 0), logits(19, 64, 1), np.arange(19, dtype=np.int32)
    whole = compare_logits(base, mine, targets)
    monkeypatch.setattr(quality_stats, "_BLOCK_ELEMENTS", 5 * 64)
    parts = compare_logits(base, mine, targets)
    for f in dataclasses.fields(Positions):
        np.testing.assert_array_equal(getattr(whole, f.name), getattr(parts, f.name))


def test_log_softmax_is_stable() -> None:
    x = np.array([[30000.0, 29999.0, -30000.0]], np.float32)
    assert log_softmax(x)[0, :2] == pytest.approx([-math.log1p(math.exp(-1)), -1.313261687518223])
    assert np.isfinite(log_softmax(x)).all()


def test_the_same_logits_differ_in_nothing() -> None:
    base = logits(50, 30, 3)
    found = summarize(compare_logits(base, base.copy(), np.zeros(50, np.int32)))
    assert (found.kld.value, found.kld_max, found.ln_ratio.value) == (0, 0, 0)
    assert (found.top1.value, found.rms_delta.value, found.ppl_ratio) == (1, 0, 1)
    # A shift of all logits is the same distribution.
    shifted = compare_logits(base, base + np.float32(8), np.zeros(50, np.int32))
    assert shifted.kld.max() < 1e-10


def test_a_closed_form() -> None:
    """p = (1/2, 1/2), q = (3/4, 1/4), the text's token is the first."""
    base = np.zeros((1, 2), np.float32)
    mine = np.log(np.array([[3.0, 1.0]], np.float32))
    found = summarize(compare_logits(base, mine, np.array([0], np.int32)))
    assert found.kld.value == pytest.approx(math.log(2 / math.sqrt(3)), rel=1e-6)
    assert found.perplexity.value == pytest.approx(4 / 3, rel=1e-6)
    assert found.ppl_ratio == pytest.approx(2 / 3, rel=1e-6)
    assert found.rms_delta.value == pytest.approx(0.25, rel=1e-6)
    assert found.kld.error == 0  # one position has none


def test_errors_are_those_of_repetition() -> None:
    """The stated standard errors, against the spread over 2,000 repetitions of 400 draws."""
    rng = np.random.default_rng(0)
    runs = []
    for _ in range(2000):
        base = rng.gamma(2.0, 1.0, 400)
        delta = rng.normal(0.01, 0.05, 400)
        runs.append(
            summarize(
                Positions(
                    nll=base + rng.normal(0.02, 0.1, 400),
                    base_nll=base,
                    kld=rng.gamma(0.5, 0.1, 400),
                    delta=delta,
                    same=(rng.random(400) < 0.9).astype(np.float64),
                )
            )
        )
    for name in ("perplexity", "ln_ratio", "kld", "top1", "rms_delta"):
        spread = np.std([getattr(run, name).value for run in runs])
        stated = np.mean([getattr(run, name).error for run in runs])
        assert stated == pytest.approx(spread, rel=0.06), name
    # Paired: the ratio's error is far below that of the perplexities.
    assert runs[0].ln_ratio.error < 0.2 * runs[0].perplexity.error / runs[0].perplexity.value


def test_percentiles() -> None:
    x = np.random.default_rng(1).permutation(1001) / 1000.0
    flat = np.zeros(1001)
    found = summarize(Positions(flat, flat, x, flat, flat))
    assert (found.kld_median, found.kld_p90, found.kld_p99) == pytest.approx((0.5, 0.9, 0.99))
    assert (found.kld_p999, found.kld_max) == pytest.approx((0.999, 1.0))
    assert found.curve == pytest.approx([p / 100 for p in PERCENTILES])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("side", ["base", "mine"])
def test_one_bad_logit_spoils_every_figure(bad: float, side: str) -> None:
    arrays = {"base": logits(6, 10, 0), "mine": logits(6, 10, 1)}
    arrays[side][3, 7] = bad
    found = summarize(compare_logits(arrays["base"], arrays["mine"], np.zeros(6, np.int32)))
    assert math.isnan(found.kld.value) and math.isnan(found.top1.value)
    assert set(parse_gates("kld=9,top1=0,ppl_ratio=99")) == set(GATES) & {
        "kld",
        "top1",
        "ppl_ratio",
    }
    assert len(missed_gates(found, parse_gates("kld=9,top1=0,ppl_ratio=99"))) == 3
    data = found.to_json()
    assert data["kld"] == {"value": None, "error": None}
    json.dumps(data, allow_nan=False)


def test_gates_say_what_missed() -> None:
    base = np.zeros((1, 2), np.float32)
    found = summarize(compare_logits(base, np.array([[1, 0]], np.float32), np.array([1], np.int32)))
    assert missed_gates(found, {"kld": 1.0, "top1": 1.0, "ppl_ratio": 2.0}) == []
    [line] = missed_gates(found, {"kld": 0.05})
    assert line == f"mean KL divergence {found.kld.value:.5g} > 0.05 (kld)"
    [line] = missed_gates(found, {"top1": 1.1})
    assert line == "same top-1 1 < 1.1 (top1)"
    # At the limit is kept.
    assert missed_gates(found, {"kld": found.kld.value}) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("kl=0.05", "there is no 'kl'; gates: kld,"),
        ("kld=", "'kld=' has no number"),
        ("kld=nan", "has no number"),
        ("kld=0.1,kld=0.2", "kld is given twice"),
    ],
)
def test_bad_gates(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_gates(text)


def test_mean_of_one() -> None:
    assert mean(np.array([3.0])).error == 0
