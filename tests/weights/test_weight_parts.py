"""Which rows a parameter is made of, by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlc_compile.models.params import HeadRows, ParamSpec, Source
from mlc_compile.weights.checkpoint import Checkpoint
from mlc_compile.weights.parts import (
    Part,
    expected_shapes,
    parts_in,
    published,
    read_parameter,
)
from mlc_compile.weights.reader import TensorInfo

Array = np.ndarray[Any, Any]


class Memory:
    """Tensors in memory."""

    files: tuple[Path, ...] = ()

    def __init__(self, arrays: dict[str, Array]) -> None:
        self.arrays = arrays

    @property
    def tensors(self) -> dict[str, TensorInfo]:
        return {
            name: TensorInfo(name, a.shape, str(a.dtype), a.nbytes, "memory")
            for name, a in self.arrays.items()
        }

    def read(self, name: str, rows: slice | None = None) -> Array:
        return self.arrays[name] if rows is None else self.arrays[name][rows]

    def release(self) -> None:
        pass


def checkpoint(**arrays: Array) -> Checkpoint:
    return Checkpoint(
        path=Path("memory"),
        format="safetensors",
        config={},
        generation_config={},
        sources=(),
        reader=Memory(arrays),
        tokenizer=None,  # type: ignore[arg-type]
    )


def numbered(*shape: int) -> Array:
    return np.arange(np.prod(shape), dtype=np.float32).reshape(shape)


# ---------------------------------------------------------------------------------------------
# Rows of heads


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (HeadRows(2, 1, 3), [0, 1, 2, 3, 4, 5]),
        # q of [q q k v] for two KV heads of size 1, then k, then v
        (HeadRows(2, 4, 1, 0, 2), [0, 1, 4, 5]),
        (HeadRows(2, 4, 1, 2, 1), [2, 6]),
        (HeadRows(2, 4, 1, 3, 1), [3, 7]),
        # (0, 1), (2, 3) turn together: even ones first, odd ones after; the rest stays
        (HeadRows(1, 1, 6, pairs=4), [0, 2, 1, 3, 4, 5]),
        (HeadRows(2, 1, 4, pairs=4), [0, 2, 1, 3, 4, 6, 5, 7]),
        (HeadRows(1, 3, 4, 1, 1, pairs=2), [4, 5, 6, 7]),
    ],
)
def test_rows_of_heads(rows: HeadRows, expected: list[int]) -> None:
    assert rows.indices().tolist() == expected
    assert rows.num_rows == len(expected) <= rows.source_rows


def test_interleaved_pairs_rotate_as_halves_do() -> None:
    """Rotating neighbours and then rearranging is rearranging and then rotating halves."""
    rng = np.random.default_rng(0)
    x, angle = rng.standard_normal(10), rng.standard_normal(4)
    turned = x.copy()
    for i, a in enumerate(angle):
        even, odd = x[2 * i], x[2 * i + 1]
        turned[2 * i] = even * np.cos(a) - odd * np.sin(a)
        turned[2 * i + 1] = odd * np.cos(a) + even * np.sin(a)
    order = HeadRows(1, 1, 10, pairs=8).indices()
    first, second, rest = np.split(x[order], [4, 8])
    cos, sin = np.cos(angle), np.sin(angle)
    halves = [first * cos - second * sin, second * cos + first * sin, rest]
    np.testing.assert_allclose(np.concatenate(halves), turned[order])


# ---------------------------------------------------------------------------------------------
# Parts


def spec(shape: tuple[int, ...], *parts: Source) -> ParamSpec:
    return ParamSpec("p", shape, "linear", parts)


CASES: dict[str, tuple[ParamSpec, dict[str, Array], Array]] = {
    "rows one after the other": (
        spec((4, 3), Source("a"), Source("b")),
        {"a": numbered(2, 3), "b": -numbered(2, 3)},
        np.concatenate([numbered(2, 3), -numbered(2, 3)]),
    ),
    "transposed": (
        spec((4, 3), Source("a", transposed=True)),
        {"a": numbered(3, 4)},
        numbered(3, 4).T,
    ),
    "cut out of a transposed one": (
        spec(
            (4, 3),
            Source("a", HeadRows(2, 2, 1, 1), transposed=True),
            Source("a", HeadRows(2, 2, 1, 0), transposed=True),
        ),
        {"a": numbered(3, 4)},
        numbered(3, 4).T[[1, 3, 0, 2]],
    ),
    "something added": (
        spec((3,), Source("a", add=1.0)),
        {"a": np.array([0.0, 0.5, -1.0], np.float16)},
        np.array([1.0, 1.5, 0.0], np.float32),
    ),
    "a vector that is stored as a matrix": (
        spec((6,), Source("a", HeadRows(2, 1, 3, pairs=2))),
        {"a": numbered(2, 3)},
        numbered(6),
    ),
    "a vector of vectors": (
        spec((4,), Source("a"), Source("b")),
        {"a": numbered(2), "b": numbered(2) + 5},
        np.array([0, 1, 5, 6], np.float32),
    ),
    "experts apart": (
        spec((2, 2, 3), *(Source(f"{which}{e}") for e in range(2) for which in "gu")),
        {f"{w}{e}": numbered(1, 3) + 10 * e + 5 * (w == "u") for e in range(2) for w in "gu"},
        numbered(3) + np.array([[0, 5], [10, 15]], np.float32)[..., None],
    ),
    "experts together": (spec((2, 4, 3), Source("a")), {"a": numbered(2, 4, 3)}, numbered(2, 4, 3)),
    "experts together, transposed": (
        spec((2, 4, 3), Source("a", transposed=True)),
        {"a": numbered(2, 3, 4)},
        numbered(2, 3, 4).swapaxes(1, 2),
    ),
}
cases = pytest.mark.parametrize(("param", "tensors", "whole"), CASES.values(), ids=CASES)


@cases
def test_parameters_are_made(param: ParamSpec, tensors: dict[str, Array], whole: Array) -> None:
    source = checkpoint(**tensors)
    found = read_parameter(param, source)
    assert found.shape == param.shape
    np.testing.assert_array_equal(found, whole)
    for name, shape in expected_shapes(param).items():
        assert np.prod(shape) == tensors[name].size
        assert len(param.shape) == 1 or shape == tensors[name].shape
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    rows = whole.reshape(-1, *param.shape[1:][-1:])
    for elements in (1, 2, 4, 7, 100):  # blocks of any size
        pieces = [
            part.read(source, block)
            for part in parts_in(param, shapes)
            for block in part.blocks(elements)
        ]
        np.testing.assert_array_equal(np.concatenate(pieces), rows)
        most = max(elements, rows[:1].size)
        assert all(piece.size <= most for piece in pieces)


@cases
def test_and_taken_apart_again(param: ParamSpec, tensors: dict[str, Array], whole: Array) -> None:
    back = dict(published((param,), {"p": whole.astype(np.float32)}))
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(back[name].reshape(tensor.shape), tensor)


def test_weights_of_another_shape_are_refused() -> None:
    with pytest.raises(ValueError, match=r"p is \[3, 4\], not \[4, 3\]"):
        dict(published((spec((4, 3), Source("a")),), {"p": numbered(3, 4)}))


def test_unit_rows() -> None:
    """A row of zeros has no length to be divided by."""
    param = spec((2, 2), Source("a", unit_rows=True))
    found = read_parameter(param, checkpoint(a=np.array([[3, 4], [0, 0]], np.float16)))
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, [[0.6, 0.8], [0, 0]])


def test_blocks_of_columns_count_the_whole_matrix() -> None:
    """Each of its rows is touched for a few columns."""
    part = Part(Source("a", transposed=True), (100, 50), vector=False)
    assert [part.touched(rows) for rows in part.blocks(1000)] == [5000] * 5
    assert Part(Source("a"), (100, 50), vector=False).touched(slice(0, 10)) == 500
