"""PEFT LoRA adapters, merged into a checkpoint's weights as their rows are read.

- W + scale * (B @ A), with scale = lora_alpha / r, or lora_alpha / sqrt(r) for use_rslora. DoRA
  rescales the rows of that to the lengths it learned.
- In float32, the sum over the rank one rank after another and no library between: the same bytes
  whatever rows are asked for together, on every machine.
- Every key of adapter_config.json is read, known to change no weight, or refused by its value;
  every tensor of the adapter has its place in the checkpoint, in the right shape, or is an error.

Sources: PEFT's documentation of its checkpoint format, `Linear.get_delta_weight`,
`Embedding.get_delta_weight` and `DoraLinearVariant.merge_safe` of peft 0.21.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

from mlc_compile.config import ConfigReader, read_json_strict
from mlc_compile.errors import InputError
from mlc_compile.weights.files import Location
from mlc_compile.weights.on_demand import on_demand
from mlc_compile.weights.reader import (
    Array,
    Packed,
    PackedInfo,
    Rows,
    TensorInfo,
    TensorReader,
    row_range,
)
from mlc_compile.weights.shards import WeightsFile
from mlc_compile.weights.st import SafetensorsFile

Float32 = npt.NDArray[np.float32]

_open_torch: Callable[[Location], WeightsFile] = on_demand(
    "mlc_compile.weights.torch_file:TorchFile"
)

CONFIG, WEIGHTS, TORCH_WEIGHTS = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "adapter_model.bin",
)

_MERGE = "merge it with PEFT (merge_and_unload) and convert the result"
_PREFIX = "base_model.model."
_TILE_ELEMENTS = 1 << 16  # of float32: a tile and its product stay in the second-level cache

# Initialisations after which the base weights are still those of the checkpoint.
_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")

# Key -> the values with which PEFT does what is done here.
_ONLY: Mapping[str, tuple[object, ...]] = MappingProxyType(
    {
        "peft_type": ("LORA",),
        "bias": ("none",),
        "init_lora_weights": _PLAIN_STARTS,
        "lora_bias": (False, None),
        "use_qalora": (False, None),
        "loftq_config": ({}, None),
        **dict.fromkeys(
            (
                "alora_invocation_tokens",
                "arrow_config",
                "corda_config",
                "kasa_config",
                "layer_replication",
                "lora_ga_config",
                "megatron_config",
                "monteclora_config",
                "target_parameters",
                "trainable_token_indices",
                "use_bdlora",
                "velora_config",
            ),
            (None,),
        ),
    }
)
# What says how it was trained or which modules were chosen, as the tensors' names do.
_IGNORABLE = (
    "auto_mapping",
    "base_model_name_or_path",
    "eva_config",
    "exclude_modules",
    "inference_mode",
    "layers_pattern",
    "layers_to_transform",
    "lora_dropout",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "target_modules",
    "task_type",
)
_EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "embed_in")
_HEADS = ("lm_head.weight", "embed_out.weight")

# Patterns are matched by `re`: with few repetitions, none of them of a group, it is quick.
_SAFE_PATTERN = re.compile(r"[\w.\\^$|()\[\]?:-]*(?:[*+][\w.\\^$|()\[\]?:-]*){0,3}")
_REPEATED = re.compile(r"[)*+?][*+?]")


@dataclass(frozen=True)
class _Merged:
    """What is added to a tensor: scale * left @ right, both found in the adapter's file.

    Attributes:
        down, up: the tensors A [r, in] and B [out, r].
        transposed: the checkpoint's tensor is [in, out] (an embedding, or Conv1D).
        magnitude: of DoRA, [out].
    """

    down: str
    up: str
    scale: float
    transposed: bool
    magnitude: str | None


def merge(reader: TensorReader, adapters: Sequence[Location]) -> TensorReader:
    """The reader with each adapter merged, in order. InputError for one that does not fit."""
    for adapter in adapters:
        reader = LoraReader(reader, adapter)
    return reader


class LoraReader:
    """A checkpoint's tensors with one adapter merged. Merged ones are float32."""

    def __init__(self, reader: TensorReader, adapter: Location) -> None:
        """Raises InputError for an adapter that is damaged, not supported, or of another model."""
        if not (adapter / CONFIG).is_file():
            raise InputError(
                f"{adapter} has no {CONFIG}", hint="give the directory of a PEFT adapter"
            )
        self._where = str(adapter)
        self._base = reader
        self._file = _open_weights(adapter)
        self._config = _Config(adapter / CONFIG)
        self._merged: dict[str, _Merged] = {}
        self._replaced: dict[str, str] = {}
        self._assign()
        self._config.check_used(self._replaced)
        self._check_tied()
        self.files: tuple[Location, ...] = (*reader.files, adapter / CONFIG, self._file.path)
        self.notes: tuple[str, ...] = reader.notes
        changed = {*self._merged, *self._replaced}
        self.packed: Mapping[str, PackedInfo] = MappingProxyType(
            {name: info for name, info in reader.packed.items() if name not in changed}
        )
        self.tensors: Mapping[str, TensorInfo] = MappingProxyType(
            {name: self._info(info) for name, info in reader.tensors.items()}
        )

    def read(self, name: str, rows: slice | None = None) -> Array:
        """A tensor or some of its rows; merged ones in float32."""
        if name in self._replaced:
            found = self._file.read(self._replaced[name], rows)
        else:
            found = self._base.read(name, rows)
        if name not in self._merged:
            return found
        start, stop = row_range(self.tensors[name], rows)
        made = _added(found, self._factors(name, start, stop), self._merged[name].scale)
        magnitude = self._merged[name].magnitude
        if magnitude is not None:
            squares = np.square(made, dtype=np.float64)
            length = np.sqrt(np.sum(squares, axis=-1)).astype(np.float32)
            learned = self._file.read(magnitude).reshape(-1)[start:stop].astype(np.float32)
            with np.errstate(divide="ignore", invalid="ignore"):  # a zero row is the encoder's
                made *= (learned / length)[:, None]
        made.flags.writeable = False
        return made

    def read_packed(self, name: str, rows: Rows = None) -> Packed:
        if name not in self.packed:
            raise ValueError(f"{name} is not packed")
        return self._base.read_packed(name, rows)

    def release(self) -> None:
        self._base.release()
        self._file.release()

    def _factors(self, name: str, start: int, stop: int) -> tuple[Float32, Float32]:
        """left [rows, r] and right [r, columns]."""
        merged = self._merged[name]
        if merged.transposed:
            left = self._file.read(merged.down)[:, start:stop].T
            right = self._file.read(merged.up).T
        else:
            left = self._file.read(merged.up, slice(start, stop))
            right = self._file.read(merged.down)
        return left.astype(np.float32), np.ascontiguousarray(right, np.float32)

    def _info(self, info: TensorInfo) -> TensorInfo:
        if info.name in self._replaced:
            info = replace(self._file.tensors[self._replaced[info.name]], name=info.name)
        return replace(info, dtype="float32") if info.name in self._merged else info

    # --- which tensor of the adapter goes where

    def _assign(self) -> None:
        modules: dict[str, dict[str, str]] = {}
        for stored in self._file.tensors:
            module, part = self._parse(stored)
            if part in modules.setdefault(module, {}):
                raise self._error(f"{stored} is there twice, under two spellings")
            modules[module][part] = stored
        for module, parts in modules.items():
            for part in ("weight", "bias", "base"):
                if part in parts:
                    self._replace(module, part, parts.pop(part))
            if parts:
                self._merge(module, parts)

    def _parse(self, stored: str) -> tuple[str, str]:
        """A tensor's module, and which part it is of: A, B, magnitude, weight, bias.

        Or "base", the weight that A and B are added to: PEFT saves it with adapted embeddings.
        """
        name = stored.removeprefix(_PREFIX)
        found = re.fullmatch(
            r"(.+)\.(?:lora_(?:embedding_)?([AB])|lora_(magnitude)_vector)(\.weight)?", name
        )
        if found:
            embedding = ".lora_embedding_" in name
            return found[1], f"{found[2] or found[3]}{' of an embedding' if embedding else ''}"
        module, _, part = name.replace(".modules_to_save.", ".").rpartition(".")
        if module.endswith(".base_layer") and part == "weight":
            return module.removesuffix(".base_layer"), "base"
        if not name.startswith("lora_") and ".lora_" not in name and part in ("weight", "bias"):
            return module, part
        raise self._error(f"{stored} is not understood", hint=_MERGE)

    def _replace(self, module: str, part: str, stored: str) -> None:
        info = self._base_tensor(f"{module}.{'bias' if part == 'bias' else 'weight'}", stored)
        if info.name in self._replaced:
            raise self._error(f"{stored} replaces {info.name}, as {self._replaced[info.name]} does")
        shape = self._file.tensors[stored].shape
        if shape != info.shape:
            raise self._misshapen(stored, shape, info.shape)
        self._replaced[info.name] = stored

    def _merge(self, module: str, parts: Mapping[str, str]) -> None:
        first = next(iter(parts.values()))
        embedding = {"A of an embedding", "B of an embedding"}
        known = ({"A", "B"}, {"A", "B", "magnitude"}, embedding)
        if parts.keys() not in known:
            raise self._error(f"{first} has not both of its parts A and B", hint="save it again")
        dora = "magnitude" in parts
        if dora != self._config.use_dora:
            raise self._error(f"use_dora is {self._config.use_dora}, {first} says otherwise")
        info = self._base_tensor(f"{module}.weight", first)
        if info.name in self._merged:
            raise self._error(f"{first} changes {info.name}, as {self._merged[info.name].up} does")
        if info.dtype.startswith(("int", "uint", "bool", "float8")):
            raise self._error(f"{info.name} holds {info.dtype}, to which nothing can be added")
        transposed = parts.keys() == embedding or self._config.fan_in_fan_out
        if dora and transposed:
            raise self._error(f"{first}: DoRA is merged for linear layers only", hint=_MERGE)
        if len(info.shape) != 2:
            raise self._misshapen(info.name, info.shape, "a matrix")
        outputs, inputs = info.shape[::-1] if transposed else info.shape
        rank, scale = self._config.rank_and_scale(module)
        expected = {"A": (rank, inputs), "B": (outputs, rank), "m": (outputs,)}
        for part, stored in parts.items():
            shape = self._file.tensors[stored].shape
            if part == "magnitude":
                shape = tuple(size for size in shape if size != 1) or (1,)
            if shape != expected[part[0]]:
                raise self._misshapen(stored, shape, expected[part[0]])
        down, up = (stored for part, stored in sorted(parts.items()) if part[0] in "AB")
        self._merged[info.name] = _Merged(down, up, scale, transposed, parts.get("magnitude"))

    def _base_tensor(self, name: str, stored: str) -> TensorInfo:
        """The checkpoint's tensor; its names may lack the first component (`transformer.`)."""
        for spelling in (name, name.partition(".")[2]):
            found = self._base.tensors.get(spelling)
            if found is not None:
                return found
        hint = "the adapter belongs to another model"
        if name.endswith(_HEADS):
            hint = f"the checkpoint's head is tied to its embedding; {_MERGE}"
        raise self._error(f"{stored}: the checkpoint has no tensor {name}", hint=hint)

    def _check_tied(self) -> None:
        """Refuses an embedding replaced where the head is tied to it: PEFT unties them."""
        tied = not any(name.endswith(_HEADS) for name in self._base.tensors)
        for name in self._replaced.keys() - self._merged.keys():
            if tied and name.split(".")[-2] in _EMBEDDINGS and not self._config.keeps_ties:
                raise self._error(
                    f"{name} is replaced and the head, which is tied to it, is not", hint=_MERGE
                )

    def _misshapen(self, name: str, found: object, expected: object) -> InputError:
        shown = [list(x) if isinstance(x, tuple) else x for x in (found, expected)]
        return self._error(
            f"{name} has the shape {shown[0]}, expected is {shown[1]}",
            hint="the adapter belongs to another model, or its config to another adapter",
        )

    def _error(self, problem: str, *, hint: str | None = None) -> InputError:
        return InputError(f"{self._where}: {problem}", hint=hint)


