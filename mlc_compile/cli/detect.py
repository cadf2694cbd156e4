"""`detect`: what a checkpoint is, by which evidence."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from mlc_compile.cli._models import detect
from mlc_compile.cli._output import Output, examples, output_options
from mlc_compile.cli._params import SOURCE, model_type_option, prove_option, source_format_option

if TYPE_CHECKING:
    from mlc_compile.models.structure import Detection


@click.command(
    "detect",
    epilog=examples(
        "mlc_compile detect ./SmolLM2-135M-Instruct",
        "mlc_compile detect ./my_llama --prove",
        "mlc_compile detect ./my_llama --model-type llama --prove --json",
    ),
)
@click.argument("model", type=SOURCE)
@source_format_option
@model_type_option
@prove_option
@output_options
def command(
    model: Path | str, source_format: str, model_type: str, prove: bool, out: Output
) -> Detection:
    """Say what architecture a checkpoint is, and why.

    By its model type and class where they are known. Otherwise every architecture is tried: it must
    know each key of config.json, and its parameters and the tensors must map one to one. What keys
    and shapes do not show is listed; --prove decides it. Exit 1 where none fits, or several do.

    stable: known, and tested for parity on every change. experimental: matched, and proved equal to
    the checkpoint's own class here. structural-only: matched or named by --model-type, not proved.
    """
    from mlc_compile.errors import CheckFailedError
    from mlc_compile.weights.checkpoint import open_checkpoint

    source = open_checkpoint(model, source_format=source_format)
    detection = detect(source, model_type, out, prove=prove)
    out.result(detection)
    if detection.outcome is None:
        raise CheckFailedError(detection.problem().message)
    return detection
