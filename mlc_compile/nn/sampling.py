"""The sampling helpers of the library ABI: the one place that fixes names, shapes and dtypes.

A target brings the kernels; the exported functions are the same everywhere. Source of the ABI:
MLC's exported functions, which web-llm and the MLC engine call by these names.

Notable features
- A function without outputs is a public PrimFunc that changes its first argument.
- A kernel takes the function's inputs, then its outputs. Buffers after those are workspaces:
  allocated by relax, hence part of the memory plan, and dropped.
- The vocabulary size is a constant of the library; a tensor of another width is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from tvm import IRModule, relax, tirx

VOCAB = "vocab_size"
BITMASK_WORDS = "bitmask_words"
# The symbolic extents (int64) that callers vary, by the names the memory planner bounds:
# batch_size rows of logits, num_samples draws, num_positions reported top probabilities,
# num_seqs sequences, num_tokens (sequence, token) pairs, num_nodes and num_rows rows of a tree.
Dimension = str | int


@dataclass(frozen=True)
class TensorSpec:
    name: str
    shape: tuple[Dimension, ...]
    dtype: str


@dataclass(frozen=True)
class SamplingFunction:
    """`inplace` indexes the inputs that the function changes and, in that order, returns."""

    name: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...] = ()
    inplace: tuple[int, ...] = ()


class SamplingKernels(Protocol):
    """A target's kernels: `name` is that of a SamplingFunction. Scheduled, destination-passing."""

    def __call__(self, name: str, *, vocab_size: int, active_vocab_size: int) -> tirx.PrimFunc: ...


def _f32(name: str, *shape: Dimension) -> TensorSpec:
    return TensorSpec(name, shape, "float32")


def _i32(name: str, *shape: Dimension) -> TensorSpec:
    return TensorSpec(name, shape, "int32")


_LOGITS = _f32("logits", "batch_size", VOCAB)
_PROBS = _f32("probs", "batch_size", VOCAB)
_SORTED_INDICES = _i32("sorted_indices", "batch_size", VOCAB)
_UNIFORM = _f32("uniform_samples", "num_samples")
_SAMPLE_INDICES = _i32("sample_indices", "num_samples")
_POS2SEQ = _i32("pos2seq_id", "num_tokens")
_TOKENS = _i32("token_ids", "num_tokens")

SAMPLING_FUNCTIONS: Mapping[str, SamplingFunction] = {
    f.name: f
    for f in (
        # softmax(logits / temperature) over the active ids, 0 elsewhere. A temperature up to 1e-5
        # puts all mass on the first largest logit.
        SamplingFunction(
            "softmax_with_temperature",
            (_f32("logits", "batch_size", 1, VOCAB), _f32("temperature", "batch_size")),
            (_f32("probs", "batch_size", 1, VOCAB),),
        ),
        # logits[pos2seq_id[i], token_ids[i]] += logit_bias[i]
        SamplingFunction(
            "apply_logit_bias_inplace",
            (_LOGITS, _POS2SEQ, _TOKENS, _f32("logit_bias", "num_tokens")),
        ),
        # With s = pos2seq_id[i], (presence, frequency, repetition) = penalties[s] and
        # x = logits[seq_ids[s], token_ids[i]] - presence - token_cnt[i] * frequency:
        # x * repetition when x < 0, else x / repetition.
        SamplingFunction(
            "apply_penalty_inplace",
            (
                _LOGITS,
                _i32("seq_ids", "num_seqs"),
                _POS2SEQ,
                _TOKENS,
                _i32("token_cnt", "num_tokens"),
                _f32("penalties", "num_seqs", 3),
            ),
        ),
        # Row r = seq_ids[i]: tokens whose bit is 0 in bitmask[r] get the lowest float32.
        SamplingFunction(
            "apply_bitmask_inplace",
            (
                _LOGITS,
                _i32("seq_ids", "num_seqs"),
                _i32("bitmask", "batch_size", BITMASK_WORDS),
            ),
        ),
        # Descending; equal values keep the order of their ids.
        SamplingFunction(
            "argsort_probs",
            (_PROBS,),
            (_f32("sorted_probs", "batch_size", VOCAB), _SORTED_INDICES),
        ),
        # From row sample_indices[i]: the shortest prefix whose mass reaches top_p (at least one
        # token; all of them from 1 on), then the first id whose cumulative share exceeds uniform.
        SamplingFunction(
            "sample_with_top_p",
            (
                _f32("sorted_probs", "batch_size", VOCAB),
                _SORTED_INDICES,
                _UNIFORM,
                _SAMPLE_INDICES,
                _f32("top_p", "batch_size"),
            ),
            (_i32("sampled", "num_samples"),),
        ),
        # The first id of row sample_indices[i] whose cumulative probability exceeds uniform[i].
        SamplingFunction(
            "multinomial_from_uniform",
            (_PROBS, _UNIFORM, _SAMPLE_INDICES),
            (_i32("sampled", "num_samples"),),
        ),
        # The sampled tokens' probabilities, then probability and id at the given flat offsets
        # (row * vocab_size + rank) into the sorted order.
        SamplingFunction(
            "sampler_take_probs",
            (
                _f32("unsorted_probs", "batch_size", VOCAB),
                _SORTED_INDICES,
                _SAMPLE_INDICES,
                _i32("sampling_results", "num_samples"),
                _i32("top_prob_offsets", "num_positions"),
            ),
            (
                _f32("sampled_values", "num_samples"),
                _f32("top_prob_probs", "num_positions"),
                _i32("top_prob_indices", "num_positions"),
            ),
        ),
        # probs / mass where probs >= pivot, else 0: the largest pivot whose mass reaches top_p.
        # init_pivots are hints for a search; a kernel may ignore them.
        SamplingFunction(
            "renormalize_by_top_p",
            (_PROBS, _f32("top_p", "batch_size"), _f32("init_pivots", "batch_size", 3)),
            (_f32("renormalized", "batch_size", VOCAB),),
        ),
        # Walks each draft tree from parent_ptr: accepts a child when uniform * draft <= model,
        # else takes max(model - draft, 0), renormalised, as the parent's model_probs and tries the
        # next sibling. Changes model_probs and parent_ptr (the last accepted node).
        SamplingFunction(
            "sampler_verify_draft_tokens",
            (
                _f32("draft_probs", "num_nodes", VOCAB),
                _i32("draft_tokens", "num_nodes"),
                _f32("model_probs", "num_nodes", VOCAB),
                _i32("token_tree_first_child", "num_nodes"),
                _i32("token_tree_next_sibling", "num_nodes"),
                _f32("uniform_samples", "num_nodes"),
                _i32("token_tree_parent_ptr", "batch_size"),
            ),
            inplace=(2, 6),
        ),
        # dst[indices[i]] = src[i]
        SamplingFunction(
            "scatter_probs",
            (
                _f32("src", "batch_size", VOCAB),
                _i32("indices", "batch_size"),
                _f32("dst", "num_rows", VOCAB),
            ),
        ),
        # dst[i] = src[indices[i]]
        SamplingFunction(
            "gather_probs",
            (
                _f32("src", "num_rows", VOCAB),
                _i32("indices", "batch_size"),
                _f32("dst", "batch_size", VOCAB),
            ),
        ),
    )
}


