"""Recipes: what is read, what is refused and with which words, and that nothing can blow up."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastmerge.jobs.dialect import DIALECTS, OWN, REQUIRED, Knob
from fastmerge.jobs.layers import find_stacks, relative_position
from fastmerge.jobs.recipe import ModelName, RecipeError, read_recipe
from fastmerge.jobs.settings import evaluate, read_setting, resolve
from fastmerge.jobs.yaml_reader import read_yaml

TIES = """
merge_method: ties
base_model: base
models:
  - model: base
  - model: a
    parameters: {weight: 0.5, density: [0, 0.5, 1e-1]}
  - model: b+adapter
    parameters:
      weight: {filter: mlp, value: 0.25}
parameters: {weight: 1.0, normalize: true, int8_mask: true}
dtype: bfloat16
out_dtype: float16
"""


def test_a_recipe_is_read():
    recipe = read_recipe(TIES)
    assert recipe.method == "ties" and recipe.base == ModelName("base")
    assert [str(m) for m in recipe.models()] == ["base", "a", "b+adapter"]
    assert recipe.models()[2] == ModelName("b", "adapter")
    (only,) = recipe.slices
    assert [source.layers for source in only.sources] == [None, None, None]
    assert recipe.dtype == "float16" and recipe.tokenizer is None
    assert "int8_mask" not in recipe.parameters


def test_a_folder_is_one_model_however_it_is_written():
    recipe = read_recipe(
        "{merge_method: model_stock, base_model: ./x/base/, models: [x/base, x//a, x/./b+./c/]}"
    )
    assert [str(m) for m in recipe.models()] == ["x/base", "x/a", "x/b+c"]


def test_slices_are_read():
    recipe = read_recipe(
        """
        slices:
          - sources: [{model: a, layer_range: [0, 4]}]
          - sources: [{model: b, layer_range: [2, 6], parameters: {scale: 0.5}}]
        merge_method: passthrough
        name: twice
        tokenizer: {source: "model:b", pad_to_multiple_of: 64}
        """
    )
    assert [s.sources[0].layers for s in recipe.slices] == [(0, 4), (2, 6)]
    assert recipe.name == "twice" and recipe.base is None
    assert recipe.tokenizer.source == ModelName("b") and recipe.tokenizer.multiple == 64


def test_one_module_is_the_same_without_it():
    text = TIES.replace("models:", "modules: {default: {models: MODELS}}\nold:")
    raw = yaml.safe_load(text)
    raw["modules"]["default"]["models"] = raw.pop("old")
    assert read_recipe(yaml.safe_dump(raw)).slices == read_recipe(TIES).slices


@pytest.mark.parametrize("method", DIALECTS)
def test_every_method_is_read_with_its_smallest_recipe(method):
    dialect = DIALECTS[method]
    names = ["a", "b"] if dialect.inputs[0] == 2 else ["a"]
    required = {name: 0.5 for name, knob in dialect.knobs.items() if knob.default is REQUIRED}
    recipe = {
        "merge_method": method,
        "models": names,
        **({"base_model": "base"} if dialect.base == "required" else {}),
        **({"parameters": required} if required else {}),
        **({"coefficients": "c.safetensors"} if method == "weighted" else {}),
    }
    assert read_recipe(yaml.safe_dump(recipe)).dialect is dialect


LINEAR = "merge_method: linear\nmodels: [{model: a, parameters: {weight: 1}}]\n"
SLERP = "merge_method: slerp\nbase_model: a\nmodels: [a, b]\n"
BAD = [
    ("", "expected a mapping, got None"),
    ("- 1", "recipe: expected a mapping, got a list"),
    ("models: [a]", "merge_method is missing"),
    ("merge_method: linaer\nmodels: [a]", "unknown method 'linaer', did you mean 'linear'?"),
    ("merge_method: [linear]\nmodels: [a]", r"unknown method \['linear'\]"),
    (LINEAR + "basemodel: a", "unknown key 'basemodel', did you mean 'base_model'?"),
    (LINEAR + "dtype: float8_e4m3fn", "dtype: 'float8_e4m3fn': 8-bit floats are not supported"),
    (LINEAR + "out_dtype: int64", "out_dtype: 'int64': expected one of bfloat16"),
    (LINEAR + "slices: [{}]", "give either models or slices"),
    ("merge_method: linear\nmodels: []", "models: expected a list with at least one entry"),
    ("merge_method: linear\nmodels: [a]", "linear needs parameter 'weight' for model 'a'"),
    (LINEAR + "parameters: {density: 1}", "linear has no parameter 'density', expected one of"),
    (LINEAR + "parameters: {normalise: true}", "'normalise', did you mean 'normalize'?"),
    (LINEAR + "parameters: {normalize: 1}", "normalize: expected true or false, got 1"),
    (LINEAR + "parameters: {weight: .nan}", "weight: expected a finite number, got nan"),
    (LINEAR + "parameters: {weight: [1, x]}", r"weight\[1\]: expected a finite number, got 'x'"),
    (LINEAR + "parameters: {weight: []}", "weight: an empty list"),
    (LINEAR + "parameters: {weight: [{value: 1}, 2]}", r"weight\[1\]: expected a mapping with val"),
    (LINEAR + "parameters: {weight: {filter: 3, value: 1}}", "filter: expected a part of tensor"),
    (LINEAR + "coefficients: c.safetensors", "coefficients: merge_method weighted needs"),
    ("merge_method: weighted\nbase_model: a\nmodels: [b]", "weighted needs the path"),
    ("merge_method: karcher\nmodels: [a, a]", "model 'a' is listed twice"),
    (SLERP, "slerp needs parameter 't'"),
    (SLERP.replace("[a, b]", "[a, b, c]") + "parameters: {t: 0}", "1 models besides .*, got 2"),
    ("merge_method: slerp\nmodels: [a, b]\nparameters: {t: 0}", "base_model is missing: slerp"),
    (
        "merge_method: slerp\nbase_model: a\nmodels: [{model: b, parameters: {t: 0.5}}]",
        "parameters.t: is no parameter of one model",
    ),
    (
        "merge_method: ties\nbase_model: a\nmodels: [b]\nparameters: {scope: model, weight: 1}",
        "ties has no parameter 'weight' .*our own variant",
    ),
    (
        "merge_method: passthrough\nslices: [{sources: [{model: a, layer_range: [4, 4]}]}]",
        r"slices\[0\].sources\[0\].layer_range: \[4, 4\] holds no layer",
    ),
    (
        "merge_method: passthrough\nslices: [{sources: [{model: a, layer_range: [0, 4, 1]}]}]",
        r"expected \[first, one past the last\]",
    ),
    ("merge_method: passthrough\nslices: [{sources: [{model: a}]}]", "layer_range is missing"),
    (
        "merge_method: karcher\nslices: [{sources: [{model: a, layer_range: [0, 4]}, "
        "{model: b, layer_range: [0, 3]}]}]",
        r"different lengths \[0, 4\], \[0, 3\]",
    ),
    ("merge_method: linear\nmodules: {a: {}, b: {}}", r"modules: 2 modules \(a, b\) are not supp"),
    (LINEAR + "tokenizer: {tokens: {x: {source: z}}}", "tokens.x.source: z is no model of this"),
    (LINEAR + "tokenizer: {tokens: {x: {force: true}}}", "expected a token with a source"),
    (LINEAR + "tokenizer: {tokens: {x: {source: a, force: 1}}}", "force: expected true or false"),
    (LINEAR + "tokenizer: {tokens: {x: {source: {kind: mean}}}}", "expected zero or model_token"),
    (
        LINEAR + "tokenizer: {tokens: {x: {source: {kind: model_token, model: a}}}}",
        "give either token or token_id",
    ),
    (
        LINEAR + "tokenizer: {tokens: {x: {source: {kind: zero, model: a}}}}",
        "source: unknown key 'model'",
    ),
    (LINEAR + "tokenizer: {tokens: [x]}", "tokenizer.tokens: expected a mapping"),
    (LINEAR + "tokenizer: {}\ntokenizer_source: base", "give one of them"),
    (LINEAR + "tokenizer: {pad_to_multiple_of: 0}", "expected 1 to 65536, got 0"),
    (LINEAR.replace("model: a,", "model: a+b+c,"), r"expected folder or folder\+adapter"),
    (LINEAR.replace("model: a,", "model: {model: a, revision: x},"), "models are local folders"),
    (LINEAR.replace("model: a,", "model: 3,"), r"models\[0\].model: expected text, got 3"),
    (LINEAR + "seed: -1", "seed: expected a whole number from 0, got -1"),
    (LINEAR + "dtype: float16\ndtype: float32", "line 4: key 'dtype' is given twice"),
    (LINEAR + "1: 2", "line 3: key 1 is no text"),
    (LINEAR + "x: !!python/object/apply:os.system [ls]", "line 3: tag .*os.system' is refused"),
    (LINEAR + "x: !!binary aGk=", "tag .* is refused"),
    (LINEAR + "x: *nothing", "recipe line 3: (alias|not valid YAML: found undefined alias)"),
    (LINEAR + "x: [", "recipe line [34]: not valid YAML"),
    (LINEAR + "---\na: 1", "a second document"),
    (LINEAR + "? [a]\n: b", "a list as a key"),
    (b"merge_method: \xff\xfe", "not (UTF-8|valid YAML)"),
    (LINEAR + "x: \x00", "not valid YAML"),
]


@pytest.mark.parametrize(("text", "message"), BAD)
def test_bad_recipes_are_refused_by_name(text, message):
    with pytest.raises(RecipeError, match=message):
        read_recipe(text)


def _laughs(levels: int, width: int) -> str:
    lines = ["a0: &a0 [x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * width)}]" for n in range(1, levels)]
    return "\n".join(lines)


BOMBS = {
    "laughs": _laughs(30, 9),
    "merge keys": "a0: &a0 {x: 1}\n"
    + "\n".join(f"a{n}: &a{n} {{<<: [{','.join([f'*a{n - 1}'] * 9)}]}}" for n in range(1, 30)),
    "deep": "a: " + "[" * 5000,
    "deep maps": "{a: " * 5000,
    "deep blocks": "\n".join(" " * n + "- " for n in range(3000)),
    "recursive": "a: &a [*a]",
    "recursive map": "a: &a {b: *a}",
    "wide": "a: [" + "1," * 60_000 + "1]",
    "long": "a: " + "x" * 300_000,
    "number": "a: " + "9" * 100_000,
    "sexagesimal": "a: " + ":".join(["1"] * 20_000),
}


@pytest.mark.parametrize("text", BOMBS.values(), ids=BOMBS)
def test_bombs_are_refused_in_bounded_time(text):
    start = time.process_time()
    with pytest.raises(RecipeError):
        read_recipe(text)
    assert time.process_time() - start < 2


def test_anchors_within_the_limits_work():
    text = "a: &x {k: 1, l: 2}\nb: {<<: *x, l: 3}\nc: [*x, *x]\nd: {<<: [*x, {m: 4}]}"
    assert read_yaml(text) == yaml.safe_load(text)


@pytest.mark.parametrize(
    "scalar",
    [
        "1",
        "-1.5",
        "1e-5",
        "1.0e-5",
        "0x1f",
        "1_000",
        "yes",
        "True",
        "null",
        "~",
        "''",
        "'1'",
        '"a\\nb"',
        ".inf",
        "a b",
        "!!str 1",
        "!!int '3'",
        "! x",
        "|\n  x\n  y",
    ],
)
def test_scalars_mean_what_yaml_says(scalar):
    assert read_yaml(f"a: {scalar}") == yaml.safe_load(f"a: {scalar}")


def test_dates_are_text():
    assert read_yaml("a: 2024-01-02") == {"a": "2024-01-02"}


plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**6), 10**6) | st.floats(allow_nan=False)
    | st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Cs")), max_size=8),
    lambda inner: st.lists(inner, max_size=4)
    | st.dictionaries(st.text("abcdefgh_", min_size=1, max_size=6), inner, max_size=4),
    max_leaves=20,
)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(plain)
def test_plain_values_survive(value):
    assert read_yaml(yaml.safe_dump(value, allow_unicode=True)) == value


_PARTS = st.sampled_from([
    "merge_method", "models", "slices", "model", "parameters", "weight", "filter", "value", "a",
    ": ", "\n", "  ", "- ", "[", "]", "{", "}", ",", "&x", "*x", "<<", "!!", "!t", "|", ">", "'",
    '"', "#", "---", "...", "%YAML", "1", "1e999", "0x", "ties", "linear", "layer_range", "\t", "?",
])  # fmt: skip


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.one_of(st.binary(max_size=60), st.lists(_PARTS, max_size=40).map("".join)))
def test_no_text_does_more_than_raise_a_recipe_error(text):
    try:
        read_recipe(text)
    except RecipeError as error:
        assert str(error) and "\n" not in str(error)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_damaged_recipes_do_no_more_than_raise_a_recipe_error(data):
    """One value anywhere in a good recipe is replaced by another."""
    recipe = yaml.safe_load(TIES)
    place, key = recipe, data.draw(st.sampled_from(sorted(recipe)))
    while isinstance(place[key], (dict, list)) and place[key] and data.draw(st.booleans()):
        place = place[key]
        keys = sorted(place) if isinstance(place, dict) else range(len(place))
        key = data.draw(st.sampled_from(keys))
    place[key] = data.draw(plain)
    try:
        read_recipe(yaml.safe_dump(recipe))
    except RecipeError as error:
        assert str(error)


def test_reading_recipes_needs_no_torch():
    code = "import sys, fastmerge.jobs.recipe; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("raw", "tensor", "t", "expected"),
    [
        (0.5, "x", 0.3, 0.5),
        ("1e-3", "x", 0.0, 0.001),
        ([0, 1], "x", 0.25, 0.25),
        ([0, 1, 0], "x", 0.75, 0.5),
        ([3, 1, 2], "x", 1.0, 2.0),
        ([7], "x", 0.4, 7.0),
        ([{"filter": "mlp", "value": 2}, {"value": 3}], "l.0.mlp.w", 0.0, 2.0),
        ([{"filter": "mlp", "value": 2}, {"value": 3}], "l.0.attn.w", 0.0, 3.0),
        ([{"filter": "*", "value": 1}, {"filter": "mlp", "value": 2}], "mlp", 0.0, 1.0),
        ([{"filter": "mlp", "value": [0, 4]}], "mlp", 0.5, 2.0),
        ([{"filter": "mlp", "value": [0, 4]}], "attn", 0.5, None),
    ],
)
def test_settings_by_hand(raw, tensor, t, expected):
    assert evaluate(read_setting(raw, "number", "x"), tensor, t) == expected


def test_gradients_of_bools_take_the_value_before():
    setting = read_setting([True, False, True], "bool", "x")
    assert [evaluate(setting, "w", t) for t in (0, 0.49, 0.5, 0.99, 1)] == [
        True, True, False, False, True,
    ]  # fmt: skip


def test_the_most_specific_level_that_matches_counts():
    levels = [
        {"w": read_setting({"filter": "mlp", "value": 1}, "number", "x")},
        {"w": read_setting({"filter": "attn", "value": 2}, "number", "x")},
        {"w": read_setting(3, "number", "x")},
    ]
    found = [resolve("w", Knob(default=9.0), levels, name, 0.0) for name in ("mlp", "attn", "norm")]
    assert found == [1.0, 2.0, 3.0]
    assert resolve("v", Knob(default=9.0), levels, "mlp", 0.0) == 9.0


@pytest.mark.parametrize(
    ("names", "config", "sizes"),
    [
        (["model.layers.0.w", "model.layers.1.w", "lm_head.weight"], {}, {"model.layers.": 2}),
        (["h.0.w", "h.1.attn.3.w", "wte.weight"], {"n_layer": 2}, {"h.": 2}),
        (
            ["v.blocks.0.w", "v.blocks.1.w", "v.blocks.2.w", "t.layers.0.w", "t.layers.1.w"],
            {"text_config": {"num_hidden_layers": 2}},
            {"t.layers.": 2},
        ),
        (
            ["encoder.block.0.w", "decoder.block.0.w", "encoder.block.1.w", "decoder.block.1.w"],
            {"num_layers": 2},
            {"encoder.block.": 2, "decoder.block.": 2},
        ),
        (["0.weight", "2.weight"], {}, {}),
        (["bert.encoder.layer.0.w", "bert.pooler.w"], {}, {"bert.encoder.layer.": 1}),
        (["a", "b.c"], {}, {}),
    ],
)
def test_layers_are_found_by_name(names, config, sizes):
    stacks = find_stacks(names, config)
    assert dict(stacks.sizes) == sizes
    assert all(stacks.position(name) in (0.0, 1.0) for name in names)


def test_layers_of_experts_in_a_mixture_are_the_outer_ones():
    names = [f"model.layers.{i}.mlp.experts.{j}.w" for i in range(3) for j in range(8)]
    stacks = find_stacks(names, {"num_hidden_layers": 3})
    assert stacks.locate("model.layers.2.mlp.experts.7.w") == (
        "model.layers.",
        2,
        "mlp.experts.7.w",
    )
    assert stacks.position("model.layers.1.mlp.experts.7.w") == 0.5


@pytest.mark.parametrize("name", [*DIALECTS, *OWN])
def test_dialects_name_the_methods_parameters(name):
    """The table that is known without torch says what the methods say."""
    from fastmerge.methods import METHODS

    for dialect in filter(None, (DIALECTS.get(name), OWN.get(name))):
        if dialect.method == "weighted":
            continue
        there = {p.name: p.default for p in METHODS[dialect.method].parameters}
        for parameter, knob in dialect.knobs.items():
            argument = dialect.argument(parameter)
            if argument is None or knob.default is REQUIRED:
                continue
            assert argument in there
            # As mergekit has them, lambda is 1; weights of an average are all equal.
            if (dialect.method, parameter) not in EXCEPTED:
                assert knob.default == there[argument], (name, parameter)


def test_recipes_reach_every_method():
    from fastmerge.methods import METHODS

    reached = {dialect.method for dialect in (*DIALECTS.values(), *OWN.values())}
    assert reached == {*METHODS, "weighted"}


EXCEPTED = {("task_arithmetic", "lambda"), ("average", "weight")}


def test_positions_run_from_0_to_1_and_a_single_layer_is_the_last():
    assert [relative_position(layer, 5) for layer in range(5)] == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert relative_position(0, 1) == 1.0
