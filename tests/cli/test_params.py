"""Option types: sizes and overrides, and their errors."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import click
import pytest
from click.testing import Result

from mlc_compile.cli._params import COMPILE_NUMBERS, OVERRIDES, SIZE
from mlc_compile.config import resolve_compile_config


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("4GiB", 4 << 30),
        ("1.5 gib", 3 << 29),
        ("500MB", 500_000_000),
        ("2kb", 2000),
        ("64B", 64),
        ("1TiB", 1 << 40),
    ],
)
def test_size(text: str, size: int) -> None:
    assert SIZE.convert(text, None, None) == size


@pytest.mark.parametrize(
    "text", ["4G", "4", "GiB", "-1GiB", "0MB", "four GB", "", "1e3MB", "4GiBs"]
)
def test_bad_size(text: str) -> None:
    with pytest.raises(click.BadParameter):
        SIZE.convert(text, None, None)


def test_overrides() -> None:
    text = " context_window_size=2048; max_batch_size = 1;sliding_window_size=-1; "
    assert OVERRIDES.convert(text, None, None) == {
        "context_window_size": 2048,
        "max_batch_size": 1,
        "sliding_window_size": -1,
    }
    assert OVERRIDES.convert("", None, None) == {}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("context_window=2048", "context_window_size"),
        ("max_batch_size", "has no value"),
        ("max_batch_size=", "has no value"),
        ("max_batch_size=4k", "not a whole number"),
        ("max_batch_size=1.5", "not a whole number"),
        ("max_batch_size=1;max_batch_size=2", "twice"),
        ("max_batch_size=1,prefill_chunk_size=2", "not a whole number"),
    ],
)
def test_bad_overrides(text: str, said: str) -> None:
    with pytest.raises(click.BadParameter, match=said):
        OVERRIDES.convert(text, None, None)


def test_numbers_are_those_of_the_configuration() -> None:
    parameters = inspect.signature(resolve_compile_config).parameters
    assert list(COMPILE_NUMBERS) == [n for n in parameters if n not in ("model", "target_defaults")]


@pytest.mark.parametrize(
    "words",
    [
        ["compile", ".", "-o", "x.so", "--budget", "4G"],
        ["compile", ".", "-o", "x.so", "--overrides", "window=4"],
        ["compile", "no/such/dir", "-o", "x.so"],
        ["convert_weight", ".", "-o", "x", "--quantization", "q0f32", "--source-format", "onnx"],
        ["gen_config", ".", "-o", "x", "--quantization", "q0f32", "--max-batch-size", "two"],
        ["run", ".", "--lib", ".", "-p", "x"],
    ],
    ids=" ".join,
)
def test_bad_values_are_refused_before_any_work(
    words: list[str], invoke: Callable[..., Result]
) -> None:
    result = invoke(*words)
    assert result.exit_code == 2
    assert result.stderr.startswith("error: Invalid value for ")
    assert result.stderr.count("\n") == 1
