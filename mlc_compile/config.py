"""Numbers of a checkpoint (`ModelConfig`) and of what is compiled (`CompileConfig`).

- `read_json_strict` reads a JSON object; repeated keys, NaN and non-objects are errors.
- `ConfigReader` takes keys out of a config.json one by one, with their type and bounds, and then
  refuses whatever nobody took: a key that we do not know may change the maths.
- `read_rope` understands both spellings of rotary settings: `rope_theta` + `rope_scaling`
  (transformers 4) and `rope_parameters` (transformers 5).
- `resolve_compile_config` turns what the user asked for into a full plan, and says in notes what
  it chose itself and why.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, Protocol, TypeAlias

from mlc_compile.errors import InputError
from mlc_compile.rope import (
    ROPE_KINDS,
    Float32Array,
    RopeConfig,
    RopeValue,
    freeze_params,
)

__all__ = [
    "COMPILE_DEFAULTS",
    "NO_ROPE",
    "CompileConfig",
    "ConfigReader",
    "Experts",
    "Float32Array",
    "LayerKind",
    "ModelConfig",
    "RopeConfig",
    "parse_json_strict",
    "read_json_strict",
    "read_rope",
    "resolve_compile_config",
    "rope_context",
]

INT32_MAX: Final = 2**31 - 1
"""Runtimes count tokens, rows and pages in int32."""

UNSET: Final = -1
"""MLC's spelling of "not used" in its configuration files."""

DEFAULT_THETA: Final = 10_000.0
"""The base of RoPE frequencies where a checkpoint gives none, as in transformers."""


# ---------------------------------------------------------------------------------------------
# JSON