class _Config:
    """adapter_config.json."""

    def __init__(self, path: Location) -> None:
        source = read_json_strict(path)
        # PEFT writes every setting it knows; one that is null is not in use.
        reader = ConfigReader(
            {
                key: value
                for key, value in source.items()
                if value is not None or key in ("r", "lora_alpha", "peft_type")
            },
            where=str(path),
        )
        self._where = str(path)
        for key, allowed in _ONLY.items():
            reader.only(key, allowed, hint=_MERGE)
        if not reader.has("peft_type"):
            raise reader.fail("peft_type", "is missing", hint="is this a PEFT adapter?")
        self._rank = reader.integer("r")
        self._alpha = reader.number("lora_alpha")
        self._rank_of = self._pattern(reader, "rank_pattern")
        self._alpha_of = self._pattern(reader, "alpha_pattern")
        self._root = reader.flag("use_rslora")
        self.use_dora = reader.flag("use_dora")
        self.fan_in_fan_out = reader.flag("fan_in_fan_out")
        self.keeps_ties = reader.flag("ensure_weight_tying")
        self._saved = reader.optional_texts("modules_to_save") or ()
        reader.finish(_IGNORABLE)

    def _pattern(self, reader: ConfigReader, key: str) -> Mapping[str, float]:
        found = reader.optional_object(key) or {}
        for pattern, value in found.items():
            if not isinstance(value, (int, float)) or isinstance(value, bool) or value <= 0:
                raise reader.fail(key, f"gives {pattern!r} the value {value!r:.40}")
            safe = _SAFE_PATTERN.fullmatch(pattern) and not _REPEATED.search(pattern)
            if len(pattern) > 200 or not safe:
                raise reader.fail(key, f"has the pattern {pattern!r:.80}", hint=_MERGE)
            try:
                re.compile(pattern)
            except re.error as error:
                raise reader.fail(key, f"has the pattern {pattern!r:.80}: {error}") from error
        return found

    def rank_and_scale(self, module: str) -> tuple[int, float]:
        """Of one module; patterns as PEFT matches them, the first that fits."""
        rank = _matching(self._rank_of, module, self._rank)
        alpha = _matching(self._alpha_of, module, self._alpha)
        if rank != int(rank):
            raise InputError(f"{self._where}: rank_pattern gives {module} the rank {rank}")
        return int(rank), alpha / (math.sqrt(rank) if self._root else rank)

    def check_used(self, replaced: Mapping[str, str]) -> None:
        """Refuses modules_to_save that no tensor of the adapter is for."""
        for module in self._saved:
            if not any(
                f".{name}".endswith((f".{module}.weight", f".{module}.bias")) for name in replaced
            ):
                raise InputError(
                    f"{self._where}: modules_to_save has {module!r}, for which the adapter has no "
                    "tensor",
                    hint="save it again",
                )


