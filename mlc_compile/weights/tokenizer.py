"""Tokenizers as `tokenizer.json` data: read from a directory, or rebuilt from GGUF metadata.

- Everything the configuration needs (ids, vocabulary size, how tokens become bytes) comes from
  tokenizer.json alone, so it is the same on every machine.
- A GGUF states a pre-tokenizer by name. A name we have no definition for is an error, never a
  guess: the wrong one splits text in other places than the model was trained with.
- A beginning-of-sequence token is added only where the file says so. SmolLM2 declares
  `<|im_start|>` as its bos token and says not to add it; prepending it changes every prompt.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

from mlc_compile.config import parse_json_strict
from mlc_compile.errors import InputError
from mlc_compile.weights.files import Location
from mlc_compile.weights.tokenizer_files import COPIED_FILES, DirectoryTokenizer, TokenizerSource

__all__ = [
    "COPIED_FILES",
    "PRE_TOKENIZERS",
    "DirectoryTokenizer",
    "GgufTokenizer",
    "LoadedTokenizer",
    "PreTokenizer",
    "TokenizerSource",
    "active_vocab_size",
    "json_bytes",
    "load_tokenizer",
    "token_ids",
    "token_text",
    "tokenizer_info",
]

_USE_HF = "use the model's Hugging Face directory, which has its tokenizer.json"


def json_bytes(value: Any) -> bytes:
    """The same bytes for the same value on every machine: UTF-8, indent 2, keys as ordered.

    Raises ValueError for NaN and infinities, which are not JSON.
    """
    return (json.dumps(value, ensure_ascii=False, indent=2, allow_nan=False) + "\n").encode()


# --------------------------------------------------------------------------------------------
# GGUF


@dataclass(frozen=True)
class PreTokenizer:
    """What a name in tokenizer.ggml.pre stands for.

    `split`: the pattern text is cut by before byte-level BPE, None for GPT-2's own.
    `digits`: every digit is a token of its own first. `add_bos`: what holds if the file says
    nothing. `whole_words`: a word that is itself a token isn't merged up from bytes.
    """

    split: str | None = None
    digits: bool = False
    nfc: bool = False
    add_bos: bool = False
    whole_words: bool = False


_QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3 = PreTokenizer(
    split=_QWEN2_SPLIT.replace(r"\p{N}|", r"\p{N}{1,3}|", 1), add_bos=True, whole_words=True
)
PRE_TOKENIZERS: Final[Mapping[str, PreTokenizer]] = MappingProxyType(
    {
        "gpt-2": PreTokenizer(),
        "smollm": PreTokenizer(digits=True),
        "qwen2": PreTokenizer(split=_QWEN2_SPLIT, nfc=True),
        "llama-bpe": _LLAMA3,
        "llama3": _LLAMA3,
        "llama-v3": _LLAMA3,
        "tekken": PreTokenizer(
            split=(
                r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
                r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
                r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
            ),
            add_bos=True,
            whole_words=True,
        ),
    }
)
"""Pre-tokenizers by llama.cpp's names, defined as in the tokenizer.json of the models they name
(SmolLM2, Qwen2/2.5/3, Llama 3, Mistral NeMo); the defaults are llama.cpp's."""

# tokenizer.ggml.token_type
_CONTROL, _USER_DEFINED, _UNUSED = 3, 4, 5


