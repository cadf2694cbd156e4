"""Cases of sparse experts, and of Llama-likes whose code comes with their checkpoints."""

from __future__ import annotations

from collections.abc import Mapping

from architecture_cases import Case
from twins import TWINS

_MIXTRAL = {"num_local_experts": 5, "num_experts_per_tok": 2}
_QWEN = {
    "num_hidden_layers": 3,
    "num_experts": 6,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 40,
}
_OLMOE = {"num_experts": 6, "num_experts_per_tok": 3, "num_key_value_heads": 2}
_GRANITE = {
    **_MIXTRAL,
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.4,
    "attention_multiplier": 0.11,
    "logits_scaling": 2.5,
    "tie_word_embeddings": True,
}
_WINDOW = {"sliding_window_size": 21, "prefill_chunk_size": 16, "max_batch_size": 3}
_SLIDING = frozenset({"full_context", "fork"})

CASES: Mapping[str, Case] = {
    "mixtral": Case("mixtral", _MIXTRAL),
    "mixtral-window": Case("mixtral", {**_MIXTRAL, "sliding_window": 21}, _WINDOW, _SLIDING),
    "qwen2_moe": Case(
        "qwen2_moe",
        {**_QWEN, "shared_expert_intermediate_size": 56, "mlp_only_layers": [0]},
    ),
    "qwen2_moe-renormalized": Case(
        "qwen2_moe",
        {
            **_QWEN,
            "shared_expert_intermediate_size": 36,
            "decoder_sparse_step": 2,
            "norm_topk_prob": True,
            "qkv_bias": False,
        },
    ),
    "qwen3_moe": Case(
        "qwen3_moe", {**_QWEN, "head_dim": 36, "norm_topk_prob": True, "mlp_only_layers": [1]}
    ),
    "qwen3_moe-window": Case(
        "qwen3_moe",
        {**_QWEN, "use_sliding_window": True, "sliding_window": 21, "attention_bias": True},
        _WINDOW,
        _SLIDING,
    ),
    "olmoe": Case("olmoe", _OLMOE),
    "olmoe-clipped": Case(
        "olmoe", {**_OLMOE, "clip_qkv": 0.7, "norm_topk_prob": True, "attention_bias": True}
    ),
    "granitemoe": Case("granitemoe", _GRANITE),
    "granitemoe-biases": Case(
        "granitemoe", {**_MIXTRAL, "attention_bias": True, "attention_multiplier": 0.2}
    ),
    "granitemoeshared": Case("granitemoeshared", {**_GRANITE, "shared_intermediate_size": 56}),
    # Scores are not scaled without attention_multiplier; where softmax is all but a maximum,
    # float32 alone makes 5e-10 (torch against itself in float64).
    "granitemoeshared-without": Case("granitemoeshared", {**_MIXTRAL, "initializer_range": 0.08}),
    "internlm3": Case("internlm3", {"attention_bias": True, "mlp_bias": True, "head_dim": 20}),
    **{name: Case(name.split("-")[0], twin=twin) for name, twin in TWINS.items()},
}
