"""Plans from recipes and headers: which tensors, made of what, and what is refused."""

from __future__ import annotations

import json

import pytest
import torch
import yaml

from fastmerge.checkpoint import CheckpointError
from fastmerge.coefficients import Coefficients
from fastmerge.jobs.places import find_folders
from fastmerge.jobs.planning import make_plan
from fastmerge.jobs.recipe import RecipeError, read_recipe
from fastmerge.jobs.templates import TEMPLATES
from fastmerge.methods import Average, TaskArithmetic, Ties, Weighted

from .checkpoints import write_folder
from .tiny_models import tensors_of, words, write_model


@pytest.fixture
def models(tmp_path, monkeypatch):
    """Folders base, a, b with equal shapes; the working folder holds them."""
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("base", "a", "b")):
        write_model(tmp_path / name, tensors_of(seed), words(12))
    return tmp_path


def _plan(**recipe):
    checked = read_recipe(yaml.safe_dump(recipe))
    return make_plan(checked, find_folders(checked))


TA = {"merge_method": "task_arithmetic", "base_model": "base", "models": ["base", "a", "b"]}
SCALED = TA | {"parameters": {"scaling": 0.5}}


def _by_name(plan):
    return {output.name: output for output in plan.outputs}


def test_every_tensor_is_merged_once(models):
    plan, report = _plan(**SCALED)
    assert [o.name for o in plan.outputs] == list(plan.checkpoints["base"].tensors)
    assert set(report.merged) == set(tensors_of(0)) and not report.copied and not report.left_out
    assert set(plan.checkpoints) == {"base", "a", "b"}
    for output in plan.outputs:
        assert output.base.checkpoint == "base"
        assert [(s.checkpoint, s.key) for s in output.experts] == [
            ("a", output.name), ("b", output.name),
        ]  # fmt: skip
        assert output.dtype == torch.float32
    assert len({id(output.method) for output in plan.outputs}) == 1
    assert isinstance(plan.outputs[0].method, TaskArithmetic)


def test_parameters_follow_filters_and_layers(models):
    weights = [{"filter": "mlp", "value": [0.0, 1.0]}, {"value": 0.25}]
    plan, _ = _plan(**TA, parameters={"scaling": weights})
    scaling = {o.name: o.method.scaling.of(2) for o in plan.outputs}
    assert scaling["model.layers.1.mlp.down_proj.weight"] == [0.5, 0.5]
    assert scaling["model.layers.2.mlp.down_proj.weight"] == [1.0, 1.0]
    assert scaling["lm_head.weight"] == [0.25, 0.25]
    assert len({id(o.method) for o in plan.outputs}) == 4


def test_a_models_own_parameter_comes_before_the_recipes(models):
    entry = {"model": "a", "parameters": {"scaling": {"filter": "mlp", "value": 0.25}}}
    plan, _ = _plan(**TA | {"models": [entry, "b"], "parameters": {"scaling": 0.75}})
    scaling = {o.name: o.method.scaling.of(2) for o in plan.outputs}
    assert scaling["model.layers.1.mlp.down_proj.weight"] == [0.25, 0.75]
    assert scaling["lm_head.weight"] == [0.75, 0.75]


def test_a_parameter_without_a_value_for_some_tensor_is_refused(models):
    with pytest.raises(RecipeError, match=r"'weight' of model 'a' has no value for tensor"):
        _plan(
            merge_method="linear",
            models=[{"model": "a", "parameters": {"weight": {"filter": "mlp", "value": 1}}}],
        )


def test_values_out_of_range_are_refused_with_the_tensor(models):
    with pytest.raises(RecipeError, match=r"ties, tensor '.*': density"):
        _plan(**{**TA, "merge_method": "ties"}, parameters={"scope": "model", "density": 1.5})


def test_own_ties_shares_one_method_over_the_model(models):
    plan, _ = _plan(**{**TA, "merge_method": "ties"}, parameters={"scope": "model"})
    assert {type(o.method) for o in plan.outputs} == {Ties}
    assert len({id(o.method) for o in plan.outputs}) == 1
    assert plan.outputs[0].method.density == 0.2


def test_slices_number_layers_anew(models):
    plan, report = _plan(
        merge_method="passthrough",
        slices=[
            {"sources": [{"model": "a", "layer_range": [0, 2]}]},
            {"sources": [{"model": "b", "layer_range": [1, 3]}]},
        ],
    )
    outputs = _by_name(plan)
    assert all(output.method is None for output in plan.outputs)
    taken = {name: (o.experts[0].checkpoint, o.experts[0].key) for name, o in outputs.items()}
    norm = "model.layers.{}.input_layernorm.weight"
    assert [taken[norm.format(n)] for n in range(4)] == [
        ("a", norm.format(0)), ("a", norm.format(1)), ("b", norm.format(1)), ("b", norm.format(2)),
    ]  # fmt: skip
    assert taken["model.embed_tokens.weight"][0] == "a"
    assert taken["model.norm.weight"][0] == taken["lm_head.weight"][0] == "b"
    config = json.loads(plan.texts["config.json"])
    assert config["num_hidden_layers"] == 4
    assert report.left_out["b"] == ["model.embed_tokens.weight"]


