"""mlc-chat-config.json: what a chat runtime needs to know about a converted model.

- `gen_config` writes it with the tokenizer files, all or nothing, and enters their hashes into a
  manifest.json that is there already (convert_weight does it where it comes second).
- Everything in it comes from the checkpoint's own files: sampling defaults and stop tokens from
  generation_config.json before config.json before the tokenizer, the vocabulary from
  tokenizer.json. Nothing depends on which packages are installed.
- `ChatConfig` reads it back, for `compile`, `plan` and `run`.

The fields are those of MLC-LLM's `MLCChatConfig`, version 0.1.0, and two of ours: `architecture`,
which says how far the architecture is proved, and `quantization_overrides`, the weights that
another scheme than `quantization` holds.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, get_args

from mlc_compile.config import CompileConfig, read_json_strict
from mlc_compile.errors import InputError
from mlc_compile.manifest import (
    CHAT_CONFIG,
    MANIFEST,
    manifest_bytes,
    read_manifest,
    with_configuration,
)
from mlc_compile.models.detect import load_model
from mlc_compile.models.spec import Basis, Model, Standing
from mlc_compile.quantization.policy import with_overrides
from mlc_compile.quantization.scheme import QuantScheme, get_scheme
from mlc_compile.weights.checkpoint import Checkpoint
from mlc_compile.weights.conv_template import (
    ConvTemplate,
    Derived,
    TokenizerFacts,
    resolve,
)
from mlc_compile.weights.publish import cannot_write, staged
from mlc_compile.weights.tensor_cache import WrittenFile
from mlc_compile.weights.tokenizer import (
    COPIED_FILES,
    LoadedTokenizer,
    active_vocab_size,
    json_bytes,
    load_tokenizer,
    token_text,
    tokenizer_info,
)

FILE_NAME: Final = CHAT_CONFIG
VERSION: Final = "0.1.0"
UNUSED: Final = -1
"""MLC's value for a size that doesn't apply."""

OVERRIDES_KEY: Final = "quantization_overrides"

COMPILE_KEYS: Final = (
    "context_window_size",
    "sliding_window_size",
    "attention_sink_size",
    "prefill_chunk_size",
    "max_batch_size",
    "tensor_parallel_shards",
)
"""The fields of CompileConfig, which `model_config` holds beside the checkpoint's own keys."""

# Keys of a config.json that say where it comes from, not what the model is. Some hold paths.
_PROVENANCE = ("_name_or_path", "name_or_path", "_commit_hash", "transformers_version", "auto_map")


@dataclass(frozen=True)
class _Sampling:
    """A sampling field: its default and what it must lie in (bounds included)."""

    default: float
    low: float
    high: float


# MLC's defaults. 0 < is written as the smallest float above 0.
_SAMPLING: Final[Mapping[str, _Sampling]] = {
    "temperature": _Sampling(1.0, 0.0, math.inf),
    "presence_penalty": _Sampling(0.0, -2.0, 2.0),
    "frequency_penalty": _Sampling(0.0, -2.0, 2.0),
    "repetition_penalty": _Sampling(1.0, 5e-324, math.inf),
    "top_p": _Sampling(1.0, 5e-324, 1.0),
}


@dataclass(frozen=True)
class GenConfigReport:
    """What `gen_config` wrote. `notes` are whole sentences for the user.

    `proved`: on how many conversations the conversation template and the checkpoint's own chat
    template give the same text; 0 where there is nothing to compare with.
    """

    path: Path
    files: tuple[Path, ...]
    config: Mapping[str, Any]
    conv_template: ConvTemplate
    proved: int
    notes: tuple[str, ...]


def gen_config(
    checkpoint: Checkpoint,
    model: Model,
    scheme: QuantScheme,
    compile_config: CompileConfig,
    out_dir: str | Path,
    *,
    conv_template: str = "auto",
    overwrite: bool = False,
) -> GenConfigReport:
    """Write mlc-chat-config.json and the tokenizer files into `out_dir`.

    Other files there, such as converted weights, stay as they are. Same inputs give same bytes.

    Raises:
        InputError: the directory has a configuration already and `overwrite` is not given, or can't
            be written; the tokenizer is missing, damaged or larger than the model's vocabulary;
            no stop token is known; the conversation template can't be derived or doesn't exist.
    """
    out = Path(out_dir)
    files = checkpoint.tokenizer_files()
    _check_output(out, files, overwrite)
    config, derived = build_config(
        checkpoint, model, scheme, compile_config, files, conv_template=conv_template
    )
    files = {**files, FILE_NAME: json_bytes(config)}
    _publish(out, files, _manifest_with(out, files))
    return GenConfigReport(
        path=out / FILE_NAME,
        files=tuple(out / name for name in files),
        config=config,
        conv_template=derived.template,
        proved=derived.conversations,
        notes=(*compile_config.notes, *derived.notes),
    )


