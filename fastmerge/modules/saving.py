"""`save` and `load` of dynamic models: one safetensors file and a small JSON, no pickles."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..checkpoint.errors import CheckpointError
from ..checkpoint.header import parse_json
from ..checkpoint.writer import check_target, new_folder, write_text
from .dynamic import DynamicModel, method_class
from .fingerprint import fingerprint

FORMAT = "fastmerge dynamic model 1"
WEIGHTS, DESCRIPTION = "model.safetensors", "dynamic.json"
MAX_DESCRIPTION = 64 << 20  # bytes


def save(model: DynamicModel, folder: str | Path, *, overwrite: bool = False) -> None:
    """Write what a dynamic model has beside its base model into a folder.

    The folder appears complete or not at all.

    Args:
        model: what `fastmerge.build` or `fastmerge.load` gave.
        folder: a new or empty folder.
        overwrite: replace an earlier one.

    Raises:
        FileExistsError: something is there already.
        ValueError: the model was made in another way, so that its base model is not known.
    """
    out = Path(folder)
    if model.base is None:
        raise ValueError("save needs a model of fastmerge.build or fastmerge.load")
    check_target(out, overwrite)
    tensors = {name: t.detach().cpu().contiguous() for name, t in model.tensors().items()}
    config = model.config()
    description = {
        "format": FORMAT,
        "method": model.method,
        "base": model.base,
        "config": config,
        "digest": _digest(tensors, config),
    }
    with new_folder(out, overwrite) as partial:
        save_file(_apart(tensors), partial / WEIGHTS, metadata={"format": "pt"})
        write_text(partial / DESCRIPTION, json.dumps(description, indent=1).encode())


def load(folder: str | Path, model: nn.Module, **options: Any) -> DynamicModel:
    """The dynamic model that `save` wrote, on its base model.

    Args:
        folder: what `save` wrote.
        model: the base model, the very one it was built from; left as it is.
        options: what the method does not save, for example `features` of Twin-Merging.

    Raises:
        FileNotFoundError: a file is missing.
        CheckpointError: the folder is damaged, or belongs to another base model.
        ValueError: the model has merged weights already.
    """
    folder = Path(folder)
    for name in (DESCRIPTION, WEIGHTS):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder / name}: no such file; expected what save wrote")
    method, base, config, digest = _description(folder / DESCRIPTION)
    found = method_class(method).fingerprint_of(model)
    if found != base:
        raise CheckpointError(
            f"{folder}: belongs to another base model: its fingerprint of names, shapes, dtypes "
            f"and bytes is {base}, the given model's {found}"
        )
    device = next(model.parameters()).device
    try:
        tensors = load_file(folder / WEIGHTS)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{folder / WEIGHTS}: cannot be read: {error}") from error
    if _digest(tensors, config) != digest:
        raise CheckpointError(f"{folder}: damaged: its contents do not have the digest {digest}")
    tensors = {name: tensor.to(device) for name, tensor in tensors.items()}
    restored = method_class(method).restore(model, tensors, config, **options)
    restored.base = base
    return restored


def _description(path: Path) -> tuple[str, str, dict[str, Any], str]:
    """Method, base model's fingerprint, config and digest."""
    size = path.stat().st_size
    if size > MAX_DESCRIPTION:
        raise CheckpointError(f"{path}: {size} bytes, expected at most {MAX_DESCRIPTION}")
    about = parse_json(path.read_bytes(), str(path))
    if about.get("format") != FORMAT:
        raise CheckpointError(f"{path}: format {about.get('format')!r}, expected {FORMAT!r}")
    kinds = {"method": str, "base": str, "config": dict, "digest": str}
    for key, kind in kinds.items():
        if not isinstance(about.get(key), kind):
            raise CheckpointError(
                f"{path}: {key} is {about.get(key)!r}, expected a {kind.__name__}"
            )
    return about["method"], about["base"], about["config"], about["digest"]


def _digest(tensors: dict[str, Tensor], config: dict[str, Any]) -> str:
    text = json.dumps(config, sort_keys=True)
    return hashlib.blake2b((fingerprint(tensors) + text).encode(), digest_size=16).hexdigest()


def _apart(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors without shared memory, which safetensors does not take."""
    seen: set[int] = set()
    apart = {}
    for name, tensor in tensors.items():
        start = tensor.untyped_storage().data_ptr()
        apart[name] = tensor.clone() if start in seen else tensor
        seen.add(start)
    return apart
