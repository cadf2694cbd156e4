"""Sources as a user names them: torch files, URLs, adapters."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import Result
from safetensors.numpy import load_file, save_file

TINY = Path(__file__).resolve().parents[2] / "examples" / "tiny_model"


def shards(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("params_shard_*.bin")}


@pytest.fixture
def plain(tmp_path: Path, invoke: Callable[..., Result]) -> dict[str, bytes]:
    """The shards of the bundled model."""
    out = tmp_path / "plain"
    words = (str(TINY), "--quantization", "q4f16_1", "-o", str(out))
    assert invoke("convert_weight", *words).exit_code == 0
    return shards(out)


def test_a_url_gives_the_same_shards(
    tmp_path: Path, invoke: Callable[..., Result], plain: dict[str, bytes]
) -> None:
    fsspec = pytest.importorskip("fsspec")
    system = fsspec.filesystem("memory")
    for file in TINY.iterdir():
        if file.is_file():
            system.pipe_file(f"/tiny/{file.name}", file.read_bytes())
    url, out = "memory://tiny", tmp_path / "out"
    words = (url, "--quantization", "q4f16_1", "-o", str(out))
    try:
        for command in ("convert_weight", "gen_config"):
            result = invoke(command, *words)
            assert result.exit_code == 0, result.stderr
        assert invoke("detect", url).exit_code == 0
    finally:
        system.store.clear()
    assert shards(out) == plain
    assert (out / "tokenizer.json").read_bytes() == (TINY / "tokenizer.json").read_bytes()
    refused = invoke("convert_weight", *words[:-1], str(tmp_path / "other"))
    assert refused.exit_code == 2
    assert refused.stderr.startswith("error: memory://tiny has no config.json")


def test_a_torch_file_gives_the_same_shards(
    tmp_path: Path, invoke: Callable[..., Result], plain: dict[str, bytes]
) -> None:
    torch = pytest.importorskip("torch")
    source = tmp_path / "torch"
    source.mkdir()
    (source / "config.json").write_bytes((TINY / "config.json").read_bytes())
    weights = load_file(TINY / "model.safetensors")
    state = {name: torch.from_numpy(array) for name, array in weights.items()}
    torch.save(state, source / "pytorch_model.bin")
    words = ("--quantization", "q4f16_1", "--source-format", "torch")
    result = invoke("convert_weight", str(source), *words, "-o", str(tmp_path / "out"))
    assert result.exit_code == 0, result.stderr
    assert shards(tmp_path / "out") == plain

    class Evil:
        def __reduce__(self) -> object:
            return os.mkdir, (str(tmp_path / "proof"),)

    torch.save(state | {"x": Evil()}, source / "pytorch_model.bin")
    result = invoke("convert_weight", str(source), *words, "-o", str(tmp_path / "evil"))
    assert result.exit_code == 2
    assert "would run code: it asks for 'posix.mkdir'" in result.stderr
    assert not (tmp_path / "proof").exists()
    assert not (tmp_path / "evil").exists()


def test_an_adapter_is_merged_and_recorded(
    tmp_path: Path, invoke: Callable[..., Result], plain: dict[str, bytes]
) -> None:
    adapter = tmp_path / "style"
    adapter.mkdir()
    module = "model.layers.0.mlp.down_proj"
    n, k = load_file(TINY / "model.safetensors")[f"{module}.weight"].shape
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "bias": "none"}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    parts = {"A": np.full((2, k), 0.5, np.float32), "B": np.full((n, 2), 0.5, np.float32)}
    save_file(
        {f"base_model.model.{module}.lora_{part}.weight": a for part, a in parts.items()},
        adapter / "adapter_model.safetensors",
    )
    words = ("convert_weight", str(TINY), "--quantization", "q4f16_1", "--lora", str(adapter))
    out = tmp_path / "out"
    result = invoke(*words, "-o", str(out))
    assert result.exit_code == 0, result.stderr
    assert shards(out) != plain
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["options"]["lora"] == ["style"]
    assert invoke(*words[:-1], str(tmp_path / "gone"), "-o", str(out)).exit_code == 2
