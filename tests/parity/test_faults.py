"""Faults planted in a compiled library, its parameters and its directory: verify must see them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from architecture_cases import Case
from click.testing import CliRunner
from tiny_models import SIZES, Built, convert

from mlc_compile.cli import main
from mlc_compile.errors import InputError
from mlc_compile.runtime import verify as verify_module
from mlc_compile.runtime.verify import VerifiedEngine as Engine
from mlc_compile.runtime.verify import VerifyReport, verify
from mlc_compile.weights.tensor_cache import open_tensor_cache


def run(built: Built, **options: Any) -> VerifyReport:
    return verify(
        built.directory, built.library, built.checkpoint, engine="numpy", decode_steps=24, **options
    )


def failing(report: VerifyReport) -> set[str]:
    return {s.name for s in report.scenarios if s.failures(report.thresholds)}


EVERY = {
    *("prefill", "chunked_prefill", "decode", "greedy", "ragged_batch", "batch_verify"),
    *("functions", "fork", "rollback", "full_context"),
}

# ---------------------------------------------------------------------------------------------
# A cache that is off by one


class DropsNewest(Engine):
    """The newest token's keys and values are gone when the next one comes."""

    def decode(self, sequence: int, token: int) -> Any:
        logits = super().decode(sequence, token)
        self.pop(sequence, 1)
        return logits


class ReadsOneTooFew(Engine):
    """The logits are those of a text that lacks the token before."""

    def decode(self, sequence: int, token: int) -> Any:
        logits = super().decode(sequence, token)
        self.pop(sequence, 2)
        short = super().decode(sequence, token)
        self.pop(sequence, 1)
        del logits
        super().decode(sequence, 0)
        super().decode(sequence, token)
        return short


class EntersTwice(Engine):
    """A decoded token takes two places, so all that follow stand one too far."""

    def decode(self, sequence: int, token: int) -> Any:
        super().decode(sequence, token)
        return super().decode(sequence, token)


class PopsOneMore(Engine):
    def pop(self, sequence: int, count: int) -> None:
        super().pop(sequence, count + 1)


class ForksOneShort(Engine):
    def fork_sequence(self, parent: int, child: int, position: int = -1) -> None:
        super().fork_sequence(parent, child, position)
        super().pop(child, 1)


class MixesRows(Engine):
    def batch_prefill(self, parts: Mapping[int, Sequence[int]]) -> Any:
        return super().batch_prefill(parts)[::-1]


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        (DropsNewest, {"decode", "greedy", "fork", "rollback", "full_context"}),
        (ReadsOneTooFew, {"decode", "greedy", "chunked_prefill", "batch_verify"}),
        (EntersTwice, {"decode", "greedy", "fork", "rollback", "full_context"}),
        (PopsOneMore, {"rollback"}),
        (ForksOneShort, {"fork"}),
        (MixesRows, {"ragged_batch"}),
    ],
    ids=lambda x: x.__name__ if isinstance(x, type) else "",
)
def test_an_off_by_one_is_caught(
    tiny_llama: Built, fault: type[Engine], expected: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify_module, "VerifiedEngine", fault)
    report = run(tiny_llama)
    assert expected <= failing(report)
    if len(expected) == 1:
        assert failing(report) == expected
    assert report.to_text().endswith("verify: failed")


def test_the_library_itself_passes(tiny_llama: Built) -> None:
    report = run(tiny_llama)
    assert failing(report) == set() and report.failures == []


