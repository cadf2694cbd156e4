"""Whether a compiled library computes what the model means: its logits against a reference's.

- The reference computes each context from the whole text at once, without a cache. So a wrong KV
  length, position, page or mask shows as wrong logits, whichever function made it.
- Contexts are mostly random tokens: a text that repeats itself would hide an attention that reads
  the wrong row. One scenario follows the reference's own greedy text.
- A scenario that cannot run is reported with its reason; NaN and infinity fail every comparison.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from mlc_compile.chat_config import ChatConfig
from mlc_compile.compiler.metadata import config_fingerprint
from mlc_compile.errors import InputError
from mlc_compile.models.detect import load_model
from mlc_compile.models.spec import Model, num_parameters
from mlc_compile.quantization.scheme import QuantScheme
from mlc_compile.runtime.compare import (
    ROUNDING,
    THRESHOLDS,
    Deviation,
    Float32,
    Row,
    Thresholds,
    compare,
)
from mlc_compile.runtime.engine import Engine
from mlc_compile.runtime.golden import Golden, is_golden, kept_logits, parameters_digest
from mlc_compile.runtime.reference import (
    Attention,
    ParameterCheck,
    Reference,
    check_parameters,
    checkpoint_weights,
    make_reference,
    roughen,
    stored_weights,
    tokens_of,
)
from mlc_compile.runtime.scenarios import (
    SCENARIOS,
    Context,
    Driver,
    Greedy,
    Limits,
    Sequencer,
    SkipError,
    plan_contexts,
)
from mlc_compile.weights.checkpoint import Checkpoint, open_checkpoint

Progress = Callable[[str, int, int], None]
Rows: TypeAlias = Mapping[Context, Row]

TEXT_PROMPT = "The capital of France is"

# A text may cost the reference so many tokens x parameters: about 10 s on two cores. A thorough
# run is bounded by the memory of one text's activations instead.
MAX_WORK = 3e11
ROUGHENINGS = 2  # samples of a context's sensitivity
# Where two experts are all but equal, rounding decides which one a token takes, and all that
# follows reads another value. A few samples miss that.
ROUTED_ROUGHENINGS = 8
SHORTEST, LONGEST, LONGEST_THOROUGH = 128, 2048, 32768


@dataclass
class Scenario:
    """The outcome of one scenario. `skipped` says why it did not run, `fault` why it broke off."""

    name: str
    what: str
    contexts: list[Context] = field(default_factory=list)
    deviations: list[Deviation] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    skipped: str = ""
    fault: str = ""

    def worst(self, name: str) -> float:
        return max((float(getattr(d, name)) for d in self.deviations), default=0.0)

    def mean(self, name: str) -> float:
        return math.fsum(float(getattr(d, name)) for d in self.deviations) / max(
            1, len(self.deviations)
        )

    @property
    def top1(self) -> float:
        """Fraction of positions whose likeliest token is the reference's."""
        return self.mean("agrees")

    def decided(self, limits: Thresholds) -> tuple[int, int]:
        """(agreeing, all) positions whose margin exceeds the error."""
        decided = [d for d in self.deviations if d.decided(limits)]
        return sum(d.agrees for d in decided), len(decided)

    def failures(self, limits: Thresholds) -> list[str]:
        """What misses the thresholds, in words; comparisons are written so that NaN fails."""
        if self.skipped:
            return []
        found = [self.fault] if self.fault else []
        if not self.deviations and not self.fault:
            found.append("compared nothing")
        if bad := sum(not d.finite for d in self.deviations):
            found.append(f"NaN or infinity at {bad} of {len(self.deviations)} positions")
        else:
            for what, found_value, limit in (
                ("mean NMSE", self.mean("eased_nmse"), limits.nmse),
                ("worst NMSE", self.worst("eased_nmse"), limits.worst_nmse),
                ("max error / max |logit|", self.worst("eased_max_abs"), limits.max_abs),
                ("KL divergence", self.worst("eased_kl"), limits.max_kl),
            ):
                if not found_value <= limit:
                    found.append(f"{what} {found_value:.3g} > {limit:g}")
        agreeing, decided = self.decided(limits)
        if agreeing != decided:
            found.append(f"{decided - agreeing} of {decided} clear first choices differ")
        return found

    def to_json(self, limits: Thresholds) -> dict[str, Any]:
        if self.skipped:
            return {"name": self.name, "what": self.what, "skipped": self.skipped}
        agreeing, decided = self.decided(limits)

        def number(x: float) -> float | None:
            return x if math.isfinite(x) else None  # JSON has no infinity

        return {
            "name": self.name,
            "what": self.what,
            "positions": len(self.deviations),
            "nmse_worst": number(self.worst("nmse")),
            "nmse_mean": number(self.mean("nmse")),
            "max_abs_error": number(self.worst("max_error")),
            "max_abs_error_relative": number(self.worst("max_abs")),
            "kl_worst": number(self.worst("kl")),
            "kl_mean": number(self.mean("kl")),
            "top1_agreement": self.top1,
            "decided_positions": decided,
            "decided_agreeing": agreeing,
            "ill_conditioned": sum(d.ease > 1 for d in self.deviations),
            "notes": list(self.notes),
            "failures": self.failures(limits),
        }


