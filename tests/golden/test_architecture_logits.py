"""Stored logits of every architecture: declarations, mapping and numpy decoder without torch.

The compiled libraries are compared with the reference itself in tests/parity.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from make_architecture_golden import FILE, POSITIONS, numpy_logits, write_weights

from mlc_compile.models import ARCHITECTURES


def test_the_file_is_whole_and_small() -> None:
    with np.load(FILE) as stored:
        assert set(stored) == {
            f"{n}.{part}" for n in ARCHITECTURES for part in ("config", "logits")
        }
    assert FILE.stat().st_size < 300_000


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_numpy_decoder_gives_the_stored_logits(name: str, tmp_path: Path) -> None:
    with np.load(FILE) as stored:
        config = json.loads(stored[f"{name}.config"].tobytes())
        expected = stored[f"{name}.logits"]
    write_weights(config, tmp_path)
    found = numpy_logits(tmp_path)
    assert found.shape == expected.shape and expected.shape[0] == len(POSITIONS)
    assert np.square(found - expected).mean() <= 1e-9 * np.square(expected).mean()
    assert (found.argmax(-1) == expected.argmax(-1)).all()
