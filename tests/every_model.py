"""A tiny config.json of every registered architecture and variant, for tests over the registry.

They are those of the parity tests (parity/architecture_cases.py), as checkpoints say them.
"""

from __future__ import annotations

import functools
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parent / "parity"))

import cases_classic
import cases_dense
import cases_llama
import cases_sparse
from architecture_cases import Case

from mlc_compile.config import read_json_strict

FAMILIES = (cases_llama, cases_dense, cases_classic, cases_sparse)
CASES: Mapping[str, Case] = {n: case for family in FAMILIES for n, case in family.CASES.items()}
HUGGING_FACE = tuple(name for name, case in CASES.items() if case.twin is None)
"""Those that transformers has a class for."""
FIRST: Mapping[str, str] = {CASES[name].model_type: name for name in reversed(CASES)}
"""One case of each model type."""


@functools.cache
def config_json(name: str) -> Mapping[str, Any]:
    """As save_pretrained writes it, or a checkpoint that brings its own class. Needs torch."""
    case = CASES[name]
    with tempfile.TemporaryDirectory() as folder:
        if case.twin is not None:
            case.twin(Path(folder), 0)
        else:
            from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

            config = AutoConfig.for_model(case.model_type, **case.config)
            config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].__name__]
            config.save_pretrained(folder)
        return read_json_strict(Path(folder) / "config.json")
