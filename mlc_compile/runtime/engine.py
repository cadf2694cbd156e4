"""Load a compiled library with its parameters and drive its functions: the local runtime.

Tokens in, float32 logits out. Sequences live in the library's paged KV cache and are named by
integers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mlc_compile.compiler.tvm_pair import require_tvm
from mlc_compile.errors import EnvironmentLacksError, InputError
from mlc_compile.manifest import stored_schema_id
from mlc_compile.quantization.policy import StoredParam
from mlc_compile.runtime.threads import choose_pool_size
from mlc_compile.targets.embedded import library_params, read_metadata
from mlc_compile.targets.profile import get_target
from mlc_compile.weights.tensor_cache import load_params, read_stored_params

if TYPE_CHECKING:
    from typing_extensions import Self

PAGE_SIZE = 16
_KV = (
    "kv_state_add_sequence",
    "kv_state_remove_sequence",
    "kv_state_fork_sequence",
    "kv_state_popn",
    "kv_state_begin_forward",
    "kv_state_end_forward",
    "kv_state_clear",
    "attention_kv_cache_enable_sliding_window_for_seq",
)

Logits = NDArray[np.float32]


class Library:
    """A model library on this machine: its functions and its metadata."""

    def __init__(self, path: Path) -> None:
        """Load `path`.

        Raises:
            InputError: not a library, or not one of ours.
        """
        require_tvm(compiling=False)
        choose_pool_size()
        import tvm
        from tvm.runtime.vm import VirtualMachine

        self._tvm = tvm
        if not path.is_file():
            raise InputError(f"{path}: no such library", hint="make one with `mlc_compile compile`")
        metadata = read_metadata(path)
        profile, _ = get_target(metadata["mlc_compile"]["target"])
        if path.suffix not in (".so", ".dylib", ".dll"):
            raise InputError(
                f"{path}: this machine cannot run a {path.suffix}",
                hint=f"compile for --target {profile.name} to a .so, which has the same kernels",
            )
        self.device = _device(profile.device)
        if profile.device == "webgpu":
            _check_adapter(path, metadata["artifact"]["resources"]["required_features"])
        elif profile.device == "cuda":
            from mlc_compile.runtime import cuda_device

            cuda_device.check_code(path, cuda_device.install())
        try:
            self.vm = VirtualMachine(tvm.runtime.load_module(str(path.resolve())), self.device)
            self.metadata: dict[str, Any] = json.loads(str(self.vm["_metadata"]()))
        except (RuntimeError, ValueError, AttributeError, OSError) as error:
            reason = (
                str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
            )
            raise InputError(f"{path}: not a loadable model library: {reason}") from error
        self.path = path
        self.kv = {name: tvm.get_global_func(f"vm.builtin.{name}") for name in _KV}

    @property
    def params(self) -> list[StoredParam]:
        """The parameters it wants, in order."""
        return library_params(self.metadata)

    def has(self, name: str) -> bool:
        return name in self.metadata["mlc_compile"]["functions"]

    def function(self, name: str) -> Any:
        """An exported function; in-place helpers are kernels, which the virtual machine itself does
        not list."""
        return self.vm.module.get_function(name, query_imports=True)

    def tensor(self, array: NDArray[Any]) -> Any:
        return self._tvm.runtime.tensor(np.ascontiguousarray(array), self.device)

    def shape(self, *extents: int) -> Any:
        return self._tvm.runtime.ShapeTuple(list(extents))


def _device(name: str) -> Any:
    """TVM's device of that name on this machine: the CPU, an NVIDIA GPU, a WebGPU adapter, or an
    emulated Metal device.

    Raises:
        EnvironmentLacksError: what the device needs is missing.
    """
    import tvm

    if name == "webgpu":
        from mlc_compile.runtime import webgpu_device

        webgpu_device.install()
    elif name == "metal":
        from mlc_compile.runtime import metal_emulator

        metal_emulator.install()
    elif name == "cuda":
        from mlc_compile.runtime import cuda_device

        cuda_device.install()
    return tvm.device(name, 0)


def _check_adapter(path: Path, features: Sequence[str]) -> None:
    """Raise EnvironmentLacksError when the WebGPU adapter lacks a feature of the library."""
    from mlc_compile.runtime.webgpu_device import install, missing_features

    if missing := missing_features(features):
        raise EnvironmentLacksError(
            f"{path} needs {', '.join(missing)}, which {install()} does not offer",
            hint="compile a scheme of float32, such as q4f32_1, or choose another adapter with "
            "MLC_COMPILE_WGPU_ADAPTER",
        )


def bind_params(library: Library, directory: Path) -> list[Any]:
    """The library's parameters from a directory that convert_weight wrote.

    Raises:
        InputError: names, shapes or dtypes of the two differ; both fingerprints are named.
    """
    wanted = library.params
    stored = {p.name: p for p in read_stored_params(directory)}
    problems = [
        f"{w.name} {w.dtype}{list(w.shape)} against "
        + (f"{s.dtype}{list(s.shape)}" if (s := stored.get(w.name)) else "nothing")
        for w in wanted
        if (s := stored.get(w.name)) is None or (s.shape, s.dtype) != (w.shape, w.dtype)
    ]
    unknown = sorted(stored.keys() - {w.name for w in wanted})
    ids = (stored_schema_id(directory), library.metadata["mlc_compile"]["parameter_schema_id"])
    if problems or unknown or ids[0] != ids[1]:
        differences = problems + [f"{name} is not the library's" for name in unknown]
        what = (
            f"{len(differences)} parameters differ, first {differences[0]}"
            if differences
            else "the same names and shapes are packed differently"
        )
        raise InputError(
            f"{directory} and {library.path} do not belong together: {what} "
            f"(parameters {ids[0]}, library {ids[1]})",
            hint="compile the library for this directory, or convert with the library's scheme",
        )
    arrays = load_params(directory, [w.name for w in wanted])
    return [_to_tensor(library, array) for array in arrays]


def _to_tensor(library: Library, array: NDArray[Any]) -> Any:
    """bfloat16 crosses as uint16 bits, for numpy has no such type of its own."""
    if array.dtype.name != "bfloat16":
        return library.tensor(array)
    tvm = library._tvm
    tensor = tvm.runtime.empty(array.shape, "bfloat16", library.device)
    return tensor.copyfrom(array)


def _host(tensor: Any) -> Logits:
    """A device tensor of float32 as an array of its own."""
    array: Logits = tensor.numpy()
    return array


@dataclass
class Engine:
    """One library with its parameters and one KV cache."""

    library: Library
    params: list[Any]
    cache: Any
    chunk: int
    window: int
    sink: int
    lengths: dict[int, int] = field(default_factory=dict)  # tokens of each sequence

    @classmethod
    def load(cls, library: Path, directory: Path, *, max_batch: int | None = None) -> Self:
        """Load both and make a cache for `max_batch` sequences (default: the library's own)."""
        lib = Library(library)
        return cls.with_params(lib, bind_params(lib, directory), max_batch=max_batch)

    @classmethod
    def with_params(cls, lib: Library, params: list[Any], *, max_batch: int | None = None) -> Self:
        """As `load`, from parameters in the library's order."""
        meta = lib.metadata
        batch = max_batch or meta["max_batch_size"]
        window = meta["sliding_window_size"]
        per_sequence = meta["mlc_compile"]["kv_tokens"]
        cache = lib.vm["create_tir_paged_kv_cache"](
            lib.shape(batch),
            lib.shape(per_sequence * batch),
            lib.shape(meta["prefill_chunk_size"]),
            lib.shape(PAGE_SIZE),
            lib.shape(int(window > 0)),
        )
        return cls(
            lib, params, cache, meta["prefill_chunk_size"], window, meta["attention_sink_size"]
        )

    @property
    def context(self) -> int:
        """Tokens that one sequence may have; no bound with a sliding window."""
        size = self.library.metadata["context_window_size"]
        return int(size) if size > 0 else 1 << 30

    def add_sequence(self, sequence: int) -> None:
        self.library.kv["kv_state_add_sequence"](self.cache, sequence)
        self.lengths[sequence] = 0
        if self.window > 0:
            self.library.kv["attention_kv_cache_enable_sliding_window_for_seq"](
                self.cache, sequence, self.window, max(self.sink, 0)
            )

    def remove_sequence(self, sequence: int) -> None:
        self.library.kv["kv_state_remove_sequence"](self.cache, sequence)
        del self.lengths[sequence]

    def clear(self) -> None:
        """Remove every sequence, also after a call that broke off."""
        self.library.kv["kv_state_clear"](self.cache)
        self.lengths.clear()

    def fork_sequence(self, parent: int, child: int, position: int = -1) -> None:
        """`child` continues `parent` after its first `position` tokens (-1: all)."""
        self.library.kv["kv_state_fork_sequence"](self.cache, parent, child, position)
        self.lengths[child] = self.lengths[parent] if position < 0 else position

    def pop(self, sequence: int, count: int) -> None:
        """Forget the last `count` tokens.

        Raises:
            InputError: the sequence is longer than the sliding window, whose cache no longer holds
                what it would have to go back to; the runtime itself would give wrong logits.
        """
        if self.window > 0 and self.lengths[sequence] > self.window:
            raise InputError(
                f"sequence {sequence} has {self.lengths[sequence]} tokens, more than the sliding "
                f"window of {self.window}, and cannot be rolled back",
                hint="remove it and feed its tokens again",
            )
        self.library.kv["kv_state_popn"](self.cache, sequence, count)
        self.lengths[sequence] -= count

    def _forward(
        self, name: str, sequences: Sequence[int], lengths: Sequence[int], *args: Any
    ) -> Any:
        lib = self.library
        lib.kv["kv_state_begin_forward"](self.cache, lib.shape(*sequences), lib.shape(*lengths))
        out = lib.vm[name](*args, self.cache, self.params)
        lib.kv["kv_state_end_forward"](self.cache)
        for sequence, length in zip(sequences, lengths, strict=True):
            self.lengths[sequence] += length
        return out[0]

    def prefill(self, sequence: int, tokens: Sequence[int]) -> Logits:
        """Logits [vocab] after the last of `tokens`, fed in chunks."""
        if not tokens:
            raise InputError("an empty prompt has no logits", hint="give at least one token")
        logits = None
        for start in range(0, len(tokens), self.chunk):
            part = tokens[start : start + self.chunk]
            ids = self.library.tensor(np.asarray(part, np.int32))
            logits = self._forward("prefill_tokens", [sequence], [len(part)], ids)
        assert logits is not None
        return _host(logits).reshape(-1)

    def decode(self, sequence: int, token: int) -> Logits:
        """Logits [vocab] after one more token."""
        ids = self.library.tensor(np.asarray([token], np.int32))
        return _host(self._forward("decode_tokens", [sequence], [1], ids)).reshape(-1)

    def embed(self, tokens: Sequence[int]) -> Any:
        """Embeddings dt[n, hidden] as a device tensor."""
        ids = self.library.tensor(np.asarray(tokens, np.int32))
        return self.library.vm["embed"](ids, self.params)

    def batch_prefill(self, parts: Mapping[int, Sequence[int]]) -> Logits:
        """Logits [b, vocab] after the last token of each sequence's part, in one ragged call."""
        lengths = [len(part) for part in parts.values()]
        tokens = [token for part in parts.values() for token in part]
        x = self.embed(tokens)
        x = x._create_view([1, *x.shape])
        at = self.library.tensor(np.cumsum(lengths).astype(np.int32) - 1)
        out = self._forward("batch_prefill", list(parts), lengths, x, at)
        logits: Logits = _host(out)[0]
        return logits

    def batch_decode(self, tokens: Mapping[int, int]) -> Logits:
        """Logits [b, vocab] after one more token of each sequence."""
        x = self.embed(list(tokens.values()))
        x = x._create_view([x.shape[0], 1, x.shape[1]])
        out = self._forward("batch_decode", list(tokens), [1] * len(tokens), x)
        return _host(out)[:, 0]

    def verify_tokens(self, sequence: int, tokens: Sequence[int]) -> Logits:
        """Logits [n, vocab] after every one of `tokens` (at most a chunk)."""
        x = self.embed(tokens)
        x = x._create_view([1, *x.shape])
        logits: Logits = _host(self._forward("batch_verify", [sequence], [len(tokens)], x))[0]
        return logits

    def start_pool(self) -> None:
        """Run one parallel kernel: threads.pinned_caller must come after the pool's first task."""
        self.library.vm["get_logits"](self.embed([0]), self.params)
