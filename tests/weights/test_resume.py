"""Conversions that are cut off: killed at any moment, out of disk, and taken up again."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from crashing import SHARD
from safetensors.numpy import save_file

from mlc_compile.errors import InputError
from mlc_compile.manifest import check_directory
from mlc_compile.models import load_model
from mlc_compile.models.spec import Model
from mlc_compile.quantization.scheme import get_scheme
from mlc_compile.weights import budget, convert, run, tensor_cache
from mlc_compile.weights.checkpoint import Checkpoint, open_checkpoint
from mlc_compile.weights.convert import JOURNAL, STAGING, ConversionReport, convert_weight
from mlc_compile.weights.files import UnreadableError
from mlc_compile.weights.parts import expected_shapes

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")

CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 96,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 24,
    "vocab_size": 200,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}


def make_source(directory: Path, *, reverse: bool = False, files: int = 1, **changes: Any) -> Path:
    """A random checkpoint; `reverse` and `files` change where its tensors lie, nothing else."""
    config = CONFIG | changes
    rng = np.random.default_rng(5)
    tensors = {
        name: rng.standard_normal(shape).astype(np.float16)
        for spec in load_model(config, where="config.json").parameters()
        for name, shape in expected_shapes(spec).items()
    }
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    names = sorted(tensors, key=lambda name: name[::-1], reverse=reverse)
    if files == 1:
        save_file({name: tensors[name] for name in names}, directory / "model.safetensors")
        return directory
    places = {
        name: f"model-{i % files:05d}-of-{files:05d}.safetensors" for i, name in enumerate(names)
    }
    for file in set(places.values()):
        part = {name: tensors[name] for name in names if places[name] == file}
        save_file(part, directory / file)
    index = {"metadata": {}, "weight_map": places}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory


Choice = Callable[[int], Iterable[int]]


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensor_cache.plan_shards, "__defaults__", (SHARD,))


def converted(source: Path, out: Path, scheme: str = "q4f16_1", **options: Any) -> ConversionReport:
    checkpoint, model = opened(source)
    return convert_weight(checkpoint, model, get_scheme(scheme), out, **options)


def opened(source: Path) -> tuple[Checkpoint, Model]:
    checkpoint = open_checkpoint(source)
    return checkpoint, load_model(checkpoint.config, where=str(source))


class Killable:
    """Conversions in children of a process that has everything imported."""

    def __init__(self, source: Path, scheme: str) -> None:
        script = Path(__file__).with_name("crashing.py")
        self.process = subprocess.Popen(
            [sys.executable, str(script), str(source), scheme],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(
        self, out: Path, *, event: int = 0, after: float | None = None, overwrite: bool = False
    ) -> bool:
        """Whether the conversion ended by itself; event, after: when it is killed, if ever."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps([str(out), event, overwrite]) + "\n")
        self.process.stdin.flush()
        child = int(self.process.stdout.readline())
        if after is not None:
            time.sleep(after)
            with contextlib.suppress(ProcessLookupError):  # it was quicker
                os.kill(child, signal.SIGKILL)
        status = int(self.process.stdout.readline())
        assert status in (0, signal.SIGKILL), "the conversion failed"
        return status == 0

    def close(self) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


@pytest.fixture
def killable(tmp_path: Path) -> Iterator[Callable[[Path, str], Killable]]:
    started: list[Killable] = []

    def start(source: Path, scheme: str) -> Killable:
        started.append(Killable(source, scheme))
        return started[-1]

    yield start
    for one in started:
        one.close()


