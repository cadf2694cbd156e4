"""Checkpoints behind URLs: ranges, retries, files that change, and what messages may say."""

from __future__ import annotations

import builtins
import concurrent.futures
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from mlc_compile.errors import EnvironmentLacksError, InputError
from mlc_compile.models import load_model
from mlc_compile.quantization.scheme import get_scheme
from mlc_compile.weights import remote
from mlc_compile.weights.checkpoint import Checkpoint, open_checkpoint
from mlc_compile.weights.convert import convert_weight
from mlc_compile.weights.files import locate
from mlc_compile.weights.remote import RangedFile

sys.path.insert(0, str(Path(__file__).parent))
from hf_files import CONFIG, f32, make_dir, st_bytes
from http_files import Site, serving

fsspec = pytest.importorskip("fsspec")
pytest.importorskip("aiohttp")

TINY = Path(__file__).parents[2] / "examples" / "tiny_model"
BIG = {"a": ("F32", f32(300, 64, seed=1)), "b": ("F16", f32(50, 7, seed=2).astype(np.float16))}
ST = {"model.safetensors": st_bytes(BIG)}


@pytest.fixture(autouse=True)
def small_and_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "CHUNK", 4096)
    monkeypatch.setattr(remote, "CACHE_BYTES", 6 * 4096)
    monkeypatch.setattr(remote, "_FIRST_WAIT", 0.001)


@pytest.fixture
def site() -> Iterator[Site]:
    files = {"/m/config.json": json.dumps(CONFIG).encode(), "/m/model.safetensors": st_bytes(BIG)}
    with serving(Site(files)) as made:
        yield made


@pytest.fixture
def memory() -> Iterator[Any]:
    system = fsspec.filesystem("memory")
    system.store.clear()
    yield system
    system.store.clear()


def put(system: Any, directory: Path, where: str) -> str:
    for file in directory.iterdir():
        if file.is_file():
            system.pipe_file(f"{where}/{file.name}", file.read_bytes())
    return f"memory:/{where}"


def same(ours: Checkpoint, local: Checkpoint) -> None:
    """Everything that a checkpoint tells, all rows and some."""
    assert ours.config == local.config
    assert ours.generation_config == local.generation_config
    assert ours.tensors == local.tensors
    assert ours.tokenizer_files() == local.tokenizer_files()
    for name, info in local.tensors.items():
        expected = local.read(name)
        assert ours.read(name).tobytes() == expected.tobytes()
        if info.shape and info.shape[0] > 3:
            assert ours.read(name, slice(1, 3)).tobytes() == expected[1:3].tobytes()
        assert not ours.read(name).flags.writeable
    ours.release()
    assert ours.source_files == ()
    assert [s.name for s in ours.sources] == [s.name for s in local.sources]
    for there, here in zip(ours.sources, local.sources, strict=True):
        assert there.path is None
        assert there.size == here.size
        assert here.path is not None
        assert content(there) == here.path.read_bytes()
        there.check()


