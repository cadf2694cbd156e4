"""What verify says of engines that are right, and of engines with one planted fault each.

The engine here is the numpy reference behind the interface of `Engine`, so that a fault can be put
anywhere without compiling; tests/parity does the same with compiled libraries.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest

from mlc_compile.models import Model, load_model
from mlc_compile.runtime import scenarios
from mlc_compile.runtime.compare import THRESHOLDS, Row, compare
from mlc_compile.runtime.reference import Attention, NumpyReference
from mlc_compile.runtime.scenarios import Greedy, Limits, plan_contexts
from mlc_compile.runtime.verify import Scenario, VerifyReport, reference_rows, run_scenarios

Array = np.ndarray[Any, Any]
FLOAT32 = THRESHOLDS["float32"]

CONFIG = {
    "model_type": "qwen3",
    "architectures": ["Qwen3ForCausalLM"],
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 80,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
LIMITS = Limits(
    vocab=80, context=120, chunk=32, batch=4, window=None, sink=0, decode_steps=40, longest=400
)
SLIDING = dataclasses.replace(LIMITS, context=None, window=24)


@pytest.fixture(scope="module")
def model() -> Model:
    return load_model(CONFIG, where="config.json")


@pytest.fixture(scope="module")
def weights(model: Model) -> dict[str, Array]:
    rng = np.random.default_rng(0)
    return {
        spec.name: (rng.standard_normal(spec.shape) * 0.25 + (spec.role == "norm")).astype(
            np.float32
        )
        for spec in model.parameters()
    }


def attention_of(limits: Limits) -> Attention:
    return Attention(limits.window, limits.sink, limits.context or 512)


class Engine:
    """The interface of `runtime.engine.Engine`; every call computes the whole text anew."""

    def __init__(self, reference: NumpyReference, limits: Limits) -> None:
        self.reference = reference
        self.limits = limits
        self.texts: dict[int, list[int]] = {}

    def add_sequence(self, sequence: int) -> None:
        assert sequence not in self.texts and len(self.texts) < self.limits.batch
        self.texts[sequence] = []

    def remove_sequence(self, sequence: int) -> None:
        del self.texts[sequence]

    def fork_sequence(self, parent: int, child: int, position: int = -1) -> None:
        text = self.texts[parent]
        self.texts[child] = text[: len(text) if position == -1 else position]

    def pop(self, sequence: int, count: int) -> None:
        assert 0 < count < len(self.texts[sequence])
        del self.texts[sequence][-count:]

    def feed(self, sequence: int, tokens: Sequence[int]) -> Array:
        """Logits [n, vocab] after each of the tokens, at most a chunk of them."""
        assert 0 < len(tokens) <= self.limits.chunk
        text = self.texts[sequence]
        text += tokens
        assert len(text) <= (self.limits.context or math.inf)
        return self.reference.logits(text, range(len(text) - len(tokens), len(text)))

    def prefill(self, sequence: int, tokens: Sequence[int]) -> Array:
        for start in range(0, len(tokens), self.limits.chunk):
            logits = self.feed(sequence, tokens[start : start + self.limits.chunk])
        return logits[-1]

    def decode(self, sequence: int, token: int) -> Array:
        return self.feed(sequence, [token])[-1]

    def batch_prefill(self, parts: Mapping[int, Sequence[int]]) -> Array:
        assert sum(map(len, parts.values())) <= self.limits.chunk
        return np.stack([self.feed(s, part)[-1] for s, part in parts.items()])

    def batch_decode(self, tokens: Mapping[int, int]) -> Array:
        return np.stack([self.decode(s, token) for s, token in tokens.items()])

    def verify_tokens(self, sequence: int, tokens: Sequence[int]) -> Array:
        return self.feed(sequence, tokens)

    def from_embeddings(self, sequence: int, tokens: Sequence[int]) -> Array:
        return self.feed(sequence, tokens)[-1]

    def from_hidden(self, name: str, parts: Mapping[int, Sequence[int]]) -> Array:
        assert sum(map(len, parts.values())) <= self.limits.chunk
        return np.stack([self.feed(s, part)[-1] for s, part in parts.items()])


def outcome(
    model: Model,
    weights: Mapping[str, Array],
    engine: type[Engine] = Engine,
    decoder: type[NumpyReference] = NumpyReference,
    limits: Limits = LIMITS,
    engine_weights: Mapping[str, Array] | None = None,
) -> dict[str, Scenario]:
    """Every scenario's result, by name."""
    reference = NumpyReference(model, weights, attention_of(limits))
    prompt = limits.tokens("greedy", limits.prompt(7))
    count = max(0, min(20, limits.room - len(prompt)))
    greedy = Greedy(prompt, tuple(reference.greedy(prompt, count)))
    plan = plan_contexts(limits, greedy)
    rows = reference_rows(reference, [c for some in plan.values() for c in some])
    subject = engine(decoder(model, engine_weights or weights, attention_of(limits)), limits)
    results = run_scenarios(
        subject, limits, greedy, rows, FLOAT32, reset=lambda: subject.texts.clear()
    )
    return {result.name: result for result in results}


