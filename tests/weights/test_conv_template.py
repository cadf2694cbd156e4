"""Conversation templates: MLC's rendering, the table, and deriving them from Jinja with proof."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mlc_compile.errors import InputError
from mlc_compile.weights import jinja_render
from mlc_compile.weights.conv_template import (
    CONVERSATIONS,
    NAMED,
    REASONING,
    ChatTemplate,
    ConvTemplate,
    Sample,
    TokenizerFacts,
    by_name,
    resolve,
)

sys.path.insert(0, str(Path(__file__).parents[1]))
from chat_templates import (
    CHATML_BODY,
    LLAMA3_BODY,
    LLAMA31,
    NO_SYSTEM_ROLE,
    TEMPLATES,
    chatml_with_default,
)


def facts(tokens: tuple[str, ...], bos: str, eos: str) -> TokenizerFacts:
    return TokenizerFacts(
        ids={token: 100 + i for i, token in enumerate(tokens)},
        special=frozenset(tokens),
        variables={"bos_token": bos, "eos_token": eos},
    )


def of(name: str) -> tuple[str, TokenizerFacts]:
    template, tokens, bos, eos = TEMPLATES[name]
    return template, facts(tokens, bos, eos)


CHATML = of("chatml")[1]


def hf_prompt(template: str, known: TokenizerFacts, sample: Sample) -> str:
    """The prompt by transformers' own code."""
    transformers = pytest.importorskip("transformers")
    from transformers.utils.chat_template_utils import render_jinja_template

    del transformers
    variables = sample.variables(known)
    messages = variables.pop("messages")
    rendered, _ = render_jinja_template(
        conversations=[messages], chat_template=template, **variables
    )
    return str(rendered[0])


# conversations that no proof has seen
FRESH = (
    Sample("", ("first question",)),
    Sample("", ("first", "reply", "second"), "a system message"),
    Sample("", ("zażółć", "gęślą\n\njaźń", "🙂" * 3, "``` \n```", "end"), "日本語"),
    Sample("", ("  x", "y  ", "\tz\n")),
    Sample("", ("<s> [INST] <|im_end|>", "</s>", "<|eot_id|>"), "</s>"),
)


# --- rendering ---------------------------------------------------------------------------------


def mlc_prompt(config: dict[str, Any], messages: list[Any], system: str | None) -> str:
    """`Conversation.as_prompt` of MLC-LLM in a few lines, on the JSON that we write."""
    message = config["system_message"] if system is None else system
    block = config["system_template"].replace("{system_message}", message)
    seps = config["seps"] * (2 if len(config["seps"]) == 1 else 1)
    parts = [block] if block else []
    for i, (role, content) in enumerate(messages):
        if content is None:
            parts.append(config["roles"][role] + config["role_empty_sep"])
            continue
        skip = not config["add_role_after_system_message"] and block != "" and i == 0
        prefix = "" if skip else config["roles"][role] + config["role_content_sep"]
        filled = config["role_templates"][role].replace("{" + role + "_message}", content)
        parts.append(prefix + filled + seps[role == "assistant"])
    return "".join(parts)


@pytest.mark.parametrize("name", NAMED)
def test_rendering_is_mlc_s_on_the_json_we_write(name: str) -> None:
    template = NAMED[name].template
    as_json = template.to_json()
    for sample in (*CONVERSATIONS, *FRESH):
        plain = replace(
            template, strip_messages=(), omit_empty_system=False, strip_reasoning_in_history=False
        )
        assert plain.render(sample.messages(), sample.system) == mlc_prompt(
            as_json, sample.messages(), sample.system
        )


@pytest.mark.parametrize("name", NAMED)
def test_json_round_trip(name: str) -> None:
    template = replace(NAMED[name].template, stop_token_ids=(1, 2), system_prefix_token_ids=(3,))
    text = json.dumps(template.to_json())
    assert ConvTemplate.from_json(json.loads(text), "x") == template


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seps": []}, "one or two"),
        ({"seps": ["a", "b", "c"]}, "one or two"),
        ({"roles": "user"}, "conv_template.roles"),
        ({"role_templates": {"user": "Q: {user_message}"}}, "role_templates.user"),
        ({"messages": [["user", "hi"]]}, "messages is set"),
        ({"use_function_calling": True}, "use_function_calling is set"),
    ],
)
def test_templates_we_could_not_render_are_refused(change: dict[str, Any], message: str) -> None:
    value = NAMED["chatml"].template.to_json() | change
    with pytest.raises(InputError, match=message):
        ConvTemplate.from_json(value, "x")


