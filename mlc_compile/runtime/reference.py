"""What a compiled library is compared with: float32 logits of the same weights, made another way.

- The weights are the *stored* ones, read back from the parameter files, dequantised by the numpy
  reference and taken apart into the checkpoint's tensors. So the comparison proves packing, graph,
  kernels and runtime, and quantisation loss is not in it.
- `TransformersReference` runs the Hugging Face class of the checkpoint; `NumpyReference` is a
  small decoder of our own, for machines without torch, for attention sinks, and for windows that
  the Hugging Face class does not have.
- `check_parameters` compares the stored weights with the checkpoint itself.
- Whole sequences go through at once, without a KV cache, so that nothing here shares the logic
  that is tested.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import inspect
import itertools
import math
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from mlc_compile.errors import EnvironmentLacksError, InputError
from mlc_compile.models.options import (
    MLP,
    Alibi,
    GatedMLP,
    HeadNorm,
    LayerNorm,
    Learned,
    Norm,
    SparseMLP,
)
from mlc_compile.models.params import ParamSpec
from mlc_compile.models.spec import Model
from mlc_compile.quantization.codec import decode, encode, nearest
from mlc_compile.quantization.group import narrow
from mlc_compile.quantization.policy import is_quantized, stored_layout, stored_params
from mlc_compile.quantization.scheme import Layout, QuantScheme
from mlc_compile.rope import RopeConfig
from mlc_compile.runtime.formulas import (
    ACTIVATIONS,
    Activation,
    Float32,
    Int64,
    alibi,
    alibi_slopes,
    choose,
    layer_norm,
    rms_norm,
    rotate,
    rounded_alibi,
    sigmoid,
    soft_cap,
)
from mlc_compile.weights.checkpoint import Checkpoint
from mlc_compile.weights.parts import published, read_parameter
from mlc_compile.weights.tensor_cache import TensorCache, open_tensor_cache

Weights: TypeAlias = Mapping[str, Float32]
"""float32 weights by the name of their ParamSpec (q, k, v in one, gate and up in one)."""

ENGINES = ("auto", "transformers", "numpy")
REMEDY = "pip install 'mlc-compile[reference]', or use --engine numpy"

CUT = -1
"""Where a call begins in a text. Without sinks it makes no difference how a text is cut.

The runtime numbers the tokens of a slid window anew before each call: sinks first, then the tokens
that are left, then those of the call. So a sink is seen as far away as if what has slid out before
this call had never been, and the next call sees it at another distance."""

_ROUTER_UNITS = 4
_BLOCK = 4 << 20  # elements of a stored weight that are compared at once
_QUERY_BLOCK = 256  # bounds the score matrix of the numpy decoder


@dataclass(frozen=True)
class Attention:
    """What a library fixes about attention when it is compiled.

    Attributes:
        window: tokens that a token attends, itself and the sinks included; None is all.
        sink: first tokens that stay visible.
        context: tokens that RoPE was computed for (`RopeConfig.table`).
    """

    window: int | None
    sink: int
    context: int


class Reference(Protocol):
    """A decoder in float32."""

    name: str

    def logits(self, text: Sequence[int], positions: Sequence[int]) -> Float32:
        """Logits [len(positions), vocab] after the tokens at these positions.

        text: tokens, with CUT at the beginning of each call where the library has sinks; it is
            no token and has no position.
        """

    def greedy(self, prompt: Sequence[int], count: int) -> list[int]:
        """The `count` likeliest tokens one after the other."""

    def reload(self) -> None:
        """Takes the weights that it was made with once more, after they were changed in place."""


def tokens_of(text: Sequence[int]) -> tuple[int, ...]:
    """The tokens of a text, without its cuts."""
    return tuple(token for token in text if token != CUT)


# ---------------------------------------------------------------------------------------------
# Weights


def stored_weights(model: Model, scheme: QuantScheme, directory: Path) -> dict[str, Float32]:
    """The weights that the parameter files of `directory` hold, dequantised.

    Raises InputError where a tensor is missing.
    """
    cache = open_tensor_cache(directory)
    return {spec.name: stored_weight(spec, scheme, cache) for spec in model.parameters()}


def stored_weight(spec: ParamSpec, scheme: QuantScheme, cache: TensorCache) -> Float32:
    """A parameter of the opened files in float32, dequantised where it is packed."""
    if not is_quantized(spec, scheme):
        (stored,) = stored_params(spec, scheme)
        return np.array(cache.tensor(stored.name), np.float32)
    arrays, held, layout = _packed(spec, scheme, cache)
    whole = decode(arrays, held, spec.shape[-1], layout=layout)
    return whole.astype(np.float32, copy=False).reshape(spec.shape)


def _packed(
    spec: ParamSpec, scheme: QuantScheme, cache: TensorCache
) -> tuple[tuple[NDArray[Any], ...], QuantScheme, Layout]:
    """A packed parameter's tensors, experts' rows one after the other, its scheme and layout."""
    arrays = [cache.tensor(stored.name) for stored in stored_params(spec, scheme)]
    flat = tuple(tensor.reshape(-1, tensor.shape[-1]) for tensor in arrays)
    return flat, scheme.of(spec), stored_layout(spec, scheme)


def checkpoint_weights(model: Model, checkpoint: Checkpoint) -> dict[str, Float32]:
    """The checkpoint's own weights."""
    return {
        spec.name: np.array(read_parameter(spec, checkpoint), np.float32)
        for spec in model.for_tensors(checkpoint.tensors).parameters()
    }


