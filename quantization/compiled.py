"""Encoders: numpy's reference, and compiled kernels that give the same bytes faster.

    encode = encoder("cpu")
    arrays = encode(weight, scheme, layout="NK", name="model.layers.0...")
    arrays, error, square = encode.measured(weight, scheme, layout="NK", name=...)

- Kernels are TIR, built by TVM's LLVM for this CPU when their kind of tensor first comes, without a
  C compiler, and kept for later processes (native.py).
- Calls run in several threads at once; a kernel runs with the GIL released.
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

_SOURCES = {
    np.dtype(np.float16): "float16",
    np.dtype(ml_dtypes.bfloat16): "bfloat16",
    np.dtype(np.float32): "float32",
}
# Rows of any length are cut into vectors of so many elements.
_VECTOR = 16


class Encoder:
    """The reference, in numpy."""

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
        return codec.encode(
            weight, scheme, layout=layout, name=name, scales=scales, importance=importance
        )

    def measured(
        self,
        weight: Array,
        scheme: QuantScheme,
        *,
        layout: Layout | None = None,
        name: str = "weight",
        scales: Scales = "absmax",
        importance: Float32 | None = None,
    ) -> Measured:
        """The same, and for each row the sums of (w' - w)**2 and of w**2 (errors.py)."""
        arrays = self(
            weight, scheme, layout=layout, name=name, scales=scales, importance=importance
        )
        stored = codec.decode(arrays, scheme, weight.shape[1], layout=layout)
        return arrays, square_sums(weight, stored, scheme), square_sums(weight, None, scheme)


class CompiledEncoder(Encoder):
    """Kernels where they serve, else the reference."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kernels: dict[_Key, Kernel | None] = {}

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
        found = self._encode(weight, scheme, layout, scales, importance)
        if found is not None:
            return found[0]
        return super().__call__(
            weight, scheme, layout=layout, name=name, scales=scales, importance=importance
        )

    def measured(
        self,
        weight: Array,
        scheme: QuantScheme,
        *,
        layout: Layout | None = None,
        name: str = "weight",
        scales: Scales = "absmax",
        importance: Float32 | None = None,
    ) -> Measured:
        found = self._encode(weight, scheme, layout, scales, importance)
        if found is not None:
            return found
        return super().measured(
            weight, scheme, layout=layout, name=name, scales=scales, importance=importance
        )

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
        source = _SOURCES.get(weight.dtype)
        if source is None or weight.ndim != 2 or not weight.size:
            return None
        kernel = self.kernel(source, scheme, scales)
        if kernel is None:
            return None
        n, k = weight.shape
        groups, size = scheme.num_groups(k), scheme.group_size or -(-k // _VECTOR) * _VECTOR
        if groups * size != k:
            padded = np.zeros((n, groups * size), weight.dtype)
            padded[:, :k] = weight
            weight = padded
        weight = np.ascontiguousarray(weight)
        total = n * groups
        if scales == "mse" and total % _VECTOR:  # whole vectors of groups
            padded = np.zeros((total + -total % _VECTOR, size), weight.dtype)
            padded[:total] = weight.reshape(total, size)
            weight, total = padded, len(padded)
        words = np.empty((total, size // scheme.elems_per_word), np.uint32)
        scale = np.empty(total, numpy_dtype(scheme.model_dtype))
        error, square = np.empty(total, np.float32), np.empty(total, np.float32)
        peak = np.zeros(1, np.uint32)
        buffers = [weight, words, scale, error, square, peak]
        numbers = [total, size]
        if scales == "mse":
            try:
                columns = _importance(importance, k, groups, size)
            except ValueError:
                return None
            divisors = candidate_divisors(scheme)
            buffers += [columns, np.empty((4, size, _VECTOR), np.float32), divisors]
            numbers = [total, groups, len(divisors)]
        kernel(*(ctypes.c_void_p(a.ctypes.data) for a in buffers), *numbers)
        if not _fits(peak, weight.dtype, scheme.model_dtype):
            return None
        words, scale, error, square = (
            a[: n * groups].reshape(n, -1) for a in (words, scale, error, square)
        )
        words = np.ascontiguousarray(words[:, : scheme.num_words(k)])
        arrays = (words, scale)
        if (layout or scheme.layout) == "KN":
            arrays = (np.ascontiguousarray(words.T), np.ascontiguousarray(scale.T))
        return arrays, row_sums(error), row_sums(square)


def encoder(device: Device = "cpu", jobs: int = 1) -> Encoder:
    """An encoder for `jobs` threads; nothing is imported or built before it is called.

    Raises InputError for a device that is not here.
    """
    if device == "numpy":
        return Encoder()
    if device == "cpu":
        return CompiledEncoder()
    raise InputError(f"--device {device}: cannot pack weights yet", hint="use auto, cpu or numpy")


def _importance(importance: Float32 | None, k: int, groups: int, size: int) -> Float32:
    """[size, groups + 16]: of each element of the groups of a row, which then begins anew."""
    found = np.ones(groups * size, np.float32)
    if importance is not None:
        if importance.shape != (k,) or not np.isfinite(importance).all() or importance.min() < 0:
            raise ValueError
        found[:k], found[k:] = importance, 0
    columns = found.reshape(groups, size).T[:, np.arange(groups + _VECTOR) % groups]
    return np.ascontiguousarray(columns)


def _fits(peak: Array, source: np.dtype[Any], model: str) -> bool:
    """Whether the largest magnitude, given by its bits, is finite and stays so in `model`."""
    bits = peak.astype(np.dtype(f"u{source.itemsize}"))
    return bool(bits.view(source).astype(np.float64)[0] < group.OVERFLOW[model])


def _build(key: _Key) -> Kernel | None:
    """The kernel; None where this CPU cannot run one."""
    # Without conversions of float16 as instructions numpy is as fast.
    feature = "f16c" if "float16" in key else ""
    return (
        load("search", key, feature, 9, 3) if "mse" in key else load("encode", key, feature, 6, 2)
    )