def run_scenarios(
    engine: Sequencer,
    limits: Limits,
    greedy: Greedy,
    rows: Rows,
    thresholds: Thresholds,
    *,
    reset: Callable[[], None] = lambda: None,
    progress: Progress | None = None,
) -> list[Scenario]:
    """Every scenario on `engine`; `reset` empties its cache after one that broke off."""
    plan = plan_contexts(limits, greedy)
    results = []
    for number, (name, what, body) in enumerate(SCENARIOS):
        if progress is not None:
            progress(name, number, len(SCENARIOS))
        result = Scenario(name, what)
        results.append(result)
        if any(context not in rows for context in plan[name]):
            result.skipped = "the stored logits do not cover the sizes of this library"
            continue

        def see(context: Context, logits: Float32 | None, result: Scenario = result) -> None:
            assert logits is not None
            result.contexts.append(context)
            result.deviations.append(compare(rows[context], logits, thresholds))

        try:
            body(Driver(engine, see, limits), limits, greedy, result.notes)
        except SkipError as error:
            result.skipped = str(error)
        except Exception as error:  # whatever a library raises is its own failure
            lines = str(error).strip().splitlines() or [type(error).__name__]
            result.fault = f"broke off: {lines[-1]}"
            reset()
        if name == "greedy" and result.deviations:
            result.notes.append(_text_note(result.deviations))
    if progress is not None:
        progress("done", len(SCENARIOS), len(SCENARIOS))
    return results


def _text_note(deviations: Sequence[Deviation]) -> str:
    """How far the library's own greedy text goes with the reference's."""
    total = len(deviations)
    first = next((i for i, d in enumerate(deviations) if not d.agrees), None)
    if first is None:
        return f"the same greedy text for all {total} tokens"
    return f"the same greedy text for {first} of {total} tokens, then the choice is another"


def reference_rows(
    reference: Reference,
    contexts: Sequence[Context],
    progress: Progress | None = None,
) -> dict[Context, Row]:
    """Rows for all contexts; those that begin alike are computed from the longest one.

    Raises InputError where the reference itself gives NaN or infinity.
    """
    rows: dict[Context, Row] = {}
    ordered = sorted(set(contexts))  # a beginning comes right before what continues it
    chain: list[Context] = []
    for number, (context, after) in enumerate(zip(ordered, [*ordered[1:], ()], strict=True)):
        chain.append(context)
        if after[: len(context)] == context:
            continue
        if progress is not None:
            progress("reference", number, len(ordered))
        logits = reference.logits(context, [len(tokens_of(c)) - 1 for c in chain])
        for c, row in zip(chain, logits, strict=True):
            rows[c] = Row.of(row)
            if not math.isfinite(rows[c].log_norm):
                raise InputError(
                    f"the reference ({reference.name}) gives logits that are not finite",
                    hint="the weights are damaged, or config.json is not theirs",
                )
        chain = []
    return rows


