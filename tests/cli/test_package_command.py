"""`package` as a user runs it: the default file, the report, one line of error."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

from mlc_compile.compiler import package as library
from mlc_compile.compiler.package import PackagedModel, PackageReport
from mlc_compile.targets.apple.phones import PHONES


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, object]]:
    """What the command asks the library for; nothing is compiled."""
    found: list[dict[str, object]] = []

    def package(config: Path, output: Path, **options: object) -> PackageReport:
        found.append({"config": config, "output": output, **options})
        model = PackagedModel("tiny", "tiny_model_lib", 70 * 10**6, 1024, 1_626_624)
        return PackageReport(
            output / "lib" / library.LIBRARY,
            output / "bundle" / library.APP_CONFIG,
            1_389_680,
            12.5,
            (model,),
            ("tiny: a note",),
        )

    monkeypatch.setattr(library, "package", package)
    return found


def test_defaults_and_report(
    calls: list[dict[str, object]],
    invoke: Callable[..., Result],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    missing = invoke("package")
    assert missing.exit_code == 2 and "mlc-package-config.json" in missing.stderr
    (tmp_path / "mlc-package-config.json").write_text("{}")
    result = invoke("package")
    assert result.exit_code == 0, result.stderr
    assert calls[0]["output"] == Path("dist") and calls[0]["budget"] is None
    assert "tiny: a note" in result.stderr
    assert "dist/lib/libmodel_iphone.a: 1.3 MiB, 1 library, 12.5 s" in result.stdout
    assert "tiny: tiny_model_lib, 1024 tokens, 66.8 MiB when it runs" in result.stdout

    report = json.loads(invoke("package", "--json", "-q").stdout)
    assert report["models"][0]["estimated_vram_bytes"] == 70 * 10**6


def test_a_phone_is_a_budget(
    calls: list[dict[str, object]], invoke: Callable[..., Result], tmp_path: Path
) -> None:
    config = tmp_path / "x.json"
    config.write_text("{}")
    out = str(tmp_path / "out")
    result = invoke("package", str(config), "-o", out, "--budget", "iphone-8gb-increased")
    assert result.exit_code == 0, result.stderr
    assert calls[0]["budget"] == PHONES["iphone-8gb-increased"].budget


def test_a_remote_model_is_one_line(invoke: Callable[..., Result], tmp_path: Path) -> None:
    config = tmp_path / "mlc-package-config.json"
    entry = {"model": "HF://mlc-ai/x", "model_id": "x", "bundle_weight": True}
    config.write_text(json.dumps({"device": "iphone", "model_list": [entry]}))
    result = invoke("package", str(config), "-o", str(tmp_path / "dist"))
    assert result.exit_code == 2 and result.stdout == ""
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert "HF://mlc-ai/x' is remote" in result.stderr
    assert not (tmp_path / "dist").exists()


def test_compile_has_the_option_and_refuses_early(
    invoke: Callable[..., Result], tmp_path: Path
) -> None:
    tiny = Path(__file__).resolve().parents[2] / "examples" / "tiny_model"
    words = ("gen_config", str(tiny), "--quantization", "q4f16_1", "-o", str(tmp_path))
    assert invoke(*words).exit_code == 0
    before = sorted(tmp_path.iterdir())
    output = str(tmp_path / "libmodel.a")
    words = ("compile", str(tmp_path), "--target", "iphone", "-o", output)
    for prefix in ("short_", "no_underscore_at_the_end", "dash-ed_prefix_"):
        result = invoke(*words, "--system-lib-prefix", prefix)
        assert result.exit_code == 2 and "--system-lib-prefix" in result.stderr
        assert result.stderr.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == before
