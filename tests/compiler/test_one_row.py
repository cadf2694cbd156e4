"""Functions for any number of rows run the one-row functions when there is one row."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from compiler_configs import write_config
from decoders import Decoder, planned_decoder
from tvm import relax

from mlc_compile.nn.export import ANY_ROWS

WITH_ONE_ROW = {
    "prefill": "decode",
    "batch_prefill": "decode",
    "batch_decode": "decode",
    "batch_verify": "decode",
    "prefill_tokens": "decode_tokens",
    **{
        f"{name}_to_last_hidden_states": "decode_to_last_hidden_states"
        for name in ("prefill", "batch_prefill", "batch_decode", "batch_verify")
    },
}
TOKENS = (3, 90, 7, 41)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_config(tmp_path_factory.mktemp("one_row"), "qwen3", "q4f32_1", head_dim=32)


@pytest.fixture(scope="module")
def decoder(folder: Path) -> Decoder:
    return Decoder.build(folder, "O2")


def test_which_functions_ask(folder: Path) -> None:
    mod = planned_decoder(folder, "O2")
    found = {}
    for gv, func in mod.functions_items():
        if not isinstance(func, relax.Function):
            continue
        values = [b.value for block in func.body.blocks for b in block.bindings]
        choices = [value for value in values if isinstance(value, relax.If)]
        for choice in choices:
            one, many = (
                next(
                    b.value.op.name_hint
                    for block in branch.blocks
                    for b in block.bindings
                    if hasattr(getattr(b.value, "op", None), "name_hint")
                )
                for branch in (choice.true_branch, choice.false_branch)
            )
            assert many == gv.name_hint + ANY_ROWS
            found[gv.name_hint] = one
    assert found == WITH_ONE_ROW


class Sequence:
    """Feeds tokens one at a time by one function; a new sequence for each instance."""

    count = 0

    def __init__(self, decoder: Decoder, name: str) -> None:
        self.decoder, self.name = decoder, name
        Sequence.count += 1
        self.id = Sequence.count
        decoder.add(self.id)

    def feed(self, *tokens: int) -> np.ndarray[Any, Any]:
        lead = (len(tokens), 1) if self.name.startswith("batch_decode") else (1, len(tokens))
        ids = self.name.endswith("_tokens")
        x = self.decoder.ids(tokens) if ids else self.decoder.embed(tokens, *lead)
        at = [self.decoder.ids([len(tokens) - 1])] if self.name == "batch_prefill" else []
        return self.decoder.forward(self.name, [self.id], [len(tokens)], x, *at)

    def close(self) -> None:
        self.decoder._state("remove_sequence", self.id)


@pytest.mark.parametrize("name", WITH_ONE_ROW)
def test_one_row_gives_the_bits_of_decode(decoder: Decoder, name: str) -> None:
    by_decode, by_name = Sequence(decoder, WITH_ONE_ROW[name]), Sequence(decoder, name)
    for token in TOKENS:
        expected, found = by_decode.feed(token), by_name.feed(token)
        assert found.shape == expected.shape
        np.testing.assert_array_equal(found, expected)
    by_decode.close(), by_name.close()


@pytest.mark.parametrize("name", [n for n in WITH_ONE_ROW if n.startswith(("pre", "batch_v"))])
def test_more_rows_give_the_same_logits_as_one_by_one(decoder: Decoder, name: str) -> None:
    by_decode, by_name = Sequence(decoder, WITH_ONE_ROW[name]), Sequence(decoder, name)
    expected = np.concatenate([by_decode.feed(token)[0] for token in TOKENS])
    found = by_name.feed(*TOKENS)[0]
    np.testing.assert_allclose(found, expected[-len(found) :], rtol=0, atol=1e-4 * expected.max())
    by_decode.close(), by_name.close()


@pytest.mark.parametrize("name", ["batch_decode", "batch_decode_to_last_hidden_states"])
def test_a_batch_of_two_gives_each_its_own_row(decoder: Decoder, name: str) -> None:
    alone = [Sequence(decoder, WITH_ONE_ROW[name]) for _ in range(2)]
    expected = [sequence.feed(token)[0] for sequence, token in zip(alone, TOKENS, strict=False)]
    for sequence in alone:
        sequence.close()
    together = [Sequence(decoder, name) for _ in range(2)]
    ids, x = [s.id for s in together], decoder.embed(TOKENS[:2], 2, 1)
    found = decoder.forward(name, ids, [1, 1], x)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * np.abs(expected).max())
    for sequence in together:
        sequence.close()
