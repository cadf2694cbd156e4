"""What a checkpoint is, by its names, its keys and its tensors' shapes. Reads no weight.

- A registered model type with a class of its own is taken at its word.
- For others every architecture is tried: it must read config.json strictly, and its parameters and
  the checkpoint's tensors must map one to one with the right shapes.
- Shapes do not show everything: norms that add 1, neighbours that rotate together, caps, scales,
  routing, activations. Where candidates differ in these, none is chosen: the user names one, or
  `runtime/prove.py` compares them with the checkpoint's own class.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, NamedTuple, TypeAlias

from mlc_compile.errors import InputError
from mlc_compile.models.detect import (
    IGNORED,
    declared_by,
    is_foreign,
    load_model,
    read_model,
)
from mlc_compile.models.options import Option
from mlc_compile.models.params import ParamSpec, expected_shapes
from mlc_compile.models.registry import ARCHITECTURES, get_architecture
from mlc_compile.models.spec import Architecture, Model, Standing

Shapes: TypeAlias = "Mapping[str, tuple[int, ...]]"
"""Of tensors, by name."""

_NAMES_SHOWN = 3
_REJECTED_SHOWN = 3


# ---------------------------------------------------------------------------------------------
# Tensors


class Misshapen(NamedTuple):
    """A tensor of another shape than its parameter needs."""

    spec: ParamSpec
    name: str
    found: tuple[int, ...]
    expected: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.name} is {list(self.found)}, not {list(self.expected)}"


@dataclass(frozen=True)
class TensorMatch:
    """How a checkpoint's tensors and a model's parameters map.

    Attributes:
        model: reads the checkpoint's own names.
        missing: tensors that the parameters need; `unused`: those that nothing needs, but for the
            `ignored` ones, which change nothing.
    """

    model: Model
    used: int
    missing: tuple[str, ...]
    unused: tuple[str, ...]
    ignored: tuple[str, ...]
    misshapen: tuple[Misshapen, ...]

    @property
    def faults(self) -> int:
        """How many tensors do not map; 0 is one to one."""
        return len(self.missing) + len(self.unused) + len(self.misshapen)

    def differences(self) -> str:
        """The first of each kind, in words."""
        return " and ".join(
            f"{len(found)} {kind} ({shown(found)})"
            for kind, found in (
                ("missing", self.missing),
                ("unused", self.unused),
                ("of another shape", [str(wrong) for wrong in self.misshapen]),
            )
            if found
        )


def shown(names: Sequence[str], count: int = _NAMES_SHOWN) -> str:
    """The first names of a list, and how many more there are."""
    more = len(names) - count
    return ", ".join(names[:count]) + (f" and {more} more" if more > 0 else "")


def match_tensors(model: Model, shapes: Shapes) -> TensorMatch:
    """Names and shapes of a checkpoint against a model's parameters."""
    model = model.for_tensors(shapes)
    specs = model.parameters()
    needed = {name: None for spec in specs for name in spec.sources}
    patterns = model.ignorable_tensors()
    unused: list[str] = []
    ignored: list[str] = []
    for name in shapes:
        if name not in needed:
            harmless = any(pattern.fullmatch(name) for pattern in patterns)
            (ignored if harmless else unused).append(name)
    return TensorMatch(
        model=model,
        used=len(needed),
        missing=tuple(name for name in needed if name not in shapes),
        unused=tuple(unused),
        ignored=tuple(sorted(ignored)),
        misshapen=tuple(wrong for spec in specs for wrong in _misshapen(spec, shapes)),
    )


def _misshapen(spec: ParamSpec, shapes: Shapes) -> Iterator[Misshapen]:
    """Elements of a vector may stand in any rank but none."""
    for name, expected in expected_shapes(spec).items():
        found = shapes.get(name)
        if found is None or found == expected:
            continue
        vector = len(spec.shape) == 1 and found != ()
        if not (vector and math.prod(found) == math.prod(expected)):
            yield Misshapen(spec, name, found, expected)


# ---------------------------------------------------------------------------------------------
# What is found


