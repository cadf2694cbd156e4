"""Tiny checkpoints made from numpy seeds alone, and the stored logits that belong to them.

`python tests/golden/make_golden.py` writes *.npz again, with transformers as the reference. Needed
only when a model here, the storage format or the choice of contexts changes; the change says so.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

VOCAB = 64
SIZES = {"context_window_size": 96, "prefill_chunk_size": 40, "max_batch_size": 3}
WINDOW_SIZES = {"sliding_window_size": 20, "prefill_chunk_size": 16, "max_batch_size": 3}

_COMMON: Mapping[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "eos_token_id": 0,
}
# name -> (config.json, sizes of the library)
MODELS: Mapping[str, tuple[Mapping[str, Any], Mapping[str, int]]] = {
    "llama": (
        {**_COMMON, "model_type": "llama", "architectures": ["LlamaForCausalLM"]},
        SIZES,
    ),
    "mistral_window": (
        {
            **_COMMON,
            "model_type": "mistral",
            "architectures": ["MistralForCausalLM"],
            "head_dim": 32,
            "sliding_window": 20,
        },
        WINDOW_SIZES,
    ),
}


def write_checkpoint(name: str, path: Path, seed: int = 0) -> Path:
    """The checkpoint of one of MODELS; the same bytes on every machine."""
    from safetensors.numpy import save_file

    from mlc_compile.models import load_model
    from mlc_compile.weights.parts import expected_shapes

    config, _ = MODELS[name]
    model = load_model(config, where=name)
    random = np.random.RandomState(seed)  # its streams never change
    tensors = {}
    for spec in model.parameters():
        for source, shape in expected_shapes(spec).items():
            values = 0.18 * random.standard_normal(shape)
            tensors[source] = (values + (spec.role == "norm")).astype(np.float32)
    path.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(dict(config)))
    _write_tokenizer(path)
    return path


def _write_tokenizer(path: Path) -> None:
    """One word for each token."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<unk>", "The", "capital", "of", "France", "is", *map(str, range(VOCAB - 6))]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<unk>"}))


def main() -> None:
    from tiny_models import build

    from mlc_compile.runtime.verify import verify

    for name, (_, sizes) in MODELS.items():
        with tempfile.TemporaryDirectory() as folder:
            checkpoint = write_checkpoint(name, Path(folder) / "checkpoint")
            built = build(checkpoint, "q0f32", Path(folder) / "out", sizes)
            report = verify(
                built.directory,
                built.library,
                checkpoint,
                engine="transformers",
                write_golden=HERE / f"{name}.npz",
            )
            print(report.to_text())


if __name__ == "__main__":
    main()