def build_config(
    checkpoint: Checkpoint,
    model: Model,
    scheme: QuantScheme,
    compile_config: CompileConfig,
    tokenizer_files: Mapping[str, bytes],
    *,
    conv_template: str = "auto",
) -> tuple[dict[str, Any], Derived]:
    """The content of mlc-chat-config.json, and how its conversation template was found."""
    _check_windows(compile_config)
    if "tokenizer.json" not in tokenizer_files:
        checkpoint.tokenizer_json()  # says what there is instead, and what to do
    where = f"the tokenizer.json of {checkpoint.path}"
    tokenizer = load_tokenizer(tokenizer_files["tokenizer.json"], where)
    vocab_size, active = model.config.vocab_size, active_vocab_size(tokenizer.ids)
    if active > vocab_size:
        raise InputError(
            f"{where} has token ids up to {active - 1} and the model's vocabulary is {vocab_size}",
            hint="use the tokenizer that was published with this checkpoint",
        )
    tokenizer_config = checkpoint.tokenizer_config()
    ids = _special_ids(checkpoint, tokenizer, tokenizer_config, vocab_size)
    derived = resolve(
        conv_template,
        tokenizer_config.get("chat_template"),
        _facts(tokenizer, tokenizer_config),
        str(checkpoint.path),
    )
    template = derived.template.to_json()
    stops = list(ids.eos)
    template["stop_token_ids"] = stops + [
        token for token in derived.template.stop_token_ids if token not in stops
    ]
    sizes = {key: getattr(compile_config, key) for key in COMPILE_KEYS}
    config: dict[str, Any] = {
        "version": VERSION,
        "model_type": model.arch.name,
        "quantization": scheme.name,
        "model_config": _model_config(model) | sizes,
        "vocab_size": vocab_size,
        "context_window_size": sizes["context_window_size"],
        "sliding_window_size": sizes["sliding_window_size"],
        "prefill_chunk_size": sizes["prefill_chunk_size"],
        "attention_sink_size": sizes["attention_sink_size"],
        "tensor_parallel_shards": sizes["tensor_parallel_shards"],
        "pipeline_parallel_stages": 1,
        "active_vocab_size": active,
        **_sampling(checkpoint),
        "tokenizer_files": [name for name in COPIED_FILES if name in tokenizer_files],
        "tokenizer_info": tokenizer_info(tokenizer.json),
        "conv_template": template,
        "pad_token_id": ids.pad,
        "bos_token_id": ids.bos,
        "eos_token_id": stops[0] if len(stops) == 1 else stops,
        "model_task": "chat",
        "embedding_metadata": None,
        "architecture": model.identity(),
    }
    if scheme.overrides:
        config[OVERRIDES_KEY] = scheme.overrides_json()
    return config, derived


def _check_windows(sizes: CompileConfig) -> None:
    """web-llm refuses a configuration unless exactly one of the two windows is set."""
    used = [size != UNUSED for size in (sizes.context_window_size, sizes.sliding_window_size)]
    if sum(used) != 1:
        raise InputError(
            f"context_window_size is {sizes.context_window_size} and sliding_window_size "
            f"{sizes.sliding_window_size}, and exactly one of them must be set",
            hint=f"leave the other one at {UNUSED}",
        )


def _model_config(model: Model) -> dict[str, Any]:
    """config.json with what transformers would fill in written out, without its provenance."""
    config = model.config
    found = {key: value for key, value in config.raw.items() if key not in _PROVENANCE}
    if model.standing is not None:  # the checkpoint says otherwise
        found.pop("architectures", None)
        found["model_type"] = model.arch.name
    for key in (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "vocab_size",
        "max_position_embeddings",
        "tie_word_embeddings",
    ):
        if key not in model.arch.schema.derived:  # these are made again, perhaps of the same key
            found[key] = getattr(config, key)
    return found