@dataclass(frozen=True)
class Candidate:
    """An architecture that the checkpoint fits.

    Attributes:
        equal: others that are built in the same way for this checkpoint.
        tensors: how many there are, each with a use.
        trusted: keys of config.json that change nothing in this architecture, and may in another.
    """

    model: Model
    tensors: int
    equal: tuple[str, ...] = ()
    trusted: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return self.model.arch.name

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "equal": list(self.equal),
            "tensors": self.tensors,
            "trusted_keys": list(self.trusted),
        }


@dataclass(frozen=True)
class Rejected:
    """An architecture that the checkpoint does not fit.

    Attributes:
        reason: the first key that config.json has wrong, or the first tensors.
        faults: tensors that do not map; None where config.json did not come so far.
        error: as it was raised for config.json.
    """

    name: str
    reason: str
    faults: int | None = None
    error: InputError | None = field(default=None, compare=False, repr=False)

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "reason": self.reason, "tensor_faults": self.faults}


@dataclass(frozen=True)
class Run:
    """One comparison: NMSE is that of the worst position."""

    seed: int
    tokens: int
    nmse: float


@dataclass(frozen=True)
class Proof:
    """A candidate's logits against those of the checkpoint's own class, with random weights.

    Attributes:
        against: the class and its library.
        bound: what NMSE may be at most.
        fault: why nothing could be compared.
    """

    name: str
    against: str
    bound: float
    runs: tuple[Run, ...] = ()
    fault: str = ""

    @property
    def passed(self) -> bool:
        # NaN is never within the bound.
        return not self.fault and bool(self.runs) and all(r.nmse <= self.bound for r in self.runs)

    @property
    def worst(self) -> Run:
        """Of all runs; of those that are no numbers, the first."""
        return max(self.runs, key=lambda run: math.inf if math.isnan(run.nmse) else run.nmse)

    def __str__(self) -> str:
        if self.fault:
            return f"{self.name}: {self.fault}"
        seeds = len({run.seed for run in self.runs})
        worst = self.worst
        return (
            f"{self.name}: NMSE {worst.nmse:.1e} at worst (seed {worst.seed}, {worst.tokens} "
            f"tokens) of {seeds} seeds, at most {self.bound:.0e} is equal"
        )

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "passed": self.passed,
            "against": self.against,
            "bound": self.bound,
            # JSON has no infinity
            "runs": [
                {**vars(run), "nmse": run.nmse if math.isfinite(run.nmse) else None}
                for run in self.runs
            ],
            "fault": self.fault,
        }