def _matching(patterns: Mapping[str, float], module: str, default: float) -> float:
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def _open_weights(adapter: Location) -> WeightsFile:
    if (adapter / WEIGHTS).is_file():
        return SafetensorsFile(adapter / WEIGHTS)
    if (adapter / TORCH_WEIGHTS).is_file():
        return _open_torch(adapter / TORCH_WEIGHTS)
    raise InputError(f"{adapter} has no {WEIGHTS}", hint="give the directory of a PEFT adapter")


def _added(base: Array, factors: tuple[Float32, Float32], scale: float) -> Float32:
    """base + scale * (left @ right): the ranks summed in order, then scaled, then added."""
    left, right = factors
    made = base.astype(np.float32)
    step = max(1, _TILE_ELEMENTS // max(1, right.shape[1]))
    product = np.empty((min(step, len(made)), right.shape[1]), np.float32)
    total = np.empty_like(product)
    # What overflows stays infinite, which the encoder reports with the tensor's name.
    with np.errstate(over="ignore", invalid="ignore"):
        for start in range(0, len(made), step):
            rows = made[start : start + step]
            part, some = total[: len(rows)], product[: len(rows)]
            part[...] = 0
            for rank in range(len(right)):
                np.multiply(left[start : start + step, rank, None], right[rank], out=some)
                np.add(part, some, out=part)
            np.multiply(part, np.float32(scale), out=part)
            np.add(rows, part, out=rows)
    return made