def test_a_library_that_breaks_off_is_reset(
    tiny_llama: Built, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error of the runtime in the middle of a batch; the next scenarios start afresh."""

    class Breaks(Engine):
        def batch_decode(self, tokens: Mapping[int, int]) -> Any:
            return super().batch_decode({**tokens, 99: 0})  # no such sequence

    monkeypatch.setattr(verify_module, "VerifiedEngine", Breaks)
    report = run(tiny_llama)
    assert failing(report) == {"ragged_batch", "functions"}
    for failure, name in zip(report.failures, ("ragged_batch", "functions"), strict=True):
        assert failure.startswith(f"{name}: broke off: ") and "\n" not in failure


# ---------------------------------------------------------------------------------------------
# Parameters that are not those of the checkpoint


@pytest.fixture
def copy(tiny_llama: Built, tmp_path: Path) -> Built:
    directory = tmp_path / "copy"
    shutil.copytree(tiny_llama.directory, directory)
    return Built(tiny_llama.checkpoint, directory, tiny_llama.library)


def edit(directory: Path, name: str, change: Callable[[np.ndarray[Any, Any]], None]) -> None:
    """Change one stored tensor in place; manifest and tensor-cache.json stay."""
    cache = open_tensor_cache(directory)
    shard, record = next((s, r) for s in cache.shards for r in s.records if r.name == name)
    data = np.memmap(directory / shard.file, np.uint8, "r+")
    change(data[record.offset : record.offset + record.nbytes].view(np.float32))
    data.flush()


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("model.layers.1.mlp.down_proj.weight", lambda w: np.multiply(w, 1.001, out=w)),
        ("model.layers.0.self_attn.qkv_proj.weight", lambda w: w[:96].__iadd__(0.01)),
        ("model.norm.weight", lambda w: w[5:6].__imul__(1.01)),
    ],
    ids=["a layer scaled by 0.1 %", "one row", "one number"],
)
def test_a_library_with_other_weights_is_caught(
    tiny_llama: Built,
    copy: Built,
    name: str,
    change: Callable[[Any], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    edit(copy.directory, name, change)
    # Changed files: the reference has the same numbers, so only the comparison with the
    # checkpoint tells.
    report = run(copy)
    assert failing(report) == set()
    (failure,) = report.failures
    assert failure.startswith(f"parameters are not the checkpoint's: {name}")

    # Changed in memory only, as a broken loader would: the logits tell.
    class Other(Engine):
        @classmethod
        def load(cls, library: Path, directory: Path, **options: Any) -> Engine:
            return Engine.load(library, copy.directory, **options)

    monkeypatch.setattr(verify_module, "VerifiedEngine", Other)
    report = run(tiny_llama)
    assert failing(report) == EVERY
    assert report.parameters is not None and report.parameters.faults == ()


def test_nan_in_the_parameters_fails(copy: Built) -> None:
    """Also where the reference has the same NaN: nothing may be compared with it."""

    def poison(w: Any) -> None:
        w[7] = np.nan

    edit(copy.directory, "model.layers.0.mlp.down_proj.weight", poison)
    with pytest.raises(InputError, match="not finite"):
        run(copy)


def test_nan_in_the_library_fails(
    tiny_llama: Built, copy: Built, monkeypatch: pytest.MonkeyPatch
) -> None:
    def poison(w: Any) -> None:
        w[7] = np.nan

    edit(copy.directory, "model.layers.0.mlp.down_proj.weight", poison)

    class Other(Engine):
        @classmethod
        def load(cls, library: Path, directory: Path, **options: Any) -> Engine:
            return Engine.load(library, copy.directory, **options)

    monkeypatch.setattr(verify_module, "VerifiedEngine", Other)
    report = run(tiny_llama)
    assert failing(report) == EVERY
    assert any("NaN or infinity" in failure for failure in report.failures)
    json.dumps(report.to_json(), allow_nan=False)


# ---------------------------------------------------------------------------------------------
# Parts that do not belong together


def test_another_checkpoint_is_refused_or_fails(
    tiny_llama: Built, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    other_size = checkpoint(Case("llama", {"intermediate_size": 128}))
    with pytest.raises(InputError, match="intermediate_size is 128 and 160"):
        verify(tiny_llama.directory, tiny_llama.library, other_size)
    with pytest.raises(InputError, match="is not the model"):
        verify(
            tiny_llama.directory, tiny_llama.library, checkpoint(Case("llama", {"rope_theta": 5e5}))
        )
    same_size = checkpoint(seed=1)
    report = verify(tiny_llama.directory, tiny_llama.library, same_size, engine="numpy")
    assert failing(report) == set()  # the stored weights are what the library computes with …
    assert len(report.failures) == 1 and "and 14 more" in report.failures[0]  # … but not these


def test_another_schemes_directory_is_refused(tiny_llama: Built, tmp_path: Path) -> None:
    convert(tiny_llama.checkpoint, "q4f32_1", tmp_path / "q4", SIZES)
    with pytest.raises(InputError, match="do not belong together"):
        verify(tmp_path / "q4", tiny_llama.library, tiny_llama.checkpoint)


def test_another_configuration_is_refused(copy: Built) -> None:
    path = copy.directory / "mlc-chat-config.json"
    config = json.loads(path.read_text())
    config["model_config"]["rms_norm_eps"] = 1e-3
    path.write_text(json.dumps(config))
    with pytest.raises(InputError, match="do not belong together"):
        run(copy)


def test_command_line(tiny_llama: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    golden = tmp_path / "golden.npz"
    words = ["verify", str(tiny_llama.directory), "--lib", str(tiny_llama.library), "--reference"]
    good = CliRunner().invoke(
        main,
        [*words, str(tiny_llama.checkpoint), "--engine", "numpy", "--write-golden", str(golden)],
    )
    assert good.exit_code == 0, good.output
    assert "verify: passed" in good.output

    stored = CliRunner().invoke(main, [*words, str(golden), "--json", "-q"])
    assert stored.exit_code == 0, stored.output
    report = json.loads(stored.stdout)
    assert report["ok"] and report["reference"] == "golden.npz, by numpy, float32"

    refused = CliRunner().invoke(main, [*words, str(golden), "--original"])
    assert refused.exit_code == 2 and "--original needs a checkpoint" in refused.output

    monkeypatch.setattr(verify_module, "VerifiedEngine", PopsOneMore)
    bad = CliRunner().invoke(main, [*words, str(golden), "-q"])
    assert bad.exit_code == 1
    assert "verify missed its thresholds: rollback" in bad.output