@dataclass(frozen=True)
class Detection:
    """What a checkpoint may be, and why.

    Attributes:
        basis: "registered": model type and class are known; "named": the user gave the type;
            "structure": every architecture was tried.
        proofs: of candidates, where they were compared; `unproved` says why they could not be.
    """

    where: str
    model_type: str | None
    classes: tuple[str, ...]
    basis: Literal["registered", "named", "structure"]
    candidates: tuple[Candidate, ...]
    rejected: tuple[Rejected, ...]
    proofs: tuple[Proof, ...] = ()
    unproved: str = ""

    @property
    def outcome(self) -> Model | None:
        """The model, with its label; None where there is none, or several."""
        if not self.proofs:
            return self.candidates[0].model if len(self.candidates) == 1 else None
        passed = {proof.name: proof for proof in self.proofs if proof.passed}
        proved = [c.model for c in self.candidates if c.name in passed]
        if len(proved) != 1:
            return None
        (model,) = proved
        if model.standing is None:
            return model
        proof = passed[model.arch.name]
        seeds = len({run.seed for run in proof.runs})
        evidence = f"NMSE at most {proof.bound:.0e} against {proof.against} on {seeds} seeds"
        return replace(model, standing=Standing("proof", evidence))

    def chosen(self, *, allow_experimental: bool = False) -> Model:
        """The outcome.

        allow_experimental: also one that is matched by structure alone.

        Raises:
            InputError: there is none, or it needs to be allowed.
        """
        model = self.outcome
        if model is None:
            raise self.problem()
        if self.unproved and not allow_experimental:
            raise InputError(
                f"{self.where}: cannot be proved to be {model.arch.name}: {self.unproved}",
                hint="--allow-experimental takes it all the same",
            )
        check_allowed(model, allow_experimental, where=self.where)
        return model

    def problem(self) -> InputError:
        """Why there is no outcome."""
        failed = [str(proof) for proof in self.proofs if not proof.passed]
        fitting = ", ".join(candidate.name for candidate in self.candidates)
        if self.proofs and len(failed) == len(self.proofs):
            return InputError(
                f"{self.where}: not what {self.proofs[0].against} computes: {'; '.join(failed)}",
                hint="its keys and shapes fit, but its maths differ: it is not supported",
            )
        if self.candidates:
            proved = [proof.name for proof in self.proofs if proof.passed]
            what = f"{', '.join(proved)} compute the same" if proved else f"{fitting} all fit"
            why = "; ".join(f"{what}: {self._told(found)}" for what, found in self.apart().items())
            cannot = f", and none can be proved: {self.unproved}" if self.unproved else ""
            return InputError(
                f"{self.where}: {self._known()}; by keys and tensors {what}; they differ in "
                f"{why}{cannot}",
                hint="name the right one with --model-type"
                + ("" if cannot or proved else ", or let --prove decide"),
            )
        if self.basis != "structure":
            (only,) = self.rejected
            return only.error or InputError(f"{self.where}: is not {only.name}: {only.reason}")
        closest = "; ".join(f"{r.name}: {r.reason}" for r in self.rejected[:2])
        return InputError(
            f"{self.where}: {self._known()} and no other fits (nearest: {closest})",
            hint=f"supported: {', '.join(ARCHITECTURES)}; `mlc_compile detect` says more",
        )

    def apart(self) -> dict[str, dict[str, str]]:
        """What tells the candidates apart: each fact with its value for each of them."""
        facts = {candidate.name: _facts(candidate.model) for candidate in self.candidates}
        every = dict.fromkeys(fact for found in facts.values() for fact in found)
        values = {
            fact: {name: found.get(fact, "none") for name, found in facts.items()} for fact in every
        }
        return {fact: of for fact, of in values.items() if len(set(of.values())) > 1}

    @staticmethod
    def _told(values: Mapping[str, str]) -> str:
        """Candidates by value."""
        names: dict[str, list[str]] = {}
        for name, value in values.items():
            names.setdefault(value, []).append(name)
        return ", ".join(f"{value} ({', '.join(of)})" for value, of in names.items())

    def _known(self) -> str:
        """What the checkpoint says it is, and whether we know it."""
        if self.model_type not in ARCHITECTURES:
            near = difflib.get_close_matches(
                str(self.model_type).lower(), ARCHITECTURES, cutoff=0.5
            )
            closest = f"closest: {', '.join(near)}" if near else "none is close"
            return f"unknown model_type {self.model_type!r} ({closest})"
        return f"{', '.join(self.classes)} is no class of {self.model_type} that we know"

    @property
    def next_step(self) -> str:
        """What the user can do now."""
        model = self.outcome
        if model is None:
            return self.problem().hint or "nothing: it is not supported"
        if model.standing is None or not model.standing.asked:
            return "convert_weight" + (" --prove" if model.label == "experimental" else "")
        return "convert_weight --prove, or --allow-experimental to take it unproved"

    def to_json(self) -> dict[str, Any]:
        """JSON-ready data."""
        model = self.outcome
        return {
            "model": self.where,
            "model_type": self.model_type,
            "classes": list(self.classes),
            "basis": self.basis,
            "candidates": [candidate.to_json() for candidate in self.candidates],
            "told_apart_by": self.apart(),
            "rejected": [rejected.to_json() for rejected in self.rejected],
            "proofs": [proof.to_json() for proof in self.proofs],
            "unproved": self.unproved,
            "architecture": model and model.identity(),
            "problem": "" if model else self.problem().message,
            "next": self.next_step,
        }

    def to_text(self) -> str:
        """The same for people."""
        known = {"registered": "known", "named": "taken as you say"}.get(self.basis, "not known")
        rows = [
            ("model type", f"{self.model_type}"),
            ("class", f"{', '.join(self.classes) or 'none given'} ({known})"),
        ]
        for number, candidate in enumerate(self.candidates):
            equal = f", as {', '.join(candidate.equal)}" if candidate.equal else ""
            text = f"{candidate.name}{equal}: every key, and {candidate.tensors} tensors"
            if candidate.trusted:
                text += f"; without effect there: {shown(candidate.trusted, 6)}"
            rows.append(("" if number else "fits", text))
        for number, (fact, values) in enumerate(self.apart().items()):
            rows.append(("" if number else "told apart by", f"{fact}: {self._told(values)}"))
        for number, rejected in enumerate(self.rejected[:_REJECTED_SHOWN]):
            rows.append(("" if number else "does not fit", f"{rejected.name}: {rejected.reason}"))
        if (more := len(self.rejected) - _REJECTED_SHOWN) > 0:
            rows.append(("", f"{more} more, which --json lists"))
        for proof in self.proofs:
            verdict = "equal" if proof.passed else "not equal"
            rows.append(("proof", f"{proof} -> {verdict}"))
        if self.proofs:
            rows.append(("", f"against {self.proofs[0].against}"))
        if self.unproved:
            rows.append(("proof", f"none: {self.unproved}"))
        model = self.outcome
        if model is None:
            failed = bool(self.proofs) and not any(proof.passed for proof in self.proofs)
            why = "none is equal" if failed else "several fit" if self.candidates else "none fits"
            rows.append(("label", f"none: {why}"))
        else:
            rows.append(("label", f"{model.label} ({model.arch.name})"))
        rows.append(("next", self.next_step))
        return "\n".join([self.where, *(f"  {name:<14}{text}" for name, text in rows)])


