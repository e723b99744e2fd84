"""The list of all methods: nothing is missing, and what it says is true of the code."""

from __future__ import annotations

import re

import pytest

import fastmerge
from fastmerge.catalogue import FAMILIES, REQUIRED, catalogue, describe_methods
from fastmerge.methods import METHODS
from fastmerge.modules.dynamic import METHODS as DYNAMIC

ENTRIES = catalogue()


def test_every_method_is_listed_once():
    names = [entry.name for entry in ENTRIES]
    assert len(set(names)) == len(names)
    assert {*METHODS, *DYNAMIC} <= set(names)
    assert {entry.family for entry in ENTRIES} == set(FAMILIES)
    text = describe_methods()
    assert all(re.search(rf"^{name}: ", text, re.MULTILINE) for name in names)


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda e: e.name)
def test_entries_are_true_of_the_code(entry):
    texts = (entry.summary, entry.formula, entry.source, entry.call)
    assert all(text and "\n" not in text for text in texts)
    assert set(re.findall(r"\bfm\.(\w+)", entry.call)) <= set(fastmerge.__all__)
    found = entry.parameters()  # a parameter that no signature has is a KeyError
    assert [p.name for p in found] == list(entry.meanings) and all(p.doc for p in found)
    if entry.family == "merge":
        assert found == METHODS[entry.name].parameters
    if entry.family == "kept":
        assert all(p.default is not REQUIRED for p in found)
