"""The bundled model, converted and compiled for cpu once in each test process (about 10 s)."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

CHECKPOINT = Path(__file__).parents[1] / "examples" / "tiny_model"
CONTEXT = 256


@dataclass(frozen=True)
class BuiltModel:
    """Parameters, configuration and tokenizer in `directory`. Don't change them: copy them."""

    directory: Path
    library: Path


@cache
def built_model() -> BuiltModel:
    """q4f16_1, CONTEXT tokens, chunks of 64."""
    from mlc_compile.chat_config import gen_config
    from mlc_compile.compiler.build import compile_library
    from mlc_compile.config import resolve_compile_config
    from mlc_compile.models import load_model
    from mlc_compile.quantization.scheme import get_scheme
    from mlc_compile.weights.checkpoint import open_checkpoint
    from mlc_compile.weights.convert import convert_weight

    folder = Path(tempfile.mkdtemp(prefix="mlc_compile_tests_"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    checkpoint = open_checkpoint(CHECKPOINT)
    model = load_model(checkpoint.config, where=str(CHECKPOINT))
    scheme = get_scheme("q4f16_1")
    sizes = resolve_compile_config(
        model.config, context_window_size=CONTEXT, prefill_chunk_size=64, max_batch_size=2
    )
    directory = folder / "model"
    convert_weight(checkpoint, model, scheme, directory)
    gen_config(checkpoint, model, scheme, sizes, directory)
    library = folder / "model.so"
    compile_library(directory, "cpu", library)
    return BuiltModel(directory, library)