def _no_duplicates(where: str) -> Any:
    def build(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            names = [name for name, _ in pairs]
            repeated = sorted({name for name in names if names.count(name) > 1})
            raise InputError(
                f"{where}: key {', '.join(map(repr, repeated))} appears twice in one object",
                hint="keep one of them; which one counts is not defined by JSON",
            )
        return result

    return build


def parse_json_strict(text: str, *, where: str) -> dict[str, Any]:
    """A JSON object from text; `where` names its origin in messages.

    Raises:
        InputError: not JSON, not an object, a repeated key, NaN or an infinite number.
    """

    def no_constant(name: str) -> Any:
        raise InputError(f"{where}: {name} is not JSON", hint="write a finite number")

    def finite(literal: str) -> float:
        value = float(literal)
        if not math.isfinite(value):
            raise InputError(
                f"{where}: the number {literal} is out of range", hint="write a finite number"
            )
        return value

    try:
        value = json.loads(
            text,
            object_pairs_hook=_no_duplicates(where),
            parse_constant=no_constant,
            parse_float=finite,
        )
    except json.JSONDecodeError as error:
        raise InputError(
            f"{where}: not valid JSON at line {error.lineno}, column {error.colno}: {error.msg}",
            hint="the file may be truncated; fetch it again",
        ) from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not usable JSON: {error}") from error
    if not isinstance(value, dict):
        raise InputError(
            f"{where}: expected a JSON object, found {_kind_of(value)}",
            hint="is this the right file?",
        )
    return value


class Readable(Protocol):
    """A file elsewhere than on this machine, called by what `str` gives. See weights/remote.py."""

    def read_bytes(self) -> bytes: ...


def read_json_strict(path: str | Path | Readable) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        InputError: missing or unreadable file, and whatever `parse_json_strict` refuses.
    """
    path = Path(path) if isinstance(path, str) else path
    try:
        text = path.read_bytes().decode("utf-8")
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file") from error
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path}: not UTF-8 text (byte {error.start})", hint="is this the right file?"
        ) from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from error
    return parse_json_strict(text, where=str(path))


def _kind_of(value: object) -> str:
    """A value's JSON type in words, for messages."""
    if value is None:
        return "null"
    for kind, name in (
        (bool, "true/false"),
        (int, "an integer"),
        (float, "a fractional number"),
        (str, "a string"),
        (Mapping, "an object"),
        (Sequence, "a list"),
    ):
        if isinstance(value, kind):
            return name
    return type(value).__name__


def _show(value: object) -> str:
    """A value as JSON, cut to a length that fits one line."""
    try:
        text = json.dumps(value)
    except (TypeError, ValueError):
        text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


# ---------------------------------------------------------------------------------------------
# Strict reading of config.json


class _Missing:
    """Marks a key that has no default: it must be there."""


REQUIRED: Final = _Missing()


Derived: TypeAlias = "Callable[[Mapping[str, Any]], object]"
"""A value made from other keys, in canonical spelling."""


class ConfigReader:
    """Takes the keys of one JSON object, strictly; `finish` refuses those nobody took.

    Every message names `where` and the key. A key that is absent gives the default; a key that
    is null gives the default only in the `optional_` methods.

    Attributes:
        source: the object as it is.
        raw: the same in canonical (Llama's) spelling, with the model type's own defaults.
    """

    def __init__(
        self,
        source: Mapping[str, Any],
        *,
        where: str,
        prefix: str = "",
        spelling: Mapping[str, str] = MappingProxyType({}),
        defaults: Mapping[str, object] = MappingProxyType({}),
        derived: Mapping[str, Derived] = MappingProxyType({}),
        ignored: Container[str] = (),
    ) -> None:
        """
        spelling: canonical key -> this object's key for it; both may be used, but not disagree.
        defaults: values of absent keys, canonical.
        derived: values of absent or null keys, canonical.
        ignored: keys of this object that mean nothing, though other model types have them.

        Raises InputError for a key that is given in two spellings with two values.
        """
        self.source = source
        self.where = where
        self.prefix = prefix
        self.raw: dict[str, Any] = dict(source)
        self._spelled: dict[str, str] = {}
        self._taken: set[str] = set()
        self._defaults: set[str] = set()
        for key, own in spelling.items():
            if own not in source:
                continue
            value = self.raw.pop(own)
            given = None if key in ignored else source.get(key)
            if given is not None and value is not None and given != value:
                raise InputError(
                    f"{where}: {prefix}{own} is {_show(value)} but {prefix}{key} is "
                    f"{_show(source[key])}",
                    hint="they mean the same; keep the one that the checkpoint was trained with",
                )
            self.raw[key] = given if value is None else value
            self._spelled[key] = own
        for key, default in defaults.items():
            if key not in self.raw:
                self.raw[key] = default
                self._defaults.add(key)
        for key, make in derived.items():
            if self.raw.get(key) is None:
                self.raw[key] = self._derived(key, make)

    def _derived(self, key: str, make: Derived) -> object:
        try:
            return make(self.raw)
        except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
            raise self.fail(
                key, f"cannot be made from the other keys: {type(error).__name__} {error}"
            ) from error

    def spelled(self, key: str) -> str:
        """A canonical key as this object has it."""
        return self.prefix + self._spelled.get(key, key)

    def fail(self, key: str, problem: str, *, hint: str | None = None) -> InputError:
        """The error for a key; the caller raises it."""
        return InputError(f"{self.where}: {self.spelled(key)} {problem}", hint=hint)

    def has(self, key: str) -> bool:
        """Whether the key is there with a value other than null."""
        return self.raw.get(key) is not None

    def take(self, key: str) -> Any:
        """The raw value, None if absent; the key counts as read."""
        self._taken.add(key)
        return self.raw.get(key)

    def defaulted(self, key: str) -> bool:
        """Whether the value is the model type's default, because the key is absent."""
        return key in self._defaults

    def _given(self, key: str, default: object) -> bool:
        """Whether a value is there to be checked; absent and no default is an error."""
        self._taken.add(key)
        if key in self.raw:
            return True
        if isinstance(default, _Missing):
            raise self.fail(
                key, "is missing", hint="every model of this type has it; is the file complete?"
            )
        return False

    def integer(
        self, key: str, *, default: int | _Missing = REQUIRED, low: int = 1, high: int = INT32_MAX
    ) -> int:
        """An integer within [low, high]; true, 3.0 and "3" are errors."""
        if not self._given(key, default):
            assert isinstance(default, int)
            return default
        value = self.raw[key]
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.fail(key, f"must be an integer, not {_kind_of(value)} ({_show(value)})")
        if not low <= value <= high:
            raise self.fail(key, f"is {value}, outside the supported range {low} to {high}")
        return value

    def optional_integer(self, key: str, *, low: int = 1, high: int = INT32_MAX) -> int | None:
        """As `integer`; None where the key is absent or null."""
        if self.take(key) is None:
            return None
        return self.integer(key, low=low, high=high)

    def number(
        self,
        key: str,
        *,
        default: float | _Missing = REQUIRED,
        above: float = 0.0,
        high: float = 1e12,
        inclusive: bool = False,
    ) -> float:
        """A finite number in (above, high], or [above, high] if `inclusive`."""
        if not self._given(key, default):
            assert isinstance(default, (int, float))
            return float(default)
        value = self.raw[key]
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self.fail(key, f"must be a number, not {_kind_of(value)} ({_show(value)})")
        enough = value >= above if inclusive else value > above
        # NaN fails both comparisons.
        if not (enough and value <= high):
            bound = "at least" if inclusive else "above"
            raise self.fail(key, f"is {value}; it must be {bound} {above:g} and at most {high:g}")
        return float(value)

    def optional_number(
        self, key: str, *, above: float = 0.0, inclusive: bool = False
    ) -> float | None:
        """As `number`; None where the key is absent or null."""
        if self.take(key) is None:
            return None
        return self.number(key, above=above, inclusive=inclusive)

    def flag(self, key: str, *, default: bool = False) -> bool:
        """true or false."""
        if not self._given(key, default):
            return default
        value = self.raw[key]
        if not isinstance(value, bool):
            raise self.fail(key, f"must be true or false, not {_show(value)}")
        return value

    def optional_text(self, key: str) -> str | None:
        """A string; None where the key is absent or null."""
        value = self.take(key)
        if value is not None and not isinstance(value, str):
            raise self.fail(key, f"must be a string, not {_kind_of(value)} ({_show(value)})")
        return value

    def text(self, key: str) -> str:
        """A string."""
        self._given(key, REQUIRED)
        value = self.optional_text(key)
        if value is None:
            raise self.fail(key, "must be a string, not null")
        return value

    def flags(self, key: str, *, length: int) -> tuple[bool, ...] | None:
        """A list of true/false, or of 1/0, one for each layer; None where absent or null."""
        value = self.take(key)
        if value is None:
            return None
        if not isinstance(value, list) or any(item not in (0, 1) for item in value):
            raise self.fail(key, f"must be a list of true/false or 1/0, not {_show(value)}")
        if len(value) != length:
            raise self.fail(key, f"has {len(value)} entries for num_hidden_layers = {length}")
        return tuple(bool(item) for item in value)

    def integers(self, key: str) -> tuple[int, ...]:
        """A list of integers from 0; empty where the key is absent or null."""
        value = self.take(key)
        if value is None:
            return ()
        good = isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)
        if not good:
            raise self.fail(key, f"must be a list of integers from 0, not {_show(value)}")
        return tuple(value)

    def optional_object(self, key: str) -> Mapping[str, Any] | None:
        """An object; None where the key is absent or null."""
        value = self.take(key)
        if value is not None and not isinstance(value, Mapping):
            raise self.fail(key, f"must be an object, not {_kind_of(value)} ({_show(value)})")
        return value

    def optional_texts(self, key: str) -> tuple[str, ...] | None:
        """A list of strings; None where the key is absent or null."""
        value = self.take(key)
        if value is None:
            return None
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self.fail(key, f"must be a list of strings, not {_show(value)}")
        return tuple(value)

    def numbers(self, key: str, *, length: int) -> tuple[float, ...]:
        """A list of `length` positive numbers."""
        self._given(key, REQUIRED)
        value = self.raw[key]
        if not isinstance(value, list):
            raise self.fail(key, f"must be a list of numbers, not {_show(value)}")
        if len(value) != length:
            raise self.fail(key, f"has {len(value)} numbers; one per rotated pair is {length}")
        for item in value:
            good = isinstance(item, (int, float)) and not isinstance(item, bool)
            if not (good and 0 < item < math.inf):
                raise self.fail(key, f"holds {_show(item)}; every factor must be above 0")
        return tuple(float(item) for item in value)

    def only(self, key: str, allowed: Sequence[object], *, hint: str | None = None) -> None:
        """Reads a key whose other values would need maths that we do not build.

        Absent is fine. `True == 1` in Python, so types are compared too.
        """
        if key not in self.raw:
            return
        value = self.take(key)
        for choice in allowed:
            same_type = isinstance(choice, bool) == isinstance(value, bool)
            if same_type and value == choice:
                return
        choices = " or ".join(_show(choice) for choice in allowed)
        raise self.fail(key, f"is {_show(value)}; only {choices} is supported", hint=hint)

    def finish(self, ignorable: Container[str] = ()) -> None:
        """Refuses the keys that were neither taken nor ignorable."""
        unknown = sorted(key for key in self.raw if key not in self._taken and key not in ignorable)
        if unknown:
            names = ", ".join(
                f"{self.spelled(key)} = {_show(self.raw[key])}" for key in unknown[:5]
            )
            more = f" and {len(unknown) - 5} more" if len(unknown) > 5 else ""
            plural = "keys" if len(unknown) > 1 else "key"
            raise InputError(
                f"{self.where}: unknown {plural} {names}{more}",
                hint="a key we do not know may change the maths, so it is refused; remove it "
                "if it changes nothing",
            )


