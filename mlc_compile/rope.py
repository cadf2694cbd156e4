"""Rotary position embedding tables, in numpy.

- `RopeConfig` holds one checkpoint's settings; `RopeConfig.table` computes the inverse
  frequencies that a compiled library uses for its whole life.
- Kinds: default, linear, dynamic (NTK), llama3, yarn, longrope; float32 arithmetic in the order
  of transformers' `ROPE_INIT_FUNCTIONS`, so that tables agree with it to the last bits.
- A library is compiled for one context window, so what transformers decides per call (dynamic,
  longrope) is decided once, from that window. `RopeConfig.window_note` says it to the user.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from mlc_compile.errors import InputError

Float32Array: TypeAlias = NDArray[np.float32]
RopeValue: TypeAlias = "int | float | bool | tuple[float, ...]"


@dataclass(frozen=True)
class RopeConfig:
    """The rotary embedding of one checkpoint.

    Attributes:
        theta: base of the frequencies (`rope_theta`).
        rotary_dim: how many of a head's dimensions rotate; even.
        kind: one of `ROPE_KINDS`.
        params: the kind's own numbers as (name, value) pairs sorted by name; build them with
            `freeze_params`. Names are those of config.json's `rope_parameters`, and
            `max_position_embeddings` for dynamic. All values are resolved: no default is
            left to the formula except yarn's and longrope's attention factor.
    """

    theta: float
    rotary_dim: int
    kind: str = "default"
    params: tuple[tuple[str, RopeValue], ...] = ()

    def table(self, context_window: int) -> tuple[Float32Array, float]:
        """Inverse frequencies and attention factor for a library of `context_window` tokens.

        cos and sin of `position * inv_freq` are multiplied by the attention factor.
        longrope takes the long factors if and only if `context_window` exceeds
        `original_max_position_embeddings`. dynamic NTK takes the base scaled for
        `context_window` where that exceeds `max_position_embeddings`, and the plain base
        otherwise; transformers instead grows the base with the longest sequence seen so far.

        Returns:
            (inv_freq [rotary_dim / 2] float32 in radians per token, attention_factor)

        Raises:
            InputError: the window is not positive or the kind is unknown.
        """
        if context_window <= 0:
            raise InputError(
                f"a RoPE table needs a positive context window, got {context_window}",
                hint="for a sliding window, pass the checkpoint's max_position_embeddings",
            )
        formula = _FORMULAS.get(self.kind)
        if formula is None:
            raise InputError(f"unknown RoPE kind {self.kind!r}; known: {', '.join(_FORMULAS)}")
        inv_freq, attention_factor = formula(self, dict(self.params), context_window)
        return inv_freq.astype(np.float32, copy=False), attention_factor

    def max_context(self, max_position_embeddings: int) -> int:
        """The most tokens that this scaling was made for.

        linear and dynamic: some checkpoints give the original and some the extended length as
        `max_position_embeddings`, so the bound is the generous reading. yarn: the original length
        times the factor (Qwen's published advice leaves `max_position_embeddings` alone).
        """
        values = dict(self.params)
        reach: float = max_position_embeddings
        if self.kind in ("linear", "dynamic"):
            reach = max_position_embeddings * _number(values, "factor")
        elif self.kind == "yarn":
            original = _number(values, "original_max_position_embeddings")
            reach = original * _number(values, "factor")
        return max(max_position_embeddings, int(reach))

    @property
    def depends_on_window(self) -> bool:
        """Whether `table` gives different frequencies for different context windows."""
        return self.kind in ("dynamic", "longrope")

    def window_note(self, context_window: int) -> str | None:
        """What was fixed by compiling for this window, as a sentence; None if nothing was."""
        values = dict(self.params)
        if self.kind == "longrope":
            original = int(_number(values, "original_max_position_embeddings"))
            chosen = "long" if context_window > original else "short"
            other = f"at most {original}" if chosen == "long" else f"more than {original}"
            return (
                f"RoPE (longrope): the {chosen} factors are compiled in, because "
                f"context_window_size is {context_window} and the original length {original}; a "
                f"window of {other} tokens takes the other set."
            )
        if self.kind == "dynamic":
            trained = int(_number(values, "max_position_embeddings"))
            if context_window <= trained:
                return (
                    "RoPE (dynamic NTK): the plain frequencies are compiled in, because "
                    f"context_window_size {context_window} does not exceed {trained}."
                )
            return (
                "RoPE (dynamic NTK): the base is compiled in as scaled for the full window of "
                f"{context_window} tokens (trained: {trained}); transformers scales it with the "
                "sequence as it grows, so logits of shorter sequences differ slightly from it."
            )
        return None


def freeze_params(values: Mapping[str, RopeValue]) -> tuple[tuple[str, RopeValue], ...]:
    """`RopeConfig.params` from a mapping."""
    return tuple(sorted(values.items()))


_Values: TypeAlias = "dict[str, RopeValue]"
_Formula: TypeAlias = "Callable[[RopeConfig, _Values, int], tuple[Float32Array, float]]"


def _number(values: Mapping[str, RopeValue], name: str) -> float:
    value = values.get(name)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise InputError(f"RoPE parameter {name} must be a number, got {value!r}")
    return float(value)


def _optional(values: Mapping[str, RopeValue], name: str) -> float | None:
    return None if values.get(name) is None else _number(values, name)


def _powers(theta: float, rotary_dim: int) -> Float32Array:
    """theta ** (2i / rotary_dim), [rotary_dim / 2] float32.

    The power itself is taken in float64 and rounded once: closer to torch's float32 result than
    numpy's float32 power, whose last bits also differ between processors.
    """
    exponent = np.arange(0, rotary_dim, 2, dtype=np.float32) / np.float32(rotary_dim)
    return np.power(np.float64(np.float32(theta)), exponent.astype(np.float64)).astype(np.float32)


def _plain(theta: float, rotary_dim: int) -> Float32Array:
    return np.float32(1.0) / _powers(theta, rotary_dim)


def _default(rope: RopeConfig, values: _Values, window: int) -> tuple[Float32Array, float]:
    return _plain(rope.theta, rope.rotary_dim), 1.0


def _linear(rope: RopeConfig, values: _Values, window: int) -> tuple[Float32Array, float]:
    return _plain(rope.theta, rope.rotary_dim) / np.float32(_number(values, "factor")), 1.0


def _dynamic(rope: RopeConfig, values: _Values, window: int) -> tuple[Float32Array, float]:
    """NTK-aware scaling: the base grows so that the lowest frequency spans the window."""
    trained = _number(values, "max_position_embeddings")
    factor = _number(values, "factor")
    length = max(float(window), trained)
    growth = factor * length / trained - (factor - 1)
    exponent = rope.rotary_dim / (rope.rotary_dim - 2)
    return _plain(rope.theta * growth**exponent, rope.rotary_dim), 1.0


def _llama3(rope: RopeConfig, values: _Values, window: int) -> tuple[Float32Array, float]:
    """Llama 3.1: low frequencies divided by the factor, a smooth blend in between."""
    inv_freq = _plain(rope.theta, rope.rotary_dim)
    factor = np.float32(_number(values, "factor"))
    low = _number(values, "low_freq_factor")
    high = _number(values, "high_freq_factor")
    original = _number(values, "original_max_position_embeddings")
    # torch divides a number by a tensor as reciprocal times number; the rounding shows here.
    wavelength = (np.float32(1) / inv_freq) * np.float32(2 * math.pi)
    turns = (np.float32(1) / wavelength) * np.float32(original)
    blend = (turns - np.float32(low)) / np.float32(high - low)
    blended = (np.float32(1) - blend) * inv_freq / factor + blend * inv_freq
    scaled = np.where(wavelength > np.float32(original / low), inv_freq / factor, blended)
    return np.where(wavelength < np.float32(original / high), inv_freq, scaled), 1.0


def _yarn_mscale(factor: float, mscale: float = 1.0) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _yarn(rope: RopeConfig, values: _Values, window: int) -> tuple[Float32Array, float]:
    """YaRN (arXiv 2309.00071): interpolate low frequencies, keep high ones, ramp in between."""
    dim, theta = rope.rotary_dim, rope.theta
    factor = _number(values, "factor")
    original = _number(values, "original_max_position_embeddings")

    attention_factor = _optional(values, "attention_factor")
    if attention_factor is None:
        mscale, all_dim = _optional(values, "mscale"), _optional(values, "mscale_all_dim")
        if mscale and all_dim:
            attention_factor = _yarn_mscale(factor, mscale) / _yarn_mscale(factor, all_dim)
        else:
            attention_factor = _yarn_mscale(factor)

    def dimension_of(rotations: float) -> float:
        """The dimension that turns `rotations` times over the original length."""
        return dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    # As in transformers, 0 means "not given" for both.
    low = dimension_of(_optional(values, "beta_fast") or 32.0)
    high = dimension_of(_optional(values, "beta_slow") or 1.0)
    if values.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001  # the ramp would divide by zero
    steps = np.arange(dim // 2, dtype=np.float32)
    ramp = np.clip((steps - np.float32(low)) / np.float32(high - low), np.float32(0), np.float32(1))

    powers = _powers(theta, dim)
    keep = np.float32(1) - ramp
    interpolated = np.float32(1) / (np.float32(factor) * powers)
    return interpolated * (np.float32(1) - keep) + keep / powers, attention_factor


def _longrope(rope: RopeConfig, values: _Values, window: int) -> tuple[Float32Array, float]:
    """LongRoPE (arXiv 2402.13753): one searched factor per frequency, short or long."""
    original = _number(values, "original_max_position_embeddings")
    factor = _number(values, "factor")
    attention_factor = _optional(values, "attention_factor")
    if attention_factor is None:
        attention_factor = (
            1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
        )
    factors = np.asarray(
        values["long_factor" if window > original else "short_factor"], dtype=np.float32
    )
    return np.float32(1) / (factors * _powers(rope.theta, rope.rotary_dim)), attention_factor


_FORMULAS: Mapping[str, _Formula] = MappingProxyType(
    {
        "default": _default,
        "linear": _linear,
        "dynamic": _dynamic,
        "llama3": _llama3,
        "yarn": _yarn,
        "longrope": _longrope,
    }
)
ROPE_KINDS: tuple[str, ...] = tuple(_FORMULAS)
