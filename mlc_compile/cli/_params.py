"""Option types shared by commands: sizes (`4GiB`) and overrides (`k=v;k2=v2`)."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])

SIZE_UNITS: Mapping[str, int] = {
    "B": 1,
    **{f"{prefix}B": 10 ** (3 * power) for power, prefix in enumerate("KMGT", start=1)},
    **{f"{prefix}iB": 1 << (10 * power) for power, prefix in enumerate("KMGT", start=1)},
}

# The numbers that plan memory, by their names in mlc-chat-config.json -> what --help says.
COMPILE_NUMBERS: Mapping[str, str] = {
    "context_window_size": "Positions a sequence may hold (tokens).",
    "sliding_window_size": "Keep only this many latest tokens of a sequence; -1: all.",
    "attention_sink_size": "First tokens kept for ever beside the sliding window.",
    "prefill_chunk_size": "Tokens processed in one prefill step; bounds the workspace.",
    "max_batch_size": "Sequences served at once.",
    "tensor_parallel_shards": "Devices the weights are split over.",
}


# ParamType became generic in a later click than the oldest we accept.
class SizeType(click.ParamType):  # type: ignore[type-arg,unused-ignore]
    """A number of bytes with its unit: `4GiB`, `1.5 GB`, `500MB`; converts to int bytes."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]+)", value.strip())
        unit = match and {u.lower(): u for u in SIZE_UNITS}.get(match[2].lower())
        if not match or not unit:
            # `4G` is 7 % more for one reader than for the next; a budget must not be guessed.
            self.fail(f"'{value}' is not a size; write for example 4GiB or 500MB", param, ctx)
        size = int(float(match[1]) * SIZE_UNITS[unit])
        if size <= 0:
            self.fail(f"'{value}' must be above zero", param, ctx)
        return size


class BudgetType(SizeType):
    """A size, or the name of a phone in targets/apple/phones.py."""

    name = "size|phone"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if not isinstance(value, str) or not value.strip().lower().startswith("iphone"):
            return super().convert(value, param, ctx)
        from mlc_compile.targets.apple.phones import closest, find_phone

        phone = find_phone(value.strip())
        if phone is None:
            self.fail(f"'{value}' is no phone; use {', '.join(closest(value))}", param, ctx)
        return phone.budget


class OverridesType(click.ParamType):  # type: ignore[type-arg,unused-ignore]
    """`key=value;key2=value2` over the memory-planning numbers; converts to dict[str, int]."""

    name = "k=v;k2=v2"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> dict[str, int]:
        if isinstance(value, dict):
            return value
        numbers: dict[str, int] = {}
        for item in filter(None, (part.strip() for part in value.split(";"))):
            key, equals, text = (part.strip() for part in item.partition("="))
            if not equals or not text:
                self.fail(f"'{item}' has no value; write KEY=NUMBER;KEY2=NUMBER2", param, ctx)
            if key not in COMPILE_NUMBERS:
                near = difflib.get_close_matches(key, COMPILE_NUMBERS, n=2) or COMPILE_NUMBERS
                self.fail(f"unknown key '{key}'; use {', '.join(near)}", param, ctx)
            if key in numbers:
                self.fail(f"'{key}' is given twice", param, ctx)
            if not re.fullmatch(r"[+-]?\d+", text):
                self.fail(f"'{key}={text}' is not a whole number", param, ctx)
            numbers[key] = int(text)
        return numbers


def compile_number_options(command: F) -> F:
    """Add one option for each of COMPILE_NUMBERS (None when not given), as MLC names them."""
    for key in reversed(tuple(COMPILE_NUMBERS)):
        command = click.option(
            f"--{key.replace('_', '-')}",
            key,
            type=int,
            metavar="N",
            help=COMPILE_NUMBERS[key],
        )(command)
    return command


def existing(**kinds: bool) -> click.Path:
    """A path that must exist, given to the command as `pathlib.Path`."""
    return click.Path(exists=True, path_type=Path, **kinds)


class SourceType(click.Path):
    """A path that must exist, or a URL; converts to `Path` or str."""

    name = "path|url"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if isinstance(value, str) and "://" in value:
            return value
        return super().convert(value, param, ctx)


MODEL = existing()
SOURCE = SourceType(exists=True, path_type=Path)
MODEL_DIR = existing(file_okay=False)
LIBRARY = existing(dir_okay=False)
OUT_DIR = click.Path(file_okay=False, path_type=Path)
OUT_FILE = click.Path(dir_okay=False, path_type=Path)
SIZE = SizeType()
OVERRIDES = OverridesType()

quantization_option = click.option(
    "--quantization", required=True, metavar="NAME", help="Scheme; see `list quantizations`."
)


def _joined(_context: click.Context, _param: click.Parameter, given: tuple[str, ...]) -> str:
    return ",".join(given)


override_option = click.option(
    "--override",
    multiple=True,
    callback=_joined,
    metavar="PATTERN=SCHEME,…",
    help="Hold the weights that match by another scheme, such as "
    "'lm_head=q8f16_1,layers.0-1.*=q8f16_1'. The first match counts; may be given again.",
)
scales_option = click.option(
    "--scales",
    type=click.Choice(["auto", "absmax", "signed", "mse"]),
    default="auto",
    show_default=True,
    help="How the scale of a group is chosen: absmax is from its largest weight, as MLC does; "
    "signed so that all codes are used; mse by a search for the least squared error; auto is "
    "signed for up to 4 bits and absmax for others. All give the same format.",
)
model_type_option = click.option(
    "--model-type",
    default="auto",
    show_default=True,
    metavar="NAME",
    help="Architecture; auto reads it from the checkpoint. See `list models`.",
)
allow_experimental_option = click.option(
    "--allow-experimental",
    is_flag=True,
    help="Take an architecture that is matched by structure alone; see `detect`.",
)
prove_option = click.option(
    "--prove",
    is_flag=True,
    help="Compare what is matched by structure with the checkpoint's own class in transformers: a "
    "small one with random weights, some seconds.",
)
source_format_option = click.option(
    "--source-format",
    type=click.Choice(["auto", "safetensors", "torch", "gguf"]),
    default="auto",
    show_default=True,
    help="How MODEL is stored; auto takes safetensors where there are several.",
)
lora_option = click.option(
    "--lora",
    type=SourceType(exists=True, file_okay=False, path_type=Path),
    multiple=True,
    metavar="DIR",
    help="Merge a PEFT LoRA adapter into the weights; may be given again.",
)
target_option = click.option(
    "--target",
    "--device",
    "target",
    default="cpu",
    show_default=True,
    metavar="NAME",
    help="Where the library will run; see `list targets`.",
)
overrides_option = click.option(
    "--overrides",
    type=OVERRIDES,
    default="",
    help="Replace numbers of the configuration: " + ", ".join(COMPILE_NUMBERS) + ".",
)
budget_option = click.option(
    "--budget",
    type=BudgetType(),
    help="Device memory that the plan must fit in, such as 4GiB, or a phone, such as iphone-6gb.",
)
library_option = click.option(
    "--lib", "library", type=LIBRARY, required=True, help="Library made by `compile`."
)
