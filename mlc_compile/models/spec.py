"""What an architecture is: a frozen declaration of typed options, and its parameters.

- Structure stands in the declaration (`Architecture`), numbers in `ModelConfig`.
- `Model.parameters` is the one list of parameters that graphs, weights and planner follow.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field, replace
from typing import Literal, TypeAlias

from mlc_compile.config import ConfigReader, ModelConfig
from mlc_compile.models.names import BARE_DECODER, HF_DECODER, NameTable
from mlc_compile.models.options import (
    Block,
    FeedForward,
    Flag,
    GatedMLP,
    GroupedQuery,
    Learned,
    Norm,
    Option,
    Positions,
    RMSNorm,
    Rotary,
    SparseMLP,
)
from mlc_compile.models.params import ParamSpec, linear, parts_of
from mlc_compile.models.schema import ConfigSchema

Label: TypeAlias = Literal["stable", "experimental", "structural-only"]
Basis: TypeAlias = Literal["named", "structure", "proof"]
Variant: TypeAlias = "Callable[[ConfigReader, Architecture], Architecture]"


@dataclass(frozen=True)
class Architecture(Option):
    """A decoder-only transformer: embedding, layers of attention and MLP, norm, head.

    A declaration states only what differs from Llama without biases.

    Attributes:
        name: config.json's `model_type`.
        hf_classes: what its `architectures` may name.
        embed_norm: a norm of the embeddings (Bloom).
        final_norm: a norm before the head.
        head_bias: bias on the logits.
        unit_head: each row of the head is used as if it had length one (Baichuan 2).
        names: the checkpoint name tables it comes in, the usual one first.
        label: `stable` needs parity tests with the reference on every change.
        variant: makes the declaration that config.json means, where one model type has several.
    """

    name: str
    hf_classes: tuple[str, ...]
    attention: GroupedQuery = field(default_factory=GroupedQuery)
    mlp: FeedForward = field(default_factory=GatedMLP)
    norm: Norm = field(default_factory=RMSNorm)
    positions: Positions = field(default_factory=Rotary)
    block: Block = field(default_factory=Block)
    embed_norm: bool = False
    final_norm: bool = True
    head_bias: Flag = False
    unit_head: bool = False
    schema: ConfigSchema = field(default_factory=ConfigSchema)
    names: tuple[NameTable, ...] = (HF_DECODER, BARE_DECODER)
    label: Label = "stable"
    variant: Variant | None = None

    def resolve(self, reader: ConfigReader) -> Architecture:
        """The variant that the checkpoint is, with every option that names a config.json key
        replaced by its value."""
        found = self if self.variant is None else self.variant(reader, self)
        return Option.resolve(found, reader)

    @property
    def structure(self) -> tuple[Option | bool | str, ...]:
        """All that graphs are built by: what two models of one structure share."""
        norms = (self.norm, self.embed_norm, self.final_norm)
        return (self.attention, self.mlp, self.positions, self.block, *norms, self.head_bias)

    def feed_forward(self, sparse: bool) -> FeedForward:
        """The MLP of a layer."""
        if isinstance(self.mlp, SparseMLP) and not sparse:
            return self.mlp.dense
        return self.mlp

    def summary(self) -> str:
        """One line for `list models`."""
        return f"{self.name:<14} {self.label:<12} {', '.join(self.hf_classes)}"


@dataclass(frozen=True)
class Standing:
    """Why a checkpoint is taken for an architecture that its model type and class do not name.

    Attributes:
        basis: the user named it, its configuration and tensors match, or that and a comparison
            with the checkpoint's own class.
        evidence: the same in words.
    """

    basis: Basis
    evidence: str

    @property
    def label(self) -> Label:
        """Only a comparison makes it more than structural."""
        return "experimental" if self.basis == "proof" else "structural-only"

    @property
    def asked(self) -> bool:
        """Whether nobody vouches for it: such artefacts are made on demand only."""
        return self.basis == "structure"


@dataclass(frozen=True)
class Model:
    """A resolved architecture with one checkpoint's numbers.

    Attributes:
        standing: None where the checkpoint itself names the architecture.
    """

    arch: Architecture
    config: ModelConfig
    names: NameTable = HF_DECODER
    standing: Standing | None = field(default=None, compare=False)

    @property
    def label(self) -> Label:
        """How far this model is proved."""
        return self.arch.label if self.standing is None else self.standing.label

    def identity(self) -> dict[str, str]:
        """What artefacts record of the architecture."""
        known = {"name": self.arch.name, "label": self.label}
        standing = self.standing
        if standing is not None:
            known |= {"basis": standing.basis, "evidence": standing.evidence}
        return known

    def for_tensors(self, tensors: Collection[str]) -> Model:
        """The same, reading the name table that a checkpoint with these tensors is written in: the
        one that finds most of its names, the usual one where several do."""
        found = [replace(self, names=table) for table in self.arch.names]
        return min(found, key=lambda model: len(model.sources().difference(tensors)))

    def sources(self) -> frozenset[str]:
        """The names of all tensors that the parameters are made of."""
        return frozenset(source for spec in self.parameters() for source in spec.sources)

    def parameters(self) -> tuple[ParamSpec, ...]:
        """Every parameter, unquantised, in the order that artefacts keep."""
        return tuple(self._parameters())

    def _parameters(self) -> Iterator[ParamSpec]:
        arch, config, names = self.arch, self.config, self.names
        table = (config.vocab_size, config.hidden_size)
        embed = parts_of((names.embed,), "weight")
        yield ParamSpec("model.embed_tokens.weight", table, "embedding", embed)
        if isinstance(arch.positions, Learned):
            yield from arch.positions.parameters(config, names)
        if arch.embed_norm:
            yield from self._norm("model.embed_layernorm", names.embed_norm)
        for i, kind in enumerate(config.layers):
            scope, layer = f"model.layers.{i}", names.layer.format(i=i)
            before: list[ParamSpec] = []
            after: list[ParamSpec] = []
            for name, module in arch.block.norms(names):
                specs = self._norm(f"{scope}.{name}", f"{layer}.{module}")
                (before if name == "input_layernorm" else after).extend(specs)
            yield from before
            yield from arch.attention.parameters(scope, layer, config, names, arch.positions)
            yield from after
            yield from arch.feed_forward(kind.sparse).parameters(scope, layer, config, names)
        if arch.final_norm:
            yield from self._norm("model.norm", names.final_norm)
        head = (names.lm_head,)
        if not config.tie_word_embeddings:
            for spec in linear("lm_head", table, head, arch.head_bias, role="lm_head"):
                unit = arch.unit_head and spec.role == "lm_head"
                parts = tuple(replace(part, unit_rows=unit) for part in spec.parts)
                yield replace(spec, parts=parts)

    def _norm(self, name: str, module: str) -> Iterator[ParamSpec]:
        yield from self.arch.norm.parameters(name, self.config.hidden_size, (module,))

    def ignorable_tensors(self) -> tuple[re.Pattern[str], ...]:
        """Patterns (for `fullmatch`) of checkpoint tensors that nothing needs.

        Stored frequencies are recomputed from config.json, as transformers does, and so are causal
        masks; a tied head that is stored all the same is a copy of the embedding.
        """
        patterns = [
            r"(.*\.)?rotary(_pos)?_emb\.(inv_freq|cos_cached|sin_cached)",
            r"(.*\.)?(attn|attention|self_attention)\.(bias|masked_bias|causal_mask)",
        ]
        if self.config.tie_word_embeddings:
            patterns.append(re.escape(f"{self.names.lm_head}.weight"))
        return tuple(re.compile(pattern) for pattern in patterns)


def num_parameters(model: Model) -> int:
    """Elements over all parameters; a tied embedding counts once."""
    return sum(spec.num_elements for spec in model.parameters())
