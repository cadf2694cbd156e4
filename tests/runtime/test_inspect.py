"""Inspect: a library, a directory of parameters, and what is neither."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from built_model import CONTEXT, built_model

from mlc_compile.errors import InputError
from mlc_compile.runtime.inspect import LibraryReport, ParamsReport, inspect_artifact


def test_library() -> None:
    model = built_model()
    report = inspect_artifact(model.library)
    assert isinstance(report, LibraryReport)
    data = model.library.read_bytes()
    assert (report.nbytes, report.sha256) == (len(data), hashlib.sha256(data).hexdigest())
    plan = report.memory_plan
    assert plan.weights == sum(report.weights.values())
    assert plan.total == plan.weights + plan.kv_cache + plan.workspace + plan.reserve
    text = report.to_text()
    for part in (
        "llama q4f16_1",
        f"context_window_size {CONTEXT}",
        "prefill_chunk_size 64",
        "target      cpu",
        report.sha256,
        "decode_tokens",
        "apache-tvm-ffi",
        "uint32",
    ):
        assert part in text
    document = json.loads(json.dumps(report.to_json()))
    assert document["metadata"]["mlc_compile"]["memory_plan"] == plan.to_json()
    assert document["bytes"] == len(data)


def test_directory() -> None:
    report = inspect_artifact(built_model().directory)
    assert isinstance(report, ParamsReport)
    assert report.ok and report.integrity is None
    assert report.nbytes == sum(file["nbytes"] for file in report.manifest["files"])
    assert list(report.dtypes) == ["uint32", "float16"]
    assert sum(report.dtypes.values()) == report.manifest["parameter_bytes"]
    text = report.to_text()
    for part in ("llama", "q4f16_1", "bits per weight", "params_shard_0.bin", "model.safetensors"):
        assert part in text
    assert "integrity" not in report.to_json()


def test_check_finds_a_changed_byte(tmp_path: Path) -> None:
    copy = tmp_path / "model"
    shutil.copytree(built_model().directory, copy)
    steps: list[tuple[str, int, int]] = []
    report = inspect_artifact(copy, check=True, progress=lambda *step: steps.append(step))
    assert isinstance(report, ParamsReport)
    assert report.ok and report.to_json()["integrity"]["ok"]
    assert steps[-1][1] == steps[-1][2] > 0
    shard = copy / "params_shard_0.bin"
    data = bytearray(shard.read_bytes())
    data[1000] ^= 1
    shard.write_bytes(data)
    report = inspect_artifact(copy, check=True)
    assert isinstance(report, ParamsReport)
    assert not report.ok and not report.to_json()["integrity"]["ok"]
    assert "params_shard_0.bin: sha256 is" in report.to_text()


def test_a_damaged_manifest_is_one_clear_line(tmp_path: Path) -> None:
    copy = tmp_path / "model"
    shutil.copytree(built_model().directory, copy)
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["quantization"] = "q4f16_1"
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match=r"manifest\.json: 'quantization' is missing or damaged"):
        inspect_artifact(copy).to_text()


def write(data: bytes) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        (folder / "file").write_bytes(data)
        return folder / "file"

    return make


def foreign_library(folder: Path) -> Path:
    import _ctypes

    return Path(shutil.copy(_ctypes.__file__, folder / "foreign.so"))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (write(b"{}"), "neither a shared library nor a directory"),
        (write(b""), "neither a shared library nor a directory"),
        (write(b"\x7fELF, or so it says"), "not a loadable model library"),
        (foreign_library, "not a loadable model library"),
        (lambda folder: folder, r"manifest\.json: is missing"),
        (lambda folder: folder / "nothing", r"cannot be read"),
    ],
    ids=["json", "empty", "damaged", "foreign", "folder", "missing"],
)
def test_what_is_no_artefact_is_refused(
    make: Callable[[Path], Path], message: str, tmp_path: Path
) -> None:
    if make is foreign_library and sys.platform == "win32":
        pytest.skip("the module is linked in")
    with pytest.raises(InputError, match=message):
        inspect_artifact(make(tmp_path))


def test_only_a_directory_can_be_checked() -> None:
    with pytest.raises(InputError, match="only a directory"):
        inspect_artifact(built_model().library, check=True)