# ---------------------------------------------------------------------------------------------
# Rotary settings

# Early Phi-3 checkpoints call it so.
_ROPE_ALIASES: Final = {"su": "longrope"}
_USES_ORIGINAL: Final = ("llama3", "yarn", "longrope")


NO_ROPE: Final = RopeConfig(theta=DEFAULT_THETA, rotary_dim=0)
"""Nothing rotates."""


def read_rope(
    reader: ConfigReader,
    *,
    head_dim: int,
    max_position_embeddings: int,
    partial: bool = False,
    layer_kind: str | None = None,
) -> RopeConfig:
    """Rotary settings from a config.json in transformers-4 or transformers-5 style.

    partial: heads of this model type may rotate in part.
    layer_kind: which settings are meant where `rope_parameters` has some for each kind of layer.

    Raises:
        InputError: unknown kind, missing, contradictory or unknown setting.
    """
    scaling = reader.optional_object("rope_scaling")
    parameters = reader.optional_object("rope_parameters")
    if parameters is not None and layer_kind is not None and layer_kind in parameters:
        parameters = ConfigReader(
            parameters, where=reader.where, prefix="rope_parameters."
        ).optional_object(layer_kind)
    if scaling and parameters and dict(scaling) != dict(parameters):
        raise reader.fail(
            "rope_scaling",
            "and rope_parameters are both given and differ",
            hint="keep the one that the checkpoint was trained with",
        )
    key = "rope_parameters" if parameters else "rope_scaling"
    inner = ConfigReader(parameters or scaling or {}, where=reader.where, prefix=f"{key}.")
    nested = sorted(name for name, value in inner.raw.items() if isinstance(value, Mapping))
    if nested:
        raise reader.fail(
            key,
            f"has its own settings per layer kind ({', '.join(nested)})",
            hint="one setting for all layers is supported",
        )

    theta = _agreeing_number(reader, inner, "rope_theta", DEFAULT_THETA)
    if theta <= 1:
        raise reader.fail("rope_theta", f"is {theta:g}; it must be above 1")
    rotary_dim = _rotary_dim(reader, inner, head_dim, partial)

    kind = _rope_kind(inner)
    # Phi-3 style configs keep the original length beside max_position_embeddings; transformers
    # gives that place priority.
    outer_original = reader.optional_integer("original_max_position_embeddings", low=2)
    inner_original = inner.optional_integer("original_max_position_embeddings", low=2)
    original = outer_original or inner_original or max_position_embeddings
    if kind in _USES_ORIGINAL and original < 2:
        raise reader.fail("max_position_embeddings", f"is {original}, too short for {kind} RoPE")
    values: dict[str, RopeValue] = {}
    if kind == "linear":
        values["factor"] = inner.number("factor", above=1.0, inclusive=True)
    elif kind == "dynamic":
        if rotary_dim <= 2:
            raise reader.fail("head_dim", "must be above 2 for dynamic RoPE")
        values["factor"] = inner.number("factor", above=1.0, inclusive=True)
        values["max_position_embeddings"] = max_position_embeddings
    elif kind == "llama3":
        values = _llama3_settings(inner, original)
    elif kind == "yarn":
        values = _yarn_settings(inner, original, max_position_embeddings)
    elif kind == "longrope":
        values = _attention_scaling(inner, original, max_position_embeddings)
        for name in ("short_factor", "long_factor"):
            values[name] = inner.numbers(name, length=rotary_dim // 2)
    # `finetuned` is a remark in early YaRN checkpoints; no formula uses it.
    inner.finish(ignorable=("finetuned",))
    return RopeConfig(theta=theta, rotary_dim=rotary_dim, kind=kind, params=freeze_params(values))


def _rotary_dim(reader: ConfigReader, inner: ConfigReader, head_dim: int, partial: bool) -> int:
    """How many dimensions of a head rotate: `partial_rotary_factor` of them, or `rotary_dim`."""
    factor = _agreeing_number(reader, inner, "partial_rotary_factor", 1.0)
    given = reader.optional_integer("rotary_dim", low=2)
    rotary_dim = int(head_dim * factor) if given is None else given
    key = "partial_rotary_factor" if given is None else "rotary_dim"
    if rotary_dim == head_dim and head_dim % 2:
        raise reader.fail("head_dim", f"is {head_dim}; rotary positions need an even size")
    if rotary_dim != head_dim and not partial:
        raise reader.fail(key, f"makes {rotary_dim}; this model type rotates whole heads")
    if not 2 <= rotary_dim <= head_dim or rotary_dim % 2:
        raise reader.fail(
            key, f"makes {rotary_dim} rotated dimensions of {head_dim}; it must be even and fit"
        )
    return rotary_dim


def _llama3_settings(inner: ConfigReader, original: int) -> dict[str, RopeValue]:
    low, high = inner.number("low_freq_factor"), inner.number("high_freq_factor")
    if high <= low:
        raise inner.fail("high_freq_factor", f"is {high:g}; it must be above low_freq_factor")
    return {
        "factor": inner.number("factor", above=1.0, inclusive=True),
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }


def _attention_scaling(inner: ConfigReader, original: int, trained: int) -> dict[str, RopeValue]:
    """What yarn and longrope share; without a factor, the ratio of the two lengths."""
    factor = inner.optional_number("factor", above=1.0, inclusive=True)
    values: dict[str, RopeValue] = {
        "factor": trained / original if factor is None else factor,
        "original_max_position_embeddings": original,
    }
    _keep(values, "attention_factor", inner.optional_number("attention_factor"))
    return values


def _yarn_settings(inner: ConfigReader, original: int, trained: int) -> dict[str, RopeValue]:
    values = _attention_scaling(inner, original, trained)
    fast = inner.optional_number("beta_fast", inclusive=True)
    slow = inner.optional_number("beta_slow", inclusive=True)
    # As in transformers, 0 means "not given".
    if (fast or 32.0) < (slow or 1.0):
        raise inner.fail("beta_fast", "must not be below beta_slow")
    _keep(values, "beta_fast", fast)
    _keep(values, "beta_slow", slow)
    for name in ("mscale", "mscale_all_dim"):
        _keep(values, name, inner.optional_number(name, inclusive=True))
    values["truncate"] = inner.flag("truncate", default=True)
    return values


def _keep(values: dict[str, RopeValue], name: str, value: float | None) -> None:
    if value is not None:
        values[name] = value


def _agreeing_number(outer: ConfigReader, inner: ConfigReader, key: str, default: float) -> float:
    """A number that may stand in either place, or in both if they agree."""
    first, second = outer.optional_number(key), inner.optional_number(key)
    if second is not None and outer.defaulted(key):
        return second
    if first is not None and second is not None and first != second:
        raise outer.fail(
            key,
            f"is {first:g} but {inner.prefix}{key} is {second:g}",
            hint="keep the one that the checkpoint was trained with",
        )
    return next((value for value in (first, second) if value is not None), default)


def _rope_kind(inner: ConfigReader) -> str:
    new, old = inner.optional_text("rope_type"), inner.optional_text("type")
    if new is not None and old is not None and new != old:
        raise inner.fail("rope_type", f"is {new!r} but {inner.prefix}type is {old!r}")
    kind = new or old
    if kind is None:
        # An object without a kind is only harmless where it holds nothing but the base.
        if inner.raw.keys() <= {"rope_theta", "rope_type", "type", "partial_rotary_factor"}:
            return "default"
        raise inner.fail("rope_type", f"is missing; one of {', '.join(ROPE_KINDS)}")
    kind = _ROPE_ALIASES.get(kind, kind)
    if kind not in ROPE_KINDS:
        raise inner.fail("rope_type", f"is {kind!r}; supported: {', '.join(ROPE_KINDS)}")
    return kind


# ---------------------------------------------------------------------------------------------
# The checkpoint's numbers


@dataclass(frozen=True)
class LayerKind:
    """What may differ between the layers of one model.

    Attributes:
        window: tokens a query sees, itself included; None is full attention. Set only where
            layers differ in it: a window of all layers is `ModelConfig.sliding_window`.
        rope: rotary settings; None rotates nothing.
        sparse: whether the MLP is one of experts.
    """

    window: int | None
    rope: RopeConfig | None
    sparse: bool = False


@dataclass(frozen=True)
class Experts:
    """Numbers of sparse layers: `per_token` of `count` gated MLPs of `intermediate_size`.

    Attributes:
        shared_intermediate_size: of the MLP that every token takes; 0 is none.
        scale: multiplies what the chosen experts give.
    """

    count: int
    per_token: int
    intermediate_size: int
    shared_intermediate_size: int = 0
    scale: float = 1.0


@dataclass(frozen=True)
class ModelConfig:
    """Numbers of one checkpoint; `models.load_model` reads them strictly from config.json.

    Sizes are in elements. `raw` is config.json as read, and takes no part in equality.

    Attributes:
        sliding_window: tokens that a query sees in every layer, itself included; None means full
            attention, or layers that differ (`layers`).
        rope: rotary settings of every layer; of the first layer that rotates where they differ.
        layers: one for each layer.
        experts: None without sparse layers.
        embedding_scale: multiplies embeddings; `residual_scale` what attention and MLP add;
            `logits_scale` logits; `attention_scale` scores (None: head_dim ** -0.5).
        attention_softcap: scores become cap * tanh(score / cap); `logits_softcap` likewise.
        clip_qkv: q, k and v are clipped to [-clip, clip].
        extra_head_dim: dimensions that the cache has beside `head_dim` (ALiBi).
    """

    model_type: str
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    norm_eps: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    sliding_window: int | None
    rope: RopeConfig
    layers: tuple[LayerKind, ...]
    experts: Experts | None = None
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logits_scale: float = 1.0
    attention_scale: float | None = None
    attention_softcap: float | None = None
    logits_softcap: float | None = None
    clip_qkv: float | None = None
    extra_head_dim: int = 0
    raw: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)

    @property
    def cache_head_dim(self) -> int:
        """Dimensions of a head in the KV cache."""
        return self.head_dim + self.extra_head_dim

    @property
    def score_scale(self) -> float:
        """What q.k is multiplied with."""
        return self.head_dim**-0.5 if self.attention_scale is None else self.attention_scale

    @property
    def layer_window(self) -> int | None:
        """The window of those layers that have one, where not all have."""
        return next((kind.window for kind in self.layers if kind.window is not None), None)

    @property
    def cache_rotates(self) -> bool:
        """Whether q and k can be rotated in the cache: all layers alike."""
        return all(kind.rope == self.rope for kind in self.layers)

    @property
    def can_slide(self) -> bool:
        """Whether old tokens can be dropped from the cache: nothing but relative positions, and
        no layer that needs them all."""
        rotary = self.cache_rotates and self.rope.rotary_dim > 0
        return rotary and self.layer_window is None and self.extra_head_dim == 0

    def kv_bytes_per_token(self, element_bytes: int = 2) -> int:
        """Bytes that one token takes in the KV cache, over all layers."""
        per_layer = 2 * self.num_key_value_heads * self.cache_head_dim
        return self.num_hidden_layers * per_layer * element_bytes


