"""`run`: generate text with a compiled library on this machine."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from mlc_compile.cli._output import Output, examples, output_options
from mlc_compile.cli._params import MODEL_DIR, library_option


@click.command(
    "run",
    epilog=examples(
        'mlc_compile run out --lib out/model.so -p "The capital of France is"',
        'mlc_compile run out --lib out/model.so -p "Tell me a story." --temperature 0.8 --seed 1',
        "cat prompt.txt | mlc_compile run out --lib out/model.so -p - --raw",
    ),
)
@click.argument("model_dir", metavar="DIR", type=MODEL_DIR)
@library_option
@click.option("-p", "--prompt", required=True, metavar="TEXT", help="What to say; - reads stdin.")
@click.option("--system", metavar="TEXT", help="System message in place of the template's.")
@click.option("--raw", is_flag=True, help="Continue the text itself; no conversation template.")
@click.option(
    "--max-tokens", type=click.IntRange(min=1), default=128, show_default=True, help="Stop there."
)
@click.option(
    "--temperature",
    type=click.FloatRange(min=0),
    default=0.0,
    show_default=True,
    help="0 takes the likeliest token each time.",
)
@click.option(
    "--top-p",
    type=click.FloatRange(min=0, max=1, min_open=True),
    default=1.0,
    show_default=True,
    help="Sample from the likeliest tokens that make up this probability.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of the sampling.")
@output_options
def command(
    model_dir: Path,
    library: Path,
    prompt: str,
    system: str | None,
    raw: bool,
    max_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
    out: Output,
) -> None:
    """Generate text with a compiled library.

    DIR holds the parameters and the configuration the library was compiled for.
    """
    if system is not None and raw:
        raise click.UsageError("--system and --raw exclude each other", click.get_current_context())
    from mlc_compile.runtime.chat import Chat

    text = sys.stdin.read() if prompt == "-" else prompt
    chat = Chat.load(library, model_dir)
    pieces = []
    for piece in chat.generate(
        text,
        system=system,
        raw=raw,
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
    ):
        pieces.append(piece)
        if not out.as_json:
            click.echo(piece, nl=False)
    stats = chat.stats()
    if out.as_json:
        out.json({"text": "".join(pieces), **stats.to_json()})
    else:
        click.echo()
        out.info(stats.to_text())
