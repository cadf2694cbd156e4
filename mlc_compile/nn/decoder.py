"""The one assembler: a `models.spec.Model` becomes a module tree whose parameters are its
parameters.

hidden -> input norm -> attention -> + -> post-attention norm -> MLP -> +     (each layer)
     \\_______________________________/ \\__________________________/
"""

from __future__ import annotations

from tvm.relax.frontend import nn
from tvm.relax.frontend.nn import Tensor, op

from mlc_compile.models.spec import Model, ParamSpec
from mlc_compile.nn.attention import GroupedQueryAttention
from mlc_compile.nn.kv_cache import PagedKVCache
from mlc_compile.nn.linear import LayerFactory
from mlc_compile.nn.mlp import GatedMLP
from mlc_compile.nn.norm import RMSNorm


class Block(nn.Module):
    """One transformer layer with sequential residuals."""

    def __init__(
        self,
        input_layernorm: nn.Module,
        self_attn: nn.Module,
        post_attention_layernorm: nn.Module,
        mlp: nn.Module,
    ) -> None:
        self.input_layernorm = input_layernorm
        self.self_attn = self_attn
        self.post_attention_layernorm = post_attention_layernorm
        self.mlp = mlp

    def forward(self, x: Tensor, cache: PagedKVCache, layer: int) -> Tensor:
        """x: [n, hidden] -> [n, hidden]."""
        x = op.add(x, self.self_attn(self.input_layernorm(x), cache, layer))
        return op.add(x, self.mlp(self.post_attention_layernorm(x)))


class Body(nn.Module):
    """Embedding, layers and final norm, under the name `model` as checkpoints have it."""

    def __init__(self, embed_tokens: nn.Module, layers: list[Block], norm: nn.Module) -> None:
        self.embed_tokens = embed_tokens
        self.layers = nn.ModuleList(layers)
        self.norm = norm

    def forward(self, x: Tensor, cache: PagedKVCache) -> Tensor:
        """x: [n, hidden] embeddings -> [n, hidden] normalised hidden states."""
        for i, layer in enumerate(self.layers):
            x = layer(x, cache, i)
        return self.norm(x)


class Decoder(nn.Module):
    """A decoder-only language model: token ids or embeddings to logits."""

    def __init__(self, body: Body, lm_head: nn.Module | None) -> None:
        self.model = body
        self.lm_head = lm_head

    def embed(self, ids: Tensor) -> Tensor:
        """ids: int32 [n] -> [n, hidden]."""
        return self.model.embed_tokens(ids)

    def hidden_states(self, x: Tensor, cache: PagedKVCache) -> Tensor:
        """x: [n, hidden] -> [n, hidden] after the final norm."""
        return self.model(x, cache)

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden: [n, hidden] -> float32 [n, vocab]."""
        if self.lm_head is None:
            return self.model.embed_tokens.logits(hidden)
        return self.lm_head(hidden)


def build_decoder(model: Model, factory: LayerFactory) -> Decoder:
    """Assemble the decoder of `model` with the weight layers of `factory`."""
    arch, config = model.arch, model.config
    specs = {spec.name: spec for spec in model.parameters()}
    heads = (config.num_attention_heads, config.num_key_value_heads, config.head_dim)

    def linear(prefix: str) -> nn.Module:
        return factory.linear(specs[f"{prefix}.weight"], bias=f"{prefix}.bias" in specs)

    def norm(prefix: str) -> RMSNorm:
        spec: ParamSpec = specs[f"{prefix}.weight"]
        return RMSNorm(spec.shape[0], config.norm_eps, factory.dtype)

    def block(i: int) -> Block:
        p = f"model.layers.{i}"
        attention = GroupedQueryAttention(
            linear(f"{p}.self_attn.qkv_proj"),
            norm(f"{p}.self_attn.q_norm") if arch.attention.qk_norm else None,
            norm(f"{p}.self_attn.k_norm") if arch.attention.qk_norm else None,
            linear(f"{p}.self_attn.o_proj"),
            heads,
        )
        mlp = GatedMLP(
            linear(f"{p}.mlp.gate_up_proj"), linear(f"{p}.mlp.down_proj"), arch.mlp.activation
        )
        return Block(
            norm(f"{p}.input_layernorm"), attention, norm(f"{p}.post_attention_layernorm"), mlp
        )

    body = Body(
        factory.embedding(specs["model.embed_tokens.weight"]),
        [block(i) for i in range(config.num_hidden_layers)],
        norm("model.norm"),
    )
    head = specs.get("lm_head.weight")
    lm_head = None if head is None else factory.linear(head, bias=False, out_dtype="float32")
    return Decoder(body, lm_head)
