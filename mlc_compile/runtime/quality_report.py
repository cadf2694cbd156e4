"""The quality report: as a table, as JSON, as a card (`quality.md`, `.json`, `.png`).

docs/quality.md has the meaning of each number and of each JSON field.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mlc_compile.errors import EnvironmentLacksError, InputError
from mlc_compile.runtime.quality_stats import (
    PERCENTILES,
    Estimate,
    Figures,
    finite,
    missed_gates,
)

SCHEMA = "mlc-compile.quality"
FORMAT_VERSION = 1
CARD, CARD_JSON, CARD_PLOT = "quality.md", "quality.json", "quality.png"
NO_PLOT = "the plot was left out: matplotlib is not installed (pip install 'mlc-compile[plot]')"
_WORST = 10


@dataclass(frozen=True)
class ReferenceQuality:
    """The reference on the text. seconds: in its library, over all windows."""

    name: str
    label: str
    perplexity: Estimate
    nll: Estimate
    nbytes: int
    bits_per_weight: float
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """JSON-ready data."""
        return {
            "name": self.name,
            "quantization": self.label,
            "perplexity": finite(vars(self.perplexity)),
            "nll": finite(vars(self.nll)),
            "parameter_bytes": self.nbytes,
            "bits_per_weight": round(self.bits_per_weight, 6),
            "seconds": round(self.seconds, 3),
        }


@dataclass(frozen=True)
class ModelQuality:
    """One candidate. tensors: (parameter, relative dequantisation error), the worst first."""

    name: str
    label: str
    figures: Figures
    nbytes: int
    bits_per_weight: float
    seconds: float
    tensors: tuple[tuple[str, float], ...]

    def layers(self) -> list[tuple[str, float]]:
        """(layer, its worst tensor's error), the worst first; what is in no layer by itself."""
        worst: dict[str, float] = {}
        for name, error in self.tensors:
            parts = name.removeprefix("model.").split(".")
            layer = ".".join(parts[:2]) if parts[0] == "layers" else parts[0]
            worst[layer] = max(worst.get(layer, 0.0), error)
        return sorted(worst.items(), key=lambda item: (-item[1], item[0]))

    def to_json(self) -> dict[str, Any]:
        """JSON-ready data."""
        figures = self.figures.to_json()
        figures["curve"] = dict(zip(map(str, PERCENTILES), figures["curve"], strict=True))
        return {
            "name": self.name,
            "quantization": self.label,
            **figures,
            "parameter_bytes": self.nbytes,
            "bits_per_weight": round(self.bits_per_weight, 6),
            "seconds": round(self.seconds, 3),
            "tensors": [{"name": n, "relative_error": finite(e)} for n, e in self.tensors],
            "layers": [{"name": n, "worst_relative_error": finite(e)} for n, e in self.layers()],
        }

    def cells(self) -> list[str]:
        """One row of the table, in the order of COLUMNS."""
        f = self.figures
        return [
            self.label if self.name == self.label else f"{self.name} ({self.label})",
            _estimate(f.perplexity, 3),
            f"{f.ln_ratio.value:+.5f} ± {f.ln_ratio.error:.5f}",
            _estimate(f.kld, 5),
            *(f"{x:.5f}" for x in (f.kld_median, f.kld_p90)),
            *(f"{x:.4f}" for x in (f.kld_p99, f.kld_p999, f.kld_max)),
            f"{100 * f.top1.value:.2f} ± {100 * f.top1.error:.2f} %",
            f"{100 * f.rms_delta.value:.3f} %",
            f"{self.bits_per_weight:.3f}",
            f"{self.nbytes / 1e6:.2f}",
            f"{self.seconds:.1f}",
        ]


COLUMNS = (
    "model",
    "perplexity",
    "ln ratio",
    "KL mean",
    "median",
    "p90",
    "p99",
    "p99.9",
    "max",
    "same top-1",
    "RMS dp",
    "bits/w",
    "MB",
    "s",
)


def _estimate(x: Estimate, digits: int) -> str:
    return f"{x.value:.{digits}f} ± {x.error:.{digits}f}"


@dataclass(frozen=True)
class QualityReport:
    """What was measured, on what.

    first_scored: place in a window of the first token that is predicted. scored: tokens in all.
    prefix: what each window begins with. gates, failures: limits and what missed them.
    """

    text: str
    text_sha256: str
    text_bytes: int
    text_tokens: int
    window: int
    windows: int
    first_scored: int
    scored: int
    prefix: tuple[int, ...]
    reference: ReferenceQuality
    models: tuple[ModelQuality, ...]
    machine: Mapping[str, Any]
    versions: Mapping[str, str]
    calibration: Mapping[str, Any] | None = None
    gates: Mapping[str, float] = field(default_factory=dict)

    @property
    def failures(self) -> list[str]:
        """Each gate that a model missed, as a sentence."""
        return [
            f"{model.name}: {line}"
            for model in self.models
            for line in missed_gates(model.figures, self.gates)
        ]

    def of(self, model: ModelQuality) -> QualityReport:
        """The report of one of its models alone."""
        return replace(self, models=(model,))

    def to_json(self) -> dict[str, Any]:
        """JSON-ready data; docs/quality.md describes it."""
        return {
            "schema": SCHEMA,
            "format_version": FORMAT_VERSION,
            "text": {
                "name": self.text,
                "sha256": self.text_sha256,
                "nbytes": self.text_bytes,
                "tokens": self.text_tokens,
            },
            "windows": {
                "size": self.window,
                "count": self.windows,
                "first_scored": self.first_scored,
                "scored": self.scored,
                "prefix": list(self.prefix),
            },
            "calibration": None if self.calibration is None else dict(self.calibration),
            "reference": self.reference.to_json(),
            "models": [model.to_json() for model in self.models],
            "gates": dict(self.gates),
            "failures": self.failures,
            "machine": dict(self.machine),
            "versions": dict(self.versions),
        }

    def facts(self) -> list[tuple[str, str]]:
        """(what, value) about text and reference."""
        r = self.reference
        kept = (
            f"every window begins with the tokens {list(self.prefix)}"
            if self.prefix
            else "nothing is put before a window"
        )
        rows = [
            (
                "reference",
                f"{r.name} ({r.label}): perplexity {_estimate(r.perplexity, 3)}, "
                f"{r.bits_per_weight:.3f} bits per weight, {r.nbytes / 1e6:.2f} MB, "
                f"{r.seconds:.1f} s",
            ),
            (
                "text",
                f"{self.text} (SHA-256 {self.text_sha256[:12]}…): {self.windows} windows of "
                f"{self.window} tokens, {self.scored} tokens scored "
                f"(places {self.first_scored} to {self.window - 1}); {kept}",
            ),
        ]
        if self.calibration is not None:
            c = self.calibration
            name, digest = c.get("text"), str(c.get("sha256"))[:12]
            rows.append(("calibration", f"{name} (SHA-256 {digest}…), {c.get('tokens')} tokens"))
        return rows

    def to_text(self) -> str:
        """The table for a terminal."""
        lines = [f"{name:<11}  {value}" for name, value in self.facts()]
        table = [list(COLUMNS), *(model.cells() for model in self.models)]
        widths = [max(len(row[i]) for row in table) for i in range(len(COLUMNS))]
        lines.append("")
        for row in table:
            first, *rest = (cell for cell in row)
            cells = [first.ljust(widths[0])]
            cells += [cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True)]
            lines.append("  ".join(cells))
        if self.gates:
            lines += ["", *(f"missed  {line}" for line in self.failures or ["no gate"])]
        return "\n".join(lines)

    def to_markdown(self) -> str:
        """The card: facts, table, worst tensors."""
        lines = ["# Quality", ""]
        lines += [f"- {name}: {value}" for name, value in self.facts()]
        versions = ", ".join(f"{name} {found}" for name, found in self.versions.items())
        lines += [f"- made with: {versions}", "", *markdown_table(self.models), ""]
        lines += [
            "Perplexity, ln of its ratio to the reference's, KL divergence from the reference in "
            "nats per token, how often both rank the same token first, and the root mean square "
            "of the difference in the text's token's probability. ± is one standard error.",
        ]
        for model in self.models:
            if not model.tensors:
                continue
            lines += ["", f"## Worst tensors of {model.name}", ""]
            lines += ["| parameter | relative error |", "| --- | --- |"]
            lines += [f"| {name} | {error:.5f} |" for name, error in model.tensors[:_WORST]]
        if self.gates:
            limits = ", ".join(f"{name}={limit:g}" for name, limit in self.gates.items())
            lines += ["", f"Gates: {limits}. " + ("; ".join(self.failures) or "All kept.")]
        return "\n".join(lines) + "\n"


