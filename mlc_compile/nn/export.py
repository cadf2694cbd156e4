"""The exported functions of a model library: the decoder ABI, defined here and nowhere else.

Names and signatures are those that web-llm and the MLC runtimes look up (notes/mlc-format.md,
section 4); `prefill_tokens`/`decode_tokens` go from token ids to logits in one call. H is the
hidden size, V the vocabulary, dt the model dtype, n tokens, b sequences; `params` is one packed
tuple in metadata order.

The transformer stack is emitted twice, for any number of rows and for exactly one, and every
exported function calls one of the two: a library holds each layer's code twice instead of twelve
times. A function for any number of rows asks at each call whether there is just one, and if so
calls `decode` or its like: a batch of one sequence is as fast as a single one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tvm import relax, te, tirx
from tvm.ir import IRModule
from tvm.relax import BlockBuilder
from tvm.relax.frontend.nn import Tensor, op

from mlc_compile.config import NO_ROPE, CompileConfig, rope_context
from mlc_compile.models.spec import Model
from mlc_compile.nn.decoder import Decoder, build_decoder
from mlc_compile.nn.kv_cache import KernelFactory, PagedKVCache, create_kv_cache
from mlc_compile.nn.linear import LayerFactory
from mlc_compile.quantization.policy import StoredParam

STACK = "transformer"
STACK_ONE = "transformer_one"
STACK_BATCH = "transformer_batch"
ANY_ROWS = "_any_rows"
"""Ends the name of the function behind an exported one, for more than one row."""
CAPTURED_ROWS = "relax.rewrite_cuda_graph.capture_symbolic_vars"
"""TVM's attribute: extents for whose every value a graph may be captured."""


def is_private(name: str) -> bool:
    """Whether a function is no entry for the library's callers."""
    # TVM's own notion of a private function would have every stack take each parameter by itself.
    return name in (STACK, STACK_ONE, STACK_BATCH) or name.endswith(ANY_ROWS)


@dataclass(frozen=True)
class Arg:
    """A tensor argument; string extents are symbolic."""

    name: str
    shape: tuple[int | str, ...]
    dtype: str