def roughen(weights: Weights, unit: float, seed: int, routers: Container[str] = ()) -> None:
    """Multiplies every weight, in place, by 1 + x with a random x in (-unit, unit).

    routers: names of weights that get `_ROUTER_UNITS` times as much. What a router reads has been
    rounded many times, and where two experts are all but equal this decides which one is taken.
    """
    rng = np.random.default_rng(seed)
    for name, weight in weights.items():
        most = np.float32(unit * (_ROUTER_UNITS if name in routers else 1))
        for row in weight if weight.ndim > 1 else weight[None]:
            row *= 1 + most * (2 * rng.random(row.shape, np.float32) - 1)


@dataclass(frozen=True)
class ParameterCheck:
    """How the stored weights relate to the checkpoint's.

    Attributes:
        compared: parameters.
        exact: those that equal the checkpoint's, rounded to the model dtype, bit for bit.
        worst_steps: the largest deviation of a packed weight, in units of its group's scale: 0.5
            and a rounding for plain scales of whole numbers, more for those that clip and for
            floating-point codes.
        faults: a sentence for each parameter that is not the checkpoint's.
    """

    compared: int
    exact: int
    worst_steps: float
    faults: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return {
            "compared": self.compared,
            "exact": self.exact,
            "worst_steps": round(self.worst_steps, 4),
            "faults": list(self.faults),
        }


# By how much a weight may be further from the checkpoint's than the nearest one that its group's
# stored scale allows, in units of that scale. A code that is one off is half a step further away on
# average; rounding weight, quotient and sum to the model dtype brings at most 0.22 steps (8 bits in
# float16, where quotients reach 254 and are apart by 0.125).
MAX_FURTHER = 0.5
# Scales that are searched have less error than plain ones; with an importance of columns the plain
# error may be larger, but not by much where a tensor is the checkpoint's.
MAX_ERROR = 2.0
# Smallest number of the model dtype: below it there is nothing to compare.
_SMALLEST = {"float16": 2.0**-24, "bfloat16": 2.0**-133, "float32": 2.0**-149}


def check_parameters(
    model: Model, scheme: QuantScheme, directory: Path, checkpoint: Checkpoint
) -> ParameterCheck:
    """Whether the parameter files are a conversion of `checkpoint`.

    Plain tensors must equal the checkpoint's to the bit; the codes of packed ones must be the
    nearest (MAX_FURTHER) for their scales, which must be about as good as plain ones (MAX_ERROR).
    """
    cache = open_tensor_cache(directory)
    exact, worst, faults = 0, 0.0, []
    specs = model.for_tensors(checkpoint.tensors).parameters()
    for spec in specs:
        try:
            original = read_parameter(spec, checkpoint)
        except ValueError as error:
            faults.append(f"{spec.name}: {error} in {checkpoint.path}")
            continue
        if not is_quantized(spec, scheme):
            (stored,) = stored_params(spec, scheme)
            rounded = narrow(original, scheme.model_dtype, name=spec.name)
            found = cache.tensor(stored.name)
            differ = int(np.count_nonzero(rounded != found))
            exact += differ == 0
            if differ:
                faults.append(f"{spec.name}: {differ} of {found.size} values differ")
            continue
        steps, further, loss = _apart(spec, scheme, cache, np.asarray(original, np.float32))
        worst = max(worst, steps)
        if not further <= MAX_FURTHER:
            faults.append(f"{spec.name}: {further:.3g} steps further away than its scale allows")
        elif not loss <= MAX_ERROR:
            faults.append(f"{spec.name}: {loss:.3g} times the error of a plain conversion")
    checkpoint.release()
    return ParameterCheck(len(specs), exact, worst, tuple(faults))


