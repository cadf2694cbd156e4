"""From config.json to a `Model`, strictly.

Every key is read, known not to matter, or an error that names it. Keys whose usual value is
harmless and whose other values would change the maths are checked by value.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from mlc_compile.config import ConfigReader, ModelConfig, read_rope
from mlc_compile.models.registry import get_architecture
from mlc_compile.models.spec import Architecture, ConfigSchema, Model

IGNORED: Final = frozenset(
    {
        # where it comes from
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
        # training only
        "attention_dropout",
        "embd_pdrop",
        "hidden_dropout",
        "initializer_range",
        "resid_pdrop",
        # classification heads, which no supported class has
        "finetuning_task",
        "id2label",
        "label2id",
        "num_labels",
        "problem_type",
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
        "min_length",
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
    ("pretraining_tp", (1, None), "convert the checkpoint to one slice first"),
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


def load_model(config_json: Mapping[str, Any], *, model_type: str = "auto", where: str) -> Model:
    """A model from the keys of a config.json.

    Args:
        config_json: the keys as read; kept as `ModelConfig.raw`.
        model_type: `auto` goes by the file; any other name reads it as that type, which is the
            user's word that the maths is the same.
        where: the file or checkpoint, for messages.

    Raises:
        InputError: unknown type, class, key or value, or sizes that cannot be; names closest
            types and the key.
    """
    reader = ConfigReader(config_json, where=where)
    found = reader.optional_text("model_type")
    if model_type == "auto":
        if found is None:
            raise reader.fail(
                "model_type",
                "is missing",
                hint="is this a Hugging Face config.json? --model-type names it by hand",
            )
        declared = get_architecture(found, where=where)
    else:
        declared = get_architecture(model_type, where="--model-type")
    _check_class(reader, declared, forced=model_type not in ("auto", found))

    arch = declared.resolve(reader)
    reader.only("hidden_act", (arch.mlp.activation,), hint="other activations are not built")
    for key, values, hint in FIXED:
        reader.only(key, values, hint=hint or None)
    for key, values in arch.schema.fixed:
        reader.only(key, values)
    config = _read_numbers(reader, arch)
    reader.finish(ignorable=IGNORED | set(arch.schema.ignored))
    return Model(arch=arch, config=config, names=arch.names[0])


def _check_class(reader: ConfigReader, arch: Architecture, *, forced: bool) -> None:
    """`architectures` must name a class of this type, unless the user forced the type."""
    classes = reader.optional_texts("architectures")
    if classes and not forced and not set(classes) & set(arch.hf_classes):
        raise reader.fail(
            "architectures",
            f"is {', '.join(classes)}; for model_type {arch.name!r} only "
            f"{', '.join(arch.hf_classes)} is supported",
            hint="other classes have other heads or layers",
        )


def _read_numbers(reader: ConfigReader, arch: Architecture) -> ModelConfig:
    schema = arch.schema
    hidden = reader.integer("hidden_size", high=_MAX_WIDTH)
    heads = reader.integer("num_attention_heads", high=_MAX_HEADS)
    layers = reader.integer("num_hidden_layers", high=_MAX_LAYERS)
    kv_heads = _kv_heads(reader, schema, heads)
    head_dim = _head_dim(reader, schema, hidden, heads)
    positions = reader.integer("max_position_embeddings")
    return ModelConfig(
        model_type=arch.name,
        hidden_size=hidden,
        intermediate_size=reader.integer("intermediate_size", high=_MAX_INNER),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=reader.integer("vocab_size", high=_MAX_VOCAB),
        norm_eps=reader.number(schema.norm_eps, high=1.0),
        max_position_embeddings=positions,
        tie_word_embeddings=reader.flag("tie_word_embeddings"),
        sliding_window=_window(reader, schema, layers),
        rope=read_rope(reader, head_dim=head_dim, max_position_embeddings=positions),
        raw=dict(reader.raw),
    )


def _kv_heads(reader: ConfigReader, schema: ConfigSchema, heads: int) -> int:
    if "num_key_value_heads" in reader.raw or schema.num_key_value_heads is None:
        kv_heads = reader.optional_integer("num_key_value_heads", high=_MAX_HEADS) or heads
    else:
        kv_heads = schema.num_key_value_heads
    if heads % kv_heads:
        raise reader.fail(
            "num_key_value_heads", f"({kv_heads}) does not divide num_attention_heads ({heads})"
        )
    return kv_heads


def _head_dim(reader: ConfigReader, schema: ConfigSchema, hidden: int, heads: int) -> int:
    head_dim: int | None
    if schema.head_dim is not None:
        head_dim = reader.integer("head_dim", default=schema.head_dim, high=_MAX_HEAD_DIM)
    else:
        head_dim = reader.optional_integer("head_dim", high=_MAX_HEAD_DIM)
    if head_dim is None:
        if hidden % heads:
            raise reader.fail(
                "hidden_size",
                f"({hidden}) is no multiple of num_attention_heads ({heads})",
                hint="where heads have their own size, head_dim must say it",
            )
        head_dim = hidden // heads
    if head_dim % 2:
        raise reader.fail("head_dim", f"is {head_dim}; rotary positions need an even size")
    return head_dim


_LAYER_KINDS: Final = ("full_attention", "sliding_attention")


def _window(reader: ConfigReader, schema: ConfigSchema, layers: int) -> int | None:
    """The window of every layer; None for full attention. A mixture is an error."""
    kinds = reader.optional_texts("layer_types")
    if kinds is not None:
        for kind in kinds:
            if kind not in _LAYER_KINDS:
                raise reader.fail(
                    "layer_types", f"holds {kind!r}; supported: {', '.join(_LAYER_KINDS)}"
                )
        if len(kinds) != layers:
            raise reader.fail(
                "layer_types", f"has {len(kinds)} entries for num_hidden_layers = {layers}"
            )
        if len(set(kinds)) > 1:
            raise reader.fail(
                "layer_types",
                "mixes full_attention and sliding_attention",
                hint="one kind for all layers is supported",
            )

    window: int | None = None
    if schema.window == "none":
        reader.only("sliding_window", (None,), hint="this model type has no window")
        reader.only("use_sliding_window", (False, None), hint="this model type has no window")
    else:
        window = schema.sliding_window
        if "sliding_window" in reader.raw:
            window = reader.optional_integer("sliding_window")
    if schema.window == "gated":
        window = _gated_window(reader, window, layers, explicit=kinds is not None)
        if kinds is not None and "full_attention" in kinds:
            window = None
    if kinds is not None and ("sliding_attention" in kinds) != (window is not None):
        raise reader.fail(
            "layer_types",
            f"is all {kinds[0]} but the window is {window}",
            hint="sliding_window and layer_types contradict each other",
        )
    return window


def _gated_window(
    reader: ConfigReader, window: int | None, layers: int, *, explicit: bool
) -> int | None:
    """Qwen's rule: a window only if switched on, and only from layer `max_window_layers` on."""
    first = reader.integer("max_window_layers", default=28, low=0)
    if not reader.flag("use_sliding_window") or window is None:
        return None
    if explicit or first == 0:
        return window
    if first >= layers:
        return None
    raise reader.fail(
        "max_window_layers",
        f"is {first}: layers below it attend fully, the other {layers - first} have a window",
        hint="one kind for all layers is supported; use_sliding_window: false gives full "
        "attention, which equals it up to the window's length",
    )
