"""The example page in headless Chromium, used by keyboard, and what it says when it cannot work."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from browser_harness import WebModel, drive_browser, served, shared_json

from mlc_compile.runtime.chat import ChatSession

pytestmark = pytest.mark.browser

QUESTION = "The old man looked at the sea, and"
TOKENS = 24


@pytest.fixture(scope="module")
def tiny(model: Callable[[str], WebModel]) -> WebModel:
    return model("tiny")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pictures")


def play(url: str, scene: str, folder: Path, seconds: int = 120, **more: Any) -> dict[str, Any]:
    """A scene of page.mjs. The page may have asked nobody but the local server."""
    request = {"url": url, "scene": scene, "folder": str(folder), **more}
    seen = drive_browser("page.mjs", request, seconds)
    assert "error" not in seen, seen
    assert seen["strangers"] == []
    return seen


@pytest.fixture(scope="module")
def conversation(
    browser: str, tiny: WebModel, pictures: Path, web_folder: Path
) -> Mapping[str, Any]:
    def make() -> dict[str, Any]:
        with served(tiny.directory) as url:
            return play(url, "conversation", pictures, 300, question=QUESTION, tokens=TOKENS) | {
                "pictures": {p.stem: p.read_bytes()[:8].hex() for p in pictures.iterdir()}
            }

    found: Mapping[str, Any] = shared_json(web_folder, "conversation", make)
    return found


def test_it_loads_with_progress(conversation: Mapping[str, Any]) -> None:
    loading = conversation["loading"]
    assert len(loading["marks"]) >= 3 and loading["marks"] == sorted(loading["marks"])
    assert "Compiling the GPU kernels" in loading["labels"]
    assert conversation["states"] == ["Ready", "Answering", "Ready"]
    # The page takes the reader to where the question goes.
    assert conversation["focus"] == "question"


def test_the_answer_is_the_cpu_librarys(conversation: Mapping[str, Any], tiny: WebModel) -> None:
    session = ChatSession.load(tiny.cpu, tiny.directory)
    expected = "".join(session.generate(QUESTION, max_tokens=TOKENS))
    assert conversation["question"] == QUESTION
    assert conversation["answer"].split() == expected.split()
    # After "New conversation" nothing is left of the first one.
    assert conversation["left"] == 0
    assert conversation["again"] == conversation["answer"]


def test_the_answer_streams(conversation: Mapping[str, Any]) -> None:
    grown = [n for n in conversation["grown"] if n]
    assert grown == sorted(grown)
    assert len(set(grown)) > TOKENS // 3
    assert conversation["stop"]


def test_stop(conversation: Mapping[str, Any]) -> None:
    assert "stopped" in conversation["stopped"]


def test_measurements(conversation: Mapping[str, Any]) -> None:
    for number in conversation["speed"]:
        assert float(number) > 0
    assert f"{TOKENS} tokens at" in conversation["foot"]
    memory = conversation["memory"]
    for row in ("Device, estimated", "Weights", "KV cache", "GPU buffers, now", "Scripts and WASM"):
        assert row in memory
    assert "swiftshader" in conversation["device"].lower()


def test_a_screen_reader_is_not_flooded(conversation: Mapping[str, Any]) -> None:
    spoken = [text for text in conversation["spoken"] if text]
    assert "Answering" in spoken[0]
    # A text of 24 tokens is a few announcements, and the last one ends the answer.
    assert 2 <= len(spoken) <= 8
    assert spoken[-1].endswith("End of the answer.")
    said = " ".join(spoken[1:]).replace("End of the answer.", "").split()
    assert said == conversation["answer"].split()


def test_accessibility(conversation: Mapping[str, Any]) -> None:
    found = conversation["accessibility"]
    assert found["unnamed"] == []
    assert found["language"] == "en" and found["headings"] == 1 and found["images"] == 0
    assert found["live"] == 1 and found["landmarks"] == ["main", "header", "aside"]
    for control in ("textbox: Your question", "slider: Temperature", "slider: Top-p",
                    "textbox: System prompt", "button: Send"):  # fmt: skip
        assert control in found["controls"]
    # By Tab alone one gets from the top of the page to the model and to the settings.
    assert conversation["tabs"][0] == "skip"
    reached = {"panel-toggle", "model", "load", "system", "temperature", "top-p", "max-tokens"}
    assert reached <= {*conversation["tabs"]}


def test_it_says_nothing_wrong_and_keeps_settings(conversation: Mapping[str, Any]) -> None:
    assert not [line for line in conversation["said"] if line.startswith(("error", "pageerror"))]
    assert conversation["kept"] == str(TOKENS)
    assert {"welcome", "ready", "answering", "answered"} <= {*conversation["pictures"]}
    assert set(conversation["pictures"].values()) == {"89504e470d0a1a0a"}  # PNG


@pytest.mark.parametrize(
    ("kind", "says", "more"),
    [
        ("no-webgpu", "This browser has no WebGPU", {"before": "delete Navigator.prototype.gpu"}),
        ("no-adapter", "No graphics adapter was found", {"webgpu": False}),
        ("no-f16", "q4f32_1", {"load": True, "model": "half"}),
        (
            "limits",
            "maxStorageBuffersPerShaderStage: 8 here, 10 needed",
            {
                "load": True,
                "before": "Object.defineProperty(GPUSupportedLimits.prototype, "
                "'maxStorageBuffersPerShaderStage', { get: () => 8 })",
            },
        ),
        (
            "no-server",
            "python examples/web/serve.py",
            {"before": "globalThis.fetch = () => Promise.reject(new TypeError('refused'))"},
        ),
        (
            "insecure",
            "secure context",
            {"before": "Object.defineProperty(globalThis, 'isSecureContext', { value: false })"},
        ),
    ],
)
def test_problems_are_explained(
    browser: str,
    model: Callable[[str], WebModel],
    pictures: Path,
    kind: str,
    says: str,
    more: dict[str, Any],
) -> None:
    with served(model("tiny").directory, model("half").directory) as url:
        seen = play(url, "problem", pictures, shot=kind, **more)
    assert seen["kind"] == kind
    assert says in seen["text"]
    # It is announced, the focus goes there, and a question cannot be asked.
    assert seen["role"] == "alert" and seen["focus"] == "problem"
    assert not seen["asking"]
    assert seen["accessibility"]["unnamed"] == []
    assert (pictures / f"{kind}.png").stat().st_size > 5000


def test_a_mismatched_library_is_explained(
    browser: str, model: Callable[[str], WebModel], pictures: Path
) -> None:
    tiny, random = model("tiny"), model("random")
    with served((tiny.directory, random.wasm)) as url:
        seen = play(url, "problem", pictures, load=True)
    assert "do not belong together" in seen["text"]
    assert "schema IDs differ" in " ".join(seen["said"])


def test_an_error_of_the_library_is_shown(browser: str, tiny: WebModel, pictures: Path) -> None:
    with served(tiny.directory) as url:
        seen = play(url, "stopped", pictures, 300, question=QUESTION)
    assert seen["kind"] == "stopped"
    assert "ValueError" in seen["text"] and "expect Tensor with ndim 1" in seen["text"]
    assert any("expect Tensor with ndim 1" in line for line in seen["said"])
    # Nothing is lost: the question stays, the memory is given back, and it can be loaded again.
    assert seen["question"] == QUESTION
    assert seen["workers"] == 0
    assert seen["state"] == "Ready"


def test_cancel_and_load_again(browser: str, tiny: WebModel, pictures: Path) -> None:
    with served(tiny.directory) as url:
        seen = play(url, "cancel", pictures)
    assert seen["workers"] == 0  # all memory is given back
    assert seen["focus"] == "load"
    assert seen["again"]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [320, 1280])
def test_looks(browser: str, tiny: WebModel, pictures: Path, scheme: str, width: int) -> None:
    with served(tiny.directory) as url:
        seen = play(
            url,
            "looks",
            pictures,
            colorScheme=scheme,
            viewport={"width": width, "height": 700},
            reducedMotion="reduce" if width == 320 else "no-preference",
        )
    low = {pair: ratio for pair, ratio in seen["contrasts"].items() if ratio < 4.5}  # WCAG AA
    assert low == {}
    assert not seen["wider"]  # no scrolling to the side, WCAG 1.4.10
    assert seen["animations"] == ("none" if width == 320 else "pulse")
