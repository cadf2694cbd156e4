"""What configs of sparse experts, and of classes that bring their own code, may say and may not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mlc_compile.config import read_json_strict
from mlc_compile.errors import InputError
from mlc_compile.models import Model, load_model
from mlc_compile.models.options import Alibi, SparseMLP

CONFIGS = Path(__file__).parent.parent / "configs"


def load(name: str, **changes: Any) -> Model:
    """`...` drops a key."""
    raw = {**read_json_strict(CONFIGS / f"{name}.json"), **changes}
    return load_model({k: v for k, v in raw.items() if v is not ...}, where="config.json")


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("Mixtral-8x7B-v0.1", {"num_local_experts": 0}, "num_local_experts is 0, outside"),
    ("Mixtral-8x7B-v0.1", {"num_experts_per_tok": 9}, "num_experts_per_tok is 9, outside"),
    ("Mixtral-8x7B-v0.1", {"num_experts": 7}, "num_local_experts is 8 but num_experts is 7"),
    ("Mixtral-8x7B-v0.1", {"norm_topk_prob": False}, "unknown key norm_topk_prob"),
    ("Qwen1.5-MoE-A2.7B-Chat", {"use_sliding_window": True}, "use_sliding_window is true; only"),
    ("Qwen1.5-MoE-A2.7B-Chat", {"mlp_only_layers": [True]}, "must be a list of integers"),
    ("Qwen1.5-MoE-A2.7B-Chat", {"n_group": 2}, "unknown key n_group"),
    ("Qwen3-30B-A3B", {"decoder_sparse_step": 0}, "decoder_sparse_step is 0, outside"),
    ("deepseek-moe-16b-base", {"scoring_func": "sigmoid"}, "scoring_func is"),
    ("deepseek-moe-16b-base", {"routed_scaling_factor": 2.0}, "unknown key routed_scaling"),
    ("deepseek-moe-16b-base", {"n_shared_experts": "two"}, "cannot be made from the other"),
    ("Qwen-1_8B", {"no_bias": False}, "no_bias is false; only true"),
    ("Qwen-1_8B", {"scale_attn_weights": False}, "scale_attn_weights is false"),
    ("Qwen-1_8B", {"seq_length": ...}, "cannot be made from the other keys"),
    ("internlm-chat-7b", {"rotary": {"base": 10000, "type": "3d"}}, "3d"),
    ("Baichuan-7B", {"vocab_size": 64001}, "vocab_size is 64001; 64000"),
    ("Baichuan-13B-Base", {"model_max_length": ...}, "cannot be made from the other keys"),
    ("chatglm3-6b", {"multi_query_attention": False}, "multi_query_attention is false"),
    ("chatglm3-6b", {"multi_query_attention": ...}, "multi_query_attention is false"),
    ("chatglm3-6b", {"rmsnorm": False}, "rmsnorm is false"),
    ("chatglm3-6b", {"position_encoding_2d": True}, "unknown key position_encoding_2d"),
    ("chatglm3-6b", {"padded_vocab_size": ..., "vocab_size": ...}, "vocab_size is missing"),
    ("chatglm3-6b", {"num_hidden_layers": 5}, "num_layers is 28 but num_hidden_layers is 5"),
    ("MiniCPM-2B-sft-bf16", {"hidden_act": "fatrelu"}, "hidden_act is .fatrelu"),
    ("MiniCPM-2B-sft-bf16", {"sparse_config": {"block_size": 64}}, "sparse_config is"),
]


@pytest.mark.parametrize(("name", "changes", "message"), REFUSED, ids=lambda x: str(x)[:40])
def test_refused(name: str, changes: dict[str, Any], message: str) -> None:
    if name.startswith("MiniCPM"):
        changes = {"model_type": "minicpm", **changes}
    with pytest.raises(InputError, match=message):
        load(name, **changes)


def test_which_layers_are_sparse() -> None:
    def sparse(model: Model) -> list[int]:
        return [i for i, layer in enumerate(model.config.layers) if layer.sparse]

    assert sparse(load("deepseek-moe-16b-base")) == list(range(1, 28))
    assert sparse(load("deepseek-moe-16b-base", moe_layer_freq=5)) == [5, 10, 15, 20, 25]
    changed = load("Qwen3-30B-A3B", mlp_only_layers=[1, 7], decoder_sparse_step=2)
    assert sparse(changed) == [i for i in range(1, 48, 2) if i not in (1, 7)]
    dense = {spec.name: spec.shape for spec in changed.parameters()}
    assert dense["model.layers.1.mlp.gate_up_proj.weight"] == (2 * 6144, 2048)
    assert dense["model.layers.3.mlp.experts.gate_up_proj.weight"] == (128, 2 * 768, 2048)
    assert dense["model.layers.3.mlp.gate.weight"] == (128, 2048)


def test_shared_experts() -> None:
    deepseek = load("deepseek-moe-16b-base").config.experts
    assert deepseek is not None and deepseek.shared_intermediate_size == 2 * 1408
    alone = load("deepseek-moe-16b-base", n_shared_experts=None)
    assert alone.config.experts is not None
    assert alone.config.experts.shared_intermediate_size == 0
    assert not [spec.name for spec in alone.parameters() if "shared" in spec.name]


@pytest.mark.parametrize(
    ("name", "alibi", "unit"),
    [
        ("Baichuan-7B", False, False),
        ("Baichuan-13B-Base", True, False),
        ("Baichuan2-7B-Base", False, True),
        ("Baichuan2-13B-Base", True, True),
    ],
)
def test_four_models_of_one_type(name: str, alibi: bool, unit: bool) -> None:
    model = load(name)
    assert isinstance(model.arch.positions, Alibi) == alibi
    head = next(spec for spec in model.parameters() if spec.role == "lm_head")
    assert [part.unit_rows for part in head.parts] == [unit]
    assert model.config.max_position_embeddings == 4096


def test_values_made_of_several_keys() -> None:
    minicpm = load("MiniCPM-2B-sft-bf16", model_type="minicpm").config
    assert minicpm.tie_word_embeddings
    assert minicpm.residual_scale == pytest.approx(1.4 / 40**0.5)
    assert minicpm.logits_scale == pytest.approx(256 / 2304)
    glm4 = load("glm-4-9b-chat").config
    assert (glm4.rope.theta, glm4.rope.rotary_dim, glm4.head_dim) == (5e6, 64, 128)
    qwen = load("Qwen-1_8B", max_position_embeddings=32768).config
    assert (qwen.intermediate_size, qwen.max_position_embeddings) == (5504, 8192)
    experts = load(
        "MiniCPM-2B-sft-bf16", model_type="minicpm", num_experts=8, num_experts_per_tok=2
    )
    assert isinstance(experts.arch.mlp, SparseMLP)
    old = load("internlm-chat-7b", rotary={"base": 20000, "type": "dynamic"}).config.rope
    assert (old.kind, old.theta) == ("dynamic", 20000)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("Llama-2-7b-hf", {"pretraining_tp": 2, "max_sequence_length": 2048}),
        ("Llama-2-7b-hf", {"architectures": ["LLaMAForCausalLM"], "model_max_length": 4096}),
        ("Qwen1.5-MoE-A2.7B-Chat", {"sliding_window": 0}),
        ("Qwen3-30B-A3B", {"num_experts": ..., "num_local_experts": 128}),
        ("Mixtral-8x7B-v0.1", {"router_jitter_noise": 0.1, "head_dim": None}),
    ],
)
def test_accepted(name: str, changes: dict[str, Any]) -> None:
    assert load(name, **changes).parameters() == load(name).parameters()
