"""The writer against the format's rules, the reader against damaged and hostile files."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from mlc_compile.errors import CheckFailedError, InputError
from mlc_compile.quantization.policy import StoredParam
from mlc_compile.quantization.scheme import numpy_dtype
from mlc_compile.weights.tensor_cache import (
    SealedShard,
    TensorCacheWriter,
    WrittenFile,
    load_params,
    open_tensor_cache,
    plan_shards,
    read_stored_params,
)

PARAMS = (
    StoredParam("a.q_weight", (4, 8), "uint32", "int4,group=32,NK"),
    StoredParam("a.q_scale", (4, 2), "float16"),
    StoredParam("n.weight", (5,), "bfloat16"),
    StoredParam("f.weight", (3, 3), "float32"),
)


def values(param: StoredParam) -> np.ndarray:
    dtype = numpy_dtype(param.dtype)
    rng = np.random.default_rng(len(param.name))
    if param.dtype == "uint32":
        return rng.integers(0, 2**32, param.shape, np.uint32)
    return rng.standard_normal(param.shape).astype(dtype)


def write(
    directory: Path, params: tuple[StoredParam, ...] = PARAMS
) -> tuple[tuple[SealedShard, ...], tuple[WrittenFile, ...]]:
    with TensorCacheWriter(directory, params) as writer:
        for param in reversed(params):
            rows = values(param)
            for i in reversed(range(len(rows))):  # in pieces of any order, as a conversion does
                writer.write(param.name, rows[i : i + 1], i * rows[0].nbytes)
        sealed = tuple(writer.seal(range(len(writer.shards))))
        writer.sync(0)
        return sealed, writer.finish(sealed, source_elements=1000)


def sizes(*counts: int) -> list[StoredParam]:
    return [StoredParam(f"t{i}", (count,), "uint32") for i, count in enumerate(counts)]


def layout(cap: int, *counts: int) -> list[list[str]]:
    shards = plan_shards(sizes(*counts), cap)
    assert [shard.file for shard in shards] == [f"params_shard_{i}.bin" for i in range(len(shards))]
    for shard in shards:
        offset = 0
        for record in shard.records:  # back to back, no padding
            assert record.offset == offset
            offset += record.nbytes
        assert shard.nbytes == offset
    return [[record.name for record in shard.records] for shard in shards]


def test_shard_rule() -> None:
    assert layout(100, 5, 5, 5) == [["t0", "t1", "t2"]]
    # 60 + 40 reaches the cap: the open shard is closed, t1 is too small for one of its own.
    assert layout(100, 15, 10, 5) == [["t0"], ["t1", "t2"]]
    # At least half the cap: a shard of its own, numbered before the one still open.
    assert layout(100, 15, 13, 5) == [["t1"], ["t0", "t2"]]
    assert layout(100, 1, 500, 1, 500) == [["t1"], ["t3"], ["t0", "t2"]]
    # Half the cap alone still shares a shard, the cap itself never does.
    assert layout(100, 13, 5) == [["t0", "t1"]]
    assert layout(100, 25, 5) == [["t0"], ["t1"]]
    assert layout(100) == []


def test_the_cap_is_32_mib() -> None:
    whole = StoredParam("w", (32 << 20,), "uint32")
    small = StoredParam("s", ((16 << 20) // 4 - 1,), "uint32")
    assert [len(s.records) for s in plan_shards([small, small])] == [2]
    assert [len(s.records) for s in plan_shards([small, whole, small])] == [1, 2]


def test_document(tmp_path: Path) -> None:
    sealed, files = write(tmp_path)
    text = (tmp_path / "tensor-cache.json").read_text()
    document = json.loads(text)
    assert text.startswith('{\n    "metadata"')  # indent 4
    total = sum(param.nbytes for param in PARAMS)
    assert document["metadata"] == {
        "ParamSize": 4,
        "ParamBytes": float(total),
        "BitsPerParam": total * 8 / 1000,
    }
    (shard,) = document["records"]
    data = (tmp_path / "params_shard_0.bin").read_bytes()
    assert data == b"".join(values(param).tobytes() for param in PARAMS)
    assert {key: shard[key] for key in ("dataPath", "format", "nbytes", "md5sum")} == {
        "dataPath": "params_shard_0.bin",
        "format": "raw-shard",
        "nbytes": total,
        "md5sum": hashlib.md5(data).hexdigest(),
    }
    assert shard["records"][1] == {
        "name": "a.q_scale",
        "shape": [4, 2],
        "dtype": "float16",
        "format": "raw",
        "nbytes": 16,
        "byteOffset": 128,
    }
    # float32 is real float32.
    assert (shard["records"][3]["format"], shard["records"][3]["nbytes"]) == ("raw", 36)
    assert sealed[0].tensor_sha256 == {
        param.name: hashlib.sha256(values(param).tobytes()).hexdigest() for param in PARAMS
    }
    for file in files:
        content = (tmp_path / file.name).read_bytes()
        assert (file.nbytes, file.sha256) == (len(content), hashlib.sha256(content).hexdigest())
    assert {file.name for file in files} == {"params_shard_0.bin", "tensor-cache.json"}


def test_round_trip_in_any_order(tmp_path: Path) -> None:
    write(tmp_path)
    names = [param.name for param in reversed(PARAMS)]
    loaded = load_params(tmp_path, names, check_md5=True)
    for array, param in zip(loaded, reversed(PARAMS), strict=True):
        assert array.dtype == numpy_dtype(param.dtype)
        assert not array.flags.writeable
        assert not array.flags.owndata  # a view of the mapped file
        np.testing.assert_array_equal(array, values(param))
    plain = tuple(StoredParam(p.name, p.shape, p.dtype) for p in PARAMS)
    assert read_stored_params(tmp_path) == plain


def test_shards_of_a_large_set_are_all_read(tmp_path: Path) -> None:
    params = [StoredParam(f"t{i}", (3 << 20,), "uint32") for i in range(5)]  # 12 MiB each
    with TensorCacheWriter(tmp_path, params) as writer:
        for i, param in enumerate(params):
            writer.write(param.name, np.full(param.shape, i, np.uint32), 0)
        writer.finish(writer.seal(range(3)), source_elements=1)
    assert len(list(tmp_path.glob("params_shard_*.bin"))) == 3
    for i, array in enumerate(load_params(tmp_path, [p.name for p in params], check_md5=True)):
        assert array[0] == array[-1] == i


def test_other_writers_narrowed_float32_is_widened(tmp_path: Path) -> None:
    stored = np.array([1.5, -2.0, 3.0], ml_dtypes.bfloat16)
    (tmp_path / "params_shard_0.bin").write_bytes(stored.tobytes())
    record = {"name": "w", "shape": [3], "dtype": "float32", "format": "f32-to-bf16"}
    shard = {"dataPath": "params_shard_0.bin", "format": "raw-shard", "nbytes": 6}
    shard["records"] = [record | {"nbytes": 6, "byteOffset": 0}]
    (tmp_path / "tensor-cache.json").write_text(json.dumps({"metadata": {}, "records": [shard]}))
    (array,) = load_params(tmp_path, ["w"])
    assert array.dtype == np.float32
    np.testing.assert_array_equal(array, [1.5, -2.0, 3.0])


def test_columns(tmp_path: Path) -> None:
    params = (StoredParam("a", (5,), "float16"), StoredParam("b", (4, 7), "uint32"))
    whole = values(params[1])
    with TensorCacheWriter(tmp_path, params) as writer:
        writer.write("a", values(params[0]), 0)
        for columns in (slice(5, 7), slice(0, 3), slice(3, 5)):
            writer.write_columns("b", whole[:, columns], columns.start)
        writer.finish(writer.seal([0]), source_elements=1)
        np.testing.assert_array_equal(load_params(tmp_path, ["b"], check_md5=True)[0], whole)
        writer.write_columns("b", whole[::-1], 0)
    np.testing.assert_array_equal(load_params(tmp_path, ["b"])[0], whole[::-1])


def test_a_shard_of_one_tensor_is_hashed_once(tmp_path: Path) -> None:
    (sealed,), (file, _) = write(tmp_path, PARAMS[:1])
    assert sealed.sha256 == sealed.tensor_sha256["a.q_weight"] == file.sha256


def test_misuse_of_the_writer_is_refused(tmp_path: Path) -> None:
    with TensorCacheWriter(tmp_path, PARAMS) as writer:
        for at, size in ((0, 33), (1, 32), (-1, 1)):
            with pytest.raises(ValueError, match=r"a\.q_weight has no bytes"):
                writer.write("a.q_weight", np.zeros(size, np.uint32), at)
        for rows, columns, first in ((4, 9, 0), (4, 1, 8), (3, 1, 0), (4, 1, -1)):
            with pytest.raises(ValueError, match=r"a\.q_weight has no columns"):
                writer.write_columns("a.q_weight", np.zeros((rows, columns), np.uint32), first)
        with pytest.raises(ValueError, match="not every shard is sealed"):
            writer.finish([], source_elements=1)


def test_a_shard_that_ends_too_early_is_not_sealed(tmp_path: Path) -> None:
    with TensorCacheWriter(tmp_path, PARAMS) as writer:
        writer.write("a.q_weight", values(PARAMS[0]), 0)
        os.truncate(tmp_path / writer.shards[0].file, 100)
        with pytest.raises(OSError, match="ends too early"):
            writer.seal([0])


def test_unknown_tensor(tmp_path: Path) -> None:
    write(tmp_path)
    with pytest.raises(InputError, match=r"no tensor 'b'.*do not belong together"):
        load_params(tmp_path, ["b"])


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"tensor-cache\.json: is missing; run convert_weight"):
        open_tensor_cache(tmp_path)


def test_changed_bytes_are_found_by_md5_only(tmp_path: Path) -> None:
    write(tmp_path)
    path = tmp_path / "params_shard_0.bin"
    data = bytearray(path.read_bytes())
    data[7] ^= 1
    path.write_bytes(data)
    open_tensor_cache(tmp_path)
    with pytest.raises(CheckFailedError, match=r"params_shard_0\.bin: md5"):
        open_tensor_cache(tmp_path, check_md5=True)


@pytest.mark.parametrize("change", [-1, 1])
def test_shard_of_another_size(tmp_path: Path, change: int) -> None:
    write(tmp_path)
    path = tmp_path / "params_shard_0.bin"
    data = path.read_bytes()
    path.write_bytes(data[:-1] if change < 0 else data + b"\0")
    with pytest.raises(InputError, match=rf"has {len(data) + change} bytes, .* says {len(data)}"):
        open_tensor_cache(tmp_path)


def test_missing_shard(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "params_shard_0.bin").unlink()
    with pytest.raises(InputError, match=r"params_shard_0\.bin: is missing"):
        open_tensor_cache(tmp_path)


def record(document: dict[str, Any], index: int = 0) -> dict[str, Any]:
    found: dict[str, Any] = document["records"][0]["records"][index]
    return found


HOSTILE: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "no records": (lambda d: d.pop("records"), "no list 'records'"),
    "shard no object": (lambda d: d["records"].append(3), r"records\[1\] is not an object"),
    "path outside": (lambda d: d["records"][0].update(dataPath="../x.bin"), "not a file name"),
    "path absolute": (lambda d: d["records"][0].update(dataPath="/etc/x"), "not a file name"),
    "path hidden": (lambda d: d["records"][0].update(dataPath=".."), "not a file name"),
    "path windows": (lambda d: d["records"][0].update(dataPath="..\\x"), "not a file name"),
    "path null": (lambda d: d["records"][0].update(dataPath=None), "not a file name"),
    "shard format": (lambda d: d["records"][0].update(format="zip"), "not raw-shard"),
    "shard bytes": (lambda d: d["records"][0].update(nbytes=-5), "not a size"),
    "shard bool": (lambda d: d["records"][0].update(nbytes=True), "not a size"),
    "tensors no list": (lambda d: d["records"][0].update(records={}), "no list 'records'"),
    "md5 number": (lambda d: d["records"][0].update(md5sum=5), "md5sum is not text"),
    "same shard twice": (
        lambda d: d["records"].append({**d["records"][0], "records": []}),
        "shard file occurs twice",
    ),
    "name": (lambda d: record(d).update(name=""), "has no name"),
    "name twice": (lambda d: record(d).update(name="n.weight"), "occurs twice"),
    "shape text": (lambda d: record(d).update(shape="4x8"), "not a list of sizes"),
    "shape negative": (lambda d: record(d).update(shape=[-4, -8]), "not a list of sizes"),
    "shape fraction": (lambda d: record(d).update(shape=[4.0, 8]), "not a list of sizes"),
    "shape overflow": (lambda d: record(d).update(shape=[2**61, 8]), "its shape and dtype make"),
    "dtype": (lambda d: record(d).update(dtype="object"), "dtype 'object' is not known"),
    "dtype list": (lambda d: record(d).update(dtype=["u4"]), "is not known"),
    "tensor format": (lambda d: record(d).update(format="gzip"), "format 'gzip' is not known"),
    "tensor bytes": (lambda d: record(d).update(nbytes=127), "its shape and dtype make 128"),
    "offset negative": (lambda d: record(d).update(byteOffset=-4), "not a size"),
    "offset past the end": (lambda d: record(d, 3).update(byteOffset=10**6), "reach byte"),
    "overlap": (lambda d: record(d, 1).update(byteOffset=0), "overlaps another"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_index(tmp_path: Path, name: str) -> None:
    write(tmp_path)
    change, message = HOSTILE[name]
    path = tmp_path / "tensor-cache.json"
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))
    with pytest.raises(InputError, match=message):
        open_tensor_cache(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "[" * 100000, '"x"', "\xff"])
def test_index_that_is_no_json_object(tmp_path: Path, text: str) -> None:
    write(tmp_path)
    (tmp_path / "tensor-cache.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(InputError, match=r"tensor-cache\.json"):
        open_tensor_cache(tmp_path)
