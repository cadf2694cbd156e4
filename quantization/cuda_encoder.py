"""The encoder of `--device cuda`: symmetric codes on an NVIDIA GPU, all others as on the CPU.

    encode = CudaEncoder()
    arrays, error, square = encode.measured(weight, scheme, layout="NK", name=...)

- One kernel (targets/cuda_kernels/encode.py) is compiled by nvcc when it is first wanted, for the
  architectures of `--target cuda`; its machine code is kept in the cache of that target.
- Each thread has a piece of the GPU's memory, as large as its largest block has needed. A call is
  two copies there (the weights; a few numbers), a launch and one copy back, on CUDA's default
  stream; the host holds what comes back and nothing else.
- A GPU that fails in the middle of the work, by memory that others took for instance, is left
  alone from then on: the CPU gives the same bytes.
"""

from __future__ import annotations

import tempfile
import threading
from pathlib import Path
from typing import Any

import numpy as np

from mlc_compile.errors import CheckFailedError, EnvironmentLacksError
from mlc_compile.quantization import codec
from mlc_compile.quantization.codec import Rule, Scales, rule
from mlc_compile.quantization.compiled import (
    SOURCES,
    Array,
    CompiledEncoder,
    Float32,
    Measured,
    finished,
    fits,
    padded_importance,
    whole_groups,
)
from mlc_compile.quantization.levels import candidate_divisors
from mlc_compile.quantization.scheme import Layout, QuantScheme, get_scheme, numpy_dtype
from mlc_compile.runtime import cuda_device

# The numbers of cuh/encode.cuh.
_DTYPES = {"float16": 0, "bfloat16": 1, "float32": 2}
_RULES: dict[Rule, int] = {"absmax": 0, "signed": 1, "mse": 2}
_DIVISORS = 64
_ALIGNED = 256
_MOST_BYTES = 2**31 - 1  # offsets are int32
_GRAIN = 1 << 20  # memory of the GPU is taken in multiples


