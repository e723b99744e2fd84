"""Configurations and tokenizers that strangers wrote: refused by name, never a crash."""

from __future__ import annotations

import json
import os

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastmerge.jobs.places import find_folders, find_place
from fastmerge.jobs.planning import MAX_LAYERS, make_plan
from fastmerge.jobs.recipe import read_recipe

from .tiny_models import tensors_of, words, write_model

RECIPE = {
    "merge_method": "task_arithmetic",
    "base_model": "base",
    "models": ["a"],
    "parameters": {"weight": [0, 1]},
    "dtype": "float16",
    "tokenizer_source": "union",
    "chat_template": "auto",
}
SLICES = {
    "merge_method": "passthrough",
    "chat_template": "chatml",
    "slices": [{"sources": [{"model": "a", "layer_range": [0, 2]}]}],
}

TOKENS = {
    "merge_method": "average",
    "base_model": "base",
    "models": ["a"],
    "tokenizer": {
        "source": "a",
        "tokens": {
            "w3": {"source": "a", "force": True},
            "new": {"source": {"kind": "model_token", "model": "base", "token": "w2"}},
        },
    },
}


def _plan(recipe):
    checked = read_recipe(yaml.safe_dump(recipe))
    return make_plan(checked, find_folders(checked))[0]


FILES = ["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("base", "a")):
        write_model(folder / name, tensors_of(seed), words(12))
        about = {"eos_token_id": [1, 2], "pad_token_id": 0}
        (folder / name / "generation_config.json").write_text(json.dumps(about))
    before = os.getcwd()
    os.chdir(folder)
    yield folder
    os.chdir(before)


plain = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 99) | st.floats() | st.text("ab_{", max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["vocab", "num_hidden_layers", "text_config", "content", "id", "type"]),
            inner,
            max_size=3,
        )
    ),
    max_leaves=8,
)


def _damage(value, data):
    """The value with something else in one place."""
    if not isinstance(value, (dict, list)) or not value or data.draw(st.booleans()):
        return data.draw(plain)
    if isinstance(value, dict):
        key = data.draw(st.sampled_from(sorted(value)))
        return {**value, key: _damage(value[key], data)}
    index = data.draw(st.integers(0, len(value) - 1))
    return [*value[:index], _damage(value[index], data), *value[index + 1 :]]


@settings(
    max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    data=st.data(),
    file=st.sampled_from(FILES),
    recipe=st.sampled_from([RECIPE, SLICES, TOKENS]),
    name=st.sampled_from(["a", "base"]),
)
def test_damaged_files_do_no_more_than_raise_an_error_that_names_them(
    models, data, file, recipe, name
):
    path = models / name / file
    good = path.read_text()
    try:
        path.write_text(json.dumps(_damage(json.loads(good), data)))
        plan = _plan(recipe)
        assert all(isinstance(text, bytes) for text in plan.texts.values())
    except ValueError as error:
        assert str(error)
    finally:
        path.write_text(good)


@pytest.mark.parametrize("name", ["a", "base"])
@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("text", ["", "[", "[]", "nul", '{"a": ' + "[" * 50 + "]" * 50 + "}"])
def test_files_that_are_no_json_are_refused(models, name, file, text):
    path = models / name / file
    good = path.read_text()
    try:
        path.write_text(text)
        with pytest.raises(ValueError, match=f"{name}/{file}: "):
            _plan(RECIPE)
    finally:
        path.write_text(good)


def test_links_out_of_the_folder_are_refused(models, tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("{}")
    link = models / "base" / "generation_config.json"
    about = link.read_text()
    link.unlink()
    link.symlink_to(secret)
    try:
        with pytest.raises(ValueError, match=r"generation_config.json: a symbolic link"):
            _plan(RECIPE)
    finally:
        link.unlink()
        link.write_text(about)


def test_the_home_of_nobody_is_refused():
    with pytest.raises(ValueError, match=r"'~nobody-here/x': no usable path"):
        find_place("~nobody-here/x")


def test_layers_cannot_be_repeated_without_end(models):
    part = {"sources": [{"model": "a", "layer_range": [0, 3]}]}
    many = {**SLICES, "slices": [part] * (MAX_LAYERS // 3 + 1)}
    with pytest.raises(ValueError, match="more than 4096 layers"):
        _plan(many)
