"""How much memory a model may plan on an iPhone: data, with where each number comes from.

iOS kills an app that exceeds a limit of its own, which Apple does not publish and changes between
versions: iPadOS 26.4 is reported to have halved it (Apple's developer forums, thread 826325). So
these are reported limits less at least 0.2 GB for the app itself and for staging while weights are
copied, never less cautious than notes of people whose models did run. Sizes are decimal: 1 GB is
10^9 bytes.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass

GB = 10**9


@dataclass(frozen=True)
class Phone:
    """A phone by its memory, with or without the entitlement
    `com.apple.developer.kernel.increased-memory-limit`.

    budget: bytes for weights, cache, workspace and reserve together. reported: what was measured
    or assumed, with its source.
    """

    name: str
    memory: int
    entitled: bool
    budget: int
    reported: str


PHONES = {
    phone.name: phone
    for phone in (
        Phone(
            "iphone-4gb",
            4 * GB,
            False,
            1_800_000_000,
            "2.1 GB available on an iPhone 12 mini (github.com/allenai/OLMoE.swift/pull/38)",
        ),
        Phone(
            "iphone-4gb-increased",
            4 * GB,
            True,
            2_100_000_000,
            "2.4 GB available on an iPhone 12 mini (github.com/allenai/OLMoE.swift/pull/38)",
        ),
        Phone(
            "iphone-6gb",
            6 * GB,
            False,
            2_800_000_000,
            "3.12 GB available on an iPhone 13 Pro "
            "(github.com/a-ghorbani/pocketpal-ai/pull/651), a limit of 2867 MB on an iPhone 14 "
            "Pro Max (github.com/madebyollin/maple-diffusion/issues/5)",
        ),
        Phone(
            "iphone-6gb-increased",
            6 * GB,
            True,
            3_700_000_000,
            "4.20 GB available on an iPhone 13 Pro (github.com/a-ghorbani/pocketpal-ai/pull/651)",
        ),
        Phone(
            "iphone-8gb",
            8 * GB,
            False,
            2_800_000_000,
            "3 GB available on an iPhone 15 Pro (github.com/introlab/rtabmap/pull/1446); killed "
            "at about 3.5 GB (github.com/cardona/SwiftMistralCoreML/issues/15)",
        ),
        Phone(
            "iphone-8gb-increased",
            8 * GB,
            True,
            4_500_000_000,
            "6 GB available on an iPhone 15 Pro (github.com/introlab/rtabmap/pull/1446), but "
            "Metal's own budget there is 5461 MB, and one buffer of 2.25 GB failed",
        ),
        Phone(
            "iphone-12gb",
            12 * GB,
            False,
            4_200_000_000,
            "assumed: 1.5 times the phone of 8 GB; no report was found",
        ),
        Phone(
            "iphone-12gb-increased",
            12 * GB,
            True,
            6_700_000_000,
            "assumed: 1.5 times the phone of 8 GB; no report was found",
        ),
    )
}


def find_phone(name: str) -> Phone | None:
    """The phone of that name, in upper or lower case."""
    return PHONES.get(name.lower())


def closest(name: str) -> list[str]:
    """Names like this one, else all."""
    return difflib.get_close_matches(name.lower(), PHONES, n=2) or list(PHONES)


def where_it_fits(nbytes: int) -> str:
    """One line: the phones that a plan of so many bytes fits, and those that it does not."""
    fits = [p.name for p in PHONES.values() if nbytes <= p.budget]
    misses = [p.name for p in PHONES.values() if nbytes > p.budget]
    if not misses:
        return "fits every phone of 4 GB and more"
    if not fits:
        return f"fits no phone that is known here: above {misses[-1]}"
    return f"fits {', '.join(fits)}; not {', '.join(misses)}"