class CudaEncoder(CompiledEncoder):
    """The GPU where it serves, else the CPU's kernels, else the reference.

    library: what `build_library` wrote; without it, one is built.

    Raises:
        EnvironmentLacksError: no driver, no GPU, no nvcc, or a GPU that cannot be used.
        CheckFailedError: the GPU computes something else than the reference.
    """

    def __init__(self, library: Path | None = None) -> None:
        super().__init__()
        self._alone = threading.Lock()
        self._own = threading.local()
        self._failed = False
        try:
            gpu = cuda_device.install()
            if library is not None:
                cuda_device.check_code(library, gpu)
                self._run = _load(library)
            else:
                with tempfile.TemporaryDirectory(prefix="mlc-encoder-") as folder:
                    path = Path(folder) / "encoder.so"
                    build_library(path)
                    self._run = _load(path)
            self._check(gpu.name)
        except EnvironmentLacksError as error:
            hint = (error.hint or "").removesuffix(", or compile for --target cpu")
            hint += "; or " * bool(hint) + "take --device cpu, which gives the same files"
            raise EnvironmentLacksError(f"--device cuda: {error.message}", hint=hint) from error

    def _check(self, gpu: str) -> None:
        """Some weights, before hours of them."""
        weight = np.random.default_rng(0).standard_normal((24, 64)).astype(np.float32)
        scheme = get_scheme("q4f16_1")
        try:
            found = self._on_gpu(weight, scheme, None, "mse", None)
        except RuntimeError as error:
            raise EnvironmentLacksError(
                f"{gpu} cannot be used: {str(error).strip().splitlines()[-1]}",
                hint="look at `nvidia-smi`",
            ) from error
        expected = codec.encode(weight, scheme, scales="mse")
        if found is None or any(
            one.tobytes() != other.tobytes() for one, other in zip(found[0], expected, strict=True)
        ):
            raise CheckFailedError(
                f"{gpu} encodes weights otherwise than the CPU does", hint="use --device cpu"
            )

    def _encode(
        self,
        weight: Array,
        scheme: QuantScheme,
        layout: Layout | None,
        scales: Scales,
        importance: Float32 | None,
    ) -> Measured | None:
        chosen = rule(scales, scheme)
        served = (
            weight.dtype in SOURCES
            and weight.ndim == 2
            and weight.size > 0
            and scheme.codes == "symmetric"
            and (chosen != "mse" or scheme.group_size > 0)
            # The weights, in rows that are padded, and what comes back, which is smaller.
            and 2 * weight.nbytes + 16 * weight.shape[0] * scheme.group_of(weight.shape[1])
            < _MOST_BYTES
        )
        if served and not self._failed:
            try:
                return self._on_gpu(weight, scheme, layout, chosen, importance)
            except RuntimeError:  # TVM's, of CUDA
                self._failed = True
        return super()._encode(weight, scheme, layout, scales, importance)

    def _on_gpu(
        self,
        weight: Array,
        scheme: QuantScheme,
        layout: Layout | None,
        chosen: Rule,
        importance: Float32 | None,
    ) -> Measured | None:
        n, k = weight.shape
        groups, a_row = whole_groups(weight, scheme)
        total, size = groups.shape
        divisors = np.zeros(_DIVISORS, np.float32)
        columns: Float32 = np.empty(0, np.float32)
        candidates = 0
        if chosen == "mse":
            tried = candidate_divisors(scheme)
            candidates = len(tried)
            divisors[:candidates] = tried
            if importance is not None:
                try:
                    columns = padded_importance(importance, k, a_row * size)
                except ValueError:
                    return None
        model = numpy_dtype(scheme.model_dtype)
        words = size // scheme.elems_per_word
        lengths = (_ALIGNED, 4 * total * words, 4 * total, 4 * total, model.itemsize * total)
        starts = np.cumsum([0, *map(_padded, lengths)])
        parameters = _padded(groups.nbytes)
        results = parameters + _padded(divisors.nbytes + columns.nbytes)

        memory = self._memory(results + int(starts[-1]))
        given = np.zeros(results - parameters + _ALIGNED, np.uint8)  # the peak, 0, lies behind
        given[: divisors.nbytes] = divisors.view(np.uint8)
        given[divisors.nbytes : divisors.nbytes + columns.nbytes] = columns.view(np.uint8)
        _view(memory, 0, groups.nbytes).copyfrom(groups.reshape(-1).view(np.uint8))
        _view(memory, parameters, given.nbytes).copyfrom(given)
        numbers = (parameters, results, total, size, a_row, candidates, int(columns.size > 0))
        kinds = (_DTYPES[SOURCES[weight.dtype]], _DTYPES[scheme.model_dtype])
        with self._alone:  # a launch returns at once
            self._run(memory, *numbers, *kinds, scheme.bits, _RULES[chosen])
        out = _view(memory, results, int(starts[-1])).numpy()

        dtypes = (np.uint32, np.uint32, np.float32, np.float32, model)
        peak, codes, error, square, scale = (
            out[start : start + length].view(dtype)
            for start, length, dtype in zip(starts, lengths, dtypes, strict=False)
        )
        if not fits(peak[:1], weight.dtype, scheme.model_dtype):
            return None
        codes = codes.reshape(total, words)
        return finished(codes, scale, error, square, (n, k), scheme, layout)

    def _memory(self, size: int) -> Any:
        """This thread's piece of the GPU's memory, of `size` bytes at least."""
        import tvm

        held = getattr(self._own, "memory", None)
        if held is None or held.shape[0] < size:
            self._own.memory = held = None  # given back first
            size = -(-size // _GRAIN) * _GRAIN
            held = tvm.runtime.empty((size,), "uint8", tvm.device("cuda", 0))
            self._own.memory = held
        return held


def build_library(path: Path, variant: str | None = None) -> None:
    """Write the kernel as a shared library for `--target cuda[:variant]`; no GPU is needed.

    Raises EnvironmentLacksError without nvcc or a linker.
    """
    import tvm

    from mlc_compile.targets.cuda import BACKEND
    from mlc_compile.targets.cuda_kernels.encode import NAME, encode_kernel
    from mlc_compile.targets.profile import ExportRequest

    BACKEND.check_environment(".so", "")
    target = BACKEND.tvm_target(variant, ".so")
    module = tvm.IRModule({NAME: encode_kernel()})
    BACKEND.export(module, target, ExportRequest(path, {}, (NAME,)))


def _load(path: Path) -> Any:
    import tvm

    # Relax's executable is around it.
    return tvm.runtime.load_module(str(path)).get_function("encode", query_imports=True)


def _padded(size: int) -> int:
    return -(-size // _ALIGNED) * _ALIGNED


def _view(memory: Any, start: int, size: int) -> Any:
    return memory._create_view((size,), "uint8", start)
