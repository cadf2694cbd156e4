"""The items of one conversion, through a bounded pool.

The pool works on blocks of rows, on hashes of shards whose bytes are all there, and on pieces of
the source files; another thread waits for the disk and writes the journal. What is submitted, and
what follows from a finished item, is decided in the calling thread alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mlc_compile.errors import InputError
from mlc_compile.manifest import Progress
from mlc_compile.weights.budget import Budget
from mlc_compile.weights.checkpoint import Checkpoint
from mlc_compile.weights.journal import Journal
from mlc_compile.weights.packer import Packer, Sums
from mlc_compile.weights.plan import ConversionPlan
from mlc_compile.weights.sources import SourceFiles
from mlc_compile.weights.tensor_cache import SealedShard, TensorCacheWriter, hash_shards
from mlc_compile.weights.work import Block, Converter, blocks

BATCH = 48
"""Shards that are hashed together, where that is done side by side: of fewer, streams lie idle."""
PATIENCE = 4.0
"""Seconds after which fewer are hashed: what is not, is converted again after an interruption."""


class Run:
    """The work of one conversion: which items are to be done, in work, and done."""

    def __init__(
        self,
        plan: ConversionPlan,
        checkpoint: Checkpoint,
        directory: Path,
        journal: Journal,
        sources: SourceFiles,
        packing: Packer,
        budget: Budget,
    ) -> None:
        self.plan = plan
        self.kept = 0
        self._checkpoint = checkpoint
        self._directory = directory
        self._journal = journal
        self.sources = sources
        self._packing = packing
        self._budget = budget
        self._shards = plan.shards
        self._sealed: dict[int, SealedShard] = {}
        self._sums: dict[str, Sums] = {}
        self._ready: list[int] = []  # complete, not yet being hashed
        self._hashed_at = time.monotonic()
        self._synced: dict[int, Future[None]] = {}
        self._batch = BATCH if packing.hasher is not None else 1
        self._pending: dict[Future[Any], Callable[[Any], None]] = {}

    @property
    def sealed(self) -> list[SealedShard]:
        """All shards, in order."""
        return [self._sealed[index] for index in range(len(self._shards))]

    @property
    def relative_errors(self) -> dict[str, float]:
        """By parameter."""
        return {p.spec.name: self._sums[p.spec.name].relative_error for p in self.plan.params}

    def work(self, progress: Progress | None) -> None:
        """Does it all; afterwards every shard is sealed and every source file hashed."""
        names = {path.name for path in self._directory.iterdir()}
        for name in names - {shard.file for shard in self._shards}:
            (self._directory / name).unlink()
        with (
            TensorCacheWriter(
                self._directory, self.plan.stored
            ) as writer,  # closed after its users
            ThreadPoolExecutor(self._budget.workers, "convert") as pool,
            # Waiting for the disk takes no core.
            ThreadPoolExecutor(1, "sync") as disk,
        ):
            self._pool, self._disk, self._writer = pool, disk, writer
            try:
                self._take_over()
                self._check_tied_copy()
                self._convert(progress)
            finally:
                for future in self._pending:
                    future.cancel()

    def _submit(
        self, pool: ThreadPoolExecutor, item: Callable[[], Any], then: Callable[[Any], None]
    ) -> Future[Any]:
        future = pool.submit(item)
        self._pending[future] = then
        return future

    def _wait(self, at_most: int) -> None:
        """Until no more than so many items are in work or waiting."""
        while len(self._pending) > at_most:
            done, _ = wait(self._pending, return_when=FIRST_COMPLETED)
            if any(future.exception() is not None for future in done):
                self._fail()
            for future in done:
                self._pending.pop(future)(future.result())

    def _fail(self) -> None:
        """Raises the first error in the order of the plan, whoever came first."""
        for future in self._pending:
            future.cancel()
        wait(self._pending)
        for future in self._pending:  # in order of submission
            if not future.cancelled():
                future.result()

    def _take_over(self) -> None:
        """Checks the shards that an earlier run finished and keeps those that are as it said."""
        index_of = {shard.file: index for index, shard in enumerate(self._shards)}
        there: dict[int, Mapping[str, Any]] = {}
        for entry in self._journal.entries:
            if "source" in entry:
                self.sources.take_over(entry)
            elif (index := index_of.get(entry.get("shard", ""))) is not None:
                path = self._directory / self._shards[index].file
                if path.is_file() and path.stat().st_size == self._shards[index].nbytes:
                    there[index] = entry
        order = list(there)
        for start in range(0, len(order), self._batch):
            batch = order[start : start + self._batch]
            check = partial(
                hash_shards,
                self._directory,
                [self._shards[index] for index in batch],
                self._packing.hasher,
            )
            self._submit(self._pool, check, partial(self._keep, batch, there))
        self._wait(0)

    def _keep(
        self,
        batch: Sequence[int],
        entries: Mapping[int, Mapping[str, Any]],
        found: Sequence[SealedShard],
    ) -> None:
        for index, sealed in zip(batch, found, strict=True):
            if sealed.sha256 == entries[index]["sha256"]:
                self._sealed[index] = sealed
                for name, (error, weight) in entries[index]["sums"].items():
                    self._sums[name] = Sums([error], [weight])

    def _check_tied_copy(self) -> None:
        """A head that is stored although tied must equal the embedding; else one is wrong."""
        names = self.plan.model.names
        head, embedding = f"{names.lm_head}.weight", f"{names.embed}.weight"
        if head not in self.plan.ignored:
            return
        shape = self._checkpoint.tensors[embedding].shape
        same = self._checkpoint.tensors[head].shape == shape
        step = max(1, self._budget.block_elements // max(1, shape[1]))

        def equal(rows: slice) -> bool:
            read = self._checkpoint.read
            found = np.array_equal(read(head, rows), read(embedding, rows))
            self._checkpoint.release()
            return found

        def then(found: bool) -> None:
            nonlocal same
            same = same and found

        for start in range(0, shape[0] if same else 0, step):
            rows = slice(start, min(shape[0], start + step))
            self._submit(self._pool, partial(equal, rows), then)
            self._wait(2 * self._budget.workers)
        self._wait(0)
        if not same:
            raise InputError(
                f"{self._checkpoint.path}: {head} differs from {embedding}, but config.json says "
                "tie_word_embeddings: true",
                hint="set it to false to use the head, or remove the tensor",
            )

    def _convert(self, progress: Progress | None) -> None:
        self.kept = sum(self._shards[index].nbytes for index in self._sealed)
        finished = frozenset(self._sealed)
        place = {r.name: i for i, shard in enumerate(self._shards) for r in shard.records}
        self._needs = {
            param.spec.name: {place[stored.name] for stored in param.stored}
            for param in self.plan.params
        }
        redone = {name for name, shards in self._needs.items() if not shards <= finished}
        for name in redone:
            self._sums[name] = Sums()
        convert = Converter(
            self._checkpoint, self._writer, self._packing, finished, self._budget.mapped
        )
        self._missing = dict.fromkeys(set(range(len(self._shards))) - finished, 0)
        todo = []
        total = done = 0
        for block in blocks(self.plan, self._checkpoint, self._budget.block_elements):
            total += block.source_bytes
            if block.param.spec.name not in redone:
                done += block.source_bytes
                continue
            todo.append(block)
            for index in self._needs[block.param.spec.name] - finished:
                self._missing[index] += 1
        label = self.plan.params[0].spec.name
        if progress is not None and todo:
            progress(label, done, total)

        def then(block: Block, sums: Sums) -> None:
            nonlocal done, label
            done += block.source_bytes
            label = block.param.spec.name
            self._count(block, sums, finished)
            if progress is not None and done < total:
                progress(label, done, total)

        depth = 2 * self._budget.workers
        for block in todo:
            self._hash_sources()
            self._submit(
                self._pool,
                partial(convert, block),
                partial(then, block),
            )
            self._wait(depth)
        while self._pending or self._ready or not self.sources.complete:
            # The last blocks are in: what they complete no longer waits for a full batch.
            if self._ready and not any(self._missing.values()):
                self._hash_ready(self._budget.workers)
            self._hash_sources(every=True)
            self._wait(max(0, len(self._pending) - 1))
        if progress is not None:
            progress(label, total, total)

    def _count(self, block: Block, sums: Sums, finished: frozenset[int]) -> None:
        """Notes a block that is done and seals the shards that it completes."""
        name = block.param.spec.name
        self._sums[name].add(sums)
        for index in self._needs[name] - finished:
            self._missing[index] -= 1
            if not self._missing[index]:
                sync = partial(self._writer.sync, index)
                self._synced[index] = self._submit(self._disk, sync, _nothing)
                self._ready.append(index)
        waited = time.monotonic() - self._hashed_at
        if len(self._ready) >= self._batch or (self._ready and waited >= PATIENCE):
            self._hash_ready(1)

    def _hash_ready(self, parts: int) -> None:
        """Puts the hashing of complete shards into work, cut into parts of about one size."""
        ready, self._ready = self._ready, []
        self._hashed_at = time.monotonic()
        batches: list[list[int]] = [[] for _ in range(min(parts, len(ready)))]
        sizes = [0] * len(batches)
        for index in sorted(ready, key=lambda index: -self._shards[index].nbytes):
            least = sizes.index(min(sizes))
            batches[least].append(index)
            sizes[least] += self._shards[index].nbytes
        for batch in batches:
            seal = partial(self._writer.seal, batch, self._packing.hasher)
            self._submit(self._pool, seal, partial(self._seal, batch))

    def _seal(self, batch: Sequence[int], found: Sequence[SealedShard]) -> None:
        for index, sealed in zip(batch, found, strict=True):
            self._seal_one(index, sealed)

    def _seal_one(self, index: int, sealed: SealedShard) -> None:
        self._sealed[index] = sealed
        held = {record.name for record in sealed.shard.records}
        sums = {
            param.spec.name: self._sums[param.spec.name].total
            for param in self.plan.params
            if any(stored.name in held for stored in param.stored)
        }
        entry = {"shard": sealed.shard.file, "sha256": sealed.sha256, "sums": sums}
        synced = self._synced.pop(index)

        def keep() -> None:
            synced.result()  # the journal tells of nothing that is not on the disk
            self._journal.append(entry)

        self._submit(self._disk, keep, _nothing)

    def _hash_sources(self, *, every: bool = False) -> None:
        """Puts the next piece of a source file to be hashed into work, or one of every file."""
        for step in self.sources.steps(every=every):
            self._submit(self._pool, step, self._journal_source)

    def _journal_source(self, entry: Mapping[str, Any] | None) -> None:
        if entry is not None:
            self._submit(self._disk, partial(self._journal.append, entry), _nothing)


def _nothing(_: Any) -> None:
    pass
