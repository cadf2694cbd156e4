"""README's tables are those of the registries, and its commands exist."""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "docs"))

import generate_models  # noqa: E402  (scripts of docs/, found through the line above)
import generate_tables  # noqa: E402

from mlc_compile.models import ARCHITECTURES  # noqa: E402


def test_tables_are_the_registries() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert generate_tables.rewritten(text) == text, "run `make docs`"


def test_models_page_is_the_registry() -> None:
    text = generate_models.PAGE.read_text(encoding="utf-8")
    assert generate_models.rewritten(text) == text, "run `make docs`"
    readme = [row["model_type"] for row in generate_models.families()]
    listed = [name.strip("`") for cell in readme for name in cell.split(", ")]
    assert sorted(listed) == sorted(ARCHITECTURES)
    assert all(row["published configurations"] for row in generate_models.models())


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
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]:
        for link in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / link).exists(), (page.name, link)
