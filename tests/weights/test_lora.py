"""LoRA adapters in PEFT's format: what merging gives, and what is refused.

The formulas are written out here in float64. That they are PEFT's was checked against
`merge_and_unload` of peft 0.21.2: the largest difference was 1.7e-7 of a tensor's largest weight.
"""

from __future__ import annotations

import json
import math
import os
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mlc_compile.errors import InputError
from mlc_compile.models import load_model
from mlc_compile.quantization.scheme import get_scheme
from mlc_compile.weights.checkpoint import Checkpoint, open_checkpoint
from mlc_compile.weights.convert import convert_weight
from mlc_compile.weights.reader import Unpacked

sys.path.insert(0, str(Path(__file__).parent))
from hf_files import f32, make_dir, st_bytes

TINY = Path(__file__).parents[2] / "examples" / "tiny_model"
Q, HEAD, EMBED = "model.layers.0.self_attn.q_proj", "lm_head", "model.embed_tokens"
SHAPES = {Q: (12, 8), "model.layers.0.mlp.down_proj": (8, 20), HEAD: (30, 8), EMBED: (30, 8)}
NORM = "model.norm"
PREFIX = "base_model.model."

CONFIG: dict[str, Any] = {  # as peft 0.21.2 writes it
    "alora_invocation_tokens": None,
    "alpha_pattern": {},
    "arrow_config": None,
    "auto_mapping": None,
    "base_model_name_or_path": "base",
    "bias": "none",
    "corda_config": None,
    "ensure_weight_tying": False,
    "eva_config": None,
    "exclude_modules": None,
    "fan_in_fan_out": False,
    "inference_mode": True,
    "init_lora_weights": True,
    "kasa_config": None,
    "layer_replication": None,
    "layers_pattern": None,
    "layers_to_transform": None,
    "loftq_config": {},
    "lora_alpha": 16,
    "lora_bias": False,
    "lora_dropout": 0.0,
    "lora_ga_config": None,
    "megatron_config": None,
    "megatron_core": "megatron.core",
    "modules_to_save": None,
    "monteclora_config": None,
    "peft_type": "LORA",
    "peft_version": "0.21.2",
    "qalora_group_size": 16,
    "r": 3,
    "rank_pattern": {},
    "revision": None,
    "target_modules": ["q_proj", "down_proj"],
    "target_parameters": None,
    "task_type": "CAUSAL_LM",
    "trainable_token_indices": None,
    "use_bdlora": None,
    "use_dora": False,
    "use_qalora": False,
    "use_rslora": False,
    "velora_config": None,
}


def base(directory: Path, dtype: str = "F32", leave_out: tuple[str, ...] = ()) -> Path:
    kind = {"F32": np.float32, "BF16": ml_dtypes.bfloat16}[dtype]
    weights = {
        f"{name}.weight": (dtype, f32(*shape, seed=place).astype(kind))
        for place, (name, shape) in enumerate(SHAPES.items())
        if name not in leave_out
    }
    weights[f"{NORM}.weight"] = (dtype, f32(8).astype(kind))
    return make_dir(directory, {"model.safetensors": st_bytes(weights)})


def pair(module: str, rank: int = 3, seed: int = 50) -> dict[str, np.ndarray]:
    n, k = SHAPES[module]
    return {
        f"{PREFIX}{module}.lora_A.weight": f32(rank, k, seed=seed),
        f"{PREFIX}{module}.lora_B.weight": f32(n, rank, seed=seed + 1),
    }


def adapter(directory: Path, tensors: dict[str, np.ndarray], **config: Any) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "adapter_config.json").write_text(json.dumps(CONFIG | config))
    save_file(
        {name: np.ascontiguousarray(t) for name, t in tensors.items()},
        directory / "adapter_model.safetensors",
    )
    return directory


def product(tensors: dict[str, np.ndarray], module: str) -> np.ndarray:
    """B @ A in float64."""
    a, b = (tensors[f"{PREFIX}{module}.lora_{part}.weight"] for part in "AB")
    return b.astype(np.float64) @ a.astype(np.float64)


def opened(tmp_path: Path, *adapters: Path, **options: Any) -> tuple[Checkpoint, Checkpoint]:
    """The base, and the base with the adapters."""
    path = base(tmp_path / "base", **options)
    return open_checkpoint(path), open_checkpoint(path, lora=adapters)