def failing(results: Mapping[str, Scenario]) -> set[str]:
    return {name for name, result in results.items() if result.failures(FLOAT32)}


def skipped(results: Mapping[str, Scenario]) -> set[str]:
    return {name for name, result in results.items() if result.skipped}


ALL = {name for name, _, _ in scenarios.SCENARIOS}


@pytest.mark.parametrize("limits", [LIMITS, SLIDING], ids=["full", "sliding"])
def test_a_right_engine_passes(model: Model, weights: dict[str, Array], limits: Limits) -> None:
    results = outcome(model, weights, limits=limits)
    assert failing(results) == set()
    # The runtime forks a sliding window within its sinks only, and here are none.
    assert skipped(results) == ({"full_context", "fork"} if limits.window else {"window_wrap"})
    assert len(results["decode"].deviations) == limits.decode_steps + 1
    ran = [result for result in results.values() if not result.skipped]
    assert all(result.deviations and result.top1 == 1 for result in ran)
    # The fake engine runs the very code of the reference, and batches of other sizes.
    assert max(result.worst("nmse") for result in ran) < 1e-11


@pytest.mark.parametrize(
    ("changes", "missing"),
    [
        ({"context": 1, "chunk": 1}, ALL - {"prefill", "full_context"}),
        ({"context": 5, "chunk": 5}, {"window_wrap", "ragged_batch", "functions"}),
        ({"batch": 1}, {"window_wrap", "ragged_batch", "fork"}),
        ({"batch": 4, "chunk": 3}, {"window_wrap", "ragged_batch"}),
        ({"batch": 2, "chunk": 2}, {"window_wrap"}),
        ({"chunk": 1}, {"window_wrap", "ragged_batch"}),
        ({"longest": 60}, {"window_wrap", "full_context"}),
        ({"context": None, "window": 1}, {"full_context", "fork", "rollback"}),
        ({"context": None, "window": 2}, {"full_context", "fork"}),
        ({"context": None, "window": 300}, {"full_context", "fork"}),
        ({"context": None, "window": 390}, {"full_context", "fork", "window_wrap"}),
    ],
    ids=lambda value: str(value if isinstance(value, dict) else sorted(value)),
)
def test_small_limits_are_kept_and_skips_have_reasons(
    model: Model, weights: dict[str, Array], changes: dict[str, int], missing: set[str]
) -> None:
    """The fake engine asserts that batch, chunk and context are never exceeded."""
    results = outcome(model, weights, limits=dataclasses.replace(LIMITS, **changes))
    assert failing(results) == set()
    assert skipped(results) == missing
    for name in missing:
        assert len(results[name].skipped.split()) >= 4
        assert results[name].to_json(FLOAT32)["skipped"]


# ---------------------------------------------------------------------------------------------
# Faults of the cache and of attention


class NewestKeyUnseen(NumpyReference):
    """Attention one key short: the token itself is not among the keys."""

    def visible(self, queries: Any, keys: Any) -> Any:
        mask = super().visible(queries, keys)
        own = (queries[:, None] == keys[None, :]) & (queries[:, None] > 0)
        return mask & ~own


class OneKeyTooMany(NumpyReference):
    """Attention that reads one row behind the text (here: the next token's)."""

    def visible(self, queries: Any, keys: Any) -> Any:
        return super().visible(queries + 1, keys)


class FirstKeyUnseen(NumpyReference):
    def visible(self, queries: Any, keys: Any) -> Any:
        return super().visible(queries, keys) & ((keys > 0)[None, :] | (queries == 0)[:, None])


class WindowOneTooLong(NumpyReference):
    def visible(self, queries: Any, keys: Any) -> Any:
        longer = dataclasses.replace(self.attention, window=(self.attention.window or 0) + 1)
        return type(self).__mro__[1](self.model, self.weights, longer).visible(queries, keys)


