"""Rewrite the tables of docs/ios.md: phones, and what the planner says of known models on them.

`make docs` runs it; a test says when a table is out of date. Everything is computed from the shapes
below: no weights, no device.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from generate_tables import replaced

from mlc_compile.compiler.fit import largest_context
from mlc_compile.compiler.inputs import CompileInputs
from mlc_compile.compiler.memory import estimate_plan, largest_binding
from mlc_compile.config import resolve_compile_config
from mlc_compile.models.detect import load_model
from mlc_compile.quantization.scheme import get_scheme
from mlc_compile.targets.apple.phones import PHONES
from mlc_compile.targets.profile import get_target

PAGE = Path(__file__).resolve().parent / "ios.md"
CONTEXT = 2048
MB = 10**6

_LLAMA = {"model_type": "llama", "rms_norm_eps": 1e-5, "vocab_size": 128256, "head_dim": 64}
_LLAMA |= {"max_position_embeddings": 131072, "num_key_value_heads": 8}
_QWEN3 = {"model_type": "qwen3", "rms_norm_eps": 1e-6, "vocab_size": 151936, "head_dim": 128}
_QWEN3 |= {"max_position_embeddings": 40960, "num_key_value_heads": 8}


def _shape(base: Mapping[str, Any], hidden: int, inner: int, layers: int, heads: int) -> Any:
    return {
        **base,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "tie_word_embeddings": True,
    }


# The numbers of the checkpoints' config.json. Phi-3.5-mini has the tensors of a llama of its sizes
# (it stores q, k and v, and gate and up, in one each), so its plan is exact although its
# architecture is not supported yet.
MODELS: Mapping[str, Mapping[str, Any]] = {
    "Llama-3.2-1B": _shape(_LLAMA, 2048, 8192, 16, 32),
    "Llama-3.2-3B": {**_shape(_LLAMA, 3072, 8192, 28, 24), "head_dim": 128},
    "Qwen3-0.6B": _shape(_QWEN3, 1024, 3072, 28, 16),
    "Qwen3-1.7B": _shape(_QWEN3, 2048, 6144, 28, 16),
    "Qwen3-4B": _shape(_QWEN3, 2560, 9728, 36, 32),
    "Phi-3.5-mini (*)": {
        **_shape(_LLAMA, 3072, 8192, 32, 32),
        "head_dim": 96,
        "num_key_value_heads": 32,
        "vocab_size": 32064,
        "tie_word_embeddings": False,
    },
}
# What others say of the same models: notes of measurements and estimates, not ours.
REPORTED = {
    "Llama-3.2-3B": "MLC ships it with 3000 MB estimated, context 2048",
    "Qwen3-1.7B": "peak 2151 MB, iPhone 13 Pro, another engine (pocketpal-ai #651)",
    "Phi-3.5-mini (*)": "MLC ships it with 3043 MB estimated",
}
SCHEMES = ("q4f16_1", "q3f16_1")


def inputs(name: str, scheme: str, context: int) -> CompileInputs:
    """A model with the sizes that `compile --target iphone` takes, but for the context."""
    profile, _ = get_target("iphone")
    model = load_model(MODELS[name], where=name)
    config = resolve_compile_config(
        model.config,
        context_window_size=min(context, model.config.max_position_embeddings),
        target_defaults=profile.compile_defaults,
    )
    return CompileInputs(model, get_scheme(scheme), config, model.config.vocab_size)


def plans() -> list[dict[str, str]]:
    """One row a model: the parts of its plan in q4f16_1 at CONTEXT tokens, in MB."""
    profile, _ = get_target("iphone")
    rows = []
    for name in MODELS:
        given = inputs(name, SCHEMES[0], CONTEXT)
        plan = estimate_plan(given.model, given.scheme, given.config, profile)
        _, binding = largest_binding(given.model, given.scheme, given.config)
        parts = {key.replace("_", " "): f"{size / MB:.0f}" for key, size in plan.to_json().items()}
        rows.append(
            {
                "model": name,
                **parts,
                "largest buffer": f"{binding / MB:.0f}",
                "reported elsewhere": REPORTED.get(name, ""),
            }
        )
    return rows


def contexts() -> list[dict[str, str]]:
    """One row a phone: the largest context of each model, and the scheme where it is not the
    first of SCHEMES."""
    rows = []
    for phone in PHONES.values():
        row = {"phone": phone.name, "budget": f"{phone.budget / MB:.0f}"}
        row |= {name: _largest(name, phone.budget) for name in MODELS}
        rows.append(row)
    return rows


def _largest(name: str, budget: int) -> str:
    profile, _ = get_target("iphone")
    for scheme in SCHEMES:
        config = largest_context(inputs(name, scheme, 1 << 30), profile, budget)
        # Fewer tokens than these are of no use in a chat.
        if config is not None and config.context_window_size >= 512:
            suffix = "" if scheme == SCHEMES[0] else f" ({scheme})"
            return f"{config.context_window_size}{suffix}"
    return "no"


def phones() -> list[dict[str, str]]:
    """One row a phone: its budget and where that comes from."""
    return [
        {"--budget": f"`{p.name}`", "bytes": f"{p.budget:,}", "reported": p.reported}
        for p in PHONES.values()
    ]


def rewritten(text: str) -> str:
    """The text of docs/ios.md with every table made anew."""
    for name, rows in (("phones", phones), ("plans", plans), ("contexts", contexts)):
        text = replaced(text, name, rows(), PAGE.name)
    return text


if __name__ == "__main__":
    PAGE.write_text(rewritten(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