def check(got: np.ndarray, expected: np.ndarray) -> None:
    assert got.dtype == np.float32
    assert got.shape == expected.shape
    assert np.abs(got - expected).max() <= 1e-6 * np.abs(expected).max()


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        ({}, 16 / 3),
        ({"lora_alpha": 1.5}, 0.5),
        ({"use_rslora": True}, 16 / math.sqrt(3)),
        ({"alpha_pattern": {"q_proj": 6}}, 2),
        ({"alpha_pattern": {"k_proj": 6, "layers.0.self_attn.q_proj": 9}}, 3),
        ({"alpha_pattern": {"^model.layers.0.*q_proj": 9}}, 3),
        ({"r": 8, "rank_pattern": {"q_proj": 3}}, 16 / 3),
        ({"r": 8, "rank_pattern": {"q_proj|k_proj": 3}, "use_rslora": True}, 16 / math.sqrt(3)),
    ],
)
@pytest.mark.parametrize("dtype", ["F32", "BF16"])
def test_a_linear_layer(tmp_path: Path, config: Any, scale: float, dtype: str) -> None:
    added = pair(Q)
    plain, merged = opened(tmp_path, adapter(tmp_path / "a", added, **config), dtype=dtype)
    name = f"{Q}.weight"
    check(merged.read(name), plain.read(name).astype(np.float64) + scale * product(added, Q))
    assert merged.tensors[name].dtype == "float32"
    assert merged.tensors[name].shape == (12, 8)
    for other in plain.tensors.keys() - {name}:
        assert merged.tensors[other] == plain.tensors[other]
        assert merged.read(other).tobytes() == plain.read(other).tobytes()
    merged.release()


def test_rows_are_the_same_bytes_however_they_are_asked_for(tmp_path: Path) -> None:
    rows, columns, rank = 300, 700, 16  # several tiles
    data = {f"{Q}.weight": ("F32", f32(rows, columns))}
    make_dir(tmp_path / "base", {"model.safetensors": st_bytes(data)})
    added = {
        f"{PREFIX}{Q}.lora_A.weight": f32(rank, columns, seed=2),
        f"{PREFIX}{Q}.lora_B.weight": f32(rows, rank, seed=3),
        f"{PREFIX}{Q}.lora_magnitude_vector": f32(rows, seed=4) + 3,
    }
    where = adapter(tmp_path / "a", added, r=rank, use_dora=True)
    merged = open_checkpoint(tmp_path / "base", lora=[where])
    whole = merged.read(f"{Q}.weight")
    for step in (1, 7, 93, 94, 299):
        parts = [
            merged.read(f"{Q}.weight", slice(start, start + step)) for start in range(0, rows, step)
        ]
        assert np.concatenate(parts).tobytes() == whole.tobytes()
    # In the order that is promised: rank after rank, in float32.
    total = np.zeros(columns, np.float32)
    for j in range(rank):
        b = added[f"{PREFIX}{Q}.lora_B.weight"][5, j]
        total = total + b * added[f"{PREFIX}{Q}.lora_A.weight"][j]
    summed = data[f"{Q}.weight"][1][5] + total * np.float32(1.0)
    length = np.float32(np.sqrt(np.sum(np.square(summed, dtype=np.float64))))
    learned = added[f"{PREFIX}{Q}.lora_magnitude_vector"][5]
    assert (summed * (learned / length)).tobytes() == whole[5].tobytes()


def test_dora(tmp_path: Path) -> None:
    added = pair(Q)
    magnitude = np.abs(f32(12, seed=9)) + 1
    for name, stored in (("x", magnitude), ("y", magnitude[:, None])):
        tensors = {**added, f"{PREFIX}{Q}.lora_magnitude_vector": stored}
        where = adapter(tmp_path / name, tensors, use_dora=True)
        plain, merged = opened(tmp_path, where)
        summed = plain.read(f"{Q}.weight") + 16 / 3 * product(added, Q)
        length = np.linalg.norm(summed, axis=1, keepdims=True)
        check(merged.read(f"{Q}.weight"), magnitude[:, None] * summed / length)


def embedding(seed: int = 60) -> dict[str, np.ndarray]:
    n, k = SHAPES[EMBED]
    return {
        f"{PREFIX}{EMBED}.lora_embedding_A": f32(3, n, seed=seed),
        f"{PREFIX}{EMBED}.lora_embedding_B": f32(k, 3, seed=seed + 1),
    }


