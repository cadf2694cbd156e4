"""What `quality` runs: converted directories and libraries, made where they are missing.

A model is given as a directory that convert_weight and gen_config wrote, or as a checkpoint, which
is converted to q0f32 in a temporary folder: its own weights, whatever they were stored as (a GGUF
file of another quantiser can be measured like this). With `--schemes` every conversion is made.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mlc_compile.chat_config import FILE_NAME, gen_config
from mlc_compile.compiler.build import compile_library
from mlc_compile.compiler.inputs import load_inputs
from mlc_compile.config import UNSET, resolve_compile_config
from mlc_compile.errors import InputError
from mlc_compile.manifest import MANIFEST, read_manifest
from mlc_compile.models.params import ParamSpec
from mlc_compile.models.spec import Model, num_parameters
from mlc_compile.quantization.policy import is_quantized, with_overrides
from mlc_compile.quantization.scheme import QuantScheme, get_scheme
from mlc_compile.runtime.calibrate import MAX_TOKENS, Importance, importance
from mlc_compile.runtime.formulas import Float32
from mlc_compile.runtime.reference import stored_weight
from mlc_compile.runtime.text_windows import Text
from mlc_compile.targets.profile import get_target
from mlc_compile.weights.checkpoint import Checkpoint, open_checkpoint
from mlc_compile.weights.convert import convert_weight
from mlc_compile.weights.parts import read_parameter
from mlc_compile.weights.tensor_cache import TENSOR_CACHE, TensorCache, open_tensor_cache

Progress = Callable[[str, int, int], None]
LoadModel = Callable[[Checkpoint], Model]

REFERENCE_SCHEME = "q0f32"
_SCALES = ("absmax", "signed", "mse")


@dataclass(frozen=True)
class Entry:
    """One item of `--schemes`: `q4f16_1+mse`, `q4f16_1+calibrate+lm_head=q8f16_1`.

    text: as it was written. scales: None is the converter's own rule. overrides: `PATTERN=SCHEME`
    separated by commas, "" for none.
    """

    text: str
    scheme: str
    scales: str | None = None
    calibrate: bool = False
    overrides: str = ""

    @property
    def folder(self) -> str:
        """A plain file name for its conversion."""
        kept = "".join(c if c.isalnum() or c in "._-+" else "_" for c in self.text)
        return kept.strip(".") or "_"


def parse_entries(text: str) -> list[Entry]:
    """The items of `--schemes`.

    Raises InputError for an unknown scheme or option, or an item that comes twice.
    """
    entries = [_parse_entry(item) for item in (part.strip() for part in text.split(",")) if item]
    if not entries:
        raise InputError("--schemes names no scheme", hint="as in --schemes q4f16_1,q8f16_1")
    for i, entry in enumerate(entries):
        if entry.folder in {other.folder for other in entries[:i]}:
            raise InputError(f"--schemes: {entry.text} is given twice")
    return entries


def _parse_entry(text: str) -> Entry:
    name, *options = text.split("+")
    get_scheme(name)
    scales, calibrate, overrides = None, False, []
    for option in options:
        if option in _SCALES:
            scales = option
        elif option == "calibrate":
            calibrate = True
        elif "=" in option:
            overrides.append(option)
        else:
            raise InputError(
                f"--schemes: {text} has the unknown option {option!r}",
                hint=f"options: {', '.join(_SCALES)}, calibrate, PATTERN=SCHEME",
            )
    return Entry(text, name, scales, calibrate, ",".join(overrides))


@dataclass(frozen=True)
class Subject:
    """A model ready to run.

    name: what reports call it. scheme: how `directory` is stored. nbytes, bits_per_weight: of its
    parameters; of a checkpoint, its tensors as they are stored there. label: its scheme with what
    was chosen beside it. manifest: that of `directory`. checkpoint: where the weights came from, if
    it was given as one.
    """

    name: str
    label: str
    directory: Path
    library: Path
    model: Model
    scheme: QuantScheme
    nbytes: int
    bits_per_weight: float
    manifest: Mapping[str, Any]
    checkpoint: Checkpoint | None = None

    @property
    def tokenizer(self) -> bytes:
        """tokenizer.json. Raises InputError where the directory has none."""
        path = self.directory / "tokenizer.json"
        if not path.is_file():
            raise InputError(f"there is no {path}", hint="make it with mlc_compile gen_config")
        return path.read_bytes()

    def weights(self) -> Callable[[ParamSpec], Float32]:
        """Reads one parameter in float32: the checkpoint's own, or the stored one dequantised."""
        if self.checkpoint is not None:
            checkpoint = self.checkpoint
            found = self.model.for_tensors(checkpoint.tensors).parameters()
            specs = {spec.name: spec for spec in found}
            return lambda spec: np.asarray(read_parameter(specs[spec.name], checkpoint), np.float32)
        cache: TensorCache = open_tensor_cache(self.directory)
        return lambda spec: stored_weight(spec, self.scheme, cache)


