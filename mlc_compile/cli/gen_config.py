"""`gen_config`: checkpoint -> mlc-chat-config.json and the tokenizer files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from mlc_compile.cli._models import open_model
from mlc_compile.cli._output import Output, examples, output_options
from mlc_compile.cli._params import (
    OUT_DIR,
    SOURCE,
    allow_experimental_option,
    compile_number_options,
    model_type_option,
    override_option,
    prove_option,
    quantization_option,
    source_format_option,
)


@click.command(
    "gen_config",
    epilog=examples(
        "mlc_compile gen_config ./SmolLM2-135M-Instruct --quantization q4f16_1 -o out",
        "mlc_compile gen_config model.gguf --quantization q4f16_1 -o out \\",
        "    --context-window-size 4096 --prefill-chunk-size 512 --max-batch-size 4",
        "mlc_compile gen_config ./mistral --quantization q4f16_1 -o out \\",
        "    --sliding-window-size 4096 --attention-sink-size 4",
        "mlc_compile gen_config ./mistral --quantization q4f16_1 -o out \\",
        "    --override 'lm_head=q8f16_1,layers.0-1.*=q8f16_1'",
    ),
)
@click.argument("model", type=SOURCE)
@quantization_option
@override_option
@click.option("-o", "--output", type=OUT_DIR, required=True, help="Directory of the artefacts.")
@click.option(
    "--conv-template",
    default="auto",
    show_default=True,
    metavar="NAME",
    help="Conversation template; auto derives and proves it from chat_template.",
)
@compile_number_options
@click.option("--overwrite", is_flag=True, help="Replace a configuration in the directory.")
@source_format_option
@model_type_option
@prove_option
@allow_experimental_option
@output_options
def command(
    model: Path | str,
    quantization: str,
    override: str,
    output: Path,
    conv_template: str,
    overwrite: bool,
    source_format: str,
    model_type: str,
    prove: bool,
    allow_experimental: bool,
    out: Output,
    **numbers: Any,  # int or None for each of COMPILE_NUMBERS
) -> None:
    """Write mlc-chat-config.json and the tokenizer files.

    MODEL is a Hugging Face directory, a .safetensors or torch file beside its config.json, or a
    .gguf file, here or behind a URL. The window, chunk and batch sizes plan the memory of the
    compiled library. Those not given are read from the checkpoint and capped to what an ordinary
    machine holds; the command says what it chose and why.
    """
    from mlc_compile.chat_config import gen_config
    from mlc_compile.config import resolve_compile_config
    from mlc_compile.quantization.policy import with_overrides
    from mlc_compile.quantization.scheme import get_scheme
    from mlc_compile.weights.checkpoint import open_checkpoint

    base = get_scheme(quantization)
    source = open_checkpoint(model, source_format=source_format)
    arch = open_model(source, model_type, out, prove=prove, allow_experimental=allow_experimental)
    scheme = with_overrides(base, override, arch)
    config = resolve_compile_config(arch.config, **numbers)
    report = gen_config(
        source,
        arch,
        scheme,
        config,
        output,
        conv_template=conv_template,
        overwrite=overwrite,
    )
    for note in report.notes:
        out.info(note)
    template = report.conv_template.name
    if out.as_json:
        out.json(
            {
                "path": str(report.path),
                "files": [str(file) for file in report.files],
                "conv_template": template,
                "conversations_compared": report.proved,
                "notes": list(report.notes),
            }
        )
        return
    click.echo(f"written to    {', '.join(str(file) for file in report.files)}")
    proof = f"equal to the checkpoint's on {report.proved} conversations" if report.proved else ""
    click.echo(f"conversation  {template}{', ' if proof else ''}{proof}")
