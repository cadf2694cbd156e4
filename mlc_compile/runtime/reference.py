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

import importlib.metadata
import importlib.util
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from mlc_compile.errors import EnvironmentLacksError, InputError
from mlc_compile.models.spec import GatedMLP, GroupedQuery, Model, ParamSpec, RMSNorm
from mlc_compile.quantization.group import dequantize, narrow
from mlc_compile.quantization.policy import is_quantized, stored_layout, stored_params
from mlc_compile.quantization.scheme import QuantScheme
from mlc_compile.weights.checkpoint import Checkpoint
from mlc_compile.weights.tensor_cache import TensorCache, open_tensor_cache

Float32: TypeAlias = NDArray[np.float32]
Weights: TypeAlias = Mapping[str, Float32]
"""float32 weights by the name of their ParamSpec (q, k, v in one, gate and up in one)."""

ENGINES = ("auto", "transformers", "numpy")
REMEDY = "pip install 'mlc-compile[reference]', or use --engine numpy"

CUT = -1
"""Where a call begins in a text. Without sinks it makes no difference how a text is cut.

The runtime numbers the tokens of a slid window anew before each call: sinks first, then the tokens
that are left, then those of the call. So a sink is seen as far away as if what has slid out before
this call had never been, and the next call sees it at another distance."""

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
    return {spec.name: _stored(spec, scheme, cache) for spec in model.parameters()}


def _stored(spec: ParamSpec, scheme: QuantScheme, cache: TensorCache) -> Float32:
    tensors = [cache.tensor(stored.name) for stored in stored_params(spec, scheme)]
    if not is_quantized(spec, scheme):
        return np.array(tensors[0], np.float32)
    words, scales = tensors
    layout = stored_layout(spec, scheme)
    whole = dequantize(words, scales, scheme, spec.shape[1], layout=layout)
    return whole.astype(np.float32, copy=False)


def checkpoint_weights(model: Model, checkpoint: Checkpoint) -> dict[str, Float32]:
    """The checkpoint's own weights."""
    return {
        spec.name: np.concatenate(
            [np.asarray(checkpoint.read(source), np.float32) for source in spec.sources]
        )
        for spec in model.for_tensors(checkpoint.tensors).parameters()
    }


def roughen(weights: Weights, unit: float, seed: int) -> None:
    """Multiplies every weight, in place, by 1 + x with a random x in (-unit, unit)."""
    rng = np.random.default_rng(seed)
    for weight in weights.values():
        for row in weight if weight.ndim > 1 else weight[None]:
            row *= 1 + np.float32(unit) * (2 * rng.random(row.shape, np.float32) - 1)