def _sampling(checkpoint: Checkpoint) -> dict[str, float]:
    found = {}
    for key, field in _SAMPLING.items():
        value: Any = field.default
        for source in (checkpoint.config, checkpoint.generation_config):  # the later one counts
            if source.get(key) is not None:
                value = source[key]
        if type(value) not in (int, float) or not field.low <= value <= field.high:
            raise InputError(
                f"{checkpoint.path}: {key} is {value!r}, which no sampler takes",
                hint="correct it in generation_config.json",
            )
        found[key] = float(value)
    return found


# --------------------------------------------------------------------------------------------
# Special tokens


@dataclass(frozen=True)
class _SpecialIds:
    bos: int | None
    eos: tuple[int, ...]
    pad: int


def _special_ids(
    checkpoint: Checkpoint,
    tokenizer: LoadedTokenizer,
    tokenizer_config: Mapping[str, Any],
    vocab_size: int,
) -> _SpecialIds:
    """Ids from generation_config.json, else config.json, else the tokenizer's token texts.

    A model without bos has None (MLC's default of 1 would be some other token); pad falls back to
    eos, which transformers does too.
    """

    def find(name: str) -> tuple[int, ...]:
        for source in (checkpoint.generation_config, checkpoint.config):
            value = source.get(f"{name}_token_id")
            if value is None or value == []:
                continue
            values = value if isinstance(value, list) else [value]
            for number in values:
                if type(number) is not int or not 0 <= number < vocab_size:
                    raise InputError(
                        f"{checkpoint.path}: {name}_token_id is {value!r}, and token ids lie in "
                        f"0..{vocab_size - 1}",
                        hint="correct it in generation_config.json or config.json",
                    )
            return tuple(dict.fromkeys(values))
        text = token_text(tokenizer_config.get(f"{name}_token"))
        return () if text is None or text not in tokenizer.ids else (tokenizer.ids[text],)

    eos, bos, pad = find("eos"), find("bos"), find("pad")
    if not eos:
        raise InputError(
            f"{checkpoint.path} doesn't say which token ends a text",
            hint="add eos_token_id to generation_config.json",
        )
    return _SpecialIds(bos=bos[0] if bos else None, eos=eos, pad=pad[0] if pad else eos[0])


def _facts(tokenizer: LoadedTokenizer, tokenizer_config: Mapping[str, Any]) -> TokenizerFacts:
    variables = {
        name: text
        for name in ("bos_token", "eos_token", "unk_token", "pad_token")
        if (text := token_text(tokenizer_config.get(name))) is not None
    }
    added: Iterable[Mapping[str, Any]] = tokenizer.json.get("added_tokens") or ()
    special = {token["content"] for token in added if token.get("special")}
    return TokenizerFacts(
        ids=tokenizer.ids,
        special=frozenset(special),
        variables=variables,
        bos_prefix=tokenizer.bos_prefix,
    )


# --------------------------------------------------------------------------------------------
# Writing


def _check_output(out: Path, files: Mapping[str, bytes], overwrite: bool) -> None:
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file", hint="give a directory with -o")
    if overwrite:
        return
    if (out / FILE_NAME).exists():
        raise InputError(
            f"{out} already has a {FILE_NAME}",
            hint="use --overwrite to replace it, or another directory",
        )
    for name in COPIED_FILES:
        try:
            there = (out / name).read_bytes() if (out / name).exists() else None
        except OSError as error:
            raise InputError(f"cannot read {out / name}: {error.strerror or error}") from error
        if there is not None and there != files.get(name):
            raise InputError(
                f"{out} has another model's {name}",
                hint="use --overwrite to replace it, or another directory",
            )


def _manifest_with(out: Path, files: Mapping[str, bytes]) -> dict[str, bytes]:
    """The manifest.json of `out`, with `files` in it; nothing where there is none of ours."""
    try:
        document = read_manifest(out)
    except InputError:
        return {}
    written = [
        WrittenFile(name, len(files[name]), hashlib.sha256(files[name]).hexdigest())
        for name in (FILE_NAME, *COPIED_FILES)
        if name in files
    ]
    return {MANIFEST: manifest_bytes(with_configuration(document, written))}


