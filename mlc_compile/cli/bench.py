"""`bench`: speed and memory of a compiled library on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from mlc_compile.cli._output import Output, examples, output_options
from mlc_compile.cli._params import MODEL_DIR, library_option

if TYPE_CHECKING:
    from mlc_compile.runtime.bench import BenchReport


@click.command(
    "bench",
    epilog=examples(
        "mlc_compile bench out --lib out/model.so",
        "mlc_compile bench out --lib out/model.so --prompt-tokens 512 --threads 1 --json",
    ),
)
@click.argument("model_dir", metavar="DIR", type=MODEL_DIR)
@library_option
@click.option("--prompt-tokens", type=click.IntRange(min=1), default=128, show_default=True)
@click.option("--decode-tokens", type=click.IntRange(min=1), default=64, show_default=True)
@click.option("--repeats", type=click.IntRange(min=1), default=3, show_default=True)
@click.option("--threads", type=click.IntRange(min=1), help="Default: all cores.")
@output_options
def command(
    model_dir: Path,
    library: Path,
    prompt_tokens: int,
    decode_tokens: int,
    repeats: int,
    threads: int | None,
    out: Output,
) -> BenchReport:
    """Measure prefill and decode speed and peak memory.

    Decode is compared with the read bandwidth of this machine, measured in the same run.
    """
    from mlc_compile.runtime.bench import bench

    with out.progress() as progress:
        report = bench(
            model_dir,
            library,
            prompt_tokens=prompt_tokens,
            decode_tokens=decode_tokens,
            repeats=repeats,
            threads=threads,
            progress=progress,
        )
    out.result(report)
    return report