def test_an_unknown_role_is_an_input_error() -> None:
    with pytest.raises(InputError, match="no role 'tool'"):
        NAMED["chatml"].template.render([("tool", "x")])


def test_raw_continues_the_text() -> None:
    raw = NAMED["raw"].template
    assert raw.render([("user", " The capital of"), ("assistant", None)]) == " The capital of"


# --- the table ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in NAMED if name != "raw"])
def test_named_templates_are_those_of_their_models(name: str) -> None:
    source, known = of(name)
    template = by_name(name, known)
    prefix = known.prefix_text(template)
    only_first_turn = name == "mistral-v0.3"  # later on, its system message moves; see `about`
    for sample in FRESH:
        if name == "llama-2" and sample.system is not None:
            sample = replace(sample, system=sample.system.strip())
        if only_first_turn and sample.system is not None and len(sample.turns) > 1:
            continue
        assert prefix + template.render(sample.messages(), sample.system) == hf_prompt(
            source, known, sample
        )
    assert template.stop_token_ids


def test_a_name_needs_its_tokens() -> None:
    with pytest.raises(InputError, match=r"made of <\|start_header_id\|>"):
        by_name("llama-3", CHATML)
    with pytest.raises(InputError, match="unknown conversation template 'gpt5'; known: auto, "):
        by_name("gpt5", CHATML)
    no_bos = replace(of("llama-3")[1], variables={})
    with pytest.raises(InputError, match="starts with a bos token"):
        by_name("llama-3", no_bos)


# --- deriving and proving ----------------------------------------------------------------------

DERIVABLE = [name for name in TEMPLATES if name not in ("llama-2", "mistral-v0.3")]


@pytest.mark.parametrize("name", DERIVABLE)
def test_derived_templates_are_recognised_and_hold_on_fresh_conversations(name: str) -> None:
    source, known = of(name)
    derived = resolve("auto", source, known, "x")
    template = derived.template
    assert template.name == name
    assert derived.conversations == len(CONVERSATIONS) >= 6
    bos = bool(NAMED[name].bos)
    expected_prefix = (known.ids[known.variables["bos_token"]],) if bos else ()
    assert template.system_prefix_token_ids == expected_prefix
    assert known.ids[NAMED[name].stop[0]] in template.stop_token_ids
    prefix = known.prefix_text(template)
    for sample in FRESH:
        assert prefix + template.render(sample.messages(), sample.system) == hf_prompt(
            source, known, sample
        )
    assert any("system block" in note for note in derived.notes) == template.omit_empty_system
    assert any("white space" in note for note in derived.notes) == bool(template.strip_messages)


@pytest.mark.parametrize("name", DERIVABLE)
def test_our_sandbox_renders_as_transformers_does(name: str) -> None:
    source, known = of(name)
    samples = (*CONVERSATIONS, REASONING)
    ours = jinja_render.render(source, [sample.variables(known) for sample in samples])
    for sample, rendering in zip(samples, ours, strict=True):
        assert rendering.error is None
        assert rendering.text == hf_prompt(source, known, sample), sample.label


def test_a_template_of_no_known_model_is_derived_too() -> None:
    source = (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}"
        "{{ 'SYS(' + m.content + ')|' }}{% elif m.role == 'user' %}{{ 'Q: ' + m.content + '\n' }}"
        "{% else %}{{ 'A: ' + m.content | trim + '<end>\n' }}{% endif %}{% endfor %}{{ 'A:' }}"
    )
    known = facts(("<s>", "<end>"), "<s>", "<end>")
    derived = resolve("auto", source, known, "x")
    assert derived.template.name == "derived"
    assert derived.template.strip_messages == ("assistant",)
    assert derived.template.system_prefix_token_ids == (100,)
    assert derived.template.stop_token_ids == (101,)
    for sample in FRESH:
        assert "<s>" + derived.template.render(sample.messages(), sample.system) == hf_prompt(
            source, known, sample
        )