def test_slices_take_the_base_models_layers_of_the_same_range(models):
    plan, _ = _plan(
        merge_method="task_arithmetic",
        base_model="base",
        parameters={"scaling": [0, 1]},
        slices=[{"sources": [{"model": "a", "layer_range": [1, 3]}]}],
    )
    outputs = _by_name(plan)
    first = outputs["model.layers.0.mlp.down_proj.weight"]
    assert first.base.key == first.experts[0].key == "model.layers.1.mlp.down_proj.weight"
    assert first.method.scaling.of(1) == [0.0]
    assert outputs["model.layers.1.mlp.down_proj.weight"].method.scaling.of(1) == [1.0]


@pytest.mark.parametrize("stack", ["", "h."])
def test_tensors_beside_the_layers_stay_whatever_their_names(models, stack):
    tensors = {f"{stack}{layer}.weight": torch.ones(4, 4) for layer in range(3)}
    write_folder(models / "plain", tensors | {f"{stack}norm.weight": torch.ones(4)})
    part = {"sources": [{"model": "plain", "layer_range": [0, 2]}]}
    plan, report = _plan(merge_method="passthrough", slices=[part])
    assert set(_by_name(plan)) == {f"{stack}{n}.weight" for n in (0, 1, "norm")}
    assert not report.left_out


def test_lists_with_an_entry_a_layer_follow_the_slices(models):
    write_model(models / "a", tensors_of(1), layer_types=["x", "y", "z"], sizes=[1, 2, 3])
    part = {"sources": [{"model": "a", "layer_range": [1, 3]}]}
    plan, _ = _plan(merge_method="passthrough", slices=[part, part])
    config = json.loads(plan.texts["config.json"])
    assert config["layer_types"] == ["y", "z", "y", "z"] and config["sizes"] == [1, 2, 3]


def test_dtype_is_that_of_the_recipe_else_of_the_base(models):
    plan, _ = _plan(**SCALED, dtype="bfloat16")
    assert {o.dtype for o in plan.outputs} == {torch.bfloat16}
    assert json.loads(plan.texts["config.json"])["torch_dtype"] == "bfloat16"
    half = {name: t.half() for name, t in tensors_of(1).items()}
    write_model(models / "a", half)
    plan, _ = _plan(**SCALED)
    assert {o.dtype for o in plan.outputs} == {torch.float32}


def test_without_a_base_dtypes_are_promoted(models):
    write_model(models / "a", {n: t.half() for n, t in tensors_of(1).items()})
    plan, _ = _plan(merge_method="average", models=["a", "b"])
    assert {o.dtype for o in plan.outputs} == {torch.float32}
    assert {o.base for o in plan.outputs} == {None}


def test_what_is_not_merged_is_reported(models):
    extra = {"inv_freq": torch.ones(4), "ids": torch.arange(4), "bn.running_mean": torch.ones(3)}
    write_model(models / "base", {**tensors_of(0), **extra})
    statistics = {"bn.running_mean": torch.zeros(3), "ids": torch.arange(4)}
    for seed, name in ((1, "a"), (2, "b")):
        write_model(models / name, {**tensors_of(seed), **statistics})
    write_model(models / "b", {**tensors_of(2), **statistics, "v_head": torch.ones(2)})
    plan, report = _plan(**SCALED)
    outputs = _by_name(plan)
    assert report.copied == {
        "inv_freq": "no expert has it", "ids": "no floating-point numbers",
    }  # fmt: skip
    assert outputs["ids"].method is None and outputs["ids"].experts[0].checkpoint == "base"
    assert isinstance(outputs["bn.running_mean"].method, Average)
    assert report.averaged == ["bn.running_mean"]
    assert report.left_out == {"b": ["v_head"]}
    text = "\n".join(report.lines())
    assert all(word in text for word in ("inv_freq", "ids", "bn.running_mean", "v_head"))
    assert "v_head" in plan.texts["README.md"].decode()


def test_a_missing_tensor_is_refused(models):
    tensors = tensors_of(1)
    del tensors["model.norm.weight"]
    write_model(models / "a", tensors)
    with pytest.raises(RecipeError, match=r"a: tensor 'model.norm.weight' is missing, .* in base"):
        _plan(**SCALED)