def killed_everywhere(
    tmp_path: Path, killable: Callable[[Path, str], Killable], choose: Choice, scheme: str
) -> None:
    """A new conversion for each chosen event: killed there, killed once more, then finished."""
    source = make_source(tmp_path / "source")
    before = contents(source)
    process = killable(source, scheme)
    assert process.run(tmp_path / "whole", event=-1)
    expected = contents(tmp_path / "whole")
    last = int((tmp_path / "whole.events").read_text())
    for event in choose(last):
        out = tmp_path / f"out{event}"
        assert not process.run(out, event=event), f"of {last} events, {event} did not come"
        # With its manifest it is complete, but for the removal of the hidden folder.
        complete = (out / "manifest.json").exists()
        assert not complete or contents(out) == expected
        process.run(out, event=max(1, event // 3), overwrite=complete)
        complete = (out / "manifest.json").exists()
        assert process.run(out, overwrite=complete)
        assert contents(out) == expected
        assert [path for path in out.iterdir() if path.is_dir()] == []
        assert check_directory(out).ok
    assert contents(source) == before


def test_killed_and_taken_up(tmp_path: Path, killable: Callable[[Path, str], Killable]) -> None:
    """Early, while blocks are written, and between the moves of the publication."""
    killed_everywhere(tmp_path, killable, lambda last: [6, last // 3, last - 12], "q4f16_1")


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["q4f16_1", "q4f16_0"])
def test_killed_at_every_kind_of_moment(
    tmp_path: Path, killable: Callable[[Path, str], Killable], scheme: str
) -> None:
    def choose(last: int) -> Iterable[int]:
        return [
            *range(1, 12),
            *range(12, last - 60, 1 + last // 20),
            *range(last - 60, last - 2, 2),
        ]

    killed_everywhere(tmp_path, killable, choose, scheme)


@pytest.mark.slow
def test_thirty_random_kills(tmp_path: Path, killable: Callable[[Path, str], Killable]) -> None:
    """By the clock: wherever the process is; over an older conversion that must survive."""
    sizes = {"hidden_size": 768, "intermediate_size": 2048, "head_dim": 192, "vocab_size": 8000}
    source = make_source(tmp_path / "source", **sizes)
    converted(source, tmp_path / "whole")
    expected = contents(tmp_path / "whole")
    converted(source, tmp_path / "out", "q0f16")
    old = contents(tmp_path / "out")
    process = killable(source, "q4f16_1")
    started = time.monotonic()
    assert process.run(tmp_path / "timed")
    seconds = time.monotonic() - started
    rng = random.Random(8)
    kills = finished = 0
    while kills < 30:
        # Short runs too, or none would be cut off after it was taken up.
        after = seconds * rng.choice((0.2, 0.6, 1.1)) * rng.random()
        if process.run(tmp_path / "out", after=after, overwrite=True):
            assert contents(tmp_path / "out") == expected
            finished += 1
            converted(source, tmp_path / "out", "q0f16", overwrite=True)
        else:
            kills += 1
            now = contents(tmp_path / "out")
            assert "manifest.json" not in now or now in (old, expected)
    assert process.run(tmp_path / "out", overwrite=True)
    assert contents(tmp_path / "out") == expected
    assert finished  # some were completed in pieces


# --- what is kept, and what is not ---------------------------------------------------------


class Stop(BaseException):
    """Stands for Ctrl-C."""


def stopped_after(share: float) -> Callable[[str, int, int], None]:
    def progress(label: str, done: int, total: int) -> None:
        if done >= share * total:
            raise Stop

    return progress


def interrupted(
    source: Path, out: Path, share: float = 0.6, scheme: str = "q4f16_1", **options: Any
) -> int:
    """Leaves a conversion of which so much is done; returns the number of finished shards."""
    with pytest.raises(Stop):
        converted(source, out, scheme, progress=stopped_after(share), jobs=1, **options)
    journal = out / STAGING / JOURNAL
    return sum('"shard"' in line for line in journal.read_text().splitlines())


def test_finished_shards_are_not_redone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = make_source(tmp_path / "source"), tmp_path / "out"
    converted(source, tmp_path / "whole")
    finished = interrupted(source, out)
    assert finished >= 2
    assert contents(out) == {}
    kept = {
        path.name: path.stat().st_mtime_ns
        for path in (out / STAGING / "new").iterdir()
        if path.name in (out / STAGING / JOURNAL).read_text()
    }
    seen: list[tuple[int, int]] = []
    report = converted(source, out, progress=lambda _, done, total: seen.append((done, total)))
    assert report.kept > 0
    assert seen[0][0] > 0  # from where it stopped
    assert len(kept) == finished
    assert {name: (out / name).stat().st_mtime_ns for name in kept} == kept
    assert "interrupted run" in report.to_text()
    assert contents(out) == contents(tmp_path / "whole")


@pytest.mark.parametrize("patience", [0.0, 1e9])
def test_shards_are_not_long_without_a_hash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, patience: float
) -> None:
    """Where many are hashed together, a slow source does not make an interruption cost more."""
    source, out = make_source(tmp_path / "source"), tmp_path / "out"
    converted(source, tmp_path / "whole")
    monkeypatch.setattr(run, "PATIENCE", patience)
    finished = interrupted(source, out, device="cpu")
    assert (finished >= 2) == (patience == 0)
    assert (converted(source, out, device="cpu").kept > 0) == (patience == 0)
    assert contents(out) == contents(tmp_path / "whole")


@pytest.mark.parametrize("damage", ["flip", "cut", "gone"])
def test_a_finished_shard_is_checked_before_it_is_kept(tmp_path: Path, damage: str) -> None:
    source, out = make_source(tmp_path / "source"), tmp_path / "out"
    converted(source, tmp_path / "whole")
    interrupted(source, out)
    lines = (out / STAGING / JOURNAL).read_text().splitlines()
    (entry, *_) = (json.loads(line) for line in lines if '"shard"' in line)
    path = out / STAGING / "new" / entry["shard"]
    data = bytearray(path.read_bytes())
    if damage == "flip":
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    elif damage == "cut":
        path.write_bytes(data[:-1])
    else:
        path.unlink()
    converted(source, out)
    assert contents(out) == contents(tmp_path / "whole")


@pytest.mark.parametrize("cut", [1, 30, 10**6])
def test_a_torn_journal(tmp_path: Path, cut: int) -> None:
    source, out = make_source(tmp_path / "source"), tmp_path / "out"
    converted(source, tmp_path / "whole")
    interrupted(source, out)
    journal = out / STAGING / JOURNAL
    data = journal.read_bytes()
    journal.write_bytes(data[: max(0, len(data) - cut)] + (b"\0\0\0" if cut == 30 else b""))
    report = converted(source, out)
    assert (report.kept > 0) == (cut < 10**6)
    assert contents(out) == contents(tmp_path / "whole")


def test_the_journal_tells_of_what_is_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = make_source(tmp_path / "source"), tmp_path / "out"
    converted(source, tmp_path / "whole")
    real = os.fsync
    failed: list[str] = []

    def fsync(handle: int) -> None:
        shards = (out / STAGING / "new").glob("params_shard_*.bin")
        names = [path.name for path in shards if os.path.samestat(path.stat(), os.fstat(handle))]
        if names and names != ["params_shard_0.bin"] and not failed:
            failed.append(names[0])
            time.sleep(0.3)  # so that the shard is hashed meanwhile
            raise OSError(errno.EIO, "does not reach the disk")
        real(handle)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        with pytest.raises((InputError, OSError)):
            converted(source, out, jobs=2)
    journal = (out / STAGING / JOURNAL).read_text()
    assert failed
    assert failed[0] not in journal
    converted(source, out)
    assert contents(out) == contents(tmp_path / "whole")


def test_another_command_starts_anew(tmp_path: Path) -> None:
    source, out = make_source(tmp_path / "source"), tmp_path / "out"
    interrupted(source, out)
    (out / STAGING / "new" / "params_shard_99.bin").write_bytes(b"stale")
    assert converted(source, out, "q4f16_1", options={"other": 1}).kept == 0
    assert "params_shard_99.bin" not in contents(out)
    assert check_directory(out).ok


def test_another_source_starts_anew(tmp_path: Path) -> None:
    source, out = make_source(tmp_path / "source"), tmp_path / "out"
    interrupted(source, out)
    file = source / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1  # same size
    file.write_bytes(data)
    assert converted(source, out).kept == 0
    converted(source, tmp_path / "whole")
    assert contents(out) == contents(tmp_path / "whole")


def test_a_source_that_changes_meanwhile(tmp_path: Path) -> None:
    source, out = make_source(tmp_path / "source"), tmp_path / "out"

    def touch(*_: object) -> None:
        os.utime(source / "model.safetensors", ns=(1, 1))

    with pytest.raises(InputError, match=r"model\.safetensors was changed while it was read"):
        converted(source, out, progress=touch)
    assert not out.exists()


@pytest.mark.parametrize(("error", "kept"), [(UnreadableError, True), (InputError, False)])
def test_a_failing_disk_is_an_interruption_and_bad_data_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[InputError], kept: bool
) -> None:
    source, out = make_source(tmp_path / "source"), tmp_path / "out"
    real = Checkpoint.read

    def read(self: Checkpoint, name: str, rows: slice | None = None) -> Any:
        if name == "model.layers.2.mlp.down_proj.weight":
            raise error("cannot read")
        return real(self, name, rows)

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoint, "read", read)
        with pytest.raises(InputError, match="cannot read"):
            converted(source, out, jobs=1)
    assert out.exists() == kept
    assert (converted(source, out).kept > 0) == kept


def test_a_refused_command_keeps_what_another_left(tmp_path: Path) -> None:
    source, out = make_source(tmp_path / "source"), tmp_path / "out"
    converted(source, out, "q0f16")
    with pytest.raises(Stop):
        converted(source, out, overwrite=True, progress=stopped_after(0.6))
    with pytest.raises(InputError, match="--overwrite"):
        converted(source, out)
    assert converted(source, out, overwrite=True).kept > 0


def test_a_second_process_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("fcntl")
    source, out = make_source(tmp_path / "source"), tmp_path / "out"

    def second(*_: object) -> None:
        with pytest.raises(InputError, match="another run is writing"):
            converted(source, out)

    converted(source, out, progress=second)
    assert check_directory(out).ok


# --- the bytes depend on the weights and the scheme only -----------------------------------


def test_any_order_and_number_of_source_files(tmp_path: Path) -> None:
    made = []
    for i, how in enumerate(({}, {"reverse": True}, {"files": 3}, {"files": 2, "reverse": True})):
        out = tmp_path / f"out{i}"
        converted(make_source(tmp_path / f"source{i}", **how), out, jobs=i + 1)  # type: ignore[arg-type]
        files = contents(out)
        manifest = json.loads(files.pop("manifest.json"))
        manifest.pop("manifest_sha256")  # of the sources too
        assert len(manifest.pop("source")["files"]) == (2, 2, 5, 4)[i]
        made.append((files, manifest))
    assert all(one == made[0] for one in made)


@pytest.mark.parametrize("scheme", ["q4f16_1", "q4f16_0"])
def test_any_jobs_and_memory(tmp_path: Path, scheme: str) -> None:
    sizes = {"hidden_size": 256, "intermediate_size": 704, "head_dim": 64, "vocab_size": 4000}
    source = make_source(tmp_path / "source", **sizes)
    expected = None
    tight = budget.peak_resident() + (80 << 20)  # this process holds what other tests imported
    for i, (jobs, ram) in enumerate(((1, None), (2, tight), (8, None), (8, 4 * tight))):
        converted(source, tmp_path / f"{i}", scheme, jobs=jobs, max_ram=ram, device="numpy")
        expected = expected or contents(tmp_path / f"{i}")
        assert contents(tmp_path / f"{i}") == expected


@pytest.mark.skipif(sys.platform != "linux", reason="chmod of directories")
def test_a_read_only_source(tmp_path: Path) -> None:
    source = make_source(tmp_path / "source")
    before = {path.name: path.stat() for path in source.iterdir()}
    for path in (*source.iterdir(), source):
        path.chmod(0o500 if path.is_dir() else 0o400)
    written = source.stat()
    converted(source, tmp_path / "out")
    assert check_directory(tmp_path / "out").ok
    assert source.stat().st_mtime_ns == written.st_mtime_ns  # no file came or went, for root either
    for path in source.iterdir():
        assert path.stat().st_mtime_ns == before[path.name].st_mtime_ns
    source.chmod(0o700)


# --- disks that fill up --------------------------------------------------------------------


def test_a_disk_that_fills_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it is the file size that is limited: that is met by every machine."""
    resource = pytest.importorskip("resource")
    source, out = make_source(tmp_path / "source"), tmp_path / "out"
    converted(source, tmp_path / "whole")
    largest = max(path.stat().st_size for path in (tmp_path / "whole").glob("*.bin"))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest - 1, hard))
    try:
        with pytest.raises(InputError, match=r"out: cannot be written .*same command goes on"):
            converted(source, out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert contents(out) == {}
    assert (out / STAGING / JOURNAL).is_file()
    converted(source, out)
    assert contents(out) == contents(tmp_path / "whole")


@pytest.mark.skipif(
    sys.platform != "linux" or os.geteuid() != 0, reason="only root mounts a file system"
)
def test_a_small_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, disk = make_source(tmp_path / "source"), tmp_path / "disk"
    converted(source, tmp_path / "whole")
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=160k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mount is not allowed here")
    try:
        with pytest.raises(InputError, match=r"needs \d+ MB, 0 MB are free"):
            converted(source, disk / "out")
        assert list(disk.iterdir()) == []
        monkeypatch.setattr(convert, "_check_disk", lambda *_: None)
        with pytest.raises(InputError, match=r"No space left on device.*same command goes on"):
            converted(source, disk / "out", jobs=1)
        assert (disk / "out" / STAGING / JOURNAL).is_file()
        subprocess.run(["mount", "-o", "remount,size=4m", str(disk)], check=True)
        converted(source, disk / "out")
        assert contents(disk / "out") == contents(tmp_path / "whole")
    finally:
        subprocess.run(["umount", str(disk)], check=True)