def test_reasoning_is_dropped_where_the_template_drops_it() -> None:
    for name, drops in (("qwen3", True), ("qwen2.5", False)):
        source, known = of(name)
        template = resolve("auto", source, known, "x").template
        assert template.strip_reasoning_in_history is drops
        text = template.render(REASONING.messages())
        assert ("<think>" not in text) is drops
        assert text == hf_prompt(source, known, REASONING)
    other = CHATML_BODY.replace("m['content'] +", "m['content'].replace('<think>', '[thought]') +")
    notes = resolve("auto", other, CHATML, "x").notes
    assert any("<think> blocks" in note for note in notes)


def test_a_template_without_system_role() -> None:
    derived = resolve("auto", NO_SYSTEM_ROLE, CHATML, "x")
    assert any("no system role (TemplateError: System role" in note for note in derived.notes)
    assert derived.conversations == sum(sample.system is None for sample in CONVERSATIONS)
    assert derived.template.roles["assistant"] == "<|im_start|>model"
    assert derived.template.render([("user", "x"), ("assistant", None)]) == (
        "<|im_start|>user\nx<|im_end|>\n<|im_start|>model\n"
    )


def test_no_chat_template_means_raw_and_says_so() -> None:
    derived = resolve("auto", None, replace(CHATML, bos_prefix=(7,)), "some/dir")
    assert derived.template == replace(NAMED["raw"].template, system_prefix_token_ids=(7,))
    assert "some/dir has no chat_template" in derived.notes[0]


WITH_DATE = LLAMA31.replace("DATE", "strftime_now('%d %b %Y')")
NOT_EXPRESSIBLE = {
    "date": (WITH_DATE, "llama-3", "writes the current date"),
    "another default block": (
        chatml_with_default("x").replace("<|im_start|>system", "<|im_start|>preamble"),
        "chatml",
        "doesn't write the system block with a default message",
    ),
    "numbered turns": (
        CHATML_BODY.replace("'<|im_start|>' +", "'<|im_start|>' + loop.index|string +"),
        "chatml",
        "a reply starts with",
    ),
    "only the last message": (
        CHATML_BODY.replace("in messages", "in messages[-1:]"),
        "chatml",
        "drops, repeats or reorders",
    ),
    "repeats": (
        CHATML_BODY.replace("m['content'] +", "m['content'] + m['content'] +"),
        "chatml",
        "drops, repeats or reorders",
    ),
    "depends on length": (
        "{{ 'LONG' if messages|length > 2 else 'SHORT' }}" + CHATML_BODY,
        "chatml",
        "depends on what comes later",
    ),
    "first turn differs": (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
        "{% if loop.index0 == 2 %}{{ 'THIRD' }}{% endif %}{% endfor %}"
        "{{ '<|im_start|>assistant\n' }}",
        "chatml",
        "in the conversation 'two turns'",
    ),
    "upper case": (
        CHATML_BODY.replace("m['content'] +", "m['content']|upper +"),
        "chatml",
        "drops",
    ),
    "squeezed white space": (
        CHATML_BODY.replace("m['content'] +", "m['content'].split()|join(' ') +"),
        "chatml",
        "in the conversation",
    ),
    "always fails": ("{{ raise_exception('no') }}", "chatml", "fails on a plain conversation"),
    "fails on the third turn": (
        "{% if messages|length > 3 %}{{ raise_exception('too long') }}{% endif %}" + CHATML_BODY,
        "chatml",
        "in the conversation 'two turns, system'.*too long",
    ),
    "Llama 2": (TEMPLATES["llama-2"][0], "llama-2", "inside the first user message"),
    "Mistral v0.3": (
        TEMPLATES["mistral-v0.3"][0],
        "mistral-v0.3",
        "inside the first user message",
    ),
}


@pytest.mark.parametrize("case", NOT_EXPRESSIBLE)
def test_what_can_not_be_proved_is_refused_with_the_names(case: str) -> None:
    source, like, message = NOT_EXPRESSIBLE[case]
    with pytest.raises(InputError, match=message) as caught:
        resolve("auto", source, of(like)[1], "some/dir")
    text = str(caught.value)
    assert "some/dir" in text
    assert "--conv-template NAME" in text
    assert "\n" not in text
    assert "raw" in text


