"""TVM's thread pool on this machine: how many threads, and where the caller runs.

The pool would use half of an x86 machine's CPUs. It binds its workers to the CPUs after the first,
but not the calling thread, which the system may leave on a worker's CPU for seconds: everything
then takes twice as long (measured: a GEMV of 17 us takes 38 us).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

THREADS_VARIABLE = "TVM_NUM_THREADS"


def available_cpus() -> int:
    """CPUs this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def choose_pool_size() -> None:
    """Let the pool have every CPU, unless the user said otherwise. Counts until the pool's first
    task."""
    os.environ.setdefault(THREADS_VARIABLE, str(available_cpus()))


@contextmanager
def pinned_caller() -> Iterator[None]:
    """Within it this thread stays on the CPU that the pool leaves free; the pool must have started.

    Changes nothing where the pool has one thread or does not bind its workers, or where the
    process does not own the machine.
    """
    confined = available_cpus() < (os.cpu_count() or 1)
    single = os.environ.get(THREADS_VARIABLE) == "1"
    unbound = os.environ.get("TVM_BIND_THREADS") == "0"
    if confined or single or unbound or not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
