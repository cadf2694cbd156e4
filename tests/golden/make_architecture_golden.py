"""Stored logits of a tiny model of every architecture.

`python tests/golden/make_architecture_golden.py` writes architectures/logits.npz again. The weights
come from numpy seeds alone; the logits of classes that transformers has are transformers', read
from the checkpoint as published, and those of the others our numpy decoder's (which the parity
tests compare with twins). Needed when an architecture is added; the change says so.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

HERE = Path(__file__).resolve().parent
FILE = HERE / "architectures" / "logits.npz"
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "parity")]

TOKENS = 70  # longer than any tiny window
POSITIONS = (5, 69)
KEPT = 320  # logits of so many tokens of the vocabulary


def write_weights(config: Mapping[str, Any], path: Path) -> None:
    """A checkpoint of this config.json; the same bytes on every machine."""
    from safetensors.numpy import save_file

    from mlc_compile.models import load_model
    from mlc_compile.models.params import expected_shapes

    random = np.random.RandomState(0)  # its streams never change
    tensors = {}
    for spec in load_model(config, where="config.json").parameters():
        for source, shape in expected_shapes(spec).items():
            add = next(part.add for part in spec.parts if part.name == source)
            mean = 1 - add if spec.role == "norm" and source.endswith("weight") else 0.0
            values = mean + 0.15 * random.standard_normal(shape)
            tensors[source] = values.astype(np.float32)
    path.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    (path / "config.json").write_text(json.dumps(dict(config)))


def text(vocab_size: int) -> list[int]:
    """The tokens whose logits are stored."""
    return [int(t) for t in np.random.RandomState(1).randint(0, vocab_size, TOKENS)]


def numpy_logits(path: Path) -> NDArray[np.float32]:
    """Of our decoder in numpy, at POSITIONS."""
    from mlc_compile.models import load_model
    from mlc_compile.runtime.reference import Attention, NumpyReference, checkpoint_weights
    from mlc_compile.weights.checkpoint import open_checkpoint

    checkpoint = open_checkpoint(path)
    model = load_model(checkpoint.config, where=path.name)
    attention = Attention(model.config.sliding_window, 0, TOKENS)
    decoder = NumpyReference(model, checkpoint_weights(model, checkpoint), attention)
    return decoder.logits(text(model.config.vocab_size), POSITIONS)[:, :KEPT]


def _transformers_logits(path: Path) -> NDArray[np.float32]:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    with torch.inference_mode():
        ids = torch.tensor([text(model.config.vocab_size)])
        logits = model(input_ids=ids, use_cache=False).logits[0]
    found: NDArray[np.float32] = logits[list(POSITIONS), :KEPT].float().numpy()
    return found


def main() -> None:
    from test_architectures import CASES
    from tiny_models import save_checkpoint

    from mlc_compile.config import read_json_strict
    from mlc_compile.models import ARCHITECTURES

    stored: dict[str, NDArray[Any]] = {}
    for name in ARCHITECTURES:
        case = CASES[name]
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder) / "source"
            if case.twin is None:
                save_checkpoint(source, case.model_type, config=case.config)
            else:
                source.mkdir()
                case.twin(source, 0)
            config = read_json_strict(source / "config.json")
            write_weights(config, Path(folder) / "weights")
            own = numpy_logits(Path(folder) / "weights")
            logits = own if case.twin else _transformers_logits(Path(folder) / "weights")
        error = np.square(own - logits).mean() / np.square(logits).mean()
        print(f"{name:<18} {'numpy' if case.twin else 'transformers':<13} {error:.1e}")
        stored[f"{name}.config"] = np.frombuffer(json.dumps(config).encode(), np.uint8)
        stored[f"{name}.logits"] = logits
    FILE.parent.mkdir(exist_ok=True)
    np.savez_compressed(FILE, **stored)


if __name__ == "__main__":
    main()