def test_the_hint_ranks_the_closest_name_first() -> None:
    source, known = of("mistral-v0.3")
    with pytest.raises(InputError, match=r"same text in \d of 10: mistral-v0\.3"):
        resolve("auto", source, known, "x")


def test_a_wrong_template_is_caught_by_the_proof() -> None:
    """The proof itself: every field matters to at least one conversation."""
    source, known = of("smollm2")
    chat = ChatTemplate.render(source, known)
    right = by_name("smollm2", known)
    assert chat.differences(right) == []
    for change in (
        {"system_message": "You are helpful"},
        {"system_template": "<|im_start|>system\n{system_message}<|im_end|>"},
        {"roles": {"user": "<|im_start|>User", "assistant": "<|im_start|>assistant"}},
        {"seps": ("<|im_end|>",)},
        {"seps": ("<|im_end|>\n", "<|im_end|>")},
        {"role_content_sep": " "},
        {"role_empty_sep": ""},
        {"system_prefix_token_ids": (known.ids["<|im_start|>"],)},
        {"add_role_after_system_message": False},
        {"strip_messages": ("assistant",)},
        {"strip_messages": ("system",)},
    ):
        assert chat.differences(replace(right, **change)), change


def test_a_named_template_is_compared_and_the_difference_told() -> None:
    source, known = of("qwen3")
    assert resolve("qwen3", source, known, "x").notes == ()
    derived = resolve("qwen2.5", source, known, "x")
    assert 0 < derived.conversations < len(CONVERSATIONS)
    assert "in 6 of 10 conversations; in 'one turn', at character" in derived.notes[0]
    broken = resolve("chatml", "{% if %}", known, "x")
    assert "Not compared" in broken.notes[0]
    assert resolve("chatml", None, known, "x").notes == ()


# --- hostile templates -------------------------------------------------------------------------

HOSTILE = {
    "not Jinja": ("{% for %}", "not valid Jinja"),
    "endless": (
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "more than 2 s|can't be rendered",
    ),
    "endless output": (
        "{% for a in range(99999) %}{% for b in range(99999) %}xxxx{% endfor %}{% endfor %}",
        "writes more than",
    ),
    "memory": ("{{ ('x' * 10**11)|length }}", "MemoryError"),
    "memory by a filter": ("{{ 'x'|center(10**11) }}", "MemoryError"),
    "dunder": ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "SecurityError"),
    "format": ("{{ '{0.__class__}'.format(1) }}", "drops"),  # writes nothing of it
    "globals": ("{{ cycler.__init__.__globals__.os.system('true') }}", "SecurityError|Undefined"),
    "import": ("{% import 'os' as os %}", "fails|loader"),
    "recursion": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError|rendered"),
    "too long": ("x" * 600_000, "too many"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_templates_end_in_one_clear_error(
    case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if case == "endless":  # the others meet another limit first, however slow the machine is
        monkeypatch.setattr(jinja_render, "TIME_LIMIT_S", 2)
    source, message = HOSTILE[case]
    with pytest.raises(InputError, match=message):
        resolve("auto", source, CHATML, "x")


def test_mutating_the_messages_is_not_possible() -> None:
    source = "{% set _ = messages.append({'role': 'user', 'content': 'x'}) %}" + CHATML_BODY
    with pytest.raises(InputError, match="SecurityError"):
        resolve("auto", source, CHATML, "x")


def test_template_features_of_transformers() -> None:
    source = (
        "{% for m in messages %}{% if m.role == 'x' %}{% break %}{% endif %}{% generation %}"
        "{{ m.content }}{% endgeneration %}{% endfor %}{{ {'é': [1, '<']} | tojson }}"
    )
    known = facts((), "", "")
    sample = Sample("", ("hi",))
    (ours,) = jinja_render.render(source, [sample.variables(known)])
    assert ours.text == hf_prompt(source, known, sample) == 'hi{"é": [1, "<"]}'


def test_llama3_body_without_bos_variable_keeps_a_literal_bos_as_prefix() -> None:
    source = "{{ '<|begin_of_text|>' }}" + LLAMA3_BODY
    known = of("llama-3")[1]
    derived = resolve("auto", source, known, "x")
    assert derived.template.name == "llama-3"
    assert derived.template.system_prefix_token_ids == (known.ids["<|begin_of_text|>"],)