@dataclass(frozen=True)
class GgufTokenizer:
    """A tokenizer rebuilt from GGUF metadata. Byte-level BPE (`gpt2`) only."""

    metadata: Mapping[str, Any]
    path: Location

    def tokenizer_json(self) -> dict[str, Any]:
        """tokenizer.json as the model's authors would have published it.

        Raises InputError for a vocabulary of another kind, an unknown pre-tokenizer, or lists
        that don't fit together.
        """
        tokens, types, merges = self._vocabulary()
        pre = self._pre_tokenizer()
        vocab: dict[str, int] = {}
        added = []
        for number, (token, kind) in enumerate(zip(tokens, types, strict=True)):
            if kind == _UNUSED:
                continue  # a placeholder that pads the embedding; no text maps to it
            if token in vocab:
                raise self._bad(f"the token {token!r} is there twice")
            vocab[token] = number
            if kind in (_CONTROL, _USER_DEFINED):
                added.append(
                    {
                        "id": number,
                        "content": token,
                        "single_word": False,
                        "lstrip": False,
                        "rstrip": False,
                        "normalized": False,
                        "special": kind == _CONTROL,
                    }
                )
        for merge in merges:
            left, space, right = merge.partition(" ")
            if not space or left not in vocab or right not in vocab or left + right not in vocab:
                raise self._bad(f"the merge {merge!r} doesn't join two tokens into a third")
        byte_level = {
            "type": "ByteLevel",
            "add_prefix_space": False,
            "trim_offsets": True,
            "use_regex": pre.split is None,
        }
        first: list[dict[str, Any]] = []
        if pre.digits:
            first = [{"type": "Digits", "individual_digits": True}]
        if pre.split is not None:
            first = [
                {
                    "type": "Split",
                    "pattern": {"Regex": pre.split},
                    "behavior": "Isolated",
                    "invert": False,
                }
            ]
        return {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": added,
            "normalizer": {"type": "NFC"} if pre.nfc else None,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*first, byte_level]}
            if first
            else byte_level,
            "post_processor": self._post_processor(tokens, byte_level),
            "decoder": {
                "type": "ByteLevel",
                "add_prefix_space": True,
                "trim_offsets": True,
                "use_regex": True,
            },
            "model": {
                "type": "BPE",
                "dropout": None,
                "unk_token": None,
                "continuing_subword_prefix": "",
                "end_of_word_suffix": "",
                "fuse_unk": False,
                "byte_fallback": False,
                "ignore_merges": pre.whole_words,
                "vocab": vocab,
                # "a b", not ["a", "b"]: the tokenizer libraries inside the runtimes may be older.
                "merges": merges,
            },
        }

    def tokenizer_config(self) -> dict[str, Any]:
        """tokenizer_config.json: special tokens, whether bos is added, and the chat template."""
        config: dict[str, Any] = {
            "add_bos_token": self._adds("bos"),
            "add_eos_token": self._adds("eos"),
            "clean_up_tokenization_spaces": False,
            "tokenizer_class": "PreTrainedTokenizerFast",
        }
        tokens = self._list("tokens", str)
        for name, key in (
            ("bos_token", "bos"),
            ("eos_token", "eos"),
            ("unk_token", "unknown"),
            ("pad_token", "padding"),
        ):
            number = self._special(key, len(tokens))
            if number is not None:
                config[name] = tokens[number]
        architecture = self.metadata.get("general.architecture")
        length = self.metadata.get(f"{architecture}.context_length")
        if isinstance(length, int):
            config["model_max_length"] = length
        template = self.metadata.get("tokenizer.chat_template")
        if template is not None:
            if not isinstance(template, str):
                raise self._bad("tokenizer.chat_template is not text")
            config["chat_template"] = template
        return config

    def files(self) -> dict[str, bytes]:
        return {
            "tokenizer.json": json_bytes(self.tokenizer_json()),
            "tokenizer_config.json": json_bytes(self.tokenizer_config()),
        }

    def _bad(self, what: str) -> InputError:
        return InputError(f"the tokenizer in {self.path} is not usable: {what}", hint=_USE_HF)

    def _list(self, key: str, kind: type) -> list[Any]:
        value = self.metadata.get(f"tokenizer.ggml.{key}")
        if not isinstance(value, list) or not all(type(item) is kind for item in value):
            raise self._bad(f"tokenizer.ggml.{key} is not a list of {kind.__name__}")
        return value

    def _vocabulary(self) -> tuple[list[str], list[int], list[str]]:
        model = self.metadata.get("tokenizer.ggml.model")
        if model != "gpt2":
            kind = " (SentencePiece)" if model == "llama" else ""
            raise self._bad(f"its model is {model!r}{kind}, and byte-level BPE 'gpt2' is needed")
        tokens, merges = self._list("tokens", str), self._list("merges", str)
        types = [1] * len(tokens)
        if "tokenizer.ggml.token_type" in self.metadata:
            types = self._list("token_type", int)
        if len(types) != len(tokens):
            raise self._bad(f"it has {len(tokens)} tokens and {len(types)} token types")
        return tokens, types, merges

    def _pre_tokenizer(self) -> PreTokenizer:
        name = self.metadata.get("tokenizer.ggml.pre")
        if not isinstance(name, str) or name not in PRE_TOKENIZERS:
            stated = "states no pre-tokenizer" if name is None else f"has the unknown type {name!r}"
            raise InputError(
                f"{self.path}: tokenizer.ggml.pre {stated}; known are {', '.join(PRE_TOKENIZERS)}",
                hint=_USE_HF,
            )
        return PRE_TOKENIZERS[name]

    def _adds(self, which: str) -> bool:
        stated = self.metadata.get(f"tokenizer.ggml.add_{which}_token")
        if stated is None:
            return which == "bos" and self._pre_tokenizer().add_bos
        if not isinstance(stated, bool):
            raise self._bad(f"tokenizer.ggml.add_{which}_token is {stated!r}, not a boolean")
        return stated

    def _special(self, key: str, count: int) -> int | None:
        number = self.metadata.get(f"tokenizer.ggml.{key}_token_id")
        if number is None:
            return None
        if type(number) is not int or not 0 <= number < count:
            raise self._bad(f"tokenizer.ggml.{key}_token_id is {number!r}, not one of its tokens")
        return number

    def _post_processor(self, tokens: list[str], byte_level: dict[str, Any]) -> dict[str, Any]:
        """Adds bos and eos where the file says so, and nothing otherwise."""
        sides: dict[str, list[tuple[str, int]]] = {"bos": [], "eos": []}
        for which, side in sides.items():
            if self._adds(which):
                number = self._special(which, len(tokens))
                if number is None:
                    raise self._bad(f"it adds a {which} token and doesn't say which")
                side.append((tokens[number], number))
        if not (sides["bos"] or sides["eos"]):
            return byte_level | {"add_prefix_space": True, "use_regex": True}

        def template(*sequences: tuple[str, int]) -> list[dict[str, Any]]:
            def special(part: list[tuple[str, int]], kind: int) -> list[dict[str, Any]]:
                return [{"SpecialToken": {"id": token, "type_id": kind}} for token, _ in part]

            parts = []
            for name, kind in sequences:
                parts += special(sides["bos"], kind)
                parts.append({"Sequence": {"id": name, "type_id": kind}})
                parts += special(sides["eos"], kind)
            return parts

        return {
            "type": "TemplateProcessing",
            "single": template(("A", 0)),
            "pair": template(("A", 0), ("B", 1)),
            "special_tokens": {
                token: {"id": token, "ids": [number], "tokens": [token]}
                for token, number in (*sides["bos"], *sides["eos"])
            },
        }


