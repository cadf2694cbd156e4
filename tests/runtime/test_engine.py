"""The engine's own bookkeeping, on a library that only records; numbers are verify's business."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from mlc_compile.errors import InputError
from mlc_compile.runtime.engine import Engine


def engine(window: int) -> tuple[Engine, list[tuple[Any, ...]]]:
    """An engine over nothing, and the calls that reach the runtime."""
    seen: list[tuple[Any, ...]] = []

    class Recorded(dict[str, Any]):
        def __missing__(self, name: str) -> Any:
            return lambda *args: seen.append((name, *args[1:])) or [logits]

    logits = SimpleNamespace(numpy=lambda: np.zeros((1, 1, 4), np.float32))
    library = SimpleNamespace(
        kv=Recorded(),
        vm=Recorded(),
        shape=lambda *extents: extents,
        tensor=lambda array: array,
        metadata={"context_window_size": -1 if window > 0 else 64},
    )
    return Engine(library, [], object(), 4, window, 0), seen  # type: ignore[arg-type]


def test_prompts_are_fed_in_chunks() -> None:
    subject, seen = engine(-1)
    subject.add_sequence(0)
    subject.prefill(0, list(range(10)))
    begun = [call[2] for call in seen if call[0] == "kv_state_begin_forward"]
    assert begun == [(4,), (4,), (2,)]
    assert subject.lengths == {0: 10}
    with pytest.raises(InputError, match="empty prompt"):
        subject.prefill(0, [])


def test_lengths_follow_forks_pops_and_removal() -> None:
    subject, _ = engine(-1)
    subject.add_sequence(0)
    subject.prefill(0, list(range(10)))
    subject.fork_sequence(0, 1, 6)
    subject.fork_sequence(0, 2)
    subject.decode(1, 3)
    subject.pop(0, 4)
    assert subject.lengths == {0: 6, 1: 7, 2: 10}
    subject.remove_sequence(1)
    assert subject.lengths == {0: 6, 2: 10}
    subject.clear()
    assert subject.lengths == {}


def test_a_window_that_has_slid_cannot_go_back() -> None:
    subject, seen = engine(8)
    subject.add_sequence(0)
    assert seen[-1] == ("attention_kv_cache_enable_sliding_window_for_seq", 0, 8, 0)
    subject.prefill(0, list(range(8)))
    subject.pop(0, 2)
    subject.prefill(0, [1, 2, 3])
    with pytest.raises(InputError, match="sequence 0 has 9 tokens, more than the sliding window"):
        subject.pop(0, 1)
    assert sum(call[0] == "kv_state_popn" for call in seen) == 1


def test_an_adapter_without_a_feature_is_refused(webgpu: str) -> None:
    from pathlib import Path

    from mlc_compile.errors import EnvironmentLacksError
    from mlc_compile.runtime.engine import _check_adapter

    _check_adapter(Path("model.so"), [])
    with pytest.raises(EnvironmentLacksError, match=r"model\.so needs no-such-feature, which"):
        _check_adapter(Path("model.so"), ["no-such-feature"])
