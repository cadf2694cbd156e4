"""`verify`: is what the compiled library computes what the model means?"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mlc_compile.cli._output import Output, examples, output_options
from mlc_compile.cli._params import MODEL_DIR, OUT_FILE, existing, library_option

if TYPE_CHECKING:
    from mlc_compile.runtime.bisect import BisectReport
    from mlc_compile.runtime.verify import VerifyReport


@click.command(
    "verify",
    epilog=examples(
        "mlc_compile verify out --lib out/model.so --reference ./SmolLM2-135M-Instruct",
        "mlc_compile verify out --lib out/model.so --reference model.gguf --json > parity.json",
        "mlc_compile verify out --lib out/model.so --reference model.gguf --write-golden out.npz",
        "mlc_compile verify out --lib out/model.so --reference out.npz",
        "mlc_compile verify out --lib out/model.so --reference out.npz --bisect",
    ),
)
@click.argument("model_dir", metavar="DIR", type=MODEL_DIR)
@library_option
@click.option(
    "--reference",
    type=existing(),
    required=True,
    help="Checkpoint to compare with, or a file of stored logits (.npz).",
)
@click.option(
    "--engine",
    type=click.Choice(["auto", "transformers", "numpy"]),
    default="auto",
    show_default=True,
    help="What runs the checkpoint in float32; auto takes transformers where it is installed.",
)
@click.option(
    "--decode-steps",
    type=click.IntRange(min=1),
    default=64,
    show_default=True,
    help="Tokens decoded one by one and compared.",
)
@click.option(
    "--original",
    is_flag=True,
    help="Also report the quantisation loss: stored weights against the checkpoint's own.",
)
@click.option(
    "--thorough",
    is_flag=True,
    help="Also what takes the reference minutes: the whole context, a large window's wrap.",
)
@click.option(
    "--write-golden",
    type=OUT_FILE,
    help="Store the reference's logits, for machines without the checkpoint.",
)
@click.option(
    "--bisect",
    is_flag=True,
    help="Where parity is missed, compile again without each --opt switch and name the one to "
    "blame.",
)
@output_options
def command(
    model_dir: Path,
    library: Path,
    reference: Path,
    engine: str,
    decode_steps: int,
    original: bool,
    thorough: bool,
    write_golden: Path | None,
    bisect: bool,
    out: Output,
) -> None:
    """Compare a library's logits with a reference model's.

    Exit 1 when a threshold is missed. Covers prefill, chunked prefill, decode, a ragged batch,
    batch_verify, fork and rollback, the wrap of a sliding window and the end of the context.
    Reports NMSE, maximum error, KL divergence and top-1 agreement.

    The reference computes with the stored weights, dequantised to float32, so that quantisation
    loss is not in the comparison; --original reports it.
    """
    from mlc_compile.errors import CheckFailedError
    from mlc_compile.runtime import bisect as bisection
    from mlc_compile.runtime import verify as verification

    run: Callable[..., VerifyReport | BisectReport]
    run = bisection.bisect if bisect else verification.verify
    with out.progress() as progress:
        report = run(
            model_dir,
            library,
            reference,
            decode_steps=decode_steps,
            progress=progress,
            engine=engine,
            original=original,
            thorough=thorough,
            write_golden=write_golden,
        )
    out.result(report)
    if report.failures:
        found = f"; bisect: {report.verdict}" if isinstance(report, bisection.BisectReport) else ""
        raise CheckFailedError(f"verify missed its thresholds: {'; '.join(report.failures)}{found}")