class LastPositionOff(NumpyReference):
    """The newest token is rotated as if it stood one further."""

    def _rotate(self, x: Any, positions: Any, rope: Any) -> Any:
        off = (positions == positions[-1]) * (positions > 0)
        return super()._rotate(x, positions + off, rope)


class DecodeForgets(Engine):
    """A decoded token's key and value are not kept."""

    def decode(self, sequence: int, token: int) -> Array:
        logits = super().decode(sequence, token)
        self.texts[sequence].pop()
        return logits


class DecodeRepeats(Engine):
    """Once, a token is entered twice, so that all later positions are off by one."""

    def decode(self, sequence: int, token: int) -> Array:
        if len(self.texts[sequence]) == 60:
            self.texts[sequence].append(token)
        return super().decode(sequence, token)


class ChunksApart(Engine):
    """A chunk does not see those before it in the same prompt."""

    def prefill(self, sequence: int, tokens: Sequence[int]) -> Array:
        if len(tokens) > self.limits.chunk:
            rest = len(tokens) % self.limits.chunk or self.limits.chunk
            logits = self.reference.logits(tokens[-rest:], [rest - 1])[0]
            self.texts[sequence] += tokens
            return logits
        return super().prefill(sequence, tokens)


class ForkShares(Engine):
    """Parent and child write to the same pages."""

    def fork_sequence(self, parent: int, child: int, position: int = -1) -> None:
        super().fork_sequence(parent, child, position)
        if position == -1:
            self.texts[child] = self.texts[parent]


class ForkCutsShort(Engine):
    def fork_sequence(self, parent: int, child: int, position: int = -1) -> None:
        super().fork_sequence(parent, child, position)
        self.texts[child].pop()


class PopsTooFew(Engine):
    def pop(self, sequence: int, count: int) -> None:
        if count > 1:
            super().pop(sequence, count - 1)


class RowsSwapped(Engine):
    def batch_decode(self, tokens: Mapping[int, int]) -> Array:
        return super().batch_decode(tokens)[::-1]


class RowMissing(Engine):
    def batch_prefill(self, parts: Mapping[int, Sequence[int]]) -> Array:
        return super().batch_prefill(parts)[:1]


class StatesOfTheFirst(Engine):
    def from_hidden(self, name: str, parts: Mapping[int, Sequence[int]]) -> Array:
        return np.stack([self.feed(s, part)[0] for s, part in parts.items()])


class VerifyShifted(Engine):
    def verify_tokens(self, sequence: int, tokens: Sequence[int]) -> Array:
        return np.roll(super().verify_tokens(sequence, tokens), 1, axis=0)


class ContextOneShort(Engine):
    """The last place of the context is not there."""

    def feed(self, sequence: int, tokens: Sequence[int]) -> Array:
        logits = super().feed(sequence, tokens)
        if len(self.texts[sequence]) == self.limits.context:
            raise RuntimeError("Check failed: no page left")
        return logits


CACHE_FAULTS: list[tuple[type[Engine], type[NumpyReference], Limits, set[str]]] = [
    # `at least` these scenarios must fail
    (Engine, NewestKeyUnseen, LIMITS, ALL - {"window_wrap"}),
    (Engine, OneKeyTooMany, LIMITS, {"prefill", "batch_verify"}),
    (Engine, FirstKeyUnseen, LIMITS, ALL - {"window_wrap"}),
    (Engine, LastPositionOff, LIMITS, ALL - {"window_wrap"}),
    (Engine, WindowOneTooLong, SLIDING, {"window_wrap", "decode", "chunked_prefill"}),
    (DecodeForgets, NumpyReference, LIMITS, {"decode", "greedy", "ragged_batch", "fork"}),
    (DecodeRepeats, NumpyReference, LIMITS, {"decode"}),
    (ChunksApart, NumpyReference, LIMITS, {"chunked_prefill", "full_context"}),
    (ChunksApart, NumpyReference, SLIDING, {"chunked_prefill", "window_wrap"}),
    (ForkShares, NumpyReference, LIMITS, {"fork"}),
    (ForkCutsShort, NumpyReference, LIMITS, {"fork"}),
    (PopsTooFew, NumpyReference, LIMITS, {"rollback"}),
    (RowsSwapped, NumpyReference, LIMITS, {"ragged_batch"}),
    (RowMissing, NumpyReference, LIMITS, {"ragged_batch"}),
    (VerifyShifted, NumpyReference, LIMITS, {"batch_verify"}),
    (StatesOfTheFirst, NumpyReference, LIMITS, {"functions"}),
    (ContextOneShort, NumpyReference, LIMITS, {"full_context"}),
]