class Exporter:
    """Emits the functions of one decoder into a Relax module.

    `params` fixes the order and the types of the packed tuple; a decoder whose parameters differ
    from it in name, shape or dtype is a bug and raises AssertionError.
    """

    def __init__(self, decoder: Decoder, params: Sequence[StoredParam], dtype: str) -> None:
        self.decoder = decoder
        self.dtype = dtype
        self.hidden_size = decoder.hidden_size
        self.builder = BlockBuilder()
        held = dict(decoder.named_parameters())
        assert sorted(held) == sorted(p.name for p in params), (
            set(held) ^ {p.name for p in params},
        )
        self.parameters = [held[p.name] for p in params]
        for stored, parameter in zip(params, self.parameters, strict=True):
            shape = tuple(int(extent) for extent in parameter.shape)
            assert (shape, str(parameter.dtype)) == (stored.shape, stored.dtype), stored
        self.stack: relax.GlobalVar
        self.stack_one: relax.GlobalVar
        self.stack_batch: relax.GlobalVar
        self.functions: dict[str, relax.GlobalVar] = {}

    def export(
        self, create_cache: Callable[..., PagedKVCache], *, captured_batch: bool = False
    ) -> IRModule:
        """All functions that need the weights or the cache; sampling is attached by nn/sampling.py.

        create_cache makes the cache from the five symbolic sizes of its MLC signature.
        captured_batch: batched decoding gets a stack of its own, whose launches may be captured
        into a graph for each number of rows (prefill has too many numbers of rows for that).
        """
        h, dt = self.hidden_size, self.dtype
        self.stack = self._stack(STACK, "n")
        self.stack_one = self._stack(STACK_ONE, 1)
        self.stack_batch = (
            self._stack(STACK_BATCH, "batch_size", captured=True) if captured_batch else self.stack
        )

        ids = Arg("input_ids", ("seq_len",), "int32")
        states_arg = Arg("hidden_states", ("seq_len", h), dt)
        positions = Arg("logit_positions", ("batch_size",), "int32")
        one = Arg("input_embed", (1, 1, h), dt)
        prompt = Arg("input_embed", (1, "seq_len", h), dt)
        ragged = Arg("input_embeds", (1, "seq_len", h), dt)
        batch = Arg("input_embeds", ("batch_size", 1, h), dt)

        define = self._define
        decoder = self.decoder
        define("embed", [ids], lambda x: decoder.embed(x), cache=False)
        define("get_logits", [states_arg], lambda x: decoder.logits(x), cache=False)
        define(
            "batch_select_last_hidden_states",
            [states_arg, positions],
            _select_rows,
            cache=False,
            params=False,
        )

        def rows(x: Tensor, c: relax.Var) -> Tensor:
            return self._call(self.stack, x, c)

        def one_row(x: Tensor, c: relax.Var) -> Tensor:
            return self._call(self.stack_one, x, c)

        def batch_rows(x: Tensor, c: relax.Var) -> Tensor:
            return self._call(self.stack_batch, x, c)

        # name, arguments, the stack, the rows of its result that the logits are of
        Rows = Callable[..., Tensor]
        stacks: list[tuple[str, list[Arg], Rows, Rows]] = [
            ("decode", [one], one_row, _all_rows),
            ("prefill", [prompt], rows, _last_row),
            ("batch_prefill", [ragged, positions], rows, _select_rows),
            ("batch_decode", [batch], batch_rows, _all_rows),
            ("batch_verify", [ragged], rows, _all_rows),
        ]
        for name, args, stack, select in stacks:
            column = name == "batch_decode"  # [b, 1, ...]; all others are [1, rows, ...]

            def logits(
                *a: Tensor, stack: Rows = stack, select: Rows = select, column: bool = column
            ) -> Tensor:
                x, *at, c = a
                return _unflatten(decoder.logits(select(stack(x, c), *at)), column)

            def hidden_states(
                x: Tensor, c: relax.Var, stack: Rows = stack, column: bool = column
            ) -> Tensor:
                return _unflatten(stack(x, c), column)

            define(name, args, logits, one="decode")
            to_states = "_to_last_hidden_states"
            define(f"{name}{to_states}", args[:1], hidden_states, one=f"decode{to_states}")
        tokens_of = {"decode": Arg("input_ids", (1,), "int32"), "prefill": ids}
        for name, _, stack, select in stacks[:2]:

            def from_tokens(
                x: Tensor, c: relax.Var, stack: Rows = stack, select: Rows = select
            ) -> Tensor:
                return _unflatten(decoder.logits(select(stack(decoder.embed(x), c))), column=False)

            define(f"{name}_tokens", [tokens_of[name]], from_tokens, one="decode_tokens")
        self._create_kv_cache(create_cache)
        return self.builder.finalize()

    def _stack(self, name: str, rows: int | str, *, captured: bool = False) -> relax.GlobalVar:
        """Function (hidden dt[rows, H], cache, params) -> dt[rows, H] after the final norm."""
        attrs: dict[str, object] = {"num_input": 2}
        if captured:
            attrs[CAPTURED_ROWS] = [rows]
        extent = tirx.Var(rows, "int64") if isinstance(rows, str) else rows
        ty = relax.TensorType([extent, self.hidden_size], self.dtype)
        x, cache = relax.Var("hidden_states", ty), relax.Var("paged_kv_cache", relax.AnyType())
        packed = self._packed_params()
        # num_input: the parameters' types, which the caller has checked, are not checked again
        with self.builder.function(name, [x, cache, packed], attrs=attrs):
            with self.builder.dataflow():
                self._bind(packed)
                y = self.decoder.hidden_states(
                    Tensor(_expr=x), PagedKVCache(_expr=cache, _name="paged_kv_cache")
                )
                out = self.builder.emit_output(y._expr)
            return self.builder.emit_func_output(out)

    def _call(self, stack: relax.GlobalVar, x: Tensor, cache: relax.Var) -> Tensor:
        """Hidden states [n, H] of embeddings [..., H]."""
        flat = x if len(x.shape) == 2 else _flatten(x)
        call = relax.Call(stack, [flat._expr, cache, self._packed])
        return Tensor(_expr=self.builder.emit(call))

    def _define(
        self,
        name: str,
        args: Sequence[Arg],
        body: Callable[..., Tensor],
        *,
        cache: bool = True,
        params: bool = True,
        one: str | None = None,
    ) -> None:
        """Exported function (args..., cache?, params?) -> body's tensor, with the cache when it has
        one.

        one: the function to call instead where the first argument has a single row; it takes that
        row in a tensor of as many dimensions, the cache and the parameters.
        """
        chooses = one is not None and any(isinstance(e, str) for e in args[0].shape)
        own = name + ANY_ROWS if chooses else name
        tensors = _variables(args)
        state = [relax.Var("paged_kv_cache", relax.AnyType())] if cache else []
        packed = [self._packed_params()] if params else []
        inputs = [*tensors, *state, *packed]
        attrs = {"num_input": len(tensors) + len(state)}
        with self.builder.function(own, inputs, attrs=attrs):
            with self.builder.dataflow():
                if params:
                    self._bind(packed[0])
                y = body(*(Tensor(_expr=t) for t in tensors), *state)._expr
                out = self.builder.emit_output(relax.Tuple([y, *state]) if cache else y)
            self.functions[name] = self.builder.emit_func_output(out)
        if one is not None and chooses:
            self._choose(name, args, self.functions[one], self.functions[name], attrs)

    def _choose(
        self,
        name: str,
        args: Sequence[Arg],
        one: relax.GlobalVar,
        rows: relax.GlobalVar,
        attrs: dict[str, int],
    ) -> None:
        """Exported function that calls `one` or `rows`; see `_define`."""
        tensors = _variables(args)
        cache, packed = relax.Var("paged_kv_cache", relax.AnyType()), self._packed_params()
        extents = tensors[0].ty.shape.values
        (count,) = (e for e in extents if isinstance(e, tirx.Var))
        row = relax.op.reshape(tensors[0], [1 if e.same_as(count) else e for e in extents])
        with self.builder.function(name, [*tensors, cache, packed], attrs=attrs):
            choice = relax.If(
                relax.prim_value(count == 1),
                relax.Call(one, [row, cache, packed]),
                relax.Call(rows, [*tensors, cache, packed]),
            )
            self.builder.emit_func_output(self.builder.emit(choice))

    def _packed_params(self) -> relax.Var:
        types = [relax.TensorType(list(p.shape), p.dtype) for p in self.parameters]
        return relax.Var("packed_params", relax.TupleType(types))

    def _bind(self, packed: relax.Var) -> None:
        """Make the decoder's parameters the fields of this function's tuple; unused ones are
        dropped later."""
        self._packed = packed
        for i, parameter in enumerate(self.parameters):
            parameter._expr = self.builder.emit(relax.TupleGetItem(packed, i))

    def _create_kv_cache(self, create_cache: Callable[..., PagedKVCache]) -> None:
        """create_tir_paged_kv_cache(max_batch, max_total_seq, prefill_chunk, page_size,
        sliding)."""
        names = (
            "max_batch_size",
            "max_total_seq_len",
            "prefill_chunk_size",
            "page_size",
            "support_sliding_window",
        )
        sizes = {name: tirx.Var(name, "int64") for name in names}
        args = [relax.Var(f"{name}_", relax.ShapeType([size])) for name, size in sizes.items()]
        with self.builder.function("create_tir_paged_kv_cache", args):
            with self.builder.dataflow():
                cache = self.builder.emit(create_cache(**sizes)._expr)
                out = self.builder.emit_output(cache)
            self.builder.emit_func_output(out)


