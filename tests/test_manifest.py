"""The manifests: ids, integrity, and damage that must be named."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlc_compile.errors import InputError
from mlc_compile.manifest import (
    CHAT_TASKS,
    build_manifest,
    canonical_json,
    check_directory,
    interface_id,
    manifest_bytes,
    model_manifest,
    parameter_schema_id,
    read_manifest,
    stored_schema_id,
    tool_versions,
)
from mlc_compile.models import load_model
from mlc_compile.quantization.policy import StoredParam
from mlc_compile.quantization.scheme import SCHEMES
from mlc_compile.weights.tensor_cache import TensorCacheWriter

PARAMS = (
    StoredParam("a.q_weight", (4, 8), "uint32", "int4,group=32,NK"),
    StoredParam("a.q_scale", (4, 2), "float16"),
    StoredParam("n.weight", (5,), "float16"),
)
MODEL = load_model(
    {
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "vocab_size": 10,
        "max_position_embeddings": 8,
        "rms_norm_eps": 1e-5,
    },
    where="test",
)


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def test_interface_id_is_the_hash_of_the_canonical_tasks() -> None:
    text = (
        '{"tasks":{"chat.completions":{"executor":"default",'
        '"inputs":{"text":{"processor":"tokenizer"}},"output":"text"}}}'
    )
    assert interface_id(CHAT_TASKS) == f"sha256:{sha256(text)}"
    # Absent values do not count, and neither does the order of keys.
    task = {"output": "text", "executor": "default", "adapter": None}
    task["inputs"] = {"text": {"processor": "tokenizer", "kind": None}}
    assert interface_id({"chat.completions": task, "other": None}) == interface_id(CHAT_TASKS)
    assert interface_id({"chat.completions": {**task, "executor": "x"}}) != interface_id(CHAT_TASKS)


def test_canonical_json() -> None:
    assert (
        canonical_json({"b": [1, None], "a": "é", "c": None}) == '{"a":"é","b":[1,null]}'.encode()
    )
    with pytest.raises(ValueError, match="JSON"):
        canonical_json({"x": float("nan")})


def test_parameter_schema_id() -> None:
    text = (
        '[["a.q_weight",[4,8],"uint32","int4,group=32,NK"],'
        '["a.q_scale",[4,2],"float16"],["n.weight",[5],"float16"]]'
    )
    assert parameter_schema_id(PARAMS) == f"sha256:{sha256(text)}"
    changed = [
        (PARAMS[1], PARAMS[0], PARAMS[2]),
        PARAMS[:2],
        (StoredParam("a.q_weight", (4, 8), "uint32", "int4,group=32,KN"), *PARAMS[1:]),
        (StoredParam("a.q_weight", (8, 4), "uint32", "int4,group=32,NK"), *PARAMS[1:]),
        (*PARAMS[:2], StoredParam("n.weight", (5,), "float32")),
        (*PARAMS[:2], StoredParam("m.weight", (5,), "float16")),
    ]
    assert len({parameter_schema_id(params) for params in (PARAMS, *changed)}) == 7


def test_model_manifest_has_exactly_the_parsed_fields() -> None:
    document = model_manifest(PARAMS)
    assert document == {
        "schema": "mlc.model-package",
        "schema_version": 1,
        "chat_config": "mlc-chat-config.json",
        "interface_id": interface_id(CHAT_TASKS),
        "weights": {
            "manifest": "tensor-cache.json",
            "parameter_schema_id": parameter_schema_id(PARAMS),
        },
        "tasks": {
            "chat.completions": {
                "executor": "default",
                "output": "text",
                "inputs": {"text": {"processor": "tokenizer"}},
            }
        },
    }
    assert "chat_config" not in model_manifest(PARAMS, chat_config=None)


def test_versions_are_those_installed() -> None:
    assert set(tool_versions()) == {"mlc-compile", "apache-tvm", "apache-tvm-ffi"}
    assert all(version[0].isdigit() for version in tool_versions().values())


def write(directory: Path) -> dict[str, Any]:
    """A complete directory; returns its manifest."""
    rng = np.random.default_rng(0)
    with TensorCacheWriter(directory, PARAMS) as writer:
        for param in PARAMS:
            kind = np.uint32 if param.dtype == "uint32" else np.float16
            writer.write(param.name, rng.integers(0, 99, param.shape).astype(kind), 0)
        sealed = tuple(writer.seal(range(len(writer.shards))))
        files = writer.finish(sealed, source_elements=256)
    document = build_manifest(
        MODEL,
        SCHEMES["q4f16_1"],
        PARAMS,
        source_format="safetensors",
        sources=[{"name": "model.safetensors", "nbytes": 128, "blake3": "0" * 64}],
        source_elements=256,
        files=files,
        tensor_sha256={k: v for shard in sealed for k, v in shard.tensor_sha256.items()},
        options={"jobs": 2},
    )
    (directory / "manifest.json").write_bytes(manifest_bytes(document))
    return read_manifest(directory)


def test_content(tmp_path: Path) -> None:
    document = write(tmp_path)
    assert list(document)[-1] == "manifest_sha256"
    assert document["effective_bits_per_weight"] == 8 * (128 + 16 + 10) / 256
    assert document["parameter_schema_id"] == stored_schema_id(tmp_path)
    assert document["source"]["files"][0]["name"] == "model.safetensors"
    assert document["options"] == {"jobs": 2}
    for entry in document["files"]:
        data = (tmp_path / entry["name"]).read_bytes()
        assert entry["nbytes"] == len(data)
        assert entry["sha256"] == hashlib.sha256(data).hexdigest()


def test_a_whole_directory(tmp_path: Path) -> None:
    write(tmp_path)
    seen: list[tuple[str, int, int]] = []
    report = check_directory(tmp_path, progress=lambda *step: seen.append(step))
    assert report.ok and report.differences == ()
    assert (report.files, report.tensors) == (2, 3)
    assert report.to_json()["ok"] is True
    assert "2 files and 3 tensors" in report.to_text()
    assert seen[-1][1] == seen[-1][2] > 0


def edit(name: str, change: Callable[[Any], object]) -> Callable[[Path], None]:
    def act(directory: Path) -> None:
        document = json.loads((directory / name).read_text())
        change(document)
        (directory / name).write_bytes(manifest_bytes(document))

    return act


def flip(directory: Path) -> None:
    path = directory / "params_shard_0.bin"
    data = bytearray(path.read_bytes())
    data[130] ^= 1  # inside a.q_scale
    path.write_bytes(data)


def truncate(directory: Path) -> None:
    path = directory / "params_shard_0.bin"
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (flip, ["params_shard_0.bin: sha256 is", "tensor 'a.q_scale': sha256 is"]),
        (truncate, ["params_shard_0.bin: has 153 bytes, manifest.json says 154", "tensors cannot"]),
        (
            lambda d: (d / "params_shard_0.bin").unlink(),
            ["params_shard_0.bin: is missing", "tensors cannot"],
        ),
        (
            lambda d: (d / "tensor-cache.json").unlink(),
            ["tensor-cache.json: is missing", "tensors"],
        ),
        (
            lambda d: (d / "params_shard_1.bin").write_bytes(b""),
            ["params_shard_1.bin: is not listed"],
        ),
        (
            edit("manifest.json", lambda m: m["tensors"].pop()),
            ["tensor 'n.weight': is not listed"],
        ),
        (
            edit("manifest.json", lambda m: m["tensors"][0].update(name="b")),
            ["tensor 'b': is not in", "tensor 'a.q_weight': is not listed"],
        ),
        (
            edit("manifest.json", lambda m: m["tensors"][2].update(shape=[6])),
            ["tensor 'n.weight': shape is [5], manifest.json says [6]"],
        ),
        (
            edit("manifest.json", lambda m: m["tensors"][2].update(dtype="float32")),
            ["tensor 'n.weight': dtype is float16, manifest.json says float32"],
        ),
    ],
)
def test_damage_is_named_exactly(
    tmp_path: Path, damage: Callable[[Path], object], said: list[str]
) -> None:
    write(tmp_path)
    damage(tmp_path)
    report = check_directory(tmp_path)
    assert not report.ok
    assert len(report.differences) == len(said)
    for difference, part in zip(report.differences, said, strict=True):
        assert difference.startswith(part)
        assert difference in report.to_text()


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda d: (d / "manifest.json").unlink(), "not complete"),
        (lambda d: (d / "manifest.json").write_text("{"), "manifest.json"),
        (edit("manifest.json", lambda m: m.update(schema="x")), "not a manifest of mlc_compile"),
        (edit("manifest.json", lambda m: m.update(format_version=2)), "format version 2"),
        (edit("manifest.json", lambda m: m.update(format_version=True)), "format version True"),
        (edit("manifest.json", lambda m: m.pop("files")), "'files' is damaged"),
        (edit("manifest.json", lambda m: m["tensors"].append(5)), "'tensors' is damaged"),
        (edit("manifest.json", lambda m: m["files"][0].update(nbytes="9")), "'files' is damaged"),
        (
            edit("manifest.json", lambda m: m["files"][0].update(name="../../etc/passwd")),
            "outside its directory",
        ),
    ],
)
def test_unusable_manifests(tmp_path: Path, damage: Callable[[Path], object], said: str) -> None:
    write(tmp_path)
    damage(tmp_path)
    with pytest.raises(InputError, match=said):
        check_directory(tmp_path)


def test_schema_id_without_manifest(tmp_path: Path) -> None:
    assert stored_schema_id(tmp_path) == "unknown"
