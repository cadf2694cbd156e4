"""`verify`: is what the compiled library computes what the model means?"""

from __future__ import annotations

from pathlib import Path

import click

from mlc_compile.cli._output import Output, examples, output_options
from mlc_compile.cli._params import MODEL_DIR, existing, library_option


@click.command(
    "verify",
    epilog=examples(
        "mlc_compile verify out --lib out/model.so --reference ./SmolLM2-135M-Instruct",
        "mlc_compile verify out --lib out/model.so --reference model.gguf --json > parity.json",
    ),
)
@click.argument("model_dir", metavar="DIR", type=MODEL_DIR)
@library_option
@click.option(
    "--reference",
    type=existing(),
    required=True,
    help="Checkpoint to compare with (run by transformers), or a file of stored logits.",
)
@click.option(
    "--decode-steps",
    type=click.IntRange(min=1),
    default=64,
    show_default=True,
    help="Tokens decoded one by one and compared.",
)
@output_options
def command(
    model_dir: Path, library: Path, reference: Path, decode_steps: int, out: Output
) -> None:
    """Compare a library's logits with a reference model's.

    Exit 1 when a threshold is missed. Covers prefill, chunked prefill, decode, a ragged batch,
    fork and rollback, and the wrap of a sliding window. Reports NMSE, maximum error, KL
    divergence and top-1 agreement.
    """
    from mlc_compile.errors import CheckFailedError
    from mlc_compile.runtime.verify import verify

    with out.progress() as progress:
        report = verify(model_dir, library, reference, decode_steps=decode_steps, progress=progress)
    out.result(report)
    if report.failures:
        raise CheckFailedError(f"verify missed its thresholds: {'; '.join(report.failures)}")
