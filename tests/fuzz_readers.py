"""Coverage-guided fuzzing of what reads strangers' files: headers, indices and recipes.

Run by `test_fuzz.py` for a few seconds, or by hand for as long as you like:
`python -m tests.fuzz_readers CORPUS_FOLDER -max_total_time=3600`.
"""

from __future__ import annotations

import sys

import atheris

with atheris.instrument_imports(include=["fastmerge.checkpoint", "fastmerge.jobs"]):
    from fastmerge.checkpoint.header import header_length, parse_header
    from fastmerge.checkpoint.index import parse_index
    from fastmerge.jobs.recipe import read_recipe

from safetensors import deserialize

from fastmerge.checkpoint import CheckpointError
from fastmerge.jobs.yaml_reader import RecipeError

PREFIX = 8


def check_file(data: bytes) -> bool:
    """Read a file's header; False if it is refused. What is accepted is as the library reads it."""
    try:
        length = header_length(data[:PREFIX], len(data), "file")
        header = parse_header(data[PREFIX : PREFIX + length], len(data), "file")
    except CheckpointError as error:
        assert len(str(error)) < 2000
        return False
    expected = dict(deserialize(data))
    assert set(header.tensors) == set(expected)
    for name, extent in header.tensors.items():
        assert PREFIX + length <= extent.start <= extent.stop <= len(data)
        assert list(extent.shape) == expected[name]["shape"]
        assert data[extent.start : extent.stop] == bytes(expected[name]["data"])
    return True


def check_index(data: bytes) -> bool:
    """Read an index; False if it is refused."""
    try:
        files = parse_index(data, "file").values()
    except CheckpointError:
        return False
    assert not any("/" in file or file.startswith("..") for file in files)
    return True


def check_recipe(data: bytes) -> bool:
    """Read a recipe; False if it is refused."""
    try:
        read_recipe(data)
    except RecipeError:
        return False
    return True


CHECKS = (check_file, check_index, check_recipe)


def one_input(data: bytes) -> None:
    """The first byte chooses the reader. Headers get their length if the second byte is even, so
    that not all inputs die of a wrong one."""
    if len(data) < 2:
        return
    check, rest = CHECKS[data[0] % len(CHECKS)], data[2:]
    if check is check_file and data[1] % 2 == 0:
        end = rest.rfind(b"}") + 1
        rest = end.to_bytes(PREFIX, "little") + rest
    check(rest)


if __name__ == "__main__":
    atheris.Setup(sys.argv, one_input)
    atheris.Fuzz()
