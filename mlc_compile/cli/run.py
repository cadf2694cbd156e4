"""`run`: generate text with a compiled library on this machine."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlc_compile.cli._output import Output, examples, output_options
from mlc_compile.cli._params import MODEL_DIR, library_option

if TYPE_CHECKING:
    from mlc_compile.runtime.chat import Reply


@click.command(
    "run",
    epilog=examples(
        'mlc_compile run out --lib out/model.so -p "What is the capital of France?"',
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
@click.option(
    "--repetition-penalty",
    type=click.FloatRange(min=0, min_open=True),
    default=1.0,
    show_default=True,
    help="Above 1, tokens of the reply become less likely to come again, by factor.",
)
@click.option(
    "--presence-penalty",
    type=float,
    default=0.0,
    show_default=True,
    help="Subtracted from the logits of tokens of the reply.",
)
@click.option(
    "--frequency-penalty",
    type=float,
    default=0.0,
    show_default=True,
    help="The same, once for each time the token came.",
)
@click.option(
    "--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of the sampling."
)
@output_options
def command(
    model_dir: Path,
    library: Path,
    prompt: str,
    system: str | None,
    raw: bool,
    max_tokens: int,
    out: Output,
    **sampling: Any,
) -> Reply:
    """Generate text with a compiled library.

    DIR holds the parameters and the configuration the library was compiled for.
    """
    if system is not None and raw:
        raise click.UsageError("--system and --raw exclude each other", click.get_current_context())
    from mlc_compile.runtime.chat import ChatSession, Reply
    from mlc_compile.runtime.sampling import Sampling
    from mlc_compile.runtime.threads import pinned_caller

    text = sys.stdin.read() if prompt == "-" else prompt
    session = ChatSession.load(library, model_dir, system=system)
    pieces = []
    chosen = Sampling(**sampling)
    with pinned_caller():
        for piece in session.generate(text, raw=raw, max_tokens=max_tokens, sampling=chosen):
            pieces.append(piece)
            if not out.as_json:
                click.echo(piece, nl=False)
    reply = Reply("".join(pieces), session.stats)
    if out.as_json:
        out.json(reply.to_json())
    else:
        click.echo()
        out.info(session.stats.to_text())
    return reply
