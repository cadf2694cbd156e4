"""`package`: several models -> one static library and the bundle of an app."""

from __future__ import annotations

from pathlib import Path

import click

from mlc_compile.cli._output import Output, examples, output_options
from mlc_compile.cli._params import (
    OUT_DIR,
    allow_experimental_option,
    budget_option,
    existing,
)


@click.command(
    "package",
    epilog=examples(
        "mlc_compile package",
        "mlc_compile package mlc-package-config.json -o dist --budget iphone-8gb-increased",
    ),
)
@click.argument("config", default="mlc-package-config.json", metavar="CONFIG", type=existing())
@click.option(
    "-o", "--output", type=OUT_DIR, default="dist", show_default=True, help="Directory to write."
)
@click.option(
    "--opt", default="O2", show_default=True, metavar="O0..O3|k=v;…", help="As for compile."
)
@budget_option
@allow_experimental_option
@output_options
def command(
    config: Path,
    output: Path,
    opt: str,
    budget: int | None,
    allow_experimental: bool,
    out: Output,
) -> None:
    """Put the models of an iOS app together.

    CONFIG is a mlc-package-config.json as for MLC-LLM, whose models are directories made by
    `convert_weight` and `gen_config`. Written are lib/libmodel_iphone.a with every model's library,
    bundle/mlc-app-config.json with the memory that each needs, and bundle/MODEL_ID with the
    parameters of models whose bundle_weight is true.

    For an iPhone the budget is that of iphone-6gb unless --budget gives another. A context that
    does not fit is lowered, or refused where the file's overrides ask for it.
    """
    from mlc_compile.compiler.package import package

    with out.progress() as progress:
        report = package(
            config,
            output,
            budget=budget,
            opt=opt,
            allow_experimental=allow_experimental,
            progress=progress,
        )
    for note in report.notes:
        out.info(note)
    out.result(report)