def markdown_table(models: Sequence[ModelQuality]) -> list[str]:
    """The rows of a table of models."""
    lines = [f"| {' | '.join(COLUMNS)} |", "|" + " --- |" * len(COLUMNS)]
    return lines + [f"| {' | '.join(model.cells())} |" for model in models]


def write_card(report: QualityReport, directory: Path) -> str:
    """Write quality.md, quality.json and quality.png; each file appears whole or not at all.

    Returns a note where the plot was left out, or "".
    Raises InputError when the directory cannot be written.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        _write(directory / CARD, report.to_markdown().encode())
        document = json.dumps(report.to_json(), indent=2, ensure_ascii=False, allow_nan=False)
        _write(directory / CARD_JSON, document.encode() + b"\n")
        try:
            from mlc_compile.runtime.quality_plot import draw

            _write(directory / CARD_PLOT, draw(report))
        except EnvironmentLacksError:
            (directory / CARD_PLOT).unlink(missing_ok=True)  # an older one would be believed
            return NO_PLOT
    except OSError as error:
        raise InputError(
            f"{directory}: the quality card cannot be written: {error.strerror}",
            hint="--no-card leaves it out",
        ) from error
    return ""


def _write(path: Path, data: bytes) -> None:
    number, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(number, "wb") as file:
            file.write(data)
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