def _apart(
    spec: ParamSpec, scheme: QuantScheme, cache: TensorCache, original: Float32
) -> tuple[float, float, float]:
    """Of a packed parameter: (as ParameterCheck.worst_steps, as MAX_FURTHER, the root mean square
    error as a multiple of a plain conversion's)."""
    arrays, held, layout = _packed(spec, scheme, cache)
    k, most = original.shape[-1], [0.0, 0.0]
    errors = np.full(2, original.size * _SMALLEST[held.model_dtype] ** 2)
    for rows, part in _blocks(original.reshape(-1, k), arrays, layout):
        stored = decode(part, held, k, layout=layout).astype(np.float32)
        best = nearest(rows, part, held, layout=layout).astype(np.float32)
        scales = np.abs(np.asarray(part[1], np.float32))
        scales[scales == 0] = np.inf  # weights too small for the model dtype are stored as 0
        scales = np.repeat(scales.T if layout == "KN" else scales, held.group_of(k), axis=1)[:, :k]
        apart = np.abs(stored - rows)
        further = apart - np.abs(best - rows)
        most = [
            max(x, float((y / scales).max())) for x, y in zip(most, (apart, further), strict=True)
        ]
        plain = decode(encode(rows, held, layout=layout), held, k, layout=layout)
        for i, weights in enumerate((stored, plain)):
            errors[i] += np.square(weights.astype(np.float64) - rows).sum()
    return most[0], most[1], math.sqrt(errors[0] / errors[1])


