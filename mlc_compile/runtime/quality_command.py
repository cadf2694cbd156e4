"""One run of `quality`: what was asked for, made ready, measured, and its cards written."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from mlc_compile.errors import InputError
from mlc_compile.runtime.quality import WINDOW, check_reference, common_windows, quality
from mlc_compile.runtime.quality_build import (
    Builder,
    LoadModel,
    Subject,
    is_converted,
    parse_entries,
)
from mlc_compile.runtime.quality_report import QualityReport, write_card
from mlc_compile.runtime.text_windows import Text, read_text
from mlc_compile.weights.checkpoint import open_checkpoint

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Request:
    """The options of the command; see its help."""

    models: tuple[Path, ...]
    text: Path
    reference: Path | None = None
    schemes: str | None = None
    output: Path | None = None
    calibrate: Path | None = None
    libraries: tuple[Path, ...] = ()
    reference_library: Path | None = None
    target: str = "cpu"
    window: int = WINDOW
    max_tokens: int | None = None
    gates: Mapping[str, float] = field(default_factory=dict)
    card: bool = True
    allow_experimental: bool = False


def measure(
    request: Request, folder: Path, load: LoadModel, progress: Progress | None = None
) -> tuple[QualityReport, list[str]]:
    """The report, and notes for the user. folder: an empty temporary one. load: a checkpoint's
    model.

    Raises InputError for options that do not go together, and as `quality`.
    """
    _check(request)
    text = read_text(request.text)
    other = None if request.calibrate is None else read_text(request.calibrate)
    if other is not None and other.sha256 == text.sha256:
        raise InputError(
            f"--calibrate {request.calibrate} is the text that is scored",
            hint="calibrate on another text, or the figures say nothing about new ones",
        )
    builder = Builder(
        folder, request.target, request.window, load, request.allow_experimental, progress
    )
    path = request.reference or request.models[0]
    reference = builder.given(path, request.reference_library)
    check_reference(reference)
    # Before the long work of making the others.
    common_windows(reference, [], text, request.window, request.max_tokens)
    calibration = None
    if request.schemes is None:
        libraries = request.libraries or (None,) * len(request.models)
        subjects = [
            builder.given(model, library)
            for model, library in zip(request.models, libraries, strict=True)
        ]
    else:
        subjects, calibration = _conversions(request, builder, other)
    report = quality(
        reference,
        subjects,
        text,
        window=request.window,
        max_tokens=request.max_tokens,
        progress=progress,
    )
    report = replace(report, gates=request.gates, calibration=calibration)
    return report, _cards(request, report, subjects) if request.card else []


def _check(request: Request) -> None:
    if request.schemes is None:
        if request.reference is None:
            raise InputError(
                "there is no --reference",
                hint="give the checkpoint that was converted, or --schemes to convert it here",
            )
        for option, given in (("-o", request.output), ("--calibrate", request.calibrate)):
            if given is not None:
                raise InputError(f"{option} is for --schemes", hint="leave it out")
        if request.libraries and len(request.libraries) != len(request.models):
            raise InputError(
                f"{len(request.libraries)} libraries for {len(request.models)} directories",
                hint="give --lib once for each DIR, in their order, or not at all",
            )
        return
    if len(request.models) != 1:
        raise InputError(f"--schemes converts one MODEL, and {len(request.models)} are given")
    if is_converted(request.models[0]):
        raise InputError(
            f"{request.models[0]} is converted already", hint="--schemes needs the checkpoint"
        )
    if request.libraries:
        raise InputError("--schemes compiles its own libraries", hint="leave --lib out")
    entries = parse_entries(request.schemes)
    if any(entry.calibrate for entry in entries) != (request.calibrate is not None):
        raise InputError(
            "--calibrate TEXT and a scheme with +calibrate need each other",
            hint="as in --schemes q4f16_1,q4f16_1+calibrate --calibrate other.txt",
        )


def _conversions(
    request: Request, builder: Builder, other: Text | None
) -> tuple[list[Subject], Mapping[str, object] | None]:
    """Every entry of --schemes, converted, and what calibration read. other: its text."""
    assert request.schemes is not None
    checkpoint = open_checkpoint(request.models[0])
    out = request.output
    if out is None:
        out = builder.folder / "schemes"
    out.mkdir(parents=True, exist_ok=True)
    found = None if other is None else builder.calibration(checkpoint, other)
    entries = parse_entries(request.schemes)
    subjects = [builder.entry(entry, checkpoint, out, found) for entry in entries]
    return subjects, None if found is None else found.options()


def _cards(request: Request, report: QualityReport, subjects: list[Subject]) -> list[str]:
    """Writes them; what to tell the user."""
    notes = set()
    if request.schemes is None:
        for subject, model in zip(subjects, report.models, strict=True):
            if subject.checkpoint is None:
                notes.add(write_card(report.of(model), subject.directory))
    elif request.output is not None:
        notes.add(write_card(report, request.output))
        for subject, model in zip(subjects, report.models, strict=True):
            notes.add(write_card(report.of(model), subject.directory))
    return sorted(notes - {""})
