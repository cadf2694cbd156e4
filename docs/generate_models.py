"""Rewrite the table of docs/models.md, and the shorter one of README.md, from the registry.

`make docs` runs it; a test says when a table is out of date. What a row says is read off the
declaration, and off the published configurations in tests/configs that it reads.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from generate_tables import replaced

from mlc_compile.config import read_json_strict
from mlc_compile.models import ARCHITECTURES, Architecture, Model, load_model
from mlc_compile.models.options import MLP, Alibi, Flag, LayerNorm, Learned, Norm, SparseMLP
from mlc_compile.models.registry import FAMILIES
from mlc_compile.models.schema import all_layers, full_attention

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "models.md"
CONFIGS = ROOT / "tests" / "configs"


@cache
def published() -> dict[str, dict[str, Model]]:
    """Model type -> name of a published configuration -> the model that it makes."""
    found: dict[str, dict[str, Model]] = {name: {} for name in ARCHITECTURES}
    for path in sorted(CONFIGS.glob("*.json"), key=lambda path: path.name.lower()):
        if not path.name.endswith(".refused.json"):
            model = load_model(read_json_strict(path), where=path.name)
            found[model.arch.name][path.stem] = model
    return found


def variants(arch: Architecture) -> list[Architecture]:
    """The declaration, and what published configurations make of one that depends on them."""
    made = [model.arch for model in published()[arch.name].values()]
    return [arch] if arch.variant is None or not made else made


def positions(arch: Architecture) -> Iterator[str]:
    for one in variants(arch):
        if isinstance(one.positions, Alibi):
            yield "ALiBi"
        elif isinstance(one.positions, Learned):
            yield "learned"
        else:
            yield "rotary, neighbours" if one.positions.interleaved else "rotary"
            yield "part of a head" if arch.schema.partial_rotary else ""
            yield "some layers" if arch.schema.rotates is not all_layers else ""
    yield "windows" if arch.schema.kinds is not full_attention else ""


def attention(arch: Architecture) -> Iterator[str]:
    option, numbers = arch.attention, arch.schema.numbers
    if option.qkv_bias == option.out_bias:
        yield flag("biases", option.qkv_bias)
    else:
        yield flag("qkv biases", option.qkv_bias)
        yield flag("output bias", option.out_bias)
    yield "" if option.qk_norm is None else flag("q and k norms", option.qk_norm.enabled)
    yield "own scale" if numbers.attention_scale else ""
    yield "soft-cap" if numbers.attention_softcap else ""
    yield "clipped q, k, v" if numbers.clip_qkv else ""


def mlp(arch: Architecture) -> Iterator[str]:
    if not isinstance(arch.mlp, SparseMLP):
        yield "plain" if isinstance(arch.mlp, MLP) else "gated"
        yield flag("biases", arch.mlp.bias)
        return
    yield f"experts by {arch.mlp.score}"
    yield flag("renormalised", arch.mlp.renormalize)
    yield "" if arch.mlp.shared is None else "shared expert"


def norms(arch: Architecture) -> Iterator[str]:
    for one in variants(arch):
        yield norm_name(one.norm)
        yield "before" if one.block.input_norms else ""
        yield "after" if one.block.output_norms else ""
        yield flag("parallel layers", one.block.parallel)
        yield "of embeddings" if one.embed_norm else ""


def norm_name(norm: Norm) -> str:
    name = type(norm).__name__
    if isinstance(norm, LayerNorm):
        lacking = [part for part in ("weight", "bias") if getattr(norm, part) is False]
        name += f" without {' and '.join(lacking)}" if lacking else ""
    return f"{name} (1 + w)" if norm.add else name


def rest(arch: Architecture) -> Iterator[str]:
    numbers = arch.schema.numbers
    yield "scaled embeddings" if numbers.embedding_scale else ""
    yield "scaled residuals" if numbers.residual_scale else ""
    yield "scaled logits" if numbers.logits_scale else ""
    yield "soft-capped logits" if numbers.logits_softcap else ""
    yield flag("bias on logits", arch.head_bias)
    yield "head rows of length 1" if any(one.unit_head for one in variants(arch)) else ""


def flag(what: str, value: Flag) -> str:
    """An option that is there, or is there where a key of config.json says so."""
    if isinstance(value, str):
        return f"{what} by `{value}`"
    return what if value else ""


def words(found: Iterator[str]) -> str:
    """Each once, in order."""
    return "; ".join(dict.fromkeys(filter(None, found)))


def models() -> list[dict[str, str]]:
    """One row an architecture."""
    return [
        {
            "model_type": f"`{name}`",
            "classes": ", ".join(arch.hf_classes),
            "label": arch.label,
            "positions": words(positions(arch)),
            "attention": words(attention(arch)),
            "MLP": words(mlp(arch)),
            "norms": words(norms(arch)),
            "else": words(rest(arch)),
            "published configurations": ", ".join(published()[name]),
        }
        for name, arch in ARCHITECTURES.items()
    ]


def families() -> list[dict[str, str]]:
    """One row a module of models/, in its own words: what README has room for."""
    rows = []
    for family in FAMILIES:
        source = inspect.getsource(family)
        own = [
            value
            for name, value in vars(family).items()
            if isinstance(value, Architecture) and f"\n{name} = " in source  # not imported
        ]
        summary = (family.__doc__ or "").split("\n\n")[0]
        sentences = re.split(r"(?<=\.)\s+", " ".join(summary.split()))
        rows.append(
            {
                "model_type": ", ".join(f"`{arch.name}`" for arch in own),
                "what it is": " ".join(s for s in sentences if ".py" not in s),
                "label": ", ".join(dict.fromkeys(arch.label for arch in own)),
            }
        )
    return rows


def rewritten(text: str) -> str:
    """The text of docs/models.md with its table made anew."""
    return replaced(text, "models", models(), PAGE.name)


if __name__ == "__main__":
    PAGE.write_text(rewritten(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
