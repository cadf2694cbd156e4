"""The workspace of a transformer stack from numbers alone: its kernels, and the storages that TVM
gives their results.

The kernels are those that every fusion leaves (compiler/passes/); each option of `models.options`
adds its own. Which storage a result gets is StaticPlanBlockMemory's rule, followed exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from mlc_compile.config import ModelConfig
from mlc_compile.models import options
from mlc_compile.models.spec import Model

FLOAT32 = 4


class StoragePool:
    """TVM's StaticPlanBlockMemory in numbers: which storage the next tensor gets.

    A tensor takes the smallest free storage that holds it; if none does, the largest free one is
    enlarged; a storage more than 16 times larger or smaller is not considered (TVM 0.27,
    static_plan_block_memory).
    """

    _MATCH_RANGE = 16

    def __init__(self) -> None:
        self.storages: list[int] = []  # bytes, by number
        self.free: list[int] = []

    def take(self, size: int) -> int:
        """The number of the storage that a tensor of `size` bytes is put into."""
        near = [
            i
            for i in self.free
            if size // self._MATCH_RANGE <= self.storages[i] <= size * self._MATCH_RANGE
        ]
        holding = [i for i in near if self.storages[i] >= size]
        if near:
            chosen = (
                min(holding, key=self.storages.__getitem__)
                if holding
                else max(near, key=self.storages.__getitem__)
            )
            self.free.remove(chosen)
            self.storages[chosen] = max(self.storages[chosen], size)
            return chosen
        self.storages.append(size)
        return len(self.storages) - 1


@dataclass
class Kernels:
    """Kernels in order; tensors are numbered, and -1 is one that somebody else holds."""

    sizes: list[int] = field(default_factory=list)
    steps: list[tuple[list[int], list[int]]] = field(default_factory=list)

    def add(self, inputs: Sequence[int], *outputs: int) -> int:
        """A kernel with results of so many bytes; the number of the first one."""
        first = len(self.sizes)
        self.sizes += outputs
        made = list(range(first, len(self.sizes)))
        self.steps.append((made, [i for i in inputs if i >= 0]))
        return first

    def storages(self) -> int:
        """Bytes of all storages. A kernel's results are placed while its inputs are still held; a
        tensor's storage is free after the last kernel that reads it."""
        last = {tensor: step for step, (_, inputs) in enumerate(self.steps) for tensor in inputs}
        pool, held = StoragePool(), dict[int, int]()
        for step, (made, inputs) in enumerate(self.steps):
            for tensor in made:
                held[tensor] = pool.take(self.sizes[tensor])
            for tensor in dict.fromkeys([*inputs, *made]):
                if last.get(tensor, step) == step:
                    pool.free.append(held[tensor])
        return sum(pool.storages)


