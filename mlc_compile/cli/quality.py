"""`quality`: what quantisation costs, on a text."""

from __future__ import annotations

import tempfile
from pathlib import Path

import click

from mlc_compile.cli._models import open_model
from mlc_compile.cli._output import Output, examples, output_options
from mlc_compile.cli._params import (
    LIBRARY,
    OUT_DIR,
    allow_experimental_option,
    existing,
    model_type_option,
    target_option,
)


@click.command(
    "quality",
    epilog=examples(
        "mlc_compile quality out --reference ./SmolLM2-135M-Instruct --text held_out.txt",
        "mlc_compile quality out4 out8 --reference model.gguf --text t.txt --gate kld=0.05",
        "mlc_compile quality ./SmolLM2-135M-Instruct --text held_out.txt -o report \\",
        "    --schemes q4f16_1,q4f16_1+mse,q4f16_1+calibrate,q8f16_1 --calibrate other.txt",
        "mlc_compile quality model-Q4_0.gguf --reference model-f16.gguf --text held_out.txt",
    ),
)
@click.argument("models", metavar="DIR…", nargs=-1, required=True, type=existing())
@click.option(
    "--reference",
    type=existing(),
    help="Checkpoint, or a directory converted with q0f32 or q0f16; with --schemes: MODEL itself.",
)
@click.option("--text", type=existing(dir_okay=False), required=True, help="UTF-8 prose to score.")
@click.option(
    "--schemes",
    metavar="NAME,…",
    help="Convert the one MODEL with each of these and compare them; NAME may be followed by "
    "+absmax, +signed, +mse (scales), +calibrate and +PATTERN=NAME (an override).",
)
@click.option("-o", "--output", type=OUT_DIR, help="Keep what --schemes makes, and the card, here.")
@click.option(
    "--calibrate",
    type=existing(dir_okay=False),
    help="Text for +calibrate; not the one of --text.",
)
@click.option(
    "--lib",
    "libraries",
    type=LIBRARY,
    multiple=True,
    help="Library of each DIR, in their order; default: compiled into a temporary folder.",
)
@click.option("--reference-lib", type=LIBRARY, help="Library of the reference.")
@target_option
@click.option(
    "--window",
    type=click.IntRange(min=8),
    default=512,
    show_default=True,
    help="Tokens of a window; its second half is scored.",
)
@click.option("--max-tokens", type=click.IntRange(min=1), help="Read so much of the text at most.")
@click.option(
    "--gate",
    "gates",
    default="",
    metavar="NAME=LIMIT,…",
    help="Exit 1 when a model misses one: kld, kld_median, kld_p99, kld_p999, kld_max, "
    "ppl, ppl_ratio, rms_delta (at most), top1 (at least).",
)
@click.option("--no-card", is_flag=True, help="Write no quality.md, .json and .png.")
@model_type_option
@allow_experimental_option
@output_options
def command(
    models: tuple[Path, ...],
    reference: Path | None,
    text: Path,
    schemes: str | None,
    output: Path | None,
    calibrate: Path | None,
    libraries: tuple[Path, ...],
    reference_lib: Path | None,
    target: str,
    window: int,
    max_tokens: int | None,
    gates: str,
    no_card: bool,
    model_type: str,
    allow_experimental: bool,
    out: Output,
) -> None:
    """Measure quantised models against a reference on a text.

    Runs both through compiled libraries, teacher-forced, and reports perplexity, KL divergence,
    same-top-1 agreement, effective bits per weight and the tensors with the largest errors. A card
    (quality.md, quality.json, quality.png) is stored in each DIR, with --schemes in -o.

    DIR is a directory made by convert_weight and gen_config, or a checkpoint, which is measured as
    it is. What is missing is converted and compiled into a temporary folder.
    """
    from mlc_compile.errors import CheckFailedError
    from mlc_compile.runtime import quality_command as run
    from mlc_compile.runtime.quality_stats import parse_gates

    request = run.Request(
        models=models,
        reference=reference,
        text=text,
        schemes=schemes,
        output=output,
        calibrate=calibrate,
        libraries=libraries,
        reference_library=reference_lib,
        target=target,
        window=window,
        max_tokens=max_tokens,
        gates=parse_gates(gates),
        card=not no_card,
        allow_experimental=allow_experimental,
    )
    with (
        out.progress() as progress,
        tempfile.TemporaryDirectory(prefix="mlc_compile_quality_") as folder,
    ):
        report, notes = run.measure(
            request,
            Path(folder),
            lambda checkpoint: open_model(
                checkpoint, model_type, out, prove=False, allow_experimental=allow_experimental
            ),
            progress,
        )
    for note in notes:
        out.info(note)
    out.result(report)
    if report.failures:
        raise CheckFailedError(f"quality missed its gates: {'; '.join(report.failures)}")