class _Types:
    """Relax types of one function: equal names are equal variables."""

    def __init__(self, vocab_size: int) -> None:
        self._dimensions: dict[str, Any] = {
            VOCAB: vocab_size,
            BITMASK_WORDS: (vocab_size + 31) // 32,
        }

    def dimension(self, name: Dimension) -> Any:
        if isinstance(name, int):
            return name
        return self._dimensions.setdefault(name, tirx.Var(name, "int64"))

    def __getitem__(self, spec: TensorSpec) -> relax.TensorType:
        return relax.TensorType([self.dimension(d) for d in spec.shape], spec.dtype)


def _workspaces(
    name: str, kernel: tirx.PrimFunc, tensors: tuple[TensorSpec, ...], types: _Types
) -> list[relax.TensorType]:
    """Types of the kernel's buffers after `tensors`; also checks that those are what it takes.

    A workspace's extents are constants or symbols of the kernel's inputs.

    Raises:
        ValueError: the kernel's parameters are not the function's.
    """
    symbols: dict[Any, Any] = {}
    for spec, parameter in zip(tensors, kernel.params, strict=False):
        expected = [types.dimension(d) for d in spec.shape]
        matches = str(parameter.dtype) == spec.dtype and len(parameter.shape) == len(expected)
        for extent, want in zip(parameter.shape, expected, strict=False):
            if isinstance(extent, tirx.Var):
                # One symbol of the kernel must stand for one extent of the function.
                matches = matches and symbols.setdefault(extent, want) is want
            else:
                matches = matches and isinstance(want, int) and int(extent) == want
        if not matches:
            raise ValueError(f"{name}: parameter {parameter} is not {spec}")
    if len(kernel.params) < len(tensors):
        raise ValueError(f"{name}: {len(kernel.params)} parameters, not {len(tensors)}")
    return [
        relax.TensorType(
            [symbols[e] if isinstance(e, tirx.Var) else int(e) for e in buffer.shape],
            str(buffer.dtype),
        )
        for buffer in kernel.params[len(tensors) :]
    ]


def attach_sampling(
    mod: IRModule, kernels: SamplingKernels, *, vocab_size: int, active_vocab_size: int
) -> IRModule:
    """`mod` with every function of SAMPLING_FUNCTIONS added.

    vocab_size: the width V of logits and probabilities. active_vocab_size: ids from here on are
    padding and never sampled, 1 <= active_vocab_size <= vocab_size.

    Raises:
        ValueError: a size out of range, or a kernel that does not fit its function.
    """
    if not 1 <= active_vocab_size <= vocab_size:
        raise ValueError(f"active_vocab_size {active_vocab_size} is not in 1..{vocab_size}")
    builder = relax.BlockBuilder(mod)
    for function in SAMPLING_FUNCTIONS.values():
        kernel = kernels(function.name, vocab_size=vocab_size, active_vocab_size=active_vocab_size)
        types = _Types(vocab_size)
        workspaces = _workspaces(function.name, kernel, function.inputs + function.outputs, types)
        if not function.outputs and not function.inplace:
            if workspaces:
                raise ValueError(f"{function.name}: a function in place cannot have workspaces")
            public = kernel.with_attr("global_symbol", function.name)
            builder.add_func(public, function.name)
            continue
        arguments = [relax.Var(spec.name, types[spec]) for spec in function.inputs]
        with builder.function(function.name, arguments):
            with builder.dataflow():
                callee = builder.add_func(kernel, f"{function.name}_kernel")
                if function.inplace:
                    out = [types[function.inputs[i]] for i in function.inplace]
                    result = relax.op.call_tir_inplace(
                        callee, arguments, list(function.inplace), out
                    )
                else:
                    out = [types[spec] for spec in function.outputs]
                    all_types = out + workspaces
                    result = relax.call_tir(
                        callee, arguments, out_ty=all_types if len(all_types) > 1 else out[0]
                    )
                if workspaces:
                    buffers = builder.emit(result)
                    kept = [buffers[i] for i in range(len(out))]
                    result = relax.Tuple(kept) if len(kept) > 1 else kept[0]
                output = builder.emit_output(result)
            builder.emit_func_output(output)
    return builder.get()
