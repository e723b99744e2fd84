"""Vocabularies: unions of tokenizers, and rows that belong to the right tokens."""

from __future__ import annotations

import json

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from fastmerge.checkpoint import LoraCheckpoint
from fastmerge.jobs.engine import check_memory, check_plan
from fastmerge.jobs.places import find_folders
from fastmerge.jobs.planning import make_plan
from fastmerge.jobs.recipe import RecipeError, read_recipe
from fastmerge.jobs.vocabulary import Vocabulary, align, read_vocabulary, unite

from .tiny_models import tensors_of, write_model, write_tokenizer

TOKENS = {
    "base": ["<unk>", "a", "b", "c", "d"],
    "one": ["<unk>", "c", "a", "x", "y"],
    "two": ["<unk>", "b", "y", "z"],
}
ADDED = {"base": {"<s>": 5}, "one": {"<t>": 5, "<s>": 6}, "two": {}}
ROWS = {"base": 6, "one": 8, "two": 4}


@pytest.fixture
def models(tmp_path, monkeypatch):
    """Three models with different tokenizers; `one` has a row of padding."""
    monkeypatch.chdir(tmp_path)
    for seed, (name, tokens) in enumerate(TOKENS.items()):
        tensors = tensors_of(seed, rows=ROWS[name])
        write_model(tmp_path / name, tensors, tokens, ADDED[name], bos_token_id=seed)
    return tmp_path


def _ids(name):
    return {token: n for n, token in enumerate(TOKENS[name])} | ADDED[name]


def _plan(source, base="base", **more):
    recipe = {
        "merge_method": "average",
        "models": ["base", "one", "two"],
        "tokenizer_source": source,
        **({"base_model": base} if base else {}),
        **more,
    }
    checked = read_recipe(yaml.safe_dump({k: v for k, v in recipe.items() if v is not None}))
    return make_plan(checked, find_folders(checked))[0]


def _expected(token, name, key, stored, base="base"):
    """The row of a token, by the rule that the documents give."""
    if token in _ids(name):
        return stored[name][key][_ids(name)[token]]
    if token in _ids(base):
        return stored[base][key][_ids(base)[token]]
    rows = [stored[m][key][_ids(m)[token]] for m in TOKENS if token in _ids(m)]
    return torch.stack(rows).mean(0)


UNION = ["<unk>", "a", "b", "c", "d", "<s>", "x", "y", "z", "<t>"]


@pytest.mark.parametrize(
    ("source", "tokens"),
    [
        ("base", UNION[:6]),
        ("union", UNION),
        ("one", ["<unk>", "c", "a", "x", "y", "<t>", "<s>"]),
        ("model:two", TOKENS["two"]),
    ],
)
@pytest.mark.parametrize("key", ["model.embed_tokens.weight", "lm_head.weight"])
def test_rows_belong_to_the_tokens(models, source, tokens, key):
    plan = _plan(source)
    stored = {name: tensors_of(seed, rows=ROWS[name]) for seed, name in enumerate(TOKENS)}
    written = json.loads(plan.texts["tokenizer.json"])
    found = written["model"]["vocab"] | {e["content"]: e["id"] for e in written["added_tokens"]}
    assert found == {token: n for n, token in enumerate(tokens)}
    shape = next(o.shape for o in plan.outputs if o.name == key)
    assert shape[0] == len(tokens) + (source == "one")
    assert json.loads(plan.texts["config.json"])["vocab_size"] == shape[0]
    for name in TOKENS:
        rows = plan.checkpoints[name].read(key)
        assert list(rows.shape) == list(shape)
        for number, token in enumerate(tokens):
            assert torch.equal(rows[number], _expected(token, name, key, stored)), (name, token)
        for start, stop in ((0, 1), (1, 4), (3, shape[0]), (2, 2)):
            assert torch.equal(plan.checkpoints[name].read(key, start, stop), rows[start:stop])


def test_padding_rows_stay(models):
    plan = _plan("one", base="one", models=["one", "base"])
    stored = tensors_of(1, rows=8)["lm_head.weight"]
    assert torch.equal(plan.checkpoints["one"].read("lm_head.weight"), stored)
    assert torch.equal(plan.checkpoints["base"].read("lm_head.weight")[7], stored[7])


