"""What an architecture is: a frozen declaration of typed option objects, and its parameters.

- Structure stands in the declaration (`Architecture`), numbers in `ModelConfig`.
- Each option class has exactly one nn module, and lists the parameters that this module owns.
- A bias option may name a config.json key; `Architecture.resolve` replaces it by what the
  checkpoint says, so that graphs see true or false only.
- `Model.parameters` is the one list of parameters that graphs, weights and planner follow.
"""

from __future__ import annotations

import math
import re
from collections.abc import Container, Iterator
from dataclasses import dataclass, field, replace
from typing import Literal, TypeAlias

from mlc_compile.config import ConfigReader, ModelConfig
from mlc_compile.models.names import BARE_DECODER, HF_DECODER, NameTable

Role: TypeAlias = Literal["embedding", "linear", "lm_head", "norm", "bias"]
Combine: TypeAlias = Literal["identity", "concat"]
Label: TypeAlias = Literal["stable", "experimental"]


@dataclass(frozen=True)
class ParamSpec:
    """One parameter of the compiled model, unquantised.

    Attributes:
        name: our name, as in tensor-cache.json and `_metadata`.
        shape: linear weights are [out, in].
        role: what quantisation policies go by.
        sources: checkpoint tensors it is made of, in order.
        combine: `concat` joins the sources along axis 0; `identity` takes the only one.
    """

    name: str
    shape: tuple[int, ...]
    role: Role
    sources: tuple[str, ...]
    combine: Combine = "identity"

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)


def _spec(
    name: str, shape: tuple[int, ...], role: Role, modules: tuple[str, ...], suffix: str
) -> ParamSpec:
    sources = tuple(f"{module}.{suffix}" for module in modules)
    combine: Combine = "concat" if len(sources) > 1 else "identity"
    return ParamSpec(f"{name}.{suffix}", shape, role, sources, combine)


def _linear(
    name: str, out_features: int, in_features: int, modules: tuple[str, ...], bias: bool | str
) -> Iterator[ParamSpec]:
    yield _spec(name, (out_features, in_features), "linear", modules, "weight")
    if isinstance(bias, str):
        raise ValueError(f"{name}: bias option {bias!r} is not resolved; use load_model")
    if bias:
        yield _spec(name, (out_features,), "bias", modules, "bias")


def _norm(name: str, size: int, module: str) -> ParamSpec:
    return _spec(name, (size,), "norm", (module,), "weight")


def _resolved(option: bool | str, reader: ConfigReader) -> bool:
    return reader.flag(option) if isinstance(option, str) else option


@dataclass(frozen=True)
class GroupedQuery:
    """Grouped-query attention with rotary positions, q, k and v in one projection.

    Attributes:
        qkv_bias: bias on q, k and v; a string names the config.json key that says so.
        out_bias: bias on the output projection; likewise.
        qk_norm: RMS norm over each head of q and k, before the rotation.
    """

    qkv_bias: bool | str = False
    out_bias: bool | str = False
    qk_norm: bool = False

    def resolve(self, reader: ConfigReader) -> GroupedQuery:
        """The same with config.json keys replaced by their values."""
        return replace(
            self,
            qkv_bias=_resolved(self.qkv_bias, reader),
            out_bias=_resolved(self.out_bias, reader),
        )

    def parameters(
        self, scope: str, layer: str, config: ModelConfig, names: NameTable
    ) -> Iterator[ParamSpec]:
        """`scope` is our layer prefix, `layer` the checkpoint's."""
        heads = config.num_attention_heads + 2 * config.num_key_value_heads
        yield from _linear(
            f"{scope}.self_attn.qkv_proj",
            heads * config.head_dim,
            config.hidden_size,
            tuple(f"{layer}.{name}" for name in names.qkv),
            self.qkv_bias,
        )
        if self.qk_norm:
            yield _norm(f"{scope}.self_attn.q_norm", config.head_dim, f"{layer}.{names.q_norm}")
            yield _norm(f"{scope}.self_attn.k_norm", config.head_dim, f"{layer}.{names.k_norm}")
        yield from _linear(
            f"{scope}.self_attn.o_proj",
            config.hidden_size,
            config.num_attention_heads * config.head_dim,
            (f"{layer}.{names.attention_out}",),
            self.out_bias,
        )


@dataclass(frozen=True)
class GatedMLP:
    """down(activation(gate(x)) * up(x)), gate and up in one projection.

    Attributes:
        activation: the function, as `hidden_act` calls it; another value there is an error.
        bias: biases on all three; a string names the config.json key that says so.
    """

    activation: Literal["silu"] = "silu"
    bias: bool | str = False

    def resolve(self, reader: ConfigReader) -> GatedMLP:
        """The same with config.json keys replaced by their values."""
        return replace(self, bias=_resolved(self.bias, reader))

    def parameters(
        self, scope: str, layer: str, config: ModelConfig, names: NameTable
    ) -> Iterator[ParamSpec]:
        """`scope` is our layer prefix, `layer` the checkpoint's."""
        yield from _linear(
            f"{scope}.mlp.gate_up_proj",
            2 * config.intermediate_size,
            config.hidden_size,
            tuple(f"{layer}.{name}" for name in names.gate_up),
            self.bias,
        )
        yield from _linear(
            f"{scope}.mlp.down_proj",
            config.hidden_size,
            config.intermediate_size,
            (f"{layer}.{names.down}",),
            self.bias,
        )


