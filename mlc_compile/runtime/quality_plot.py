"""The plot of a quality report, with matplotlib (the extra `plot`)."""

from __future__ import annotations

import io
import math
from typing import TYPE_CHECKING, Any

from mlc_compile.errors import EnvironmentLacksError
from mlc_compile.runtime.quality_stats import PERCENTILES

if TYPE_CHECKING:
    from mlc_compile.runtime.quality_report import ModelQuality, QualityReport

_FLOOR = 1e-8  # what a logarithmic axis shows in place of 0
_TENSORS = 15


def draw(report: QualityReport) -> bytes:
    """A PNG: of several models, KL divergence over bits per weight; of one, its worst tensors;
    beside it the distribution of the KL divergence over positions.

    Raises EnvironmentLacksError without matplotlib.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise EnvironmentLacksError(
            "matplotlib is not installed", hint="pip install 'mlc-compile[plot]'"
        ) from error
    figure = Figure(figsize=(12, 5), layout="constrained")
    left, right = figure.subplots(1, 2)
    if len(report.models) > 1:
        _sizes(left, report.models)
    else:
        _tensors(left, report.models[0])
    for model in report.models:
        shares = [1 - p / 100 for p in PERCENTILES]
        right.plot(_shown(model.figures.curve), shares, label=model.name, marker=".")
    right.set(
        xscale="log",
        xlabel="KL divergence (nats)",
        ylabel="share of positions above it",
        title="KL divergence per position",
    )
    right.grid(alpha=0.3)
    if len(report.models) > 1:
        right.legend(fontsize="small")
    figure.suptitle(f"{report.reference.name}: {report.scored} tokens of {report.text}")
    buffer = io.BytesIO()
    # Neither a date nor a version: the same report gives the same file.
    FigureCanvasAgg(figure).print_png(buffer, metadata={"Software": None})
    return buffer.getvalue()


def _shown(values: tuple[float, ...]) -> list[float]:
    return [max(x, _FLOOR) if math.isfinite(x) else math.nan for x in values]


def _sizes(axes: Any, models: tuple[ModelQuality, ...]) -> None:
    for model in models:
        kld = model.figures.kld
        [value] = _shown((kld.value,))
        axes.errorbar(model.bits_per_weight, value, yerr=kld.error, fmt="o", capsize=3)
        axes.annotate(
            model.name,
            (model.bits_per_weight, value),
            xytext=(6, 4),
            textcoords="offset points",
            fontsize="small",
        )
    axes.set(
        yscale="log",
        xlabel="effective bits per weight",
        ylabel="mean KL divergence (nats per token)",
        title="size and loss",
    )
    axes.grid(alpha=0.3)


def _tensors(axes: Any, model: ModelQuality) -> None:
    worst = model.tensors[:_TENSORS][::-1]
    axes.barh(
        [n.removesuffix(".weight").removeprefix("model.") for n, _ in worst],
        [error for _, error in worst],
    )
    axes.set(xlabel="relative dequantisation error", title=f"worst tensors of {model.name}")
    axes.tick_params(axis="y", labelsize="small")
