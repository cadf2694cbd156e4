"""Conversation templates: how messages become the text of a prompt.

- `ConvTemplate` is MLC's `conv_template` with MLC's rendering. Three fields of ours are written
  only where a checkpoint needs them; MLC runtimes ignore fields they don't know.
- `NAMED` is the table of templates that can be asked for by name.
- `derive` turns a checkpoint's Jinja chat_template into a ConvTemplate by rendering it with marker
  words and reading off what stands between them. The result counts only after `prove`: both must
  give the same text on every one of `CONVERSATIONS`.

MLC's rendering was read from `Conversation.as_prompt` (MLC-LLM) and `getPromptArrayInternal`
(web-llm). Both always write the system block, so a template that has one only when there is a
system message can't be said in MLC's own fields; see `ConvTemplate.omit_empty_system`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Final

from mlc_compile.errors import InputError
from mlc_compile.weights.jinja_render import DATE_MARK, Rendering, render

SYSTEM: Final = "{system_message}"
ROLE_PLACEHOLDERS: Final[Mapping[str, str]] = MappingProxyType(
    {"user": "{user_message}", "assistant": "{assistant_message}", "tool": "{tool_message}"}
)
_ROLES = ("system", "user", "assistant")

Message = tuple[str, "str | None"]
"""(role, text); text None opens that role's reply."""


@dataclass(frozen=True)
class ConvTemplate:
    """MLC's conv_template. Prompt = prefix ids, then the text that `render` gives.

    Of `seps` the first follows user messages and the last assistant messages. Fields of ours:

    `omit_empty_system`: no system block when there is neither a system message nor a default one.
    MLC runtimes write the block with an empty message instead.
    `strip_messages`: the roles whose text loses the white space around it.
    `strip_reasoning_in_history` (MLC's): drop <think> blocks before the last user message.
    """

    name: str
    roles: Mapping[str, str]
    seps: tuple[str, ...]
    system_template: str = SYSTEM
    system_message: str = ""
    system_prefix_token_ids: tuple[int, ...] = ()
    add_role_after_system_message: bool = True
    role_content_sep: str = ""
    role_empty_sep: str = ""
    stop_str: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    strip_reasoning_in_history: bool = False
    omit_empty_system: bool = False
    strip_messages: tuple[str, ...] = ()

    def render(self, messages: Sequence[Message], system: str | None = None) -> str:
        """The prompt's text, after the prefix ids. `system` None means the default message.

        Raises InputError for a role that the template doesn't have.
        """
        message = self.system_message if system is None else self._strip("system", system)
        block = self.system_template.replace(SYSTEM, message)
        if self.omit_empty_system and system is None and not message:
            block = ""
        parts = [block]
        last_user = max((i for i, (role, _) in enumerate(messages) if role == "user"), default=-1)
        for i, (role, text) in enumerate(messages):
            if role not in self.roles:
                raise InputError(
                    f"the conversation template {self.name!r} has no role {role!r}",
                    hint=f"it has {', '.join(self.roles)}",
                )
            if text is None:
                parts.append(self.roles[role] + self.role_empty_sep)
                continue
            if self.strip_reasoning_in_history and role == "assistant" and i < last_user:
                text = _without_reasoning(text)
            if self.add_role_after_system_message or not block or i > 0:
                parts.append(self.roles[role] + self.role_content_sep)
            parts.append(self._strip(role, text))
            parts.append(self.seps[-1] if role == "assistant" else self.seps[0])
        return "".join(parts)

    def _strip(self, role: str, text: str) -> str:
        return text.strip() if role in self.strip_messages else text

    def to_json(self) -> dict[str, Any]:
        """The `conv_template` object of mlc-chat-config.json."""
        value: dict[str, Any] = {
            "name": self.name,
            "system_template": self.system_template,
            "system_message": self.system_message,
        }
        if self.system_prefix_token_ids:
            value["system_prefix_token_ids"] = list(self.system_prefix_token_ids)
        value |= {
            "add_role_after_system_message": self.add_role_after_system_message,
            "roles": dict(self.roles),
            "role_templates": dict(ROLE_PLACEHOLDERS),
            "messages": [],
            "seps": list(self.seps),
            "role_content_sep": self.role_content_sep,
            "role_empty_sep": self.role_empty_sep,
            "stop_str": list(self.stop_str),
            "stop_token_ids": list(self.stop_token_ids),
            "strip_reasoning_in_history": self.strip_reasoning_in_history,
            "function_string": "",
            "use_function_calling": False,
        }
        if self.omit_empty_system:
            value["omit_empty_system"] = True
        if self.strip_messages:
            value["strip_messages"] = list(self.strip_messages)
        return value

    @classmethod
    def from_json(cls, value: Mapping[str, Any], where: str) -> ConvTemplate:
        """The template in a mlc-chat-config.json. `where` names the file in errors.

        Raises InputError for a field of the wrong type, and for what `render` doesn't do: message
        text inside `role_templates`, a conversation already in `messages`, function calling.
        """

        def get(key: str, kind: type, default: Any) -> Any:
            found = value.get(key, default)
            if found is None:
                found = default
            if not isinstance(found, kind):
                raise InputError(f"{where}: conv_template.{key} is {found!r:.60}")
            return found

        def strings(key: str) -> tuple[str, ...]:
            return tuple(get(key, list, []))

        templates = get("role_templates", dict, {})
        for role, text in templates.items():
            if text != ROLE_PLACEHOLDERS.get(role):
                raise InputError(
                    f"{where}: conv_template.role_templates.{role} = {text!r:.60} isn't supported",
                    hint="put the text into roles and role_content_sep",
                )
        for key in ("messages", "use_function_calling"):
            if value.get(key):
                raise InputError(f"{where}: conv_template.{key} is set, which isn't supported")
        seps = strings("seps")
        if len(seps) not in (1, 2):
            raise InputError(f"{where}: conv_template.seps must have one or two items")
        return cls(
            name=get("name", str, "custom"),
            roles=get("roles", dict, {}),
            seps=seps,
            system_template=get("system_template", str, SYSTEM),
            system_message=get("system_message", str, ""),
            system_prefix_token_ids=tuple(get("system_prefix_token_ids", list, [])),
            add_role_after_system_message=get("add_role_after_system_message", bool, True),
            role_content_sep=get("role_content_sep", str, ""),
            role_empty_sep=get("role_empty_sep", str, ""),
            stop_str=strings("stop_str"),
            stop_token_ids=tuple(get("stop_token_ids", list, [])),
            strip_reasoning_in_history=get("strip_reasoning_in_history", bool, False),
            omit_empty_system=get("omit_empty_system", bool, False),
            strip_messages=strings("strip_messages"),
        )


