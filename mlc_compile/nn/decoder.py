"""The one assembler: a `models.spec.Model` becomes a module tree whose parameters are its
parameters.

Where norms and residuals stand is `models.options.Block`'s word. In a sequential layer:

hidden -> norm -> attention -> norm -> + -> norm -> MLP -> norm -> +
     \\________________________________/ \\_______________________/

and in a parallel one attention and MLP both read the hidden state, and both are added to it.
"""

from __future__ import annotations

from collections.abc import Sequence

from tvm.relax.frontend import nn
from tvm.relax.frontend.nn import Tensor, op

from mlc_compile.config import RopeConfig
from mlc_compile.models import options
from mlc_compile.models.names import HF_DECODER
from mlc_compile.models.params import ParamSpec
from mlc_compile.models.spec import Model
from mlc_compile.nn.activations import ACTIVATIONS, soft_cap
from mlc_compile.nn.attention import GroupedQueryAttention, Heads
from mlc_compile.nn.kv_cache import PagedKVCache
from mlc_compile.nn.linear import LayerFactory
from mlc_compile.nn.mlp import MLP, GatedMLP
from mlc_compile.nn.moe import SparseMLP
from mlc_compile.nn.norm import LayerNorm, RMSNorm
from mlc_compile.nn.positions import Penalty, Round, Table, alibi_slopes


class Block(nn.Module):
    """One transformer layer; norms that a model lacks are None."""

    def __init__(
        self,
        self_attn: nn.Module,
        mlp: nn.Module,
        norms: dict[str, nn.Module | None],
        *,
        parallel: bool,
        residual_scale: float,
    ) -> None:
        """norms: by the names that `models.options.Block.norms` gives them."""
        self.input_layernorm = norms.get("input_layernorm")
        self.self_attn = self_attn
        self.post_self_attn_layernorm = norms.get("post_self_attn_layernorm")
        self.post_attention_layernorm = norms.get("post_attention_layernorm")
        self.mlp = mlp
        self.post_mlp_layernorm = norms.get("post_mlp_layernorm")
        self.parallel = parallel
        self.residual_scale = residual_scale

    def forward(self, x: Tensor, now: Round, layer: int) -> Tensor:
        """x: [n, hidden] -> [n, hidden]."""
        read = _apply(self.input_layernorm, x)
        attended = _apply(self.post_self_attn_layernorm, self.self_attn(read, now, layer))
        if not self.parallel:
            x = self._add(x, attended)
            read = x
        elif self.post_attention_layernorm is not None:
            read = x
        given = self.mlp(_apply(self.post_attention_layernorm, read))
        given = _apply(self.post_mlp_layernorm, given)
        if self.parallel:
            given = op.add(attended, given)
        return self._add(x, given)

    def _add(self, x: Tensor, y: Tensor) -> Tensor:
        return op.add(x, _scaled(y, self.residual_scale))


class Body(nn.Module):
    """Embedding, layers and final norm, under the name `model` as checkpoints have it."""

    def __init__(
        self,
        embed_tokens: nn.Module,
        embed_positions: nn.Module | None,
        embed_layernorm: nn.Module | None,
        layers: list[Block],
        norm: nn.Module | None,
        *,
        embedding_scale: float,
        position_offset: int,
        tables: Sequence[Table],
    ) -> None:
        self.embed_tokens = embed_tokens
        self.embed_positions = embed_positions
        self.embed_layernorm = embed_layernorm
        self.layers = nn.ModuleList(layers)
        self.norm = norm
        self.embedding_scale = embedding_scale
        self.position_offset = position_offset
        self.tables = tables

    def forward(self, x: Tensor, cache: PagedKVCache) -> Tensor:
        """x: [n, hidden] embeddings -> [n, hidden] normalised hidden states."""
        now = Round(cache, x.shape[0], self.tables)
        x = _scaled(x, self.embedding_scale)
        if self.embed_positions is not None:
            rows = now.positions
            if self.position_offset:
                rows = rows + self.position_offset
            x = op.add(x, self.embed_positions(rows))
        x = _apply(self.embed_layernorm, x)
        for i, layer in enumerate(self.layers):
            x = layer(x, now, i)
        return _apply(self.norm, x)


