"""`--opt`: levels, single switches, and what is refused."""

from __future__ import annotations

from itertools import pairwise

import pytest

from mlc_compile.compiler.opt import FUSIONS, LEVELS, SWITCHES, parse_opt
from mlc_compile.errors import InputError


@pytest.mark.parametrize("level", LEVELS)
def test_a_level_is_its_switches(level: str) -> None:
    assert parse_opt(level).on == LEVELS[level]


@pytest.mark.parametrize("switch", SWITCHES)
def test_a_switch_changes_the_default_level(switch: str) -> None:
    flags = parse_opt(f"{switch}=0")
    assert not flags.enabled(switch)
    assert flags.on == LEVELS["O2"] - {switch}
    assert parse_opt(f"O0;{switch}=on").on == {switch}
    assert parse_opt(str(flags)) == flags


def test_switches_are_the_fusing_passes_in_their_order_and_graphs() -> None:
    from mlc_compile.compiler.pipeline import FUSING

    assert tuple(FUSING) == FUSIONS
    assert (*FUSIONS, "cuda_graph") == SWITCHES


def test_levels_grow() -> None:
    sets = list(LEVELS.values())
    assert all(lower < higher for lower, higher in pairwise(sets))
    assert sets[0] == set() and sets[-1] == set(SWITCHES)


@pytest.mark.parametrize("text", ["O4", "fuse_norm", "fuse_norm=2", "fuse_nrm=1", "o2", "O2,O3"])
def test_other_values_are_refused_by_name(text: str) -> None:
    with pytest.raises(InputError, match="--opt"):
        parse_opt(text)
