"""`inspect`: what an artefact is and whether it is whole."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from mlc_compile.cli._output import Output, examples, output_options
from mlc_compile.cli._params import existing

if TYPE_CHECKING:
    from mlc_compile.runtime.inspect import LibraryReport, ParamsReport


@click.command(
    "inspect",
    epilog=examples(
        "mlc_compile inspect out/model.so",
        "mlc_compile inspect out --check",
        "mlc_compile inspect out/model.so --json",
    ),
)
@click.argument("path", type=existing())
@click.option(
    "--check",
    is_flag=True,
    help="Compare every file and tensor with manifest.json; exit 1 on a difference.",
)
@output_options
def command(path: Path, check: bool, out: Output) -> LibraryReport | ParamsReport:
    """Show what an artefact holds; check that it is whole.

    PATH is a library or a directory of parameters: metadata, functions, memory plan, hashes.
    """
    if check and not path.is_dir():
        raise click.UsageError(
            "--check needs a directory with manifest.json", click.get_current_context()
        )
    from mlc_compile.errors import CheckFailedError
    from mlc_compile.runtime.inspect import ParamsReport, inspect_artifact

    with out.progress(of_bytes=True) as progress:
        report = inspect_artifact(path, check=check, progress=progress)
    out.result(report)
    if isinstance(report, ParamsReport) and not report.ok:
        raise CheckFailedError(f"{path} is not what its manifest.json says")
    return report