def test_rows_are_padded_to_a_multiple_with_the_mean_row(models):
    plan = _plan(None, tokenizer={"source": "union", "pad_to_multiple_of": 8})
    for name in TOKENS:
        rows = plan.checkpoints[name].read("lm_head.weight")
        assert len(rows) == 16
        assert torch.equal(rows[10:], rows[:10].double().mean(0).float().expand(6, -1))
        assert torch.equal(plan.checkpoints[name].read("lm_head.weight", 9, 12), rows[9:12])


def test_adapted_embeddings_are_lined_up_a_block_at_a_time(models, monkeypatch):
    """No more rows are formed than are asked for, and the plan knows the memory that they take."""
    key, (rows, width), rank = "model.embed_tokens.weight", (8, 8), 3
    factor = "base_model.model.model.embed_tokens.lora_embedding_"
    a, b = torch.randn(rank, rows), torch.randn(width, rank)
    (models / "adapter").mkdir()
    save_file({factor + "A": a, factor + "B": b}, models / "adapter/adapter_model.safetensors")
    about = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank}
    (models / "adapter/adapter_config.json").write_text(json.dumps(about))
    plan = _plan("union", models=["base", "one+adapter", "two"])
    formed = []
    adapt = LoraCheckpoint._adapt
    monkeypatch.setattr(
        LoraCheckpoint,
        "_adapt",
        lambda s, k, rows, w: (formed.append(len(rows)), adapt(s, k, rows, w))[1],
    )
    stored = tensors_of(1, rows=rows)[key] + 2 * (a.T @ b.T)
    for name, own in (("one+adapter", stored), ("base", tensors_of(0, rows=6)[key])):
        checkpoint, ids = plan.checkpoints[name], _ids(name.split("+")[0])
        for number, token in enumerate(UNION):
            found = checkpoint.read(key, number, number + 1)[0]
            if token in ids:
                torch.testing.assert_close(found, own[ids[token]])
            elif token == "x":  # only one has it
                torch.testing.assert_close(found, stored[_ids("one")["x"]])
    assert formed and max(formed) == 1
    cut = next(c for o, c in zip(plan.outputs, check_plan(plan), strict=True) if o.name == key)
    assert cut.reading_bytes >= 4 * (len(UNION) * (width + rank) + width * rank)
    with pytest.raises(ValueError, match=r"embed_tokens.* of it to add adapters and line up"):
        check_memory(plan, check_plan(plan), cut.working_bytes - 1)


def test_a_token_without_a_row_of_its_own_is_lacking(models):
    """Tokenizers can know tokens that the model was never resized for."""
    write_model(models / "two", tensors_of(2, rows=4), TOKENS["two"], {"a": 4})
    rows = _plan("union").checkpoints["two"].read("lm_head.weight")
    stored = tensors_of(0, rows=6)["lm_head.weight"]
    assert torch.equal(rows[_ids("base")["a"]], stored[_ids("base")["a"]])


def test_another_models_tokenizer_brings_its_special_ids(models):
    assert json.loads(_plan("two").texts["config.json"])["bos_token_id"] == 2
    assert json.loads(_plan("union").texts["config.json"])["bos_token_id"] == 0


def test_special_ids_of_the_base_follow_their_tokens(models):
    """Those that the other tokenizer's model does not give itself, in both files."""
    config = json.loads((models / "base/config.json").read_text())
    about = {"eos_token_id": [5, 3, 4], "pad_token_id": 0, "bos_token_id": 5, "temperature": 0.5}
    (models / "base/config.json").write_text(json.dumps({**config, "unk_token_id": 4}))
    (models / "base/generation_config.json").write_text(json.dumps(about))
    texts = _plan("one").texts  # "<s>" is 5 in base and 6 in one, "c" 3 and 1, "d" is not there
    found = json.loads(texts["generation_config.json"])
    assert found == {**about, "eos_token_id": [6, 1], "bos_token_id": 1}
    config = json.loads(texts["config.json"])
    assert config["bos_token_id"] == 1 and config["unk_token_id"] is None
    (models / "one/generation_config.json").write_text(json.dumps({"eos_token_id": 2}))
    found = json.loads(_plan("one").texts["generation_config.json"])
    assert found["eos_token_id"] == 2 and found["bos_token_id"] == 6
    for source in ("base", "union"):
        texts = _plan(source).texts
        assert json.loads(texts["generation_config.json"]) == about


