"""The sampling helpers of the library ABI in numpy and float64, and inputs for them."""

from __future__ import annotations

import numpy as np

LOWEST = np.finfo(np.float32).min

# Two draft trees of six nodes: root with children 1, 2, 3; 4 and 5 under 1.
FIRST_CHILD = np.int32([1, 4, -1, -1, -1, -1, 7, 10, -1, -1, -1, -1])
NEXT_SIBLING = np.int32([-1, 2, 3, -1, 5, -1, -1, 8, 9, -1, 11, -1])


def random_probs(vocab: int, batch: int, seed: int = 0, scale: float = 3.0) -> np.ndarray:
    logits = np.random.default_rng(seed).standard_normal((batch, vocab)) * scale
    e = np.exp(logits - logits.max(-1, keepdims=True))
    return (e / e.sum(-1, keepdims=True)).astype(np.float32)


def sort(probs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    order = np.argsort(-probs, axis=-1, kind="stable").astype(np.int32)
    return np.take_along_axis(probs, order, -1), order


def reference_softmax(logits: np.ndarray, temperature: np.ndarray, active: int) -> np.ndarray:
    out = np.zeros(logits.shape, np.float64)
    for i, t in enumerate(temperature.astype(np.float64)):
        x = logits[i, 0, :active].astype(np.float64)
        if t <= 1e-5:
            out[i, 0, x.argmax()] = 1
            continue
        e = np.exp((x - x.max()) / t)
        out[i, 0, :active] = e / e.sum()
    return out


def reference_penalties(
    logits: np.ndarray,
    seq_ids: np.ndarray,
    position: np.ndarray,
    tokens: np.ndarray,
    count: np.ndarray,
    penalties: np.ndarray,
) -> np.ndarray:
    out = logits.astype(np.float64)
    for p, t, c in zip(position, tokens, count, strict=True):
        presence, frequency, repetition = penalties[p].astype(np.float64)
        x = out[seq_ids[p], t] - presence - c * frequency
        out[seq_ids[p], t] = x * repetition if x < 0 else x / repetition
    return out


def reference_bitmask(logits: np.ndarray, seq_ids: np.ndarray, bitmask: np.ndarray) -> np.ndarray:
    vocab = logits.shape[1]
    bits = np.unpackbits(bitmask.view(np.uint8), axis=1, bitorder="little")[:, :vocab]
    out = logits.copy()
    out[seq_ids] = np.where(bits[seq_ids] == 1, logits[seq_ids], LOWEST)
    return out


def nucleus(sorted_row: np.ndarray, top_p: float) -> int:
    """Tokens in the shortest prefix whose mass reaches top_p."""
    if top_p >= 1:
        return len(sorted_row)
    cumulative = np.cumsum(sorted_row.astype(np.float64))
    return min(int(np.searchsorted(cumulative, top_p)) + 1, len(sorted_row))


def inverse_cdf(weights: np.ndarray, u: float) -> int:
    """First index whose cumulative sum exceeds u times the total."""
    cumulative = np.cumsum(weights.astype(np.float64))
    return int(np.searchsorted(cumulative, u * cumulative[-1], side="right"))


def reference_verify(
    draft: np.ndarray,
    tokens: np.ndarray,
    model: np.ndarray,
    first_child: np.ndarray,
    next_sibling: np.ndarray,
    uniform: np.ndarray,
    parent_ptr: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    model, parent_ptr = model.astype(np.float64), parent_ptr.copy()
    for b, root in enumerate(parent_ptr):
        parent, child = root, first_child[root]
        while child != -1:
            token = tokens[child]
            accepted = model[parent, token] >= uniform[child] * draft[child, token]
            if not accepted:
                rest = np.maximum(model[parent] - draft[child], 0)
                accepted = rest.sum() < 1e-7
            if accepted:
                parent, child = child, first_child[child]
            else:
                model[parent] = rest / rest.sum()
                child = next_sibling[child]
        parent_ptr[b] = parent
    return model, parent_ptr