def _blocks(
    weight: Float32, arrays: tuple[NDArray[Any], ...], layout: Layout
) -> Iterator[tuple[Float32, tuple[NDArray[Any], ...]]]:
    """Some rows of a weight at a time, with those of its stored tensors."""
    step = max(1, _BLOCK // weight.shape[1])
    for start in range(0, len(weight), step):
        rows = slice(start, start + step)
        yield weight[rows], tuple(a[:, rows] if layout == "KN" else a[rows] for a in arrays)


# ---------------------------------------------------------------------------------------------
# Our own decoder


@dataclass(frozen=True)
class Rows:
    """Tokens that go through the stack together.

    Attributes:
        positions: [n], each token's in its text.
        calls: [n], how many tokens there were before the call that each came with.
    """

    positions: Int64
    calls: Int64


class NumpyReference:
    """Every architecture in numpy, float32, by the formulas of formulas.py.

    Each option of `models/options.py` is read in one place here, and each number of `ModelConfig`.
    """

    name = "numpy, float32"

    def __init__(self, model: Model, weights: Weights, attention: Attention) -> None:
        self.model = model
        self.weights = weights
        self.attention = attention
        ropes = {kind.rope for kind in model.config.layers if kind.rope is not None}
        self._tables = {rope: rope.table(attention.context) for rope in ropes}

    def reload(self) -> None:
        """As Reference."""

    def logits(self, text: Sequence[int], positions: Sequence[int]) -> Float32:
        """As Reference."""
        calls: list[int] = []
        before = 0
        for token in text:
            if token == CUT:
                before = len(calls)
            else:
                calls.append(before)
        tokens = np.asarray(tokens_of(text), np.int64)
        return self._head(self._hidden(tokens, [], np.array(calls))[list(positions)])

    def greedy(self, prompt: Sequence[int], count: int) -> list[int]:
        """As Reference; this alone keeps keys and values from one step to the next."""
        past: list[tuple[Float32, Float32]] = []
        new, found = list(prompt), []
        for _ in range(count):
            cached = len(past[0][0]) if past else 0
            calls = np.full(len(new), cached)
            hidden = self._hidden(np.asarray(new, np.int64), past, calls)
            new = [int(self._head(hidden[-1:])[0].argmax())]
            found += new
        return found

    # -- the stack

    def _hidden(self, tokens: Int64, past: list[tuple[Float32, Float32]], calls: Int64) -> Float32:
        """[n, hidden] after the final norm.

        past: each layer's keys (not rotated) and values; grows.
        calls: how many tokens there were before the call that each token came with.
        """
        start = len(past[0][0]) if past else 0
        at = Rows(np.arange(start, start + len(tokens)), calls)
        x = self._embed(tokens, at)
        for i in range(self.model.config.num_hidden_layers):
            x = self._layer(i, x, past, at)
        return self._final(x)

    def _embed(self, tokens: Int64, at: Rows) -> Float32:
        """[n, hidden] that the first layer reads."""
        arch = self.model.arch
        scale = np.float32(self.model.config.embedding_scale)
        x = self.weights["model.embed_tokens.weight"][tokens] * scale
        if isinstance(arch.positions, Learned):
            table = self.weights["model.embed_positions.weight"]
            x = x + table[at.positions + arch.positions.offset]
        return self._norm(arch.norm, "model.embed_layernorm", x) if arch.embed_norm else x

    def _final(self, x: Float32) -> Float32:
        """[n, hidden] that the head reads."""
        arch = self.model.arch
        return self._norm(arch.norm, "model.norm", x) if arch.final_norm else x

    def _layer(self, i: int, x: Float32, past: list[tuple[Float32, Float32]], at: Rows) -> Float32:
        """x [n, hidden] -> [n, hidden] (`models.options.Block`)."""
        block, scale = self.model.arch.block, np.float32(self.model.config.residual_scale)

        def norm(name: str, x: Float32) -> Float32:
            return self._norm(self.model.arch.norm, f"model.layers.{i}.{name}", x)

        read = norm("input_layernorm", x) if block.input_norms else x
        attended = self._attention(i, read, past, at)
        if block.output_norms:
            attended = norm("post_self_attn_layernorm", attended)
        if not block.parallel:
            x = read = x + attended * scale
        if block.input_norms and not block.shared_norm:
            read = norm("post_attention_layernorm", x)
        given = self._feed_forward(i, read)
        if block.output_norms:
            given = norm("post_mlp_layernorm", given)
        if block.parallel:
            given = attended + given
        return x + given * scale

    def _head(self, hidden: Float32) -> Float32:
        """[n, vocab]"""
        c = self.model.config
        name = "model.embed_tokens" if c.tie_word_embeddings else "lm_head"
        return soft_cap(self._linear(name, hidden) * np.float32(c.logits_scale), c.logits_softcap)

    def _linear(self, name: str, x: Float32) -> Float32:
        self._read(name, x)
        y = x @ self.weights[f"{name}.weight"].T
        bias = self.weights.get(f"{name}.bias")
        return y if bias is None else y + bias

    def _read(self, name: str, x: Float32) -> None:
        """Called with the rows [n, K] that the weight `name` is about to multiply; calibrate.py
        listens here."""

    def _norm(self, option: Norm, name: str, x: Float32, shape: tuple[int, ...] = (-1,)) -> Float32:
        """Over the last axis of x. shape: what weight and bias are seen as."""
        given = (self.weights.get(f"{name}.{suffix}") for suffix in ("weight", "bias"))
        weight, bias = (None if values is None else values.reshape(shape) for values in given)
        norm = layer_norm if isinstance(option, LayerNorm) else rms_norm
        return norm(x, weight, bias, self.model.config.norm_eps)

    # -- attention

    def _attention(
        self, i: int, x: Float32, past: list[tuple[Float32, Float32]], at: Rows
    ) -> Float32:
        """[n, hidden] -> [n, hidden]; `past` gets this layer's new keys and values."""
        name = f"model.layers.{i}.self_attn"
        q, k, v = self._project(name, x)
        if i < len(past):
            k, v = (np.concatenate(pair) for pair in zip(past[i], (k, v), strict=True))
        past[i : i + 1] = [(k, v)]
        return self._linear(f"{name}.o_proj", self._attend(i, q, k, v, at))

    def _project(self, name: str, x: Float32) -> tuple[Float32, Float32, Float32]:
        """q [n, query heads, d], k and v [n, kv heads, d]; nothing is rotated yet."""
        c, option = self.model.config, self.model.arch.attention.qk_norm
        heads = c.num_attention_heads + 2 * c.num_key_value_heads
        qkv = self._linear(f"{name}.qkv_proj", x).reshape(len(x), heads, c.head_dim)
        ends = [c.num_attention_heads, c.num_attention_heads + c.num_key_value_heads]
        q, k, v = np.split(qkv, ends, axis=1)
        if option is not None:
            q = self._head_norm(option, f"{name}.q_norm", q)
            k = self._head_norm(option, f"{name}.k_norm", k)
        if c.clip_qkv is not None:
            q, k, v = (np.clip(part, -c.clip_qkv, c.clip_qkv) for part in (q, k, v))
        return q, k, v

    def _head_norm(self, option: HeadNorm, name: str, x: Float32) -> Float32:
        """x [n, heads, d]"""
        n, heads, d = x.shape
        if option.over == "projection":
            return self._norm(option.norm, name, x.reshape(n, heads * d)).reshape(x.shape)
        return self._norm(option.norm, name, x, (heads, d) if option.over == "each_head" else (d,))

    def _rotate(self, x: Float32, positions: Int64, rope: RopeConfig | None) -> Float32:
        """x [n, heads, d]; layers without `rope` do not rotate."""
        return x if rope is None else rotate(x, positions, *self._tables[rope])

    def _penalty(self, queries: Int64, keys: Int64) -> Float32 | None:
        """[query heads, n or 1, m]: what is added to scores, or None."""
        c, option = self.model.config, self.model.arch.positions
        if not isinstance(option, Alibi):
            return None
        slopes = alibi_slopes(c.num_attention_heads)
        if option.rounded:
            return rounded_alibi(slopes, keys, c.score_scale)
        return alibi(slopes, queries, keys)

    def visible(self, queries: Int64, keys: Int64) -> NDArray[np.bool_]:
        """[n, m]: which key positions each query position attends, as far as layers agree."""
        back = queries[:, None] - keys[None, :]
        mask = back >= 0
        if self.attention.window is not None:
            near = back < self.attention.window - self.attention.sink
            mask &= near | (keys < self.attention.sink)[None, :]
        return mask

    def _attend(self, i: int, q: Float32, k: Float32, v: Float32, at: Rows) -> Float32:
        """[n, query heads * d] of queries and keys that are not rotated yet."""
        c, kind = self.model.config, self.model.config.layers[i]
        n, heads, d = q.shape
        groups = k.shape[1]
        # One batch of matrices for each KV head: its query heads stand below one another.
        q = self._rotate(q, at.positions, kind.rope) * np.float32(c.score_scale)
        q = q.reshape(n, groups, heads // groups, d).transpose(1, 2, 0, 3)
        values = v.transpose(1, 0, 2)[:, None]
        everywhere = np.arange(len(k))
        keys = self._rotate(k, everywhere, kind.rope)
        out = np.empty((n, heads, d), np.float32)
        for rows in self._blocks(at.calls):
            if self.attention.sink:
                sinks = everywhere[: self.attention.sink]
                moved = sinks + self._gone(int(at.calls[rows.start]))
                keys[sinks] = self._rotate(k[sinks], moved, kind.rope)
            here = at.positions[rows]
            score = soft_cap(q[:, :, rows] @ keys.transpose(1, 2, 0)[:, None], c.attention_softcap)
            penalty = self._penalty(here, everywhere)
            if penalty is not None:
                score += penalty.reshape(groups, heads // groups, -1, len(k))
            seen = self.visible(here, everywhere)
            if kind.window is not None:
                seen &= here[:, None] - everywhere[None, :] < kind.window
            np.copyto(score, np.float32(-np.inf), where=~seen)
            score -= score.max(axis=-1, keepdims=True)
            np.exp(score, out=score)
            score /= score.sum(axis=-1, keepdims=True)
            out[rows] = (score @ values).transpose(2, 0, 1, 3).reshape(-1, heads, d)
        return out.reshape(n, heads * d)

    def _gone(self, before: int) -> int:
        """How many tokens have slid out when a call begins with `before` tokens."""
        return max(before - (self.attention.window or before), 0)

    def _blocks(self, calls: Int64) -> Iterator[slice]:
        """Rows worked on at once; with sinks, of one call."""
        starts = [0]
        if self.attention.sink:
            starts += [i for i in range(1, len(calls)) if calls[i] != calls[i - 1]]
        for start, end in itertools.pairwise([*starts, len(calls)]):
            for first in range(start, end, _QUERY_BLOCK):
                yield slice(first, min(end, first + _QUERY_BLOCK))

    # -- feed-forward

    def _feed_forward(self, i: int, x: Float32) -> Float32:
        """[n, hidden] -> [n, hidden]"""
        option = self.model.arch.feed_forward(self.model.config.layers[i].sparse)
        name, activation = f"model.layers.{i}.mlp", ACTIVATIONS[option.activation]
        if isinstance(option, MLP):
            inner = activation(self._linear(f"{name}.up_proj", x))
            return self._linear(f"{name}.down_proj", inner)
        if isinstance(option, GatedMLP):
            return self._gated(name, x, activation)
        return self._sparse(option, name, x, activation)

    def _gated(self, name: str, x: Float32, activation: Activation) -> Float32:
        gate, up = np.split(self._linear(f"{name}.gate_up_proj", x), 2, axis=-1)
        return self._linear(f"{name}.down_proj", activation(gate) * up)

    def _sparse(self, option: SparseMLP, name: str, x: Float32, activation: Activation) -> Float32:
        numbers = self.model.config.experts
        assert numbers is not None
        experts, weights = choose(
            self._linear(f"{name}.gate", x),
            numbers.per_token,
            score=option.score,
            renormalize=option.renormalize is True,
            scale=numbers.scale,
        )
        y = np.zeros_like(x)
        for e in np.unique(experts):
            tokens, slots = np.nonzero(experts == e)
            gate_up = self.weights[f"{name}.experts.gate_up_proj.weight"][e]
            down = self.weights[f"{name}.experts.down_proj.weight"][e]
            routed = x[tokens]
            self._read(f"{name}.experts.gate_up_proj", routed)
            gate, up = np.split(routed @ gate_up.T, 2, axis=-1)
            inner = activation(gate) * up
            self._read(f"{name}.experts.down_proj", inner)
            given = inner @ down.T
            y[tokens] += weights[tokens, slots][:, None] * given
        if numbers.shared_intermediate_size:
            shared = self._gated(f"{name}.shared_expert", x, activation)
            if option.shared == "gated":
                shared = shared * sigmoid(self._linear(f"{name}.shared_expert_gate", x))
            y = y + shared
        return y


# ---------------------------------------------------------------------------------------------
# transformers


def transformers_missing() -> list[str]:
    """Which of the packages are not installed, without importing them."""
    return [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]


class TransformersReference:
    """The checkpoint's Hugging Face class in float32, on the CPU. Runs no code of a checkpoint."""

    def __init__(
        self,
        config_json: Mapping[str, Any],
        model: Model,
        weights: Weights,
        attention: Attention,
        *,
        where: str,
    ) -> None:
        """config_json: the checkpoint's config.json, which transformers reads by itself.

        Raises:
            EnvironmentLacksError: torch or transformers is missing.
            InputError: transformers refuses the configuration, or its parameters are not ours.
        """
        if missing := transformers_missing():
            raise EnvironmentLacksError(
                f"the reference needs {' and '.join(missing)}, not installed here", hint=REMEDY
            )
        import torch
        from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

        self._torch = torch
        version = importlib.metadata.version
        self.name = f"transformers {version('transformers')}, torch {version('torch')}, float32"
        # Whose keys these are was settled when the parameters were made; auto_map names code.
        drop = ("model_type", "auto_map", "torch_dtype", "dtype", "quantization_config")
        keys = {key: value for key, value in config_json.items() if key not in drop}
        if attention.window is not None:
            keys["sliding_window"] = attention.window
        try:
            config = AutoConfig.for_model(model.arch.name, **keys)
            kind = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
            self._load(kind, config, model, weights, where)
        except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
            raise InputError(f"{where}: transformers cannot build this model: {error}") from error
        context = attention.context if model.config.rope.depends_on_window else None
        if context is not None:
            self._fix_rope(config, context)
        self._again = (kind, config, model, weights, where), context

    def reload(self) -> None:
        """As Reference."""
        (kind, config, model, weights, where), context = self._again
        del self._model  # a large model fits once
        self._load(kind, config, model, weights, where)
        if context is not None:
            self._fix_rope(config, context)

    def _load(self, kind: Any, config: Any, model: Model, weights: Weights, where: str) -> None:
        """Gives the class the checkpoint's tensors; it renames and joins them as it would those of
        a file."""
        torch = self._torch
        with torch.device("meta"):
            shapes = {name: tensor.shape for name, tensor in kind(config).state_dict().items()}
        state = {}
        for name, tensor in published(model.for_tensors(shapes).parameters(), weights):
            shape = shapes.get(name, tensor.shape)
            one_axis = tensor.ndim == 1 and math.prod(shape) == len(tensor)
            state[name] = torch.from_numpy(tensor.reshape(shape) if one_axis else tensor)
        # Fused attention has no caps on scores, and would leave them out without a word.
        capped = model.config.attention_softcap is not None
        with quiet_transformers():
            self._model, report = kind.from_pretrained(
                None,
                config=config,
                state_dict=state,
                dtype=torch.float32,
                attn_implementation="eager" if capped or not kind._supports_sdpa else "sdpa",
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
        self._model.eval()
        differ = sorted({*report["missing_keys"], *report["unexpected_keys"]})
        differ += sorted(name for name, *_ in report["mismatched_keys"])
        if differ:
            raise InputError(
                f"{where}: transformers' {kind.__name__} and the parameter files differ in "
                f"{len(differ)} tensors, first {differ[0]}"
            )

    def _fix_rope(self, config: Any, context: int) -> None:
        """Frequencies as for a text of `context` tokens, at every length, as a library has them."""
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        for rotary in self._model.modules():
            if isinstance(getattr(rotary, "rope_type", None), str):
                compute = ROPE_INIT_FUNCTIONS[rotary.rope_type]
                rotary.inv_freq, rotary.attention_scaling = compute(config, "cpu", seq_len=context)
                rotary.rope_type = "default"  # the others are computed anew at every call

    def logits(self, text: Sequence[int], positions: Sequence[int]) -> Float32:
        """As Reference."""
        torch = self._torch
        ids, keep = torch.tensor([tokens_of(text)]), torch.tensor(list(positions))
        result: Float32 = self._run(keep, input_ids=ids, use_cache=False).logits[0].float().numpy()
        return result

    def _run(self, keep: Any, **inputs: Any) -> Any:
        """The class's output with the logits of some positions; not every class picks by itself."""
        with self._torch.inference_mode():
            if "logits_to_keep" in inspect.signature(self._model.forward).parameters:
                return self._model(**inputs, logits_to_keep=keep)
            out = self._model(**inputs)
            out.logits = out.logits[:, keep]
            return out

    def greedy(self, prompt: Sequence[int], count: int) -> list[int]:
        """As Reference."""
        torch = self._torch
        new, past, found = torch.tensor([list(prompt)]), None, []
        for _ in range(count):
            last = torch.tensor([new.shape[1] - 1])
            out = self._run(last, input_ids=new, past_key_values=past, use_cache=True)
            past, new = out.past_key_values, out.logits.argmax(-1)
            found.append(int(new))
        return found


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Without progress bars and reports on stderr; what matters in them becomes an error."""
    from transformers.utils import logging

    bars, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _class_lacks(model: Model) -> str:
    """What keeps transformers from running an architecture, in words; "" if nothing does."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    name = model.arch.name
    known = name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    return "" if known else f"transformers has no class for {name}"


def make_reference(
    config_json: Mapping[str, Any],
    model: Model,
    weights: Weights,
    attention: Attention,
    *,
    engine: str = "auto",
    where: str,
) -> tuple[Reference, str]:
    """The reference to compare with, and why it is this one ("" where nothing is to be said).

    engine: "auto" is transformers where it is installed and has this kind of attention.

    Raises:
        EnvironmentLacksError: no decoder here can run the model.
        InputError: an unknown engine, or one that does not have the library's attention.
    """
    if engine not in ENGINES:
        raise InputError(
            f"unknown reference engine {engine!r}", hint=f"one of {', '.join(ENGINES)}"
        )
    missing = transformers_missing()
    lacks = "" if missing else _class_lacks(model)
    own = model.config.sliding_window
    same = attention.window == own or (attention.window is None and attention.context <= (own or 0))
    # Hugging Face classes know a shorter window where they know one at all.
    same = (same or (own is not None and attention.window is not None)) and not attention.sink
    if engine == "transformers" or (engine == "auto" and same and not (lacks or missing)):
        if lacks:
            raise InputError(f"{where}: {lacks}", hint="use --engine numpy")
        if not same:
            raise InputError(
                f"{where}: transformers' {model.arch.name} has no window of {attention.window} "
                f"tokens with {attention.sink} sinks, which the library has",
                hint="use --engine numpy",
            )
        return TransformersReference(config_json, model, weights, attention, where=where), ""
    why = ""
    if engine == "auto":
        why = lacks or "its window or sinks are not the checkpoint's"
        if missing and same:
            why = f"{' and '.join(missing)} not installed"
    return NumpyReference(model, weights, attention), why