HEAD = "lm_head.weight"
CHOSEN = {
    # token: (setting, the row that models with the token get, the row that the others get)
    "a": ({"source": "one"}, None, ("one", 2)),
    "b": ({"source": "one"}, None, None),
    "x": ({"source": {"kind": "zero"}}, None, "zero"),
    "c": ({"source": {"kind": "zero"}, "force": True}, "zero", "zero"),
    "y": ({"source": "two", "force": True}, ("two", 2), ("two", 2)),
    "z": ({"source": {"kind": "model_token", "model": "base", "token": "d"}}, None, ("base", 4)),
    "new": ({"source": {"kind": "model_token", "model": "one", "token_id": 7}}, None, ("one", 7)),
}


@pytest.mark.parametrize("source", ["union", "base", "two"])
@pytest.mark.parametrize("token", [t for t in CHOSEN if t != "b"])
def test_rows_are_chosen_token_by_token(models, source, token):
    setting, owners, others = CHOSEN[token]
    plan = _plan(None, tokenizer={"source": source, "tokens": {token: setting}})
    written = json.loads(plan.texts["tokenizer.json"])
    ids = written["model"]["vocab"] | {e["content"]: e["id"] for e in written["added_tokens"]}
    plain = json.loads(_plan(source).texts["tokenizer.json"])
    before = plain["model"]["vocab"] | {e["content"]: e["id"] for e in plain["added_tokens"]}
    assert ids == before | {token: before.get(token, len(before))}
    stored = {name: tensors_of(seed, rows=ROWS[name])[HEAD] for seed, name in enumerate(TOKENS)}
    for name in TOKENS:
        rows = plan.checkpoints[name].read(HEAD)
        known = token in _ids(name)
        wanted = owners if known else others
        if wanted == "zero":
            expected = torch.zeros(8)
        elif wanted is None:
            expected = stored[name][_ids(name)[token]]
        else:
            expected = stored[wanted[0]][wanted[1]]
        assert torch.equal(rows[ids[token]], expected), name
        for other in set(before) - {token}:
            found = _plan(source).checkpoints[name].read(HEAD)
            assert torch.equal(rows[ids[other]], found[before[other]])


@pytest.mark.parametrize(
    "setting",
    [
        CHOSEN["b"][0],
        {"source": {"kind": "model_token", "model": "one", "token_id": 8}},
        {"source": {"kind": "model_token", "model": "two", "token": "a"}},
    ],
)
def test_rows_that_are_not_there_are_refused(models, setting):
    with pytest.raises(
        RecipeError, match=r"tokenizer.tokens.b: (one|two) has no row of (8|'[ab]')"
    ):
        _plan(None, tokenizer={"tokens": {"b": setting}})


def test_equal_vocabularies_are_left_as_they_are(models):
    write_model(models / "two", tensors_of(2, rows=6), TOKENS["base"], ADDED["base"])
    plan = _plan("union", models=["base", "two"])
    assert {type(c).__name__ for c in plan.checkpoints.values()} == {"Checkpoint"}
    assert plan.texts["tokenizer.json"] == (models / "base" / "tokenizer.json").read_bytes()


def test_tied_and_untied_models_align(models):
    write_model(models / "two", tensors_of(2, rows=4, tied=True), TOKENS["two"])
    plan = _plan("union")
    head = next(o for o in plan.outputs if o.name == "lm_head.weight")
    assert [s.key for s in head.experts] == [
        "lm_head.weight", "lm_head.weight", "model.embed_tokens.weight",
    ]  # fmt: skip
    assert {o.shape for o in plan.outputs if o.shape[0] == 10} == {(10, 8)}


def test_the_order_of_rows_is_part_of_the_hash(models):
    hashes = {s: _plan(s).checkpoints["two"].hash() for s in ("base", "union", "two")}
    assert len(set(hashes.values())) == 3


def test_every_model_that_gives_rows_is_part_of_the_hash(models):
    before = _plan("model:two", models=["base", "one"]).checkpoints["one"].hash()
    write_model(models / "two", tensors_of(9, rows=4), TOKENS["two"])
    assert _plan("model:two", models=["base", "one"]).checkpoints["one"].hash() != before


def test_a_missing_tokenizer_is_refused(models):
    (models / "two" / "tokenizer.json").unlink()
    with pytest.raises(RecipeError, match=r"two: two/tokenizer.json is missing"):
        _plan("union")


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        '{"model": 3}',
        '{"model": {}}',
        '{"model": {"vocab": [1]}}',
        '{"model": {"vocab": {"a": "b"}}}',
        '{"model": {"vocab": {"a": -1}}}',
        '{"model": {"vocab": {"a": 99999999}}}',
        '{"model": {"vocab": {}}, "added_tokens": [{"id": 1}]}',
    ],
)
def test_strange_tokenizer_files_are_refused(models, text):
    (models / "two" / "tokenizer.json").write_text(text)
    with pytest.raises(ValueError, match=r"two/tokenizer.json: "):
        _plan("union")


