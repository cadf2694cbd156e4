"""Files of stored logits: what comes back, and what is refused."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlc_compile.errors import InputError
from mlc_compile.manifest import MANIFEST, SCHEMA
from mlc_compile.runtime.compare import Row
from mlc_compile.runtime.golden import SMALL_VOCABULARY, TOP, Golden, parameters_digest
from mlc_compile.runtime.reference import Attention
from mlc_compile.runtime.scenarios import Greedy
from mlc_compile.runtime.verify import shortened

Arrays = dict[str, Any]
CONTEXTS = [(1,), (1, 2), (1, 2, 3), (1, 2, 4), (5, 6), (-1, 7, -1, 8)]


def rows_of(vocab: int) -> dict[tuple[int, ...], Row]:
    rng = np.random.default_rng(0)
    rows = {c: Row.of((3 * rng.standard_normal(vocab)).astype(np.float32)) for c in CONTEXTS}
    return {c: dataclasses.replace(row, noise=0.25) for c, row in rows.items()}


def golden_of(vocab: int = 40) -> Golden:
    return Golden(
        reference="numpy, float32",
        schema_id="sha256:1",
        parameters="sha256:2",
        attention=Attention(None, 0, 128),
        decode_steps=64,
        greedy=Greedy((1, 2), (3, 4)),
        rows=shortened(rows_of(vocab)),
    )


@pytest.mark.parametrize("vocab", [40, SMALL_VOCABULARY + 1])
def test_what_is_written_is_read(vocab: int, tmp_path: Path) -> None:
    golden = golden_of(vocab)
    golden.write(tmp_path / "a.npz")
    golden.write(tmp_path / "b.npz")
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.npz", "b.npz"]
    found = Golden.read(tmp_path / "a.npz")
    assert dataclasses.replace(found, rows={}) == dataclasses.replace(golden, rows={})
    assert found.rows.keys() == golden.rows.keys() == set(CONTEXTS)
    for context, row in golden.rows.items():
        again = found.rows[context]
        assert np.array_equal(again.values, row.values)
        assert again.noise == row.noise == 0.25
        assert (again.log_norm, again.std, again.peak) == (row.log_norm, row.std, row.peak)
        assert (again.ids is None) == (row.ids is None)
        assert row.ids is None or np.array_equal(again.ids, row.ids)


def test_large_vocabularies_keep_the_top_behind_the_first_rows() -> None:
    rows = shortened(rows_of(SMALL_VOCABULARY + 1))
    whole = {context for context, row in rows.items() if row.ids is None}
    assert whole == {(1,), (1, 2), (1, 2, 4), (5, 6), (-1, 7, -1, 8)}
    top = rows[(1, 2, 3)]
    assert top.ids is not None and len(top.values) == len(top.ids) == TOP
    full = rows_of(SMALL_VOCABULARY + 1)[(1, 2, 3)]
    assert top.top_two == full.top_two and top.log_norm == full.log_norm
    assert all(row.ids is None for row in shortened(rows_of(SMALL_VOCABULARY)).values())


def changed(key: str, value: Any) -> Callable[[Arrays], None]:
    return lambda arrays: arrays.__setitem__(key, value)


def header(**changes: Any) -> Callable[[Arrays], None]:
    def change(arrays: Arrays) -> None:
        document = json.loads(arrays["header"].tobytes())
        text = json.dumps({**document, **changes})
        arrays["header"] = np.frombuffer(text.encode(), np.uint8)

    return change


def nan(arrays: Arrays) -> None:
    arrays["full"] = arrays["full"].copy()
    arrays["full"][2, 3] = np.nan


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.pop("stats"), "not a file of reference logits"),
        (nan, "not finite"),
        (changed("full", np.zeros((6, 40))), "full is float64"),
        (changed("stats", np.zeros((5, 4))), "differ in length"),
        (changed("length", np.zeros(6, np.int32)), "not finite"),
        (changed("text", np.full(6, 99, np.int32)), "not a file of reference logits"),
        (changed("full", np.array([{}], object)), "pickle"),
        (header(version=2), "version 2, and mlc-compile.golden version 1 is read"),
        (header(schema="x"), "is 'x' version 1"),
        (header(attention={"window": 1}), "not a file of reference logits"),
        (header(greedy=3), "not a file of reference logits"),
        (changed("header", np.frombuffer(b"{", np.uint8)), "not valid JSON"),
    ],
)
def test_damaged_files_are_refused(
    change: Callable[[Arrays], None], message: str, tmp_path: Path
) -> None:
    golden_of().write(tmp_path / "good.npz")
    with np.load(tmp_path / "good.npz") as file:
        arrays = dict(file)
    change(arrays)
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(InputError, match=message) as caught:
        Golden.read(tmp_path / "bad.npz")
    assert "bad.npz" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("data", [b"", b"PK\x03\x04 no archive", b"x" * 100])
def test_other_files_are_refused(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.npz").write_bytes(data)
    with pytest.raises(InputError, match=r"x\.npz: not a file of reference logits"):
        Golden.read(tmp_path / "x.npz")


def test_truncated_and_missing_files_are_refused(tmp_path: Path) -> None:
    golden_of().write(tmp_path / "good.npz")
    data = (tmp_path / "good.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(data[: len(data) // 2])
    for name in ("cut", "missing"):
        with pytest.raises(InputError, match="not a file of reference logits"):
            Golden.read(tmp_path / f"{name}.npz")


def test_nothing_is_left_where_writing_fails(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be written"):
        golden_of().write(tmp_path / "no such folder" / "x.npz")
    (tmp_path / "folder.npz").mkdir()
    with pytest.raises(InputError, match="cannot be written"):
        golden_of().write(tmp_path / "folder.npz")
    assert [path.name for path in tmp_path.iterdir()] == ["folder.npz"]


# ---------------------------------------------------------------------------------------------
# Which parameters they are for


def manifest(directory: Path, *hashes: str, schema_id: str = "sha256:s") -> Path:
    """A manifest of tensors with these hashes."""
    directory.mkdir()
    tensors = [
        {"name": f"t{i}", "nbytes": 4, "sha256": sha, "shape": [1], "dtype": "float32"}
        for i, sha in enumerate(hashes)
    ]
    document = {
        "schema": SCHEMA,
        "format_version": 1,
        "parameter_schema_id": schema_id,
        "files": [],
        "tensors": tensors,
    }
    (directory / MANIFEST).write_text(json.dumps(document))
    return directory


def test_only_the_same_parameters_and_attention_pass(tmp_path: Path) -> None:
    right = manifest(tmp_path / "right", "a", "b")
    schema_id, parameters = parameters_digest(right)
    full = Attention(None, 0, 128)
    golden = dataclasses.replace(golden_of(), schema_id=schema_id, parameters=parameters)

    def check(directory: Path, attention: Attention = full, rope_varies: bool = False) -> None:
        golden.check(directory, attention, rope_varies=rope_varies, where=Path("g.npz"))

    check(right)
    check(right, Attention(None, 0, 64))  # RoPE is the same at every context …
    with pytest.raises(InputError, match="made for"):
        check(right, Attention(None, 0, 64), rope_varies=True)  # … or is not
    for attention in (Attention(16, 0, 128), Attention(None, 2, 128)):
        with pytest.raises(InputError, match="made for"):
            check(right, attention)
    others = [
        manifest(tmp_path / "value", "a", "c"),
        manifest(tmp_path / "more", "a", "b", "c"),
        manifest(tmp_path / "schema", "a", "b", schema_id="sha256:t"),
    ]
    for other in others:
        with pytest.raises(InputError, match=r"g\.npz: made from other parameters"):
            check(other)
    with pytest.raises(InputError, match="is missing"):
        check(tmp_path)
