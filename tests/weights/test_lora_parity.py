"""Adapters that PEFT itself writes, merged as its `merge_and_unload` merges them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlc_compile.weights.checkpoint import open_checkpoint

pytestmark = pytest.mark.slow
peft = pytest.importorskip("peft")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

LINEAR = ["q_proj", "v_proj", "down_proj"]
CASES: dict[str, dict[str, Any]] = {
    "plain": {"target_modules": LINEAR, "lora_alpha": 16},
    "every linear layer": {"target_modules": "all-linear"},
    "rslora": {"target_modules": LINEAR, "use_rslora": True},
    "dora": {"target_modules": LINEAR, "use_dora": True},
    "patterns": {
        "target_modules": LINEAR,
        "rank_pattern": {"layers.0.self_attn.q_proj": 2, "^model.layers.1.*down_proj": 3},
        "alpha_pattern": {"q_proj": 5},
    },
    "embedding and head": {"target_modules": [*LINEAR, "embed_tokens", "lm_head"]},
    "saved modules": {
        "target_modules": LINEAR,
        "modules_to_save": ["lm_head", "embed_tokens", "norm"],
    },
    "tied": {"target_modules": [*LINEAR, "embed_tokens"]},
    "conv1d": {"target_modules": ["c_attn", "c_fc", "c_proj"], "fan_in_fan_out": True},
}


def base_model(case: str) -> Any:
    if case == "conv1d":
        sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "bos_token_id": 0, "eos_token_id": 0}
        return transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=64, **sizes))
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=case == "tied",
    )
    return transformers.LlamaForCausalLM(config)


@pytest.mark.parametrize("case", CASES)
def test_merged_weights_are_those_of_peft(tmp_path: Path, case: str) -> None:
    torch.manual_seed(0)
    model = base_model(case)
    model.save_pretrained(tmp_path / "base")
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, **CASES[case]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name and "magnitude" not in name:
                parameter.copy_(torch.randn_like(parameter) * 0.3)
            elif "magnitude" in name or "modules_to_save" in name:
                parameter.mul_(1.3)
    model.save_pretrained(tmp_path / "adapter")
    expected = model.merge_and_unload().state_dict()
    plain = open_checkpoint(tmp_path / "base")
    merged = open_checkpoint(tmp_path / "base", lora=[tmp_path / "adapter"])
    changed = 0
    for name in merged.tensors:
        key = name if name in expected else f"transformer.{name}"
        wanted, got = expected[key].numpy(), merged.read(name)
        assert np.abs(got - wanted).max() <= 5e-7 * np.abs(wanted).max(), name
        changed += got.tobytes() != plain.read(name).tobytes()
    assert changed >= 6