# ---------------------------------------------------------------------------------------------
# The compile plan's numbers


@dataclass(frozen=True)
class CompileConfig:
    """What plans memory; exactly one of context and sliding window is set, the other is -1.

    Attributes:
        context_window_size: tokens of one sequence with full attention, or -1.
        sliding_window_size: tokens a query sees, itself included, or -1.
        attention_sink_size: first tokens kept beside the window; -1 without a window.
        prefill_chunk_size: most tokens processed by one prefill call.
        max_batch_size: most sequences at once.
        tensor_parallel_shards: devices that share one model.
        notes: what was defaulted or fixed and why, whole sentences for the user.
    """

    context_window_size: int
    sliding_window_size: int
    attention_sink_size: int
    prefill_chunk_size: int
    max_batch_size: int
    tensor_parallel_shards: int
    notes: tuple[str, ...] = field(default=(), compare=False)

    @property
    def kv_tokens(self) -> int:
        """KV capacity of one sequence, in tokens.

        With a window: a chunk of c tokens is written before its first query has read the window
        of w, so w + c - 1 slots are live at once, besides the sinks.
        """
        if self.sliding_window_size == UNSET:
            return self.context_window_size
        window = self.sliding_window_size + self.prefill_chunk_size - 1
        return window + max(self.attention_sink_size, 0)


