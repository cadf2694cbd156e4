"""Importance of input channels: against transformers' own activations, and its bounds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from built_model import CHECKPOINT
from tiny_models import TINY, VOCAB, save_checkpoint

from mlc_compile.errors import InputError
from mlc_compile.models import load_model
from mlc_compile.quantization.policy import is_quantized
from mlc_compile.quantization.scheme import get_scheme
from mlc_compile.runtime import calibrate
from mlc_compile.runtime.calibrate import Importance, importance, moments
from mlc_compile.runtime.text_windows import Text, cut, read_text
from mlc_compile.weights.checkpoint import Checkpoint, open_checkpoint

HELD_OUT = CHECKPOINT / "held_out.txt"


def tiny() -> tuple[Checkpoint, Any]:
    checkpoint = open_checkpoint(CHECKPOINT)
    return checkpoint, load_model(checkpoint.config, where="tiny")


@pytest.fixture(scope="module")
def found() -> Importance:
    return importance(*tiny(), read_text(HELD_OUT), window=128)


def test_equals_hooks_on_transformers(found: Importance) -> None:
    """Every linear's inputs in the Hugging Face class, over the same windows."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer

    model = transformers.AutoModelForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32)
    sums: dict[str, Any] = {}

    def listen(name: str) -> Any:
        def hook(module: Any, inputs: Any) -> None:
            x = inputs[0].detach().double().reshape(-1, inputs[0].shape[-1])
            total, rows = sums.get(name, (0, 0))
            sums[name] = (total + (x**2).sum(0), rows + len(x))

        return hook

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(listen(name))
    ids = Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json")).encode(HELD_OUT.read_text()).ids
    [bos, *text] = [i for i in ids if i != 1]
    windows = cut((bos,), text, 128, where="held out").tokens
    with torch.no_grad():
        model(torch.from_numpy(windows.astype(np.int64)))
    ours = {
        "self_attn.qkv_proj": "self_attn.q_proj",
        "mlp.gate_up_proj": "mlp.gate_proj",
        "model.embed_tokens": "lm_head",
    }
    compared = 0
    for name, value in found.items():
        theirs = name.removesuffix(".weight")
        for mine, other in ours.items():
            theirs = theirs.replace(mine, other)
        total, rows = sums[theirs]
        np.testing.assert_allclose(value, (total / rows).numpy(), rtol=2e-3, err_msg=name)
        compared += 1
    assert compared == 17
    assert found.tokens == windows.size


def test_names_and_shapes_are_those_of_the_packed_parameters(found: Importance) -> None:
    _, model = tiny()
    scheme = get_scheme("q4f16_1")
    packed = {s.name: s.shape[-1] for s in model.parameters() if is_quantized(s, scheme)}
    assert {name: len(value) for name, value in found.items()} == packed
    assert all(value.dtype == np.float32 and (value >= 0).all() for value in found.values())


def test_same_bytes_again(found: Importance) -> None:
    again = importance(*tiny(), read_text(HELD_OUT), window=128)
    assert {n: v.tobytes() for n, v in again.items()} == {n: v.tobytes() for n, v in found.items()}
    assert again.options() == found.options()
    other = importance(*tiny(), read_text(HELD_OUT), window=128, max_tokens=256)
    assert any(other[name].tobytes() != value.tobytes() for name, value in found.items())


def test_options_name_the_text_and_no_path(found: Importance) -> None:
    options = found.options()
    assert options["text"] == "held_out.txt" and len(options["sha256"]) == 64
    assert options["tokens"] == found.tokens > 500 and options["window"] == 128


def test_layers_are_read_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory: never the weights of two layers at once."""
    held = []
    real = calibrate._Weights.__getitem__

    def watched(self: Any, name: str) -> Any:
        value = real(self, name)
        held.append({n.split(".")[2] for n in self._kept if ".layers." in n})
        return value

    monkeypatch.setattr(calibrate._Weights, "__getitem__", watched)
    importance(*tiny(), read_text(HELD_OUT), window=128, max_tokens=256)
    assert max(map(len, held)) == 1
    assert {layer for layers in held for layer in layers} == {"0", "1", "2", "3"}


def test_experts_are_pooled(tmp_path: Path) -> None:
    """With as many experts a token as there are, the pool is every token once an expert: the mean
    of the router's rows. With fewer it is another."""
    found = {}
    for per_token in (3, 1):
        path = save_checkpoint(
            tmp_path / str(per_token),
            "mixtral",
            num_local_experts=3,
            num_experts_per_tok=per_token,
        )
        checkpoint = open_checkpoint(path)
        model = load_model(checkpoint.config, where="mixtral")
        tokens = np.random.default_rng(0).integers(0, VOCAB, 32).tolist()
        routed = dict[str, Any]()
        real = calibrate._Listener._read

        def listen(self: Any, name: str, x: Any, routed: Any = routed, real: Any = real) -> None:
            if name.endswith("layers.0.mlp.gate"):
                routed[name] = routed.get(name, 0) + np.square(x, dtype=np.float64).sum(0) / 32
            real(self, name, x)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(calibrate._Listener, "_read", listen)
            found[per_token] = moments(checkpoint, model, cut((), tokens, 16, where="t"))
        [rows] = routed.values()
        name = "model.layers.0.mlp.experts.gate_up_proj.weight"
        # Each expert's tokens, pooled: one entry for a token and expert.
        np.testing.assert_allclose(found[per_token][name], rows, rtol=1e-5)
        down = found[per_token]["model.layers.0.mlp.experts.down_proj.weight"]
        assert down.shape == (TINY["intermediate_size"],) and down.all()
        # The router reads the same rows, but is never packed and has no entry.
        assert "model.layers.0.mlp.gate.weight" not in found[per_token]
        # Untied: the head has an entry, and the embedding none.
        assert "lm_head.weight" in found[per_token]
        assert "model.embed_tokens.weight" not in found[per_token]


def test_a_short_text_is_refused() -> None:
    text = Text("t.txt", "Call me Ishmael.", "")
    with pytest.raises(InputError, match=r"t.txt has \d+ tokens, less than one window of 512"):
        importance(*tiny(), text)
