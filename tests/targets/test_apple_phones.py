"""Phone budgets: ordered, below what was reported, and usable by name."""

from __future__ import annotations

import re

import click
import pytest

from mlc_compile.cli._params import BudgetType
from mlc_compile.targets.apple.phones import GB, PHONES, find_phone, where_it_fits


def test_a_phone_for_each_memory_with_and_without_the_entitlement() -> None:
    assert {(p.memory, p.entitled) for p in PHONES.values()} == {
        (size * GB, entitled) for size in (4, 6, 8, 12) for entitled in (False, True)
    }
    for name, phone in PHONES.items():
        assert name == f"iphone-{phone.memory // GB}gb" + "-increased" * phone.entitled


def test_more_memory_and_the_entitlement_never_mean_less() -> None:
    for a in PHONES.values():
        assert 0.3 * a.memory < a.budget < 2 / 3 * a.memory, "Metal's own budget is 2/3"
        for b in PHONES.values():
            if a.memory <= b.memory and a.entitled <= b.entitled:
                assert a.budget <= b.budget


def test_budgets_lie_below_what_was_reported() -> None:
    for phone in PHONES.values():
        measured = [
            float(x) * GB for x in re.findall(r"(\d+(?:\.\d+)?) GB available", phone.reported)
        ]
        assert measured or phone.reported.startswith("assumed")
        assert all(phone.budget <= least - GB // 5 for least in measured)


def test_names_are_budgets() -> None:
    kind = BudgetType()
    assert kind.convert("iphone-6gb", None, None) == PHONES["iphone-6gb"].budget
    assert kind.convert("iPhone-8GB-increased", None, None) == 4_500_000_000
    assert kind.convert("2GiB", None, None) == 2 << 30
    assert find_phone("iphone-5gb") is None
    with pytest.raises(click.BadParameter, match=r"'iphone-5gb' is no phone; use iphone-\dgb"):
        kind.convert("iphone-5gb", None, None)
    with pytest.raises(click.BadParameter, match="is not a size"):
        kind.convert("pixel", None, None)


def test_where_a_plan_fits() -> None:
    assert where_it_fits(GB) == "fits every phone of 4 GB and more"
    assert "above iphone-12gb-increased" in where_it_fits(9 * GB)
    line = where_it_fits(4 * GB)
    fits, misses = line.split("; not ")
    assert "iphone-8gb-increased" in fits and misses.endswith("iphone-8gb")