@dataclass(frozen=True)
class VerifyReport:
    """What was compared, and what missed its threshold (`failures`, whole sentences)."""

    library: Path
    model_dtype: str
    reference: str
    thresholds: Thresholds
    scenarios: tuple[Scenario, ...]
    parameters: ParameterCheck | None
    quantization_loss: Scenario | None
    notes: tuple[str, ...]
    architecture: Mapping[str, str] = field(default_factory=dict)

    @property
    def failures(self) -> list[str]:
        found = [
            f"{s.name}: {problem}"
            for s in self.scenarios
            for problem in s.failures(self.thresholds)
        ]
        if not any(s.deviations or s.fault for s in self.scenarios):
            found.append("no scenario could run")
        if self.parameters is not None and self.parameters.faults:
            faults = self.parameters.faults
            more = f" and {len(faults) - 1} more" if len(faults) > 1 else ""
            found.append(f"parameters are not the checkpoint's: {faults[0]}{more}")
        return found

    def to_json(self) -> dict[str, Any]:
        """JSON-ready data."""
        t = self.thresholds
        loss = self.quantization_loss
        return {
            "library": str(self.library),
            "architecture": dict(self.architecture),
            "model_dtype": self.model_dtype,
            "reference": self.reference,
            "ok": not self.failures,
            "thresholds": {
                "nmse_mean": t.nmse,
                "nmse_worst": t.worst_nmse,
                "max_abs_error_relative": t.max_abs,
                "kl_worst": t.max_kl,
                "decided_margin": t.margin,
            },
            "scenarios": [s.to_json(t) for s in self.scenarios],
            "parameters": self.parameters and self.parameters.to_json(),
            "quantization_loss": loss and _loss_json(loss),
            "notes": list(self.notes),
            "failures": self.failures,
        }

    def to_text(self) -> str:
        """The same for people."""
        t = self.thresholds
        lines = [
            *(["architecture  {name} ({label})".format(**a)] if (a := self.architecture) else []),
            f"reference     {self.reference}",
            f"model dtype   {self.model_dtype}",
            "",
            _row(
                "scenario", "positions", "NMSE", "worst", "error", "KL", "worst", "top-1", "clear"
            ),
        ]
        for s in self.scenarios:
            if s.skipped:
                lines.append(f"{s.name:<16}skipped: {s.skipped}")
                continue
            agreeing, decided = s.decided(t)
            numbers = [s.mean("nmse"), s.worst("nmse"), s.worst("max_abs"), s.mean("kl")]
            lines.append(
                _row(
                    s.name,
                    str(len(s.deviations)),
                    *(f"{x:.1e}" for x in [*numbers, s.worst("kl")]),
                    f"{s.top1:.1%}",
                    f"{agreeing}/{decided}",
                )
                + ("  MISSED" if s.failures(t) else "")
            )
        bounds = [f"{x:.0e}" for x in (t.nmse, t.worst_nmse, t.max_abs)]
        lines.append(_row("at most", "", *bounds, "", f"{t.max_kl:.0e}", "", "all"))
        lines.append("error: the largest, as a fraction of the position's largest |logit|")
        lines.append(
            f"clear: where the first choice leads by more than {t.margin:g} standard deviations"
        )
        lines.append("")
        for s in self.scenarios:
            lines.extend(f"{s.name}: {note}" for note in s.notes)
        eased = [d.ease for s in self.scenarios for d in s.deviations if d.ease > 1]
        if eased:
            lines.append(
                f"ill-conditioned positions: {len(eased)}, where rounding the weights again moves "
                f"the reference itself, by up to {max(eased):.2g} times the usual NMSE"
            )
        if self.parameters is not None:
            p = self.parameters
            packed = p.compared - p.exact - len(p.faults)
            lines.append(
                f"parameters: {p.exact} equal the checkpoint's to the bit"
                + (f", {packed} packed within {p.worst_steps:.2f} steps" if packed else "")
                + (f", {len(p.faults)} DIFFER" if p.faults else "")
            )
        if self.quantization_loss is not None:
            loss = self.quantization_loss
            lines.append(
                f"quantisation loss against the original weights: KL {loss.mean('kl'):.3g} nats, "
                f"top-1 agreement {loss.top1:.1%} over {len(loss.deviations)} tokens of greedy text"
            )
        lines.extend(self.notes)
        failures = self.failures
        lines += [f"MISSED {failure}" for failure in failures]
        lines.append("verify: failed" if failures else "verify: passed")
        return "\n".join(lines)