@dataclass(frozen=True)
class ParameterCheck:
    """How the stored weights relate to the checkpoint's.

    Attributes:
        compared: parameters.
        exact: those that equal the checkpoint's, rounded to the model dtype, bit for bit.
        worst_steps: the largest deviation of a packed weight, in steps of its group's scale;
            rounding to the nearest step gives 0.5.
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


# Half a step, and what rounding weight, quotient and scale to the model dtype adds: at most 0.11
# steps for 8 bits in float16, where quotients reach 254 and are apart by 0.125.
MAX_STEPS = 0.75
# A scale below the model dtype's smallest number is stored as 0, and its group with it.
_SMALLEST = {"float16": 2.0**-24, "bfloat16": 2.0**-133, "float32": 2.0**-149}


def check_parameters(
    model: Model, scheme: QuantScheme, directory: Path, checkpoint: Checkpoint
) -> ParameterCheck:
    """Whether the parameter files are a conversion of `checkpoint`.

    Plain tensors must equal the checkpoint's to the bit; packed ones lie within MAX_STEPS.
    """
    cache = open_tensor_cache(directory)
    exact, worst, faults = 0, 0.0, []
    specs = model.for_tensors(checkpoint.tensors).parameters()
    for spec in specs:
        parts = [checkpoint.read(source) for source in spec.sources]
        original = np.concatenate(parts) if len(parts) > 1 else parts[0]
        if original.shape != spec.shape:
            faults.append(f"{spec.name}: shape {list(original.shape)} in {checkpoint.path}")
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
        steps = _steps_apart(spec, scheme, cache, np.asarray(original, np.float32))
        worst = max(worst, steps)
        if not steps <= MAX_STEPS:
            faults.append(f"{spec.name}: {steps:.3g} quantisation steps apart")
    checkpoint.release()
    return ParameterCheck(len(specs), exact, worst, tuple(faults))


def _steps_apart(
    spec: ParamSpec, scheme: QuantScheme, cache: TensorCache, original: Float32
) -> float:
    """The largest |stored - original| over its group's scale."""
    scales = np.asarray(cache.tensor(stored_params(spec, scheme)[1].name), np.float32)
    if stored_layout(spec, scheme) == "KN":
        scales = scales.T
    apart = np.abs(_stored(spec, scheme, cache) - original)
    apart -= scheme.max_int * _SMALLEST[scheme.model_dtype]
    n, k = original.shape
    padded = np.zeros((n, scales.shape[1] * scheme.group_size), np.float32)
    padded[:, :k] = apart
    largest = padded.reshape(n, -1, scheme.group_size).max(axis=2)
    with np.errstate(divide="ignore", invalid="ignore"):
        steps = np.where(largest <= 0, 0, largest / scales)
    return float(steps.max())


# ---------------------------------------------------------------------------------------------
# Our own decoder


