"""`inspect`: what an artefact is and whether it is whole."""

from __future__ import annotations

from pathlib import Path

import click

from mlc_compile.cli._output import Output, examples, output_options
from mlc_compile.cli._params import existing


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
def command(path: Path, check: bool, out: Output) -> None:
    """Show what an artefact holds; check that it is whole.

    PATH is a library or a directory of parameters: metadata, functions, memory plan, hashes.
    """
    if check and not path.is_dir():
        raise click.UsageError(
            "--check needs a directory with manifest.json", click.get_current_context()
        )
    if not check:
        from mlc_compile.runtime.inspect import inspect_artifact

        out.result(inspect_artifact(path))
        return
    from mlc_compile.errors import CheckFailedError
    from mlc_compile.manifest import check_directory

    with out.progress(of_bytes=True) as progress:
        report = check_directory(path, progress=progress)
    out.result(report)
    if not report.ok:
        raise CheckFailedError(f"{path} is not what its manifest.json says")
