"""The files beside the weights: configuration, tokenizer, chat template."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..checkpoint.header import parse_json
from ..checkpoint.index import check_inside
from .layers import layer_counts
from .templates import TEMPLATES
from .yaml_reader import RecipeError

MAX_FILE = 256 << 20
MAX_DEPTH = 32
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model",
    "sentencepiece.bpe.model", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
OTHER_FILES = (
    "generation_config.json", "preprocessor_config.json", "processor_config.json",
    "image_processor_config.json", "video_preprocessor_config.json",
)  # fmt: skip
_TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json")
_ID_KEYS = ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file that others wrote.

    Raises:
        RecipeError: too large or nested too deeply.
        CheckpointError: not a JSON object, or a link that leads out of its folder.
    """
    value = parse_json(_read(path), str(path))
    level: list[Any] = [value]
    for _ in range(MAX_DEPTH):
        parts = (part.values() if isinstance(part, dict) else part for part in level)
        level = [inner for part in parts for inner in part if isinstance(inner, (dict, list))]
        if not level:
            return value
    raise RecipeError(f"{path}: nested deeper than {MAX_DEPTH} levels")


def read_config(folder: Path) -> dict[str, Any]:
    """config.json, {} if there is none."""
    path = folder / "config.json"
    return read_json(path) if path.is_file() else {}


def _read(path: Path) -> bytes:
    check_inside(path.parent, path.name)
    size = path.stat().st_size
    if size > MAX_FILE:
        raise RecipeError(f"{path}: {size} bytes, expected at most {MAX_FILE}")
    return path.read_bytes()


def copied_files(folder: Path, names: Iterable[str]) -> dict[str, bytes]:
    """{name: contents} of those files that a folder has."""
    return {name: _read(folder / name) for name in names if (folder / name).is_file()}


def dump_json(value: Mapping[str, Any]) -> bytes:
    """A JSON file's text."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def edit_config(
    config: Mapping[str, Any],
    *,
    dtype: str | None = None,
    layers: tuple[int, Sequence[int]] | None = None,
    vocabulary: int | None = None,
    ids: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """config.json of the output.

    Args:
        config: the base model's.
        dtype: stored dtype, if the recipe sets it.
        layers: (layers of the base model, the layer of a source that each layer of the output is
            made of), if they are chosen: counts, and lists with an entry a layer, follow.
        vocabulary: rows of the vocabulary tensors, if they changed.
        ids: special token ids of the output's tokenizer, in place of the base model's.
    """
    result = json.loads(json.dumps(config))
    if dtype is not None:
        keys = [key for key in ("dtype", "torch_dtype") if key in result] or ["torch_dtype"]
        result.update(dict.fromkeys(keys, dtype))
    if layers is not None:
        count, sources = layers
        for path, number in layer_counts(config).items():
            if number == count:
                part = _part(result, path[:-1])
                part[path[-1]] = len(sources)
                for key, values in part.items():
                    if isinstance(values, list) and len(values) == count and "layer" in key:
                        part[key] = [values[source] for source in sources if source < count]
    if vocabulary is not None:
        parts = [result, *(v for k, v in result.items() if k == "text_config")]
        for part in parts:
            if isinstance(part, dict) and "vocab_size" in part:
                part["vocab_size"] = vocabulary
    for key in _ID_KEYS:
        if ids is not None and key in ids:
            result[key] = ids[key]
    return result


def _part(config: dict[str, Any], path: Sequence[str]) -> dict[str, Any]:
    for key in path:
        config = config[key]
    return config


def special_ids(config: Mapping[str, Any]) -> dict[str, Any]:
    """The special token ids that a configuration gives."""
    return {key: config[key] for key in _ID_KEYS if key in config}


def moved_ids(
    config: Mapping[str, Any], given: Mapping[str, Any], moved: Mapping[int, int]
) -> dict[str, Any]:
    """The special token ids of a configuration in another tokenizer.

    Args:
        config: the configuration.
        given: the ids that the other tokenizer's model gives; they count first.
        moved: {id: that token's id there}; one that is not there is left out, None if none is.
    """
    result = dict(given)
    for key, value in special_ids(config).items():
        if key not in given and value is not None:
            numbers = value if isinstance(value, list) else [value]
            found = [moved[number] for number in numbers if type(number) is int and number in moved]
            result[key] = (found if isinstance(value, list) else found[0]) if found else None
    return result


def vocabulary_size(config: Mapping[str, Any]) -> int | None:
    """`vocab_size`, also of a nested text configuration."""
    for part in (config, config.get("text_config")):
        if isinstance(part, dict) and isinstance(part.get("vocab_size"), int):
            return part["vocab_size"]
    return None


def is_tied(config: Mapping[str, Any]) -> bool | None:
    """Whether the output layer shares the input embedding; None if the configuration is silent."""
    for part in (config, config.get("text_config")):
        if isinstance(part, dict) and isinstance(part.get("tie_word_embeddings"), bool):
            return part["tie_word_embeddings"]
    return None


def chat_template(
    files: Mapping[str, bytes], wanted: str, inputs: Sequence[Path]
) -> dict[str, bytes]:
    """Tokenizer files with a chat template, written where old and new readers look for it.

    Args:
        files: the output's tokenizer files.
        wanted: "auto" (the most frequent of the inputs, the first of equals), the name of a
            template in `TEMPLATES`, or a Jinja text.
        inputs: the inputs' folders, the base model's first.

    Raises:
        RecipeError: a word that is neither.
    """
    if wanted == "auto":
        found = [t for t in map(_template_of, inputs) if t is not None]
        if not found:
            return dict(files)
        text = Counter(found).most_common(1)[0][0]
    elif wanted in TEMPLATES:
        text = TEMPLATES[wanted]
    elif "{" in wanted:
        text = wanted
    else:
        raise RecipeError(
            f"chat_template: {wanted!r} is no template; expected auto, {', '.join(TEMPLATES)} or a "
            "Jinja text"
        )
    files = {name: data for name, data in files.items() if name not in _TEMPLATE_FILES}
    config = parse_json(files.get("tokenizer_config.json", b"{}"), "tokenizer_config.json")
    files["tokenizer_config.json"] = dump_json({**config, "chat_template": text})
    files["chat_template.jinja"] = text.encode()
    return files


def _template_of(folder: Path) -> str | None:
    path = folder / "chat_template.jinja"
    if path.is_file():
        return _read(path).decode()
    path = folder / "tokenizer_config.json"
    found = read_json(path).get("chat_template") if path.is_file() else None
    return found if isinstance(found, str) else None