def test_an_embedding_with_the_base_that_is_saved_with_it(tmp_path: Path) -> None:
    added = embedding()
    a, b = (added[f"{PREFIX}{EMBED}.lora_embedding_{part}"] for part in "AB")
    own = f32(30, 8, seed=77)
    plain, merged = opened(tmp_path, adapter(tmp_path / "a", added))
    name, delta = f"{EMBED}.weight", 16 / 3 * (b.astype(np.float64) @ a).T
    check(merged.read(name), plain.read(name) + delta)
    check(merged.read(name, slice(4, 9)), (plain.read(name) + delta)[4:9])
    added[f"{PREFIX}{EMBED}.base_layer.weight"] = own
    _, merged = opened(tmp_path, adapter(tmp_path / "a", added))
    check(merged.read(name), own + delta)


def test_conv1d(tmp_path: Path) -> None:
    """GPT-2's weights are [in, out]; its checkpoints may leave `transformer.` out."""
    weight = f32(8, 24)
    make_dir(tmp_path / "b", {"model.safetensors": st_bytes({"h.0.c.weight": ("F32", weight)})})
    added = {
        f"{PREFIX}transformer.h.0.c.lora_A.weight": f32(3, 8, seed=1),
        f"{PREFIX}transformer.h.0.c.lora_B.weight": f32(24, 3, seed=2),
    }
    where = adapter(tmp_path / "a", added, fan_in_fan_out=True)
    merged = open_checkpoint(tmp_path / "b", lora=[where])
    check(merged.read("h.0.c.weight"), weight + 16 / 3 * product(added, "transformer.h.0.c").T)
    with pytest.raises(InputError, match="has the shape"):
        open_checkpoint(tmp_path / "b", lora=[adapter(tmp_path / "a", added)])


@pytest.mark.parametrize("infix", ["", "modules_to_save."])
def test_modules_to_save_replace(tmp_path: Path, infix: str) -> None:
    own = f32(30, 8, seed=70)
    tensors = {**pair(Q), f"{PREFIX}{HEAD}.{infix}weight": own}
    where = adapter(tmp_path / "a", tensors, modules_to_save=["lm_head"])
    _, merged = opened(tmp_path, where, dtype="BF16")
    assert merged.read(f"{HEAD}.weight", slice(2, 5)).tobytes() == own[2:5].tobytes()
    assert merged.tensors[f"{HEAD}.weight"].dtype == "float32"


def test_several_adapters_are_added_one_after_another(tmp_path: Path) -> None:
    one, two = pair(Q, seed=80), pair(Q, seed=90)
    first, second = adapter(tmp_path / "1", one), adapter(tmp_path / "2", two, lora_alpha=3)
    plain, merged = opened(tmp_path, first, second)
    expected = plain.read(f"{Q}.weight") + 16 / 3 * product(one, Q) + product(two, Q)
    check(merged.read(f"{Q}.weight"), expected)
    names = [source.name for source in merged.sources]
    assert names.count("adapter_config.json") == names.count("adapter_model.safetensors") == 2


