"""A library's functions one by one on Dawn (Node, npm `webgpu`) against numpy.

Dawn is what Chromium runs WebGPU on; here its software adapter computes what a test can name:
embeddings, logits after each chunk of a prompt and after each decoded token, and every sampling
helper. The reference is the numpy decoder on the stored weights and numpy's own formulas.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser_harness import SIZES, WEB_LLM, WebModel, drive
from numpy.typing import NDArray
from retrace import possible_ranks

from mlc_compile.models.detect import load_model
from mlc_compile.quantization.scheme import get_scheme
from mlc_compile.runtime.reference import Attention, NumpyReference, stored_weights
from mlc_compile.runtime.sampling import Sampling, penalise_by_numpy
from mlc_compile.weights.checkpoint import open_checkpoint

pytestmark = pytest.mark.browser

CHUNK = SIZES["prefill_chunk_size"]
LENGTHS = (CHUNK, 37)  # of the chunks of the prompt: a full one and an odd rest
DECODED = 3
# float32 logits of order 20, summed in another order (CONTRIBUTING.md, "Tolerances").
ATOL = 2e-3
# A cumulative probability in float32, over as many terms as the vocabulary has.
NEAR = 1e-5


@dataclass
class Calls:
    """The request of dawn.mjs, with its input files."""

    folder: Path
    calls: list[dict[str, Any]] = field(default_factory=list)
    files: int = 0

    def tensor(self, array: NDArray[Any], name: str | None = None) -> dict[str, Any]:
        self.files += 1
        file = f"in{self.files}.bin"
        np.ascontiguousarray(array).tofile(self.folder / file)
        given = {"file": file, "shape": list(array.shape), "dtype": str(array.dtype)}
        return given | ({"name": name} if name else {})

    def call(self, function: str, *args: Any, result: str | None = None) -> None:
        self.calls.append({"function": function, "args": list(args), "result": result})

    def save(self, ref: str, at: int | None = None) -> None:
        """Into the file `ref`.bin, or `ref`.`at`.bin."""
        file = f"{ref}.bin" if at is None else f"{ref}.{at}.bin"
        self.calls.append(
            {"save": [{"ref": ref, "file": file} | ({} if at is None else {"at": at})]}
        )


PARAMS = {"params": True}


def shape(*extents: int) -> dict[str, Any]:
    return {"shape_tuple": list(extents)}


def forward(calls: Calls, cache: str, function: str, length: int, name: str, *args: Any) -> None:
    """One forward call on sequence 0; its logits are saved as `name`."""
    kv = {"ref": cache}
    calls.call("global:vm.builtin.kv_state_begin_forward", kv, shape(0), shape(length))
    calls.call(function, *args, kv, PARAMS, result=name)
    calls.call("global:vm.builtin.kv_state_end_forward", kv)
    calls.save(name, 0)


def plan_model(calls: Calls, tokens: NDArray[np.int32], hidden: int) -> None:
    """Chunks, then single tokens; by the pair that web-llm takes and by the batched pair."""
    starts = np.cumsum([0, *LENGTHS, *[1] * DECODED])
    parts = [tokens[a:b] for a, b in pairwise(starts)]
    for i, part in enumerate(parts):
        calls.call("embed", calls.tensor(part), PARAMS, result=f"embed{i}")
        calls.save(f"embed{i}")
    for cache, prefill, decode in (
        ("single", "prefill", "decode"),
        ("batch", "batch_prefill", "batch_decode"),
    ):
        calls.call(
            "create_tir_paged_kv_cache",
            shape(1),
            shape(SIZES["context_window_size"]),
            shape(CHUNK),
            shape(16),
            shape(0),
            result=cache,
        )
        calls.call("global:vm.builtin.kv_state_add_sequence", {"ref": cache}, {"int": 0})
        for i, part in enumerate(parts):
            x = {"ref": f"embed{i}", "view": [1, len(part), hidden]}
            if len(part) == 1:
                forward(calls, cache, decode, 1, f"{cache}{i}", x)
            elif cache == "single":
                forward(calls, cache, prefill, len(part), f"{cache}{i}", x)
            else:
                at = calls.tensor(np.array([len(part) - 1], np.int32))
                forward(calls, cache, prefill, len(part), f"{cache}{i}", x, at)


@dataclass
class Draws:
    """What the sampling helpers are given."""

    logits: NDArray[np.float32]
    uniforms: NDArray[np.float32]
    tokens: NDArray[np.int32]
    counts: NDArray[np.int32]
    bias: NDArray[np.float32]
    mask: NDArray[np.bool_]


TEMPERATURES = (1.0, 0.6, 1e-6)
TOP_P = (1e-5, 0.3, 0.9, 1.0)
PENALTIES = Sampling(presence_penalty=0.5, frequency_penalty=0.25, repetition_penalty=1.3)


def make_draws(vocab: int) -> Draws:
    random = np.random.default_rng(11)
    return Draws(
        logits=random.normal(0, 3, vocab).astype(np.float32),
        uniforms=np.append(random.random(46), [0.0, 0.999999]).astype(np.float32),
        tokens=random.permutation(vocab)[:9].astype(np.int32),
        counts=random.integers(1, 5, 9).astype(np.int32),
        bias=random.normal(0, 4, 9).astype(np.float32),
        mask=random.random(vocab) < 0.3,
    )


def plan_sampling(calls: Calls, draws: Draws) -> None:
    vocab = len(draws.logits)
    row = draws.logits.reshape(1, vocab)
    zero, zeros = np.zeros(1, np.int32), np.zeros(9, np.int32)
    for i, temperature in enumerate(TEMPERATURES):
        calls.call(
            "softmax_with_temperature",
            calls.tensor(row.reshape(1, 1, vocab)),
            calls.tensor(np.array([temperature], np.float32)),
            result=f"probs{i}",
        )
        calls.save(f"probs{i}")
        probs = {"ref": f"probs{i}", "view": [1, vocab]}
        calls.call("argsort_probs", probs, result=f"sorted{i}")
        calls.save(f"sorted{i}", 0)
        calls.save(f"sorted{i}", 1)
        for j, top_p in enumerate(TOP_P):
            calls.call(
                "sample_with_top_p",
                {"ref": f"sorted{i}", "at": 0},
                {"ref": f"sorted{i}", "at": 1},
                calls.tensor(draws.uniforms),
                calls.tensor(np.zeros(len(draws.uniforms), np.int32)),
                calls.tensor(np.array([top_p], np.float32)),
                result=f"sampled{i}{j}",
            )
            calls.save(f"sampled{i}{j}")
    calls.call(
        "apply_penalty_inplace",
        calls.tensor(row, "penalised"),
        calls.tensor(zero),
        calls.tensor(zeros),
        calls.tensor(draws.tokens),
        calls.tensor(draws.counts),
        calls.tensor(
            np.array(
                [
                    [
                        PENALTIES.presence_penalty,
                        PENALTIES.frequency_penalty,
                        PENALTIES.repetition_penalty,
                    ]
                ],
                np.float32,
            )
        ),
    )
    calls.save("penalised")
    calls.call(
        "apply_logit_bias_inplace",
        calls.tensor(row, "biased"),
        calls.tensor(zeros),
        calls.tensor(draws.tokens),
        calls.tensor(draws.bias),
    )
    calls.save("biased")
    packed = np.packbits(draws.mask, bitorder="little")
    words = np.zeros(-(-vocab // 32) * 4, np.uint8)
    words[: len(packed)] = packed
    calls.call(
        "apply_bitmask_inplace",
        calls.tensor(row, "masked"),
        calls.tensor(zero),
        calls.tensor(words.view(np.int32).reshape(1, -1)),
    )
    calls.save("masked")


@dataclass
class Outcome:
    """What came back, and the inputs."""

    model: WebModel
    reference: NumpyReference
    tokens: NDArray[np.int32]
    draws: Draws
    saved: Mapping[str, NDArray[Any]]
    said: list[str]
    active_vocab: int


@pytest.fixture(scope="module", params=["tiny", pytest.param("random", marks=pytest.mark.slow)])
def outcome(
    request: pytest.FixtureRequest,
    dawn: dict[str, str],
    model: Callable[[str], WebModel],
    tmp_path_factory: pytest.TempPathFactory,
) -> Outcome:
    built = model(request.param)
    folder = tmp_path_factory.mktemp("dawn")
    checkpoint = open_checkpoint(built.checkpoint)
    loaded = load_model(checkpoint.config, where=str(built.checkpoint))
    scheme = get_scheme({"tiny": "q4f32_1", "random": "q0f32"}[request.param])
    weights = stored_weights(loaded, scheme, built.directory)
    attention = Attention(window=None, sink=0, context=SIZES["context_window_size"])
    config = loaded.config
    active = 257 if request.param == "random" else config.vocab_size
    tokens = np.random.default_rng(3).integers(0, active, sum(LENGTHS) + DECODED, np.int32)
    draws = make_draws(config.vocab_size)
    calls = Calls(folder)
    plan_model(calls, tokens, config.hidden_size)
    plan_sampling(calls, draws)
    answer = drive(
        "dawn.mjs",
        {
            "web_llm": str(WEB_LLM),
            "wasm": str(built.wasm),
            "params": str(built.directory),
            "folder": str(folder),
            "calls": calls.calls,
        },
        seconds=240,
        env=dawn,
    )
    assert "error" not in answer, (answer["error"], answer["said"])
    saved = {
        file.removesuffix(".bin"): np.fromfile(folder / file, about["dtype"]).reshape(
            about["shape"]
        )
        for file, about in answer["saved"].items()
    }
    reference = NumpyReference(loaded, weights, attention)
    return Outcome(built, reference, tokens, draws, saved, answer["said"], active)


def test_dawn_finds_no_fault(outcome: Outcome) -> None:
    assert [line for line in outcome.said if "WebGPU:" in line or "rror" in line] == []


def test_embed(outcome: Outcome) -> None:
    table = outcome.reference.weights["model.embed_tokens.weight"]
    starts = np.cumsum([0, *LENGTHS, *[1] * DECODED])
    for i, (a, b) in enumerate(pairwise(starts)):
        # A row is dequantised or copied: one rounding at most.
        np.testing.assert_allclose(
            outcome.saved[f"embed{i}"], table[outcome.tokens[a:b]], rtol=1e-6, atol=0
        )


@pytest.mark.parametrize("cache", ["single", "batch"])
def test_logits_after_chunks_and_decoded_tokens(outcome: Outcome, cache: str) -> None:
    ends = np.cumsum([*LENGTHS, *[1] * DECODED]) - 1
    expected = outcome.reference.logits(outcome.tokens.tolist(), ends.tolist())
    for i in range(len(ends)):
        got = outcome.saved[f"{cache}{i}.0"]
        assert got.shape == (1, 1, expected.shape[1])
        np.testing.assert_allclose(got[0, 0], expected[i], rtol=0, atol=ATOL)


def expected_probs(outcome: Outcome, temperature: float) -> NDArray[np.float64]:
    logits = outcome.draws.logits.astype(np.float64)
    logits[outcome.active_vocab :] = -np.inf
    powers = np.exp((logits - logits.max()) / temperature)
    return np.asarray(powers / powers.sum())


@pytest.mark.parametrize("i", range(len(TEMPERATURES)))
def test_softmax(outcome: Outcome, i: int) -> None:
    got = outcome.saved[f"probs{i}"].reshape(-1)
    # exp of float32 arguments up to 40: an ulp of the argument, and the sum of all.
    np.testing.assert_allclose(got, expected_probs(outcome, TEMPERATURES[i]), rtol=2e-5, atol=1e-9)


@pytest.mark.parametrize("i", range(len(TEMPERATURES)))
def test_argsort(outcome: Outcome, i: int) -> None:
    probs = outcome.saved[f"probs{i}"].reshape(-1)
    order = np.argsort(-probs, kind="stable")
    np.testing.assert_array_equal(outcome.saved[f"sorted{i}.1"].reshape(-1), order)
    np.testing.assert_array_equal(outcome.saved[f"sorted{i}.0"].reshape(-1), probs[order])


@pytest.mark.parametrize("j", range(len(TOP_P)))
@pytest.mark.parametrize("i", range(len(TEMPERATURES)))
def test_top_p(outcome: Outcome, i: int, j: int) -> None:
    """Every draw, except that one next to a boundary may fall on its other side."""
    with np.errstate(divide="ignore"):
        logs = np.log(outcome.saved[f"probs{i}"].reshape(-1)).astype(np.float32)
    logs = np.maximum(logs, np.float32(-1e30))
    sampled = outcome.saved[f"sampled{i}{j}"]
    assert sampled.shape == outcome.draws.uniforms.shape
    order = outcome.saved[f"sorted{i}.1"].reshape(-1)
    sampling = Sampling(temperature=1.0, top_p=TOP_P[j])
    unsure = 0
    for uniform, token in zip(outcome.draws.uniforms.tolist(), sampled.tolist(), strict=True):
        ranks = possible_ranks(logs, sampling, uniform, NEAR)
        unsure += len(ranks) > 1
        assert token in order[ranks.start : ranks.stop], (uniform, token, ranks)
    assert unsure <= 8  # of 48: otherwise this would prove little


def test_penalties(outcome: Outcome) -> None:
    draws = outcome.draws
    counts = dict(zip(draws.tokens.tolist(), draws.counts.tolist(), strict=True))
    expected = penalise_by_numpy(draws.logits, counts, PENALTIES)
    np.testing.assert_allclose(outcome.saved["penalised"][0], expected, rtol=1e-6, atol=1e-6)


def test_bias(outcome: Outcome) -> None:
    expected = outcome.draws.logits.copy()
    expected[outcome.draws.tokens] += outcome.draws.bias
    np.testing.assert_allclose(outcome.saved["biased"][0], expected, rtol=1e-6, atol=1e-6)


def test_bitmask(outcome: Outcome) -> None:
    draws = outcome.draws
    lowest = np.finfo(np.float32).min
    expected = np.where(draws.mask, draws.logits, lowest)
    np.testing.assert_array_equal(outcome.saved["masked"][0], expected)