def _row(name: str, positions: str, *cells: str) -> str:
    return f"{name:<16}{positions:>9}" + "".join(f"{cell:>9}" for cell in cells)


def _loss_json(loss: Scenario) -> dict[str, Any]:
    return {
        "positions": len(loss.deviations),
        "kl_mean": loss.mean("kl"),
        "kl_worst": loss.worst("kl"),
        "top1_agreement": loss.top1,
    }


class VerifiedEngine(Engine):
    """An engine with the exported functions that `Engine` itself does not call."""

    def from_embeddings(self, sequence: int, tokens: Sequence[int]) -> Float32:
        """Logits [vocab] after the last of `tokens`, at most a chunk, by embed and prefill/decode.

        The pair that runtimes without `prefill_tokens` use.
        """
        name = "decode" if len(tokens) == 1 else "prefill"
        x = self._embeddings([1, len(tokens)], tokens)
        out = self._forward(name, [sequence], [len(tokens)], x)
        return np.asarray(out.numpy(), np.float32).reshape(-1)

    def from_hidden(self, name: str, parts: Mapping[int, Sequence[int]]) -> Float32:
        """Logits [b, vocab] after each part, by `name`_to_last_hidden_states and get_logits."""
        lengths = [len(part) for part in parts.values()]
        tokens = [token for part in parts.values() for token in part]
        lead = [len(tokens), 1] if name == "batch_decode" else [1, len(tokens)]
        x = self._embeddings(lead, tokens)
        out = self._forward(f"{name}_to_last_hidden_states", list(parts), lengths, x)
        states = out._create_view([len(tokens), out.shape[-1]])
        at = self.library.tensor(np.cumsum(lengths).astype(np.int32) - 1)
        states = self.library.vm["batch_select_last_hidden_states"](states, at)
        logits = self.library.vm["get_logits"](states, self.params)
        return np.asarray(logits.numpy(), np.float32)

    def _embeddings(self, lead: list[int], tokens: Sequence[int]) -> Any:
        x = self.embed(tokens)
        return x._create_view([*lead, x.shape[-1]])


@dataclass(frozen=True)
class _Subject:
    """The library under test, and what its metadata and its directory say it is."""

    directory: Path
    library: Path
    engine: VerifiedEngine
    chat: ChatConfig
    model: Model
    scheme: QuantScheme
    attention: Attention
    limits: Limits

    @classmethod
    def open(cls, directory: Path, library: Path, decode_steps: int, thorough: bool) -> _Subject:
        """Raises InputError where library, parameters and configuration do not fit together."""
        chat = ChatConfig.read(directory)
        model = chat.model()
        scheme = chat.scheme(model)
        engine = VerifiedEngine.load(library, directory)
        meta = engine.library.metadata
        theirs, ours = (
            meta["mlc_compile"]["config_fingerprint"],
            config_fingerprint(model, scheme),
        )
        if theirs != ours:
            raise InputError(
                f"{library} and {chat.path} do not belong together (configuration {theirs} and "
                f"{ours})",
                hint="compile the library again for this directory",
            )
        sliding = meta["sliding_window_size"] > 0
        trained = model.config.max_position_embeddings
        attention = Attention(
            window=meta["sliding_window_size"] if sliding else None,
            sink=max(meta["attention_sink_size"], 0),
            context=trained if sliding else meta["context_window_size"],
        )
        affordable = int(MAX_WORK / num_parameters(model))
        limits = Limits(
            vocab=meta["active_vocab_size"] or model.config.vocab_size,
            context=None if sliding else meta["context_window_size"],
            chunk=meta["prefill_chunk_size"],
            batch=meta["max_batch_size"],
            window=attention.window,
            sink=attention.sink,
            decode_steps=decode_steps,
            longest=LONGEST_THOROUGH if thorough else min(max(affordable, SHORTEST), LONGEST),
        )
        return cls(directory, library, engine, chat, model, scheme, attention, limits)

    def clear(self) -> None:
        self.engine.clear()

    def greedy(self, reference: Reference) -> Greedy:
        """A text prompt where there is a tokenizer, else random tokens, with its continuation."""
        prompt = self._text_prompt() or self.limits.tokens("greedy", 7)
        room = min(self.limits.room - len(prompt), self.limits.decode_steps)
        if room < 2:
            return Greedy(prompt, ())
        return Greedy(prompt, tuple(reference.greedy(prompt, room)))

    def _text_prompt(self) -> Context:
        file = self.directory / "tokenizer.json"
        if not file.is_file():
            return ()
        from tokenizers import Tokenizer

        ids = Tokenizer.from_str(file.read_text(encoding="utf-8")).encode(TEXT_PROMPT).ids
        return tuple(token for token in ids if token < self.limits.vocab)


