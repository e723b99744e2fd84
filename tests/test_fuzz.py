"""Readers of strangers' files against any bytes: they accept or refuse, and nothing else."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import deserialize
from safetensors.torch import save

from fastmerge.checkpoint import CheckpointError
from fastmerge.checkpoint.header import ITEM_SIZES, format_header, header_length, parse_header
from fastmerge.checkpoint.index import parse_index

from .checkpoints import dense, entry

SECONDS = 6

NAMES = st.text(max_size=6) | st.sampled_from(["a", "b", "__metadata__"])
NUMBERS = st.integers(-2, 20) | st.sampled_from([2**31, 2**63, 2**64, 2**200, 0.5, True, None])
ENTRIES = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from([*ITEM_SIZES, "F4", "", None]),
        "shape": st.lists(NUMBERS, max_size=4) | st.none(),
        "data_offsets": st.lists(NUMBERS, max_size=3),
    }
)
VALUES = st.recursive(st.none() | st.text(max_size=3) | NUMBERS, st.lists, max_leaves=3)
HEADERS = st.dictionaries(NAMES, ENTRIES | VALUES, max_size=4)
SHAPES = st.lists(st.integers(0, 3), max_size=3).map(tuple)


def read(data):
    length = header_length(data[:8], len(data), "file")
    return parse_header(data[8 : 8 + length], len(data), "file")


def accepts(data):
    """Whether a file is accepted; if so, it is as the safetensors library reads it."""
    try:
        header = read(data)
    except CheckpointError:
        return False
    expected = dict(deserialize(data))
    assert set(header.tensors) == set(expected)
    for name, extent in header.tensors.items():
        assert data[extent.start : extent.stop] == bytes(expected[name]["data"])
        assert list(extent.shape) == expected[name]["shape"]
    return True


def with_length(text, data=b""):
    return len(text).to_bytes(8, "little") + text + data


@settings(deadline=None, max_examples=300)
@given(HEADERS, st.binary(max_size=30))
def test_any_object_as_a_header(header, data):
    accepts(with_length(json.dumps(header).encode(), data))


@settings(deadline=None, max_examples=200)
@given(st.binary(max_size=40), st.booleans())
def test_any_bytes_as_a_file(data, counted):
    accepts(with_length(b"{" + data) if counted else data)


@settings(deadline=None, max_examples=300)
@given(st.data())
def test_any_change_of_a_valid_file(data):
    valid = bytearray(save({"a": dense(3, 2), "b": dense(4), "c": dense(0)}, {"format": "pt"}))
    assert accepts(bytes(valid))
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(valid) - 1))
        valid[place] = data.draw(st.integers(0, 255) | st.sampled_from(b'0123456789"{}[],:'))
    accepts(bytes(valid[: data.draw(st.integers(0, len(valid)))] if len(valid) % 2 else valid))


@settings(deadline=None, max_examples=200)
@given(
    st.lists(st.tuples(st.sampled_from(list(ITEM_SIZES)), SHAPES), max_size=5),
    st.dictionaries(st.text(max_size=5), st.text(max_size=5), max_size=2),
)
def test_headers_that_are_written_are_read(tensors, metadata):
    named = [(f"tensor {i}", *tensor) for i, tensor in enumerate(tensors)]
    text, extents = format_header(named, metadata)
    assert len(text) % 8 == 0
    size = max((extent.stop for extent in extents.values()), default=len(text))
    header = read(text + bytes(size - len(text)))
    assert header.tensors == extents and header.metadata == metadata


@settings(deadline=None, max_examples=200)
@given(st.dictionaries(st.text(max_size=4), st.text(max_size=9) | VALUES, max_size=3) | VALUES)
def test_any_object_as_an_index(weight_map):
    text = json.dumps({"weight_map": weight_map}).encode()
    try:
        files = parse_index(text, "file").values()
    except CheckpointError:
        return
    assert all(file.endswith(".safetensors") and "/" not in file for file in files)


@pytest.mark.skipif(importlib.util.find_spec("atheris") is None, reason="atheris not installed")
def test_coverage_guided(tmp_path):
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    headers = [
        {"a": entry("F32", [2], 0, 8), "b": entry("BF16", [0, 3], 8, 8)},
        {"__metadata__": {"format": "pt"}, "a": entry("U8", [], 0, 1)},
    ]
    recipe = (
        "merge_method: ties\nbase_model: a\nmodels:\n- model: b\n  parameters:\n"
        "    weight: [0.1, 0.5]\nparameters: {density: 0.2}\ndtype: bfloat16\n"
    )
    seeds = [
        b"\0\0" + json.dumps(headers[0]).encode() + bytes(8),
        b"\0\0" + json.dumps(headers[1]).encode() + bytes(1),
        b"\0\1" + save({"a": dense(2)}),
        b"\1\0" + json.dumps({"weight_map": {"a": "m.safetensors"}}).encode(),
        b"\2\0" + recipe.encode(),
        b"\2\0" + "merge_method: linear".encode("utf-16"),  # an early find
    ]
    for number, seed in enumerate(seeds):
        (corpus / str(number)).write_bytes(seed)
    options = [f"-max_total_time={SECONDS}", "-max_len=2000", "-timeout=5"]
    options += ["-seed=1", f"-artifact_prefix={tmp_path}/"]
    found = subprocess.run(
        [sys.executable, "-m", "tests.fuzz_readers", str(corpus), *options],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent.parent,
    )
    assert found.returncode == 0, found.stdout[-3000:] + found.stderr[-1000:]
    assert len(list(corpus.iterdir())) > len(seeds), "coverage guided nothing"
