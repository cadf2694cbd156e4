"""examples/ios and docs/ios.md: what can be checked of them without a Mac."""

from __future__ import annotations

import json
import plistlib
import re
import sys
from pathlib import Path

from mlc_compile.compiler.package import LIBRARY, read_package_config
from mlc_compile.targets.apple.platforms import IPHONE
from mlc_compile.targets.apple.prefix import check_prefix, prefix_of

ROOT = Path(__file__).resolve().parents[2]
IOS = ROOT / "examples" / "ios"
sys.path.insert(0, str(ROOT / "docs"))

from generate_phones import PAGE, rewritten  # noqa: E402  (a script of docs/, see the line above)


def test_tables_are_the_planner_s() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert rewritten(text) == text, "run `make docs`"


def test_the_configuration_can_be_read() -> None:
    config = read_package_config(IOS)
    assert config.profile.name == "iphone"
    for entry in config.entries:
        assert entry.bundle and entry.model_lib is not None
        check_prefix(prefix_of(entry.model_lib))


def test_both_ways_to_link_force_the_library_in() -> None:
    settings = (IOS / "Models.xcconfig").read_text()
    (flags,) = re.findall(r"^OTHER_LDFLAGS = (.*)$", settings, re.MULTILINE)
    forced = re.findall(r"-Wl,-force_load,\$\(PROJECT_DIR\)/dist/lib/(\S+)", flags)
    package = (IOS / "LocalModels" / "Package.swift").read_text()
    also = re.findall(r'"-force_load", "-Xlinker", "\\\(lib\)/([^"]+)"', package)
    assert forced == also and forced[0] == LIBRARY
    libraries = re.findall(r"-l(\S+)", flags.replace("-Wl,", ""))
    assert libraries == re.findall(r'linkedLibrary\("(.+)"\)', package)
    major, minor = IPHONE.minimum
    assert f"IPHONEOS_DEPLOYMENT_TARGET = {major}.{minor}" in settings
    assert f".iOS(.v{major})" in package


def test_the_entitlement_is_the_one_of_the_budgets() -> None:
    with open(IOS / "App.entitlements", "rb") as file:
        found = plistlib.load(file)
    assert found["com.apple.developer.kernel.increased-memory-limit"] is True
    assert "App.entitlements" in (IOS / "Models.xcconfig").read_text()


def test_the_app_reads_the_keys_that_package_writes() -> None:
    swift = (IOS / "LocalModels/Sources/LocalModels/LocalModels.swift").read_text()
    keys = re.findall(r'case \w+ = "(\w+)"', swift)
    assert keys == ["model_id", "model_lib", "model_path", "model_url", "estimated_vram_bytes"]
    names = json.loads((IOS / "mlc-package-config.json").read_text())["model_list"][0]
    assert {"model_id", "model_lib"} <= names.keys()


def test_links_of_the_pages_lead_somewhere() -> None:
    for page in (PAGE, IOS / "README.md"):
        for link in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / link).exists(), (page.name, link)
