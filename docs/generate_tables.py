"""Rewrite the tables of README.md that come from the registries: models, schemes, targets.

`make docs` runs it; a test says when a table is out of date. A table stands between
`<!-- NAME -->` and `<!-- /NAME -->`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mlc_compile.cli.list import REGISTRIES

README = Path(__file__).resolve().parents[1] / "README.md"


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows of equal keys as a markdown table."""
    keys = list(rows[0])
    lines = [keys, ["---"] * len(keys), *([str(row[key]) for key in keys] for row in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def replaced(text: str, name: str, rows: Sequence[Mapping[str, Any]], page: str) -> str:
    """The text of a page with one of its tables made anew."""
    pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
    text, count = pattern.subn(lambda m: f"{m[1]}{table(rows)}\n{m[2]}", text)
    if count != 1:
        raise ValueError(f"{page} has {count} places for the table {name}, not one")
    return text


def rewritten(text: str) -> str:
    """README's text with every registry's table made anew; models by family."""
    from generate_models import families

    for name, rows in {**REGISTRIES, "models": families}.items():
        text = replaced(text, name, rows(), README.name)
    return text


if __name__ == "__main__":
    README.write_text(rewritten(README.read_text(encoding="utf-8")), encoding="utf-8")
