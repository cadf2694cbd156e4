"""What an architecture is: declarations, their parameters, and detection. No TVM here."""

from mlc_compile.models.detect import load_model
from mlc_compile.models.names import BARE_DECODER, HF_DECODER, NameTable
from mlc_compile.models.registry import ARCHITECTURES, get_architecture
from mlc_compile.models.spec import (
    Architecture,
    ConfigSchema,
    GatedMLP,
    GroupedQuery,
    Model,
    ParamSpec,
    RMSNorm,
    num_parameters,
)

__all__ = [
    "ARCHITECTURES",
    "BARE_DECODER",
    "HF_DECODER",
    "Architecture",
    "ConfigSchema",
    "GatedMLP",
    "GroupedQuery",
    "Model",
    "NameTable",
    "ParamSpec",
    "RMSNorm",
    "get_architecture",
    "load_model",
    "num_parameters",
]
