"""What web-llm refuses before it loads, and what comes after: nothing stays broken in the page.

One page is asked everything, in this order; each test looks at its part.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from browser_harness import (
    TINY_CHECKPOINT,
    WebModel,
    command,
    load_server_module,
    run_steps,
    served,
    shared_json,
)
from retrace import retrace

from mlc_compile.runtime.engine import Engine

pytestmark = pytest.mark.browser

SHORT = {"prompt": "It was a dark night, and", "max_tokens": 12, "temperature": 0,
         "ignore_eos": True}  # fmt: skip
IDS_DIFFER = "weight and compiled-program parameter schema IDs differ"

STEPS: Mapping[str, Mapping[str, Any]] = {
    "wrong library": {"do": "load", "model": "wrong-library"},
    "wrong weights": {"do": "load", "model": "wrong-weights"},
    "changed manifest": {"do": "load", "model": "changed-manifest"},
    "feature by record": {"do": "load", "model": "half"},
    "feature by manifest": {"do": "load", "model": "half", "record": {"required_features": None}},
    "small binding": {
        "do": "load",
        "model": "tiny",
        "limits": {"maxStorageBufferBindingSize": 100_000},
    },
    "without manifest": {"do": "load", "model": "random", "record": {"model_manifest": None}},
    "without manifest: text": {"do": "ask", "request": SHORT},
    "second model": {"do": "load", "model": "tiny"},
    "second model: text": {"do": "ask", "request": SHORT},
    "fault": {"do": "raise"},
    "page reloaded": {"do": "reload"},
    "close while loading": {"do": "close_while_loading", "model": "tiny"},
    "opened again": {"do": "load", "model": "random"},
    "opened again: text": {"do": "ask", "request": SHORT},
}
"""Name -> step of run.mjs. A fault ends a library, so that what follows it is a fresh load."""


def other(source: WebModel, out: Path, library: Path) -> Path:
    """The parameters of `source` with another library."""
    shutil.copytree(source.directory, out, ignore=shutil.ignore_patterns("*.so", "*.wasm"))
    shutil.copy(library, out / "model.wasm")
    return out


def other_weights(tiny: WebModel, out: Path) -> Path:
    """The checkpoint of `tiny` in another scheme, with its library."""
    command("convert_weight", TINY_CHECKPOINT, "--quantization", "q8f32_1", "-o", out)
    for name in ("mlc-chat-config.json", "tokenizer.json", "tokenizer_config.json", "model.wasm"):
        shutil.copy(tiny.directory / name, out / name)
    return out


def changed_manifest(tiny: WebModel, out: Path) -> Path:
    """Tasks that the manifest's own id does not cover."""
    other(tiny, out, tiny.wasm)
    file = out / "mlc-model-manifest.json"
    document = json.loads(file.read_text())
    document["tasks"]["embeddings"] = document["tasks"]["chat.completions"]
    file.write_text(json.dumps(document))
    return out


@pytest.fixture(scope="module")
def answers(
    browser: str, model: Callable[[str], WebModel], web_folder: Path, tmp_path_factory: Any
) -> Mapping[str, Mapping[str, Any]]:
    """By the name of the step."""

    def ask() -> list[dict[str, Any]]:
        folder = tmp_path_factory.mktemp("refused")
        tiny, random, half = map(model, ("tiny", "random", "half"))
        directories = [
            *(m.directory for m in (tiny, random, half)),
            other(tiny, folder / "wrong-library", random.wasm),
            other_weights(tiny, folder / "wrong-weights"),
            changed_manifest(tiny, folder / "changed-manifest"),
        ]
        with served(*directories) as url:
            return run_steps(url, list(STEPS.values()), seconds=420)

    return dict(zip(STEPS, shared_json(web_folder, "refusals", ask), strict=True))


@pytest.mark.parametrize(
    ("step", "says"),
    [
        ("wrong library", IDS_DIFFER),
        ("wrong weights", IDS_DIFFER),
        ("changed manifest", "interface_id does not match its tasks"),
        ("feature by record", "shader-f16"),
        ("feature by manifest", 'unsupported WebGPU feature "shader-f16"'),
        ("small binding", "but this device exposes 100000"),
    ],
)
def test_refused(answers: Mapping[str, Mapping[str, Any]], step: str, says: str) -> None:
    assert says in answers[step]["error"]
    # Neither kernels nor cache had been made.
    assert not any("shader modules" in text for text in answers[step]["progress"])


@pytest.mark.parametrize("step", ["changed manifest", "feature by record"])
def test_refused_before_the_weights_are_fetched(
    answers: Mapping[str, Mapping[str, Any]], step: str
) -> None:
    assert answers[step]["progress"] == []


@pytest.mark.parametrize(
    ("step", "name"),
    [("without manifest", "random"), ("second model", "tiny"), ("opened again", "random")],
)
def test_loads_and_writes_after_what_came_before(
    answers: Mapping[str, Mapping[str, Any]],
    model: Callable[[str], WebModel],
    step: str,
    name: str,
) -> None:
    assert "error" not in answers[step], answers[step]
    built = model(name)
    engine = Engine.load(built.cpu, built.directory, max_batch=1)
    (result,) = retrace(engine, [answers[f"{step}: text"]], [SHORT])
    assert len(result.tokens) == 12
    assert result.differences() == []


def test_an_error_of_the_library_reaches_the_console(
    answers: Mapping[str, Mapping[str, Any]],
) -> None:
    fault = answers["fault"]
    assert "error" in fault
    said = [line for line in fault["console"] if line.startswith("error")]
    assert any("ValueError" in line and "expect Tensor with ndim 1" in line for line in said), said


def test_the_page_was_closed_in_the_middle(answers: Mapping[str, Mapping[str, Any]]) -> None:
    at = answers["close while loading"]["at"]
    assert "Finish" not in at and "Error" not in at
    assert not [line for line in answers["opened again"]["console"] if line.startswith("error")]


def test_records_say_what_a_model_needs(model: Callable[[str], WebModel]) -> None:
    serve = load_server_module()
    half = serve.Model.open(model("half").directory, None).entry("half")["record"]
    tiny_entry = serve.Model.open(model("tiny").directory, None).entry("tiny")
    tiny = tiny_entry["record"]
    assert half["required_features"] == ["shader-f16"]
    assert tiny["required_features"] == []
    assert tiny["model_manifest"] == "mlc-model-manifest.json"
    assert tiny["buffer_size_required_bytes"] >= 2048 * 256 // 2  # the table of embeddings
    assert tiny["vram_required_MB"] * 1e6 > tiny_entry["about"]["weights_bytes"]
    plan = tiny_entry["about"]["memory_plan"]
    assert plan["total"] == pytest.approx(tiny["vram_required_MB"] * 1e6, rel=1e-3)
