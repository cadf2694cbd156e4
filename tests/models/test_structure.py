"""What keeps architectures declarations: no repetition, no type tests elsewhere, easy variants."""

from __future__ import annotations

import io
import keyword
import re
import tokenize
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import pytest

import mlc_compile
from mlc_compile.models import ARCHITECTURES
from mlc_compile.models.detect import read_model
from mlc_compile.models.schema import listed_layers

PACKAGE = Path(mlc_compile.__file__).parent
WINDOW = 6
SHARED = sorted([*(PACKAGE / "models").glob("*.py"), *(PACKAGE / "nn").glob("*.py")])


def shapes(path: Path) -> list[tuple[int, str]]:
    """(line number, the line with every name made alike) of the lines of code; imports, docstrings,
    comments and lone brackets are left out. What a keyword argument is called, strings and numbers
    stay: they are what a declaration says. Signatures, and that a constructor keeps its
    arguments, are left out too."""
    lines: dict[int, list[str]] = defaultdict(list)
    depth = 0
    text = path.read_text(encoding="utf-8")
    previous, names = tokenize.NEWLINE, [""]
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type in (tokenize.COMMENT, tokenize.NL, tokenize.INDENT, tokenize.DEDENT):
            continue
        docstring = token.type == tokenize.STRING and previous == tokenize.NEWLINE
        previous = token.type
        if docstring or token.type in (tokenize.NEWLINE, tokenize.ENDMARKER):
            continue
        word = token.string
        depth += (word in "([{") - (word in ")]}")
        line = lines[token.start[0]]
        if word == "=" and depth and len(line) == 1:
            line[0] = names[-1]
        if token.type == tokenize.NAME and not keyword.iskeyword(word):
            names.append(word)
            word = "name"
        line.append(word)
    return [
        (number, " ".join(words))
        for number, words in sorted(lines.items())
        if words[0] not in ("from", "import")
        and re.search(r"\w", " ".join(words))
        and words != ["name", ".", "name", "=", "name"]
        and not (words[1:2] == [":"] and words[-1] == ",")
    ]


def test_no_six_lines_stand_twice() -> None:
    seen: dict[tuple[str, ...], str] = {}
    repeated = []
    for path in SHARED:
        lines = shapes(path)
        for i in range(len(lines) - WINDOW + 1):
            run = tuple(text for _, text in lines[i : i + WINDOW])
            # a list of names, one a line, is no repetition
            if len(set(run)) < WINDOW // 2:
                continue
            place = f"{path.name}:{lines[i][0]}"
            if run in seen:
                repeated.append(f"{place} = {seen[run]}")
            seen.setdefault(run, place)
    assert not repeated, "\n".join(repeated)


@pytest.mark.parametrize(
    "path",
    [p for p in PACKAGE.rglob("*.py") if p.parent.name != "models"],
    ids=lambda p: str(p.relative_to(PACKAGE)),
)
def test_no_model_type_is_tested_outside_models(path: Path) -> None:
    found = re.findall(
        r"(?:model_type|arch\.name)\s*(?:==|!=|in)\s*[\"'(\[{]", path.read_text(encoding="utf-8")
    )
    assert not found


def test_a_variant_is_a_replacement() -> None:
    """SmolLM3's layers without positions, made from Llama."""
    llama = ARCHITECTURES["llama"]
    schema = replace(llama.schema, rotates=listed_layers("no_rope_layers", default=4))
    variant = replace(llama, name="variant", schema=schema)
    config = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_hidden_layers": 4,
        "vocab_size": 100,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
    }
    model = read_model(config, variant, where="config.json")
    assert [kind.rope is not None for kind in model.config.layers] == [True, True, True, False]
    assert not model.config.cache_rotates
    plain = read_model(config, llama, where="config.json")
    assert plain.config.cache_rotates
    assert model.parameters() == plain.parameters()
    listed = read_model({**config, "no_rope_layers": [0, 1, 1, 0]}, variant, where="config.json")
    assert [kind.rope is not None for kind in listed.config.layers] == [False, True, True, False]
