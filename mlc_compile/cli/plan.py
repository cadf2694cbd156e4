"""`plan`: exact device memory of a configuration, without compiling."""

from __future__ import annotations

from pathlib import Path

import click
from click.core import ParameterSource

from mlc_compile.cli._output import Output, examples, output_options
from mlc_compile.cli._params import (
    budget_option,
    existing,
    model_type_option,
    override_option,
    overrides_option,
    target_option,
)


@click.command(
    "plan",
    epilog=examples(
        "mlc_compile plan out --target cpu",
        "mlc_compile plan out --overrides 'context_window_size=8192' --budget 4GiB",
        "mlc_compile plan ./SmolLM2-135M-Instruct --quantization q4f16_1",
        "mlc_compile plan ./SmolLM2-135M-Instruct --fit --budget 500MB",
        "mlc_compile plan out --target iphone --budget iphone-6gb",
    ),
)
@click.argument("source", metavar="SOURCE", type=existing())
@target_option
@click.option("--quantization", metavar="NAME", help="Scheme; needed for a checkpoint.")
@override_option
@model_type_option
@overrides_option
@budget_option
@click.option(
    "--fit",
    is_flag=True,
    help="Choose the best scheme and the largest context that fit --budget; print the commands.",
)
@output_options
def command(
    source: Path,
    target: str,
    quantization: str | None,
    override: str,
    model_type: str,
    overrides: dict[str, int],
    budget: int | None,
    fit: bool,
    out: Output,
) -> None:
    """Plan the device memory without compiling.

    Weights, KV cache, workspace and reserve, in bytes.

    SOURCE is a checkpoint, the directory made by `gen_config`, or its mlc-chat-config.json. A
    plan above --budget is an error that says what would make it fit, and so is a buffer larger
    than the target allows.
    """
    if fit and budget is None:
        raise click.UsageError("--fit needs --budget", click.get_current_context())
    if fit and (quantization is not None or override):
        raise click.UsageError(
            "--fit chooses the scheme: leave --quantization and --override out",
            click.get_current_context(),
        )
    context = click.get_current_context()
    if fit and context.get_parameter_source("model_type") is not ParameterSource.DEFAULT:
        raise click.UsageError(
            "--fit reads the architecture from SOURCE: give the directory made by gen_config",
            context,
        )
    if fit and budget is not None:
        from mlc_compile.compiler.fit import fit_plan

        out.result(fit_plan(source, target, budget=budget, overrides=overrides))
        return
    from mlc_compile.compiler.fit import check_fits
    from mlc_compile.compiler.inputs import load_plan_inputs
    from mlc_compile.compiler.memory import check_binding, estimate_plan, largest_binding
    from mlc_compile.targets.profile import get_target

    profile, _ = get_target(target)
    inputs = load_plan_inputs(source, profile, quantization, overrides, model_type, override)
    for note in inputs.config.notes:
        out.detail(note)
    plan = estimate_plan(inputs.model, inputs.scheme, inputs.config, profile)
    out.result(plan)
    if profile.name == "iphone" and budget is None:
        from mlc_compile.targets.apple.phones import where_it_fits

        out.info(where_it_fits(plan.total))
    check_fits(inputs, profile, plan, budget)
    largest = largest_binding(inputs.model, inputs.scheme, inputs.config)
    check_binding(largest, profile.max_binding_bytes, profile.name)
