"""The tokenizer files beside a checkpoint's weights, and what any tokenizer is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, Protocol

from mlc_compile.config import read_json_strict
from mlc_compile.errors import InputError
from mlc_compile.weights.files import Location

COPIED_FILES: Final = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
)
"""Tokenizer files that MLC runtimes may look for, in the order they are listed."""


class TokenizerSource(Protocol):
    """Where a checkpoint's tokenizer comes from."""

    def tokenizer_json(self) -> dict[str, Any]: ...

    def tokenizer_config(self) -> dict[str, Any]: ...

    def files(self) -> dict[str, bytes]: ...


@dataclass(frozen=True)
class DirectoryTokenizer:
    """The tokenizer files of a Hugging Face directory."""

    path: Location

    def tokenizer_json(self) -> dict[str, Any]:
        """tokenizer.json; InputError if there is none."""
        file = self.path / "tokenizer.json"
        if not file.is_file():
            other = [n for n in ("tokenizer.model", "vocab.json") if (self.path / n).is_file()]
            raise InputError(
                f"{self.path} has no tokenizer.json" + (f", only {other[0]}" if other else ""),
                hint="make one with transformers: AutoTokenizer.from_pretrained(DIR)"
                ".save_pretrained(DIR)",
            )
        return read_json_strict(file)

    def tokenizer_config(self) -> dict[str, Any]:
        """tokenizer_config.json ({} if absent), with the chat template that transformers uses.

        `chat_template` is one string, from chat_template.jinja where that file exists. Of several
        named templates the one called "default" counts.
        """
        file = self.path / "tokenizer_config.json"
        config = read_json_strict(file) if file.is_file() else {}
        jinja = self.path / "chat_template.jinja"
        template = config.get("chat_template")
        if jinja.is_file():
            try:
                template = jinja.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise InputError(f"cannot read {jinja}: {error}") from error
        if isinstance(template, list):
            named = {t["name"]: t.get("template") for t in template if _is_named(t)}
            if "default" not in named:
                raise InputError(
                    f"{file} has chat templates called {', '.join(named) or 'nothing'} and none "
                    "called 'default'",
                    hint="name one of them 'default'",
                )
            template = named["default"]
        if template is not None and not isinstance(template, str):
            raise InputError(f"{file}: chat_template is not text")
        if template is not None:
            config["chat_template"] = template
        return config

    def files(self) -> dict[str, bytes]:
        """The files to ship, byte for byte."""
        found = {}
        for name in COPIED_FILES:
            file = self.path / name
            if file.is_file():
                try:
                    found[name] = file.read_bytes()
                except OSError as error:
                    raise InputError(f"cannot read {file}: {error.strerror}") from error
        return found


def _is_named(template: Any) -> bool:
    return isinstance(template, dict) and isinstance(template.get("name"), str)
