"""Representation Surgery and SurgeryV2: small adapters that move a merged model's representations
back towards those of each task's expert."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..ops import residual_adapter
from ..sources import named_experts
from .corrected import CorrectedModel, Correction, check_samples, encoder_of, selecting
from .dynamic import DynamicModel
from .representations import Site, find_sites


class Surgery(CorrectedModel):
    """A merged model whose final representation is corrected for the sample's task.

    z <- z - U_t relu(V_t z), V_t [rank, d], U_t [d, rank], t the task. U starts at 0, that is at
    the merged model. Any merged model serves: an ordinary module, one that is attached, or a
    dynamic model of the same tasks, whose task is then selected too. The model is not copied:
    hooks on its modules correct what they give, while a task is selected and at no other time.

    Args:
        model: the merged model.
        tasks: names of the K tasks.
        sites: its representations that are corrected.
        rank: of the adapters.
        seed: of V's initial values.

    Attributes:
        adapters: one `Adapters` a site, in the order of the sites; what is learned.
        encoder: the module that the sites' names are of.

    Raises:
        RuntimeError: the model runs outside of `with fastmerge.task(model, ids)`.
        ValueError: it runs with ids of another number of samples than its inputs have.

    Source: Representation Surgery (arXiv 2402.02705).
    """

    method = "surgery"
    deep: ClassVar[bool] = False

    def __init__(
        self,
        model: nn.Module,
        tasks: Sequence[str],
        sites: Sequence[Site],
        rank: int,
        *,
        seed: int = 0,
    ):
        super().__init__(model, tasks)
        if rank < 1:
            raise ValueError(f"rank must be at least 1, got {rank}")
        if not tasks or len(set(tasks)) != len(tasks):
            raise ValueError(f"surgery needs different tasks, got {list(tasks)}")
        self.rank = rank
        modules = dict(self.encoder.named_modules())
        absent = [site.label for site in sites if site.module not in modules]
        if absent:
            raise ValueError(f"the adapters are another model's: this one has no {absent[0]!r}")
        device = next(model.parameters()).device
        generator = torch.Generator().manual_seed(seed)
        self.adapters = nn.ModuleList(
            Adapters(site, len(self.tasks), rank, generator).to(device) for site in sites
        )
        self._install((adapters.site.module, adapters) for adapters in self.adapters)

    @classmethod
    def build(
        cls,
        model: nn.Module,
        experts: Any,
        *,
        inputs: Any,
        rank: int = 16,
        blocks: str | Sequence[str] | None = None,
        final: str | None = None,
        features: int | None = None,
        seed: int = 0,
    ) -> Surgery:
        """Put adapters at their initial values, which change nothing, on a merged model.

        `fastmerge.train_surgery` trains them.

        Args:
            model: the merged model; it gets hooks, which do nothing while no task is selected.
            experts: {task: expert} as for `fastmerge.build`, or the tasks' names alone: only the
                names are looked at.
            inputs: a batch for the model, a tensor, tuple, list or dict, of at least two samples;
                shows where the representations are and how wide.
            rank: of the adapters; the published code has 16.
            blocks, final, features: see `find_sites`; `blocks` is for SurgeryV2.
            seed: of the initial values.

        Raises:
            ValueError: the representations are not found, or the tasks are not the model's.
        """
        if isinstance(model, Surgery):
            raise ValueError("the model has adapters already")
        if blocks is not None and not cls.deep:
            raise ValueError(f"blocks= is for surgery_v2, {cls.method} has none")
        if isinstance(experts, Sequence) and experts and all(isinstance(e, str) for e in experts):
            tasks = list(experts)
        else:
            tasks = list(named_experts(experts))
        if isinstance(model, DynamicModel) and model.tasks != tasks:
            raise ValueError(f"tasks are {tasks}, expected the merged model's, {model.tasks}")
        device = next(model.parameters()).device
        with selecting(model, torch.eye(len(tasks), device=device)[0]):
            sites = find_sites(
                encoder_of(model),
                inputs,
                deep=cls.deep,
                run=model,
                blocks=blocks,
                final=final,
                features=features,
            )
        return cls(model, tasks, sites, rank, seed=seed)

    @property
    def sites(self) -> list[Site]:
        """The representations that are corrected."""
        return [adapters.site for adapters in self.adapters]

    def fold(self, task: str) -> dict[str, Tensor]:
        raise TypeError(
            "surgery corrects representations, no weights: there is no state dict of one task"
        )

    def nbytes(self) -> int:
        """Bytes of the adapters."""
        return sum(parameter.nbytes for parameter in self.adapters.parameters())

    def tensors(self) -> dict[str, Tensor]:
        return dict(self.adapters.state_dict())

    def config(self) -> dict[str, Any]:
        return {"tasks": self.tasks, "rank": self.rank, "sites": [vars(s) for s in self.sites]}

    @classmethod
    def restore(
        cls, model: nn.Module, tensors: dict[str, Tensor], config: dict[str, Any]
    ) -> Surgery:
        sites = [Site(**about) for about in config["sites"]]
        surgery = cls(model, config["tasks"], sites, config["rank"])
        surgery.adapters.to(next(iter(tensors.values())).dtype).load_state_dict(tensors)
        return surgery


class SurgeryV2(Surgery):
    """A merged model whose every block is corrected for the sample's task, on all tokens.

    H_l <- H_l - U_tl relu(V_tl H_l) after every block l, which the next block gets, and the final
    representation as in `Surgery`. Blocks are found by name, whatever their number and width.

    Source: SurgeryV2 (arXiv 2410.14389).
    """

    method = "surgery_v2"
    deep = True


class Adapters(Correction):
    """The K tasks' adapters of one representation.

    Args:
        site: the representation.
        count: K.
        rank: of the adapters.
        generator: of the initial values: down ~ U(-1/sqrt(d), 1/sqrt(d)), up = 0.

    Attributes:
        down: [K, rank, d].
        up: [K, d, rank].
    """

    def __init__(self, site: Site, count: int, rank: int, generator: torch.Generator):
        super().__init__()
        self.site = site
        bound = 1 / math.sqrt(site.width)
        down = torch.empty(count, rank, site.width).uniform_(-bound, bound, generator=generator)
        self.down = nn.Parameter(down)
        self.up = nn.Parameter(torch.zeros(count, site.width, rank))

    def forward(self, representation: Tensor) -> Tensor:
        """The representation [B, ..., d] of the selected tasks, corrected.

        Raises:
            ValueError: another width, or a number of rows that the samples do not divide.
        """
        width = representation.shape[-1]
        if width != self.site.width:
            raise ValueError(
                f"{self.site.label!r} gives {list(representation.shape)}, its adapters have width "
                f"{self.site.width}"
            )
        check_samples(representation, self.tasks, self.site.label)
        return residual_adapter(representation, self.down, self.up, self.tasks)

    def correct(self, module: nn.Module, args: Any, output: Any) -> Any:
        """A forward hook: what the module gave, corrected while a task is selected."""
        return output if self.tasks is None else self.site.put(output, self(self.site.of(output)))

    def extra_repr(self) -> str:
        count, rank, width = self.down.shape
        return f"{self.site.label}, tasks={count}, rank={rank}, width={width}"