def test_models_without_the_counted_rows_are_refused(models):
    config = json.loads((models / "two" / "config.json").read_text())
    (models / "two" / "config.json").write_text(json.dumps(config | {"vocab_size": 99}))
    with pytest.raises(RecipeError, match="two: no tensor has vocab_size rows"):
        _plan("union")


def _vocabulary(name, tokens, kind="WordLevel", added=()):
    entries = [{"id": n, "content": t} for t, n in added]
    vocab = [[t, -1.0] for t in tokens] if kind == "Unigram" else {
        t: n for n, t in enumerate(tokens)
    }  # fmt: skip
    raw = {"model": {"type": kind, "vocab": vocab}, "added_tokens": entries}
    return Vocabulary(name, {t: n for n, t in enumerate(tokens)} | dict(added), raw)


def test_unigram_tokens_take_their_score_along():
    a, b = _vocabulary("a", "xy", "Unigram"), _vocabulary("b", "yz", "Unigram")
    b.raw["model"]["vocab"][1][1] = -7.5
    assert unite([a, b]).raw["model"]["vocab"] == [["x", -1.0], ["y", -1.0], ["z", -7.5]]
    assert a.raw["model"]["vocab"] == [["x", -1.0], ["y", -1.0]]


def test_unigram_tokens_that_have_no_place_are_refused():
    first = _vocabulary("a", "xy", "Unigram", [("<s>", 2)])
    with pytest.raises(RecipeError, match=r"token 'z' of b \(Unigram\) cannot be added"):
        unite([first, _vocabulary("b", "yz", "Unigram")])
    with pytest.raises(RecipeError, match=r"token 'z' of b \(BPE\) cannot be added"):
        unite([_vocabulary("a", "xy", "Unigram"), _vocabulary("b", "yz", "BPE")])


def test_the_union_loads_and_splits_as_before(models):
    tokenizers = pytest.importorskip("tokenizers")
    found = tokenizers.Tokenizer.from_str(_plan("union").texts["tokenizer.json"].decode())
    assert found.encode("a x <t> z d q").tokens == ["a", "x", "<t>", "z", "d", "<unk>"]
    assert found.get_vocab_size() == len(UNION)


vocabularies = st.lists(
    st.lists(st.sampled_from("abcdefgh"), unique=True, min_size=1), min_size=1, max_size=4
)


@settings(max_examples=60, deadline=None)
@given(vocabularies, st.integers(0, 3), st.lists(st.integers(0, 3), min_size=4, max_size=4))
def test_alignment_by_brute_force(lists, extra, padding):
    """Each row, looked up token by token."""
    found = {f"m{n}": _vocabulary(f"m{n}", tokens) for n, tokens in enumerate(lists)}
    sizes = {name: len(v.ids) + padding[n] for n, (name, v) in enumerate(found.items())}
    target = unite(list(found.values()))
    rows = target.size + extra
    alignments = align(target, rows, found, sizes, "m0")
    token_of = {n: token for token, n in target.ids.items()}
    for name, alignment in alignments.items():
        assert len(alignment.own) == rows
        for row in range(rows):
            own, others = int(alignment.own[row]), dict(alignment.others)
            if row in token_of:
                assert own == found[name].ids.get(token_of[row], -1)
                if own < 0:
                    have = {
                        m: v.ids[token_of[row]] for m, v in found.items() if token_of[row] in v.ids
                    }
                    have = {"m0": have["m0"]} if "m0" in have else have
                    assert {m: int(i[row]) for m, i in others.items() if i[row] >= 0} == have
            else:
                free = len(found[name].ids) <= row < sizes[name]
                assert own == (row if free else -1)


def test_vocabularies_of_real_size_take_no_time(models, tmp_path):
    many = [f"t{n}" for n in range(100_000)]
    for name, tokens in (("base", many), ("two", many[::-1])):
        write_tokenizer(tmp_path / name, tokens)
    base, two = (read_vocabulary(tmp_path / name, name) for name in ("base", "two"))
    target = unite([base, two])
    found = align(
        target, 100_000, {"base": base, "two": two}, {"base": 100_000, "two": 100_000}, "base"
    )
    assert found["base"].is_identity
    assert torch.equal(found["two"].own, torch.arange(99_999, -1, -1))
