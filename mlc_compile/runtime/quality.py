"""What quantisation costs: a reference and quantised models on a text, through compiled libraries.

- Teacher-forced in windows (text_windows.py); the second half of each is scored, as llama.cpp's
  perplexity tool does it: the token at each place is predicted from at least half a window.
- Reference and candidates go through each window side by side, in blocks of positions, so that no
  logits are kept: memory is the weights and caches, and two blocks of [positions, vocab].
- Where the weights of all candidates do not fit beside one another (`memory`), they run in groups,
  and the reference again with each group; its figures are taken from the first.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np

from mlc_compile.errors import InputError
from mlc_compile.manifest import tool_versions
from mlc_compile.runtime.bench import machine
from mlc_compile.runtime.engine import Engine
from mlc_compile.runtime.quality_build import Subject, tensor_errors
from mlc_compile.runtime.quality_report import ModelQuality, QualityReport, ReferenceQuality
from mlc_compile.runtime.quality_stats import (
    Float32,
    Positions,
    compare_logits,
    mean,
    perplexity,
    summarize,
)
from mlc_compile.runtime.text_windows import Text, Windows, cut, encode
from mlc_compile.runtime.threads import pinned_caller

Progress = Callable[[str, int, int], None]

WINDOW = 512
_BLOCK_ELEMENTS = 1 << 23  # float32 logits of one block: 32 MB


class Scorer(Protocol):
    """A model that reads one text at a time.

    vocab: width of its logits. block: the most tokens that `logits` takes at once.
    """

    vocab: int
    block: int

    def begin(self, tokens: Sequence[int]) -> None:
        """A new text, whose first tokens need no logits."""

    def logits(self, tokens: Sequence[int]) -> Float32:
        """[n, vocab] after each of the next tokens."""

    def end(self) -> None:
        """Forget the text."""


class EngineScorer:
    """A compiled library with its parameters."""

    def __init__(self, subject: Subject, window: int) -> None:
        """Raises InputError when the two do not belong together or have no room for a window."""
        self.engine = Engine.load(subject.library, subject.directory, max_batch=1)
        if self.engine.context < window:
            raise InputError(
                f"{subject.library} has room for {self.engine.context} tokens, less than one "
                f"window of {window}",
                hint="ask for a smaller --window, or leave --lib out",
            )
        self.vocab = int(subject.model.config.vocab_size)
        self.block = self.engine.chunk
        self.engine.start_pool()

    def begin(self, tokens: Sequence[int]) -> None:
        """As Scorer."""
        self.engine.add_sequence(0)
        self.engine.prefill(0, tokens)

    def logits(self, tokens: Sequence[int]) -> Float32:
        """As Scorer."""
        return self.engine.verify_tokens(0, tokens)

    def end(self) -> None:
        """As Scorer."""
        self.engine.remove_sequence(0)


@dataclass
class _Run:
    """One scorer with what came of it."""

    scorer: Scorer
    parts: list[Positions] = field(default_factory=list)
    seconds: float = 0.0

    def begin(self, tokens: Sequence[int]) -> None:
        started = time.perf_counter()
        self.scorer.begin(tokens)
        self.seconds += time.perf_counter() - started

    def logits(self, tokens: Sequence[int]) -> Float32:
        started = time.perf_counter()
        found = self.scorer.logits(tokens)
        self.seconds += time.perf_counter() - started
        return found


def score(
    reference: Scorer,
    candidates: Sequence[Scorer],
    windows: Windows,
    *,
    progress: Callable[[int], None] = lambda done: None,
) -> tuple[list[Positions], list[float]]:
    """Every candidate's scored positions, and the seconds that each took, the reference's first.

    Of each window the tokens at places size // 2 + 1 to size - 1 are predicted, each from all
    before it.
    """
    runs = [_Run(scorer) for scorer in (reference, *candidates)]
    size = windows.tokens.shape[1]
    first = size // 2
    step = min(run.scorer.block for run in runs)
    step = max(1, min(step, _BLOCK_ELEMENTS // reference.vocab))
    for done, window in enumerate(windows.tokens):
        progress(done)
        tokens = window.tolist()
        for run in runs:
            run.begin(tokens[:first])
        for start in range(first, size - 1, step):
            stop = min(size - 1, start + step)
            block, targets = tokens[start:stop], window[start + 1 : stop + 1]
            base = runs[0].logits(block)
            for run in runs[1:]:
                run.parts.append(compare_logits(base, run.logits(block), targets))
        for run in runs:
            run.scorer.end()
    progress(len(windows.tokens))
    return [Positions.joined(run.parts) for run in runs[1:]], [run.seconds for run in runs]


def quality(
    reference: Subject,
    candidates: Sequence[Subject],
    text: Text,
    *,
    window: int = WINDOW,
    max_tokens: int | None = None,
    memory: int | None = None,
    progress: Progress | None = None,
) -> QualityReport:
    """Measure `candidates` against `reference` on `text`.

    memory: bytes of candidates' weights held at once; None is half of what is available.

    Raises:
        InputError: a text shorter than a window, tokenizers or vocabularies that differ, parameters
            and library that do not belong together, a quantised reference.
    """
    check_reference(reference)
    windows = common_windows(reference, candidates, text, window, max_tokens)
    groups = list(_groups(candidates, available_memory() // 2 if memory is None else memory))
    positions: list[Positions] = []
    seconds: list[float] = []
    base_seconds = 0.0
    for number, group in enumerate(groups):
        part = f", group {number + 1} of {len(groups)}" if len(groups) > 1 else ""

        def shown(done: int, part: str = part) -> None:
            if progress is not None:
                progress(f"score{part}", done, len(windows.tokens))

        with ExitStack() as stack:
            scorers = [EngineScorer(subject, window) for subject in (reference, *group)]
            stack.enter_context(pinned_caller())
            found, times = score(scorers[0], scorers[1:], windows, progress=shown)
            del scorers
        positions += found
        base_seconds = base_seconds or times[0]
        seconds += times[1:]
    errors = [tensor_errors(subject, reference) for subject in candidates]
    base = positions[0].base_nll
    first = window // 2
    return QualityReport(
        text=text.name,
        text_sha256=text.sha256,
        text_bytes=len(text.content.encode()),
        text_tokens=windows.stream,
        window=window,
        windows=len(windows.tokens),
        first_scored=first + 1,
        scored=len(base),
        prefix=windows.prefix,
        reference=ReferenceQuality(
            name=reference.name,
            label=reference.label,
            perplexity=perplexity(base),
            nll=mean(base),
            nbytes=reference.nbytes,
            bits_per_weight=reference.bits_per_weight,
            seconds=base_seconds,
        ),
        models=tuple(
            ModelQuality(
                name=subject.name,
                label=subject.label,
                figures=summarize(found),
                nbytes=subject.nbytes,
                bits_per_weight=subject.bits_per_weight,
                seconds=spent,
                tensors=tuple((e.name, e.relative_error) for e in ranked),
            )
            for subject, found, spent, ranked in zip(
                candidates, positions, seconds, errors, strict=True
            )
        ),
        machine=machine(),
        versions=tool_versions() | {"numpy": np.__version__, "python": platform.python_version()},
    )


def check_reference(reference: Subject) -> None:
    """Raise InputError where the reference is itself quantised to fewer bits."""
    if not reference.scheme.is_plain:
        raise InputError(
            f"the reference {reference.directory} is quantised ({reference.scheme.name})",
            hint="give the checkpoint, or a directory converted with q0f32 or q0f16",
        )


def common_windows(
    reference: Subject,
    candidates: Sequence[Subject],
    text: Text,
    window: int,
    max_tokens: int | None,
) -> Windows:
    """The text's windows, by the reference's tokenizer, once all give the same tokens.

    Raises InputError where a vocabulary or tokenizer differs, or the text is too short.
    """
    where = f"the tokenizer.json of {reference.name}"
    data = reference.tokenizer
    prefix, tokens = encode(data, text, where)
    vocab = reference.model.config.vocab_size
    for subject in candidates:
        mine = subject.model.config.vocab_size
        if mine != vocab:
            raise InputError(
                f"{subject.name} has a vocabulary of {mine} tokens and the reference "
                f"{reference.name} one of {vocab}: they are not the same model",
                hint="give the checkpoint that was converted as --reference",
            )
        if subject.tokenizer == data:
            continue
        its_prefix, its_tokens = encode(
            subject.tokenizer, text, f"the tokenizer.json of {subject.name}"
        )
        others = [*its_prefix, *its_tokens]
        if (its_prefix, its_tokens) != (prefix, tokens):
            raise InputError(
                f"the tokenizers of {subject.name} and of the reference {reference.name} read "
                f"{text.name} differently ({_difference([*prefix, *tokens], others)})",
                hint="give the checkpoint that was converted as --reference",
            )
    if tokens and max(tokens) >= vocab:
        raise InputError(
            f"{where} gives the token {max(tokens)} and the vocabulary has {vocab}",
            hint="use the tokenizer that was published with this checkpoint",
        )
    return cut(prefix, tokens, window, max_tokens=max_tokens, where=text.name)


def _difference(one: Sequence[int], other: Sequence[int]) -> str:
    at = next(
        (i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b),
        min(len(one), len(other)),
    )
    return f"{len(other)} and {len(one)} tokens, first difference at {at}"


def _groups(candidates: Sequence[Subject], memory: int) -> Iterator[list[Subject]]:
    """Candidates in order, as many together as `memory` bytes hold, at least one.

    What a library holds is its directory's parameters, which of a checkpoint are larger than it.
    """
    group: list[Subject] = []
    held = 0
    for subject in candidates:
        nbytes = sum(tensor["nbytes"] for tensor in subject.manifest["tensors"])
        if group and held + nbytes > memory:
            yield group
            group, held = [], 0
        group.append(subject)
        held += nbytes
    if group:
        yield group


def available_memory() -> int:
    """Bytes that this machine can still give to processes; 4 GiB where it does not say."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(int(x.split()[1]) * 1024 for x in lines if x.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError):
        return 4 << 30
