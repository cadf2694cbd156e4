"""Which input channels of each weight matter: the second moment of what it is multiplied with.

A quantised weight's error reaches the output of its linear as sum_j dw[n, j] x[j]. With inputs
whose channels are uncorrelated, its mean square is sum_j dw[n, j]^2 E[x[j]^2]; E[x[j]^2] over a
calibration text is the importance of channel j (the "importance matrix" of llama.cpp's imatrix).

- The decoder is `NumpyReference` in float32, over the checkpoint's own weights; sums are float64.
- All windows go through one layer before the next one's weights are read, so memory is one layer
  in float32 (a sparse layer with all its experts), the embedding while it is looked up, and the
  hidden states of the text.
- The same checkpoint, text and machine give the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlc_compile.models.params import ParamSpec
from mlc_compile.models.spec import Model
from mlc_compile.runtime.formulas import Float32, Int64
from mlc_compile.runtime.reference import Attention, NumpyReference, Rows
from mlc_compile.runtime.text_windows import Text, Windows, cut, encode
from mlc_compile.weights.checkpoint import Checkpoint
from mlc_compile.weights.parts import read_parameter

Progress = Callable[[str, int, int], None]

WINDOW = 512
MAX_TOKENS = 16_384
_ROLES = ("linear", "expert", "lm_head")


@dataclass(frozen=True)
class Importance(Mapping[str, Float32]):
    """Mean square of each input channel, float32 [K], by the name of our parameter.

    - Parameters that share an input (q, k and v; gate and up) are one parameter here already.
    - Experts: the tokens routed to any expert of the layer, pooled; [K] for all of them.
    - The embedding has none (its rows are looked up, not multiplied), except where it is the
      output head too: then its input is the final norm's output.
    - A parameter that saw nothing but zeros is left out: it is quantised unweighted.

    text, sha256, tokens, window: what it was measured on.
    """

    channels: Mapping[str, Float32]
    text: str
    sha256: str
    tokens: int
    window: int

    def __getitem__(self, name: str) -> Float32:
        return self.channels[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.channels)

    def __len__(self) -> int:
        return len(self.channels)

    def options(self) -> dict[str, Any]:
        """For manifest.json's options: what decided the values, without paths."""
        return {
            "text": self.text,
            "sha256": self.sha256,
            "tokens": self.tokens,
            "window": self.window,
        }


def importance(
    checkpoint: Checkpoint,
    model: Model,
    text: Text,
    *,
    window: int = WINDOW,
    max_tokens: int | None = MAX_TOKENS,
    progress: Progress | None = None,
) -> Importance:
    """Importance of every packed parameter's input channels over the beginning of `text`.

    text: see `text_windows.read_text`. window: tokens that are read together, at most the model's
    context. max_tokens: how much of the text is read; None is all.

    Raises:
        InputError: no tokenizer, or a text shorter than one window.
    """
    where = f"the tokenizer.json of {checkpoint.path}"
    files = checkpoint.tokenizer_files()
    if "tokenizer.json" not in files:
        checkpoint.tokenizer_json()  # says what there is instead, and what to do
    window = min(window, model.config.max_position_embeddings)
    prefix, tokens = encode(files["tokenizer.json"], text, where)
    windows = cut(prefix, tokens, window, max_tokens=max_tokens, where=text.name)
    sums = moments(checkpoint, model, windows, progress=progress)
    return Importance(
        {name: value for name, value in sums.items() if value.any()},
        text.name,
        text.sha256,
        int(windows.tokens.size),
        window,
    )


def moments(
    checkpoint: Checkpoint, model: Model, windows: Windows, *, progress: Progress | None = None
) -> dict[str, Float32]:
    """Mean square [K] of what each linear, expert and head reads, by parameter name."""
    model = model.for_tensors(checkpoint.tensors)
    weights = _Weights(model, checkpoint)
    size = windows.tokens.shape[1]
    attention = Attention(model.config.sliding_window, 0, size)
    decoder = _Listener(model, weights, attention)
    decoder.run(windows.tokens, progress)
    checkpoint.release()
    head = "model.embed_tokens" if model.config.tie_word_embeddings else "lm_head"
    found = {}
    for spec in model.parameters():
        name = spec.name.removesuffix(".weight")
        if name in decoder.squares and (spec.role in _ROLES or name == head):
            found[spec.name] = (decoder.squares[name] / decoder.rows[name]).astype(np.float32)
    return found


class _Weights(Mapping[str, Float32]):
    """A checkpoint's weights in float32, read when asked for and kept until `drop`."""

    def __init__(self, model: Model, checkpoint: Checkpoint) -> None:
        self._specs: dict[str, ParamSpec] = {spec.name: spec for spec in model.parameters()}
        self._checkpoint = checkpoint
        self._kept: dict[str, Float32] = {}

    def __getitem__(self, name: str) -> Float32:
        if name not in self._kept:
            found = read_parameter(self._specs[name], self._checkpoint)
            self._kept[name] = np.asarray(found, np.float32)
        return self._kept[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._specs)

    def __len__(self) -> int:
        return len(self._specs)

    def drop(self) -> None:
        """Forget what was read so far."""
        self._kept.clear()
        self._checkpoint.release()


class _Listener(NumpyReference):
    """The numpy decoder, summing the squares of what each weight reads."""

    def __init__(self, model: Model, weights: _Weights, attention: Attention) -> None:
        super().__init__(model, weights, attention)
        self._source = weights
        self.squares: dict[str, NDArray[np.float64]] = {}
        self.rows: dict[str, int] = {}

    def _read(self, name: str, x: Float32) -> None:
        added = np.einsum("nk,nk->k", x, x, dtype=np.float64)
        self.squares[name] = self.squares.get(name, 0) + added
        self.rows[name] = self.rows.get(name, 0) + len(x)

    def run(self, windows: NDArray[np.int32], progress: Progress | None) -> None:
        """Every window through one layer after the other; the head itself is not computed."""
        c = self.model.config
        layers, size = c.num_hidden_layers, windows.shape[1]
        at = Rows(np.arange(size), np.zeros(size, np.int64))
        hidden: Sequence[Float32] = [self._embed(_ids(window), at) for window in windows]
        self._source.drop()
        for i in range(layers):
            if progress is not None:
                progress(f"calibrate: layer {i + 1} of {layers}", i, layers)
            hidden = [self._layer(i, x, [], at) for x in hidden]
            self._source.drop()
        head = "model.embed_tokens" if c.tie_word_embeddings else "lm_head"
        for x in hidden:
            self._read(head, self._final(x))
        self._source.drop()
        if progress is not None:
            progress("calibrate", layers, layers)


def _ids(window: NDArray[np.int32]) -> Int64:
    return window.astype(np.int64)