COMPILE_DEFAULTS: Final[Mapping[str, int]] = {
    "context_window_size": 4096,
    "prefill_chunk_size": 1024,
    "max_batch_size": 4,
    "tensor_parallel_shards": 1,
}
"""Sizes that fit a laptop; a target may override them (`target_defaults`)."""

_MAX_BATCH: Final = 4096
_MAX_SHARDS: Final = 1024


def resolve_compile_config(
    model: ModelConfig,
    *,
    context_window_size: int | None = None,
    sliding_window_size: int | None = None,
    attention_sink_size: int | None = None,
    prefill_chunk_size: int | None = None,
    max_batch_size: int | None = None,
    tensor_parallel_shards: int | None = None,
    target_defaults: Mapping[str, int] | None = None,
) -> CompileConfig:
    """A full, validated plan from what the user asked for; None means "choose".

    -1 for either window, or for the sinks, means "without", as in MLC's files.

    Raises:
        InputError: a value that is no positive integer, that the checkpoint cannot serve, or
            that contradicts another one.
    """
    defaults = {**COMPILE_DEFAULTS, **_checked_defaults(target_defaults or {})}
    notes: list[str] = []
    context = _size("context_window_size", context_window_size)
    sliding = _size("sliding_window_size", sliding_window_size)
    sinks = _size("attention_sink_size", attention_sink_size, low=0)

    context, sliding = _resolve_window(model, context, sliding, defaults, notes)
    sinks = _resolve_sinks(model, sliding, sinks, notes)
    chunk = _resolve_chunk(
        _size("prefill_chunk_size", prefill_chunk_size, unset=False),
        context,
        sliding,
        defaults["prefill_chunk_size"],
        notes,
    )
    batch = _size("max_batch_size", max_batch_size, high=_MAX_BATCH, unset=False)
    if batch is None:
        batch = defaults["max_batch_size"]
        notes.append(
            f"max_batch_size is {batch}: each sequence has its own KV cache, and a local machine "
            "seldom serves more at once; --max-batch-size changes it."
        )
    shards = _size("tensor_parallel_shards", tensor_parallel_shards, high=_MAX_SHARDS, unset=False)
    if shards is None:
        shards = defaults["tensor_parallel_shards"]
    _check_shards(model, shards)
    if context != UNSET and (note := model.rope.window_note(context)) is not None:
        notes.append(note)
    return CompileConfig(
        context_window_size=context,
        sliding_window_size=sliding,
        attention_sink_size=sinks,
        prefill_chunk_size=chunk,
        max_batch_size=batch,
        tensor_parallel_shards=shards,
        notes=tuple(notes),
    )


