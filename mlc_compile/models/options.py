"""What a decoder can be built of: one frozen option class for each nn module, with its parameters.

- Structure stands in the options, numbers in `ModelConfig`.
- A flag may name a config.json key; `resolve` replaces it by what the checkpoint says, so that
  graphs see true or false only. Strings are resolved by `Option.resolve`, for all classes alike.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Literal, TypeAlias, TypeVar

from mlc_compile.config import ConfigReader, ModelConfig
from mlc_compile.models.names import SLICES, NameTable
from mlc_compile.models.params import HeadRows, ParamSpec, Source, linear, parts_of, resolved

Flag: TypeAlias = "bool | str"
"""True, false, or the config.json key that says so (absent: the schema's default, or false)."""

OptionT = TypeVar("OptionT", bound="Option")

ACTIVATION = "hidden_act"
"""config.json's key for the activation; other spellings are the schema's."""


@dataclass(frozen=True)
class Option:
    """Base of all options."""

    def resolve(self: OptionT, reader: ConfigReader) -> OptionT:
        """The same with config.json keys replaced by their values, in nested options too."""
        changes: dict[str, object] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Option):
                changes[field.name] = value.resolve(reader)
            elif field.type == "Flag" and isinstance(value, str):
                changes[field.name] = reader.flag(value)
            elif field.name == "activation" and value == ACTIVATION:
                changes[field.name] = reader.text(ACTIVATION)
        return replace(self, **changes)


# ---------------------------------------------------------------------------------------------
# Norms


@dataclass(frozen=True)
class RMSNorm(Option):
    """x / sqrt(mean(x^2) + eps) * weight, in float32.

    Attributes:
        add: the weight is stored less this (Gemma: 1).
    """

    add: float = 0.0

    def parameters(self, name: str, size: int, modules: tuple[str, ...]) -> Iterator[ParamSpec]:
        """`modules`: the checkpoint's, one after the other."""
        parts = parts_of(modules, "weight", add=self.add)
        yield ParamSpec(f"{name}.weight", (size,), "norm", parts)


@dataclass(frozen=True)
class LayerNorm(Option):
    """(x - mean(x)) / sqrt(var(x) + eps) * weight + bias, in float32.

    Attributes:
        weight: whether there is one (OLMo: neither weight nor bias).
        bias: likewise.
        add: the weight is stored less this (Nemotron: 1).
    """

    weight: Flag = True
    bias: Flag = True
    add: float = 0.0

    def parameters(self, name: str, size: int, modules: tuple[str, ...]) -> Iterator[ParamSpec]:
        """`modules`: the checkpoint's, one after the other."""
        if resolved(self.weight, name):
            parts = parts_of(modules, "weight", add=self.add)
            yield ParamSpec(f"{name}.weight", (size,), "norm", parts)
        if resolved(self.bias, name):
            yield ParamSpec(f"{name}.bias", (size,), "norm", parts_of(modules, "bias"))


Norm: TypeAlias = "RMSNorm | LayerNorm"


@dataclass(frozen=True)
class HeadNorm(Option):
    """Norms of q and k before the rotation.

    Attributes:
        norm: which.
        over: "head": each head by itself, all with one weight [d] (Qwen3). "each_head": each by
            itself, with its own weight, [heads, d] in all (Cohere). "projection": all heads
            together, weight [heads * d] (OLMo 2).
        enabled: whether it is there.
        apart: "each_head" weights are stored as a tensor for each head, named with `{h}`.
    """

    norm: Norm = RMSNorm()
    over: Literal["head", "each_head", "projection"] = "head"
    enabled: Flag = True
    apart: bool = False

    def parameters(self, name: str, heads: int, size: int, module: str) -> Iterator[ParamSpec]:
        """Of q or k with `heads` heads of `size`."""
        count = 1 if self.over == "head" else heads
        modules = tuple(module.format(h=h) for h in range(heads)) if self.apart else (module,)
        yield from self.norm.parameters(name, count * size, modules)


# ---------------------------------------------------------------------------------------------
# Positions