def check_allowed(model: Model, allowed: bool, *, where: str) -> None:
    """Raises InputError for a model that only its structure speaks for, unless it is allowed."""
    if model.standing is not None and model.standing.asked and not allowed:
        raise InputError(
            f"{where}: {model.arch.name} is {model.label}: {model.standing.evidence}",
            hint="--allow-experimental takes it all the same; `detect` and `convert_weight` can "
            "--prove it first",
        )


# ---------------------------------------------------------------------------------------------
# Finding


def identify(
    config_json: Mapping[str, Any], shapes: Shapes, *, model_type: str = "auto", where: str
) -> Detection:
    """What a checkpoint with these keys and tensors is.

    model_type: as for `load_model`.

    Raises:
        InputError: `model_type` is none that is known, or config.json has none.
    """
    found, classes = config_json.get("model_type"), config_json.get("architectures")
    detection = Detection(
        where=where,
        model_type=found if isinstance(found, str) else None,
        classes=tuple(map(str, classes)) if isinstance(classes, list) else (),
        basis="structure",
        candidates=(),
        rejected=(),
    )
    if model_type == "auto" and is_foreign(config_json):
        every = ARCHITECTURES.values()
        return _sorted([_tried(a, config_json, shapes, None, where) for a in every], detection)
    own = declared_by(config_json)
    if model_type != "auto":
        declared = get_architecture(model_type, where="--model-type")
    elif own is not None:
        declared = own
    else:
        declared = load_model(config_json, where=where).arch  # which says what is missing
    tried = [_tried(declared, config_json, shapes, model_type, where)]
    return _sorted(tried, replace(detection, basis="registered" if declared is own else "named"))


def declared_model(
    config_json: Mapping[str, Any], *, model_type: str = "auto", where: str
) -> Model | None:
    """The model of a type and class that are known, or that the user names; else None.

    Raises:
        InputError: as `load_model`.
    """
    if model_type == "auto" and is_foreign(config_json):
        return None
    return load_model(config_json, model_type=model_type, where=where)