def content(source: Any) -> bytes:
    buffer, data = memoryview(bytearray(source.size // 3 + 1)), b""
    while count := source.readinto(len(data), buffer):
        data += buffer[:count]
    return data


def test_a_whole_checkpoint_in_memory(memory: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "CHUNK", 100_000)
    monkeypatch.setattr(remote, "CACHE_BYTES", 500_000)
    same(open_checkpoint(put(memory, TINY, "/tiny")), open_checkpoint(TINY))


@pytest.mark.parametrize("tail", ["", "/", "/model.safetensors"])
def test_over_http(site: Site, tmp_path: Path, tail: str) -> None:
    ours = open_checkpoint(f"{site.url}/m{tail}")
    same(ours, open_checkpoint(make_dir(tmp_path, ST)))
    assert str(ours.path) == f"{site.url}/m{tail}".rstrip("/")


def test_shards_and_torch_files(memory: Any, tmp_path: Path) -> None:
    index = {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
    make_dir(
        tmp_path / "shards",
        {
            "model.safetensors.index.json": json.dumps(index).encode(),
            "one.safetensors": st_bytes({"a": BIG["a"]}),
            "two.safetensors": st_bytes({"b": BIG["b"]}),
        },
    )
    url = put(memory, tmp_path / "shards", "/shards")
    same(open_checkpoint(url), open_checkpoint(tmp_path / "shards"))
    torch = pytest.importorskip("torch")
    make_dir(tmp_path / "torch", {})
    state = {"a": torch.randn(300, 64), "t": torch.randn(64, 90).bfloat16().t()}
    torch.save(state, tmp_path / "torch" / "pytorch_model.bin")
    same(
        open_checkpoint(put(memory, tmp_path / "torch", "/torch")),
        open_checkpoint(tmp_path / "torch"),
    )


def test_gguf(memory: Any, tmp_path: Path) -> None:
    from gguf_files import SIZES, write

    class Model:
        """As much of transformers' as `write` looks at; the import alone takes seconds."""

        config = SimpleNamespace(**SIZES, tie_word_embeddings=True)

        def state_dict(self) -> dict[str, Any]:
            hidden, block = SIZES["hidden_size"], "model.layers.0"
            kv = hidden * SIZES["num_key_value_heads"] // SIZES["num_attention_heads"]
            shapes = {
                "model.embed_tokens": (SIZES["vocab_size"], hidden),
                "model.norm": (hidden,),
                f"{block}.self_attn.q_proj": (hidden, hidden),
                f"{block}.self_attn.k_proj": (kv, hidden),
            }
            return {f"{name}.weight": Tensor(shape) for name, shape in shapes.items()}

    class Tensor:
        def __init__(self, shape: tuple[int, ...]) -> None:
            self.array = f32(*shape)

        def float(self) -> Any:
            return self

        def numpy(self) -> np.ndarray:
            return self.array

    write(tmp_path / "x.gguf", Model(), "llama", quant="Q4_0")
    memory.pipe_file("/g/x.gguf", (tmp_path / "x.gguf").read_bytes())
    local = open_checkpoint(tmp_path / "x.gguf")
    for url in ("memory://g/x.gguf", "memory://g"):
        ours = open_checkpoint(url)
        assert (ours.config, ours.tensors) == (local.config, local.tensors)
        for name in local.tensors:
            assert ours.read(name).tobytes() == local.read(name).tobytes()
            assert ours.read(name, slice(1, 3)).tobytes() == local.read(name)[1:3].tobytes()


def test_file_urls_are_paths(tmp_path: Path) -> None:
    place = make_dir(tmp_path / "a b", ST)
    checkpoint = open_checkpoint(place.as_uri())
    assert checkpoint.path == place
    assert len(checkpoint.source_files) == 2


def test_only_what_is_asked_for_is_read(site: Site) -> None:
    checkpoint = open_checkpoint(f"{site.url}/m")
    before = site.sent
    assert before < 3 * 4096
    rows = checkpoint.read("a", slice(100, 110))  # 2560 bytes: one piece, or two
    assert rows.tobytes() == BIG["a"][1][100:110].tobytes()
    assert site.sent - before <= 2 * 4096
    before = len(site.requests)
    checkpoint.read("a", slice(100, 105))
    assert len(site.requests) == before  # still in the cache
    checkpoint.read("a", slice(120, 240))  # 30720 bytes: neighbours come together
    assert len(site.requests) - before <= 3


def test_threads_share_a_bounded_cache(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "CACHE_BYTES", 64 * 4096)
    checkpoint = open_checkpoint(f"{site.url}/m")
    blocks = [slice(start, start + 10) for start in range(0, 300, 10)] * 3
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for rows, found in zip(
            blocks, pool.map(lambda rows: checkpoint.read("a", rows), blocks), strict=True
        ):
            assert found.tobytes() == BIG["a"][1][rows].tobytes()
    size = len(site.files["/m/model.safetensors"])
    assert site.sent < size + 5 * 4096  # each piece once
    store = checkpoint.path._store  # type: ignore[union-attr]
    monkeypatch.setattr(remote, "CACHE_BYTES", 2 * 4096)
    store._cache.clear()
    checkpoint.read("a")
    assert sum(len(piece) for piece in store._cache.values()) <= 2 * 4096


def test_failures_that_pass_are_tried_again(site: Site) -> None:
    checkpoint = open_checkpoint(f"{site.url}/m")
    site.cut, expected = 2, BIG["a"][1]
    assert checkpoint.read("a").tobytes() == expected.tobytes()
    checkpoint = open_checkpoint(f"{site.url}/m")
    site.fail = 2
    assert checkpoint.read("b").tobytes() == BIG["b"][1].tobytes()
    assert (site.cut, site.fail) == (0, 0)


@pytest.mark.parametrize(
    ("fault", "message"),
    [({"cut": 99}, "cannot read .*model.safetensors: "), ({"fail": 99}, "HTTP status 503")],
)
def test_failures_that_stay(site: Site, fault: dict[str, int], message: str) -> None:
    checkpoint = open_checkpoint(f"{site.url}/m")
    for key, value in fault.items():
        setattr(site, key, value)
    with pytest.raises(InputError, match=message):
        checkpoint.read("a")
    site.cut = site.fail = 0
    assert checkpoint.read("a").tobytes() == BIG["a"][1].tobytes()  # no piece stays claimed


def test_a_server_without_ranges_is_refused_before_it_sends_much(site: Site) -> None:
    site.ranges = False
    with pytest.raises(InputError, match=r"does not serve ranges.*download the checkpoint"):
        open_checkpoint(f"{site.url}/m")


@pytest.mark.parametrize("tags", [True, False])
def test_a_file_that_changes_is_refused(site: Site, tags: bool) -> None:
    site.tags = tags
    checkpoint = open_checkpoint(f"{site.url}/m")
    weights = checkpoint.sources[1]
    weights.check()
    data = site.files["/m/model.safetensors"]
    site.files["/m/model.safetensors"] = data[:-1] + b"\1" + (b"" if tags else b"more")
    if tags:
        with pytest.raises(InputError, match="was changed while it was read"):
            checkpoint.read("a")
    with pytest.raises(InputError, match="was changed while it was read"):
        weights.check()


def test_a_server_that_refuses_conditions(site: Site) -> None:
    """As one may that answers with a redirection: then `check` alone tells of changes."""
    site.conditional = False
    checkpoint = open_checkpoint(f"{site.url}/m")
    assert checkpoint.read("a").tobytes() == BIG["a"][1].tobytes()
    checkpoint.sources[1].check()
    site.files["/m/model.safetensors"] += b"x"
    with pytest.raises(InputError, match="was changed while it was read"):
        checkpoint.sources[1].check()


def test_a_file_in_memory_that_changes(memory: Any) -> None:
    checkpoint = open_checkpoint(put(memory, TINY, "/tiny"))
    memory.pipe_file("/tiny/model.safetensors", b"other")
    with pytest.raises(InputError, match="was changed while it was read"):
        checkpoint.sources[-1].check()


def test_no_secret_is_told(site: Site, capfd: pytest.CaptureFixture[str]) -> None:
    site.token = "token=hunter2"
    url = site.url.replace("://", "://user:hunter2@") + "/m?token=hunter2#hunter2"
    checkpoint = open_checkpoint(url)
    assert checkpoint.read("b").tobytes() == BIG["b"][1].tobytes()
    told = [str(checkpoint.path), repr(checkpoint), *(s.identity for s in checkpoint.sources)]
    told += [s.name for s in checkpoint.sources]
    site.token = "other"
    with pytest.raises(InputError, match="HTTP status 403") as caught:
        open_checkpoint(url)
    told.append(str(caught.value))
    site.token, site.fail = "token=hunter2", 99
    with pytest.raises(InputError, match="HTTP status 503") as caught:
        checkpoint.read("a")
    told.append(str(caught.value))
    for url in ("nonsense://user:hunter2@x/y", "http://user:hunter2@127.0.0.1:1/m?hunter2"):
        with pytest.raises(InputError) as caught:
            open_checkpoint(url)
        told.append(str(caught.value))
    with pytest.raises(InputError, match="chained") as caught:
        open_checkpoint("zip://hunter2::https://user:hunter2@x/y")
    told.append(str(caught.value))
    assert "hunter2" not in " ".join([*told, *capfd.readouterr()])


def test_what_is_not_there(site: Site, memory: Any) -> None:
    with pytest.raises(InputError, match=r"no config\.json"):
        open_checkpoint(f"{site.url}/other")
    with pytest.raises(InputError, match="no file or directory"):
        open_checkpoint(f"{site.url}/m/gone.safetensors")
    with pytest.raises(InputError, match=r"no config\.json"):
        open_checkpoint("memory://nothing")
    del site.files["/m/model.safetensors"]
    with pytest.raises(InputError, match=r"no \.safetensors"):
        open_checkpoint(f"{site.url}/m")
    site.files["/m/model.safetensors"] = b""
    with pytest.raises(InputError, match="is empty"):
        open_checkpoint(f"{site.url}/m")


def test_hostile_indexes_elsewhere(site: Site) -> None:
    del site.files["/m/model.safetensors"]
    for name in ("../x.safetensors", "http://127.0.0.1/x.safetensors", "/x.safetensors"):
        index = json.dumps({"weight_map": {"a": name}}).encode()
        site.files["/m/model.safetensors.index.json"] = index
        with pytest.raises(InputError, match=r"not the name of a \.safetensors file"):
            open_checkpoint(f"{site.url}/m")


def test_configurations_are_bounded(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "MAX_SMALL_BYTES", 8)
    with pytest.raises(InputError, match="too many for a file of its kind"):
        open_checkpoint(f"{site.url}/m")


@pytest.mark.parametrize("package", ["fsspec", "s3fs"])
def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any, **more: Any) -> Any:
        if name.partition(".")[0] == package:
            raise ImportError(f"No module named {name!r}")
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    monkeypatch.delitem(sys.modules, package, raising=False)
    with pytest.raises(EnvironmentLacksError, match=r"pip install 'mlc-compile\[remote\]'"):
        open_checkpoint("s3://bucket/model")


def test_reading_outside_a_file_is_a_bug_not_a_request(site: Site) -> None:
    place = locate(f"{site.url}/m/model.safetensors")
    assert not isinstance(place, Path)
    file = RangedFile(place)
    assert len(file.bytes(file.size - 3, 100)) == 3
    with pytest.raises(ValueError, match="outside"):
        file.array(np.dtype(np.uint8), (4,), file.size - 3)


def test_conversion_gives_the_bytes_of_the_local_one(memory: Any, tmp_path: Path) -> None:
    found = []
    for place, where in enumerate((put(memory, TINY, "/tiny"), str(TINY))):
        checkpoint = open_checkpoint(where)
        model = load_model(checkpoint.config, where="config.json")
        convert_weight(checkpoint, model, get_scheme("q4f16_1"), tmp_path / str(place), jobs=2)
        manifest = json.loads((tmp_path / str(place) / "manifest.json").read_text())
        found.append((manifest["tensors"], manifest["source"]))
    assert found[0] == found[1]
