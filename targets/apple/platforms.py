"""The platforms: what their objects say in LC_BUILD_VERSION, and the triple that makes LLVM say so.

Platform numbers are those of <mach-o/loader.h> (PLATFORM_MACOS …). An unversioned triple gives an
object without LC_BUILD_VERSION, which Apple's linker takes for macOS.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ApplePlatform:
    """One platform on arm64.

    Attributes:
        name: as users write it after --target.
        triple: LLVM's, with the minimum version.
        cpu: the oldest processor, in LLVM's names.
        number: PLATFORM_* of LC_BUILD_VERSION.
        minimum: (major, minor) that libraries ask for.
        title: for people.
    """

    name: str
    triple: str
    cpu: str
    number: int
    minimum: tuple[int, int]
    title: str


IPHONE = ApplePlatform("iphone", "aarch64-apple-ios16.0", "apple-a12", 2, (16, 0), "iOS")
IPHONE_SIMULATOR = ApplePlatform(
    "iphone-simulator",
    "aarch64-apple-ios16.0-simulator",
    "apple-m1",
    7,
    (16, 0),
    "iOS simulator",
)
MACABI = ApplePlatform(
    "macabi", "aarch64-apple-ios16.0-macabi", "apple-m1", 6, (16, 0), "Mac Catalyst"
)
MACOS = ApplePlatform("macos", "aarch64-apple-macos13.0", "apple-m1", 1, (13, 0), "macOS")
PLATFORMS = {p.name: p for p in (IPHONE, IPHONE_SIMULATOR, MACABI, MACOS)}
