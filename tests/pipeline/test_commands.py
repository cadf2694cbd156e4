"""The commands one after another in real processes, on the bundled model: what a user types."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

MODEL = Path(__file__).parents[2] / "examples" / "tiny_model"
SIZES = ("--context-window-size", "256", "--prefill-chunk-size", "64", "--max-batch-size", "2")


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mlc_compile.cli", *words], capture_output=True, text=True
    )


def must(*words: str) -> str:
    done = run(*words)
    assert done.returncode == 0, (words, done.stderr[-2000:])
    return done.stdout


def pipeline(out: Path) -> None:
    common = (str(MODEL), "--quantization", "q4f32_1", "-o", str(out))
    must("gen_config", *common, *SIZES)  # either order works
    must("convert_weight", *common)
    must("compile", str(out), "-o", str(out / "model.so"))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("made")
    pipeline(out)
    return out


def test_two_runs_give_the_same_bytes(made: Path, tmp_path: Path) -> None:
    again = tmp_path / "elsewhere"
    pipeline(again)
    names = sorted(p.name for p in made.iterdir())
    assert names == sorted(p.name for p in again.iterdir())
    assert {"params_shard_0.bin", "mlc-chat-config.json", "model.so", "manifest.json"} <= {*names}
    for name in names:
        assert (made / name).read_bytes() == (again / name).read_bytes(), name


def test_it_is_whole_verified_and_writes(made: Path) -> None:
    library = str(made / "model.so")
    must("inspect", str(made), "--check")
    report = json.loads(
        must("verify", str(made), "--lib", library, "--reference", str(MODEL), "--json")
    )
    assert report["failures"] == []
    text = json.loads(
        must("run", str(made), "--lib", library, "--raw", "-p", "The whale", "--json")
    )["text"]
    assert len(text.split()) > 8
    plan = json.loads(must("plan", str(made), "--json"))
    shown = json.loads(must("inspect", library, "--json"))
    assert json.dumps(plan["total"]) in json.dumps(shown)


def test_a_library_for_other_parameters_is_refused(made: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    must("convert_weight", str(MODEL), "--quantization", "q8f32_1", "-o", str(other))
    must("gen_config", str(MODEL), "--quantization", "q8f32_1", "-o", str(other), *SIZES)
    done = run("run", str(other), "--lib", str(made / "model.so"), "-p", "x")
    assert done.returncode == 2
    assert "do not belong together" in done.stderr and "sha256:" in done.stderr
    assert "Traceback" not in done.stderr and len(done.stderr.strip().splitlines()) == 1


def test_a_flipped_bit_is_found(made: Path, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(made, copy)
    shard = copy / "params_shard_0.bin"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    done = run("inspect", str(copy), "--check")
    assert done.returncode == 1
    assert "params_shard_0.bin" in done.stderr + done.stdout


@pytest.mark.parametrize(
    ("words", "status", "says"),
    [
        (("convert_weight", "{model}", "--quantization", "q4f16", "-o", "{out}"), 2, "q4f16_1"),
        (("convert_weight", "/nonexistent", "--quantization", "q0f32", "-o", "{out}"), 2, "exist"),
        (("gen_config", "{model}", "--quantization", "q0f32", "-o", "{out}",
          "--context-window-size", "99999999"), 2, "context_window_size"),
        (("compile", "{model}", "-o", "{out}/x.so"), 2, "gen_config"),
        (("compile", "{made}", "-o", "{out}/x.so", "--target", "cpuu"), 2, "closest: cpu"),
        (("compile", "{made}", "-o", "{out}/x.so", "--budget", "1MiB"), 2, "budget"),
        (("plan", "{made}", "--budget", "1MiB"), 2, "budget"),
        (("run", "{made}", "--lib", "{made}/mlc-chat-config.json", "-p", "x"), 2, "library"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(
    made: Path, tmp_path: Path, words: tuple[str, ...], status: int, says: str
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    done = run(*(word.format(model=MODEL, made=made, out=out) for word in words))
    assert done.returncode == status, done.stderr
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    assert sum(line.startswith("error: ") for line in done.stderr.splitlines()) == 1
    assert not list(out.iterdir())
