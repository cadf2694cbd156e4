"""`convert_weight`: checkpoint -> quantised parameter shards, tensor-cache.json, manifest."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click

from mlc_compile.cli._models import open_model
from mlc_compile.cli._output import Output, examples, output_options
from mlc_compile.cli._params import (
    OUT_DIR,
    SIZE,
    SOURCE,
    allow_experimental_option,
    existing,
    lora_option,
    model_type_option,
    override_option,
    prove_option,
    quantization_option,
    scales_option,
    source_format_option,
)


@click.command(
    "convert_weight",
    epilog=examples(
        "mlc_compile convert_weight ./SmolLM2-135M-Instruct --quantization q4f16_1 -o out",
        "mlc_compile convert_weight model.gguf --quantization q0f32 -o out --dry-run",
        "mlc_compile convert_weight ./mistral --quantization q4f16_1 -o out --max-ram 1GiB",
        "mlc_compile convert_weight ./mistral --quantization q4f16_1 -o out "
        "--override 'lm_head=q8f16_1,layers.0-1.*=q8f16_1' --calibrate text.txt",
        "mlc_compile convert_weight https://host/mistral --lora ./adapter --quantization q4f16_1 "
        "-o out",
    ),
)
@click.argument("model", type=SOURCE)
@quantization_option
@override_option
@click.option("-o", "--output", type=OUT_DIR, required=True, help="Directory to make.")
@source_format_option
@lora_option
@model_type_option
@prove_option
@allow_experimental_option
@scales_option
@click.option(
    "--calibrate",
    type=existing(dir_okay=False),
    metavar="TEXT",
    help="Weigh the error of each input channel by how strongly this text drives it; takes a pass "
    "of the unquantised model over the text, and --scales mse with it.",
)
@click.option(
    "--jobs",
    type=click.IntRange(min=1),
    help="Work items at once; the number of cores by default. The result is the same.",
)
@click.option(
    "--max-ram",
    type=SIZE,
    help="Keep this process's memory below a size such as 1GiB. The result is the same.",
)
@click.option(
    "--device",
    type=click.Choice(["auto", "cpu", "cuda", "numpy"]),
    default="auto",
    show_default=True,
    help="What packs the weights; auto is numpy for small models and the CPU's own instructions "
    "for others, cuda is an NVIDIA GPU. The result is the same.",
)
@click.option(
    "--dry-run",
    is_flag=True,
    help="Check everything, show sizes, memory and an estimate of the time; write nothing.",
)
@click.option(
    "--source-hash",
    type=click.Choice(["blake3", "sha256", "none"]),
    default="blake3",
    show_default=True,
    help="How manifest.json identifies the source files. SHA-256 is what hubs list, and takes a "
    "third of the time of a plain conversion, BLAKE3 a sixth.",
)
@click.option("--overwrite", is_flag=True, help="Replace a finished conversion in the directory.")
@output_options
def command(
    model: Path | str,
    quantization: str,
    override: str,
    output: Path,
    source_format: str,
    lora: tuple[Path | str, ...],
    model_type: str,
    prove: bool,
    allow_experimental: bool,
    scales: Any,
    calibrate: Path | None,
    jobs: int | None,
    max_ram: int | None,
    device: Any,
    dry_run: bool,
    source_hash: Any,
    overwrite: bool,
    out: Output,
) -> None:
    """Quantise a checkpoint's weights into loadable shards.

    MODEL is a Hugging Face directory, a .safetensors or torch file beside its config.json, or a
    .gguf file, here or behind a URL such as https://host/model/. The directory appears whole or
    not at all; its manifest.json lists every file and tensor with its hash.

    A run that was interrupted, killed or met a full disk is taken up by the same command: what it
    had finished is checked and kept.
    """
    if calibrate is None:
        # Packing has no matrix products: the threads that numpy's BLAS starts would only spin.
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    from mlc_compile.quantization.policy import with_overrides
    from mlc_compile.quantization.scheme import get_scheme
    from mlc_compile.weights.checkpoint import open_checkpoint
    from mlc_compile.weights.convert import convert_weight, estimate_conversion
    from mlc_compile.weights.files import locate

    scheme = get_scheme(quantization)
    source = open_checkpoint(model, source_format=source_format, lora=lora)
    arch = open_model(source, model_type, out, prove=prove, allow_experimental=allow_experimental)
    if override:
        scheme = with_overrides(scheme, override, arch)
    scales = "mse" if calibrate is not None else scales
    work = {
        "jobs": jobs,
        "device": device,
        "max_ram": max_ram,
        "scales": scales,
        "source_hash": source_hash,
    }
    if dry_run:
        out.result(estimate_conversion(source, arch, scheme, **work))
        return
    options: dict[str, Any] = {
        "source_format": source_format,
        "model_type": model_type,
        "scales": scales,
    }
    if lora:
        options["lora"] = [locate(adapter).name for adapter in lora]
    importance = None
    if calibrate is not None:
        from mlc_compile.runtime.calibrate import importance as measure
        from mlc_compile.runtime.text_windows import read_text

        with out.progress() as progress:
            importance = measure(source, arch, read_text(calibrate), progress=progress)
        options["calibration"] = importance.options()
    try:
        with out.progress(of_bytes=True) as progress:
            report = convert_weight(
                source,
                arch,
                scheme,
                output,
                overwrite=overwrite,
                importance=importance,
                progress=progress,
                options=options,
                **work,
            )
    except KeyboardInterrupt:
        out.info(f"what was done is kept in {output}: the same command goes on from there")
        raise
    out.result(report)