class NumpyReference:
    """The Llama family in numpy, float32: RMSNorm, RoPE, grouped queries, gated MLP.

    Serves every registered architecture; `supports` says so of one.
    """

    name = "numpy, float32"

    def __init__(self, model: Model, weights: Weights, attention: Attention) -> None:
        self.model = model
        self.weights = weights
        self.attention = attention
        self.inv_freq, self.rope_factor = model.config.rope.table(attention.context)

    @staticmethod
    def supports(model: Model) -> bool:
        """Whether every part of the architecture is one that is built here."""
        parts = (model.arch.attention, model.arch.mlp, model.arch.norm)
        known = [type(part) for part in parts] == [GroupedQuery, GatedMLP, RMSNorm]
        return known and model.config.rope.rotary_dim == model.config.head_dim

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

    def visible(self, queries: NDArray[np.int64], keys: NDArray[np.int64]) -> NDArray[np.bool_]:
        """[n, m]: which key positions each query position attends."""
        back = queries[:, None] - keys[None, :]
        mask = back >= 0
        if self.attention.window is not None:
            near = back < self.attention.window - self.attention.sink
            mask &= near | (keys < self.attention.sink)[None, :]
        return mask

    def _linear(self, name: str, x: Float32) -> Float32:
        y = x @ self.weights[f"{name}.weight"].T
        bias = self.weights.get(f"{name}.bias")
        return y if bias is None else y + bias

    def _norm(self, name: str, x: Float32) -> Float32:
        mean = np.mean(np.square(x), axis=-1, keepdims=True, dtype=np.float32)
        scale = 1 / np.sqrt(mean + np.float32(self.model.config.norm_eps))
        return x * scale.astype(np.float32) * self.weights[f"{name}.weight"]

    def _rotate(self, x: Float32, positions: NDArray[np.int64]) -> Float32:
        """x [n, heads, d]; dimension i rotates with i + d / 2."""
        angle = positions.astype(np.float32)[:, None, None] * self.inv_freq
        cos = np.cos(angle) * np.float32(self.rope_factor)
        sin = np.sin(angle) * np.float32(self.rope_factor)
        a, b = np.split(x, 2, axis=-1)
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)

    def _hidden(
        self,
        tokens: NDArray[np.int64],
        past: list[tuple[Float32, Float32]],
        calls: NDArray[np.int64],
    ) -> Float32:
        """[n, hidden] after the final norm.

        past: each layer's keys (not rotated) and values; grows.
        calls: how many tokens there were before the call that each token came with.
        """
        start = len(past[0][0]) if past else 0
        positions = np.arange(start, start + len(tokens))
        x = self.weights["model.embed_tokens.weight"][tokens]
        for i in range(self.model.config.num_hidden_layers):
            layer = f"model.layers.{i}"
            y = self._norm(f"{layer}.input_layernorm", x)
            q, k, v = self._project(f"{layer}.self_attn", y)
            if start:
                k, v = (np.concatenate(pair) for pair in zip(past[i], (k, v), strict=True))
            past[i : i + 1] = [(k, v)]
            y = self._attend(self._rotate(q, positions), k, v, positions, calls)
            x = x + self._linear(f"{layer}.self_attn.o_proj", y)
            y = self._norm(f"{layer}.post_attention_layernorm", x)
            gate, up = np.split(self._linear(f"{layer}.mlp.gate_up_proj", y), 2, axis=-1)
            silu = gate / (1 + np.exp(-np.clip(gate, -80, None)))  # exp(80) is still finite
            x = x + self._linear(f"{layer}.mlp.down_proj", silu * up)
        return self._norm("model.norm", x)

    def _project(self, name: str, x: Float32) -> tuple[Float32, Float32, Float32]:
        """q [n, query heads, d], k and v [n, kv heads, d]."""
        c = self.model.config
        heads = c.num_attention_heads + 2 * c.num_key_value_heads
        qkv = self._linear(f"{name}.qkv_proj", x).reshape(len(x), heads, c.head_dim)
        ends = [c.num_attention_heads, c.num_attention_heads + c.num_key_value_heads]
        q, k, v = np.split(qkv, ends, axis=1)
        if self.model.arch.attention.qk_norm:
            q, k = self._norm(f"{name}.q_norm", q), self._norm(f"{name}.k_norm", k)
        return q, k, v

    def _attend(
        self,
        q: Float32,
        k: Float32,
        v: Float32,
        positions: NDArray[np.int64],
        calls: NDArray[np.int64],
    ) -> Float32:
        """[n, query heads * d] of rotated queries and keys that are not rotated yet."""
        n, heads, d = q.shape
        groups = k.shape[1]
        # One batch of matrices for each KV head: its query heads stand below one another.
        q = q.reshape(n, groups, heads // groups, d).transpose(1, 2, 0, 3) * np.float32(d**-0.5)
        values = v.transpose(1, 0, 2)[:, None]
        everywhere = np.arange(len(k))
        keys = self._rotate(k, everywhere)
        out = np.empty((n, heads, d), np.float32)
        for rows in self._blocks(calls):
            if self.attention.sink:
                sinks = everywhere[: self.attention.sink]
                keys[sinks] = self._rotate(k[sinks], sinks + self._gone(int(calls[rows.start])))
            score = q[:, :, rows] @ keys.transpose(1, 2, 0)[:, None]
            hidden = ~self.visible(positions[rows], everywhere)
            np.copyto(score, np.float32(-np.inf), where=hidden)
            score -= score.max(axis=-1, keepdims=True)
            np.exp(score, out=score)
            score /= score.sum(axis=-1, keepdims=True)
            out[rows] = (score @ values).transpose(2, 0, 1, 3).reshape(-1, heads, d)
        return out.reshape(n, heads * d)

    def _gone(self, before: int) -> int:
        """How many tokens have slid out when a call begins with `before` tokens."""
        return max(before - (self.attention.window or before), 0)

    def _blocks(self, calls: NDArray[np.int64]) -> Iterator[slice]:
        """Rows worked on at once; with sinks, of one call."""
        starts = [0]
        if self.attention.sink:
            starts += [i for i in range(1, len(calls)) if calls[i] != calls[i - 1]]
        for start, end in itertools.pairwise([*starts, len(calls)]):
            for first in range(start, end, _QUERY_BLOCK):
                yield slice(first, min(end, first + _QUERY_BLOCK))

    def _head(self, hidden: Float32) -> Float32:
        name = "model.embed_tokens" if self.model.config.tie_word_embeddings else "lm_head"
        return hidden @ self.weights[f"{name}.weight"].T


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
        from transformers import AutoConfig, AutoModelForCausalLM

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
            self._model = AutoModelForCausalLM.from_config(
                config, dtype=torch.float32, attn_implementation="sdpa", trust_remote_code=False
            ).eval()
        except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
            raise InputError(f"{where}: transformers cannot build this model: {error}") from error
        self._load(model, weights, where)
        if model.config.rope.depends_on_window:
            self._fix_rope(config, attention.context)

    def _load(self, model: Model, weights: Weights, where: str) -> None:
        state = self._model.state_dict()
        loaded = {
            name: self._torch.from_numpy(part)
            for name, part in _split(model, weights, {n: t.shape[0] for n, t in state.items()})
        }
        tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
        differ = sorted((state.keys() - tied) ^ loaded.keys())
        differ += sorted(n for n, t in loaded.items() if n in state and state[n].shape != t.shape)
        if differ:
            raise InputError(
                f"{where}: transformers' {type(self._model).__name__} and the parameter files "
                f"differ in {len(differ)} tensors, first {differ[0]}"
            )
        self._model.load_state_dict(loaded, strict=False, assign=True)
        self._model.tie_weights()

    def _fix_rope(self, config: Any, context: int) -> None:
        """Frequencies as for a text of `context` tokens, at every length, as a library has them."""
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        rotary = self._model.model.rotary_emb
        compute = ROPE_INIT_FUNCTIONS[rotary.rope_type]
        rotary.inv_freq, rotary.attention_scaling = compute(config, "cpu", seq_len=context)
        rotary.rope_type = "default"  # the others are computed anew at every call

    def logits(self, text: Sequence[int], positions: Sequence[int]) -> Float32:
        """As Reference."""
        torch = self._torch
        ids, keep = torch.tensor([tokens_of(text)]), torch.tensor(list(positions))
        with torch.inference_mode():
            out = self._model(input_ids=ids, use_cache=False, logits_to_keep=keep).logits
        result: Float32 = out[0].float().numpy()
        return result

    def greedy(self, prompt: Sequence[int], count: int) -> list[int]:
        """As Reference."""
        torch = self._torch
        new, past, found = torch.tensor([list(prompt)]), None, []
        with torch.inference_mode():
            for _ in range(count):
                out = self._model(
                    input_ids=new, past_key_values=past, use_cache=True, logits_to_keep=1
                )
                past, new = out.past_key_values, out.logits[:, -1:].argmax(-1)
                found.append(int(new))
        return found


def _split(
    model: Model, weights: Weights, rows: Mapping[str, int]
) -> Iterator[tuple[str, Float32]]:
    """The checkpoint's tensors out of ours; `rows` has the extent of axis 0 of each."""
    for spec in model.parameters():
        start = 0
        for source in spec.sources:
            end = start + rows.get(source, spec.shape[0])
            yield source, weights[spec.name][start:end]
            start = end


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
    own = model.config.sliding_window
    same = attention.window == own or (attention.window is None and attention.context <= (own or 0))
    # Hugging Face classes know a shorter window where they know one at all.
    same = (same or (own is not None and attention.window is not None)) and not attention.sink
    if engine == "transformers" or (engine == "auto" and same and not missing):
        if not same:
            raise InputError(
                f"{where}: transformers' {model.arch.name} has no window of {attention.window} "
                f"tokens with {attention.sink} sinks, which the library has",
                hint="use --engine numpy",
            )
        return TransformersReference(config_json, model, weights, attention, where=where), ""
    if not NumpyReference.supports(model):
        raise EnvironmentLacksError(
            f"the reference for {model.arch.name} needs transformers, not installed here",
            hint="pip install 'mlc-compile[reference]'",
        )
    why = ""
    if engine == "auto":
        why = "its window or sinks are not the checkpoint's"
        if same:
            why = f"{' and '.join(missing)} not installed"
    return NumpyReference(model, weights, attention), why
