"""The path of ``relative_bias_attention`` that devices other than the CPU take: all samples padded to the longest.

Here it runs on the CPU, from the reference's own source with its question for the CPU answered by no.
"""

import importlib
import inspect
import re
import sys
import types

import pytest
import torch
from support import contract
from support.attention_cases import Batch, kept_grid, mixed, series, text_only
from support.contract import normal
from support.plans import naive_layout, whole_rows

from onepeace_fast.ops import operation
from onepeace_fast.structures import (
    AttentionGradients,
    AttentionInputs,
    AttentionSaved,
    RelativeBias,
    Segments,
    VectorGradients,
)

NAME = "relative_bias_attention"


@pytest.fixture
def padded(monkeypatch):
    """The op's module as it behaves elsewhere; nothing is registered."""
    monkeypatch.setattr(operation, "Operation", lambda *args, **keywords: None)
    asked = False
    for name in ("segments", NAME):
        full_name = f"onepeace_fast.ops.{name}"
        source = inspect.getsource(importlib.import_module(full_name))
        elsewhere = re.sub(r"""(\.device\.type [!=]= )(["'])cpu\2""", r'\1"none"', source)
        asked |= elsewhere != source
        copy = types.ModuleType(full_name)
        monkeypatch.setitem(sys.modules, full_name, copy)
        exec(compile(elsewhere, f"<{full_name}>", "exec"), copy.__dict__)
    assert asked, "the reference no longer asks for the CPU: test what it asks for instead"
    return copy


def run(module: types.ModuleType, batch: Batch, leaves: dict, max_length: int | None = None) -> dict[str, torch.Tensor]:
    """The reference's results and all gradients, by module's code."""
    arguments = batch.arguments | ({} if max_length is None else {"max_length": max_length})
    bias = [leaves[f"table{m}"][table.entries].t() for m, table in enumerate(batch.tables)]
    segments = Segments(*(arguments[name] for name in Segments._fields))
    places = (segments, RelativeBias(bias, tuple(table.offset for table in batch.tables)), leaves["head_scale"])
    forward, backward = (getattr(module, f"{NAME}{kind}_reference") for kind in ("", "_backward"))
    out, total = forward(AttentionInputs(leaves["qkv"], *places, 0.5))
    given = normal(*out.shape, seed=5, dtype=out.dtype)
    needs = AttentionGradients(True, VectorGradients([True] * len(bias)), True)
    dqkv, (dbias,), dscale = backward(AttentionSaved(given, leaves["qkv"], *places, total, 0.5), needs)
    return {"out": out, "dqkv": dqkv, "dscale": dscale} | {f"dbias{m}": value for m, value in enumerate(dbias)}


BATCHES = {
    "text": text_only,
    "kept grid": kept_grid,
    "mixed": mixed,
    "a sample without tokens": lambda: Batch(naive_layout(whole_rows({"text": [0, 3, 2]})), (series(4, 3),)),
    "no sample": lambda: Batch(naive_layout(whole_rows({"text": []})), (series(4, 3),)),
}


@pytest.mark.parametrize("name", BATCHES)
def test_padded_samples_give_what_samples_of_their_own_length_give(monkeypatch, padded, name):
    batch = BATCHES[name]()
    leaves = batch.leaves()
    expected = run(importlib.import_module(f"onepeace_fast.ops.{NAME}"), batch, leaves)
    for longer, pairs in ((0, 2**22), (3, 2**22), (0, 1)) if batch.layout.samples else ((0, 1),):
        monkeypatch.setattr(sys.modules["onepeace_fast.ops.segments"], "PAIRS_OF_A_DEVICE_GROUP", pairs)
        actual = run(padded, batch, leaves, batch.layout.max_length + longer)
        for key, value in expected.items():
            torch.testing.assert_close(actual[key], value, rtol=1e-11, atol=1e-11, msg=key)


def test_nan_in_another_sample_does_not_leak_through_padding(padded):
    batch = mixed()
    leaves = batch.leaves()
    expected = run(padded, batch, leaves)
    for sample in range(batch.layout.samples):
        rows = batch.layout.rows_of(sample)
        others = [row for row in range(batch.layout.capacity) if row not in rows]
        poisoned = {**leaves, "qkv": leaves["qkv"].clone()}
        poisoned["qkv"][rows] = torch.nan
        actual = run(padded, batch, poisoned)
        for key in ("out", "dqkv"):
            assert torch.equal(actual[key][others], expected[key][others]), (sample, key)


def test_large_scores_of_another_sample_do_not_leak_through_padding(padded):
    batch = mixed()
    leaves = {name: leaf.float() for name, leaf in batch.leaves().items()}
    leaves["qkv"] = leaves["qkv"].clone()
    leaves["qkv"][0] *= 1e3
    actual = run(padded, batch, leaves)
    assert all(value.isfinite().all() for value in actual.values())
    contract.assert_same_gradients(run(padded, batch, leaves), actual, "repeat")