@dataclass(frozen=True)
class Rotary(Option):
    """Rotary positions (Su et al., RoFormer, 2021), with the numbers of `ModelConfig`.

    Attributes:
        interleaved: neighbours (2i, 2i + 1) rotate together in the checkpoint, not the halves
            (i, i + rotary_dim / 2); rows of q and k are rearranged, so that kernels see halves.
    """

    interleaved: bool = False


@dataclass(frozen=True)
class Learned(Option):
    """A table of position embeddings, added to the token's.

    Attributes:
        offset: the row of position 0 (OPT: 2).
    """

    offset: int = 0

    def parameters(self, config: ModelConfig, names: NameTable) -> Iterator[ParamSpec]:
        """[offset + max_position_embeddings, hidden]"""
        shape = (config.max_position_embeddings + self.offset, config.hidden_size)
        parts = parts_of((names.positions,), "weight")
        yield ParamSpec("model.embed_positions.weight", shape, "positions", parts)


@dataclass(frozen=True)
class Alibi(Option):
    """A penalty on the score that grows with the distance (Press et al., ALiBi, 2021).

    Softmax does not see what a query adds to all of its scores, so slope * (key - query) is as good
    as slope * key; that is a product of two more dimensions of q and k, and no kernel need know.

    Attributes:
        rounded: penalties are numbers of bfloat16, and are scaled like scores (Falcon); KV heads
            must be as many as query heads.
    """

    rounded: bool = False


Positions: TypeAlias = "Rotary | Learned | Alibi"


# ---------------------------------------------------------------------------------------------
# Attention


@dataclass(frozen=True)
class GroupedQuery(Option):
    """Grouped-query attention, q, k and v in one projection.

    Attributes:
        qkv_bias: bias on q, k and v.
        out_bias: bias on the output projection.
        qk_norm: norms of q and k before the rotation.
    """

    qkv_bias: Flag = False
    out_bias: Flag = False
    qk_norm: HeadNorm | None = None

    def resolve(self, reader: ConfigReader) -> GroupedQuery:
        """As Option; norms that the checkpoint does not have become None."""
        found = super().resolve(reader)
        return replace(found, qk_norm=None) if not _enabled(found.qk_norm) else found

    def parameters(
        self, scope: str, layer: str, config: ModelConfig, names: NameTable, positions: Positions
    ) -> Iterator[ParamSpec]:
        """`scope` is our layer prefix, `layer` the checkpoint's."""
        q, kv, d = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        interleaved = isinstance(positions, Rotary) and positions.interleaved
        pairs = config.rope.rotary_dim if interleaved else 0
        modules = tuple(f"{layer}.{name}" for name in names.qkv)
        shape = ((q + 2 * kv) * d, config.hidden_size)
        name = f"{scope}.self_attn.qkv_proj"
        yield ParamSpec(
            f"{name}.weight",
            shape,
            "linear",
            _qkv_parts(modules, "weight", names, (q, kv, d), pairs),
        )
        if resolved(self.qkv_bias, name):
            parts = _qkv_parts(modules, "bias", names, (q, kv, d), pairs)
            yield ParamSpec(f"{name}.bias", shape[:1], "bias", parts)
        if self.qk_norm is not None:
            for which, heads, module in (("q", q, names.q_norm), ("k", kv, names.k_norm)):
                for spec in self.qk_norm.parameters(
                    f"{scope}.self_attn.{which}_norm", heads, d, f"{layer}.{module}"
                ):
                    yield _paired(spec, d, pairs)
        yield from linear(
            f"{scope}.self_attn.o_proj",
            (config.hidden_size, q * d),
            (f"{layer}.{names.attention_out}",),
            self.out_bias,
            transposed=names.transposed,
        )


def _enabled(norm: HeadNorm | None) -> bool:
    return norm is not None and norm.enabled is True


