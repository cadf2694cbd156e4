"""`verify --bisect`: which `--opt` switch makes a library miss parity.

The library is compiled again, as it is and with switches turned off, and each is verified against
the same logits of the reference. A pass that depends on another is not blamed on it: turning
fuse_linear off also turns off what widens its kernels, so the last switch in the order of the
passes that restores parity by itself is named.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlc_compile.chat_config import COMPILE_KEYS
from mlc_compile.compiler.build import compile_library
from mlc_compile.compiler.opt import SWITCHES, OptFlags, parse_opt
from mlc_compile.errors import MlcError
from mlc_compile.runtime.golden import is_golden
from mlc_compile.runtime.verify import Progress, VerifyReport, verify
from mlc_compile.targets.embedded import read_metadata


@dataclass(frozen=True)
class Trial:
    """A library with some switches turned off, and the first thing that it missed ("" if none)."""

    off: frozenset[str]
    missed: str

    @property
    def name(self) -> str:
        return ", ".join(switch for switch in SWITCHES if switch in self.off) or "nothing"


@dataclass(frozen=True)
class Bisection:
    """What was tried, and the switches to blame: none where turning all off changes nothing."""

    trials: tuple[Trial, ...]
    culprits: tuple[str, ...]
    verdict: str


def find_culprits(on: Sequence[str], attempt: Callable[[frozenset[str]], str]) -> Bisection:
    """Blame some of the switches that are `on`, in the order of their passes.

    attempt(off): compiles and verifies without these, and says what was missed or "".
    """
    trials: dict[frozenset[str], Trial] = {}

    def holds(off: Iterable[str]) -> bool:
        key = frozenset(off)
        if key not in trials:
            trials[key] = Trial(key, attempt(key))
        return not trials[key].missed

    def found(culprits: Sequence[str], verdict: str) -> Bisection:
        return Bisection(tuple(trials.values()), tuple(culprits), verdict)

    if holds(()):
        return found(
            (), "compiled again as it is, the library holds parity: this one is of another compiler"
        )
    if not on or not holds(on):
        return found((), "no switch is to blame: parity is missed with all of them off")
    restoring = [switch for switch in on if holds({switch})]
    if restoring:
        culprit = restoring[-1]
        return found((culprit,), f"{culprit} breaks parity; it holds with --opt '{culprit}=0'")
    off = set(on)
    for switch in on:
        if holds(off - {switch}):
            off.remove(switch)
    several = [switch for switch in on if switch in off]
    value = ";".join(f"{switch}=0" for switch in several)
    return found(several, f"{', '.join(several)} break parity; it holds with --opt '{value}'")


@dataclass(frozen=True)
class BisectReport:
    """A verification and, where it failed, the switches to blame."""

    verified: VerifyReport
    bisection: Bisection | None

    @property
    def failures(self) -> list[str]:
        return self.verified.failures

    @property
    def verdict(self) -> str:
        return "nothing to look for" if self.bisection is None else self.bisection.verdict

    def to_json(self) -> dict[str, Any]:
        found = self.bisection
        trials = () if found is None else found.trials
        return {
            **self.verified.to_json(),
            "bisect": {
                "culprits": [] if found is None else list(found.culprits),
                "verdict": self.verdict,
                "trials": [
                    {"off": [s for s in SWITCHES if s in t.off], "missed": t.missed} for t in trials
                ],
            },
        }

    def to_text(self) -> str:
        lines = [self.verified.to_text()]
        if self.bisection is not None:
            trials = self.bisection.trials
            width = max(len("turned off"), *(len(t.name) for t in trials))
            lines += ["", f"{'turned off':<{width}}  parity"]
            lines += [f"{t.name:<{width}}  {t.missed or 'holds'}" for t in trials]
        return "\n".join([*lines, f"bisect: {self.verdict}"])


def bisect(
    model_dir: Path,
    library: Path,
    reference: Path,
    *,
    progress: Progress | None = None,
    write_golden: Path | None = None,
    **options: Any,
) -> BisectReport:
    """`verify`, and where it fails, the search for the switch to blame; arguments as there.

    The libraries that are tried are compiled in a temporary folder, for the target, the sizes and
    the variant that the library's metadata names.

    Raises:
        InputError, EnvironmentLacksError: as `verify`.
    """
    with tempfile.TemporaryDirectory(prefix="mlc_compile_bisect_") as name:
        folder = Path(name)
        # The reference's logits are stored, so that every trial is compared with the same ones.
        golden = reference if is_golden(reference) else write_golden or folder / "golden.npz"
        store = None if is_golden(reference) else golden
        verified = verify(
            model_dir, library, reference, progress=progress, write_golden=store, **options
        )
        if not verified.failures:
            return BisectReport(verified, None)
        limits = verified.thresholds
        if not any(scenario.failures(limits) for scenario in verified.scenarios):
            blameless = "no switch is to blame: the logits are right"
            return BisectReport(verified, Bisection((), (), blameless))
        metadata = read_metadata(library)
        ours = metadata["mlc_compile"]
        target = ":".join(filter(None, (ours["target"], ours.get("variant"))))
        switches = [switch for switch in SWITCHES if parse_opt(ours["opt"]).enabled(switch)]
        repeated = {k: v for k, v in options.items() if k not in ("engine", "original")}
        done = 0

        def attempt(off: frozenset[str]) -> str:
            nonlocal done
            flags = OptFlags(frozenset(switches) - off)
            trial = Trial(off, "")
            if progress is not None:
                progress(f"without {trial.name}", done, len(switches) + 2)
            done += 1
            output = folder / f"trial_{done}{library.suffix}"
            try:
                compile_library(
                    model_dir,
                    target,
                    output,
                    opt=str(flags),
                    overrides={key: metadata[key] for key in COMPILE_KEYS},
                    allow_experimental=True,  # it is compiled already
                )
                found = verify(model_dir, output, golden, **repeated).failures
            except MlcError as error:
                return f"not compiled: {error}"
            except Exception as error:  # what generic code cannot do on a target is a result too
                lines = str(error).strip().splitlines() or [type(error).__name__]
                return f"broke off: {lines[-1]}"
            return found[0] if found else ""

        return BisectReport(verified, find_culprits(switches, attempt))