def is_converted(path: Path) -> bool:
    """Whether a path is a directory of parameters, and not a checkpoint."""
    return any((path / name).is_file() for name in (TENSOR_CACHE, MANIFEST, FILE_NAME))


@dataclass
class Builder:
    """Makes Subjects; what is missing goes below `folder`, a temporary one.

    target: what libraries are compiled for. window: tokens that one text needs. load: a
    checkpoint's model. allow_experimental: as in `compile`.
    """

    folder: Path
    target: str
    window: int
    load: LoadModel
    allow_experimental: bool = False
    progress: Progress | None = None

    def given(self, path: Path, library: Path | None) -> Subject:
        """A directory, or a checkpoint as q0f32. `library`: None compiles one.

        Raises:
            InputError: the directory is not complete, or a checkpoint comes with a library.
        """
        if is_converted(path):
            return self._subject(path, path.resolve().name, library=library)
        checkpoint = open_checkpoint(path)
        if library is not None:
            raise InputError(
                f"{path} is a checkpoint, and {library} cannot belong to it",
                hint="convert it and give the directory, or leave the library out",
            )
        model = self.load(checkpoint)
        directory = self.folder / f"checkpoint{len(list(self.folder.iterdir()))}"
        self._convert(checkpoint, model, get_scheme(REFERENCE_SCHEME), directory, {}, {})
        subject = self._subject(directory, path.resolve().name, checkpoint=checkpoint)
        nbytes = sum(tensor.nbytes for tensor in checkpoint.tensors.values())
        return Subject(
            **{
                **vars(subject),
                "label": f"checkpoint, {_stored_types(checkpoint)}",
                "nbytes": nbytes,
                "bits_per_weight": 8 * nbytes / num_parameters(model),
            }
        )

    def entry(
        self, entry: Entry, checkpoint: Checkpoint, out: Path, found: Importance | None
    ) -> Subject:
        """A conversion of `checkpoint` into `out`/<entry>, with its configuration.

        found: importance for `calibrate`.
        Raises InputError where the directory is not free.
        """
        model = self.load(checkpoint)
        scheme = get_scheme(entry.scheme)
        if entry.overrides:
            scheme = with_overrides(scheme, entry.overrides, model)
        chosen: dict[str, Any] = {}
        options: dict[str, Any] = {}
        if entry.scales is not None:
            chosen["scales"] = options["scales"] = entry.scales
        if entry.calibrate:
            assert found is not None
            chosen = {"scales": "mse", **chosen, "importance": found}
            options["calibration"] = found.options()
        directory = out / entry.folder
        self._convert(checkpoint, model, scheme, directory, chosen, options)
        return self._subject(directory, entry.text, label=entry.text)

    def calibration(
        self, checkpoint: Checkpoint, text: Text, max_tokens: int = MAX_TOKENS
    ) -> Importance:
        """Importance over `text`, as `convert_weight --calibrate` computes it."""
        model = self.load(checkpoint)
        return importance(checkpoint, model, text, max_tokens=max_tokens, progress=self.progress)

    def _convert(
        self,
        checkpoint: Checkpoint,
        model: Model,
        scheme: QuantScheme,
        directory: Path,
        chosen: Mapping[str, Any],
        options: Mapping[str, Any],
    ) -> None:
        self._say(f"convert {directory.name}")
        known = inspect.signature(convert_weight).parameters
        if missing := sorted(set(chosen) - set(known)):
            raise InputError(f"this version's converter has no {', '.join(missing)}")
        convert_weight(checkpoint, model, scheme, directory, options=dict(options), **chosen)
        config = resolve_compile_config(model.config)
        gen_config(checkpoint, model, scheme, config, directory, overwrite=True)

    def _subject(
        self,
        directory: Path,
        name: str,
        *,
        library: Path | None = None,
        label: str = "",
        checkpoint: Checkpoint | None = None,
    ) -> Subject:
        manifest = read_manifest(directory)
        profile, _ = get_target(self.target)
        inputs = load_inputs(directory, profile, {})
        if library is None:
            library = self._compile(directory, name)
        nbytes = sum(tensor["nbytes"] for tensor in manifest["tensors"])
        return Subject(
            name=name,
            label=label or _label(inputs.scheme, manifest),
            directory=directory,
            library=library,
            model=inputs.model,
            scheme=inputs.scheme,
            nbytes=nbytes,
            bits_per_weight=8 * nbytes / num_parameters(inputs.model),
            manifest=manifest,
            checkpoint=checkpoint,
        )

    def _compile(self, directory: Path, name: str) -> Path:
        """A library for one text at a time; windows shorter than the configuration's where that
        changes nothing but the cache."""
        made = self.folder / "libraries"
        made.mkdir(exist_ok=True)
        profile, _ = get_target(self.target)
        inputs = load_inputs(directory, profile, {})
        overrides = {"max_batch_size": 1}
        rope, sizes = inputs.model.config.rope, inputs.config
        room = -(-self.window // 16) * 16
        if (
            sizes.sliding_window_size == UNSET
            and not rope.depends_on_window
            and room < sizes.context_window_size
        ):
            overrides["context_window_size"] = room
            overrides["prefill_chunk_size"] = min(room, sizes.prefill_chunk_size)
        # Conversions that differ in their weights alone share their library.
        configuration = (directory / FILE_NAME).read_bytes()
        library = made / f"{hashlib.sha256(configuration).hexdigest()}.so"
        if library.exists():
            return library
        self._say(f"compile {name}")
        compile_library(
            directory,
            self.target,
            library,
            overrides=overrides,
            allow_experimental=self.allow_experimental,
        )
        return library

    def _say(self, step: str) -> None:
        if self.progress is not None:
            self.progress(step, 0, 1)


def _label(scheme: QuantScheme, manifest: Mapping[str, Any]) -> str:
    """`q4f16_1+mse+calibrate+lm_head=q8f16_1` from what a conversion recorded."""
    options = manifest.get("options") or {}
    parts = [scheme.name]
    if options.get("scales") not in (None, "auto"):
        parts.append(str(options["scales"]))
    if options.get("calibration"):
        parts.append("calibrate")
    parts += [f"{override.pattern}={override.scheme}" for override in scheme.overrides]
    return "+".join(parts)


def _stored_types(checkpoint: Checkpoint) -> str:
    """The types that hold most of a checkpoint's bytes, as `Q4_0 + Q6_K`."""
    sizes: dict[str, int] = {}
    for tensor in checkpoint.tensors.values():
        sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.nbytes
    total = sum(sizes.values())
    most = sorted((kind for kind in sizes if sizes[kind] > 0.01 * total), key=lambda k: -sizes[k])
    return " + ".join(most)


@dataclass(frozen=True)
class TensorError:
    """sqrt(sum (stored - original)^2 / sum original^2) of one packed parameter."""

    name: str
    relative_error: float


def tensor_errors(subject: Subject, reference: Subject) -> tuple[TensorError, ...]:
    """Every packed parameter's error, the largest first: as manifest.json states it, or computed
    from the reference's weights, one parameter at a time.

    A reference in float16 has rounded the checkpoint's weights already; that is below 5e-4.
    """
    packed = [s for s in subject.model.parameters() if is_quantized(s, subject.scheme)]
    recorded: dict[str, float] = {}
    for tensor in subject.manifest["tensors"]:
        if isinstance(tensor.get("relative_error"), int | float):
            base = tensor["name"].rpartition(".")[0] + ".weight"
            recorded[base] = float(tensor["relative_error"])
    found = {spec.name: recorded[spec.name] for spec in packed if spec.name in recorded}
    if len(found) < len(packed):
        mine, theirs = subject.weights(), reference.weights()
        found = {spec.name: _relative(mine(spec), theirs(spec)) for spec in packed}
    ranked = sorted(found.items(), key=lambda item: (-item[1], item[0]))
    return tuple(TensorError(name, error) for name, error in ranked)


def _relative(stored: Float32, original: Float32) -> float:
    error = weight = 0.0
    rows = (stored.reshape(-1, stored.shape[-1]), original.reshape(-1, original.shape[-1]))
    for start in range(0, len(rows[0]), 1024):
        a, b = (x[start : start + 1024].astype(np.float64) for x in rows)
        error += float(np.square(a - b).sum())
        weight += float(np.square(b).sum())
    return float(np.sqrt(error / weight)) if weight else float(error > 0)