@pytest.mark.parametrize(
    ("engine", "decoder", "limits", "expected"),
    CACHE_FAULTS,
    ids=[
        f"{e.__name__}-{d.__name__}-{'window' if limits.window else 'full'}"
        for e, d, limits, _ in CACHE_FAULTS
    ],
)
def test_a_fault_of_the_cache_is_caught(
    model: Model,
    weights: dict[str, Array],
    engine: type[Engine],
    decoder: type[NumpyReference],
    limits: Limits,
    expected: set[str],
) -> None:
    found = failing(outcome(model, weights, engine, decoder, limits))
    assert expected <= found
    if engine is not Engine and engine not in (DecodeForgets, DecodeRepeats, ChunksApart):
        assert found == expected  # and only where it lies


def test_a_fault_is_far_above_the_thresholds_of_short_floats(
    model: Model, weights: dict[str, Array]
) -> None:
    results = outcome(model, weights, decoder=NewestKeyUnseen)
    assert results["decode"].mean("nmse") > 50 * THRESHOLDS["float16"].nmse
    for dtype in ("float16", "bfloat16"):
        assert results["decode"].failures(THRESHOLDS[dtype])


# ---------------------------------------------------------------------------------------------
# Faults of numbers


@pytest.mark.parametrize(
    "change",
    [
        lambda w: w["model.layers.1.mlp.down_proj.weight"].__imul__(1.001),
        lambda w: w["model.layers.0.self_attn.k_norm.weight"].__imul__(1.01),
        lambda w: w["model.layers.0.self_attn.qkv_proj.weight"][70].__iadd__(0.05),
        lambda w: w["lm_head.weight"][3].__imul__(1.01),
    ],
    ids=["one layer scaled by 0.1 %", "a norm by 1 %", "one row", "one token's row"],
)
def test_a_perturbed_weight_is_caught(
    model: Model, weights: dict[str, Array], change: Callable[[dict[str, Array]], Any]
) -> None:
    other = {name: weight.copy() for name, weight in weights.items()}
    change(other)
    assert failing(outcome(model, weights, engine_weights=other)) == ALL - {"window_wrap"}


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("every", [True, False], ids=["all logits", "one logit"])
def test_poison_fails(model: Model, weights: dict[str, Array], poison: float, every: bool) -> None:
    class Poisoned(Engine):
        def decode(self, sequence: int, token: int) -> Array:
            logits = super().decode(sequence, token)
            # A token that nobody would choose: the rest of the row is right.
            logits[slice(None) if every else int(logits.argmin())] = poison
            return logits

    results = outcome(model, weights, Poisoned)
    assert {"decode", "greedy", "fork", "rollback"} <= failing(results)
    assert "NaN or infinity at 40 of 41" in results["decode"].failures(FLOAT32)[0]
    report = report_of(results)
    json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert report.failures and "failed" in report.to_text()


def test_an_engine_that_raises_fails_one_scenario(model: Model, weights: dict[str, Array]) -> None:
    class Raises(Engine):
        def pop(self, sequence: int, count: int) -> None:
            raise RuntimeError("Traceback\nCheck failed: n <= seq_length")

    results = outcome(model, weights, Raises)
    assert failing(results) == {"rollback"}
    assert "broke off: Check failed" in results["rollback"].failures(FLOAT32)[0]
    assert results["full_context"].deviations  # those after it still ran


def report_of(results: Mapping[str, Scenario]) -> VerifyReport:
    from pathlib import Path

    return VerifyReport(
        Path("m.so"), "float32", "numpy", FLOAT32, tuple(results.values()), None, None, ("a note",)
    )


def test_report_says_what_failed_and_what_was_skipped(
    model: Model, weights: dict[str, Array]
) -> None:
    good = report_of(outcome(model, weights))
    assert good.failures == [] and good.to_json()["ok"]
    text = good.to_text()
    assert "window_wrap     skipped: the library has full attention" in text
    assert "the same greedy text for all 20 tokens" in text and "a note" in text
    assert text.endswith("verify: passed")

    bad = report_of(outcome(model, weights, PopsTooFew))
    assert bad.failures and all(failure.startswith("rollback: ") for failure in bad.failures)
    assert not bad.to_json()["ok"] and bad.to_text().endswith("verify: failed")
    assert any("MISSED" in line and "rollback" in line for line in bad.to_text().splitlines())