def _tried(
    arch: Architecture,
    config_json: Mapping[str, Any],
    shapes: Shapes,
    model_type: str | None,
    where: str,
) -> Candidate | Rejected:
    """model_type: what `load_model` is given; None tries the architecture on its own account."""
    try:
        if model_type is None:
            standing = Standing("structure", "matched by keys and shapes of tensors, not proved")
            model = read_model(config_json, arch, where=where, forced=True)
            model = replace(model, standing=standing)
        else:
            model = load_model(config_json, model_type=model_type, where=where)
    except InputError as error:
        return Rejected(arch.name, error.message.removeprefix(f"{where}: "), error=error)
    match = match_tensors(model, shapes)
    if match.faults:
        return Rejected(arch.name, f"tensors: {match.differences()}", match.faults)
    trusted = sorted(config_json.keys() & set(arch.schema.ignored) - IGNORED)
    # What a known class ignores is settled; in an unknown one the same key may mean something.
    return Candidate(match.model, match.used, trusted=tuple(trusted) if model.standing else ())


def _sorted(tried: Sequence[Candidate | Rejected], said: Detection) -> Detection:
    """With the candidates, equal ones as one, those that the checkpoint's names speak for first;
    and the others, the nearest first."""
    fitting = [one for one in tried if isinstance(one, Candidate)]
    candidates: list[Candidate] = []
    for one in sorted(fitting, key=lambda candidate: not _named_by(said, candidate)):
        same = (i for i, c in enumerate(candidates) if equal_models(one.model, c.model))
        at = next(same, None)
        if at is None:
            candidates.append(one)
        else:
            equal = (*candidates[at].equal, one.name)
            candidates[at] = replace(candidates[at], equal=equal)

    def distance(one: Rejected) -> tuple[float, float]:
        faults = math.inf if one.faults is None else one.faults
        return faults, -difflib.SequenceMatcher(None, str(said.model_type), one.name).ratio()

    rejected = sorted((one for one in tried if isinstance(one, Rejected)), key=distance)
    return replace(said, candidates=tuple(candidates), rejected=tuple(rejected))


def _named_by(said: Detection, candidate: Candidate) -> bool:
    """Whether model type or class are this architecture's."""
    arch = candidate.model.arch
    return arch.name == said.model_type or bool(set(arch.hf_classes) & set(said.classes))


def equal_models(one: Model, other: Model) -> bool:
    """Whether two architectures are the same for a checkpoint: graph, numbers and tensors."""
    return (
        one.arch.structure == other.arch.structure
        and replace(one.config, model_type="") == replace(other.config, model_type="")
        and one.parameters() == other.parameters()
    )


# ---------------------------------------------------------------------------------------------
# What shapes do not show


def _facts(model: Model) -> dict[str, str]:
    """All that graphs depend on, by name, in words."""
    found: dict[str, str] = {}
    for option in fields(model.arch):
        value = getattr(model.arch, option.name)
        if isinstance(value, Option | bool):
            found |= _flat(option.name, value)
    for number in fields(model.config):
        value = getattr(model.config, number.name)
        if number.name == "layers":
            for kind in ("window", "rope", "sparse"):
                found[f"{kind} of layers"] = _run_length([getattr(k, kind) for k in value])
        elif number.name not in ("model_type", "raw", "rope"):
            found[number.name] = str(value)
    return found


def _flat(name: str, value: object) -> dict[str, str]:
    if not isinstance(value, Option):
        return {name: str(value)}
    found = {name: type(value).__name__}
    for inner in fields(value):
        found |= _flat(f"{name}.{inner.name}", getattr(value, inner.name))
    return found


def _run_length(values: Sequence[object]) -> str:
    """The values of layers in turn, each with how often it comes where that is not once."""
    runs: list[tuple[str, int]] = []
    for value in map(_word, values):
        if runs and runs[-1][0] == value:
            runs[-1] = (value, runs[-1][1] + 1)
        else:
            runs.append((value, 1))
    text = [value if len(runs) == 1 or n == 1 else f"{n} x {value}" for value, n in runs]
    return ", ".join(text[:4]) + (", ..." if len(text) > 4 else "")


def _word(value: object) -> str:
    kind = getattr(value, "kind", None)
    if kind is None:
        return str(value)
    assert hasattr(value, "theta") and hasattr(value, "rotary_dim")
    return f"{kind} {value.theta:g} over {value.rotary_dim}"
