"""Classes that transformers lacks (their code lies beside published checkpoints), by twins.

A twin is a transformers model that computes the same. Its tensors are written in the layout of the
published class, by rules that are spelled out here a second time, so that a name or an order that
our tables have wrong shows as wrong logits; the reference is the twin itself, not what was written.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tiny_models import TINY, randomize

Tensors = dict[str, Any]
Keys = dict[str, Any]
Logits = Callable[[Sequence[int]], NDArray[np.float32]]

_TOKENS = {"bos_token_id": None, "eos_token_id": 256, "pad_token_id": None}


@dataclass(frozen=True)
class Twin:
    """One published class, as a transformers model type of the same maths.

    Attributes:
        model_type: the twin's.
        changes: of TINY, for the twin.
        keys: the published class's config.json, of the twin's configuration.
        write: the twin's tensors in the published layout.
        prepare: what the twin must change in its modules.
        bias: what the twin adds to scores, [heads, n, n], of its configuration and n.
    """

    model_type: str
    changes: Mapping[str, Any]
    keys: Callable[[Any], Keys]
    write: Callable[[Tensors, Any], Tensors] = lambda tensors, config: tensors
    prepare: Callable[[Any], None] = lambda model: None
    bias: Callable[[Any, int], Any] | None = None

    def __call__(self, path: Path, seed: int) -> Logits:
        """As `architecture_cases.Twin`."""
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        config = AutoConfig.for_model(self.model_type, **{**TINY, **self.changes})
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        randomize(model)
        self.prepare(model)
        from safetensors.torch import save_file

        tensors = {k: v.detach().clone() for k, v in model.state_dict().items()}
        written = self.write(tensors, config)
        save_file({k: v.contiguous() for k, v in written.items()}, path / "model.safetensors")
        (path / "config.json").write_text(json.dumps({**_TOKENS, **self.keys(config)}))

        def logits(text: Sequence[int]) -> NDArray[np.float32]:
            more = {}
            if self.bias is not None:
                more["attention_mask"] = self.bias(config, len(text))[None]
            with torch.inference_mode():
                out = model(input_ids=torch.tensor([list(text)]), use_cache=False, **more)
            result: NDArray[np.float32] = out.logits[0].numpy()
            return result

        return logits


# ---------------------------------------------------------------------------------------------
# Tensors


def _layers(tensors: Tensors, config: Any) -> list[tuple[int, str]]:
    return [(i, f"model.layers.{i}.") for i in range(config.num_hidden_layers)]


def _renamed(tensors: Tensors, *changes: tuple[str, str]) -> Tensors:
    """Each name with all replacements, in order."""
    found: Tensors = {}
    for name, tensor in tensors.items():
        for old, new in changes:
            name = name.replace(old, new)
        found[name] = tensor
    return found


def _qkv(tensors: Tensors, prefix: str, suffix: str) -> list[Any]:
    return [tensors.pop(f"{prefix}self_attn.{x}_proj.{suffix}") for x in "qkv"]


def _cat(parts: Sequence[Any]) -> Any:
    import torch

    return torch.cat(list(parts))


def _write_qwen(tensors: Tensors, config: Any) -> Tensors:
    for _, p in _layers(tensors, config):
        for suffix in ("weight", "bias"):
            tensors[f"{p}attn.c_attn.{suffix}"] = _cat(_qkv(tensors, p, suffix))
    return _renamed(
        tensors,
        ("model.layers", "transformer.h"),
        ("model.embed_tokens", "transformer.wte"),
        ("model.norm", "transformer.ln_f"),
        ("input_layernorm", "ln_1"),
        ("post_attention_layernorm", "ln_2"),
        ("self_attn.o_proj", "attn.c_proj"),
        ("mlp.up_proj", "mlp.w1"),
        ("mlp.gate_proj", "mlp.w2"),
        ("mlp.down_proj", "mlp.c_proj"),
    )


def _write_internlm2(tensors: Tensors, config: Any) -> Tensors:
    kv, d = config.num_key_value_heads, config.head_dim
    group = config.num_attention_heads // kv
    for _, p in _layers(tensors, config):
        for suffix in ("weight", "bias"):
            q, k, v = _qkv(tensors, p, suffix)
            rows = []
            for g in range(kv):
                rows += [q[g * group * d : (g + 1) * group * d]]
                rows += [k[g * d : (g + 1) * d], v[g * d : (g + 1) * d]]
            tensors[f"{p}attention.wqkv.{suffix}"] = _cat(rows)
    return _renamed(
        tensors,
        ("self_attn.o_proj", "attention.wo"),
        ("mlp.gate_proj", "feed_forward.w1"),
        ("mlp.down_proj", "feed_forward.w2"),
        ("mlp.up_proj", "feed_forward.w3"),
        ("input_layernorm", "attention_norm"),
        ("post_attention_layernorm", "ffn_norm"),
        ("embed_tokens", "tok_embeddings"),
        ("lm_head", "output"),
    )


def _write_exaone(tensors: Tensors, config: Any) -> Tensors:
    return _renamed(
        tensors,
        ("model.layers", "transformer.h"),
        ("model.embed_tokens", "transformer.wte"),
        ("model.norm", "transformer.ln_f"),
        ("input_layernorm", "ln_1"),
        ("post_attention_layernorm", "ln_2"),
        ("self_attn.o_proj", "attn.attention.out_proj"),
        ("self_attn", "attn.attention"),
        ("mlp.gate_proj", "mlp.c_fc_0"),
        ("mlp.up_proj", "mlp.c_fc_1"),
        ("mlp.down_proj", "mlp.c_proj"),
    )


def _write_baichuan(tensors: Tensors, config: Any) -> Tensors:
    for _, p in _layers(tensors, config):
        tensors[f"{p}self_attn.W_pack.weight"] = _cat(_qkv(tensors, p, "weight"))
    return tensors


def _write_baichuan2(tensors: Tensors, config: Any) -> Tensors:
    """The head as trained: no row has length one, though each is used as if it had."""
    import torch

    tensors = _write_baichuan(tensors, config)
    lengths = torch.linspace(0.5, 3.0, config.vocab_size)[:, None]
    return {**tensors, "lm_head.weight": tensors["lm_head.weight"] * lengths}


def _unit_head(model: Any) -> None:
    import torch

    with torch.no_grad():
        model.lm_head.weight /= model.lm_head.weight.norm(dim=1, keepdim=True)


def _write_chatglm(tensors: Tensors, config: Any) -> Tensors:
    import torch

    for _, p in _layers(tensors, config):
        for suffix in ("weight", "bias"):
            tensors[f"{p}self_attention.query_key_value.{suffix}"] = _cat(_qkv(tensors, p, suffix))
    found = _renamed(
        tensors,
        ("model.layers", "transformer.encoder.layers"),
        ("model.norm", "transformer.encoder.final_layernorm"),
        ("model.embed_tokens", "transformer.embedding.word_embeddings"),
        ("lm_head", "transformer.output_layer"),
        ("self_attn.o_proj", "self_attention.dense"),
        ("mlp.gate_up_proj", "mlp.dense_h_to_4h"),
        ("mlp.down_proj", "mlp.dense_4h_to_h"),
    )
    return {**found, "transformer.rotary_pos_emb.inv_freq": torch.ones(config.head_dim // 4)}


def _experts(tensors: Tensors, prefix: str, names: tuple[str, str, str]) -> None:
    """3-D tensors `prefix`experts.* become a gate, an up and a down matrix for each expert."""
    both = tensors.pop(f"{prefix}experts.gate_up_proj")
    downs = tensors.pop(f"{prefix}experts.down_proj")
    for e, (gate_up, down) in enumerate(zip(both, downs, strict=True)):
        gate, up = gate_up.chunk(2)
        for name, tensor in zip(names, (gate, up, down), strict=True):
            tensors[f"{prefix}experts.{e}.{name}.weight"] = tensor.clone()


def _write_deepseek(tensors: Tensors, config: Any) -> Tensors:
    for i, p in _layers(tensors, config):
        if i not in config.mlp_only_layers:
            _experts(tensors, f"{p}mlp.", ("gate_proj", "up_proj", "down_proj"))
    return _renamed(tensors, (".shared_expert.", ".shared_experts."))


def _open_gate(model: Any) -> None:
    """What sigmoid makes a one of: a shared expert that is simply added."""
    import torch

    class Open(torch.nn.Module):
        def forward(self, x: Any) -> Any:
            return torch.full((*x.shape[:-1], 1), math.inf)

    for layer in model.model.layers:
        if hasattr(layer.mlp, "shared_expert_gate"):
            layer.mlp.shared_expert_gate = Open()


def _write_minicpm_moe(tensors: Tensors, config: Any) -> Tensors:
    tensors = _renamed(
        tensors,
        ("block_sparse_moe.router.", "mlp.gate."),
        ("block_sparse_moe.", "mlp."),
    )
    for _, p in _layers(tensors, config):
        _experts(tensors, f"{p}mlp.", ("w1", "w3", "w2"))
    return tensors


# ---------------------------------------------------------------------------------------------
# ALiBi


def _no_rotation(model: Any) -> None:
    import torch

    class Still(torch.nn.Module):
        def forward(self, x: Any, position_ids: Any) -> tuple[Any, Any]:
            shape = (*position_ids.shape, model.config.head_dim)
            return torch.ones(shape), torch.zeros(shape)

    model.model.rotary_emb = Still()


def _alibi(config: Any, n: int) -> Any:
    """[heads, n, n]: -slope * distance; slopes as in Press et al., 2021: of the next lower power of
    two, then every other one of twice as many."""
    import torch

    heads = config.num_attention_heads
    near = 2 ** int(math.log2(heads))
    slopes = [2 ** (-8 * (i + 1) / near) for i in range(near)]
    slopes += [2 ** (-8 * (i + 1) / (2 * near)) for i in range(0, 2 * near, 2)][: heads - near]
    distance = np.arange(n)[:, None] - np.arange(n)[None]
    scores = -np.asarray(slopes)[:, None, None] * distance
    scores = np.where(distance < 0, -np.inf, scores)
    return torch.from_numpy(scores.astype(np.float32))


# ---------------------------------------------------------------------------------------------
# config.json


def _common(config: Any, name: str, model_type: str) -> Keys:
    return {
        "architectures": [name],
        "auto_map": {"AutoModelForCausalLM": f"modeling.{name}"},
        "model_type": model_type,
        "hidden_size": config.hidden_size,
        "num_attention_heads": config.num_attention_heads,
        "vocab_size": config.vocab_size,
        "tie_word_embeddings": config.tie_word_embeddings,
        "torch_dtype": "float32",
        "use_cache": True,
    }


def _llama_like(config: Any, name: str, model_type: str, **more: Any) -> Keys:
    return {
        **_common(config, name, model_type),
        "hidden_act": "silu",
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_key_value_heads": config.num_key_value_heads,
        "max_position_embeddings": config.max_position_embeddings,
        **({"rms_norm_eps": config.rms_norm_eps} if hasattr(config, "rms_norm_eps") else {}),
        **more,
    }


def _qwen_keys(config: Any) -> Keys:
    return {
        **_common(config, "QWenLMHeadModel", "qwen"),
        "intermediate_size": 2 * config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "kv_channels": config.head_dim,
        "layer_norm_epsilon": config.rms_norm_eps,
        "max_position_embeddings": 4 * config.max_position_embeddings,
        "seq_length": config.max_position_embeddings,
        "rotary_emb_base": 10000,
        "rotary_pct": 1.0,
        "no_bias": True,
        "scale_attn_weights": True,
        "use_dynamic_ntk": True,
        "use_logn_attn": True,
        "use_flash_attn": "auto",
    }


def _exaone_keys(config: Any) -> Keys:
    renamed = {
        "hidden_act": "activation_function",
        "num_hidden_layers": "num_layers",
        "rms_norm_eps": "layer_norm_epsilon",
    }
    keys = _llama_like(config, "ExaoneForCausalLM", "exaone", embed_dropout=0.0)
    keys = {renamed.get(key, key): value for key, value in keys.items()}
    rope = dict(config.rope_parameters)
    theta = rope.pop("rope_theta")
    return {**keys, "head_dim": config.head_dim, "rope_theta": theta, "rope_scaling": rope}


def _baichuan_keys(config: Any, name: str, *, alibi: bool = False) -> Keys:
    keys = _llama_like(config, name, "baichuan", model_max_length=config.max_position_embeddings)
    del keys["num_key_value_heads"]
    if alibi:
        del keys["max_position_embeddings"]
        keys["gradient_checkpointing"] = [False]
    return keys


def _chatglm_keys(config: Any) -> Keys:
    keys = {
        **_common(config, "ChatGLMModel", "chatglm"),
        "add_bias_linear": False,
        "add_qkv_bias": True,
        "apply_query_key_layer_scaling": True,
        "apply_residual_connection_post_layernorm": False,
        "ffn_hidden_size": config.intermediate_size,
        "fp32_residual_connection": False,
        "kv_channels": config.head_dim,
        "layernorm_epsilon": config.rms_norm_eps,
        "multi_query_attention": True,
        "multi_query_group_num": config.num_key_value_heads,
        "num_layers": config.num_hidden_layers,
        "original_rope": True,
        "padded_vocab_size": config.vocab_size,
        "post_layer_norm": True,
        "rmsnorm": True,
        "rope_ratio": config.rope_parameters["rope_theta"] / 10000,
        "seq_length": config.max_position_embeddings,
    }
    del keys["vocab_size"]
    return keys


def _deepseek_keys(config: Any) -> Keys:
    return _llama_like(
        config,
        "DeepseekForCausalLM",
        "deepseek",
        attention_bias=False,
        aux_loss_alpha=0.001,
        first_k_dense_replace=len(config.mlp_only_layers),
        moe_intermediate_size=config.moe_intermediate_size,
        moe_layer_freq=1,
        n_routed_experts=config.num_experts,
        n_shared_experts=config.shared_expert_intermediate_size // config.moe_intermediate_size,
        norm_topk_prob=config.norm_topk_prob,
        num_experts_per_tok=config.num_experts_per_tok,
        rope_theta=10000,
        scoring_func="softmax",
        seq_aux=True,
    )


def _minicpm_keys(config: Any, **more: Any) -> Keys:
    layers, hidden = config.num_hidden_layers, config.hidden_size
    keys = _llama_like(
        config,
        "MiniCPMForCausalLM",
        "minicpm",
        scale_emb=config.embedding_multiplier,
        scale_depth=config.residual_multiplier * math.sqrt(layers),
        dim_model_base=hidden / config.logits_scaling,
        rope_theta=10000.0,
        **more,
    )
    del keys["tie_word_embeddings"]  # true where it is absent
    return keys


_ALONE = {"num_key_value_heads": 4}
_SCALES = {
    "embedding_multiplier": 3.0,
    "residual_multiplier": 1.4 / math.sqrt(2),
    "attention_multiplier": 24**-0.5,
    "logits_scaling": 96 / 32,
    "tie_word_embeddings": True,
}
_DYNAMIC = {"rope_type": "dynamic", "factor": 3.0, "rope_theta": 1e6}

TWINS: Mapping[str, Twin] = {
    "qwen": Twin("qwen2", {**_ALONE, "head_dim": 40}, _qwen_keys, _write_qwen),
    "internlm": Twin(
        "llama",
        {**_ALONE, "attention_bias": True},
        lambda c: _llama_like(
            c,
            "InternLMForCausalLM",
            "internlm",
            bias=True,
            rotary={"base": 10000, "type": "origin"},
        ),
    ),
    "internlm2": Twin(
        "llama",
        {"attention_bias": True, "hidden_size": 80},
        lambda c: _llama_like(c, "InternLM2ForCausalLM", "internlm2", bias=True),
        _write_internlm2,
    ),
    "internlm2-dynamic": Twin(
        "llama",
        {"attention_bias": True, "max_position_embeddings": 64, "rope_parameters": _DYNAMIC},
        lambda c: _llama_like(
            c,
            "InternLM2ForCausalLM",
            "internlm2",
            rope_theta=1000000,
            rope_scaling={"type": "dynamic", "factor": 3.0},
        ),
        _write_internlm2,
    ),
    "baichuan": Twin(
        "llama",
        {**_ALONE, "vocab_size": 64000},
        lambda c: _baichuan_keys(c, "BaiChuanForCausalLM"),
        _write_baichuan,
    ),
    "baichuan-alibi": Twin(
        "llama",
        {"hidden_size": 120, "num_attention_heads": 6, "num_key_value_heads": 6}
        | {"vocab_size": 64000},
        lambda c: _baichuan_keys(c, "BaichuanForCausalLM", alibi=True),
        _write_baichuan,
        _no_rotation,
        _alibi,
    ),
    "baichuan-2": Twin(
        "llama",
        {**_ALONE, "vocab_size": 125696},
        lambda c: _baichuan_keys(c, "BaichuanForCausalLM"),
        _write_baichuan2,
        _unit_head,
    ),
    "exaone": Twin(
        "llama",
        {
            "head_dim": 20,
            "tie_word_embeddings": True,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 5000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            },
        },
        _exaone_keys,
        _write_exaone,
    ),
    "chatglm": Twin(
        "glm",
        {
            "attention_bias": True,
            "head_dim": 24,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 50000.0,
                "partial_rotary_factor": 0.5,
            },
        },
        _chatglm_keys,
        _write_chatglm,
    ),
    "deepseek": Twin(
        "qwen2_moe",
        {
            "qkv_bias": False,
            "num_hidden_layers": 3,
            "mlp_only_layers": [0],
            "num_experts": 6,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 40,
            "shared_expert_intermediate_size": 80,
        },
        _deepseek_keys,
        _write_deepseek,
        _open_gate,
    ),
    "minicpm": Twin("granite", _SCALES, _minicpm_keys),
    "minicpm-moe": Twin(
        "granitemoe",
        {**_SCALES, "num_local_experts": 5, "num_experts_per_tok": 2},
        lambda c: _minicpm_keys(c, num_experts=5, num_experts_per_tok=2),
        _write_minicpm_moe,
    ),
    "orion": Twin(
        "stablelm",
        {
            "layer_norm_eps": 1e-5,
            "use_qkv_bias": False,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "partial_rotary_factor": 1.0,
            },
        },
        lambda c: _llama_like(
            c,
            "OrionForCausalLM",
            "orion",
            rms_norm_eps=c.layer_norm_eps,
            max_sequence_length=c.max_position_embeddings,
            rope_theta=10000.0,
        ),
    ),
}
