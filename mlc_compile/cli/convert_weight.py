"""`convert_weight`: checkpoint -> quantised parameter shards, tensor-cache.json, manifest."""

from __future__ import annotations

from pathlib import Path

import click

from mlc_compile.cli._models import open_model
from mlc_compile.cli._output import Output, examples, output_options
from mlc_compile.cli._params import (
    MODEL,
    OUT_DIR,
    allow_experimental_option,
    model_type_option,
    prove_option,
    quantization_option,
    source_format_option,
)


@click.command(
    "convert_weight",
    epilog=examples(
        "mlc_compile convert_weight ./SmolLM2-135M-Instruct --quantization q4f16_1 -o out",
        "mlc_compile convert_weight model.gguf --quantization q0f32 -o out --dry-run",
        "mlc_compile convert_weight ./mistral --quantization q4f16_1 -o out --jobs 4 --overwrite",
    ),
)
@click.argument("model", type=MODEL)
@quantization_option
@click.option("-o", "--output", type=OUT_DIR, required=True, help="Directory to make.")
@source_format_option
@model_type_option
@prove_option
@allow_experimental_option
@click.option(
    "--jobs",
    type=click.IntRange(min=1),
    default=2,
    show_default=True,
    help="Worker threads; more are faster and take more memory. The result is the same.",
)
@click.option("--dry-run", is_flag=True, help="Check everything and show the sizes; write nothing.")
@click.option("--overwrite", is_flag=True, help="Replace a finished conversion in the directory.")
@output_options
def command(
    model: Path,
    quantization: str,
    output: Path,
    source_format: str,
    model_type: str,
    prove: bool,
    allow_experimental: bool,
    jobs: int,
    dry_run: bool,
    overwrite: bool,
    out: Output,
) -> None:
    """Quantise a checkpoint's weights into loadable shards.

    MODEL is a Hugging Face directory, a .safetensors file beside its config.json, or a .gguf
    file. The directory appears whole or not at all; its manifest.json lists every file and
    tensor with its hash.
    """
    from mlc_compile.quantization.scheme import get_scheme
    from mlc_compile.weights.checkpoint import open_checkpoint
    from mlc_compile.weights.convert import convert_weight, plan_conversion

    scheme = get_scheme(quantization)
    source = open_checkpoint(model, source_format=source_format)
    arch = open_model(source, model_type, out, prove=prove, allow_experimental=allow_experimental)
    if dry_run:
        out.result(plan_conversion(source, arch, scheme))
        return
    with out.progress(of_bytes=True) as progress:
        report = convert_weight(
            source,
            arch,
            scheme,
            output,
            overwrite=overwrite,
            jobs=jobs,
            progress=progress,
            options={"source_format": source_format, "model_type": model_type},
        )
    out.result(report)
