"""How one model type's config.json is read, where types differ from Llama.

A `ConfigSchema` is data: other spellings of keys, values where they are absent, keys with only one
value that we build, and small rules for numbers and layers that types compute in their own way.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Final, TypeAlias

from mlc_compile.config import ConfigReader, Derived
from mlc_compile.rope import ROPE_KINDS

Number: TypeAlias = "Callable[[ConfigReader], float | None]"
Kinds: TypeAlias = "tuple[str, ...]"
LayerRule: TypeAlias = "Callable[[ConfigReader, int], Kinds]"
Pattern: TypeAlias = "Callable[[ConfigReader, Kinds], tuple[bool, ...]]"

FULL: Final = "full_attention"
SLIDING: Final = "sliding_attention"
LAYER_KINDS: Final = (FULL, SLIDING)


# ---------------------------------------------------------------------------------------------
# Numbers


def key(name: str, default: float | None = None) -> Number:
    """The number that a key holds; `default` where it is absent or null."""

    def read(reader: ConfigReader) -> float | None:
        found = reader.optional_number(name)
        return default if found is None else found

    return read


def inverse(name: str, default: float | None = None) -> Number:
    """1 / the number that a key holds."""
    read = key(name, default)
    return lambda reader: None if (found := read(reader)) is None else 1 / found


def number(name: str, exponent: float = 1.0) -> Number:
    """The number that a key holds, to a power; unlike `key`, it must be given."""
    return lambda reader: float(reader.number(name) ** exponent)


def constant(value: float) -> Number:
    """The same for every checkpoint."""
    return lambda reader: value


def times(name: str, factor: int) -> Derived:
    """A whole multiple of another key's value."""

    def derive(keys: Mapping[str, Any]) -> object:
        value = keys.get(name)
        return factor * value if isinstance(value, int) else None

    return derive


@dataclass(frozen=True)
class Numbers:
    """Where the factors of `ModelConfig` of the same names come from; None is without."""

    embedding_scale: Number | None = None
    residual_scale: Number | None = None
    logits_scale: Number | None = None
    attention_scale: Number | None = None
    attention_softcap: Number | None = None
    logits_softcap: Number | None = None
    clip_qkv: Number | None = None


# ---------------------------------------------------------------------------------------------
# Layers


def full_attention(reader: ConfigReader, layers: int) -> Kinds:
    """No window anywhere."""
    reader.only("sliding_window", (None,), hint="this model type has no window")
    reader.only("use_sliding_window", (False, None), hint="this model type has no window")
    return no_window(reader, layers)


def windowed(reader: ConfigReader, layers: int) -> Kinds:
    """A window over every layer where `sliding_window` is given."""
    return _uniform(reader, layers, FULL if reader.take("sliding_window") is None else SLIDING)


def listed(reader: ConfigReader, layers: int) -> Kinds:
    """What `layer_types` says; without it, as `windowed`."""
    return layer_types(reader, layers) or windowed(reader, layers)


def no_window(reader: ConfigReader, layers: int) -> Kinds:
    """Full attention everywhere, as other keys say."""
    return _uniform(reader, layers, FULL)


def _uniform(reader: ConfigReader, layers: int, kind: str) -> Kinds:
    """One kind for all layers; a list that says otherwise is an error."""
    kinds = (kind,) * layers
    if (layer_types(reader, layers) or kinds) != kinds:
        raise reader.fail(
            "layer_types",
            f"says otherwise, but all layers have {kind}",
            hint="sliding_window and layer_types contradict each other",
        )
    return kinds


def gated_window(reader: ConfigReader, layers: int) -> Kinds:
    """Qwen's rule: a window only if switched on, and only from layer `max_window_layers` on."""
    first = reader.integer("max_window_layers", default=28, low=0)
    if not reader.flag("use_sliding_window") or reader.take("sliding_window") is None:
        return no_window(reader, layers)
    explicit = layer_types(reader, layers)
    return explicit or tuple(SLIDING if i >= first else FULL for i in range(layers))


