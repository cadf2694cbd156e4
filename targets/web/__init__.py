"""The WebGPU library: TVM's runtime and a model's kernels, linked to one WebAssembly module.

Notable:
- everything is built from PyPI packages: clang and wasi-libc come with `ziglang`, the runtime's
  C++ sources with `apache-tvm` and `apache-tvm-ffi`;
- the runtime's objects are built once and cached by content (`runtime`);
- a library is written only when it passed every check (`check`, `export`).
"""
