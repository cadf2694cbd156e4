"""The references: numpy against transformers, and stored weights against checkpoints."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from every_model import HUGGING_FACE, config_json
from safetensors.numpy import save_file

from mlc_compile.errors import EnvironmentLacksError, InputError
from mlc_compile.models import ARCHITECTURES, Model, detect, load_model
from mlc_compile.models import options as options_module
from mlc_compile.models.options import (
    MLP,
    Alibi,
    Block,
    GatedMLP,
    GroupedQuery,
    HeadNorm,
    LayerNorm,
    Learned,
    Option,
    RMSNorm,
    Rotary,
    SparseMLP,
)
from mlc_compile.models.spec import Architecture
from mlc_compile.quantization.scheme import SCHEMES, QuantScheme, get_scheme
from mlc_compile.runtime import reference as reference_module
from mlc_compile.runtime.formulas import ACTIVATIONS
from mlc_compile.runtime.reference import (
    CUT,
    Attention,
    NumpyReference,
    TransformersReference,
    check_parameters,
    checkpoint_weights,
    make_reference,
    stored_weights,
    tokens_of,
)
from mlc_compile.weights.checkpoint import Checkpoint, open_checkpoint
from mlc_compile.weights.convert import convert_weight
from mlc_compile.weights.parts import published

Array = np.ndarray[Any, Any]
VOCAB, CONTEXT = 96, 160

SIZES = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": VOCAB,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
SCALED: Mapping[str, Mapping[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 2.0},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    "longrope": {
        "rope_type": "longrope",
        "factor": 4.0,
        "original_max_position_embeddings": 32,
        "short_factor": [1.0 + i / 8 for i in range(8)],
        "long_factor": [1.0 + i for i in range(8)],
    },
}
# (name, model type, changes of config.json)
CASES: list[tuple[str, str, dict[str, Any]]] = [
    *((name, name, {}) for name in ("llama", "mistral", "qwen2", "qwen3")),
    ("llama tied", "llama", {"tie_word_embeddings": True}),
    ("llama biases", "llama", {"attention_bias": True, "mlp_bias": True}),
    ("llama all heads", "llama", {"num_key_value_heads": 4}),
    ("llama wide heads", "llama", {"head_dim": 32}),
    ("mistral window", "mistral", {"sliding_window": 11}),
    (
        "qwen2 window",
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 20, "max_window_layers": 0},
    ),
    ("qwen3 biases", "qwen3", {"attention_bias": True}),
    *((kind, "llama", {"rope_scaling": dict(values)}) for kind, values in SCALED.items()),
]
cases = pytest.mark.parametrize(
    ("model_type", "changes"), [case[1:] for case in CASES], ids=[case[0] for case in CASES]
)


def config_of(model_type: str = "llama", **changes: Any) -> dict[str, Any]:
    classes = list(ARCHITECTURES[model_type].hf_classes)
    return {"model_type": model_type, "architectures": classes, **SIZES, **changes}


def random_weights(model: Model, seed: int = 0) -> dict[str, Array]:
    rng = np.random.default_rng(seed)
    return {
        spec.name: (rng.standard_normal(spec.shape) * 0.2 + (spec.role == "norm")).astype(
            np.float32
        )
        for spec in model.parameters()
    }


def tokens(count: int, seed: int = 1) -> list[int]:
    return [int(t) for t in np.random.default_rng(seed).integers(0, VOCAB, count)]


def nmse(found: Array, wanted: Array) -> float:
    wide = wanted.astype(np.float64)
    return float(((found - wide) ** 2).mean() / wide.var())


def attention_of(model: Model, context: int = CONTEXT) -> Attention:
    window = model.config.sliding_window
    trained = model.config.max_position_embeddings
    return Attention(window, 0, context if window is None else trained)


@cases
def test_numpy_equals_transformers(model_type: str, changes: dict[str, Any]) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    config = config_of(model_type, **changes)
    model = load_model(config, where="config.json")
    weights, attention = random_weights(model), attention_of(model)
    ours = NumpyReference(model, weights, attention)
    theirs = TransformersReference(config, model, weights, attention, where="config.json")
    text = tokens(150)
    positions = [0, 1, 10, 11, 12, 31, 32, 77, 149]
    wanted = theirs.logits(text, positions)
    found = ours.logits(text, positions)
    assert wanted.shape == found.shape == (len(positions), VOCAB) and found.dtype == np.float32
    assert nmse(found, wanted) < 1e-10
    assert ours.greedy(text[:20], 12) == theirs.greedy(text[:20], 12)


@pytest.mark.parametrize("name", HUGGING_FACE)
def test_numpy_equals_transformers_for_every_architecture(name: str) -> None:
    """Both take apart or read the same parameters: names, rows, structure and numbers."""
    pytest.importorskip("torch")
    config = config_json(name)
    model = load_model(config, where=name)
    weights, attention = random_weights(model), attention_of(model)
    text = tokens(70)
    found = NumpyReference(model, weights, attention).logits(text, range(70))
    theirs = TransformersReference(config, model, weights, attention, where=name)
    assert nmse(found, theirs.logits(text, range(70))) < 1e-9


@pytest.mark.parametrize("name", ["dynamic", "longrope"])
def test_rope_that_grows_is_fixed_at_the_librarys_context(name: str) -> None:
    """A text of 20 tokens is computed as a library of 160 computes it, in both references."""
    pytest.importorskip("transformers")
    config = config_of(rope_scaling=dict(SCALED[name]))
    model = load_model(config, where="config.json")
    weights, text = random_weights(model), tokens(20)
    long, short = (
        TransformersReference(config, model, weights, Attention(None, 0, n), where="").logits(
            text, [19]
        )
        for n in (CONTEXT, 24)
    )
    assert nmse(long, short) > 1e-3
    for context, wanted in ((CONTEXT, long), (24, short)):
        ours = NumpyReference(model, weights, Attention(None, 0, context))
        assert nmse(ours.logits(text, [19]), wanted) < 1e-10


@pytest.mark.parametrize("sink", [0, 2])
def test_prefixes_and_greedy_agree_with_whole_texts(sink: int) -> None:
    model = load_model(config_of("qwen3"), where="config.json")
    reference = NumpyReference(model, random_weights(model), Attention(9, sink, 128))
    text = tokens(40)
    whole = reference.logits(text, range(40))
    for n in (1, 9, 10, 33):
        assert nmse(reference.logits(text[:n], [n - 1]), whole[n - 1 : n]) < 1e-10
    found = reference.greedy(text, 10)
    for i, token in enumerate(found):
        calls = [t for earlier in found[:i] for t in (CUT, earlier)]
        assert token == int(reference.logits([*text, *calls], [39 + i])[0].argmax())


def test_window_and_sinks_by_hand() -> None:
    model = load_model(config_of(), where="config.json")
    reference = NumpyReference(model, {}, Attention(6, 2, 128))
    seen = reference.visible(np.arange(12), np.arange(12))
    for query in range(12):
        expected = {k for k in range(query + 1) if query - k < 4 or k < 2}
        assert set(np.flatnonzero(seen[query])) == expected
    # Once full, the window has 6 keys: 2 sinks and the 4 latest.
    assert seen[8:].sum(axis=1).tolist() == [6, 6, 6, 6]


def test_with_sinks_it_matters_where_calls_begin() -> None:
    """A sink is seen as far away as if what slid out before the call had never been."""
    model = load_model(config_of(), where="config.json")
    weights, text = random_weights(model), tokens(30)
    cut = (CUT, *text[:20], CUT, *text[20:])

    def after(attention: Attention, text: Sequence[int]) -> Array:
        return NumpyReference(model, weights, attention).logits(text, [29])

    assert tokens_of(cut) == tuple(text)
    sinks, plain = Attention(12, 3, 128), Attention(12, 0, 128)
    assert nmse(after(sinks, cut), after(sinks, text)) > 1e-4
    assert np.array_equal(after(plain, cut), after(plain, text))
    early = (CUT, *text[:12], CUT, *text[12:])  # nothing has slid out before the second call
    assert nmse(after(sinks, early), after(sinks, text)) < 1e-10


def test_every_option_is_one_that_the_numpy_decoder_reads() -> None:
    """A new field would silently be left out: teach `NumpyReference` first, then list it here.

    Biases, and what is done to weights as they are read, show in the weights.
    """
    read: dict[type[Option], set[str]] = {
        RMSNorm: {"add"},
        LayerNorm: {"weight", "bias", "add"},
        HeadNorm: {"norm", "over", "enabled", "apart"},
        Rotary: {"interleaved"},
        Learned: {"offset"},
        Alibi: {"rounded"},
        GroupedQuery: {"qkv_bias", "out_bias", "qk_norm"},
        GatedMLP: {"activation", "bias"},
        MLP: {"activation", "bias"},
        SparseMLP: {"activation", "score", "renormalize", "shared"},
        Block: {"input_norms", "output_norms", "parallel", "shared_norm"},
        Architecture: {
            *("name", "hf_classes", "schema", "names", "label", "variant"),
            *("attention", "mlp", "norm", "positions", "block"),
            *("embed_norm", "final_norm", "head_bias", "unit_head"),
        },
    }
    assert set(read) == {Architecture, *options()}
    for option, names in read.items():
        assert {field.name for field in dataclasses.fields(option)} == names, option
    assert ACTIVATIONS.keys() == set(detect.ACTIVATIONS)


def options() -> set[type[Option]]:
    """All that are declared in models/options.py."""
    found = [o for o in vars(options_module).values() if isinstance(o, type)]
    return {o for o in found if issubclass(o, Option)} - {Option}


# ---------------------------------------------------------------------------------------------
# Which reference


def test_choice_of_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    config = config_of("mistral", sliding_window=40)
    model = load_model(config, where="config.json")
    weights = random_weights(model)

    def choose(engine: str, window: int | None, sink: int = 0, context: int = 128) -> str:
        attention = Attention(window, sink, context)
        chosen, why = make_reference(config, model, weights, attention, engine=engine, where="here")
        assert why == "" or engine == "auto"
        return f"{type(chosen).__name__} {why}".strip()

    assert choose("auto", 40) == "TransformersReference"
    assert choose("auto", 24) == "TransformersReference"
    assert choose("auto", None, context=40) == "TransformersReference"
    assert choose("numpy", 40) == "NumpyReference"
    reason = "its window or sinks are not the checkpoint's"
    assert choose("auto", 40, sink=2) == f"NumpyReference {reason}"
    with pytest.raises(InputError, match="window of 40 tokens with 2 sinks"):
        choose("transformers", 40, sink=2)
    with pytest.raises(InputError, match="unknown reference engine 'torch'"):
        choose("torch", 40)
    monkeypatch.setattr(reference_module, "transformers_missing", lambda: ["torch"])
    assert choose("auto", 40) == "NumpyReference torch not installed"
    with pytest.raises(EnvironmentLacksError, match="needs torch") as caught:
        choose("transformers", 40)
    assert "pip install 'mlc-compile[reference]'" in str(caught.value)
    assert caught.value.exit_code == 3


def test_an_architecture_that_transformers_lacks_takes_numpy() -> None:
    pytest.importorskip("transformers")
    config = config_of("orion")
    model = load_model(config, where="config.json")
    weights, attention = random_weights(model), attention_of(model)
    chosen, why = make_reference(config, model, weights, attention, where="here")
    assert isinstance(chosen, NumpyReference)
    assert why == "transformers has no class for orion"
    with pytest.raises(InputError, match=r"here: transformers has no class for orion; use --eng"):
        make_reference(config, model, weights, attention, engine="transformers", where="here")


@pytest.mark.parametrize("engine", ["numpy", "transformers"])
@pytest.mark.parametrize("model_type", ["llama", "gemma2"])
def test_changed_weights_are_taken_again(model_type: str, engine: str) -> None:
    """Of what is rearranged on its way to torch, nothing is shared with it."""
    pytest.importorskip("transformers")
    config = config_of(model_type, tie_word_embeddings=True)
    model = load_model(config, where="config.json")
    weights, attention = random_weights(model), attention_of(model)
    chosen, _ = make_reference(config, model, weights, attention, engine=engine, where="here")
    before = chosen.logits(tokens(9), [8])
    weights["model.norm.weight"] += 1
    chosen.reload()
    fresh, _ = make_reference(config, model, weights, attention, engine=engine, where="here")
    assert np.array_equal(chosen.logits(tokens(9), [8]), fresh.logits(tokens(9), [8]))
    assert nmse(chosen.logits(tokens(9), [8]), before) > 1e-3


def test_a_window_that_the_class_does_not_have_takes_numpy() -> None:
    config = config_of()
    model = load_model(config, where="config.json")
    chosen, why = make_reference(
        config, model, random_weights(model), Attention(32, 0, 128), where="here"
    )
    assert isinstance(chosen, NumpyReference) and why


def test_code_of_a_checkpoint_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    (tmp_path / "modeling.py").write_text("raise SystemExit('ran')")
    monkeypatch.chdir(tmp_path)
    config = config_of(auto_map={"AutoModelForCausalLM": "modeling.Model"})
    model = load_model(config_of(), where="config.json")
    attention = attention_of(model)
    TransformersReference(config, model, random_weights(model), attention, where="here")


# ---------------------------------------------------------------------------------------------
# Stored weights


def save(path: Path, model: Model, weights: Mapping[str, Array], config: Any) -> Checkpoint:
    """A Hugging Face directory with these weights."""
    path.mkdir(parents=True, exist_ok=True)
    tensors = published(model.parameters(), weights)
    save_file({n: np.ascontiguousarray(t) for n, t in tensors}, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(config))
    return open_checkpoint(path)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> tuple[Model, Checkpoint]:
    config = config_of("qwen2")
    model = load_model(config, where="config.json")
    folder = tmp_path_factory.mktemp("checkpoint")
    return model, save(folder, model, random_weights(model), config)


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=lambda s: s.name)
def test_stored_weights_are_the_checkpoints(
    source: tuple[Model, Checkpoint], scheme: QuantScheme, tmp_path: Path
) -> None:
    model, checkpoint = source
    convert_weight(checkpoint, model, scheme, tmp_path / "out")
    check = check_parameters(model, scheme, tmp_path / "out", checkpoint)
    stored = stored_weights(model, scheme, tmp_path / "out")
    original = checkpoint_weights(model, checkpoint)
    assert check.faults == () and check.compared == len(stored) == len(original)
    assert all(w.dtype == np.float32 and w.flags.writeable for w in stored.values())
    if scheme.is_plain:
        assert check.exact == check.compared and check.worst_steps == 0
    else:
        # Half a step, what rounding to float16 adds, and for "signed" scales what lies beyond the
        # shorter side; float8 steps are 32 scales wide at the top.
        assert 0.4 < check.worst_steps < (18 if scheme.codes == "e4m3" else 1.2)
        assert check.exact < check.compared
    if scheme.name == "q0f32":
        assert all(np.array_equal(stored[name], original[name]) for name in stored)
    elif not scheme.is_plain:
        error = nmse(*(w["model.layers.0.mlp.down_proj.weight"] for w in (stored, original)))
        assert error < (1e-3 if scheme.codes == "e4m3" else {3: 0.1, 4: 0.02, 8: 1e-4}[scheme.bits])


@pytest.mark.parametrize("scheme", ["q0f16", "q4f16_1", "q4f16_0"])
@pytest.mark.parametrize("name", ["gpt2", "falcon", "gemma2", "cohere-qk-norm", "qwen2_moe", "glm"])
def test_stored_weights_of_other_layouts(name: str, scheme: str, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    config = dict(config_json(name))
    model = load_model(config, where=name)
    weights = random_weights(model)
    checkpoint = save(tmp_path / "checkpoint", model, weights, config)
    for name, found in checkpoint_weights(model, checkpoint).items():
        np.testing.assert_allclose(found, weights[name], rtol=1e-6, atol=1e-6)
    convert_weight(checkpoint, model, SCHEMES[scheme], tmp_path / "out")
    check = check_parameters(model, SCHEMES[scheme], tmp_path / "out", checkpoint)
    assert check.faults == () and check.compared == len(weights)
    assert check.worst_steps < 1.2
    stored = stored_weights(model, SCHEMES[scheme], tmp_path / "out")
    for name, found in stored.items():
        assert found.shape == weights[name].shape
        assert nmse(found, weights[name]) < 0.03


@pytest.mark.parametrize("name", ["q0f32", "q0f16", "q4f16_1", "q3f16_0", "q4bf16_1"])
@pytest.mark.parametrize("changed", ["mlp.down_proj.weight", "self_attn.qkv_proj.bias"])
def test_other_weights_are_found(
    source: tuple[Model, Checkpoint], name: str, changed: str, tmp_path: Path
) -> None:
    model, checkpoint = source
    weights = checkpoint_weights(model, checkpoint)
    full = f"model.layers.1.{changed}"
    weights[full] = weights[full].copy()
    weights[full][3] *= -1
    other = save(tmp_path / "other", model, weights, dict(checkpoint.config))
    convert_weight(other, model, get_scheme(name), tmp_path / "out")
    check = check_parameters(model, get_scheme(name), tmp_path / "out", checkpoint)
    assert len(check.faults) == 1 and check.faults[0].startswith(f"{full}: ")
    assert check.to_json()["faults"]


@pytest.mark.parametrize("name", ["q4f16_0", "q4f16_awq", "q8f16_pc"])
def test_parameters_are_compared_in_blocks(
    source: tuple[Model, Checkpoint], name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, checkpoint = source
    convert_weight(checkpoint, model, get_scheme(name), tmp_path / "out", scales="mse")
    whole = check_parameters(model, get_scheme(name), tmp_path / "out", checkpoint)
    monkeypatch.setattr("mlc_compile.runtime.reference._BLOCK", 500)
    assert check_parameters(model, get_scheme(name), tmp_path / "out", checkpoint) == whole


def test_tensors_that_are_not_the_classes_are_refused(source: tuple[Model, Checkpoint]) -> None:
    pytest.importorskip("transformers")
    model, checkpoint = source
    weights = checkpoint_weights(model, checkpoint)
    name = "model.layers.0.mlp.down_proj.weight"
    flipped = {**weights, name: np.ascontiguousarray(weights[name].T)}
    config, attention = checkpoint.config, attention_of(model)
    with pytest.raises(InputError, match=r"down_proj\.weight is \[80, 48\], not \[48, 80\]"):
        TransformersReference(config, model, flipped, attention, where="here")
    unbiased = load_model(config_of("llama"), where="config.json")
    plain = {spec.name: weights[spec.name] for spec in unbiased.parameters()}
    other = dataclasses.replace(unbiased, arch=dataclasses.replace(unbiased.arch, name="qwen2"))
    with pytest.raises(InputError, match=r"Qwen2ForCausalLM and .* differ in 6 tensors, first mod"):
        TransformersReference(config, other, plain, attention, where="here")