class _Stack:
    """Makes the kernels of one stack of `rows` rows."""

    def __init__(self, model: Model, rows: int, element_bytes: int) -> None:
        self.arch, self.config = model.arch, model.config
        self.rows = rows
        self.row_bytes = rows * element_bytes
        self.hidden = self.row_bytes * model.config.hidden_size
        self.kernels = Kernels()
        self.turns: dict[object, int] = {}

    def build(self) -> int:
        """Bytes of the storages and of the result, which is handed out and not planned."""
        c, add = self.config, self.kernels.add
        x = -1
        if c.embedding_scale != 1.0:
            x = add([x], self.hidden)
        first = self.first_norm()
        if isinstance(self.arch.positions, options.Learned):
            x, normed = self.sum([x, add([], self.hidden)], first)
        else:
            if self.arch.embed_norm:
                x = add([x], self.hidden)
            normed = add([x], self.hidden) if first else x
        for i in range(c.num_hidden_layers):
            final = i == c.num_hidden_layers - 1
            x, normed = self.layer(i, x, normed, self.arch.final_norm if final else first)
        if self.kernels.steps:  # the last kernel's first result is what the stack gives
            made, inputs = self.kernels.steps[-1]
            self.kernels.steps[-1] = (made[1:] if len(made) == 1 else [], inputs)
        return self.kernels.storages() + self.hidden

    def first_norm(self) -> bool:
        """Whether a layer begins with a norm."""
        return self.arch.block.input_norms

    def layer(self, i: int, x: int, normed: int, next_norm: bool) -> tuple[int, int]:
        """One layer of the hidden state x; its sum and that sum's norm, if one comes next."""
        block = self.arch.block
        attended = self.output(self.attention(i, normed))
        if block.parallel is True:
            read = normed
            if block.input_norms and not block.shared_norm:
                read = self.kernels.add([x], self.hidden)
            given = self.output(self.feed_forward(i, read))
            return self.sum([attended, given, x], next_norm)
        x, read = self.sum([x, attended], block.input_norms)
        return self.sum([x, self.output(self.feed_forward(i, read))], next_norm)

    def output(self, y: int) -> int:
        """What attention or MLP gave, normed and scaled as the model has it."""
        if self.arch.block.output_norms:
            y = self.kernels.add([y], self.hidden)
        if self.config.residual_scale != 1.0 and self.arch.block.parallel is not True:
            # a scale is fused into an addition, but not into one that is fused into a norm
            y = self.kernels.add([y], self.hidden) if self.fused_sum() else y
        return y

    def fused_sum(self) -> bool:
        """Whether an addition and the norm behind it are one kernel."""
        return self.arch.block.input_norms

    def sum(self, terms: list[int], norm: bool) -> tuple[int, int]:
        add = self.kernels.add
        if norm:
            if len(terms) == 3:
                terms = [terms[2], add(terms[:2], self.hidden)]
            both = add(terms, self.hidden, self.hidden)
            return both + 1, both
        x = add(terms, self.hidden)
        return x, x

    def attention(self, i: int, x: int) -> int:
        c, add = self.config, self.kernels.add
        q = self.row_bytes * c.num_attention_heads * c.head_dim
        kv = self.row_bytes * c.num_key_value_heads * c.head_dim
        cached = self.row_bytes * c.cache_head_dim
        qkv = add([x], q + 2 * kv)
        moved = self.moved(i)  # further work on q and k, which one kernel does
        qk_norm = self.arch.attention.qk_norm
        if qk_norm is not None:
            plain = isinstance(qk_norm.norm, options.RMSNorm) and qk_norm.over == "head"
            if plain:
                qkv = add([qkv], q + 2 * kv)
            else:
                parts = add([qkv], q, kv, kv)
                normed = [add([parts], q), add([parts + 1], kv)]
                size = self.moved_bytes(q + 2 * kv)
                qkv = add([*normed, parts + 2, *moved], size)
                moved = []
        if moved or (c.clip_qkv is not None and qk_norm is None) or self.moves_here(i, qk_norm):
            qkv = add([qkv, *moved], self.moved_bytes(q + 2 * kv))
        out = add([qkv], c.num_attention_heads * cached)
        if c.extra_head_dim:
            out = add([out], q, c.num_attention_heads * (cached - self.row_bytes * c.head_dim))
        return add([out], self.hidden)

    def moves_here(self, i: int, qk_norm: options.HeadNorm | None) -> bool:
        return self.config.extra_head_dim > 0 and qk_norm is None

    def moved_bytes(self, qkv: int) -> int:
        """Of q, k and v as the cache takes them."""
        return qkv // self.config.head_dim * self.config.cache_head_dim

    def moved(self, i: int) -> list[int]:
        """The rotary table of a layer that is not rotated in the cache."""
        c, rope = self.config, self.config.layers[i].rope
        if c.cache_rotates or rope is None:
            return []
        if rope not in self.turns:
            self.turns[rope] = self.kernels.add([], self.rows * rope.rotary_dim * FLOAT32)
        return [self.turns[rope]]

    def feed_forward(self, i: int, x: int) -> int:
        option = self.arch.feed_forward(self.config.layers[i].sparse)
        if isinstance(option, options.SparseMLP):
            return self.experts(option, x)
        return self.dense(option, x, self.config.intermediate_size)

    def dense(self, option: options.GatedMLP | options.MLP, x: int, width: int) -> int:
        inner, add = self.row_bytes * width, self.kernels.add
        gated = isinstance(option, options.GatedMLP)
        wide = add([x], 2 * inner if gated else inner)
        return add([add([wide], inner)], self.hidden)

    def experts(self, option: options.SparseMLP, x: int) -> int:
        numbers, add = self.config.experts, self.kernels.add
        assert numbers is not None
        k, word = numbers.per_token, self.rows * FLOAT32
        logits = add([x], numbers.count * word)
        chosen = add([add([logits], numbers.count * word)], k * word)
        divided = option.renormalize is True or option.score == "softmax"
        total = [add([logits, chosen], word)] if divided else []
        weights = add([logits, chosen, *total], k * word)
        inner = self.row_bytes * k * numbers.intermediate_size
        gated = add([add([x, chosen], 2 * inner)], inner)
        terms = [weights, add([gated, chosen], k * self.hidden)]
        if numbers.shared_intermediate_size:
            terms.append(self.dense(option.dense, x, numbers.shared_intermediate_size))
            if option.shared == "gated":
                terms.append(add([x], word))
        return add(terms, self.hidden)


def stack_workspace(model: Model, rows: int, element_bytes: int) -> int:
    """Storages and result of the transformer stack with every fusion on, in bytes."""
    return _Stack(model, rows, element_bytes).build()


def logits_bytes(config: ModelConfig, element_bytes: int, head_bias: bool) -> int:
    """Of one row of logits: the result, and what it is scaled, capped or biased from."""
    scaled = config.logits_scale != 1.0 or config.logits_softcap is not None
    biased = head_bias and element_bytes != FLOAT32
    return config.vocab_size * FLOAT32 * (2 if scaled or biased else 1)
