"""What commands print: results on stdout (text, or JSON with `--json`), the rest on stderr.

- `-v` adds detail, `-q` leaves only results and errors.
- Progress is a bar with rate and time left on a terminal, plain lines otherwise.
"""

from __future__ import annotations

import functools
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import click

Progress = Callable[[str, int, int], None]
"""What libraries call while they work: (label of the present step, done, total)."""

PLAIN_LINE_SECONDS = 5.0


class Report(Protocol):
    """What a library function returns to be shown."""

    def to_json(self) -> Mapping[str, Any]:
        """JSON-ready data."""

    def to_text(self) -> str:
        """The same for people, without a final newline."""


class Output:
    """The printing side of one command run.

    verbosity: -1 quiet, 0 normal, 1 verbose. as_json: results as one JSON document on stdout.
    """

    def __init__(self, verbosity: int = 0, as_json: bool = False) -> None:
        self.verbosity = verbosity
        self.as_json = as_json

    def info(self, line: str) -> None:
        """A line a user wants unless they asked for quiet."""
        if self.verbosity >= 0:
            click.echo(line, err=True)

    def detail(self, line: str) -> None:
        """A line shown with `-v`."""
        if self.verbosity >= 1:
            click.echo(line, err=True)

    def json(self, data: Any) -> None:
        """One JSON document on stdout."""
        click.echo(json.dumps(data, indent=2, ensure_ascii=False))

    def result(self, report: Report) -> None:
        """The command's result on stdout."""
        if self.as_json:
            self.json(report.to_json())
        else:
            click.echo(report.to_text())

    def table(self, rows: list[dict[str, Any]]) -> None:
        """Rows with the same keys; the keys are the columns."""
        if self.as_json:
            self.json(rows)
            return
        from rich.box import SIMPLE_HEAD
        from rich.console import Console
        from rich.table import Table

        table = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False)
        for column in rows[0] if rows else ():
            table.add_column(column.replace("_", " "), no_wrap=True)
        for row in rows:
            table.add_row(*(str(cell) for cell in row.values()))
        # Away from a terminal nothing may be cut to an imagined width.
        Console(width=None if sys.stdout.isatty() else 400).print(table)

    @contextmanager
    def progress(self, *, of_bytes: bool = False) -> Iterator[Progress]:
        """A callback (label, done, total) to hand to a library; total counts bytes or steps."""
        if self.verbosity < 0:
            yield lambda label, done, total: None
        elif sys.stderr.isatty():
            with _bar(of_bytes) as update:
                yield update
        else:
            yield PlainProgress(self.info, of_bytes)


@contextmanager
def _bar(of_bytes: bool) -> Iterator[Progress]:
    """A rich progress bar on stderr."""
    from rich import progress
    from rich.console import Console

    counts: list[progress.ProgressColumn] = (
        [progress.DownloadColumn(), progress.TransferSpeedColumn()]
        if of_bytes
        else [progress.MofNCompleteColumn(), progress.TimeElapsedColumn()]
    )
    with progress.Progress(
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        *counts,
        progress.TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    ) as bar:
        task: progress.TaskID | None = None

        def update(label: str, done: int, total: int) -> None:
            nonlocal task
            if task is None:  # what an earlier run had done has no part in the rate
                task = bar.add_task(label, completed=done, total=total)
            bar.update(task, description=label, completed=done, total=total)

        yield update


class PlainProgress:
    """Progress as whole lines: at the end, and every few seconds before it.

    Steps (not bytes) are few and each gets its line when it starts. The rate of bytes is what came
    after the first call: that tells what an earlier run had done already.
    """

    def __init__(
        self,
        emit: Callable[[str], None],
        of_bytes: bool,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.emit = emit
        self.of_bytes = of_bytes
        self.clock = clock
        self.started = self.last = clock()
        self.label: str | None = None
        self.first: tuple[float, int] | None = None

    def __call__(self, label: str, done: int, total: int) -> None:
        now = self.clock()
        since, before = self.first or (self.started, 0)
        self.first = self.first or (now, done)
        new_step = not self.of_bytes and label != self.label
        if not (new_step or done >= total or now - self.last >= PLAIN_LINE_SECONDS):
            return
        self.label, self.last = label, now
        seconds = now - self.started
        count = f"{done}/{total}"
        if self.of_bytes:
            rate = (done - before) / (now - since) if now > since else 0.0
            count = f"{done / 1e6:.1f}/{total / 1e6:.1f} MB, {rate / 1e6:.1f} MB/s"
            if 0 < done < total:
                count += f", {(total - done) / rate:.0f} s left" if rate else ""
        self.emit(f"{label}: {count}, {seconds:.1f} s")


def output_options(command: Callable[..., Any], *, with_json: bool = True) -> Callable[..., Any]:
    """Add `-v`, `-q` and `--json`; the command gets them as the one argument `out: Output`."""

    @functools.wraps(command)
    def with_output(
        *args: Any, verbose: bool, quiet: bool, as_json: bool = False, **kwargs: Any
    ) -> Any:
        if verbose and quiet:
            raise click.UsageError("-v and -q exclude each other", click.get_current_context())
        return command(*args, out=Output(int(verbose) - int(quiet), as_json), **kwargs)

    if with_json:
        json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON on stdout.")
        with_output = json_option(with_output)
    for option in (
        click.option("-q", "--quiet", is_flag=True, help="Print results and errors only."),
        click.option("-v", "--verbose", is_flag=True, help="Say more of what is done."),
    ):
        with_output = option(with_output)
    return with_output


def examples(*lines: str) -> str:
    """An epilog that keeps its lines: the examples of a command's `--help`."""
    return "\b\nExamples:\n" + "\n".join(f"  {line}" for line in lines)