def _without_reasoning(text: str) -> str:
    return text.split("</think>")[-1].lstrip("\n") if "</think>" in text else text


# --------------------------------------------------------------------------------------------
# Templates by name


@dataclass(frozen=True)
class NamedTemplate:
    """A template of the table. `tokens`: special tokens that its text is made of, which the
    tokenizer must have. `stop`: those that end a reply. `bos`: the prompt starts with bos."""

    template: ConvTemplate
    about: str
    tokens: tuple[str, ...] = ()
    stop: tuple[str, ...] = ()
    bos: bool = False


def _chatml(name: str, about: str, **fields: Any) -> NamedTemplate:
    return NamedTemplate(
        ConvTemplate(
            name=name,
            system_template=f"<|im_start|>system\n{SYSTEM}<|im_end|>\n",
            roles={"user": "<|im_start|>user", "assistant": "<|im_start|>assistant"},
            seps=("<|im_end|>\n",),
            role_content_sep="\n",
            role_empty_sep="\n",
            **fields,
        ),
        about,
        tokens=("<|im_start|>", "<|im_end|>"),
        stop=("<|im_end|>",),
    )


def _llama3(name: str, about: str, before_system: str, **fields: Any) -> NamedTemplate:
    return NamedTemplate(
        ConvTemplate(
            name=name,
            system_template=(
                f"<|start_header_id|>system<|end_header_id|>\n\n{before_system}{SYSTEM}<|eot_id|>"
            ),
            roles={
                "user": "<|start_header_id|>user",
                "assistant": "<|start_header_id|>assistant",
            },
            seps=("<|eot_id|>",),
            role_content_sep="<|end_header_id|>\n\n",
            role_empty_sep="<|end_header_id|>\n\n",
            strip_messages=_ROLES,
            **fields,
        ),
        about,
        tokens=("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        stop=("<|eot_id|>",),
        bos=True,
    )


_TABLE = (
    _chatml("chatml", "ChatML without a default system message", omit_empty_system=True),
    _chatml(
        "smollm2",
        "SmolLM2 Instruct",
        system_message=("You are a helpful AI assistant named SmolLM, trained by Hugging Face"),
    ),
    _chatml("qwen2", "Qwen2 Instruct", system_message="You are a helpful assistant."),
    _chatml(
        "qwen2.5",
        "Qwen2.5 Instruct",
        system_message=("You are Qwen, created by Alibaba Cloud. You are a helpful assistant."),
    ),
    _chatml("qwen3", "Qwen3", omit_empty_system=True, strip_reasoning_in_history=True),
    _llama3("llama-3", "Llama 3 Instruct", "", omit_empty_system=True),
    _llama3(
        "llama-3.1",
        "Llama 3.1 and 3.2 Instruct, with the date that their template falls back to",
        "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n",
    ),
    NamedTemplate(
        ConvTemplate(
            name="llama-2",
            system_template=f"[INST] <<SYS>>\n{SYSTEM}\n<</SYS>>\n\n",
            roles={"user": "[INST]", "assistant": "[/INST]"},
            seps=(" ", " </s><s>"),
            role_content_sep=" ",
            add_role_after_system_message=False,
            omit_empty_system=True,
            strip_messages=("user", "assistant"),
        ),
        "Llama 2 Chat",
        tokens=("<s>", "</s>"),
        stop=("</s>",),
        bos=True,
    ),
    NamedTemplate(
        ConvTemplate(
            name="mistral-v0.3",
            system_template=f"[INST] {SYSTEM}\n\n",
            roles={"user": "[INST]", "assistant": "[/INST]"},
            seps=("", "</s>"),
            role_content_sep=" ",
            add_role_after_system_message=False,
            omit_empty_system=True,
        ),
        "Mistral Instruct v0.3; its own template repeats the system message in the last turn",
        tokens=("[INST]", "[/INST]", "</s>"),
        stop=("</s>",),
        bos=True,
    ),
    NamedTemplate(
        ConvTemplate(
            name="zephyr",
            system_template=f"<|system|>\n{SYSTEM}</s>\n",
            roles={"user": "<|user|>", "assistant": "<|assistant|>"},
            seps=("</s>\n",),
            role_content_sep="\n",
            role_empty_sep="\n",
            omit_empty_system=True,
        ),
        "Zephyr, TinyLlama Chat",
        tokens=("</s>",),
        stop=("</s>",),
    ),
    NamedTemplate(
        ConvTemplate(name="raw", roles={"user": "", "assistant": ""}, seps=("",)),
        "no format: the text is continued as it is (base models)",
    ),
)
NAMED: Final[Mapping[str, NamedTemplate]] = MappingProxyType(
    {entry.template.name: entry for entry in _TABLE}
)
"""The templates that `--conv-template` takes by name."""


@dataclass(frozen=True)
class TokenizerFacts:
    """What a template needs to know about the tokenizer.

    `ids`: token -> id. `special`: texts of special tokens. `variables`: bos_token, eos_token …
    as a chat template sees them. `bos_prefix`: ids the tokenizer itself puts before a text.
    """

    ids: Mapping[str, int]
    special: frozenset[str] = frozenset()
    variables: Mapping[str, str] = field(default_factory=dict)
    bos_prefix: tuple[int, ...] = ()

    @property
    def bos(self) -> str | None:
        return self.variables.get("bos_token")

    def prefix_text(self, template: ConvTemplate) -> str:
        """The text of a template's prefix ids, as a chat template writes it."""
        return (self.bos or "") if template.system_prefix_token_ids else ""


def by_name(name: str, facts: TokenizerFacts) -> ConvTemplate:
    """A template of the table with the token ids of this tokenizer.

    Raises InputError for an unknown name, or a template whose tokens the tokenizer doesn't have.
    """
    if name not in NAMED:
        raise InputError(
            f"unknown conversation template {name!r}", hint=f"known: auto, {', '.join(NAMED)}"
        )
    entry = NAMED[name]
    missing = [token for token in entry.tokens if token not in facts.ids]
    if missing:
        raise InputError(
            f"the conversation template {name!r} is made of {', '.join(missing)}, which this "
            "checkpoint's tokenizer doesn't have",
            hint=f"choose another --conv-template: auto, {', '.join(NAMED)}",
        )
    prefix = facts.bos_prefix if name == "raw" else ()
    if entry.bos:
        if facts.bos is None or facts.bos not in facts.ids:
            raise InputError(
                f"the conversation template {name!r} starts with a bos token and this checkpoint's "
                "tokenizer has none",
                hint="choose another --conv-template",
            )
        prefix = (facts.ids[facts.bos],)
    return replace(
        entry.template,
        system_prefix_token_ids=prefix,
        stop_token_ids=tuple(facts.ids[token] for token in entry.stop),
    )


# --------------------------------------------------------------------------------------------
# Deriving a template, and proving it


@dataclass(frozen=True)
class Sample:
    """A conversation: an optional system message, then user and assistant by turns."""

    label: str
    turns: tuple[str, ...]
    system: str | None = None

    def messages(self) -> list[Message]:
        """The turns with their roles; the reply that is to be generated comes last."""
        roles = itertools.cycle(("user", "assistant"))
        return [*zip(roles, self.turns, strict=False), ("assistant", None)]

    def variables(self, facts: TokenizerFacts) -> dict[str, Any]:
        """What a chat template is called with."""
        messages = [{"role": role, "content": text} for role, text in self.messages()[:-1]]
        if self.system is not None:
            messages.insert(0, {"role": "system", "content": self.system})
        return {
            **facts.variables,
            "messages": messages,
            "add_generation_prompt": True,
            "tools": None,
            "documents": None,
        }


CONVERSATIONS: Final = (
    Sample("one turn", ("Hello there",)),
    Sample("one turn, system", ("Hello there",), "Be brief."),
    Sample("two turns", ("What is 2+2?", "4.", "And 3+3?")),
    Sample("two turns, system", ("What is 2+2?", "4.", "And 3+3?"), "You do sums."),
    Sample("three turns", ("a", "b", "c", "d", "e")),
    Sample(
        "three turns, system, unicode",
        ("¿Qué tal? 🙂", "Très bien ✅", "再见", "שלום", "नमस्ते e\u0301"),
        "Réponds en français 🇫🇷.",
    ),
    Sample(
        "white space inside",
        ("two  spaces\tand a tab\n\nan empty line", "- a\n  - b\n", "x = {\n    1: 2}"),
        "line one\nline two",
    ),
    Sample("white space around", ("  padded\n", "\n padded \t", "\tpadded  "), " \n padded \n\n"),
    Sample("white space around, no system", (" padded\n\n", "\n\npadded ", "\n padded")),
    Sample(
        "text that looks like a template",
        ("{user_message} {{ x }}", "{% if %} {assistant_message}", "$& \\1 {0} %s <b>&amp;"),
        "{system_message} {function_string}",
    ),
)
"""What a derived template is proved on."""

REASONING: Final = Sample(
    "reasoning in an earlier reply", ("Q?", "<think>\nhm\n</think>\n\nA.", "Why?")
)
_MARKS = ("Qsystem0Q", "Quser1Q", "Qreply1Q", "Quser2Q")
_S, _U1, _A1, _U2 = _MARKS
_BOS_MARK = "Qbos0Q"


class _NotExpressibleError(Exception):
    """Why a chat template has no ConvTemplate."""


@dataclass(frozen=True)
class Derived:
    """A proved template. `conversations`: on how many it was proved. `notes`: what to tell."""

    template: ConvTemplate
    conversations: int
    notes: tuple[str, ...]


@dataclass(frozen=True)
class ChatTemplate:
    """A checkpoint's Jinja template with everything rendered that the questions below need."""

    facts: TokenizerFacts
    probes: Mapping[str, Rendering]
    proofs: tuple[tuple[Sample, Rendering], ...]
    reasoning: Rendering

    @classmethod
    def render(cls, source: str, facts: TokenizerFacts) -> ChatTemplate:
        """Render it on all probes and conversations. InputError if it is not valid or runs away."""
        one, two = Sample("", (_U1,)), Sample("", (_U1, _A1, _U2))
        probes = {
            "one": one.variables(facts),
            "two": two.variables(facts),
            "system": replace(one, system=_S).variables(facts),
            "bos": one.variables(facts) | {"bos_token": _BOS_MARK},
        }
        cases = [
            *probes.values(),
            *(sample.variables(facts) for sample in CONVERSATIONS),
            REASONING.variables(facts),
        ]
        results = render(source, cases)
        return cls(
            facts=facts,
            probes=dict(zip(probes, results, strict=False)),
            proofs=tuple(zip(CONVERSATIONS, results[len(probes) : -1], strict=True)),
            reasoning=results[-1],
        )

    def differences(
        self, template: ConvTemplate, *, with_system: bool = True
    ) -> list[tuple[Sample, str]]:
        """The conversations on which `template` gives another text, and where it first does."""
        prefix = self.facts.prefix_text(template)
        found = []
        for sample, theirs in self.proofs:
            if sample.system is not None and not with_system:
                continue
            if theirs.error is not None:
                found.append((sample, f"the chat_template fails: {theirs.error}"))
                continue
            ours = prefix + template.render(sample.messages(), sample.system)
            if ours != theirs.text:
                found.append((sample, _first_difference(theirs.text, ours)))
        return found


def _first_difference(theirs: str, ours: str) -> str:
    at = len(_common_prefix([theirs, ours]))
    start = max(0, at - 20)
    return (
        f"at character {at} the chat_template has {theirs[start : at + 40]!r} and the "
        f"conv_template {ours[start : at + 40]!r}"
    )


def derive(chat: ChatTemplate, where: str) -> Derived:
    """The ConvTemplate that gives the same text as a chat template, proved on CONVERSATIONS.

    Raises InputError, with the reason, the first conversation that differs and the names to choose
    from, if there is none.
    """
    try:
        template, notes, with_system = _read_off(chat)
        template = _with_stripping(chat, template, with_system)
        differences = chat.differences(template, with_system=with_system)
        if differences:
            sample, where_it_differs = differences[0]
            raise _NotExpressibleError(f"in the conversation {sample.label!r}, {where_it_differs}")
    except _NotExpressibleError as reason:
        raise InputError(
            f"the chat_template of {where} can't be said as a conv_template: {reason}",
            hint=f"choose one with --conv-template NAME; {closest(chat)}",
        ) from None
    template, reasoning_note = _with_reasoning(chat, template)
    notes += reasoning_note
    if template.omit_empty_system:
        notes.append(
            "The chat_template writes a system block only when there is a system message. "
            "mlc_compile does the same; web-llm and MLC runtimes write an empty block instead, so "
            "give them a system message."
        )
    if template.strip_messages:
        notes.append(
            "The chat_template strips the white space around the text of "
            f"{', '.join(template.strip_messages)}. mlc_compile does the same; with web-llm and "
            "MLC runtimes, strip it before sending."
        )
    count = len(chat.proofs) - (
        0 if with_system else sum(s.system is not None for s, _ in chat.proofs)
    )
    return Derived(_named_if_known(template), count, tuple(notes))


def closest(chat: ChatTemplate) -> str:
    """The names to choose from, best first, with how many conversations each renders the same."""
    total, scores = len(chat.proofs), {}
    for name in NAMED:
        try:
            template = by_name(name, chat.facts)
        except InputError:
            continue
        scores[name] = total - len(chat.differences(template))
    ranked = sorted(scores, key=lambda name: -scores[name])
    return "same text in " + ", ".join(
        f"{scores[name]} of {total}: {name}" if i == 0 else f"{scores[name]}: {name}"
        for i, name in enumerate(ranked)
    )


def _text(rendering: Rendering) -> str:
    if rendering.error is not None:
        raise _NotExpressibleError(f"it fails on a plain conversation: {rendering.error}")
    if DATE_MARK in rendering.text:
        raise _NotExpressibleError("it writes the current date, and a conv_template is fixed")
    return rendering.text


def _between(text: str, *marks: str) -> list[str]:
    """The pieces of `text` around the marks, each of which must be there once and in order."""
    pieces = []
    for mark in marks:
        before, found, text = text.partition(mark)
        if not found or mark in text:
            raise _NotExpressibleError("it drops, repeats or reorders messages")
        pieces.append(before)
    return [*pieces, text]


def _read_off(chat: ChatTemplate) -> tuple[ConvTemplate, list[str], bool]:
    """The template by what stands between the marks, notes, and whether it has a system role."""
    facts, notes = chat.facts, []
    one, two = _text(chat.probes["one"]), _text(chat.probes["two"])
    system = chat.probes["system"]
    with_system = system.error is None and _S in system.text
    if not with_system:
        notes.append(
            "The chat_template has no system role"
            + (f" ({system.error})" if system.error else "")
            + ": don't send a system message to this model."
        )
    prefix: tuple[int, ...] = ()
    if facts.bos and facts.bos in facts.ids and _starts_with_bos(chat, one):
        prefix = (facts.ids[facts.bos],)
        one, two = (text.removeprefix(facts.bos) for text in (one, two))

    head, generation = _between(one, _U1)
    head_two, user_to_reply, reply_to_user, _ = _between(two, _U1, _A1, _U2)
    if head_two != head:
        raise _NotExpressibleError("what comes first depends on what comes later")
    heads = [head]
    before_system = after_system = ""
    if with_system:
        text = _text(system).removeprefix(facts.bos if prefix and facts.bos else "")
        before_system, after_system, _ = _between(text, _S, _U1)
        heads.append(after_system)

    # The end of a reply and the start of the next message are read off together. Special tokens
    # that close a message stay with the message before; the rest must come before every user.
    close = _closing(reply_to_user, facts.special)
    user = _common_suffix([reply_to_user[len(close) :], *heads])
    if not user and _common_suffix([reply_to_user[len(close) :], head]):
        raise _NotExpressibleError("it writes the system message inside the first user message")
    reply_sep = reply_to_user.removesuffix(user) if user else reply_to_user
    user_sep = _closing(user_to_reply, facts.special)
    if not (
        generation.startswith(user_sep) and len(user_sep) < min(len(generation), len(user_to_reply))
    ):
        user_sep = ""
    assistant = user_to_reply[len(user_sep) :]
    opened = generation[len(user_sep) :]
    content_sep = _shared_ending(user, assistant, opened, facts.special)
    role = assistant.removesuffix(content_sep) if content_sep else assistant
    if not opened.startswith(role):
        raise _NotExpressibleError(
            f"a reply starts with {opened!r} when it is generated and with {assistant!r} later"
        )

    default = head.removesuffix(user) if user else head
    block_end = after_system.removesuffix(user) if user else after_system
    fields: dict[str, Any] = {"system_template": default or SYSTEM}
    if with_system:
        fields = _system_fields(before_system, block_end, default)
    seps = (user_sep,) if user_sep == reply_sep else (user_sep, reply_sep)
    stop = [token for token in facts.special if token and token in (close or reply_sep)]
    template = ConvTemplate(
        name="derived",
        roles={"user": user.removesuffix(content_sep) if content_sep else user, "assistant": role},
        seps=seps,
        role_content_sep=content_sep,
        role_empty_sep=opened[len(role) :],
        system_prefix_token_ids=prefix,
        stop_token_ids=tuple(
            sorted(facts.ids[token] for token in stop if token in facts.ids and token != facts.bos)
        ),
        **fields,
    )
    return template, notes, with_system


def _starts_with_bos(chat: ChatTemplate, text: str) -> bool:
    """Whether the prompt starts with bos as such, and not with a role that is the same token.

    SmolLM2's bos is <|im_start|>, which also opens every message; it writes no bos.
    """
    marked = chat.probes["bos"]
    if marked.error is None and marked.text.startswith(_BOS_MARK):
        return True
    bos = chat.facts.bos or ""
    rest = text.removeprefix(bos)
    return text.startswith(bos) and any(rest.startswith(token) for token in chat.facts.special)


def _system_fields(before: str, after: str, default: str) -> dict[str, Any]:
    """system_template, and the default message that makes it give the text `default`."""
    fields: dict[str, Any] = {"system_template": f"{before}{SYSTEM}{after}"}
    if default.startswith(before) and default.endswith(after):
        inner = len(default) - len(before) - len(after)
        if inner >= 0:
            fields["system_message"] = default[len(before) : len(before) + inner]
            return fields
    if default:
        raise _NotExpressibleError(
            "without a system message it doesn't write the system block with a default message, "
            f"but {default!r:.80}"
        )
    fields["omit_empty_system"] = True
    return fields


def _closing(text: str, special: Iterable[str]) -> str:
    """The special token that `text` starts with, and the white space on both sides of it."""
    blank = len(text) - len(text.lstrip())
    token = max((t for t in special if t and text.startswith(t, blank)), key=len, default="")
    if not token:
        return ""
    end = blank + len(token)
    return text[: len(text) - len(text[end:].lstrip())]


def _common_prefix(texts: Sequence[str]) -> str:
    length = 0
    for characters in zip(*texts, strict=False):  # as long as the shortest
        if len(set(characters)) > 1:
            break
        length += 1
    return texts[0][:length]


def _common_suffix(texts: Sequence[str]) -> str:
    return _common_prefix([text[::-1] for text in texts])[::-1]


def _shared_ending(user: str, assistant: str, opened: str, special: Iterable[str]) -> str:
    """The part that ends both roles: white space, or from a special token on.

    Any common ending gives the same text; this one is what a person would call the separator.
    """
    common = _common_suffix([user, assistant])
    for at in range(len(common)):
        ending = common[at:]
        if ending.isspace() or any(t and ending.startswith(t) for t in special):
            role = assistant[: len(assistant) - len(ending)]
            if role and opened.startswith(role):
                return ending
    return ""


def _with_stripping(chat: ChatTemplate, template: ConvTemplate, with_system: bool) -> ConvTemplate:
    """The template with the fewest stripped roles that renders everything as `chat` does."""
    for count in range(len(_ROLES) + 1):
        for roles in itertools.combinations(_ROLES, count):
            candidate = replace(template, strip_messages=roles)
            if not chat.differences(candidate, with_system=with_system):
                return candidate
    return template


def _with_reasoning(chat: ChatTemplate, template: ConvTemplate) -> tuple[ConvTemplate, list[str]]:
    """The template with MLC's switch for <think> blocks set as `chat` treats them."""
    prefix = chat.facts.prefix_text(template)
    for switch in (False, True):
        candidate = replace(template, strip_reasoning_in_history=switch)
        if prefix + candidate.render(REASONING.messages()) == chat.reasoning.text:
            return candidate, []
    return template, [
        "The chat_template rewrites <think> blocks of earlier replies in a way that a "
        "conv_template can't: remove them from the conversation yourself."
    ]


def _named_if_known(template: ConvTemplate) -> ConvTemplate:
    """The template under its name in the table, if it is one of those."""
    for name, entry in NAMED.items():
        same = replace(
            entry.template,
            name=template.name,
            system_prefix_token_ids=template.system_prefix_token_ids,
            stop_token_ids=template.stop_token_ids,
        )
        if same == template:
            return replace(template, name=name)
    return template


def resolve(name: str, source: str | None, facts: TokenizerFacts, where: str) -> Derived:
    """The template for `--conv-template NAME`; "auto" derives it from the chat template `source`.

    Without a chat template "auto" is "raw". A template asked for by name is compared with the
    chat template, and the notes say how they differ.

    Raises InputError as `derive` and `by_name` do.
    """
    if name == "auto" and source is None:
        note = (
            f"{where} has no chat_template, as base models do: the conversation template is 'raw', "
            "which continues the text as it is. Choose another with --conv-template."
        )
        return Derived(by_name("raw", facts), 0, (note,))
    if name == "auto" and source is not None:
        return derive(ChatTemplate.render(source, facts), where)
    template = by_name(name, facts)
    if source is None:
        return Derived(template, 0, ())
    try:
        chat = ChatTemplate.render(source, facts)
    except InputError as error:  # the choice stands; it just can't be compared
        return Derived(template, 0, (f"Not compared with the checkpoint's template: {error}.",))
    differences = chat.differences(template)
    same = len(chat.proofs) - len(differences)
    if not differences:
        return Derived(template, same, ())
    sample, how = differences[0]
    note = (
        f"The conversation template {name!r} gives the same text as the checkpoint's chat_template "
        f"in {same} of {len(chat.proofs)} conversations; in {sample.label!r}, {how}."
    )
    return Derived(template, same, (note,))
