"""The comparison with llama.cpp: its order and its arithmetic, with made-up contenders."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

FILE = Path(__file__).parents[2] / "benchmarks" / "llama_cpp.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    # Under another name: the real llama_cpp may be installed.
    spec = importlib.util.spec_from_file_location("benchmark_llama_cpp", FILE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def samples(script: ModuleType, said: list[str]) -> list[dict[str, float]]:
    calls = {"ours": 0, "a": 0, "b": 0}

    def contender(name: str, prefill: float, decode: float, **more: float) -> object:
        def measure(threads: int, prompt: int) -> dict[str, float]:
            calls[name] += 1
            # Every third call is disturbed; a median doesn't mind.
            slow = 0.1 if calls[name] % 3 == 0 else 1.0
            rates = {"prefill": prefill * threads * slow, "decode": decode * slow}
            return {**rates, "weight_bytes": 10**8, **more}

        return measure

    found: list[dict[str, float]] = script.run_rounds(
        {
            "ours": contender("ours", 300.0, 60.0, bandwidth=2e10),
            "a": contender("a", 400.0, 50.0),
            "b": contender("b", 200.0, 80.0),
        },
        rounds=3,
        threads=[2],
        prompts=[128],
        say=said.append,
    )
    return found


def test_rounds_turn(script: ModuleType) -> None:
    said: list[str] = []
    names = [sample["name"] for sample in samples(script, said)]
    assert names == ["ours", "a", "b", "a", "b", "ours", "b", "ours", "a"]
    assert len(said) == 9 and said[0].startswith("round 1, 2 threads, 128 tokens, ours: prefill")


def test_the_best_setting_counts_for_each_phase(script: ModuleType) -> None:
    prefill, decode = script.compare(samples(script, []))
    assert (prefill["phase"], prefill["best_setting"]) == ("prefill", "a")
    assert prefill["ratio"] == pytest.approx(600 / 800)
    assert (decode["phase"], decode["best_setting"]) == ("decode", "b")
    assert decode["ratio"] == pytest.approx(60 / 80)
    assert decode["bandwidth_fraction"]["ours"] == pytest.approx(60 * 1e8 / 2e10)
    assert decode["bandwidth_fraction"]["llama_cpp"] == pytest.approx(80 * 1e8 / 2e10)


def test_page(script: ModuleType) -> None:
    page = script.markdown(
        {
            "model": {"name": "Model"},
            "machine": {"cpu": "Some CPU", "cores": 2},
            "versions": {"apache-tvm": "1"},
            "date": "2026-01-02",
            "rounds": 3,
            "decode_tokens": 64,
            "rows": script.compare(samples(script, [])),
        }
    )
    assert "| 2 | prefill, 128 tokens | 600.0 | 800.0 | 0.75 | a |" in page
    assert "60.0 (30% of 20.0 GB/s) | 80.0 (40% of 20.0 GB/s) | 0.75 | b |" in page


def test_settings_have_names_of_their_own(script: ModuleType) -> None:
    names = [setting.name for setting in script.SETTINGS]
    assert len(set(names)) == len(names) and "ours" not in names
    # llama.cpp as it is, first of all.
    assert not script.SETTINGS[0].environment
