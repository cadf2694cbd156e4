"""`compile`: configuration -> model library for a target."""

from __future__ import annotations

from pathlib import Path

import click

from mlc_compile.cli._output import Output, examples, output_options
from mlc_compile.cli._params import (
    OUT_DIR,
    OUT_FILE,
    SIZE,
    allow_experimental_option,
    budget_option,
    existing,
    overrides_option,
    target_option,
)


@click.command(
    "compile",
    epilog=examples(
        "mlc_compile compile out --target cpu -o out/model.so",
        "mlc_compile compile out --target webgpu -o out/model.wasm",
        "mlc_compile compile out --target iphone -o out/libmodel.a --budget iphone-6gb",
        "mlc_compile compile out/mlc-chat-config.json --target cpu -o model.so --budget 2GiB",
        "mlc_compile compile out -o model.so --overrides 'prefill_chunk_size=512;max_batch_size=1'",
    ),
)
@click.argument("source", metavar="DIR_OR_CONFIG", type=existing())
@target_option
@click.option("-o", "--output", type=OUT_FILE, required=True, help="Library to write.")
@click.option(
    "--opt",
    default="O2",
    show_default=True,
    metavar="O0..O3|k=v;…",
    help="Optimisation level, or single switches.",
)
@overrides_option
@budget_option
@click.option(
    "--max-binding-size",
    type=SIZE,
    help="Largest buffer that a kernel may bind; default: the target's.",
)
@click.option(
    "--web-toolchain",
    type=click.Choice(["zig", "emscripten"]),
    default="zig",
    show_default=True,
    help="What compiles the web runtime and links a .wasm library.",
)
@click.option(
    "--system-lib-prefix",
    metavar="NAME_",
    help="What a .tar or .a registers itself under in an app: C letters, 8 at least, _ at the "
    "end; default: derived from the model, its scheme and its sizes.",
)
@allow_experimental_option
@click.option("--debug-dump", type=OUT_DIR, help="Write the IR after each phase into DIR.")
@output_options
def command(
    source: Path,
    target: str,
    output: Path,
    opt: str,
    overrides: dict[str, int],
    budget: int | None,
    max_binding_size: int | None,
    web_toolchain: str,
    system_lib_prefix: str | None,
    allow_experimental: bool,
    debug_dump: Path | None,
    out: Output,
) -> None:
    """Compile the model library for a target.

    DIR_OR_CONFIG is the directory made by `gen_config`, or its mlc-chat-config.json. No weights
    are needed, and no device of the target either. A plan above --budget is refused before the
    long work starts.
    """
    from mlc_compile.compiler.build import compile_library

    with out.progress() as progress:
        report = compile_library(
            source,
            target,
            output,
            opt=opt,
            overrides=overrides,
            budget=budget,
            debug_dump=debug_dump,
            max_binding_bytes=max_binding_size,
            web_toolchain=web_toolchain,
            system_lib_prefix=system_lib_prefix,
            allow_experimental=allow_experimental,
            progress=progress,
        )
    for note in report.notes:
        out.detail(note)
    out.result(report)
