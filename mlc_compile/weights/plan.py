"""What a conversion will write, from names and shapes alone.

Everything that can be wrong with a checkpoint's tensors is found here, before a weight is read:
each parameter has its sources in the right shapes, and each tensor of the checkpoint has a use.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mlc_compile.errors import InputError
from mlc_compile.models.params import ParamSpec
from mlc_compile.models.spec import Model
from mlc_compile.models.structure import TensorMatch, match_tensors, shown
from mlc_compile.quantization.policy import StoredParam, stored_params
from mlc_compile.quantization.scheme import QuantScheme
from mlc_compile.weights.checkpoint import Checkpoint
from mlc_compile.weights.tensor_cache import Shard, plan_shards

_NAMES_SHOWN = 5


@dataclass(frozen=True)
class ParamPlan:
    """One parameter and the tensors it is stored as."""

    spec: ParamSpec
    stored: tuple[StoredParam, ...]


@dataclass(frozen=True)
class ConversionPlan:
    """What a conversion will write, known before anything is read.

    model: reads the checkpoint's own names. ignored: tensors of the checkpoint that nothing needs.
    """

    model: Model
    scheme: QuantScheme
    params: tuple[ParamPlan, ...]
    ignored: tuple[str, ...]

    @property
    def stored(self) -> tuple[StoredParam, ...]:
        """Every tensor to be written, in order."""
        return tuple(stored for param in self.params for stored in param.stored)

    @property
    def shards(self) -> tuple[Shard, ...]:
        """The files the tensors go to."""
        return plan_shards(self.stored)

    @property
    def total_bytes(self) -> int:
        """Exact bytes of all parameter shards."""
        return sum(stored.nbytes for stored in self.stored)

    @property
    def source_elements(self) -> int:
        """Elements of the unquantised parameters."""
        return sum(param.spec.num_elements for param in self.params)

    @property
    def effective_bits_per_weight(self) -> float:
        """Stored bits, scales and plain tensors included, for each unquantised element."""
        return 8 * self.total_bytes / self.source_elements

    def to_json(self) -> dict[str, Any]:
        """JSON-ready data."""
        return {
            "architecture": self.model.arch.name,
            "architecture_label": self.model.label,
            "quantization": self.scheme.name,
            "parameters": self.source_elements,
            "tensors": len(self.stored),
            "shards": len(self.shards),
            "parameter_bytes": self.total_bytes,
            "effective_bits_per_weight": round(self.effective_bits_per_weight, 6),
            "ignored_tensors": list(self.ignored),
        }

    def to_text(self) -> str:
        """The same for people."""
        lines = [
            f"architecture  {self.model.arch.name} ({self.model.label})",
            f"quantisation  {self.scheme.name} ({self.scheme.label})",
            f"parameters    {self.source_elements / 1e6:.1f} M in {len(self.stored)} tensors",
            f"output        {self.total_bytes / 1e6:.1f} MB in {len(self.shards)} shards, "
            f"{self.effective_bits_per_weight:.3f} bits per weight",
        ]
        if self.ignored:
            lines.append(f"ignored       {listed(self.ignored)}")
        return "\n".join(lines)


def plan_conversion(checkpoint: Checkpoint, model: Model, scheme: QuantScheme) -> ConversionPlan:
    """Matches the checkpoint's tensors with the model's parameters; reads no weight.

    Raises InputError for a missing, unused or misshapen tensor or one that holds no plain floating
    numbers, with the names and the likely cause.
    """
    match = match_tensors(model, {name: t.shape for name, t in checkpoint.tensors.items()})
    model = match.model
    if match.missing or match.unused:
        problems = [
            f"{len(names)} {kind} ({listed(names)})"
            for kind, names in (("missing", match.missing), ("unused", match.unused))
            if names
        ]
        raise InputError(
            f"{checkpoint.path}: the tensors do not fit {model.arch.name} with its config.json: "
            + " and ".join(problems),
            hint=_likely_cause(model, match.missing, match.unused),
        )
    if match.misshapen:
        raise _misshapen(match, checkpoint)
    specs = model.parameters()
    for info in (checkpoint.tensors[name] for spec in specs for name in spec.sources):
        if info.dtype.startswith(("int", "uint", "bool", "float8")):
            raise InputError(
                f"{checkpoint.path}: {info.name}: holds {info.dtype}, not plain floating numbers",
                hint="the checkpoint is quantised already; convert from the unquantised one",
            )
    return ConversionPlan(
        model,
        scheme,
        tuple(ParamPlan(spec, stored_params(spec, scheme)) for spec in specs),
        match.ignored,
    )


def _misshapen(match: TensorMatch, checkpoint: Checkpoint) -> InputError:
    """The error for the first parameter whose tensors have other shapes."""
    first = match.misshapen[0]
    wrong = [other.name for other in match.misshapen if other.spec is first.spec]
    hint = "config.json belongs to another checkpoint, or this one is damaged"
    if first.spec.role in ("embedding", "lm_head") and first.found[1:] == first.spec.shape[1:]:
        vocab, rows = match.model.config.vocab_size, first.found[0]
        hint = f"config.json says vocab_size = {vocab}, the tensor has {rows}"
    return InputError(
        f"{checkpoint.path}: {listed(wrong)}: shape {list(first.found)}, "
        f"config.json makes {list(first.expected)}",
        hint=hint,
    )


_QUANTISED = re.compile(
    r".*(qweight|qzeros|g_idx|scales|weight_scale(_inv)?|input_scale|SCB|absmax|quant_map|"
    r"weight_packed|blocks)|.*quant_state.*"
)
_LAYER = re.compile(r"(?:.*\.)?(?:layers|h|blocks)\.(\d+)\..*")
_NORM = re.compile(r"norm|\bln_")
_EXPERT = re.compile(r".*\.experts\.(\d+)\..*")


def _likely_cause(model: Model, missing: Sequence[str], unused: Sequence[str]) -> str:
    """The most probable reason why names do not match, as advice."""
    config = model.config
    head = f"{model.names.lm_head}.weight"
    if any(_QUANTISED.fullmatch(name) for name in unused):
        return "the checkpoint is quantised already; convert from the unquantised one"
    if any("lora_" in name for name in unused):
        return "these are adapters; merge them into the base model first"
    experts = [int(found[1]) for name in unused if (found := _EXPERT.fullmatch(name))]
    if experts and config.experts is None:
        return f"this is a mixture of experts, which {model.arch.name} is not; check model_type"
    if experts and config.experts is not None and min(experts) >= config.experts.count:
        count = config.experts.count
        return f"config.json says {count} experts in a layer, expert {max(experts)} is there"
    if head in missing:
        return f"without {head}, config.json should say tie_word_embeddings: true"
    expected = config.num_hidden_layers
    extra = [int(found[1]) for name in unused if (found := _LAYER.fullmatch(name))]
    if extra and not missing and min(extra) >= expected:
        return f"config.json says num_hidden_layers = {expected}, layer {max(extra)} is there"
    if missing and not unused:
        if all(name.endswith(".bias") for name in missing):
            return "config.json asks for biases (attention_bias, mlp_bias) or model_type is wrong"
        layers = {int(found[1]) for name in missing if (found := _LAYER.fullmatch(name))}
        if layers:
            return (
                f"config.json says num_hidden_layers = {expected}, layer {min(layers)} is not "
                "whole; a file of the checkpoint may be missing"
            )
    if unused and not missing and all(name.endswith(".bias") for name in unused):
        return "config.json has no biases (attention_bias, mlp_bias), or model_type is wrong"
    if unused and not missing and all(_NORM.search(name) for name in unused):
        return "these norms belong to another model_type"
    return "model_type or config.json does not belong to these weights"


def listed(names: Sequence[str]) -> str:
    """The first few of them, for a message."""
    return shown(names, _NAMES_SHOWN)