def verify(
    model_dir: Path,
    library: Path,
    reference: Path,
    *,
    decode_steps: int = 64,
    progress: Progress | None = None,
    engine: str = "auto",
    original: bool = False,
    thorough: bool = False,
    write_golden: Path | None = None,
) -> VerifyReport:
    """Compare `library`, with the parameters of `model_dir`, with a reference.

    Args:
        reference: a checkpoint, or a file that `write_golden` made.
        decode_steps: tokens that are decoded one by one, twice.
        engine: what runs the checkpoint: "transformers", "numpy" or "auto".
        original: also say how far the stored weights are from the checkpoint's (a second run of
            the reference); no threshold applies to it.
        thorough: run long scenarios too, such as a text of the whole context.
        write_golden: store the reference's logits in this file.

    Raises:
        InputError: parts that do not belong together, or a reference that cannot be read.
        EnvironmentLacksError: TVM's pair, or what the reference engine needs, is missing.
    """
    subject = _Subject.open(Path(model_dir), Path(library), decode_steps, thorough)
    if is_golden(Path(reference)):
        for name, given in (("--original", original), ("--write-golden", write_golden)):
            if given:
                raise InputError(f"{name} needs a checkpoint as reference, not {reference}")
        return _against_golden(subject, Path(reference), progress)
    return _against_checkpoint(
        subject, open_checkpoint(reference), progress, engine, original, write_golden
    )


def _against_golden(subject: _Subject, path: Path, progress: Progress | None) -> VerifyReport:
    golden = Golden.read(path)
    golden.check(
        subject.directory,
        subject.attention,
        rope_varies=subject.model.config.rope.depends_on_window,
        where=path,
    )
    notes = []
    limits = subject.limits
    if golden.decode_steps < limits.decode_steps:
        limits = dataclasses.replace(limits, decode_steps=golden.decode_steps)
        notes.append(f"{golden.decode_steps} decode steps, as many as are stored")
    report = _run(subject, limits, golden.greedy, golden.rows, golden.reference, notes, progress)
    return dataclasses.replace(report, reference=f"{path.name}, by {golden.reference}")


def _against_checkpoint(
    subject: _Subject,
    checkpoint: Checkpoint,
    progress: Progress | None,
    engine: str,
    original: bool,
    write_golden: Path | None,
) -> VerifyReport:
    model, where = subject.model, str(checkpoint.path)
    _check_same_model(subject, checkpoint)
    parameters = check_parameters(model, subject.scheme, subject.directory, checkpoint)
    stored = stored_weights(model, subject.scheme, subject.directory)
    reference, why = make_reference(
        checkpoint.config, model, stored, subject.attention, engine=engine, where=where
    )
    notes = [f"the reference is {reference.name}: {why}"] if why else []
    greedy = subject.greedy(reference)
    plan = plan_contexts(subject.limits, greedy)
    rows = reference_rows(reference, [c for some in plan.values() for c in some], progress)
    report = _run(subject, subject.limits, greedy, rows, reference.name, notes, progress)
    # How much of what is left is the context's own sensitivity; a golden file has it for every row.
    asked = set(rows) if write_golden is not None else _doubtful(report)
    routers = {spec.name for spec in model.parameters() if spec.role == "router"}
    samples = ROUTED_ROUGHENINGS if routers else ROUGHENINGS
    for seed in range(samples if asked else 0):
        roughen(stored, ROUNDING[report.model_dtype], seed, routers)
        reference.reload()
        for context, rough in reference_rows(reference, sorted(asked), progress).items():
            row = rows[context]
            noise = compare(row, rough.values, report.thresholds).nmse
            rows[context] = dataclasses.replace(row, noise=max(row.noise, noise))
    _ease(report, rows)
    if write_golden is not None:
        _write_golden(subject, report.reference, greedy, rows, write_golden)
    loss = None
    if original:
        del reference, stored  # a large model fits once
        other, _ = make_reference(
            checkpoint.config,
            model,
            checkpoint_weights(model, checkpoint),
            subject.attention,
            engine=engine,
            where=where,
        )
        loss = Scenario("original", "stored weights against the checkpoint's")
        for context, row in reference_rows(other, plan["greedy"], progress).items():
            loss.deviations.append(compare(row, rows[context].values, report.thresholds))
    return dataclasses.replace(report, parameters=parameters, quantization_loss=loss)