# --------------------------------------------------------------------------------------------
# What tokenizer.json tells


def token_ids(tokenizer_json: Mapping[str, Any]) -> dict[str, int]:
    """Every token and its id, added tokens included.

    Raises InputError if the vocabulary isn't one we can read, or an added token is there twice
    (the libraries then disagree about its id).
    """
    model = tokenizer_json.get("model")
    vocab = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocab, list):  # Unigram: [piece, score] by id
        ids = {
            entry[0]: number
            for number, entry in enumerate(vocab)
            if isinstance(entry, list) and entry and isinstance(entry[0], str)
        }
    elif isinstance(vocab, dict):
        ids = dict(vocab)
    else:
        raise InputError("tokenizer.json has no vocabulary (model.vocab)", hint=_AGAIN)
    added = tokenizer_json.get("added_tokens") or []
    if not isinstance(added, list):
        raise InputError("tokenizer.json has no list of added tokens", hint=_AGAIN)
    seen = set()
    for token in added:
        content = token.get("content") if isinstance(token, dict) else None
        if not isinstance(content, str):
            raise InputError(f"tokenizer.json has an invalid added token {token!r}", hint=_AGAIN)
        if content in seen:
            raise InputError(
                f"tokenizer.json has the added token {content!r} twice", hint="remove one of them"
            )
        seen.add(content)
        ids[content] = token.get("id")
    for content, number in ids.items():
        if type(number) is not int or number < 0:
            raise InputError(
                f"tokenizer.json gives the token {content!r} the id {number!r}", hint=_AGAIN
            )
    return ids


