"""System-library prefixes: valid, derived, found by MLC's rule, and distinct."""

from __future__ import annotations

import re

import pytest

from mlc_compile.errors import InputError
from mlc_compile.targets.apple.prefix import (
    MIN_BYTES,
    check_distinct,
    check_prefix,
    derived_prefix,
    model_lib_of,
    prefix_of,
)


@pytest.mark.parametrize(
    ("prefix", "problem"),
    [
        ("short_", "6 characters and 8 are the least"),
        ("no-dashes_", "only letters, digits and _"),
        ("9starts_with_digit_", "only letters, digits and _"),
        ("", "only letters, digits and _"),
        ("läama_q4f16_1_", "only letters, digits and _"),
        ("llama_q4f16_1", "must end in _"),
        ("x" * 200 + "_", "201 characters, and 128 are the most"),
    ],
)
def test_bad_prefixes_are_refused_with_a_good_one(prefix: str, problem: str) -> None:
    with pytest.raises(InputError, match=problem) as caught:
        check_prefix(prefix)
    proposed = re.search(r"write (?:for example )?(\w+)$", str(caught.value))
    if len(prefix) < 100:
        assert proposed and check_prefix(proposed[1]) == proposed[1]


def test_derived_prefixes_are_valid_and_differ() -> None:
    identities = [{"a": 1}, {"a": 2}, {"b": 1}, {}]
    found = [derived_prefix("llama", "q4f16_1", identity) for identity in identities]
    assert len(set(found)) == len(found)
    assert all(check_prefix(prefix) == prefix for prefix in found)
    check_distinct([(str(i), prefix) for i, prefix in enumerate(found)])
    assert derived_prefix("llama", "q4f16_1", {"a": 1, "b": 2}) == derived_prefix(
        "llama", "q4f16_1", {"b": 2, "a": 1}
    )
    assert check_prefix(derived_prefix("x-y.z", "q0", {})).startswith("x_y_z_q0_")
    assert len(derived_prefix("a", "b", {})) >= MIN_BYTES


def test_the_name_an_app_uses_leads_back_to_the_prefix() -> None:
    assert prefix_of("Llama-3_2") == "Llama_3_2_"
    for prefix in ("llama_q4f16_1_", derived_prefix("qwen3", "q3f16_1", {})):
        assert prefix_of(model_lib_of(prefix)) == prefix


@pytest.mark.parametrize(
    "prefixes",
    [
        ["model_one_", "model_one_"],
        ["model_one_", "model_one_b_"],
        ["other_model_", "model_one_b_", "model_onf_", "model_one_"],
    ],
)
def test_clashing_prefixes_name_both_models(prefixes: list[str]) -> None:
    with pytest.raises(InputError, match=r"'model_one_', is .* of \w+") as caught:
        check_distinct([(f"m{i}", prefix) for i, prefix in enumerate(prefixes)])
    assert str(caught.value).count("m") >= 2


def test_distinct_prefixes_pass() -> None:
    check_distinct([("a", "model_one_"), ("b", "model_on_"), ("c", "model_two_")])