def test_an_adapter_saved_by_torch(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    added = pair(Q)
    where = adapter(tmp_path / "a", added)
    _, from_safetensors = opened(tmp_path, where)
    expected = from_safetensors.read(f"{Q}.weight").copy()
    (where / "adapter_model.safetensors").unlink()
    state = {name: torch.from_numpy(tensor) for name, tensor in added.items()}
    torch.save(state, where / "adapter_model.bin")
    assert opened(tmp_path, where)[1].read(f"{Q}.weight").tobytes() == expected.tobytes()


WRONG: dict[str, tuple[dict[str, np.ndarray], dict[str, Any], str]] = {
    "bias": (pair(Q), {"bias": "all"}, 'bias is "all"'),
    "other method": (pair(Q), {"peft_type": "LOHA"}, "peft_type is"),
    "pissa": (pair(Q), {"init_lora_weights": "pissa_niter_4"}, "init_lora_weights is"),
    "loftq": (pair(Q), {"loftq_config": {"loftq_bits": 4}}, "loftq_config is"),
    "lora_bias": (pair(Q), {"lora_bias": True}, "lora_bias is true"),
    "replication": (pair(Q), {"layer_replication": [[0, 1]]}, "layer_replication is"),
    "parameters": (pair(Q), {"target_parameters": ["x"]}, "target_parameters is"),
    "tokens": (pair(Q), {"trainable_token_indices": [1]}, "trainable_token_indices is"),
    "unknown key": (pair(Q), {"use_more_lora": True}, "unknown key use_more_lora"),
    "no rank": (pair(Q), {"r": None}, " r "),
    "rank of text": (pair(Q), {"r": "3"}, " r "),
    "rank 0": (pair(Q), {"r": 0}, " r "),
    "bad pattern": (pair(Q), {"rank_pattern": {"(": 3}}, "rank_pattern has the pattern"),
    "slow pattern": (pair(Q), {"rank_pattern": {"(a*)*b": 3}}, "rank_pattern has the pattern"),
    "slower": (pair(Q), {"alpha_pattern": {"(a|a)*+b": 3}}, "alpha_pattern has the pattern"),
    "pattern to text": (pair(Q), {"rank_pattern": {"q_proj": "3"}}, "rank_pattern gives"),
    "half a rank": (pair(Q), {"rank_pattern": {"q_proj": 2.5}}, "the rank 2.5"),
    "other rank": (pair(Q), {"r": 4}, r"shape \[3, 8\], expected is \[4, 8\]"),
    "dora unsaid": (
        {**pair(Q), f"{PREFIX}{Q}.lora_magnitude_vector": f32(12)},
        {},
        "use_dora is False",
    ),
    "dora unmade": (pair(Q), {"use_dora": True}, "use_dora is True"),
    "dora of another": (
        {**pair(Q), f"{PREFIX}{Q}.lora_magnitude_vector": f32(11)},
        {"use_dora": True},
        r"shape \[11\]",
    ),
    "A alone": (
        {f"{PREFIX}{Q}.lora_A.weight": f32(3, 8)},
        {},
        "not both of its parts",
    ),
    "other shape": (
        {**pair(Q), f"{PREFIX}{Q}.lora_B.weight": f32(13, 3)},
        {},
        r"shape \[13, 3\], expected is \[12, 3\]",
    ),
    "other model": (
        {n.replace("layers.0", "layers.7"): t for n, t in pair(Q).items()},
        {},
        "no tensor model.layers.7",
    ),
    "of a vector": (
        {f"{PREFIX}{NORM}.lora_A.weight": f32(3, 8), f"{PREFIX}{NORM}.lora_B.weight": f32(8, 3)},
        {},
        r"shape \[8\], expected is a matrix",
    ),
    "a bias of B": ({**pair(Q), f"{PREFIX}{Q}.lora_B.bias": f32(12)}, {}, "is not understood"),
    "odd name": ({**pair(Q), f"{PREFIX}{Q}.lora_C.weight": f32(12)}, {}, "is not understood"),
    "replaced by another shape": (
        {**pair(Q), f"{PREFIX}{HEAD}.weight": f32(31, 8)},
        {"modules_to_save": [HEAD]},
        r"shape \[31, 8\]",
    ),
    "nothing to save": (pair(Q), {"modules_to_save": [HEAD]}, "modules_to_save has 'lm_head'"),
    "two spellings": (
        {**pair(Q), f"{Q}.lora_A.weight": f32(3, 8)},
        {},
        "twice, under two spellings",
    ),
    "dora of an embedding": (
        {**embedding(), f"{PREFIX}{EMBED}.lora_magnitude_vector": f32(30)},
        {"use_dora": True},
        "not both of its parts",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_refused(tmp_path: Path, case: str) -> None:
    tensors, config, message = WRONG[case]
    with pytest.raises(InputError, match=message) as caught:
        opened(tmp_path, adapter(tmp_path / "a", tensors, **config))
    assert "\n" not in str(caught.value)


def test_tied_heads(tmp_path: Path) -> None:
    """An added embedding is also the head's; a replaced one would untie them."""
    opened(tmp_path, adapter(tmp_path / "a", embedding()), leave_out=(HEAD,))
    own = {**pair(Q), f"{PREFIX}{EMBED}.weight": f32(30, 8)}
    saved = {"modules_to_save": ["embed_tokens"]}
    opened(tmp_path, adapter(tmp_path / "a", own, **saved))
    with pytest.raises(InputError, match="which is tied to it, is not"):
        opened(tmp_path, adapter(tmp_path / "a", own, **saved), leave_out=(HEAD,))
    kept = adapter(tmp_path / "a", own, **saved, ensure_weight_tying=True)
    opened(tmp_path, kept, leave_out=(HEAD,))
    with pytest.raises(InputError, match="head is tied to its embedding"):
        opened(tmp_path, adapter(tmp_path / "a", pair(HEAD)), leave_out=(HEAD,))


def test_integers_cannot_be_added_to(tmp_path: Path) -> None:
    data = st_bytes({f"{Q}.weight": ("I8", np.zeros((12, 8), np.int8))})
    make_dir(tmp_path / "b", {"model.safetensors": data})
    with pytest.raises(InputError, match="holds int8"):
        open_checkpoint(tmp_path / "b", lora=[adapter(tmp_path / "a", pair(Q))])


def test_directories_that_are_no_adapters(tmp_path: Path) -> None:
    path = base(tmp_path / "base")
    (tmp_path / "empty").mkdir()
    for where in (tmp_path / "gone", tmp_path / "empty"):
        with pytest.raises(InputError, match=r"has no adapter_config\.json"):
            open_checkpoint(path, lora=[where])
    where = adapter(tmp_path / "a", pair(Q))
    (where / "adapter_model.safetensors").unlink()
    with pytest.raises(InputError, match=r"has no adapter_model\.safetensors"):
        open_checkpoint(path, lora=[where])
    os.mkfifo(where / "adapter_model.safetensors")
    with pytest.raises(InputError, match=r"has no adapter_model\.safetensors"):
        open_checkpoint(path, lora=[where])


def test_conversion_gives_the_bytes_of_the_merged_checkpoint(tmp_path: Path) -> None:
    weights = load_file(TINY / "model.safetensors")
    names = [n for n in weights if n.endswith(("q_proj.weight", "down_proj.weight"))]
    added = {}
    for place, name in enumerate(names):
        module, (n, k) = name.removesuffix(".weight"), weights[name].shape
        added[f"{PREFIX}{module}.lora_A.weight"] = f32(3, k, seed=place) * 0.1
        added[f"{PREFIX}{module}.lora_B.weight"] = f32(n, 3, seed=place + 100) * 0.1
    where = adapter(tmp_path / "adapter", added)
    merged = open_checkpoint(TINY, lora=[where])
    saved = tmp_path / "merged"
    saved.mkdir()
    for file in ("config.json", "tokenizer.json"):
        (saved / file).write_bytes((TINY / file).read_bytes())
    save_file({n: np.array(merged.read(n)) for n in merged.tensors}, saved / "model.safetensors")
    found = []
    for place, checkpoint in enumerate((merged, open_checkpoint(saved), open_checkpoint(TINY))):
        out = tmp_path / str(place)
        model = load_model(checkpoint.config, where="config.json")
        convert_weight(checkpoint, model, get_scheme("q4f16_1"), out, jobs=2)
        manifest = json.loads((out / "manifest.json").read_text())
        found.append({tensor["name"]: tensor["sha256"] for tensor in manifest["tensors"]})
    assert found[0] == found[1]
    assert found[0] != found[2]
    sources = json.loads((tmp_path / "0" / "manifest.json").read_text())["source"]["files"]
    assert "adapter_model.safetensors" in {file["name"] for file in sources}


def test_packed_weights_that_are_merged_are_no_longer_packed(tmp_path: Path) -> None:
    from mlc_compile.weights.lora import merge
    from mlc_compile.weights.reader import Packed, PackedInfo

    plain = open_checkpoint(base(tmp_path / "base"))
    info = PackedInfo("affine", 4, 8, "float16", None)

    class Half(Unpacked):
        """Some tensors of the base, said to be packed."""

        tensors, files, read, release = (
            plain.tensors,
            plain.source_files,
            plain.read,
            plain.release,
        )
        packed = {f"{Q}.weight": info, f"{HEAD}.weight": info}  # noqa: RUF012
        notes = ("a note",)

        def read_packed(self, name: str, rows: Any = None) -> Packed:
            return Packed(np.zeros((1, 8), np.uint8), np.ones((1, 1), np.float32), None)

    reader = merge(Half(), [adapter(tmp_path / "a", pair(Q))])
    assert set(reader.packed) == {f"{HEAD}.weight"}
    assert reader.notes == ("a note",)
    assert reader.read_packed(f"{HEAD}.weight").codes.shape == (1, 8)
    with pytest.raises(ValueError, match="is not packed"):
        reader.read_packed(f"{Q}.weight")
