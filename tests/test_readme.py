"""What the documents say against the code: examples run, tables and names are right."""

from __future__ import annotations

import ast
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import fastmerge
from fastmerge import info
from fastmerge.cli import app
from fastmerge.jobs.recipe import read_recipe
from fastmerge.ops import _library

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]

documents = pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))


def _blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def _table(header: str) -> list[list[str]]:
    """Cells of the README table whose header line starts with `header`, without its header."""
    lines = README[README.index(f"\n{header}") + 1 :].split("\n\n")[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_examples_run_and_learn(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    blocks = _blocks("python")
    example = next(block for block in blocks if "fm.learn" in block)
    assert len([line for line in example.splitlines() if line.strip()]) <= 10
    names: dict[str, object] = {}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the example is too small for more
    try:
        with torch.random.fork_rng():
            for number, block in enumerate(blocks):
                exec(compile(block, f"README.md python block {number}", "exec"), names)
    finally:
        torch.set_num_threads(threads)
    assert re.search(r"fixed \d+\.\d%, learned \d+\.\d%", capsys.readouterr().out)
    fixed, learned = names["accuracy"](names["fixed"]), names["accuracy"](names["model"])
    chance = 1 / names["TEACHER"].shape[1]
    assert chance + 0.2 < fixed < learned - 0.03
    assert names["history"].loss[-1] < 0.5 * names["history"].loss[0]


def test_recipes_are_good():
    blocks = [
        block
        for path in DOCUMENTS
        for block in re.findall(r"^```yaml\n(.*?)^```$", path.read_text("utf-8"), re.M | re.S)
    ]
    assert len(blocks) >= 2 and all(read_recipe(block).slices for block in blocks)


def test_kernel_table_matches_the_registry():
    ops = {row[0].strip("`"): row for row in _table("| op |")}
    registered: dict[str, list[bool]] = {}
    for name, native in _library.REGISTERED.items():
        family = name.removesuffix("_out").removesuffix("_backward")
        registered.setdefault(family, []).append(native)
    assert set(ops) == set(registered)
    for name, (_, _, reference, native, _, _, files) in ops.items():
        assert reference == "yes"
        assert {native.startswith("yes")} == set(registered[name])
        tests = re.findall(r"`(test_\w+\.py)`", files)
        assert tests
        for test in tests:
            assert name in (ROOT / "tests" / test).read_text(encoding="utf-8"), (name, test)


def test_kernel_table_matches_what_info_tells():
    for name, _, _, _, cuda, triton, _ in _table("| op |"):
        family = {name.strip("`") + suffix for suffix in ("", "_out", "_backward")}
        assert cuda.startswith(("yes", "offline")) == bool(family & {*info._CUDA}), name
        assert triton.startswith(("yes", "offline")) == bool(family & {*info._TRITON}), name
    assert {*info._CUDA, *info._TRITON} <= set(_library.REGISTERED)


def test_public_names_are_explained():
    documents = "\n".join(path.read_text(encoding="utf-8") for path in DOCUMENTS)
    unnamed = [
        name
        for name in fastmerge.__all__
        if not re.search(rf"(`|\bfm\.|\bfastmerge\.){name}\b", documents)
    ]
    assert unnamed == []
    assert all(getattr(fastmerge, name).__doc__ for name in fastmerge.__all__)


def test_install_variables_are_read_by_the_code():
    sources = [ROOT / "setup.py", *(ROOT / "tools").glob("*.py"), *(ROOT / "csrc").rglob("*.cpp")]
    code = "\n".join(path.read_text(encoding="utf-8") for path in sources)
    variables = [row[0].strip("`") for row in _table("| variable |")]
    assert variables
    assert [name for name in variables if name not in code] == []


@documents
def test_make_targets_exist(path):
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([\w-]+):", makefile, re.MULTILINE))
    named = set(re.findall(r"(?:^|`)make ([\w-]+)", path.read_text(encoding="utf-8"), re.MULTILINE))
    assert named <= targets


def test_commands_exist():
    commands = {command.name or command.callback.__name__ for command in app.registered_commands}
    (listed,) = re.findall(r"`fastmerge` has ([^.]*)\.", README)
    assert set(re.findall(r"`(\w+)`", listed)) == commands


@documents
def test_links_and_paths_lead_somewhere(path):
    text = path.read_text(encoding="utf-8")
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", text)
    broken = [link for link in links if not (path.parent / link).exists()]
    paths = re.findall(r"`((?:fastmerge|csrc|kernels|tests|tools|docs)/[\w./]+)`", text)
    missing = [name for name in paths if not (ROOT / name).exists()]
    assert (broken, missing) == ([], [])


def _imported_files(path: Path) -> Iterator[Path]:
    """Files of the package that a file imports from, also inside functions."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            folder = path.parents[node.level - 1].joinpath(*filter(None, [node.module]))
            for target in (*(folder / alias.name for alias in node.names), folder):
                files = (target / "__init__.py", target.with_suffix(".py"))
                yield from (file for file in files if file.is_file())


def test_imports_never_run_up_the_floors():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line.startswith("|") and "`fastmerge/" in line]
    floors = [re.findall(r"`((?:fastmerge|kernels)/[\w./]*)`", row.split("|")[2]) for row in rows]
    floor_of = {
        file: floor
        for floor, places in enumerate(floors)
        for place in places
        for file in ([ROOT / place] if place.endswith(".py") else (ROOT / place).rglob("*.py"))
    }
    package = {*(ROOT / "fastmerge").rglob("*.py")} - {ROOT / "fastmerge" / "__main__.py"}
    assert package <= set(floor_of), "files without a floor in CONTRIBUTING.md"
    doors = ROOT / "fastmerge" / "__init__.py"
    upwards = [
        (str(file.relative_to(ROOT)), str(imported.relative_to(ROOT)))
        for file, floor in floor_of.items()
        for imported in _imported_files(file)
        if imported != doors and floor_of[imported] > floor
    ]
    assert upwards == []


def test_tables_are_those_of_the_committed_results():
    path = ROOT / "tools" / "readme_tables.py"
    spec = importlib.util.spec_from_file_location("readme_tables", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert "AdaMerging layer-wise" in module.demo_table()
    assert module.with_tables("<!-- methods table -->\n<!-- /methods table -->").count("\n|") > 30
    figures = module.with_tables("<!-- demo of ties -->\nold\n<!-- /demo -->")
    assert "old" not in figures and "| TIES" in figures and "| individual experts |" in figures
    for path in module.DOCUMENTS:
        text = path.read_text(encoding="utf-8")
        assert module.with_tables(text) == text, path


def test_merged_weight_document_names_every_test():
    text = (ROOT / "docs" / "merged-weight.md").read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line.startswith("|")]
    cells = [row.strip("|").rsplit("|", 1)[-1].strip() for row in rows]
    named = [cell.strip("`") for cell in cells if cell not in ("test", "---")]
    files = (ROOT / "tests").glob("test_merged_weight_*.py")
    written = [name for f in files for name in re.findall(r"^def (test_\w+)", f.read_text(), re.M)]
    assert sorted(named) == sorted(written)