def _qkv_parts(
    modules: tuple[str, ...],
    suffix: str,
    names: NameTable,
    heads: tuple[int, int, int],
    pairs: int,
) -> tuple[Source, ...]:
    """q, then k, then v, however the checkpoint holds them; v is never rotated."""
    q, kv, d = heads
    flip = names.transposed and suffix == "weight"

    def source(module: str, rows: HeadRows | None) -> Source:
        return Source(f"{module}.{suffix}", rows, transposed=flip)

    if len(modules) == 3:
        rows = [HeadRows(n, 1, d, pairs=p) for n, p in ((q, pairs), (kv, pairs), (kv, 0))]
        return tuple(source(m, r) for m, r in zip(modules, rows, strict=True))
    (fused,) = modules
    if names.qkv_layout == "grouped":
        group = q // kv
        cuts = [(kv, group + 2, 0, group), (kv, group + 2, group, 1), (kv, group + 2, group + 1, 1)]
    elif names.qkv_layout == "sliced":
        share = q // SLICES
        cuts = [(SLICES, 3 * share, first * share, share) for first in (0, 2, 1)]
    elif pairs:
        cuts = [(1, q + 2 * kv, 0, q), (1, q + 2 * kv, q, kv), (1, q + 2 * kv, q + kv, kv)]
    else:
        return (source(fused, None),)
    return tuple(
        source(fused, HeadRows(groups, per_group, d, first, count, p))
        for (groups, per_group, first, count), p in zip(cuts, (pairs, pairs, 0), strict=True)
    )


def _paired(spec: ParamSpec, head_dim: int, pairs: int) -> ParamSpec:
    """A norm of q or k whose elements follow the rows of an interleaved projection."""
    if not pairs:
        return spec
    heads = spec.shape[0] // head_dim // len(spec.parts)
    rows = HeadRows(heads, 1, head_dim, pairs=pairs)
    return replace(spec, parts=tuple(replace(part, rows=rows) for part in spec.parts))


# ---------------------------------------------------------------------------------------------
# Feed-forward


@dataclass(frozen=True)
class GatedMLP(Option):
    """down(activation(gate(x)) * up(x)), gate and up in one projection.

    Attributes:
        activation: the function's name; "hidden_act" takes what the checkpoint says.
        bias: biases on all three.
    """

    activation: str = ACTIVATION
    bias: Flag = False

    def parameters(
        self, scope: str, layer: str, config: ModelConfig, names: NameTable
    ) -> Iterator[ParamSpec]:
        """`scope` is our layer prefix, `layer` the checkpoint's."""
        yield from gated_parameters(
            f"{scope}.mlp",
            tuple(f"{layer}.{name}" for name in names.gate_up),
            f"{layer}.{names.down}",
            (config.hidden_size, config.intermediate_size),
            self.bias,
            names,
        )


@dataclass(frozen=True)
class MLP(Option):
    """down(activation(up(x))).

    Attributes: as GatedMLP.
    """

    activation: str = ACTIVATION
    bias: Flag = True

    def parameters(
        self, scope: str, layer: str, config: ModelConfig, names: NameTable
    ) -> Iterator[ParamSpec]:
        """`scope` is our layer prefix, `layer` the checkpoint's."""
        hidden, inner = config.hidden_size, config.intermediate_size
        for name, shape, module in (
            ("up_proj", (inner, hidden), names.up),
            ("down_proj", (hidden, inner), names.down),
        ):
            yield from linear(
                f"{scope}.mlp.{name}",
                shape,
                (f"{layer}.{module}",),
                self.bias,
                transposed=names.transposed,
            )