def test_nothing_compared_is_a_failure() -> None:
    results = [Scenario(name, "", skipped="no room for it at all") for name in ALL]
    assert report_of({r.name: r for r in results}).failures == ["no scenario could run"]
    assert Scenario("decode", "").failures(FLOAT32) == ["compared nothing"]


# ---------------------------------------------------------------------------------------------
# Numbers of one position


def test_compare_by_hand() -> None:
    reference = np.array([1.0, 3.0, 0.0, -4.0], np.float32)
    row = Row.of(reference)
    assert row.top_two == (1, 2.0)
    library = np.array([1.0, 3.0, 0.5, -4.0], np.float32)
    found = compare(row, library, FLOAT32)
    p, q = (np.exp(x.astype(float)) / np.exp(x.astype(float)).sum() for x in (reference, library))
    assert found.kl == pytest.approx(float(p @ np.log(p / q)), rel=1e-9)
    assert found.nmse == pytest.approx(0.25 / 4 / reference.astype(float).var())
    assert (found.max_error, found.max_abs) == (0.5, 0.125)
    assert found.agrees and found.finite and found.doubtful(FLOAT32)
    assert found.lead == pytest.approx(2 / reference.astype(float).std())
    assert found.decided(dataclasses.replace(FLOAT32, margin=0.7))
    assert not found.decided(dataclasses.replace(FLOAT32, margin=0.8))
    assert not compare(row, library[::-1].copy(), FLOAT32).agrees
    assert not compare(row, reference, FLOAT32).doubtful(FLOAT32)


def test_a_common_shift_is_an_error() -> None:
    """Softmax would not see it; a wrong bias of the head would pass."""
    reference = np.random.default_rng(1).standard_normal(50).astype(np.float32)
    assert compare(Row.of(reference), reference + 1, FLOAT32).nmse > 0.5


def test_top_rows_bound_the_full_ones() -> None:
    rng = np.random.default_rng(2)
    reference = (3 * rng.standard_normal(500)).astype(np.float32)
    library = reference + (0.1 * rng.standard_normal(500)).astype(np.float32)
    full, top = (compare(Row.of(reference, k), library, FLOAT32) for k in (None, 64))
    assert top.agrees == full.agrees and top.lead == full.lead
    assert 0 < top.kl <= full.kl  # tokens taken together cannot be told apart
    assert top.nmse == pytest.approx(full.nmse, rel=0.5)
    library[np.argmin(reference)] = np.nan  # a token that is not listed
    assert not compare(Row.of(reference, 64), library, FLOAT32).finite


def test_an_ill_conditioned_position_is_eased_by_its_own_noise() -> None:
    reference = np.random.default_rng(3).standard_normal(60).astype(np.float32)
    library = reference + np.float32(3e-3) * np.sign(reference[::-1])
    row = Row.of(reference)
    found = compare(row, library, FLOAT32)
    assert found.nmse > FLOAT32.worst_nmse and found.ease == 1
    assert compare(dataclasses.replace(row, noise=1e-12), library, FLOAT32) == found

    eased = compare(dataclasses.replace(row, noise=1e-4), library, FLOAT32)
    assert eased.nmse == found.nmse  # what is reported stays
    assert eased.ease == pytest.approx(1e-4 / (1e-8 / 4))
    assert eased.eased_nmse < FLOAT32.nmse and not eased.doubtful(FLOAT32)
    result = Scenario("decode", "", deviations=[eased])
    assert result.failures(FLOAT32) == [] and result.to_json(FLOAT32)["ill_conditioned"] == 1
    assert "ill-conditioned positions: 1, where" in report_of({"decode": result}).to_text()

    other = compare(dataclasses.replace(row, noise=1e-4), reference[::-1].copy(), FLOAT32)
    assert other.doubtful(FLOAT32)  # another row altogether is not eased away
    poisoned = compare(dataclasses.replace(row, noise=1.0), library * np.nan, FLOAT32)
    assert poisoned.doubtful(FLOAT32)


def test_thresholds_grow_with_the_precision_lost() -> None:
    single, half, brain = (
        dataclasses.astuple(THRESHOLDS[d]) for d in ("float32", "float16", "bfloat16")
    )
    assert all(a < b < c for a, b, c in zip(single, half, brain, strict=True))
