"""Encoders: numpy's reference, and compiled kernels that give the same bytes faster.

    encode = encoder("cpu")
    arrays = encode(weight, scheme, layout="NK", name="model.layers.0...")
    arrays, error, square = encode.measured(weight, scheme, layout="NK", name=...)

- Kernels are TIR, built by TVM's LLVM for this CPU when their kind of tensor first comes, without a
  C compiler, and kept for later processes (native.py).
- Calls run in several threads at once; a kernel runs with the GIL released.
- encoder("cuda") has an NVIDIA GPU do what it can (cuda_encoder.py).
- Whatever the kernels do not serve (a CPU without float16 conversions, odd dtypes, a search for
  scales, a value that is refused) is done by the reference: the same bytes, or its error.
"""

from __future__ import annotations

import ctypes
import threading
from typing import Any, Literal

import ml_dtypes
import numpy as np
import numpy.typing as npt

from mlc_compile.errors import InputError
from mlc_compile.quantization import codec, group
from mlc_compile.quantization.codec import Scales, rule
from mlc_compile.quantization.errors import Float64, row_sums, square_sums
from mlc_compile.quantization.levels import candidate_divisors
from mlc_compile.quantization.native import Kernel, load
from mlc_compile.quantization.scheme import Layout, QuantScheme, numpy_dtype

Array = npt.NDArray[Any]
Float32 = npt.NDArray[np.float32]
Device = Literal["numpy", "cpu", "cuda"]
Measured = tuple[tuple[Array, ...], Float64, Float64]
_Key = tuple[str, str, str, int, int, str]  # the fields of encode_kernels.EncodeSpec

SOURCES = {
    np.dtype(np.float16): "float16",
    np.dtype(ml_dtypes.bfloat16): "bfloat16",
    np.dtype(np.float32): "float32",
}
# Rows of any length are cut into vectors of so many elements.
_VECTOR = 16


class Encoder:
    """The reference, in numpy; what others serve faster they give by `_encode`."""

    def __call__(
        self,
        weight: Array,
        scheme: QuantScheme,
        *,
        layout: Layout | None = None,
        name: str = "weight",
        scales: Scales = "absmax",
        importance: Float32 | None = None,
    ) -> tuple[Array, ...]:
        """The stored arrays of a weight [N, K], as codec.encode."""
        found = self._encode(weight, scheme, layout, scales, importance)
        if found is not None:
            return found[0]
        return codec.encode(
            weight, scheme, layout=layout, name=name, scales=scales, importance=importance
        )

    def measured(
        self, weight: Array, scheme: QuantScheme, *, layout: Layout | None = None, **how: Any
    ) -> Measured:
        """The same, and for each row the sums of (w' - w)**2 and of w**2 (errors.py).

        how: name, scales and importance, as above.
        """
        scales, importance = how.get("scales", "absmax"), how.get("importance")
        found = self._encode(weight, scheme, layout, scales, importance)
        if found is not None:
            return found
        arrays = codec.encode(weight, scheme, layout=layout, **how)
        stored = codec.decode(arrays, scheme, weight.shape[1], layout=layout)
        return arrays, square_sums(weight, stored, scheme), square_sums(weight, None, scheme)

    def _encode(
        self,
        weight: Array,
        scheme: QuantScheme,
        layout: Layout | None,
        scales: Scales,
        importance: Float32 | None,
    ) -> Measured | None:
        """None where the reference has to do it (or to raise its error)."""
        return None