def test_another_shape_is_refused_with_file_and_shapes(models):
    tensors = tensors_of(1)
    tensors["model.norm.weight"] = torch.ones(9)
    write_model(models / "a", tensors)
    message = (
        r"a/model.safetensors: tensor 'model.norm.weight' has shape \[9\], expected \[8\] as in "
        r"base/model.safetensors"
    )
    with pytest.raises(RecipeError, match=message):
        _plan(**SCALED)


def test_another_vocabulary_is_refused_with_a_hint(models):
    write_model(models / "a", tensors_of(1, rows=14))
    with pytest.raises(RecipeError, match=r"lm_head.* tokenizer_source aligns vocabularies"):
        _plan(**SCALED)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
def test_other_dtypes_are_refused(models, dtype):
    tensors = tensors_of(1)
    tensors["model.norm.weight"] = torch.ones(8).to(dtype)
    write_model(models / "a", tensors)
    with pytest.raises(RecipeError, match=r"a/model.safetensors: tensor 'model.norm.weight' is"):
        _plan(**SCALED)


def test_quantized_models_are_refused(models):
    write_model(models / "a", tensors_of(1), quantization_config={"quant_method": "gptq"})
    with pytest.raises(RecipeError, match=r"a: its weights are quantized \(gptq"):
        _plan(**SCALED)


def test_missing_folders_are_refused_before_anything_is_opened(models):
    with pytest.raises(RecipeError, match="org/model: no such folder; models are local folders"):
        _plan(merge_method="average", models=["a", "org/model"])
    with pytest.raises(CheckpointError):
        (models / "empty").mkdir()
        _plan(merge_method="average", models=["a", "empty"])


def test_paths_are_also_looked_for_beside_the_recipe(models, monkeypatch, tmp_path_factory):
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    recipe = read_recipe(yaml.safe_dump({"merge_method": "average", "models": ["a", "b"]}))
    assert find_folders(recipe, models) == {"a": models / "a", "b": models / "b"}


def test_layer_ranges_must_exist(models):
    part = {"sources": [{"model": "a", "layer_range": [1, 4]}]}
    with pytest.raises(RecipeError, match=r"a: layer_range \[1, 4\], but it has 3 layers"):
        _plan(merge_method="passthrough", slices=[part])


def test_layer_ranges_need_one_stack(models):
    tensors = tensors_of(1)
    layers = {name: t.clone() for name, t in tensors.items() if "layers" in name}
    tensors |= {name.replace("model.", "vision."): t for name, t in layers.items()}
    write_model(models / "a", tensors)
    part = {"sources": [{"model": "a", "layer_range": [0, 1]}]}
    with pytest.raises(RecipeError, match=r"need one stack of layers, found model.layers., vision"):
        _plan(merge_method="passthrough", slices=[part])


def _tied(models, name, seed, **config):
    write_model(models / name, tensors_of(seed, tied=True), words(12), **config)


def test_a_tied_output_layer_of_an_expert_is_not_stored_again(models):
    _tied(models, "base", 0)
    write_model(models / "a", tensors_of(1), tie_word_embeddings=True)
    _tied(models, "b", 2)
    plan, report = _plan(**SCALED)
    assert "lm_head.weight" not in _by_name(plan)
    assert report.tied == ["tied: 'lm_head.weight' of a repeats its embedding"]
    assert not report.left_out


def test_an_expert_that_ties_gives_its_embedding_for_the_output_layer(models):
    _tied(models, "a", 1)
    plan, report = _plan(**SCALED)
    head = _by_name(plan)["lm_head.weight"]
    assert [s.key for s in head.experts] == ["model.embed_tokens.weight", "lm_head.weight"]
    assert report.tied == [
        "tied: a has no 'lm_head.weight', its 'model.embed_tokens.weight' is taken"
    ]


def test_a_matrix_that_holds_no_tokens_is_tied_to_nothing(models):
    """As BERT's: its configuration is silent, pooler and prediction head are of one shape."""
    for seed, name in enumerate(("base", "a", "b")):
        tensors = tensors_of(seed, tied=True) | {"pooler.weight": torch.ones(8, 8)}
        if name == "base":
            tensors["transform.weight"] = torch.ones(8, 8)
        write_model(models / name, tensors, words(12), tie_word_embeddings=None)
    _, report = _plan(**SCALED)
    assert report.copied == {"transform.weight": "no expert has it"} and not report.tied


def test_an_output_layer_of_its_own_is_not_dropped_in_silence(models):
    _tied(models, "base", 0)
    with pytest.raises(RecipeError, match=r"'lm_head.weight' is an output layer of its own"):
        _plan(**SCALED)


