"""What config.json of GPT-2's kin, of ALiBi's classes and of Llama's close kin may say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mlc_compile.config import read_json_strict
from mlc_compile.errors import InputError
from mlc_compile.models import Model, load_model
from mlc_compile.models.options import MLP, Alibi, HeadNorm

CONFIGS = Path(__file__).parent.parent / "configs"
ABSENT = object()


def load(name: str, **changes: Any) -> Model:
    config = {**read_json_strict(CONFIGS / f"{name}.json"), **changes}
    given = {key: value for key, value in config.items() if value is not ABSENT}
    return load_model(given, where="config.json")


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is true"),
    ("gpt2", {"activation_function": "mish"}, 'activation_function is "mish"'),
    ("gpt2", {"hidden_size": 1024}, "n_embd is 768 but hidden_size is 1024"),
    ("gpt2", {"add_cross_attention": True}, "only decoders are built"),
    ("gpt-j-6b", {"tie_word_embeddings": True}, "tie_word_embeddings is true"),
    ("gpt-j-6b", {"rotary_dim": 258}, "makes 258 rotated dimensions of 256"),
    ("gpt-neo-1.3B", {"attention_types": [[["global", "far"], 12]]}, "attention_types must be"),
    ("gpt-neo-1.3B", {"attention_types": [[["local"], 24]]}, "and attention_types differ"),
    ("gpt-neo-1.3B", {"num_layers": 23}, "makes 24 layers of 23"),
    ("starcoder", {"multi_query": "yes"}, 'multi_query is "yes"'),
    ("starcoder2-3b", {"norm_type": "rms_norm"}, 'norm_type is "rms_norm"'),
    ("pythia-1.4b", {"rotary_pct": 0.01}, "rotary_pct makes 1 rotated dimensions of 128"),
    ("pythia-1.4b", {"rope_theta": 5e5}, "rotary_emb_base is 10000 but rope_theta is 500000.0"),
    ("opt-1.3b", {"do_layer_norm_before": False}, "do_layer_norm_before is false"),
    ("opt-1.3b", {"layer_norm_elementwise_affine": False}, "layer_norm_elementwise_affine"),
    ("opt-1.3b", {"word_embed_proj_dim": 512}, "word_embed_proj_dim is 512"),
    ("bloom-1b7", {"apply_residual_connection_post_layernorm": True}, "post_layernorm is true"),
    ("bloom-1b7", {"n_inner": 4096}, "n_inner is 4096"),
    ("mpt-7b", {"attn_config": {"alibi": False}}, "attn_config.alibi is false"),
    ("mpt-7b", {"attn_config": {"qk_ln": True}}, "attn_config.qk_ln is true"),
    ("mpt-7b", {"attn_config": {"prefix_lm": True}}, "attn_config.prefix_lm is true"),
    ("mpt-7b", {"attn_config": {"rope": True}}, "unknown key attn_config.rope = true"),
    ("mpt-7b", {"no_bias": False}, "no_bias is false"),
    ("mpt-7b", {"norm_type": "rmsnorm"}, 'norm_type is "rmsnorm"'),
    ("mpt-7b", {"expansion_ratio": 2}, "expansion_ratio is 2"),
    ("mpt-7b", {"logit_scale": "inv_sqrt_d_model"}, "logit_scale is"),
    ("falcon-40b", {"parallel_attn": False}, "the new decoder architecture is parallel"),
    ("falcon-40b", {"num_ln_in_parallel_attn": 3}, "num_ln_in_parallel_attn is 3"),
    ("falcon-7b", {"num_ln_in_parallel_attn": 2}, "num_ln_in_parallel_attn is 2"),
    ("falcon-7b", {"alibi": True}, "heads with keys of their own only"),
    ("granite-3.1-2b-instruct", {"hidden_multiplier": 2.0}, "unknown key hidden_multiplier = 2.0"),
]


@pytest.mark.parametrize(("name", "changes", "message"), REFUSED)
def test_what_is_not_built_is_refused(name: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        load(name, **changes)
    assert message in str(caught.value)


def test_values_of_absent_keys() -> None:
    gpt2 = load("gpt2")
    assert (gpt2.config.intermediate_size, gpt2.config.tie_word_embeddings) == (3072, True)
    neox = load("gpt-neox-20b", rotary_pct=ABSENT, rotary_emb_base=ABSENT)
    assert (neox.config.rope.rotary_dim, neox.config.rope.theta) == (24, 1e4)
    assert neox.arch.block.parallel and not neox.arch.block.shared_norm
    assert load("helium-1-preview-2b", rope_theta=ABSENT).config.rope.theta == 1e5
    assert load("bloom-1b7", seq_length=ABSENT).config.max_position_embeddings == 2048
    assert load("granite-3.1-2b-instruct", attention_multiplier=ABSENT).config.score_scale == 1.0


def test_rope_parameters_count_before_defaults() -> None:
    """transformers 5 writes them so, and leaves the keys of its own class out."""
    given = {"rope_type": "default", "rope_theta": 2e4, "partial_rotary_factor": 0.5}
    neox = load("pythia-1.4b", rotary_pct=ABSENT, rotary_emb_base=ABSENT, rope_parameters=given)
    assert (neox.config.rope.rotary_dim, neox.config.rope.theta) == (64, 2e4)


def test_falcons() -> None:
    """One type, four structures."""
    found = {name: load(f"falcon-{name}") for name in ("7b", "40b", "11B", "rw-1b")}
    blocks = {n: (m.arch.block.parallel, m.arch.block.shared_norm) for n, m in found.items()}
    assert blocks == {
        "7b": (True, True),
        "40b": (True, False),
        "11B": (True, True),
        "rw-1b": (False, False),
    }
    kv_heads = [m.config.num_key_value_heads for m in found.values()]
    assert kv_heads == [1, 8, 8, 32]
    assert found["rw-1b"].arch.positions == Alibi(rounded=True)
    # transformers saves the number, and computes with one KV head all the same
    assert load("falcon-7b", num_kv_heads=71).config.num_key_value_heads == 1


def test_structure_follows_the_checkpoint() -> None:
    large, small = load("stablelm-2-12b"), load("stablelm-2-1_6b")
    assert isinstance(large.arch.attention.qk_norm, HeadNorm) and large.arch.block.shared_norm
    assert small.arch.attention.qk_norm is None and not small.arch.block.parallel
    windows = [kind.window for kind in load("gpt-neo-1.3B").config.layers]
    assert windows == [None, 256] * 12
    assert load("starcoder").config.num_key_value_heads == 1
    assert load("starcoder", multi_query=False).config.num_key_value_heads == 48
    assert load("gpt2", scale_attn_weights=False).config.score_scale == 1.0
    opt = load("opt-1.3b", enable_bias=False, activation_function="gelu")
    assert opt.arch.mlp == MLP("gelu", bias=False)


# How the first checkpoints of a class have it: without the prefix of a class with a head, and
# with buffers that later ones recompute.
OLD = {
    "gpt2": ("transformer.", "h.0.attn.bias"),
    "gpt-neo-1.3B": ("transformer.", "h.0.attn.attention.masked_bias"),
    "bloom-1b7": ("transformer.", None),
    "starcoder": ("transformer.", "h.0.attn.bias"),
    "opt-1.3b": ("model.", None),
    "stablelm-2-1_6b": ("model.", "layers.0.self_attn.rotary_emb.inv_freq"),
    "gpt-neox-20b": ("", "gpt_neox.layers.0.attention.masked_bias"),
    "codegen-350M-mono": ("", "transformer.h.0.attn.causal_mask"),
}


@pytest.mark.parametrize("name", OLD)
def test_old_names(name: str) -> None:
    prefix, buffer = OLD[name]
    model = load(name)
    tensors = {source.removeprefix(prefix) for source in model.sources()}
    assert model.for_tensors(tensors).sources() == tensors
    if buffer is not None:
        assert any(pattern.fullmatch(buffer) for pattern in model.ignorable_tensors())