def export_decoder(
    model: Model,
    layers: LayerFactory,
    params: Sequence[StoredParam],
    config: CompileConfig,
    kernels: KernelFactory,
    *,
    captured_batch: bool = False,
) -> IRModule:
    """The module of `model` with the weight layers of a scheme and the cache kernels of a target.

    `params` lists what is stored, in the order of the packed tuple. captured_batch: see
    Exporter.export.
    """
    c = model.config
    context = rope_context(c, config)
    inv_freq, attention_factor = NO_ROPE.table(context)
    if c.cache_rotates:
        inv_freq, attention_factor = c.rope.table(context)
    # a window that no text outgrows hides nothing
    layer_window = c.layer_window if (c.layer_window or 0) < config.kv_tokens else None

    def create_cache(**sizes: tirx.Var) -> PagedKVCache:
        return create_kv_cache(
            kernels=kernels,
            num_layers=c.num_hidden_layers,
            num_qo_heads=c.num_attention_heads,
            num_kv_heads=c.num_key_value_heads,
            head_dim=c.cache_head_dim,
            dtype=layers.dtype,
            inv_freq=inv_freq,
            attention_factor=attention_factor,
            sliding_window=config.sliding_window_size if config.sliding_window_size > 0 else None,
            attention_sink=max(config.attention_sink_size, 0),
            softcap=c.attention_softcap,
            layer_window=layer_window,
            **sizes,
        )

    exporter = Exporter(build_decoder(model, layers, context), params, layers.dtype)
    return exporter.export(create_cache, captured_batch=captured_batch)


def _variables(args: Sequence[Arg]) -> list[relax.Var]:
    """Function parameters of these tensors; equal names are equal extents."""
    extents: dict[str, tirx.Var] = {}

    def extent(e: int | str) -> int | tirx.Var:
        return extents.setdefault(e, tirx.Var(e, "int64")) if isinstance(e, str) else e

    return [
        relax.Var(a.name, relax.TensorType([extent(e) for e in a.shape], a.dtype)) for a in args
    ]


def _flatten(x: Tensor) -> Tensor:
    a, b, width = x.shape
    return op.reshape(x, (a * b, width))


def _unflatten(x: Tensor, column: bool) -> Tensor:
    """[m, width] -> [m, 1, width] (column) or [1, m, width]."""
    m, width = x.shape
    return op.reshape(x, (m, 1, width) if column else (1, m, width))


def _all_rows(x: Tensor) -> Tensor:
    return x


def _select_rows(x: Tensor, positions: Tensor) -> Tensor:
    """Rows of x [n, H] at positions int32 [b] -> [b, H]."""

    def select(rows: te.Tensor, at: te.Tensor) -> te.Tensor:
        shape = (at.shape[0], rows.shape[1])
        return te.compute(shape, lambda i, j: rows[at[i], j], name="select_rows")

    return op.tensor_expr_op(select, "select_rows", [x, positions])


def _last_row(x: Tensor) -> Tensor:
    """[n, H] -> [1, H]."""

    def last(rows: te.Tensor) -> te.Tensor:
        shape = (tirx.IntImm("int64", 1), rows.shape[1])
        return te.compute(shape, lambda i, j: rows[rows.shape[0] - 1 + i, j], name="last_row")

    return op.tensor_expr_op(last, "last_row", [x])