def _coefficients(path, names, experts, shapes=None):
    init = torch.arange(len(names) * len(experts)).view(len(names), len(experts)) / 100
    Coefficients(names, experts, init=init, shapes=shapes).save(path)
    return init


def test_learned_coefficients(models):
    names = ["model.norm.weight", "lm_head.weight"]
    init = _coefficients(models / "c.safetensors", names, ["b", "a"], [[8], [12, 8]])
    recipe = {**TA, "merge_method": "weighted", "coefficients": "c.safetensors"}
    plan, report = _plan(**recipe)
    outputs = _by_name(plan)
    weighted = outputs["lm_head.weight"].method
    assert isinstance(weighted, Weighted) and weighted is outputs["model.norm.weight"].method
    assert torch.equal(weighted.rows["lm_head.weight"], init[1].flip(0))
    assert report.copied["model.embed_tokens.weight"] == "no coefficient belongs to it"
    assert sorted(report.merged) == sorted(names)


@pytest.mark.parametrize(
    ("names", "experts", "shapes", "message"),
    [
        (["other"], ["a", "b"], [[8]], "base has no tensor 'other'"),
        (["lm_head.weight"], ["a", "b"], [[8]], r"has shape \[8\] there, base has \[12, 8\]"),
        (["lm_head.weight"], ["a"], [[12, 8]], r"are for 1 experts \(a\), the recipe has 2"),
    ],
)
def test_coefficients_of_another_model_are_refused(models, names, experts, shapes, message):
    _coefficients(models / "c.safetensors", names, experts, shapes)
    with pytest.raises(RecipeError, match=message):
        _plan(**TA | {"merge_method": "weighted", "coefficients": "c.safetensors"})


def test_model_card_tells_inputs_and_recipe(models):
    plan, _ = _plan(**SCALED, name="three\n# tricks")
    card = plan.texts["README.md"].decode()
    assert "# three # tricks\n" in card and "`task_arithmetic`" in card
    assert "scaling: 0.5" in card and "| base | `" in card
    assert card.count("| `") == 3


def test_tokenizer_and_generation_files_go_along(models):
    (models / "base" / "generation_config.json").write_text('{"bos_token_id": 1}')
    (models / "base" / "modeling_x.py").write_text("raise SystemExit")
    plan, _ = _plan(**SCALED)
    assert set(plan.texts) == {
        "README.md", "config.json", "generation_config.json", "tokenizer.json",
        "tokenizer_config.json",
    }  # fmt: skip
    tokenizer = (models / "base" / "tokenizer.json").read_bytes()
    assert plan.texts["tokenizer.json"] == tokenizer


@pytest.mark.parametrize(
    ("wanted", "expected"), [("auto", "A{{x}}"), ("chatml", "<|im_start|>"), ("{{y}}", "{{y}}")]
)
def test_chat_template(models, wanted, expected):
    for name, text in (("base", "B{{x}}"), ("a", "A{{x}}"), ("b", "A{{x}}")):
        (models / name / "chat_template.jinja").write_text(text)
    plan, _ = _plan(**SCALED, chat_template=wanted)
    assert expected in plan.texts["chat_template.jinja"].decode()
    config = json.loads(plan.texts["tokenizer_config.json"])
    assert config["chat_template"] == plan.texts["chat_template.jinja"].decode()


def test_an_unknown_chat_template_is_refused(models):
    with pytest.raises(RecipeError, match="'chatmol' is no template; expected auto, alpaca"):
        _plan(**SCALED, chat_template="chatmol")


CHAT = [("system", "S"), ("user", "A"), ("assistant", "B"), ("user", "C")]
RENDERED = {
    "chatml": (
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nA<|im_end|>\n"
        "<|im_start|>assistant\nB<|im_end|>\n<|im_start|>user\nC<|im_end|>\n<|im_start|>assistant\n"
    ),
    "llama3": (
        "<s><|start_header_id|>system<|end_header_id|>\n\nS<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nA<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nB<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nC<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    ),
    "mistral": "<s>[INST] S\n\nA [/INST] B</s>[INST] C [/INST]",
    "alpaca": (
        "S\n\n### Instruction:\nA\n\n### Response:\nB</s>\n\n### Instruction:\nC\n\n### Response:\n"
    ),
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_named_chat_templates_render(name):
    sandbox = pytest.importorskip("jinja2.sandbox")
    environment = sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    text = environment.from_string(TEMPLATES[name]).render(
        messages=[{"role": role, "content": content} for role, content in CHAT],
        bos_token="<s>",
        eos_token="</s>",
        add_generation_prompt=True,
    )
    assert text == RENDERED[name]