def _doubtful(report: VerifyReport) -> set[Context]:
    """Contexts whose finite deviation could make a scenario fail."""
    return {
        context
        for s in report.scenarios
        for context, d in zip(s.contexts, s.deviations, strict=True)
        if d.finite and d.doubtful(report.thresholds)
    }


def _ease(report: VerifyReport, rows: Rows) -> None:
    """Takes the rows' noise into account."""
    for s in report.scenarios:
        s.deviations = [
            dataclasses.replace(d, ease=report.thresholds.ease(rows[context].noise))
            for context, d in zip(s.contexts, s.deviations, strict=True)
        ]


def _run(
    subject: _Subject,
    limits: Limits,
    greedy: Greedy,
    rows: Rows,
    reference: str,
    notes: Sequence[str],
    progress: Progress | None,
) -> VerifyReport:
    dtype = subject.scheme.model_dtype
    thresholds = THRESHOLDS[dtype]
    scenarios = run_scenarios(
        subject.engine,
        limits,
        greedy,
        rows,
        thresholds,
        reset=subject.clear,
        progress=progress,
    )
    return VerifyReport(
        library=subject.library,
        model_dtype=dtype,
        reference=reference,
        thresholds=thresholds,
        scenarios=tuple(scenarios),
        parameters=None,
        quantization_loss=None,
        notes=tuple(notes),
        architecture=subject.model.identity(),
    )


def _check_same_model(subject: _Subject, checkpoint: Checkpoint) -> None:
    theirs = load_model(
        checkpoint.config, model_type=subject.model.arch.name, where=str(checkpoint.path)
    )
    if theirs.arch == subject.model.arch and theirs.config == subject.model.config:
        return
    mine, other = subject.model.config, theirs.config
    differ = [
        f"{f.name} is {getattr(other, f.name)!r} and {getattr(mine, f.name)!r}"
        for f in dataclasses.fields(mine)
        if f.compare and getattr(other, f.name) != getattr(mine, f.name)
    ]
    raise InputError(
        f"{checkpoint.path} is not the model that {subject.chat.path} describes: "
        f"{'; '.join(differ) or 'their biases or norms differ'}",
        hint="give the checkpoint that gen_config was run on",
    )


def _write_golden(
    subject: _Subject, reference: str, greedy: Greedy, rows: Rows, path: Path
) -> None:
    if not is_golden(path):
        raise InputError(f"--write-golden {path}: the name must end in .npz")
    schema_id, parameters = parameters_digest(subject.directory)
    Golden(
        reference=reference,
        schema_id=schema_id,
        parameters=parameters,
        attention=subject.attention,
        decode_steps=subject.limits.decode_steps,
        greedy=greedy,
        rows=shortened(rows),
    ).write(path)


def shortened(rows: Rows) -> Rows:
    """What a golden file keeps of these rows."""
    kept: dict[Context, Row] = {}
    before: Context = ()
    index = 0
    for context in sorted(rows):
        index = index + 1 if context[: len(before)] == before else 0
        before = context
        row = rows[context]
        top = kept_logits(len(row.values), index)
        short = row if top is None else Row.of(row.values, top)
        kept[context] = dataclasses.replace(short, noise=row.noise)
    return kept
