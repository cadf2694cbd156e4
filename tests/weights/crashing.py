"""A process that converts in children which can be killed: `python crashing.py SOURCE SCHEME`.

Each line of its input is a JSON list [output directory, event, overwrite]: a child converts and is
killed by SIGKILL before its so-and-so-manieth system call that changes a file (0: it is not; -1:
they are counted, into OUTPUT.events). The answer is a line with the child's id, and one with its
status when it has ended.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

CHANGES = ("pwrite", "fsync", "replace", "ftruncate", "posix_fallocate", "mkdir", "rmdir", "unlink")
SHARD = 1 << 14  # a small checkpoint gets many shards


def die_at(event: int) -> Callable[[], int]:
    """Kills this process before its `event`th change of a file; a write is then torn.

    Returns what says how many there were.
    """
    lock, count = threading.Lock(), 0

    def killing(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            with lock:
                count += 1
                if count == event:
                    if name == "pwrite":
                        real(args[0], args[1][: len(args[1]) // 2], args[2])
                    os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)

        return call

    for name in CHANGES:
        setattr(os, name, killing(name, getattr(os, name)))
    return lambda: count


def main() -> None:
    from mlc_compile.models import load_model
    from mlc_compile.quantization.scheme import get_scheme
    from mlc_compile.weights import tensor_cache
    from mlc_compile.weights.checkpoint import open_checkpoint
    from mlc_compile.weights.convert import convert_weight

    tensor_cache.plan_shards.__defaults__ = (SHARD,)
    source, scheme = sys.argv[1:]
    for line in sys.stdin:
        out, event, overwrite = json.loads(line)
        child = os.fork()
        if child == 0:
            count = die_at(event) if event else lambda: 0
            checkpoint = open_checkpoint(source)
            model = load_model(checkpoint.config, where=source)
            convert_weight(
                checkpoint, model, get_scheme(scheme), Path(out), overwrite=overwrite, jobs=3
            )
            if event < 0:
                Path(f"{out}.events").write_text(str(count()))
            os._exit(0)
        print(child, flush=True)
        print(os.waitpid(child, 0)[1], flush=True)


if __name__ == "__main__":
    main()