_AGAIN = "download the file again"


def active_vocab_size(ids: Mapping[str, int]) -> int:
    """How many rows of logits a token can come from: the largest id + 1."""
    return max(ids.values(), default=-1) + 1


def tokenizer_info(tokenizer_json: Mapping[str, Any]) -> dict[str, Any]:
    """MLC's `tokenizer_info`: how a token's text becomes bytes, and what happens to spaces.

    Follows `Tokenizer::DetectTokenizerInfo` of MLC-LLM, and reads Metaspace too, which newer
    tokenizer.json files have in place of the Prepend normalizer and the Strip decoder.
    """
    decoders = _steps(tokenizer_json.get("decoder"), "decoders")
    kinds = {step.get("type") for step in decoders}
    if "ByteLevel" in kinds:
        method = "byte_level"
    elif "ByteFallback" in kinds or (tokenizer_json.get("model") or {}).get("byte_fallback"):
        method = "byte_fallback"
    else:
        method = "raw"
    prepends = any(
        step.get("type") == "Prepend" and step.get("prepend") == "▁"
        for step in _steps(tokenizer_json.get("normalizer"), "normalizers")
    )
    prepends |= any(
        _prefixes(step) for step in _steps(tokenizer_json.get("pre_tokenizer"), "pretokenizers")
    )
    strips = any(
        step.get("type") == "Strip"
        and (step.get("content"), step.get("start"), step.get("stop")) == (" ", 1, 0)
        for step in decoders
    )
    return {
        "token_postproc_method": method,
        "prepend_space_in_encode": prepends,
        "strip_space_in_decode": strips or any(_prefixes(step) for step in decoders),
    }


def _prefixes(step: Mapping[str, Any]) -> bool:
    """Whether a Metaspace step deals with a space before the first word."""
    if step.get("type") != "Metaspace":
        return False
    if "prepend_scheme" in step:
        return step["prepend_scheme"] in ("always", "first")
    return bool(step.get("add_prefix_space", True))


def _steps(part: Any, key: str) -> list[Mapping[str, Any]]:
    """The steps of a tokenizer part; sequences may be nested."""
    if not isinstance(part, dict):
        return []
    if part.get("type") != "Sequence":
        return [part]
    return [step for inner in part.get(key) or () for step in _steps(inner, key)]


def token_text(value: Any) -> str | None:
    """A special token of tokenizer_config.json: text, or an object with its `content`."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


@dataclass(frozen=True)
class LoadedTokenizer:
    """A tokenizer.json that the `tokenizers` library has accepted."""

    json: Mapping[str, Any]
    ids: Mapping[str, int]
    bos_prefix: tuple[int, ...]
    """What encoding with special tokens puts before the text."""


def load_tokenizer(data: bytes, where: str) -> LoadedTokenizer:
    """Check the bytes of a tokenizer.json by loading them. Raises InputError if they can't be."""
    from tokenizers import Tokenizer

    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{where} is not UTF-8 text", hint=_AGAIN) from error
    parsed = parse_json_strict(text, where=where)
    ids = token_ids(parsed)
    try:
        tokenizer = Tokenizer.from_str(text)
    except Exception as error:  # the library raises plain Exception
        raise InputError(
            f"the tokenizers library can't read {where}: {error}", hint=_AGAIN
        ) from error
    for content, number in ids.items():
        if tokenizer.token_to_id(content) != number:
            raise InputError(
                f"{where} gives the token {content!r} the id {number}, and the tokenizers library "
                f"{tokenizer.token_to_id(content)}",
                hint="save the tokenizer again with transformers",
            )
    plain = tokenizer.encode("a", add_special_tokens=False).ids
    whole = tokenizer.encode("a", add_special_tokens=True).ids
    before = next((i for i in range(len(whole)) if whole[i : i + len(plain)] == plain), 0)
    return LoadedTokenizer(parsed, MappingProxyType(ids), tuple(whole[:before]))
