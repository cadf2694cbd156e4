"""The bundled model is what its card says, and writes words: each bound is shown to catch noise."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file
from tokenizers import Tokenizer

from mlc_compile.models import load_model

FOLDER = Path(__file__).parents[2] / "examples" / "tiny_model"
MAX_BYTES = 6_000_000
PROMPTS = (
    "It was",
    "The whale",
    "She was very much",
    "And the king said unto",
    "The Government of",
)
# The model reaches 1.244 bits per byte on the sample and 0.92 in common words. Swapped key heads
# give 2.2 and 0.70, a mixed-up vocabulary 5.9 and 0.35, untrained weights 3.3 and no words.
MAX_BITS_PER_BYTE = 1.3
MIN_COMMON_WORDS = 0.85


def read_json(name: str) -> Any:
    return json.loads((FOLDER / name).read_text("utf-8"))


@pytest.fixture(scope="module")
def weights() -> dict[str, np.ndarray]:
    return load_file(FOLDER / "model.safetensors")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(FOLDER / "tokenizer.json"))


@pytest.fixture(scope="module")
def held_out() -> str:
    return (FOLDER / "held_out.txt").read_text("utf-8")


@pytest.fixture(scope="module")
def card() -> str:
    return (FOLDER / "README.md").read_text("utf-8")


def card_fact(card: str, name: str) -> str:
    rows = re.findall(rf"^\| {re.escape(name)} \| (.*) \|$", card, re.M)
    assert len(rows) == 1, f"the card has {len(rows)} rows named {name!r}"
    return rows[0]


# ------------------------------------------------------------------------------------ the files


def test_size() -> None:
    files = [p for p in FOLDER.rglob("*") if p.is_file() and "__pycache__" not in p.parts]
    assert {"config.json", "generation_config.json", "tokenizer_config.json"} <= {
        p.name for p in files
    }
    assert sum(p.stat().st_size for p in files) <= MAX_BYTES


def test_checkpoint_has_exactly_the_tensors_of_its_config(weights: dict[str, np.ndarray]) -> None:
    model = load_model(read_json("config.json"), where="examples/tiny_model/config.json")
    config = model.config
    assert config.head_dim == 64
    assert 1 < config.num_key_value_heads < config.num_attention_heads
    assert config.tie_word_embeddings
    declared = {source for spec in model.parameters() for source in spec.sources}
    assert declared == set(weights)
    assert weights["model.embed_tokens.weight"].shape == (config.vocab_size, config.hidden_size)


def test_weights_are_finite_float16_and_trained(weights: dict[str, np.ndarray]) -> None:
    for name, weight in weights.items():
        assert weight.dtype == np.float16, name
        assert np.isfinite(weight).all(), name
        assert weight.astype(np.float32).std() > 1e-3, f"{name} is constant"


# -------------------------------------------------------------------------------- the tokenizer


@pytest.mark.parametrize(
    "text",
    [
        "Call me Ishmael. Some years ago--never mind how long precisely--",
        "  two  spaces, a tab\tand\n\n\nthree line ends \n",
        "naïve café — “quoted”, 東京, \U0001f40b and a zero byte \x00",
        "1790-1927: $1,234.50 (50%)",
        "",
    ],
)
def test_tokenizer_round_trips(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text).ids
    assert ids[0] == tokenizer.token_to_id("<|bos|>")
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_tokenizer_fits_the_config(tokenizer: Tokenizer, held_out: str) -> None:
    config, tokens = read_json("config.json"), read_json("tokenizer_config.json")
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    assert sorted(vocabulary.values()) == list(range(config["vocab_size"]))
    for kind in ("bos", "eos"):
        assert vocabulary[tokens[f"{kind}_token"]] == config[f"{kind}_token_id"]
        assert read_json("generation_config.json")[f"{kind}_token_id"] == config[f"{kind}_token_id"]
    ids = tokenizer.encode(held_out).ids
    assert len(ids) <= config["max_position_embeddings"]
    # Trained merges: English takes well under half as many tokens as it has bytes.
    assert len(held_out.encode()) / len(ids) > 3


# ------------------------------------------------------------------------------------- the card


def test_card_states_the_facts(card: str, weights: dict[str, np.ndarray]) -> None:
    config, training = read_json("config.json"), read_json("training.json")
    parameters = sum(w.size for w in weights.values())
    assert training["parameters"] == parameters
    assert card_fact(card, "parameters") == f"{parameters:,}"
    assert card_fact(card, "vocabulary").split()[0] == f"{config['vocab_size']:,}"
    assert card_fact(card, "context") == f"{config['max_position_embeddings']:,} tokens"
    assert card_fact(card, "layers, hidden size, MLP size") == ", ".join(
        str(config[key]) for key in ("num_hidden_layers", "hidden_size", "intermediate_size")
    )
    figures = training["test"]["all"]
    assert card_fact(card, "held-out perplexity") == (
        f"{figures['perplexity']} per token, {figures['bits_per_byte']} bits per byte"
    )
    for split, sizes in training["splits"].items():
        numbers = (sizes["documents"], sizes["bytes"], sizes["tokens"])
        assert card_fact(card, split) == " | ".join(f"{n:,}" for n in numbers)
    assert "license: apache-2.0" in card


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Torch on one thread: on sizes like these, threads on a busy machine only wait."""
    torch = pytest.importorskip("torch")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def script(one_thread: None) -> ModuleType:
    """train.py as a module."""
    spec = importlib.util.spec_from_file_location("tiny_model_train", FOLDER / "train.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # dataclasses looks its module up there; no bytecode, so that the folder stays as it is.
    sys.modules[spec.name] = module
    before, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:
        spec.loader.exec_module(module)
    finally:
        sys.dont_write_bytecode = before
    return module


def test_bundled_weights_come_from_the_scripts_defaults(script: ModuleType) -> None:
    assert read_json("training.json")["recipe"] == dataclasses.asdict(script.Recipe())
    config = read_json("config.json")
    shape = dataclasses.asdict(script.Shape())
    assert {key: config[key] for key in shape} == shape


def test_script_trains(script: ModuleType) -> None:
    """A few steps on a repeated pattern lower the loss, twice to the same weights."""
    import torch

    shape = script.Shape(64, 64, 1, 2, 1, 32, 16, 32)
    recipe = script.Recipe(steps=40, batch_size=4, warmup_steps=2, evaluate_every=20)
    tokens = torch.arange(400) % 16
    runs = [script.train(shape, recipe, tokens, tokens[:100], "cpu") for _ in range(2)]
    (first, log), (second, _) = runs
    assert log[-1]["validation_loss"] < 0.5 * math.log(16)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_script_cleans_text(script: ModuleType) -> None:
    assert (
        script.tidy("\u201cAy,\u201d\r\nsaid  he\u2014\r\n\r\n\r\nno.\n")
        == '"Ay," said he--\n\nno.'
    )


# --------------------------------------------------------------------------------- what it writes


@dataclasses.dataclass(frozen=True)
class Writing:
    bits_per_byte: float
    common_words: float
    text: str


def write(model: Any, tokenizer: Tokenizer, held_out: str) -> Writing:
    """Loss on the held-out sample, and the share of common words in greedy continuations.

    Every different word counts once, so that a loop over one good word does not pass; the last
    word of a continuation may be cut off and does not count.
    """
    import torch

    ids = torch.tensor([tokenizer.encode(held_out).ids])
    texts = []
    with torch.no_grad():
        nats = model(ids, labels=ids).loss.item() * (ids.shape[1] - 1)
        for prompt in PROMPTS:
            start = torch.tensor([tokenizer.encode(prompt).ids])
            output = model.generate(
                start,
                attention_mask=torch.ones_like(start),
                max_new_tokens=60,
                do_sample=False,
                temperature=None,
                top_p=None,
                pad_token_id=read_json("config.json")["eos_token_id"],
            )
            texts.append(tokenizer.decode(output[0, start.shape[1] :].tolist()))
    common = set((FOLDER / "words.txt").read_text("utf-8").split())
    words = {word for text in texts for word in re.findall(r"[a-z]+", text.lower())[:-1]}
    return Writing(
        bits_per_byte=nats / math.log(2) / len(held_out.encode()),
        common_words=len(words & common) / len(words) if len(words) >= 20 else 0.0,
        text="\n".join(texts),
    )


@pytest.fixture(scope="module")
def reference(one_thread: None) -> Any:
    """The model in transformers, float32."""
    transformers = pytest.importorskip("transformers")
    import torch

    return transformers.AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()


def test_writes_english(reference: Any, tokenizer: Tokenizer, held_out: str) -> None:
    result = write(reference, tokenizer, held_out)
    assert result.bits_per_byte < MAX_BITS_PER_BYTE
    assert result.common_words > MIN_COMMON_WORDS, result.text


@pytest.mark.parametrize("fault", ["untrained", "vocabulary mixed up", "key heads swapped"])
def test_bounds_catch_noise(
    reference: Any, tokenizer: Tokenizer, held_out: str, fault: str
) -> None:
    import torch
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(reference.config).eval()
    if fault != "untrained":
        model.load_state_dict(reference.state_dict())
    with torch.no_grad():
        if fault == "vocabulary mixed up":
            embedding = model.model.embed_tokens.weight
            embedding.copy_(embedding[torch.randperm(len(embedding))].clone())
        if fault == "key heads swapped":
            for layer in model.model.layers:
                key = layer.self_attn.k_proj.weight
                key.copy_(key.roll(read_json("config.json")["head_dim"], dims=0))
    result = write(model, tokenizer, held_out)
    assert result.bits_per_byte > MAX_BITS_PER_BYTE
    assert result.common_words < MIN_COMMON_WORDS, result.text