class Decoder(nn.Module):
    """A decoder-only language model: token ids or embeddings to logits."""

    def __init__(
        self,
        body: Body,
        lm_head: nn.Module | None,
        *,
        hidden_size: int,
        logits_scale: float,
        logits_softcap: float | None,
    ) -> None:
        self.model = body
        self.lm_head = lm_head
        self.hidden_size = hidden_size
        self.logits_scale = logits_scale
        self.logits_softcap = logits_softcap

    def embed(self, ids: Tensor) -> Tensor:
        """ids: int32 [n] -> [n, hidden]."""
        return self.model.embed_tokens(ids)

    def hidden_states(self, x: Tensor, cache: PagedKVCache) -> Tensor:
        """x: [n, hidden] -> [n, hidden] after the final norm."""
        return self.model(x, cache)

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden: [n, hidden] -> float32 [n, vocab]."""
        if self.lm_head is None:
            found = self.model.embed_tokens.logits(hidden)
        else:
            found = self.lm_head(hidden)
        found = _scaled(found, self.logits_scale)
        return found if self.logits_softcap is None else soft_cap(found, self.logits_softcap)


def _apply(norm: nn.Module | None, x: Tensor) -> Tensor:
    return x if norm is None else norm(x)


def _scaled(x: Tensor, factor: float) -> Tensor:
    return x if factor == 1.0 else x * factor


class _Assembler:
    """Makes the modules of one model from its options."""

    def __init__(self, model: Model, factory: LayerFactory, context_window: int) -> None:
        self.arch, self.config = model.arch, model.config
        self.factory = factory
        self.specs = {spec.name: spec for spec in model.parameters()}
        ropes = [kind.rope for kind in self.config.layers if kind.rope is not None]
        # rotated here, where the cache cannot: one table for each kind of layer
        self.ropes: list[RopeConfig] = []
        if not self.config.cache_rotates:
            self.ropes = list(dict.fromkeys(ropes))
        self.tables = [rope.table(context_window) for rope in self.ropes]

    def linear(self, prefix: str, out_dtype: str | None = None) -> nn.Module:
        weight = self.specs[f"{prefix}.weight"]
        bias = f"{prefix}.bias" in self.specs
        if weight.role == "expert":
            return self.factory.experts(weight)
        return self.factory.linear(weight, bias=bias, out_dtype=out_dtype)

    def norm(self, option: options.Norm, prefix: str) -> nn.Module:
        names = [f"{prefix}.weight", f"{prefix}.bias"]
        specs: list[ParamSpec] = [self.specs[name] for name in names if name in self.specs]
        size = specs[0].shape[0] if specs else self.config.hidden_size
        weight, bias = (name in self.specs for name in names)
        eps, dtype = self.config.norm_eps, self.factory.dtype
        if isinstance(option, options.LayerNorm):
            return LayerNorm(size, eps, dtype, weight=weight, bias=bias)
        return RMSNorm(size, eps, dtype)

    def penalty(self) -> Penalty | None:
        place, heads = self.arch.positions, self.config.num_attention_heads
        if not isinstance(place, options.Alibi):
            return None
        slopes = alibi_slopes(heads)
        return Penalty(slopes, place.rounded)

    def heads(self, layer: int) -> Heads:
        c, kind = self.config, self.config.layers[layer]
        here = kind.rope is not None and bool(self.ropes)
        return Heads(
            q=c.num_attention_heads,
            kv=c.num_key_value_heads,
            size=c.head_dim,
            scale=c.score_scale if kind.window is None else -c.score_scale,
            clip=c.clip_qkv,
            turns=self.ropes.index(kind.rope) if here and kind.rope is not None else None,
            penalty=self.penalty(),
            extra=c.extra_head_dim,
        )

    def attention(self, layer: int, prefix: str) -> GroupedQueryAttention:
        qk = self.arch.attention.qk_norm
        return GroupedQueryAttention(
            self.linear(f"{prefix}.qkv_proj"),
            None if qk is None else self.norm(qk.norm, f"{prefix}.q_norm"),
            None if qk is None else self.norm(qk.norm, f"{prefix}.k_norm"),
            self.linear(f"{prefix}.o_proj"),
            self.heads(layer),
            norm_whole=qk is not None and qk.over == "projection",
        )

    def feed_forward(self, option: options.FeedForward, prefix: str) -> nn.Module:
        if isinstance(option, options.MLP):
            up, down = self.linear(f"{prefix}.up_proj"), self.linear(f"{prefix}.down_proj")
            return MLP(up, down, option.activation)
        if isinstance(option, options.GatedMLP):
            return self.gated(prefix, option.activation)
        experts, shared = self.config.experts, f"{prefix}.shared_expert"
        assert experts is not None
        has_shared = experts.shared_intermediate_size > 0
        has_gate = has_shared and option.shared == "gated"
        return SparseMLP(
            self.linear(f"{prefix}.gate", "float32"),
            self.linear(f"{prefix}.experts.gate_up_proj"),
            self.linear(f"{prefix}.experts.down_proj"),
            ACTIVATIONS[option.activation],
            k=experts.per_token,
            score=option.score,
            renormalize=option.renormalize is True,
            scale=experts.scale,
            shared_expert=self.gated(shared, option.activation) if has_shared else None,
            shared_expert_gate=self.linear(f"{shared}_gate", "float32") if has_gate else None,
        )

    def gated(self, prefix: str, activation: str) -> GatedMLP:
        gate_up, down = self.linear(f"{prefix}.gate_up_proj"), self.linear(f"{prefix}.down_proj")
        return GatedMLP(gate_up, down, activation)

    def block(self, i: int) -> Block:
        p, layout = f"model.layers.{i}", self.arch.block
        names = [name for name, _ in layout.norms(HF_DECODER)]
        return Block(
            self.attention(i, f"{p}.self_attn"),
            self.feed_forward(self.arch.feed_forward(self.config.layers[i].sparse), f"{p}.mlp"),
            {name: self.norm(self.arch.norm, f"{p}.{name}") for name in names},
            parallel=layout.parallel is True,
            residual_scale=self.config.residual_scale,
        )

    def decoder(self) -> Decoder:
        arch, config, place = self.arch, self.config, self.arch.positions
        offset = place.offset if isinstance(place, options.Learned) else 0
        positions = self.specs.get("model.embed_positions.weight")
        body = Body(
            self.factory.embedding(self.specs["model.embed_tokens.weight"]),
            None if positions is None else self.factory.embedding(positions),
            self.norm(arch.norm, "model.embed_layernorm") if arch.embed_norm else None,
            [self.block(i) for i in range(config.num_hidden_layers)],
            self.norm(arch.norm, "model.norm") if arch.final_norm else None,
            embedding_scale=config.embedding_scale,
            position_offset=offset,
            tables=self.tables,
        )
        return Decoder(
            body,
            self.linear("lm_head", "float32") if "lm_head.weight" in self.specs else None,
            hidden_size=config.hidden_size,
            logits_scale=config.logits_scale,
            logits_softcap=config.logits_softcap,
        )


def build_decoder(model: Model, factory: LayerFactory, context_window: int) -> Decoder:
    """Assemble the decoder of `model` with the weight layers of `factory`.

    context_window: tokens that rotary tables are computed for (`RopeConfig.table`).
    """
    return _Assembler(model, factory, context_window).decoder()
