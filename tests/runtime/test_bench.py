"""Benchmarks: what is counted, and that the measuring process does as it is told."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import pytest
from built_model import CONTEXT, built_model

from mlc_compile.errors import InputError
from mlc_compile.quantization.policy import StoredParam
from mlc_compile.runtime.bench import (
    BenchReport,
    bench,
    read_bandwidth,
    weight_bytes_per_token,
)
from mlc_compile.runtime.threads import available_cpus

REPORT = BenchReport(
    library="model.so",
    model_type="llama",
    quantization="q4f16_1",
    threads=2,
    prompt_tokens=128,
    decode_tokens=64,
    prefill_rates=(100.0, 300.0, 200.0),
    decode_rates=(50.0, 40.0, 10.0),
    load_seconds=0.25,
    base_rss=200 << 20,
    peak_rss=300 << 20,
    weight_bytes=80 << 20,
    weight_bytes_per_token=75_000_000,
    bandwidth=30e9,
    machine={"cpu": "Some CPU", "cores": 4, "system": "Linux x86_64"},
    versions={"apache-tvm": "1", "python": "3"},
)
HEAD = StoredParam("lm_head.q_weight", (100, 8), "uint32")
TABLE = [
    StoredParam("model.embed_tokens.q_weight", (100, 8), "uint32"),
    StoredParam("model.embed_tokens.q_scale", (100, 2), "float16"),
]
NORM = StoredParam("model.norm.weight", (64,), "float16")


def test_report() -> None:
    assert REPORT.prefill_rate == 200.0
    assert REPORT.decode_rate == 40.0
    assert REPORT.bandwidth_fraction == pytest.approx(40 * 75e6 / 30e9)
    text = REPORT.to_text()
    for part in (
        "200.0 tok/s (100.0 to 300.0), 128 tokens",
        "128 to 192 tokens deep",
        "3.0 GB/s in decode, 10% of the 30.0 GB/s",
        "300.0 MiB at peak, 200.0 MiB before",
        "2 on Some CPU (4 cores)",
    ):
        assert part in text
    assert BenchReport.from_json(json.loads(json.dumps(REPORT.to_json()))) == REPORT


def test_one_row_of_an_embedding_that_is_no_head_is_not_counted() -> None:
    norm, head = 64 * 2, 100 * 8 * 4
    assert weight_bytes_per_token([*TABLE, NORM]) == 100 * 8 * 4 + 100 * 2 * 2 + norm
    assert weight_bytes_per_token([*TABLE, NORM, HEAD]) == norm + head


@pytest.mark.parametrize("threads", [1, 3])
def test_bandwidth_is_a_plausible_number(threads: int) -> None:
    # A part that was not read, or pages that are one page of zeros, would be faster than caches.
    assert 1e8 < read_bandwidth(threads, 32 << 20, repeats=2) < 2e12


def test_peak_rss_is_the_process_own_and_rises_with_what_it_holds() -> None:
    code = (
        "from mlc_compile.runtime.bench import peak_rss\n"
        "before = peak_rss(); bytes(b'x') * (100 << 20); print(before, peak_rss())"
    )
    held = b"x" * (400 << 20)  # by the parent, which is no part of it
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    before, after = map(int, done.stdout.split())
    assert 5 << 20 < before < len(held)
    assert 90 << 20 < after - before < 200 << 20


@pytest.fixture
def small_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlc_compile.runtime.bench.BANDWIDTH_BYTES", 32 << 20)


@pytest.mark.slow
@pytest.mark.usefixtures("small_buffer")
def test_measure_in_a_process_with_so_many_threads() -> None:
    model = built_model()
    steps: list[tuple[str, int, int]] = []
    report = bench(
        model.directory,
        model.library,
        prompt_tokens=70,
        decode_tokens=4,
        repeats=2,
        threads=1,
        progress=lambda *step: steps.append(step),
    )
    # What TVM says in that process, not what was asked for.
    assert report.threads == 1
    assert len(report.prefill_rates) == len(report.decode_rates) == 2
    assert min(*report.prefill_rates, *report.decode_rates) > 1
    assert 0 < report.bandwidth_fraction < 1
    assert report.base_rss < report.peak_rss < 4 << 30
    manifest = json.loads((model.directory / "manifest.json").read_text())
    assert report.weight_bytes == manifest["parameter_bytes"] == report.weight_bytes_per_token
    assert [done for _, done, _ in steps] == list(range(5))


def test_an_error_in_the_process_is_an_error_here() -> None:
    model = built_model()
    with pytest.raises(InputError, match=f"context window of {CONTEXT}; ask for fewer"):
        bench(model.directory, model.library, prompt_tokens=CONTEXT, decode_tokens=1, repeats=1)


def test_more_threads_than_cores_is_refused() -> None:
    model, cores = built_model(), available_cpus()
    with pytest.raises(InputError, match=f"--threads {cores + 1}.*{cores} cores"):
        bench(
            model.directory,
            model.library,
            prompt_tokens=1,
            decode_tokens=1,
            repeats=1,
            threads=cores + 1,
        )


def test_rates_without_spread() -> None:
    once = replace(REPORT, prefill_rates=(5.0,))
    assert "5.0 tok/s, 128 tokens" in once.to_text()
