"""Rendering a checkpoint's Jinja chat template, which is untrusted code.

The template runs in jinja2's immutable sandbox, in a child process with a time limit, a memory
limit (where the system has one) and a limit on its output: the sandbox alone stops neither
endless loops nor "x" * 10**10. Filters, globals and options are those of transformers'
`apply_chat_template`, so that a template means the same here as there.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mlc_compile.errors import InputError

TIME_LIMIT_S = 20
MEMORY_LIMIT_BYTES = 2 * 1024**3
OUTPUT_LIMIT_CHARS = 1_000_000
TEMPLATE_LIMIT_CHARS = 500_000

DATE_MARK = "\ue000date\ue000"
"""Stands in the output for what `strftime_now` would have written."""


@dataclass(frozen=True)
class Rendering:
    """What one call gave: `text`, or the `error` that the template raised."""

    text: str = ""
    error: str | None = None


def render(template: str, cases: Sequence[Mapping[str, Any]]) -> list[Rendering]:
    """Render a template once with the variables of each case (JSON values only).

    Raises:
        InputError: the template is not valid Jinja, or takes too much time or memory.
    """
    if len(template) > TEMPLATE_LIMIT_CHARS:
        raise InputError(f"the chat_template has {len(template)} characters, too many")
    code = (
        f"import sys; sys.path[:] = {sys.path!r}\n"
        "from mlc_compile.weights.jinja_render import child; child()"
    )
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-c", code],
            input=json.dumps({"template": template, "cases": list(cases)}).encode(),
            capture_output=True,
            timeout=TIME_LIMIT_S,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise InputError(f"the chat_template took more than {TIME_LIMIT_S} s to render") from error
    if done.returncode != 0:
        last = done.stderr.decode(errors="replace").strip().rpartition("\n")[2]
        raise InputError(f"the chat_template can't be rendered: {last or 'killed'}")
    answer = json.loads(done.stdout)
    if "invalid" in answer:
        raise InputError(f"the chat_template is not valid Jinja: {answer['invalid']}")
    return [Rendering(**result) for result in answer["results"]]


def child() -> None:
    """The child process: a request on stdin, the answer on stdout."""
    limit_resources()
    request = json.load(sys.stdin)
    json.dump(answer(request["template"], request["cases"]), sys.stdout)


def limit_resources() -> None:
    """Bound this process's memory and time, where the system can."""
    try:
        import resource
    except ImportError:  # Windows: the parent's time limit remains
        return
    for kind, limit in (
        (resource.RLIMIT_AS, MEMORY_LIMIT_BYTES),
        (resource.RLIMIT_CPU, TIME_LIMIT_S),
    ):
        # ValueError: a lower limit is already set; OSError: macOS has no RLIMIT_AS
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(kind, (limit, limit))


def answer(template: str, cases: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Render in this process: {"results": [...]}, or {"invalid": why} for a broken template."""
    import jinja2
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}…{% endgeneration %}` marks text for training; it renders as is."""

        tags = {"generation"}  # noqa: RUF012 - jinja2 declares it so

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.Scope(body, lineno=line)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(
            value,
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=separators,
            sort_keys=sort_keys,
        )

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda _format: DATE_MARK
    try:
        compiled = environment.from_string(template)
    except (jinja2.TemplateError, RecursionError, SyntaxError) as error:
        return {"invalid": str(error)}
    results = []
    for case in cases:
        pieces, length = [], 0
        try:
            for piece in compiled.generate(**case):
                pieces.append(piece)
                length += len(piece)
                if length > OUTPUT_LIMIT_CHARS:
                    raise ValueError(f"it writes more than {OUTPUT_LIMIT_CHARS} characters")
            results.append({"text": "".join(pieces)})
        except Exception as error:  # whatever a template's expressions raise
            results.append({"error": f"{type(error).__name__}: {error}"[:500]})
    return {"results": results}
