"""Checkpoint to parameter files: a plan from names and shapes alone, then independent work items.

- Everything that can be wrong is found before a weight is read (plan.py), and that the output is
  free and fits the disk.
- Blocks of rows are read, packed and written to their place in the shard files by a bounded pool
  (work.py, budget.py); a shard whose bytes are all there is hashed by another item, and so are the
  source files. Neither the number of workers nor the size of the blocks changes a byte.
- The files are made in a folder of their own with a journal: a run that was killed, interrupted or
  ran out of disk is taken up by the same command, which checks and keeps the finished shards.
- The result appears at once, manifest.json last (publish.py); other files of the output directory,
  such as mlc-chat-config.json, stay as they are.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from mlc_compile.errors import InputError, MlcError
from mlc_compile.manifest import (
    MANIFEST,
    MODEL_MANIFEST,
    SHARD_FILE,
    Progress,
    build_manifest,
    configuration_files,
    hash_file,
    manifest_bytes,
    model_manifest,
    read_manifest,
    with_configuration,
)
from mlc_compile.models.spec import Model
from mlc_compile.quantization.codec import Scales
from mlc_compile.quantization.compiled import Device
from mlc_compile.quantization.scheme import QuantScheme
from mlc_compile.weights.budget import cores, plan_budget
from mlc_compile.weights.checkpoint import Checkpoint
from mlc_compile.weights.files import UnreadableError
from mlc_compile.weights.journal import Journal, key_of
from mlc_compile.weights.on_demand import on_demand
from mlc_compile.weights.packer import lost, packer
from mlc_compile.weights.plan import ConversionPlan, ParamPlan, listed, plan_conversion
from mlc_compile.weights.publish import Staging, owned_files, staged
from mlc_compile.weights.run import Run
from mlc_compile.weights.sources import SourceFiles, SourceHash, fingerprint
from mlc_compile.weights.tensor_cache import (
    TENSOR_CACHE,
    TensorCacheWriter,
    WrittenFile,
)

if TYPE_CHECKING:
    from mlc_compile.weights.estimate import Estimate

__all__ = ["ConversionPlan", "ConversionReport", "ParamPlan", "convert_weight", "plan_conversion"]

Importance = Mapping[str, npt.NDArray[np.float32]]
"""By the name of our parameter, float32 [K]: how much the error of each input channel counts."""

_estimate: Callable[..., Estimate] = on_demand("mlc_compile.weights.estimate:estimate")

STAGING = ".mlc_compile.convert"
JOURNAL = "journal.jsonl"
_DISK_MARGIN = 16 << 20  # indices, manifests and the file system's own needs
_WORST_SHOWN = 10

# What other writers of the same format leave beside it; stale once the shards are replaced.
_FOREIGN_INDEX = ("tensor-cache-b16.json", "ndarray-cache.json", "ndarray-cache-b16.json")


@dataclass(frozen=True)
class ConversionReport:
    """What a conversion wrote.

    Attributes:
        kept: bytes of shards that an interrupted run had finished.
        relative_errors: sqrt(sum e^2 / sum w^2) of each parameter as it is stored.
        notes: what was lost, as the reader says it.
    """

    plan: ConversionPlan
    directory: Path
    seconds: float
    kept: int = 0
    relative_errors: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def worst(self) -> list[tuple[str, float]]:
        """The parameters that are furthest from the source, worst first."""
        order = sorted(self.relative_errors.items(), key=lambda item: (-item[1], item[0]))
        return [(name, error) for name, error in order[:_WORST_SHOWN] if error > 0]

    def to_json(self) -> dict[str, Any]:
        """JSON-ready data."""
        return {
            **self.plan.to_json(),
            "directory": str(self.directory),
            "seconds": round(self.seconds, 3),
            "resumed_bytes": self.kept,
            "worst_relative_errors": [
                {"name": name, "relative_error": error} for name, error in self.worst
            ],
            "notes": list(self.notes),
        }

    def to_text(self) -> str:
        """The same for people."""
        rate = self.plan.source_elements / 1e6 / max(self.seconds, 1e-9)
        lines = [
            self.plan.to_text(),
            f"written to    {self.directory} in {self.seconds:.1f} s ({rate:.0f} M weights/s)",
        ]
        if self.kept:
            lines.append(f"taken over    {self.kept / 1e6:.1f} MB of an interrupted run")
        if self.worst:
            shown = ", ".join(f"{name} {error:.4f}" for name, error in self.worst[:3])
            lines.append(f"worst error   {shown} (relative)")
        return "\n".join([*lines, *(f"note          {note}" for note in self.notes)])


def convert_weight(
    checkpoint: Checkpoint,
    model: Model,
    scheme: QuantScheme,
    out_dir: Path,
    *,
    overwrite: bool = False,
    jobs: int | None = None,
    device: Device | Literal["auto"] = "auto",
    max_ram: int | None = None,
    scales: Scales = "auto",
    importance: Importance | None = None,
    source_hash: SourceHash = "blake3",
    progress: Progress | None = None,
    options: Mapping[str, Any] | None = None,
) -> ConversionReport:
    """Writes the parameter files, tensor-cache.json and both manifests into `out_dir`.

    overwrite: replaces a finished conversion there, at the end and only by a complete one.
    jobs: work items at once, the number of cores by default; does not change the result.
    device: "numpy", "cpu", "cuda" or "auto": what packs; does not change the result.
    max_ram: what the resident memory of this process stays below, in bytes.
    scales: how the scale of a group is chosen, see quantization.codec; "mse" with `importance`
        weighs by input channel.
    source_hash: of the source files, for manifest.json.
    progress: called with (parameter name, bytes of the source done, bytes in all).
    options: JSON values to be recorded in manifest.json.

    Raises InputError for what `plan_conversion` refuses, for an output that exists (without
    `overwrite`), holds source files or cannot be written, for too little disk space or `max_ram`,
    for weights that are not finite or overflow the model dtype, and for a source that changes
    meanwhile. Nothing is left behind then, unless the disk failed or filled up: that, like any
    other interruption, leaves a hidden folder that the next run with the same arguments goes on
    from.
    """
    started = time.monotonic()
    plan = plan_conversion(checkpoint, model, scheme)
    sources = SourceFiles(checkpoint.sources, source_hash)
    key = fingerprint(plan, checkpoint, sources, scales, importance, options or {})
    out_dir = Path(out_dir)
    if out_dir.exists() and not out_dir.is_dir():
        raise InputError(f"{out_dir}: is a file", hint="name a directory for the output")
    with staged(out_dir, MANIFEST, _is_ours, folder=STAGING) as staging:
        _check_output(checkpoint, out_dir, overwrite)
        if key_of(staging.root / JOURNAL) != key:
            staging.clear()
            staging.keep = False
        _check_disk(out_dir, plan.total_bytes - _taken(staging.new))
        jobs = cores() if jobs is None else max(1, jobs)
        packing = packer(plan, checkpoint, device, jobs, scales, importance, max_ram)
        compiled = packing.hasher is not None
        budget = plan_budget(plan, checkpoint, jobs, max_ram, compiled=compiled)
        try:
            staging.keep = True
            with Journal(staging.root / JOURNAL, key) as journal:
                run = Run(plan, checkpoint, staging.new, journal, sources, packing, budget)
                run.work(progress)
            sources.check_unchanged()
            errors = run.relative_errors
            _write_documents(run, staging, checkpoint, options or {}, errors)
        except MlcError as error:
            # Bad data leaves nothing; a disk or a network that fails is an interruption.
            staging.keep = isinstance(error, UnreadableError)
            raise
        staging.publish()
    seconds = time.monotonic() - started
    return ConversionReport(plan, out_dir, seconds, run.kept, errors, lost(plan, checkpoint))


def estimate_conversion(
    checkpoint: Checkpoint,
    model: Model,
    scheme: QuantScheme,
    *,
    jobs: int | None = None,
    device: Device | Literal["auto"] = "auto",
    max_ram: int | None = None,
    scales: Scales = "auto",
    source_hash: SourceHash = "blake3",
) -> Estimate:
    """What `convert_weight` would do: exact sizes, memory, and a time by a sample of the work.

    Raises InputError for what `convert_weight` refuses before it writes.
    """
    plan = plan_conversion(checkpoint, model, scheme)
    jobs = cores() if jobs is None else max(1, jobs)
    packing = packer(plan, checkpoint, device, jobs, scales, max_ram=max_ram)
    compiled = packing.hasher is not None
    budget = plan_budget(plan, checkpoint, jobs, max_ram, compiled=compiled)
    return _estimate(plan, checkpoint, packing, budget, source_hash=source_hash)


def _write_documents(
    run: Run,
    staging: Staging,
    checkpoint: Checkpoint,
    options: Mapping[str, Any],
    errors: Mapping[str, float],
) -> None:
    """tensor-cache.json and both manifests."""
    plan, sealed = run.plan, run.sealed
    with TensorCacheWriter(staging.new, plan.stored) as writer:
        files = writer.finish(sealed, source_elements=plan.source_elements)
    package = _write_json(staging.new / MODEL_MANIFEST, model_manifest(plan.stored))
    manifest = build_manifest(
        plan.model,
        plan.scheme,
        plan.stored,
        source_format=checkpoint.format,
        sources=run.sources.listed,
        source_elements=plan.source_elements,
        files=[*files, package],
        tensor_sha256={k: v for one in sealed for k, v in one.tensor_sha256.items()},
        options=options,
        relative_errors={param.stored[0].name: errors[param.spec.name] for param in plan.params},
        notes=lost(plan, checkpoint),
    )
    # gen_config may have been first.
    manifest = with_configuration(manifest, configuration_files(staging.directory))
    (staging.new / MANIFEST).write_bytes(manifest_bytes(manifest))


def _taken(directory: Path) -> int:
    """Bytes on the disk that the files of a directory take already."""
    return sum(
        min(status.st_size, status.st_blocks * 512 if hasattr(status, "st_blocks") else 0)
        for status in (path.stat() for path in directory.iterdir())
    )


def _write_json(path: Path, document: Mapping[str, Any]) -> WrittenFile:
    path.write_text(
        json.dumps(document, indent=2, ensure_ascii=False) + "\n", "utf-8", newline="\n"
    )
    return hash_file(path)


def _is_ours(name: str) -> bool:
    """Whether a conversion owns the file `name` of its output directory."""
    ours = (TENSOR_CACHE, MANIFEST, MODEL_MANIFEST, *_FOREIGN_INDEX)
    return name in ours or SHARD_FILE.fullmatch(name) is not None


def _check_output(checkpoint: Checkpoint, out_dir: Path, overwrite: bool) -> None:
    present = owned_files(out_dir, _is_ours)
    sources = {os.path.realpath(path) for path in checkpoint.source_files}
    for name in present:
        if os.path.realpath(out_dir / name) in sources:
            raise InputError(
                f"{out_dir}: {name} is a source file and would be replaced",
                hint="choose another output directory",
            )
    if present and not overwrite:
        raise InputError(
            f"{out_dir}: holds parameters already ({listed(present)})",
            hint="choose another directory, or replace them with --overwrite",
        )
    if MANIFEST in present:
        try:
            read_manifest(out_dir)
        except InputError as error:
            raise InputError(
                f"{out_dir}: will not replace a {MANIFEST} that is not ours ({error.message})",
                hint="move it away or choose another directory",
            ) from error


def _check_disk(out_dir: Path, needed: int) -> None:
    existing = next(
        (path for path in (out_dir, *out_dir.absolute().parents) if path.exists()), None
    )
    if existing is None:
        return
    free = shutil.disk_usage(existing).free
    needed += _DISK_MARGIN
    if free < needed:
        raise InputError(
            f"{out_dir}: needs {needed / 1e6:.0f} MB, {free / 1e6:.0f} MB are free",
            hint="free some space or choose another output directory",
        )
