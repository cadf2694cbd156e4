"""What an architecture is: declarations, their parameters, and detection. No TVM here."""

from mlc_compile.models.detect import load_model
from mlc_compile.models.names import BARE_DECODER, HF_DECODER, NameTable
from mlc_compile.models.params import HeadRows, ParamSpec, Source
from mlc_compile.models.registry import ARCHITECTURES, get_architecture
from mlc_compile.models.schema import ConfigSchema
from mlc_compile.models.spec import Architecture, Model, num_parameters

__all__ = [
    "ARCHITECTURES",
    "BARE_DECODER",
    "HF_DECODER",
    "Architecture",
    "ConfigSchema",
    "HeadRows",
    "Model",
    "NameTable",
    "ParamSpec",
    "Source",
    "get_architecture",
    "load_model",
    "num_parameters",
]
