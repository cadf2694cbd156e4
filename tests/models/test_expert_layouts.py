"""Experts as checkpoints hold them: a tensor for each, or all in one as transformers 5 has them."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_models import TINY

from mlc_compile.models import load_model
from mlc_compile.weights.checkpoint import open_checkpoint
from mlc_compile.weights.parts import read_parameter

needs_transformers = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="transformers is an optional extra"
)

_ROUTED = {"num_local_experts": 3}
_QWEN = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 40}
TYPES: dict[str, dict[str, Any]] = {
    "mixtral": _ROUTED,
    "qwen2_moe": {**_QWEN, "shared_expert_intermediate_size": 24, "mlp_only_layers": [0]},
    "qwen3_moe": _QWEN,
    "olmoe": {"num_experts": 3, "num_experts_per_tok": 2},
    "granitemoe": _ROUTED,
    "granitemoeshared": {**_ROUTED, "shared_intermediate_size": 24},
}


@needs_transformers
@pytest.mark.parametrize("bare", [False, True], ids=["with head", "without"])
@pytest.mark.parametrize("model_type", TYPES)
def test_both_layouts_read_the_same(model_type: str, bare: bool, tmp_path: Path) -> None:
    import torch
    import transformers

    torch.manual_seed(0)
    keys = {**TINY, **TYPES[model_type], "tie_word_embeddings": True}
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(model_type, **keys)
    )
    found = []
    for original in (True, False):
        path = tmp_path / str(original)
        saved = model.model if bare else model
        saved.save_pretrained(path, save_original_format=original)
        checkpoint = open_checkpoint(path)
        raw = {k: v for k, v in checkpoint.config.items() if k != "architectures"}
        read = load_model(raw, where=str(path)).for_tensors(checkpoint.tensors)
        assert read.sources() <= set(checkpoint.tensors)
        specs = read.parameters()
        found.append({spec.name: read_parameter(spec, checkpoint) for spec in specs})
    published, stacked = found
    assert published.keys() == stacked.keys()
    for name, value in published.items():
        np.testing.assert_array_equal(value, stacked[name], err_msg=name)
    memory = model.model.layers[1]
    sparse = memory.mlp if hasattr(memory, "mlp") else memory.block_sparse_moe
    expected = sparse.experts.gate_up_proj.detach().numpy()
    np.testing.assert_array_equal(
        published["model.layers.1.mlp.experts.gate_up_proj.weight"], expected
    )
