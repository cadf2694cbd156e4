"""`list`: the registries of models, quantisation schemes and targets."""

from __future__ import annotations

from typing import Any

import click

from mlc_compile.cli._output import Output, examples, output_options


def models() -> list[dict[str, Any]]:
    """One row for each registered architecture."""
    from mlc_compile.models.registry import ARCHITECTURES

    return [
        {"model_type": key, "classes": ", ".join(arch.hf_classes), "label": arch.label}
        for key, arch in ARCHITECTURES.items()
    ]


def quantizations() -> list[dict[str, Any]]:
    """One row for each registered scheme; 0 bits means not quantised, a group of 0 that a whole
    row shares its scale."""
    from mlc_compile.quantization.scheme import SCHEMES

    return [
        {
            "name": name,
            "bits": scheme.bits,
            "codes": scheme.kind,
            "group_size": scheme.group_size,
            "model_dtype": scheme.model_dtype,
            "layout": scheme.layout,
            "label": scheme.label,
        }
        for name, scheme in SCHEMES.items()
    ]


def targets() -> list[dict[str, Any]]:
    """One row for each registered target."""
    from mlc_compile.targets.profile import TARGETS

    return [
        {"name": name, "summary": target.summary, "label": target.label}
        for name, target in TARGETS.items()
    ]


REGISTRIES = {"models": models, "quantizations": quantizations, "targets": targets}


@click.command(
    "list",
    epilog=examples("mlc_compile list models", "mlc_compile list quantizations --json"),
)
@click.argument("registry", type=click.Choice(list(REGISTRIES)))
@output_options
def command(registry: str, out: Output) -> None:
    """List supported models, quantizations or targets.

    stable: covered by parity tests against a reference. experimental: works, may change. `detect`
    says what a checkpoint of another class is.
    """
    out.table(REGISTRIES[registry]())
