"""From config.json to a `Model`, strictly.

Every key is read, known not to matter, or an error that names it. Keys whose usual value is
harmless and whose other values would change the maths are checked by value.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any, Final

from mlc_compile.config import (
    NO_ROPE,
    ConfigReader,
    Experts,
    LayerKind,
    ModelConfig,
    RopeConfig,
    read_rope,
)
from mlc_compile.errors import InputError
from mlc_compile.models.options import Alibi, Rotary, SparseMLP
from mlc_compile.models.registry import ARCHITECTURES, get_architecture
from mlc_compile.models.schema import FULL, SLIDING, Kinds
from mlc_compile.models.spec import Architecture, Model, Standing

IGNORED: Final = frozenset(
    {
        # where it comes from
        "_from_model_config",
        "_name_or_path",
        "name_or_path",
        "_commit_hash",
        "auto_map",
        "is_llama_config",
        "transformers_version",
        "transformers.js_config",
        "unsloth_fixed",
        "unsloth_version",
        # how it is stored; the tensors themselves say so
        "dtype",
        "torch_dtype",
        # how it is run elsewhere
        "_attn_implementation",
        "_attn_implementation_autoset",
        "attn_implementation",
        "_flash_attn_2_enabled",
        "output_attentions",
        "output_hidden_states",
        "return_dict",
        "return_dict_in_generate",
        "torchscript",
        "use_bfloat16",
        "use_cache",
        "use_flash_attention_2",
        # training only
        "attention_dropout",
        "embd_pdrop",
        "hidden_dropout",
        "gradient_checkpointing",
        "output_router_logits",
        "pretraining_tp",  # cuts products in slices and adds them up; tensors are whole
        "router_aux_loss_coef",
        "router_jitter_noise",
        "initializer_range",
        "attn_pdrop",
        "classifier_dropout",
        "embed_dropout",
        "embedding_dropout",
        "resid_dropout",
        "resid_pdrop",
        "residual_dropout",
        # classification heads, which no supported class has
        "finetuning_task",
        "id2label",
        "label2id",
        "num_labels",
        "problem_type",
        "summary_activation",
        "summary_first_dropout",
        "summary_proj_to_labels",
        "summary_type",
        "summary_use_proj",
        "task_specific_params",
        # tokens and sampling: chat_config.py reads these
        "bad_words_ids",
        "begin_suppress_tokens",
        "bos_token_id",
        "decoder_start_token_id",
        "diversity_penalty",
        "do_sample",
        "early_stopping",
        "encoder_no_repeat_ngram_size",
        "eos_token_id",
        "exponential_decay_length_penalty",
        "forced_bos_token_id",
        "forced_eos_token_id",
        "length_penalty",
        "max_length",
        "max_sequence_length",
        "min_length",
        "model_max_length",
        "no_repeat_ngram_size",
        "num_beam_groups",
        "num_beams",
        "num_return_sequences",
        "output_scores",
        "pad_token_id",
        "prefix",
        "remove_invalid_values",
        "repetition_penalty",
        "sep_token_id",
        "suppress_tokens",
        "temperature",
        "tokenizer_class",
        "top_k",
        "top_p",
        "typical_p",
        "unk_token_id",
    }
)
"""Keys that do not change what the model computes."""

FIXED: Final[tuple[tuple[str, tuple[object, ...], str], ...]] = (
    ("quantization_config", (None,), "convert from the unquantised checkpoint"),
    ("compression_config", (None,), "convert from the unquantised checkpoint"),
    (
        "dual_chunk_attention_config",
        (None,),
        "dual chunk attention is not built; without this key the model is exact up to the "
        "original length only, so take the checkpoint of ordinary context instead",
    ),
    ("rope_interleaved", (False, None), "permute q and k to the half-split order first"),
    ("use_mrope", (False, None), "positions in several axes are not built"),
    ("is_decoder", (False, True, None), ""),
    ("is_encoder_decoder", (False, None), "only decoders are built"),
    ("add_cross_attention", (False, None), "only decoders are built"),
    ("cross_attention_hidden_size", (None,), "only decoders are built"),
    ("tie_encoder_decoder", (False, None), "only decoders are built"),
    ("chunk_size_feed_forward", (0, None), ""),
    ("pruned_heads", (None, {}), "heads of different number per layer are not built"),
    ("per_layer_config", (None, {}), "layers of different sizes are not built"),
    ("tf_legacy_loss", (False, None), ""),
)
"""Keys of any model type, the values that change nothing, and what to do about others."""

# Far above any published model; guards against overflow and endless loops over nonsense.
_MAX_WIDTH: Final = 2**20
_MAX_INNER: Final = 2**22
_MAX_VOCAB: Final = 2**24
_MAX_LAYERS: Final = 4096
_MAX_HEADS: Final = 2**14
_MAX_HEAD_DIM: Final = 2**12
_MAX_EXPERTS: Final = 2**14

ACTIVATIONS: Final = (
    "silu",
    "swish",
    "gelu",
    "gelu_new",
    "gelu_pytorch_tanh",
    "gelu_fast",
    "quick_gelu",
    "relu",
    "relu2",
)
"""The activations that nn/activations.py builds."""


def load_model(config_json: Mapping[str, Any], *, model_type: str = "auto", where: str) -> Model:
    """A model from the keys of a config.json.

    Args:
        config_json: the keys as read; kept as `ModelConfig.raw`.
        model_type: `auto` goes by the file; any other name reads it as that type, which is the
            user's word that the maths is the same (`Model.standing`).
        where: the file or checkpoint, for messages.

    Raises:
        InputError: unknown type, class, key or value, or sizes that cannot be; names closest
            types and the key.
    """
    found = config_json.get("model_type")
    own = declared_by(config_json)
    if model_type == "auto":
        if own is None and not isinstance(found, str):
            raise InputError(
                f"{where}: model_type is missing or no string",
                hint="is this a Hugging Face config.json? --model-type names it by hand",
            )
        declared = own or get_architecture(str(found), where=where)
        return read_model(config_json, declared, where=where)
    declared = get_architecture(model_type, where="--model-type")
    if declared is own:
        return read_model(config_json, declared, where=where)
    model = read_model(config_json, declared, where=where, forced=True)
    evidence = f"--model-type {model_type}, while config.json says {found}"
    return replace(model, standing=Standing("named", evidence))


def declared_by(config_json: Mapping[str, Any]) -> Architecture | None:
    """The architecture that `model_type` and `architectures` name; None where they do not.

    A few old files have the class alone.
    """
    found, classes = config_json.get("model_type"), config_json.get("architectures")
    if isinstance(found, str):
        declared = ARCHITECTURES.get(found)
        return declared if declared and names_class(config_json, declared) else None
    if found is not None or not isinstance(classes, list):
        return None
    # A class that a second type may have, too, is the first one's.
    by_class = {arch.hf_classes[0]: arch for arch in ARCHITECTURES.values()}
    return by_class.get(str(classes[0])) if len(classes) == 1 else None


def is_foreign(config_json: Mapping[str, Any]) -> bool:
    """Whether a model type or class is named that is not known, so that structure must decide."""
    found = config_json.get("model_type")
    named = isinstance(found, str) or (found is None and bool(config_json.get("architectures")))
    return named and declared_by(config_json) is None


def names_class(config_json: Mapping[str, Any], declared: Architecture) -> bool:
    """Whether `architectures` names a class of the declaration, or none at all."""
    classes = config_json.get("architectures")
    if not isinstance(classes, list):
        return not classes
    return not classes or any(name in classes for name in declared.hf_classes)


def read_model(
    config_json: Mapping[str, Any], declared: Architecture, *, where: str, forced: bool = False
) -> Model:
    """A model of that architecture. forced: whatever class config.json names.

    Raises:
        InputError: as `load_model`.
    """
    reader = declared.schema.reader(config_json, where)
    reader.take("model_type")
    _check_class(reader, declared, forced=forced)
    arch = declared.resolve(reader)
    if reader.has("hidden_act") and "hidden_act" not in dict(arch.schema.fixed):
        reader.only("hidden_act", (arch.mlp.activation,), hint="this type has no other")
    reader.only("hidden_act", ACTIVATIONS, hint="other activations are not built")
    for key, values in arch.schema.fixed:
        reader.only(key, values)
    for key, values, hint in FIXED:
        reader.only(key, values, hint=hint or None)
    config = _read_numbers(reader, arch)
    reader.finish(ignorable=IGNORED | set(arch.schema.ignored) | set(arch.schema.defaults))
    return Model(arch=arch, config=config, names=arch.names[0])


def _check_class(reader: ConfigReader, arch: Architecture, *, forced: bool) -> None:
    """`architectures` must name a class of this type, unless the user forced the type."""
    classes = reader.optional_texts("architectures")
    if not forced and classes and not names_class(reader.source, arch):
        raise reader.fail(
            "architectures",
            f"is {', '.join(classes)}; for model_type {arch.name!r} only "
            f"{', '.join(arch.hf_classes)} is supported",
            hint="other classes have other heads or layers",
        )


def _read_numbers(reader: ConfigReader, arch: Architecture) -> ModelConfig:
    hidden = reader.integer("hidden_size", high=_MAX_WIDTH)
    heads = reader.integer("num_attention_heads", high=_MAX_HEADS)
    count = reader.integer("num_hidden_layers", high=_MAX_LAYERS)
    kv_heads = reader.optional_integer("num_key_value_heads", high=_MAX_HEADS) or heads
    if heads % kv_heads:
        raise reader.fail(
            "num_key_value_heads", f"({kv_heads}) does not divide num_attention_heads ({heads})"
        )
    head_dim = _head_dim(reader, hidden, heads, given="head_dim" in arch.schema.defaults)
    positions = reader.integer("max_position_embeddings")
    experts = _experts(reader, arch)
    kinds = arch.schema.kinds(reader, count)
    window = _window(reader, kinds)
    layers = _layers(reader, arch, kinds, window, head_dim, positions)
    rotating = [kind.rope for kind in layers if kind.rope is not None]
    return ModelConfig(
        model_type=arch.name,
        hidden_size=hidden,
        intermediate_size=reader.integer("intermediate_size", high=_MAX_INNER),
        num_hidden_layers=count,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=reader.integer("vocab_size", high=_MAX_VOCAB),
        norm_eps=reader.number("rms_norm_eps", high=1.0),
        max_position_embeddings=positions,
        tie_word_embeddings=reader.flag("tie_word_embeddings"),
        sliding_window=window if FULL not in kinds else None,
        rope=rotating[0] if rotating else NO_ROPE,
        layers=layers,
        experts=experts,
        extra_head_dim=_alibi_dims(head_dim) if isinstance(arch.positions, Alibi) else 0,
        raw=dict(reader.source),
        **_factors(reader, arch),
    )


def _factors(reader: ConfigReader, arch: Architecture) -> dict[str, Any]:
    """The numbers that the schema has a rule for; a rule may give None for "without"."""
    rules = {f.name: getattr(arch.schema.numbers, f.name) for f in fields(arch.schema.numbers)}
    found = {name: rule(reader) for name, rule in rules.items() if rule is not None}
    return {name: value for name, value in found.items() if value is not None}


def _alibi_dims(head_dim: int) -> int:
    """Two dimensions are needed; a head stays a multiple of 8 where it is one, for wide loads."""
    return 8 if head_dim % 8 == 0 else 2


def _head_dim(reader: ConfigReader, hidden: int, heads: int, *, given: bool) -> int:
    """given: the class has a size of its own, and none of it is no size."""
    if given:
        return reader.integer("head_dim", high=_MAX_HEAD_DIM)
    head_dim = reader.optional_integer("head_dim", high=_MAX_HEAD_DIM)
    if head_dim is None:
        if hidden % heads:
            raise reader.fail(
                "hidden_size",
                f"({hidden}) is no multiple of num_attention_heads ({heads})",
                hint="where heads have their own size, head_dim must say it",
            )
        head_dim = hidden // heads
    return head_dim


def _window(reader: ConfigReader, kinds: Kinds) -> int | None:
    """The window of the layers that have one."""
    if SLIDING not in kinds:
        reader.take("sliding_window")  # transformers 5 writes 0 where a switch turns it off
        return None
    window = reader.optional_integer("sliding_window")
    if window is None:
        raise reader.fail(
            "sliding_window",
            "is not given, but layers have a window",
            hint="sliding_window and layer_types contradict each other",
        )
    return window


def _layers(
    reader: ConfigReader,
    arch: Architecture,
    kinds: Kinds,
    window: int | None,
    head_dim: int,
    positions: int,
) -> tuple[LayerKind, ...]:
    schema = arch.schema
    ropes: dict[str, RopeConfig | None] = dict.fromkeys(kinds)
    rotates: tuple[bool, ...] = (False,) * len(kinds)
    if isinstance(arch.positions, Rotary):
        rotates = schema.rotates(reader, kinds)
        for kind in ropes:
            rope = ropes[kind] = read_rope(
                reader,
                head_dim=head_dim,
                max_position_embeddings=positions,
                partial=schema.partial_rotary,
                layer_kind=kind,
            )
            if rope.kind not in schema.rope_kinds:
                raise reader.fail(
                    "rope_scaling" if reader.has("rope_scaling") else "rope_parameters",
                    f"is of kind {rope.kind}; this type has {', '.join(schema.rope_kinds)}",
                )
        _set_local_rope(reader, arch, ropes)
    sparse = (False,) * len(kinds)
    if isinstance(arch.mlp, SparseMLP):
        sparse = schema.sparse(reader, kinds)
    mixed = FULL in kinds
    return tuple(
        LayerKind(
            window=window if mixed and kind == SLIDING else None,
            rope=ropes[kind] if turns else None,
            sparse=has_experts,
        )
        for kind, turns, has_experts in zip(kinds, rotates, sparse, strict=True)
    )


def _set_local_rope(
    reader: ConfigReader, arch: Architecture, ropes: dict[str, RopeConfig | None]
) -> None:
    """Windowed layers may have a RoPE base of their own, without scaling."""
    if arch.schema.local_theta is None:
        return
    theta = reader.optional_number(arch.schema.local_theta)
    local = ropes.get(SLIDING)
    if theta is not None and local is not None and not _nested_rope(reader):
        ropes[SLIDING] = RopeConfig(theta=theta, rotary_dim=local.rotary_dim)


def _nested_rope(reader: ConfigReader) -> bool:
    """Whether settings are given for each kind of layer; one for all is not what such types read.

    Raises:
        InputError: `rope_parameters` holds one setting for all layers.
    """
    parameters = reader.optional_object("rope_parameters")
    if parameters and SLIDING not in parameters:
        raise reader.fail(
            "rope_parameters",
            f"has no settings of its own for {SLIDING}",
            hint=f"this model type has two: under {SLIDING} and {FULL}",
        )
    return bool(parameters)


def _experts(reader: ConfigReader, arch: Architecture) -> Experts | None:
    if not isinstance(arch.mlp, SparseMLP):
        return None
    keys = arch.schema.experts
    count = reader.integer(keys["count"], high=_MAX_EXPERTS)
    per_token = reader.integer(keys["per_token"], high=count)
    shared = 0
    if "shared_intermediate_size" in keys:
        name = keys["shared_intermediate_size"]
        shared = reader.integer(name, low=0, high=_MAX_INNER)
    return Experts(
        count=count,
        per_token=per_token,
        intermediate_size=reader.integer(keys["intermediate_size"], high=_MAX_INNER),
        shared_intermediate_size=shared,
        scale=reader.number(keys["scale"], default=1.0) if "scale" in keys else 1.0,
    )