class CompiledEncoder(Encoder):
    """Kernels where they serve, else the reference."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kernels: dict[_Key, Kernel | None] = {}

    def kernel(self, source: str, scheme: QuantScheme, scales: Scales = "absmax") -> Kernel | None:
        """The kernel for weights of dtype `source`, built when first asked for; None if none."""
        scales = rule(scales, scheme)
        if scheme.codes != "symmetric" or (scales == "mse" and not scheme.group_size):
            return None
        key = (source, scheme.model_dtype, scheme.codes, scheme.bits, scheme.group_size, scales)
        with self._lock:
            if key not in self._kernels:
                self._kernels[key] = _build(key)
            return self._kernels[key]

    def _encode(
        self,
        weight: Array,
        scheme: QuantScheme,
        layout: Layout | None,
        scales: Scales,
        importance: Float32 | None,
    ) -> Measured | None:
        """None where the reference has to do it (or to raise its error)."""
        source = SOURCES.get(weight.dtype)
        if source is None or weight.ndim != 2 or not weight.size:
            return None
        kernel = self.kernel(source, scheme, scales)
        if kernel is None:
            return None
        n, k = weight.shape
        weight, groups = whole_groups(weight, scheme)
        total, size = weight.shape
        # The search takes whole vectors of groups, the other kernel one at the least.
        whole = -(-total // _VECTOR) * _VECTOR if scales == "mse" else max(total, _VECTOR)
        if total < whole:
            padded = np.zeros((whole, size), weight.dtype)
            padded[:total] = weight
            weight, total = padded, len(padded)
        words = np.empty((total, size // scheme.elems_per_word), np.uint32)
        scale = np.empty(total, numpy_dtype(scheme.model_dtype))
        error, square = np.empty(total, np.float32), np.empty(total, np.float32)
        peak = np.zeros(1, np.uint32)
        buffers = [weight, words, scale, error, square, peak]
        numbers = [total, size]
        if scales == "mse":
            try:
                columns = padded_importance(importance, k, groups * size)
            except ValueError:
                return None
            # [size, groups + 16]: of each element of the groups of a row, which then begins anew
            columns = columns.reshape(groups, size).T[:, np.arange(groups + _VECTOR) % groups]
            columns = np.ascontiguousarray(columns)
            divisors = candidate_divisors(scheme)
            buffers += [columns, np.empty((4, size, _VECTOR), np.float32), divisors]
            numbers = [total, groups, len(divisors)]
        kernel(*(ctypes.c_void_p(a.ctypes.data) for a in buffers), *numbers)
        if not fits(peak, weight.dtype, scheme.model_dtype):
            return None
        return finished(words, scale, error, square, (n, k), scheme, layout)


def encoder(device: Device = "cpu", jobs: int = 1) -> Encoder:
    """An encoder for `jobs` threads; for "cuda" its kernel is built and tried, for others nothing
    is imported or built before it is called.

    Raises:
        InputError: a device that is not known.
        EnvironmentLacksError: "cuda" without a GPU, its driver, or what compiles for it.
    """
    if device == "numpy":
        return Encoder()
    if device == "cpu":
        return CompiledEncoder()
    if device == "cuda":
        from mlc_compile.quantization.cuda_encoder import CudaEncoder

        return CudaEncoder()
    raise InputError(f"--device {device}: cannot pack weights", hint="use auto, cpu, cuda or numpy")


def whole_groups(weight: Array, scheme: QuantScheme) -> tuple[Array, int]:
    """(rows [N, K] of symmetric codes as groups [N * groups, size], groups of a row), padded with
    zeros; in rows without groups, to a multiple of 16."""
    n, k = weight.shape
    groups, size = scheme.num_groups(k), scheme.group_size or -(-k // _VECTOR) * _VECTOR
    if groups * size != k:
        padded = np.zeros((n, groups * size), weight.dtype)
        padded[:, :k] = weight
        weight = padded
    return np.ascontiguousarray(weight).reshape(n * groups, size), groups


def padded_importance(importance: Float32 | None, k: int, length: int) -> Float32:
    """[length]: the importance of each of k columns, 1 for None, and 0 of padding.

    Raises ValueError for one that the reference refuses.
    """
    found = np.ones(length, np.float32)
    if importance is not None:
        if importance.shape != (k,) or not np.isfinite(importance).all() or importance.min() < 0:
            raise ValueError
        found[:k], found[k:] = importance, 0
    return found


def fits(peak: Array, source: np.dtype[Any], model: str) -> bool:
    """Whether the largest magnitude, given by its bits, is finite and stays so in `model`."""
    bits = peak.astype(np.dtype(f"u{source.itemsize}"))
    return bool(bits.view(source).astype(np.float64)[0] < group.OVERFLOW[model])


def finished(
    words: Array,
    scale: Array,
    error: Float32,
    square: Float32,
    shape: tuple[int, int],
    scheme: QuantScheme,
    layout: Layout | None,
) -> Measured:
    """What `measured` returns for rows of `shape`, of their groups and maybe some more: words
    [groups, words of one], scale, error and square [groups]."""
    n, k = shape
    total = n * scheme.num_groups(k)
    words, scale, error, square = (a[:total].reshape(n, -1) for a in (words, scale, error, square))
    words = np.ascontiguousarray(words[:, : scheme.num_words(k)])
    arrays = (words, scale)
    if (layout or scheme.layout) == "KN":
        arrays = (np.ascontiguousarray(words.T), np.ascontiguousarray(scale.T))
    return arrays, row_sums(error), row_sums(square)


def _build(key: _Key) -> Kernel | None:
    """The kernel; None where this CPU cannot run one."""
    # Without conversions of float16 as instructions numpy is as fast.
    feature = "f16c" if "float16" in key else ""
    return (
        load("search", key, feature, 9, 3) if "mse" in key else load("encode", key, feature, 6, 2)
    )