def every(name: str | None, default: int) -> LayerRule:
    """Full attention in each n-th layer, a window in the others; n is a key's value, or
    `default`."""

    def rule(reader: ConfigReader, layers: int) -> Kinds:
        n = default if name is None else reader.integer(name, default=default)
        explicit = layer_types(reader, layers)
        return explicit or tuple(FULL if (i + 1) % n == 0 else SLIDING for i in range(layers))

    return rule


def layer_types(reader: ConfigReader, layers: int) -> Kinds | None:
    """The kinds that config.json lists, checked; None where it lists none."""
    kinds = reader.optional_texts("layer_types")
    if kinds is None:
        return None
    for kind in kinds:
        if kind not in LAYER_KINDS:
            raise reader.fail("layer_types", f"holds {kind!r}; supported: {', '.join(LAYER_KINDS)}")
    if len(kinds) != layers:
        raise reader.fail(
            "layer_types", f"has {len(kinds)} entries for num_hidden_layers = {layers}"
        )
    return kinds


def all_layers(reader: ConfigReader, kinds: Kinds) -> tuple[bool, ...]:
    """Yes for each."""
    return (True,) * len(kinds)


def windowed_layers(reader: ConfigReader, kinds: Kinds) -> tuple[bool, ...]:
    """Yes for those with a window."""
    return tuple(kind == SLIDING for kind in kinds)


def listed_layers(name: str, interval: str | None = None, default: int = 4) -> Pattern:
    """What a list of 1 and 0 says; without it, no for each n-th layer, n being `interval`'s
    value."""

    def pattern(reader: ConfigReader, kinds: Kinds) -> tuple[bool, ...]:
        n = reader.integer(interval, default=default) if interval else default
        found = reader.flags(name, length=len(kinds))
        return found or tuple((i + 1) % n != 0 for i in range(len(kinds)))

    return pattern


# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ConfigSchema:
    """How one model type's config.json is read.

    Attributes:
        spelling: canonical (Llama's) key -> this type's.
        defaults: values that the transformers class takes for absent keys, canonical.
        derived: values of absent or null keys, made from the others.
        fixed: further keys with the only values that we build.
        ignored: further keys that change nothing.
        numbers: factors and caps.
        kinds: full attention or a window, for each layer.
        rotates: which layers rotate q and k.
        sparse: which layers have experts, where the architecture has any.
        local_theta: the RoPE base of windowed layers, where it is a key of its own; these are not
            scaled.
        experts: reads `ModelConfig.experts`' numbers under these keys: count, per_token,
            intermediate_size, shared_intermediate_size, scale; those not named are 0 or 1.
        partial_rotary: `partial_rotary_factor` or `rotary_dim` counts.
        rope_kinds: those that the type's class has.
    """

    spelling: Mapping[str, str] = field(default_factory=dict)
    defaults: Mapping[str, object] = field(default_factory=dict)
    derived: Mapping[str, Derived] = field(default_factory=dict)
    fixed: tuple[tuple[str, tuple[object, ...]], ...] = ()
    ignored: tuple[str, ...] = ()
    numbers: Numbers = Numbers()
    kinds: LayerRule = full_attention
    rotates: Pattern = all_layers
    sparse: Pattern = all_layers
    local_theta: str | None = None
    experts: Mapping[str, str] = field(default_factory=dict)
    partial_rotary: bool = False
    rope_kinds: tuple[str, ...] = ROPE_KINDS

    def reader(self, config_json: Mapping[str, Any], where: str) -> ConfigReader:
        """Of a config.json, in canonical spelling."""
        return ConfigReader(
            config_json,
            where=where,
            spelling=self.spelling,
            defaults={**DEFAULTS, **self.defaults},
            derived=self.derived,
            ignored=self.ignored,
        )


DEFAULTS: Final[Mapping[str, object]] = MappingProxyType({"hidden_act": "silu"})
"""Values of absent keys that hold for every type which does not say otherwise."""
