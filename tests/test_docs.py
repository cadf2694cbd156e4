"""README's tables are those of the registries, and its commands exist."""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "docs"))

from generate_tables import rewritten  # noqa: E402  (a script of docs/, found through the line above)


def test_tables_are_the_registries() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert rewritten(text) == text, "run `make docs`"


def test_commands_and_options_exist() -> None:
    from mlc_compile.cli import COMMANDS, main

    text = (ROOT / "README.md").read_text(encoding="utf-8")
    context = main.make_context("mlc_compile", [])
    used = set()
    for line in re.findall(r"^\$ mlc_compile (.+)$", text, re.MULTILINE):
        name, *words = line.split()
        used.add(name)
        command = main.get_command(context, name)
        assert command is not None, line
        known = {option for p in command.params for option in p.opts + p.secondary_opts}
        assert {w for w in words if re.match(r"--?[a-z]", w)} <= known, line
    assert {"convert_weight", "gen_config", "compile", "verify", "run"} <= used <= set(COMMANDS)


def test_links_lead_somewhere() -> None:
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md"]:
        for link in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / link).exists(), (page.name, link)
