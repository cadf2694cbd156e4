"""`convert_weight` and `inspect --check` as a user runs them, on the bundled model."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
from click.testing import Result

TINY = str(Path(__file__).resolve().parents[2] / "examples" / "tiny_model")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_converts_checks_and_notices_damage(
    tmp_path: Path, shell: Callable[..., CompletedProcess[str]]
) -> None:
    out = tmp_path / "out"
    done = shell("convert_weight", TINY, "--quantization", "q4f16_1", "-o", str(out), "--json")
    assert done.returncode == 0, done.stderr
    assert isinstance(json.loads(done.stdout), dict)
    # Not a terminal: progress is lines on stderr, which end with the last byte.
    assert "MB/s" in done.stderr.splitlines()[-1]

    checked = shell("inspect", str(out), "--check", "--json", "-q")
    assert (checked.returncode, checked.stderr) == (0, "")
    assert json.loads(checked.stdout)["integrity"]["ok"] is True

    shard = out / "params_shard_0.bin"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    damaged = shell("inspect", str(out), "--check")
    assert damaged.returncode == 1
    assert "params_shard_0.bin" in damaged.stdout
    assert damaged.stderr.splitlines()[-1].startswith(f"error: {out} ")


def test_same_bytes_with_either_spelling_and_any_jobs(
    tmp_path: Path, invoke: Callable[..., Result]
) -> None:
    for name, jobs in (("convert_weight", "1"), ("convert-weight", "3")):
        words = (TINY, "--quantization", "q4f16_1", "-o", str(tmp_path / name), "--jobs", jobs)
        assert invoke(name, *words).exit_code == 0
    assert contents(tmp_path / "convert_weight") == contents(tmp_path / "convert-weight")


def test_dry_run_writes_nothing_and_tells_exact_sizes(
    tmp_path: Path, invoke: Callable[..., Result]
) -> None:
    out = tmp_path / "out"
    words = ("convert_weight", TINY, "--quantization", "q4f16_1", "-o", str(out))
    result = invoke(*words, "--dry-run")
    assert result.exit_code == 0
    assert "q4f16_1" in result.stdout and "an estimate" in result.stdout
    told = json.loads(invoke(*words, "--dry-run", "--json", "--max-ram", "1GiB").stdout)
    assert list(tmp_path.iterdir()) == []
    assert 0 < told["estimated_seconds"] < 60 and 0 < told["peak_ram_bytes"] <= 1 << 30
    done = json.loads(invoke(*words, "--json").stdout)
    shards = list(out.glob("params_shard_*.bin"))
    assert told["parameter_bytes"] == sum(shard.stat().st_size for shard in shards)
    assert told["shards"] == len(shards)
    assert done.items() >= {key: told[key] for key in ("effective_bits_per_weight",)}.items()
    errors = [entry["relative_error"] for entry in done["worst_relative_errors"]]
    assert len(errors) == 10 and errors == sorted(errors, reverse=True) and 0 < errors[0] < 0.2


def test_too_little_memory_names_the_least(tmp_path: Path, shell: Callable[..., Any]) -> None:
    words = ("convert_weight", TINY, "--quantization", "q4f16_1", "-o", str(tmp_path / "out"))
    refused = shell(*words, "--max-ram", "20MiB")
    assert refused.returncode == 2
    (least,) = re.findall(r"the smallest that works is --max-ram (\d+)MiB", refused.stderr)
    assert list(tmp_path.iterdir()) == []
    # What the process holds before it starts differs by a little from run to run.
    assert shell(*words, "--max-ram", f"{int(least) + 2}MiB").returncode == 0


def test_overrides_scales_and_calibration(tmp_path: Path, invoke: Callable[..., Result]) -> None:
    text = tmp_path / "text.txt"
    text.write_text("Once upon a time there was a little girl who liked to read. " * 40)
    found = {}
    for name, options in {
        "plain": ["--scales", "absmax"],
        "signed": [],
        "mse": ["--scales", "mse"],
        "calibrated": ["--calibrate", str(text)],
        "override": ["--override", "embed_tokens=q8f16_1,layers.0.*=q8f16_1", "--scales", "absmax"],
    }.items():
        out = tmp_path / name
        words = ("convert_weight", TINY, "--quantization", "q4f16_1", "-o", str(out), *options)
        result = invoke(*words)
        assert result.exit_code == 0, result.stderr
        found[name] = json.loads((out / "manifest.json").read_text())
    errors = {
        name: {t["name"]: t["relative_error"] for t in one["tensors"] if "relative_error" in t}
        for name, one in found.items()
    }
    packed = [name for name in errors["mse"] if name.endswith(".q_weight")]
    assert all(errors["mse"][name] <= errors["plain"][name] for name in packed)
    assert all(errors["mse"][name] <= errors["signed"][name] for name in packed)
    assert found["calibrated"]["options"]["scales"] == "mse"
    assert found["calibrated"]["options"]["calibration"]["tokens"] > 0
    assert errors["calibrated"] != errors["mse"]
    sizes = {name: {t["name"]: t["nbytes"] for t in one["tensors"]} for name, one in found.items()}
    changed = {n for n in sizes["plain"] if sizes["plain"][n] != sizes["override"][n]}
    first = ("model.layers.0.", "model.embed_tokens.")
    assert changed and all(name.startswith(first) for name in changed)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--quantization", "q4f17_1"], "q4f16_1"),
        (["--quantization", "q4f16_1", "--model-type", "lama"], "llama"),
        (["--quantization", "q4f16_1", "--source-format", "gguf"], "gguf"),
    ],
    ids=["scheme", "model type", "source format"],
)
def test_bad_choices_name_a_better_one_and_leave_nothing(
    options: list[str], said: str, tmp_path: Path, invoke: Callable[..., Result]
) -> None:
    result = invoke("convert_weight", TINY, "-o", str(tmp_path / "out"), *options)
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert said in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_finished_conversion_is_replaced_only_when_asked(
    tmp_path: Path, invoke: Callable[..., Result]
) -> None:
    words = ("convert_weight", TINY, "-o", str(tmp_path), "--quantization")
    assert invoke(*words, "q4f16_1").exit_code == 0
    before = contents(tmp_path)
    refused = invoke(*words, "q0f16")
    assert refused.exit_code == 2
    assert "--overwrite" in refused.stderr
    assert contents(tmp_path) == before
    assert invoke(*words, "q0f16", "--overwrite").exit_code == 0
    assert json.loads((tmp_path / "manifest.json").read_text())["files"]
    assert contents(tmp_path) != before


def test_an_interrupted_run_says_how_it_goes_on(
    tmp_path: Path, invoke: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlc_compile.weights.run import Run

    def interrupt(self: Run, progress: object) -> None:
        raise KeyboardInterrupt

    words = ("convert_weight", TINY, "--quantization", "q4f16_1", "-o", str(tmp_path / "out"))
    with monkeypatch.context() as patch:
        patch.setattr(Run, "work", interrupt)
        result = invoke(*words)
    assert result.exit_code == 130
    assert "the same command goes on from there" in result.stderr
    assert result.stderr.endswith("error: interrupted\n")
    assert invoke(*words).exit_code == 0
    assert [path for path in (tmp_path / "out").iterdir() if path.is_dir()] == []
