"""Choose the next token from logits: greedy, temperature, top-p and penalties; seeded.

The steps are those of the MLC runtimes: penalties on the tokens generated so far, softmax with
temperature over the active vocabulary, top-p over the sorted probabilities. A library that exports
the helpers (notes/mlc-format.md, section 4) computes them; otherwise numpy does, which is their
reference.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlc_compile.errors import CheckFailedError, InputError
from mlc_compile.runtime.engine import Library, Logits

HELPERS = (
    "apply_penalty_inplace",
    "softmax_with_temperature",
    "argsort_probs",
    "sample_with_top_p",
)
"""What a library must export to sample with; all of them or none are used."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. The defaults are greedy: the likeliest token each time.

    temperature: 0 is greedy. top_p: sample from the likeliest tokens that make up this probability.
    presence_penalty, frequency_penalty: subtracted from the logit of a generated token, once and
    once per occurrence. repetition_penalty: above 1 makes generated tokens less likely, by factor.

    Raises InputError for a number outside its range.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        ranges = {
            "temperature": ("0 or more", self.temperature >= 0),
            "top_p": ("above 0 and at most 1", 0 < self.top_p <= 1),
            "presence_penalty": ("a number", True),
            "frequency_penalty": ("a number", True),
            "repetition_penalty": ("above 0", self.repetition_penalty > 0),
            "seed": ("0 or more", self.seed >= 0),
        }
        for name, (wanted, holds) in ranges.items():
            value = getattr(self, name)
            if not (holds and math.isfinite(value)):
                raise InputError(f"{name} is {value}, and must be {wanted}")

    @property
    def penalises(self) -> bool:
        """Whether any penalty is set."""
        penalties = (self.presence_penalty, self.frequency_penalty, self.repetition_penalty)
        return penalties != (0.0, 0.0, 1.0)


class Sampler:
    """Chooses the tokens of one reply and remembers them for the penalties.

    active_vocab: ids from here on are padding of the logits and never chosen. library: whose
    helpers are used; numpy in place of those it does not export.
    """

    def __init__(
        self, sampling: Sampling, active_vocab: int, library: Library | None = None
    ) -> None:
        self.sampling = sampling
        self.active_vocab = active_vocab
        self.library = library if library and all(map(library.has, HELPERS)) else None
        self._random = np.random.default_rng(sampling.seed)
        self._counts: dict[int, int] = {}

    def __call__(self, logits: Logits) -> int:
        """The next token after logits f32[vocab].

        Raises CheckFailedError when the logits are not numbers.
        """
        token = self._choose(logits)
        self._counts[token] = self._counts.get(token, 0) + 1
        return token

    def _choose(self, logits: Logits) -> int:
        sampling, library = self.sampling, self.library
        # argmax finds a NaN first, so this one look covers every logit.
        best = int(np.argmax(logits[: self.active_vocab]))
        if not np.isfinite(logits[best]):
            raise CheckFailedError(
                f"the library's logits are not numbers (token {best}: {logits[best]})",
                hint="compare it with the model: mlc_compile verify",
            )
        if sampling.penalises and self._counts:
            if library:
                logits = penalise_by_library(logits, self._counts, sampling, library)
            else:
                logits = penalise_by_numpy(logits, self._counts, sampling)
            best = int(np.argmax(logits[: self.active_vocab]))
        if sampling.temperature == 0:
            return best
        uniform = float(self._random.random(dtype=np.float32))
        if library:
            return sample_by_library(logits, sampling, uniform, library)
        return sample_by_numpy(logits[: self.active_vocab], sampling, uniform)


def penalise_by_numpy(logits: Logits, counts: Mapping[int, int], sampling: Sampling) -> Logits:
    """Logits with the penalties on the tokens in `counts` (token -> occurrences).

    As apply_penalty_inplace: subtract, then divide a positive logit by the repetition penalty and
    multiply a negative one.
    """
    tokens = np.fromiter(counts, np.int64)
    times = np.fromiter(counts.values(), np.float32)
    changed = logits.copy()
    values = changed[tokens] - (sampling.presence_penalty + times * sampling.frequency_penalty)
    factor = sampling.repetition_penalty
    changed[tokens] = np.where(values < 0, values * factor, values / factor)
    return changed


def sample_by_numpy(logits: Logits, sampling: Sampling, uniform: float) -> int:
    """The token that `uniform` in [0, 1) falls on, in order of probability, top-p applied."""
    scaled = logits.astype(np.float64) / sampling.temperature
    probs = np.exp(scaled - scaled.max())
    order = np.argsort(-probs, kind="stable")
    mass = np.cumsum(probs[order])
    # The token that reaches top_p is the last one in.
    last = int(np.searchsorted(mass, sampling.top_p * mass[-1]))
    last = min(last, len(mass) - 1)
    at = int(np.searchsorted(mass[: last + 1], uniform * mass[last], side="right"))
    return int(order[min(at, last)])


def penalise_by_library(
    logits: Logits, counts: Mapping[int, int], sampling: Sampling, library: Library
) -> Logits:
    """penalise_by_numpy, computed by the library."""
    tensor = library.tensor(logits.reshape(1, -1))
    penalties = [
        sampling.presence_penalty,
        sampling.frequency_penalty,
        sampling.repetition_penalty,
    ]
    _helper(library, "apply_penalty_inplace")(
        tensor,
        library.tensor(np.zeros(1, np.int32)),  # logits row of each sequence: there is one
        library.tensor(np.zeros(len(counts), np.int32)),  # sequence of each token
        library.tensor(np.fromiter(counts, np.int32)),
        library.tensor(np.fromiter(counts.values(), np.int32)),
        library.tensor(np.asarray([penalties], np.float32)),
    )
    changed: NDArray[Any] = tensor.numpy()
    return changed.reshape(-1)


def sample_by_library(logits: Logits, sampling: Sampling, uniform: float, library: Library) -> int:
    """sample_by_numpy, computed by the library, which knows the active vocabulary itself."""
    tensor = library.tensor
    probs = _helper(library, "softmax_with_temperature")(
        tensor(logits.reshape(1, 1, -1)), tensor(np.asarray([sampling.temperature], np.float32))
    )
    ordered, order = _helper(library, "argsort_probs")(probs._create_view([1, len(logits)]))
    token = _helper(library, "sample_with_top_p")(
        ordered,
        order,
        tensor(np.asarray([uniform], np.float32)),
        tensor(np.zeros(1, np.int32)),  # probability row of each sample: there is one
        tensor(np.asarray([sampling.top_p], np.float32)),
    )
    return int(token.numpy()[0])


def _helper(library: Library, name: str) -> Any:
    """An exported function. Those in place are kernels, in a module that the VM's imports."""
    return library.vm.module.get_function(name, query_imports=True)
