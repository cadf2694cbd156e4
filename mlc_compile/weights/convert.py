"""Checkpoint to parameter files: a plan from names and shapes alone, then one streaming pass.

- Everything that can be wrong is found before a weight is read: each parameter has its sources in
  the right shapes, each tensor of the checkpoint has a use, the output is free and fits the disk.
- The pass works in blocks of rows: read, rearrange (parts.py), narrow, pack, append. Memory stays
  at a few blocks per worker thread, plus one tensor of scales (in layout "KN" one packed tensor),
  whatever the model's size.
- Threads work on different blocks and blocks are written in order, so any number of them gives the
  same bytes.
- The result appears at once, manifest.json last (publish.py); other files of the output directory,
  such as mlc-chat-config.json, stay as they are.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from mlc_compile.errors import InputError
from mlc_compile.manifest import (
    MANIFEST,
    MODEL_MANIFEST,
    SHARD_FILE,
    Progress,
    build_manifest,
    hash_file,
    model_manifest,
    read_manifest,
)
from mlc_compile.models.params import ParamSpec
from mlc_compile.models.spec import Model
from mlc_compile.models.structure import TensorMatch, match_tensors, shown
from mlc_compile.quantization.group import narrow, quantize
from mlc_compile.quantization.policy import (
    StoredParam,
    is_quantized,
    stored_layout,
    stored_params,
)
from mlc_compile.quantization.scheme import QuantScheme, numpy_dtype
from mlc_compile.weights.checkpoint import Checkpoint
from mlc_compile.weights.parts import Part, parts_in
from mlc_compile.weights.publish import owned_files, staged
from mlc_compile.weights.tensor_cache import (
    TENSOR_CACHE,
    Shard,
    TensorCacheWriter,
    WrittenFile,
    plan_shards,
)

Array = npt.NDArray[Any]
T = TypeVar("T")
R = TypeVar("R")

_BLOCK_ELEMENTS = 1 << 20
_RELEASE_ELEMENTS = 16 << 20  # after so many, mapped source pages go back to the system
_DISK_MARGIN = 16 << 20  # indices, manifests and the file system's own needs
_NAMES_SHOWN = 5

# What other writers of the same format leave beside it; stale once the shards are replaced.
_FOREIGN_INDEX = ("tensor-cache-b16.json", "ndarray-cache.json", "ndarray-cache-b16.json")


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
            lines.append(f"ignored       {_listed(self.ignored)}")
        return "\n".join(lines)


@dataclass(frozen=True)
class ConversionReport:
    """What a conversion wrote."""

    plan: ConversionPlan
    directory: Path
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """JSON-ready data."""
        return {
            **self.plan.to_json(),
            "directory": str(self.directory),
            "seconds": round(self.seconds, 3),
        }

    def to_text(self) -> str:
        """The same for people."""
        rate = self.plan.source_elements / 1e6 / max(self.seconds, 1e-9)
        return (
            f"{self.plan.to_text()}\n"
            f"written to    {self.directory} in {self.seconds:.1f} s ({rate:.0f} M weights/s)"
        )


def plan_conversion(checkpoint: Checkpoint, model: Model, scheme: QuantScheme) -> ConversionPlan:
    """Matches the checkpoint's tensors with the model's parameters; reads no weight.

    Raises InputError for a missing, unused or misshapen tensor or one that holds no plain floating
    numbers, with the names and the likely cause.
    """
    match = match_tensors(model, {name: t.shape for name, t in checkpoint.tensors.items()})
    model = match.model
    if match.missing or match.unused:
        problems = [
            f"{len(names)} {kind} ({_listed(names)})"
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
        f"{checkpoint.path}: {_listed(wrong)}: shape {list(first.found)}, "
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


def _listed(names: Sequence[str]) -> str:
    return shown(names, _NAMES_SHOWN)


def convert_weight(
    checkpoint: Checkpoint,
    model: Model,
    scheme: QuantScheme,
    out_dir: Path,
    *,
    overwrite: bool = False,
    jobs: int = 2,
    progress: Progress | None = None,
    options: Mapping[str, Any] | None = None,
) -> ConversionReport:
    """Writes the parameter files, tensor-cache.json and both manifests into `out_dir`.

    overwrite: replaces a finished conversion there, at the end and only by a complete one.
    jobs: worker threads; does not change the result.
    progress: called with (parameter name, bytes written, bytes in all).
    options: JSON values to be recorded in manifest.json.

    Raises InputError for what `plan_conversion` refuses, for an output that exists (without
    `overwrite`), holds source files or cannot be written, for too little disk space, and for
    weights that are not finite or overflow the model dtype. Nothing is left behind then.
    """
    started = time.monotonic()
    plan = plan_conversion(checkpoint, model, scheme)
    out_dir = Path(out_dir)
    if out_dir.exists() and not out_dir.is_dir():
        raise InputError(f"{out_dir}: is a file", hint="name a directory for the output")
    _check_disk(out_dir, plan.total_bytes)
    with (
        staged(out_dir, MANIFEST, _is_ours) as staging,
        ThreadPoolExecutor(max(1, jobs), "convert") as pool,
    ):
        _check_output(checkpoint, out_dir, overwrite)
        _check_tied_copy(checkpoint, plan)
        sources = pool.submit(_hash_sources, checkpoint)
        with TensorCacheWriter(staging.new, plan.stored) as writer:
            _write_params(plan, checkpoint, writer, pool, max(1, jobs), progress)
            writer.finish(source_elements=plan.source_elements)
        package = _write_json(staging.new / MODEL_MANIFEST, model_manifest(plan.stored))
        manifest = build_manifest(
            plan.model,
            scheme,
            plan.stored,
            source_format=checkpoint.format,
            sources=sources.result(),
            source_elements=plan.source_elements,
            files=[*writer.files, package],
            tensor_sha256=writer.tensor_sha256,
            options=options or {},
        )
        _write_json(staging.new / MANIFEST, manifest)
        staging.publish()
    return ConversionReport(plan, out_dir, time.monotonic() - started)


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
            f"{out_dir}: holds parameters already ({_listed(present)})",
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


def _check_tied_copy(checkpoint: Checkpoint, plan: ConversionPlan) -> None:
    """A head that is stored although tied must equal the embedding; else one of them is wrong."""
    names = plan.model.names
    head, embedding = f"{names.lm_head}.weight", f"{names.embed}.weight"
    if head not in plan.ignored:
        return
    shape = checkpoint.tensors[embedding].shape
    same = checkpoint.tensors[head].shape == shape and all(
        np.array_equal(checkpoint.read(head, rows), checkpoint.read(embedding, rows))
        for rows in _row_blocks(shape)
    )
    checkpoint.release()
    if not same:
        raise InputError(
            f"{checkpoint.path}: {head} differs from {embedding}, but config.json says "
            "tie_word_embeddings: true",
            hint="set it to false to use the head, or remove the tensor",
        )


def _hash_sources(checkpoint: Checkpoint) -> list[WrittenFile]:
    return [hash_file(path) for path in sorted(checkpoint.source_files)]


@dataclass(frozen=True)
class _Block:
    """Some rows of one part of a parameter."""

    param: ParamPlan
    part: Part
    rows: slice


def _row_blocks(shape: tuple[int, ...]) -> Iterator[slice]:
    """The rows of a tensor in pieces of about `_BLOCK_ELEMENTS`."""
    step = max(1, _BLOCK_ELEMENTS // max(1, math.prod(shape[1:])))
    for start in range(0, shape[0], step):
        yield slice(start, min(shape[0], start + step))


def _blocks(plan: ConversionPlan, checkpoint: Checkpoint) -> Iterator[_Block]:
    for param in plan.params:
        shapes = {name: checkpoint.tensors[name].shape for name in param.spec.sources}
        for part in parts_in(param.spec, shapes):
            for rows in part.blocks(_BLOCK_ELEMENTS):
                yield _Block(param, part, rows)


def _convert_block(
    checkpoint: Checkpoint, scheme: QuantScheme, block: _Block
) -> tuple[_Block, tuple[Array, ...]]:
    """Reads and packs one block; the arrays go with `block.param.stored`, in layout "NK"."""
    weight, name = block.part.read(checkpoint, block.rows), block.part.source.name
    if is_quantized(block.param.spec, scheme):
        return block, quantize(weight, scheme, layout="NK", name=name)
    return block, (narrow(weight, scheme.model_dtype, name=name),)


def _write_params(
    plan: ConversionPlan,
    checkpoint: Checkpoint,
    writer: TensorCacheWriter,
    pool: ThreadPoolExecutor,
    jobs: int,
    progress: Progress | None,
) -> None:
    """Converts all blocks on `pool` and writes them in order."""
    done = unreleased = 0
    held: _Held | None = None
    work = partial(_convert_block, checkpoint, plan.scheme)
    for block, arrays in _in_order(pool, work, _blocks(plan, checkpoint), ahead=jobs + 1):
        if held is None:
            held = _Held(block.param, stored_layout(block.param.spec, plan.scheme))
        held.add(arrays, writer)
        done += sum(array.nbytes for array in arrays)
        if held.complete:
            held.flush(writer)
            held = None
        unreleased += block.part.touched(block.rows)
        if unreleased >= _RELEASE_ELEMENTS:
            checkpoint.release()
            unreleased = 0
        if progress is not None:
            progress(block.param.spec.name, done, plan.total_bytes)


class _Held:
    """The blocks of one parameter: rows go straight to the file, the rest waits for the last."""

    def __init__(self, param: ParamPlan, layout: str) -> None:
        self._rows = 0
        streamed = layout == "NK" or len(param.stored) == 1
        waiting = param.stored[1:] if streamed else param.stored
        self._stream = param.stored[0] if streamed else None
        # Blocks are [rows, x]; a "KN" tensor takes them as columns.
        self._axis = 0 if streamed else 1
        self._buffers = [(stored, _empty(stored)) for stored in waiting]
        self._num_rows = param.spec.num_rows

    @property
    def complete(self) -> bool:
        """Whether every row has come."""
        return self._rows == self._num_rows

    def add(self, arrays: tuple[Array, ...], writer: TensorCacheWriter) -> None:
        """The arrays of the next rows."""
        stop = self._rows + len(arrays[0])
        if self._stream is not None:
            writer.write(self._stream.name, arrays[0])
            arrays = arrays[1:]
        for (_, buffer), array in zip(self._buffers, arrays, strict=True):
            if self._axis == 0:
                buffer[self._rows : stop] = array
            else:
                buffer[:, self._rows : stop] = array.T
        self._rows = stop

    def flush(self, writer: TensorCacheWriter) -> None:
        """Writes what waited."""
        for stored, buffer in self._buffers:
            writer.write(stored.name, buffer)


def _empty(stored: StoredParam) -> Array:
    """A matrix for the tensor; experts stand below one another."""
    shape = (-1, stored.shape[-1]) if len(stored.shape) == 3 else stored.shape
    return np.empty(stored.shape, numpy_dtype(stored.dtype)).reshape(shape)


def _in_order(
    pool: ThreadPoolExecutor, work: Callable[[T], R], items: Iterable[T], *, ahead: int
) -> Iterator[R]:
    """`map(work, items)` on `pool`, with at most `ahead` items in work or waiting."""
    queue: deque[Future[R]] = deque()
    remaining = iter(items)
    try:
        while True:
            queue.extend(pool.submit(work, item) for item in islice(remaining, ahead - len(queue)))
            if not queue:
                return
            yield queue.popleft().result()
    finally:
        for future in queue:
            future.cancel()