@dataclass(frozen=True)
class RMSNorm:
    """x / sqrt(mean(x^2) + eps) * weight, with the mean in float32."""


@dataclass(frozen=True)
class ConfigSchema:
    """How one model type's config.json is read, where types differ.

    Sizes given here are what the transformers class takes where the key is absent.

    Attributes:
        norm_eps: the key of the norm's epsilon.
        num_key_value_heads: None means as many as attention heads.
        head_dim: None means hidden_size / num_attention_heads.
        window: `none`: full attention, `always`: `sliding_window` counts, `gated`: it counts
            where `use_sliding_window` is true and from layer `max_window_layers` on.
        sliding_window: the window where that key is absent.
        fixed: further keys with the only values that we build.
        ignored: further keys that change nothing.
    """

    norm_eps: str = "rms_norm_eps"
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    window: Literal["none", "always", "gated"] = "none"
    sliding_window: int | None = None
    fixed: tuple[tuple[str, tuple[object, ...]], ...] = ()
    ignored: tuple[str, ...] = ()


@dataclass(frozen=True)
class Architecture:
    """A decoder-only transformer: embedding, layers of norm-attention-norm-MLP, norm, head.

    A declaration states only what differs from Llama without biases.

    Attributes:
        name: config.json's `model_type`.
        hf_classes: what its `architectures` may name.
        names: the checkpoint name tables it comes in, the usual one first.
        label: `stable` needs parity tests with the reference on every change.
    """

    name: str
    hf_classes: tuple[str, ...]
    attention: GroupedQuery = field(default_factory=GroupedQuery)
    mlp: GatedMLP = field(default_factory=GatedMLP)
    norm: RMSNorm = field(default_factory=RMSNorm)
    schema: ConfigSchema = field(default_factory=ConfigSchema)
    names: tuple[NameTable, ...] = (HF_DECODER, BARE_DECODER)
    label: Label = "stable"

    def resolve(self, reader: ConfigReader) -> Architecture:
        """The same with every option that names a config.json key replaced by its value."""
        return replace(self, attention=self.attention.resolve(reader), mlp=self.mlp.resolve(reader))

    def summary(self) -> str:
        """One line for `list models`."""
        return f"{self.name:<12} {self.label:<12} {', '.join(self.hf_classes)}"


@dataclass(frozen=True)
class Model:
    """A resolved architecture with one checkpoint's numbers."""

    arch: Architecture
    config: ModelConfig
    names: NameTable = HF_DECODER

    def for_tensors(self, tensors: Container[str]) -> Model:
        """The same, reading the name table that a checkpoint with these tensors is written in.

        Unchanged where none fits: the mapping then reports what is missing.
        """
        for table in self.arch.names:
            if table.fits(tensors):
                return replace(self, names=table)
        return self

    def parameters(self) -> tuple[ParamSpec, ...]:
        """Every parameter, unquantised, in the order that artefacts keep."""
        return tuple(self._parameters())

    def _parameters(self) -> Iterator[ParamSpec]:
        config, names = self.config, self.names
        table = (config.vocab_size, config.hidden_size)
        yield _spec("model.embed_tokens", table, "embedding", (names.embed,), "weight")
        for i in range(config.num_hidden_layers):
            scope, layer = f"model.layers.{i}", names.layer.format(i=i)
            yield _norm(
                f"{scope}.input_layernorm", config.hidden_size, f"{layer}.{names.attention_norm}"
            )
            yield from self.arch.attention.parameters(scope, layer, config, names)
            yield _norm(
                f"{scope}.post_attention_layernorm", config.hidden_size, f"{layer}.{names.mlp_norm}"
            )
            yield from self.arch.mlp.parameters(scope, layer, config, names)
        yield _norm("model.norm", config.hidden_size, names.final_norm)
        if not config.tie_word_embeddings:
            yield _spec("lm_head", table, "lm_head", (names.lm_head,), "weight")

    def ignorable_tensors(self) -> tuple[re.Pattern[str], ...]:
        """Patterns (for `fullmatch`) of checkpoint tensors that nothing needs.

        Stored frequencies are recomputed from config.json, as transformers does; a tied head
        that is stored all the same is a copy of the embedding.
        """
        patterns = [r"(.*\.)?rotary_emb\.(inv_freq|cos_cached|sin_cached)"]
        if self.config.tie_word_embeddings:
            patterns.append(re.escape(f"{self.names.lm_head}.weight"))
        return tuple(re.compile(pattern) for pattern in patterns)


def num_parameters(model: Model) -> int:
    """Elements over all parameters; a tied embedding counts once."""
    return sum(spec.num_elements for spec in model.parameters())