def _publish(out: Path, files: Mapping[str, bytes], manifest: Mapping[str, bytes]) -> None:
    owned = {FILE_NAME, *COPIED_FILES, *manifest}
    with staged(out, FILE_NAME, owned.__contains__) as staging:
        try:
            for name, data in {**files, **manifest}.items():
                (staging.new / name).write_bytes(data)
        except OSError as error:
            raise cannot_write(out, error) from error
        staging.publish()


# --------------------------------------------------------------------------------------------
# Reading


@dataclass(frozen=True)
class ChatConfig:
    """A mlc-chat-config.json.

    `model_config` has the keys of the checkpoint's config.json, as `load_model` reads them;
    `sizes` the fields of CompileConfig.
    """

    path: Path
    raw: Mapping[str, Any]
    model_type: str
    quantization: str
    model_config: Mapping[str, Any]
    sizes: Mapping[str, int]
    conv_template: ConvTemplate
    standing: Standing | None

    def model(self) -> Model:
        """The model that it describes.

        Raises:
            InputError: as `load_model`.
        """
        model = load_model(self.model_config, model_type=self.model_type, where=str(self.path))
        return replace(model, standing=self.standing)

    def scheme(self, model: Model) -> QuantScheme:
        """The scheme that it names, with its overrides for the parameters of `model`.

        Raises:
            InputError: an unknown scheme, or an override that doesn't fit; names the file.
        """
        scheme = get_scheme(self.quantization)
        given = self.raw.get(OVERRIDES_KEY)
        if given is None:
            return scheme
        if not isinstance(given, list):
            raise InputError(
                f"{self.path}: {OVERRIDES_KEY} is {given!r:.60}, not a list",
                hint="make the file again with mlc_compile gen_config",
            )
        try:
            return with_overrides(scheme, given, model)
        except InputError as error:
            raise InputError(f"{self.path}: {error.message}", hint=error.hint) from error

    @classmethod
    def read(cls, path: str | Path) -> ChatConfig:
        """The configuration in a file, or in a directory that holds one.

        Sizes at the top level count before those in `model_config`, as in MLC-LLM.

        Raises:
            InputError: no such file, or a field is missing or of the wrong type.
        """
        file = Path(path)
        if file.is_dir():
            file = file / FILE_NAME
        if not file.is_file():
            raise InputError(f"there is no {file}", hint="make it with mlc_compile gen_config")
        raw = read_json_strict(file)

        def need(key: str, kind: type) -> Any:
            if not isinstance(raw.get(key), kind):
                raise InputError(
                    f"{file}: {key} is {raw.get(key)!r:.60}, not a {kind.__name__}",
                    hint="make the file again with mlc_compile gen_config",
                )
            return raw[key]

        if raw.get("version") != VERSION:
            raise InputError(
                f"{file} has the format version {raw.get('version')!r} and {VERSION} is supported"
            )
        model_config: dict[str, Any] = dict(need("model_config", dict))
        sizes = {}
        for key in COMPILE_KEYS:
            value = raw.get(key, model_config.pop(key, None))
            model_config.pop(key, None)
            if type(value) is not int:
                raise InputError(
                    f"{file}: {key} is {value!r}, not a whole number",
                    hint="make the file again with mlc_compile gen_config",
                )
            sizes[key] = value
        return cls(
            path=file,
            raw=raw,
            model_type=need("model_type", str),
            quantization=need("quantization", str),
            model_config=model_config,
            sizes=sizes,
            conv_template=ConvTemplate.from_json(need("conv_template", dict), str(file)),
            standing=_standing(raw.get("architecture"), file),
        )


def _standing(found: object, file: Path) -> Standing | None:
    """What `Model.identity` wrote; other tools, and we for named architectures, write no basis."""
    if not isinstance(found, dict) or "basis" not in found:
        return None
    basis = found["basis"]
    if basis not in get_args(Basis):
        raise InputError(
            f"{file}: architecture.basis is {basis!r:.60}, not one of {', '.join(get_args(Basis))}",
            hint="make the file again with mlc_compile gen_config",
        )
    return Standing(basis, str(found.get("evidence", "")))