@dataclass(frozen=True)
class SparseMLP(Option):
    """A few of many gated MLPs, chosen for each token, and perhaps one that all tokens take.

    Numbers: `ModelConfig.experts`. Layers that are not sparse have a plain GatedMLP.

    Attributes:
        activation: as GatedMLP.
        score: what turns the router's logits into probabilities, over all experts.
        renormalize: the chosen probabilities are divided by their sum.
        shared: None, "plain": added as it is, "gated": times sigmoid of a gate of its own.
    """

    activation: str = ACTIVATION
    score: Literal["softmax", "sigmoid"] = "softmax"
    renormalize: Flag = True
    shared: Literal["plain", "gated"] | None = None

    @property
    def dense(self) -> GatedMLP:
        """What layers without experts have."""
        return GatedMLP(self.activation)

    def parameters(
        self, scope: str, layer: str, config: ModelConfig, names: NameTable
    ) -> Iterator[ParamSpec]:
        """`scope` is our layer prefix, `layer` the checkpoint's."""
        experts = config.experts
        assert experts is not None
        hidden, inner, count = config.hidden_size, experts.intermediate_size, experts.count
        router = (f"{layer}.{names.router}",)
        yield from linear(f"{scope}.mlp.gate", (count, hidden), router, False, role="router")
        for name, shape, modules in (
            ("gate_up_proj", (count, 2 * inner, hidden), names.experts_gate_up),
            ("down_proj", (count, hidden, inner), (names.experts_down,)),
        ):
            parts = tuple(_expert_parts(tuple(f"{layer}.{m}" for m in modules), count))
            yield ParamSpec(f"{scope}.mlp.experts.{name}.weight", shape, "expert", parts)
        if experts.shared_intermediate_size:
            yield from gated_parameters(
                f"{scope}.mlp.shared_expert",
                tuple(f"{layer}.{name}" for name in names.shared_gate_up),
                f"{layer}.{names.shared_down}",
                (hidden, experts.shared_intermediate_size),
                False,
                names,
            )
            if self.shared == "gated":
                gate = (f"{layer}.{names.shared_gate}",)
                name = f"{scope}.mlp.shared_expert_gate"
                yield from linear(name, (1, hidden), gate, False, role="router")


FeedForward: TypeAlias = "GatedMLP | MLP | SparseMLP"


def gated_parameters(
    scope: str,
    gate_up: tuple[str, ...],
    down: str,
    sizes: tuple[int, int],
    bias: Flag,
    names: NameTable,
) -> Iterator[ParamSpec]:
    """Of one gated MLP; sizes: hidden and intermediate."""
    hidden, inner = sizes
    flip = names.transposed
    yield from linear(f"{scope}.gate_up_proj", (2 * inner, hidden), gate_up, bias, transposed=flip)
    yield from linear(f"{scope}.down_proj", (hidden, inner), (down,), bias, transposed=flip)


def _expert_parts(modules: tuple[str, ...], count: int) -> Iterator[Source]:
    """Each expert's tensors in turn; a name without `{e}` is a tensor that holds all experts."""
    if not all("{e}" in module for module in modules):
        yield from (Source(module) for module in modules)
        return
    for e in range(count):
        yield from (Source(f"{module.format(e=e)}.weight") for module in modules)


# ---------------------------------------------------------------------------------------------
# Layers


@dataclass(frozen=True)
class Block(Option):
    """How norms and residuals stand around attention and MLP.

    Attributes:
        input_norms: attention and MLP read normed values.
        output_norms: what they give is normed before it is added.
        parallel: the MLP reads what attention read, not its result; both are added at once.
        shared_norm: in a parallel layer, the MLP takes attention's normed input.
    """

    input_norms: bool = True
    output_norms: bool = False
    parallel: Flag = False
    shared_norm: Flag = False

    def resolve(self, reader: ConfigReader) -> Block:
        """As Option; a norm is shared in parallel layers only."""
        found = super().resolve(reader)
        return replace(found, shared_norm=bool(found.shared_norm and found.parallel))

    def norms(self, names: NameTable) -> Iterator[tuple[str, str]]:
        """(our name, the checkpoint's) of a layer's norms, attention's first."""
        if self.input_norms:
            yield "input_layernorm", names.attention_norm
        if self.output_norms:
            yield "post_self_attn_layernorm", names.attention_output_norm
        if self.input_norms and not resolved(self.shared_norm, "shared_norm"):
            yield "post_attention_layernorm", names.mlp_norm
        if self.output_norms:
            yield "post_mlp_layernorm", names.mlp_output_norm
