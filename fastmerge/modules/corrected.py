"""`CorrectedModel`: hooks correct what modules of a merged model give, for the sample's task."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from .dynamic import DynamicModel, check_batch
from .fingerprint import fingerprint


class Correction(nn.Module):
    """What corrects the output of one module.

    Attributes:
        tasks: the tasks that are selected, int64 [] or [B]; None: nothing is corrected.
    """

    tasks: Tensor | None = None

    def correct(self, module: nn.Module, args: Any, output: Any) -> Any:
        """A forward hook: what the module gave, corrected while a task is selected."""
        raise NotImplementedError


class CorrectedModel(DynamicModel):
    """A merged model whose modules' outputs are corrected while a task is selected.

    Any merged model serves: an ordinary module, one that is attached, or a dynamic model of the
    same tasks, whose task is then selected too. The model is not copied; its hooks do nothing while
    no task is selected.

    Args:
        model: the merged model.
        tasks: names of the K tasks.

    Raises:
        RuntimeError: the model runs outside of `with fastmerge.task(model, ids)`.
        ValueError: it runs with ids of another number of samples than its inputs have.
    """

    def __init__(self, model: nn.Module, tasks: Sequence[str]):
        super().__init__()
        self.model, self.tasks = model, list(tasks)
        self.count: int | None = None
        self._corrections: list[Correction] = []
        self._hooks: list[Any] = []

    def _install(self, corrections: Iterable[tuple[str, Correction]]) -> None:
        """Hook corrections on the modules of these names, of which the encoder has all."""
        modules = dict(self.encoder.named_modules())
        for name, correction in corrections:
            self._corrections.append(correction)
            self._hooks.append(modules[name].register_forward_hook(correction.correct))

    @property
    def encoder(self) -> nn.Module:
        """The module that the names of corrected modules are of."""
        return encoder_of(self.model)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self._corrections[0].tasks is None:
            raise RuntimeError(
                "no task is selected: run the model within `with fastmerge.task(model, ids)`"
            )
        if self.count is not None:
            check_batch(self.count, args, kwargs)
        return self.model(*args, **kwargs)

    @contextlib.contextmanager
    def select(self, rows: Tensor) -> Iterator[None]:
        former = self.count, self._corrections[0].tasks
        with selecting(self.model, rows):
            try:
                self._set(None if rows.dim() == 1 else len(rows), rows.argmax(-1))
                yield
            finally:
                self._set(*former)

    def _set(self, count: int | None, tasks: Tensor | None) -> None:
        self.count = count
        for correction in self._corrections:
            correction.tasks = tasks

    def remove(self) -> nn.Module:
        """Take the hooks off the merged model, and return it as it was."""
        for hook in self._hooks:
            hook.remove()
        return self.model

    @classmethod
    def fingerprint_of(cls, model: nn.Module) -> str:
        """Of the merged model; of a dynamic one, what it has of its base and what it saves."""
        if not isinstance(model, DynamicModel):
            return fingerprint(model.state_dict())
        parts = f"{model.method} {model.base} {model.config()} {fingerprint(model.tensors())}"
        return hashlib.blake2b(parts.encode(), digest_size=16).hexdigest()


def check_samples(output: Tensor, tasks: Tensor, label: str) -> None:
    """Raise ValueError unless the rows of an output [..., d] can be those of so many samples."""
    if output.shape[:-1].numel() % max(1, tasks.numel()):
        raise ValueError(
            f"{label!r} gives {list(output.shape)} for {tasks.numel()} task ids, expected samples "
            "in the first dimension"
        )


def encoder_of(model: nn.Module) -> nn.Module:
    """The module that computes: of a dynamic model the one within."""
    return model.model if isinstance(model, DynamicModel) else model


def selecting(model: nn.Module, rows: Tensor) -> contextlib.AbstractContextManager[None]:
    """Within the context, a dynamic model computes with these tasks, if it takes any."""
    if not isinstance(model, DynamicModel) or type(model).select is DynamicModel.select:
        return contextlib.nullcontext()
    return model.select(rows)