def rope_context(model: ModelConfig, plan: CompileConfig) -> int:
    """Tokens that the rotary tables are computed for (`RopeConfig.table`)."""
    window = plan.context_window_size
    return model.max_position_embeddings if window == UNSET else window


def _size(
    name: str, value: object, *, low: int = 1, high: int = INT32_MAX, unset: bool = True
) -> int | None:
    """A given size, checked; None if not given. -1 passes where `unset` allows it."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int):
        raise InputError(f"{name} must be an integer, not {_kind_of(value)} ({_show(value)})")
    if unset and value == UNSET:
        return UNSET
    if not low <= value <= high:
        without = " (or -1 for none)" if unset else ""
        raise InputError(f"{name} is {value}; it must be {low} to {high}{without}")
    return value


def _checked_defaults(target_defaults: Mapping[str, int]) -> Mapping[str, int]:
    """A wrong target default is our own bug, so it is no InputError."""
    unknown = target_defaults.keys() - COMPILE_DEFAULTS.keys()
    if unknown:
        raise ValueError(f"target defaults for unknown sizes: {sorted(unknown)}")
    return target_defaults


def _resolve_window(
    model: ModelConfig,
    context: int | None,
    sliding: int | None,
    defaults: Mapping[str, int],
    notes: list[str],
) -> tuple[int, int]:
    """(context_window_size, sliding_window_size), one of them -1."""
    trained, window = model.max_position_embeddings, model.sliding_window
    if context == UNSET and sliding == UNSET:
        raise InputError(
            "context_window_size and sliding_window_size are both -1",
            hint="give one of them a size, or leave both out",
        )
    if sliding is not None and sliding != UNSET:
        if context is not None and context != UNSET:
            raise InputError(
                f"context_window_size ({context}) and sliding_window_size ({sliding}) exclude "
                "each other",
                hint="give one of them",
            )
        return UNSET, _explicit_sliding(model, sliding, notes)
    if context == UNSET:
        if window is None:
            raise InputError(
                "context_window_size is -1 but the checkpoint has no sliding window",
                hint="give --sliding-window-size or a positive --context-window-size",
            )
        return UNSET, _explicit_sliding(model, window, notes)

    limit = model.rope.max_context(trained)
    if context is None:
        chosen = min(trained, defaults["context_window_size"])
    else:
        chosen = context
        if context > limit:
            raise InputError(
                f"context_window_size {context} exceeds the {limit} positions that the "
                f"checkpoint's RoPE ({model.rope.kind}) supports",
                hint=f"use at most {limit}, or a checkpoint with RoPE scaling",
            )
    if window is not None and window < chosen:
        if sliding == UNSET:
            raise InputError(
                f"sliding_window_size is -1 but the checkpoint attends to {window} tokens and "
                f"context_window_size is {chosen}",
                hint=f"use --context-window-size {window} or less for full attention",
            )
        notes.append(
            f"sliding_window_size is {window}, the checkpoint's own window, and "
            f"context_window_size is -1 (no fixed end), because {window} is below the context of "
            f"{chosen}; --context-window-size {window} or less compiles full attention instead."
        )
        return UNSET, _explicit_sliding(model, window, notes)

    if context is None:
        _note_default_context(model, chosen, notes)
    elif context > trained:
        notes.append(
            f"context_window_size {context} exceeds max_position_embeddings ({trained}); "
            f"{model.rope.kind} RoPE scaling reaches {limit}."
        )
    return chosen, UNSET


def _note_default_context(model: ModelConfig, chosen: int, notes: list[str]) -> None:
    trained = model.max_position_embeddings
    if chosen == trained:
        notes.append(
            f"context_window_size is {chosen}, all positions of the checkpoint; "
            "--context-window-size changes it."
        )
        return
    here, full = (_size_words(model.kv_bytes_per_token() * n) for n in (chosen, trained))
    notes.append(
        f"context_window_size is {chosen} of the checkpoint's {trained} positions, so that the "
        f"16-bit KV cache of one sequence takes {here} instead of {full}; "
        "--context-window-size changes it."
    )


def _size_words(n: int) -> str:
    return f"{n / 2**30:.1f} GiB" if n >= 2**30 else f"{n / 2**20:.0f} MiB"


def _explicit_sliding(model: ModelConfig, sliding: int, notes: list[str]) -> int:
    if not model.can_slide:
        raise InputError(
            f"a sliding window over all layers does not go with {model.model_type}, whose layers "
            "see different parts of the text or which counts positions from its beginning",
            hint="give --context-window-size instead",
        )
    if model.rope.depends_on_window:
        raise InputError(
            f"a sliding window does not go with {model.rope.kind} RoPE, whose frequencies depend "
            "on the length of the sequence",
            hint="give --context-window-size instead",
        )
    window = model.sliding_window
    if window is not None and sliding > window:
        raise InputError(
            f"sliding_window_size {sliding} exceeds the checkpoint's own window of {window}",
            hint=f"use {window} or less",
        )
    if sliding > model.max_position_embeddings:
        raise InputError(
            f"sliding_window_size {sliding} exceeds the checkpoint's "
            f"{model.max_position_embeddings} positions",
            hint=f"use {model.max_position_embeddings} or less",
        )
    if sliding != window:
        attends = "all earlier tokens" if window is None else f"{window} tokens"
        notes.append(
            f"sliding_window_size {sliding} is an approximation: the checkpoint was trained to "
            f"attend to {attends}."
        )
    return sliding


def _resolve_sinks(model: ModelConfig, sliding: int, sinks: int | None, notes: list[str]) -> int:
    if sliding == UNSET:
        if sinks not in (None, UNSET, 0):
            raise InputError(
                f"attention_sink_size is {sinks} but there is no sliding window",
                hint="give --sliding-window-size as well, or leave it out",
            )
        return UNSET
    if sinks in (None, UNSET):
        return 0
    assert sinks is not None
    if sinks >= sliding:
        raise InputError(f"attention_sink_size {sinks} must be below sliding_window_size {sliding}")
    if sinks and model.sliding_window is not None:
        notes.append(
            f"attention_sink_size {sinks} keeps tokens that the checkpoint's own window drops, so "
            "logits differ from the reference once the window is full."
        )
    return sinks


def _resolve_chunk(
    chunk: int | None, context: int, sliding: int, default: int, notes: list[str]
) -> int:
    name, limit = (
        ("context_window_size", context) if sliding == UNSET else ("sliding_window_size", sliding)
    )
    if chunk is None:
        chunk = min(default, limit)
        why = (
            f"all of {name}"
            if chunk == limit
            else "longer prompts are read in such chunks, and activation memory grows with it"
        )
        notes.append(f"prefill_chunk_size is {chunk}: {why}; --prefill-chunk-size changes it.")
    elif chunk > limit:
        raise InputError(
            f"prefill_chunk_size {chunk} exceeds {name} {limit}",
            hint=f"use {limit} or less",
        )
    return chunk


def _check_shards(model: ModelConfig, shards: int) -> None:
    for name, size in (
        ("num_attention_heads", model.num_attention_heads),
        ("num_key_value_heads", model.num_key_value_heads),
        ("intermediate_size", model.intermediate_size),
    ):
        if size % shards:
            fits = [n for n in range(1, min(size, 64) + 1) if _divides_all(n, model)]
            raise InputError(
                f"tensor_parallel_shards {shards} does not divide {name} ({size})",
                hint=f"possible: {', '.join(map(str, fits))}",
            )


def _divides_all(shards: int, model: ModelConfig) -> bool:
    sizes: Iterable[int] = (
        model.num_attention_heads,
        model.num_key_value_heads,
        model.intermediate_size,
    )
    return all(size % shards == 0 for size in sizes)
