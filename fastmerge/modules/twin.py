"""Twin-Merging: one shared expert, and of every task a low-rank part that a router mixes in."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..adapters import selected
from ..attachment import attach_deltas, check_unattached, parameter_places
from ..checking import Patterns, check_models, matches, select_names
from ..decomposition import low_rank_factors
from ..deltas import Deltas, Dense, Experts, FactorPairs, LowRank
from ..merged_weight import MergedWeight
from ..merging import merge
from ..row_coefficients import RowCoefficients
from ..sample_values import SampleValues
from ..sources import read_experts, read_tensors
from .copies import with_values
from .dynamic import DynamicModel, check_batch
from .task_router import TaskRouter, binned, pooled_state
from .twin_lora import factor_pairs

RANK_RULES = ("exact", "float")
ROUTINGS = ("soft", "one_hot", "binned")
SELECTIONS = ("all", "task_tensors")
LORA = ("product", "factors")
FACTOR_RANK = 8
TASK_TENSORS = {"paper": None, "code": ("*classifier*", "*bias*")}


def rank_of(shape: Sequence[int], ratio: float, rule: str = "exact") -> int:
    """Rank that a ratio leaves of a tensor's matrix [O, rest]: ratio min(O, rest), rounded down.

    Args:
        shape: of the tensor, at least two dimensions.
        ratio: more than 0, at most 1.
        rule: "exact" takes the ratio as the decimal number it is written as; "float" computes
            int((1 - (1 - ratio)) n) in fp64 as the published code does, where 0.1 of 5120 is 511.

    Raises:
        ValueError: a ratio out of range or an unknown rule.

    Source: Twin-Merging (arXiv 2406.15479); "90 % sparsity" there is a mask rate of 0.9, so a tenth
    of the rank, not of the numbers.
    """
    if not 0 < ratio <= 1:
        raise ValueError(f"rank_ratio must be in (0, 1], got {ratio}")
    if rule not in RANK_RULES:
        raise ValueError(f"rank_rule must be one of {', '.join(RANK_RULES)}, got {rule!r}")
    short = min(shape[0], torch.Size(shape[1:]).numel())
    if rule == "exact":
        return int(Fraction(str(ratio)) * short)
    return int((1 - round(1 - ratio, 12)) * short)


class TwinMerging(DynamicModel):
    """A model whose every sample takes as much of each task's own part as a router says.

    W_b = W_s + sum_k w_bk v_k with W_s the shared expert, a merged model, and v_k what rank r keeps
    of theta_k - theta_s; tensors that are no matrices keep all of it. No W_b is ever built: layers
    compute with row coefficients. The router reads pooled features of the shared model, so an input
    goes through the model twice; where tasks are selected with `fastmerge.task`, once. With one
    expert there is nothing to route.

    Routing "soft" takes the softmax of the router's logits, "one_hot" the likeliest task alone, and
    "binned" (the paper's batched inference) the mean weights of the sample's group, see `binned`,
    which depends on the samples beside it.

    Args:
        model: the shared expert; its tensors become merged weights.
        deltas: {tensor name: its K deltas}.
        tasks: the K tasks.
        task_tensors: names of those deltas that follow the sample's task and never the router.
        routing: "soft", "one_hot" or "binned".
        selection: what `fastmerge.task` selects: "all" tensors, or "task_tensors" alone while the
            router mixes the others, as the published code evaluates.
        least: router weights below it are taken as 0, which saves their products.
        features: callable(model, *inputs) -> [B, d], by default `pooled_state`.

    Attributes:
        router: a `TaskRouter`, or None.

    Raises:
        ValueError: an option out of range.

    Source: Twin-Merging (arXiv 2406.15479).
    """

    method = "twin"

    def __init__(
        self,
        model: nn.Module,
        deltas: Mapping[str, Deltas],
        tasks: Sequence[str],
        *,
        task_tensors: Sequence[str] = (),
        routing: str = "soft",
        selection: str = "all",
        least: float = 0.0,
        features: Callable[..., Tensor] | None = None,
    ):
        super().__init__()
        _check_options(routing, selection, least)
        self.model, self.tasks = model, list(tasks)
        self.routing, self.selection, self.least = routing, selection, least
        self.features = pooled_state if features is None else features
        self.task_tensors = list(task_tensors)
        self.router: TaskRouter | None = None
        self.selected: Tensor | None = None
        own = set(task_tensors)
        self._groups: dict[str, RowCoefficients] = {}
        for key, names in (
            ("routed", [name for name in deltas if name not in own]),
            ("task", [name for name in deltas if name in own]),
        ):
            if names:
                self._groups[key] = RowCoefficients(names, self.tasks)
        coefficients = {n: group for group in self._groups.values() for n in group.names}
        attach_deltas(model, deltas, coefficients)

    def train(self, mode: bool = True) -> TwinMerging:
        """The model's mode; the router always evaluates, its training is `train_router`."""
        super().train(mode)
        if self.router is not None:
            self.router.eval()
        return self

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's output, each sample with its own weights.

        Raises:
            RuntimeError: no task is selected, and there is no router or a tensor follows the task.
        """
        if self.selected is not None and self.selected.dim() == 2:
            check_batch(len(self.selected), args, kwargs)
        if self.selected is not None and self.selection == "all":
            rows = self.selected
        else:
            rows = self.weights(*args, **kwargs)
        with self._computing_with(rows, self.selected if self.task_tensors else None):
            output = self.model(*args, **kwargs)
        return pytree.tree_map(lambda y: y.of_batch() if isinstance(y, SampleValues) else y, output)

    def weights(self, *args: Any, **kwargs: Any) -> Tensor:
        """How much of each task the router gives each sample of these inputs, [B, K]; [K] of 1 for
        one expert."""
        if len(self.tasks) == 1:
            return torch.ones(1, device=next(self.model.parameters()).device)
        if self.router is None:
            raise RuntimeError(
                "the model has no router: train one with fastmerge.train_router(model, batches), "
                "or select tasks with `with fastmerge.task(model, ids)`"
            )
        return self.route(self.features_of(*args, **kwargs))

    def route(self, features: Tensor) -> Tensor:
        """Weights [B, K] of features [B, d] by the model's routing."""
        with torch.no_grad(), torch.autocast(features.device.type, enabled=False):
            weights = self.router(features).softmax(-1)
        if self.routing == "one_hot":
            return F.one_hot(weights.argmax(-1), len(self.tasks)).to(weights.dtype)
        if self.routing == "binned":
            weights = binned(weights)
        return weights.where(weights >= self.least, 0) if self.least else weights

    def features_of(self, *args: Any, **kwargs: Any) -> Tensor:
        """What the router reads: features [B, d] of inputs, from the shared expert."""
        nothing = torch.zeros(len(self.tasks), device=next(self.model.parameters()).device)
        with torch.no_grad(), self._computing_with(nothing, nothing):
            features = self.features(self.model, *args, **kwargs)
        if not isinstance(features, Tensor) or features.dim() != 2:
            found = list(features.shape) if isinstance(features, Tensor) else type(features)
            raise ValueError(f"features are {found}, expected [B, d]")
        return features

    @contextlib.contextmanager
    def select(self, rows: Tensor) -> Iterator[None]:
        """Take these weights [B, K] or [K] within the context instead of the router's."""
        former, self.selected = self.selected, rows
        try:
            yield
        finally:
            self.selected = former

    def set_router(self, router: TaskRouter | None) -> None:
        """Mix by this router from now on.

        Raises:
            ValueError: it was trained for other tasks, or the same in another order.
        """
        if router is not None and list(router.tasks) != self.tasks:
            raise ValueError(
                f"the router was trained for tasks {list(router.tasks)}, expected {self.tasks}"
            )
        self.router = None if router is None else router.eval()

    @contextlib.contextmanager
    def _computing_with(self, routed: Tensor, task: Tensor | None) -> Iterator[None]:
        rows = {"routed": routed, "task": task}
        with contextlib.ExitStack() as stack:
            for key, group in self._groups.items():
                if rows[key] is not None:
                    stack.enter_context(group.using(rows[key]))
            yield

    @classmethod
    def build(
        cls,
        model: nn.Module,
        experts: Any,
        *,
        shared: float | Mapping[str, Any] = 0.3,
        rank_ratio: float = 0.1,
        rank_rule: str = "exact",
        rank: int | None = None,
        whole: Patterns = None,
        svd: str = "auto",
        task_tensors: Patterns = None,
        exclude: Patterns = None,
        routing: str = "soft",
        selection: str = "all",
        least: float = 0.0,
        router: TaskRouter | None = None,
        features: Callable[..., Tensor] | None = None,
        lora: str = "product",
        seed: int = 0,
        allow_nonfinite: bool = False,
    ) -> TwinMerging:
        """Merge experts into a shared one, and keep a compressed rest of each.

        Args:
            model: the base model; left as it is.
            experts: K fine-tuned models, as for `fastmerge.attach`.
            shared: how the shared expert is merged: lambda of task arithmetic (0.3 for the paper's
                adapters, 0.29 for its RoBERTa), or arguments of `fastmerge.merge`, for example
                dict(method="ties", density=0.2).
            rank_ratio, rank_rule: see `rank_of`.
            rank: the same rank for every matrix instead, less where a matrix is smaller.
            whole: matrices that are kept uncompressed.
            svd: "exact", "randomized" or "auto", see `decomposition.low_rank_factors`.
            task_tensors: tensors that are not merged but taken from the sample's own expert: globs
                or a function of the name; "paper" (none) or "code" (classifiers and biases).
            exclude: parameters that stay the base's.
            routing, selection, least, features: as of the class.
            router: one that was trained for these tasks before.
            lora: what of adapters is merged: "product", the weights they stand for, as in the
                paper's appendix, or "factors", A and B each by itself, as in the code, with
                `rank` (8 by default) of the rests of each. Only for experts that all are adapters.
            seed: of the randomized decomposition.
            allow_nonfinite: accept NaN or Inf in base or experts where no matrix is decomposed.

        Raises:
            ValueError: experts do not match the base, a rank is 0, or an option is out of range.
        """
        check_unattached(model)
        _check_options(routing, selection, least)
        if rank is not None and rank < 1:
            raise ValueError(f"rank must be at least 1, got {rank}")
        if isinstance(task_tensors, str):
            task_tensors = TASK_TENSORS.get(task_tensors, task_tensors)
        parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())
        _, tied = parameter_places(model)
        floating = [name for name, p in parameters.items() if p.is_floating_point()]
        names = select_names(floating, None, exclude)
        if lora not in LORA:
            raise ValueError(f"lora must be one of {', '.join(LORA)}, got {lora!r}")
        options = {
            "routing": routing,
            "selection": selection,
            "least": least,
            "features": features,
        }
        if lora == "factors":
            if isinstance(shared, Mapping):
                raise ValueError("lora='factors' needs a number as shared=, lambda of the factors")
            tasks, found = factor_pairs(
                experts,
                read_tensors(model, "base"),
                tied,
                scaling=shared,
                rank=rank or FACTOR_RANK,
                svd=svd,
                seed=seed,
                allow_nonfinite=allow_nonfinite,
            )
            twin = cls(with_values(model, {}), selected(found, names), tasks, **options)
            twin.set_router(router)
            return twin.train(model.training)
        base = {name: parameters[name].detach() for name in names}
        tasks, tensors = check_models(
            base,
            read_experts(experts, read_tensors(model, "base")),
            known=[*tied, *buffers],
            tied=tied,
            allow_nonfinite=allow_nonfinite,
        )
        own = [name for name in names if matches(name, task_tensors)]
        mixed = [name for name in names if name not in set(own)]
        ranks = {
            name: _rank(name, base[name].shape, rank_ratio, rank_rule, rank)
            for name in mixed
            if is_matrix(base[name].shape) and not matches(name, whole)
        }
        merged = _shared(
            {name: base[name] for name in mixed},
            {task: {name: tensors[name][k] for name in mixed} for k, task in enumerate(tasks)},
            shared,
        )
        deltas: dict[str, Deltas] = {}
        for name in mixed:
            found = _rest(name, merged[name], tensors[name], ranks.get(name), svd, seed)
            if found is not None:
                deltas[name] = found
        deltas |= {name: Experts([t.contiguous() for t in tensors[name]]) for name in own}
        if not deltas:
            raise ValueError("the experts are all alike: there is nothing to mix")
        twin = cls(with_values(model, merged), deltas, tasks, task_tensors=own, **options)
        twin.set_router(router)
        return twin.train(model.training)

    def fold(self, task: str) -> dict[str, Tensor]:
        """An ordinary state dict for one task: the shared expert and that task's part.

        Raises:
            ValueError: an unknown task.
        """
        if task not in self.tasks:
            raise ValueError(f"unknown task {task!r}, expected one of {self.tasks}")
        device = next(self.model.parameters()).device
        row = F.one_hot(torch.tensor(self.tasks.index(task)), len(self.tasks)).float().to(device)
        with torch.no_grad(), self._computing_with(row, row):
            return {n: t.detach().clone() for n, t in self.model.state_dict().items()}

    def tensors(self) -> dict[str, Tensor]:
        """What is saved: the shared expert, the tasks' parts and the router."""
        saved: dict[str, Tensor] = {}
        for name, weight in self._weights().items():
            if isinstance(weight.deltas, FactorPairs):
                saved |= _factors_to_save(name, weight.deltas)
                continue
            saved[f"shared.{name}"] = weight.base
            if isinstance(weight.deltas, LowRank):
                saved |= {f"down.{name}": weight.deltas.down, f"up.{name}": weight.deltas.up}
            else:
                saved |= {f"task{k}.{name}": t for k, t in enumerate(weight.deltas.tensors)}
        if self.router is not None:
            saved |= {f"router.{name}": t for name, t in self.router.state_dict().items()}
        return saved

    def config(self) -> dict[str, Any]:
        """What is saved beside the tensors, for JSON."""
        weights = self._weights()
        return {
            "tasks": self.tasks,
            "task_tensors": self.task_tensors,
            "routing": self.routing,
            "selection": self.selection,
            "least": self.least,
            "ranks": {
                name: list(w.deltas.ranks)
                for name, w in weights.items()
                if isinstance(w.deltas, LowRank)
            },
            "factors": [n for n, w in weights.items() if isinstance(w.deltas, FactorPairs)],
            "dense": [name for name, w in weights.items() if isinstance(w.deltas, Dense)],
            "router": None
            if self.router is None
            else {"width": self.router.width, "tasks": self.router.tasks},
            "own_features": self.features is not pooled_state,
        }

    @classmethod
    def restore(
        cls,
        model: nn.Module,
        tensors: dict[str, Tensor],
        config: dict[str, Any],
        features: Callable[..., Tensor] | None = None,
    ) -> TwinMerging:
        """The model that `tensors` and `config` are of.

        Args:
            model: its base model.
            tensors, config: as the methods of these names gave them.
            features: the callable that was given to `build`, which is not saved.

        Raises:
            ValueError: features were given to `build` and are missing here, or the router belongs
                to other tasks.
        """
        tasks = config["tasks"]
        parts: dict[str, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            part, _, rest = name.partition(".")
            parts.setdefault(part, {})[rest] = tensor
        deltas: dict[str, Deltas] = {}
        for name in config["factors"]:
            deltas[name] = _saved_factors(name, parts, len(tasks))
        for name in parts.get("shared", {}):
            if name in config["ranks"]:
                ranks = config["ranks"][name]
                down, up = parts["down"][name], parts["up"][name]
                deltas[name] = LowRank(down.split(ranks), up.split(ranks, 1))
            else:
                kind = Dense if name in config["dense"] else Experts
                deltas[name] = kind([parts[f"task{k}"][name] for k in range(len(tasks))])
        twin = cls(
            with_values(model, parts.get("shared", {})),
            deltas,
            tasks,
            task_tensors=config["task_tensors"],
            routing=config["routing"],
            selection=config["selection"],
            least=config["least"],
            features=features or (missing_features if config["own_features"] else None),
        )
        if config["router"] is not None:
            router = TaskRouter(config["router"]["width"], config["router"]["tasks"])
            router.load_state_dict(parts["router"])
            twin.set_router(router.to(next(twin.model.parameters()).device))
        return twin.train(model.training)

    def _weights(self) -> dict[str, MergedWeight]:
        return {n: p for n, p in self.model.named_parameters() if isinstance(p, MergedWeight)}


def missing_features(model: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
    """Stands in for a function of features that was not saved.

    Raises:
        RuntimeError: always.
    """
    raise RuntimeError(
        "the router was trained on features of a function of its own, which is not saved: set "
        "`model.features` to it"
    )


def _check_options(routing: str, selection: str, least: float) -> None:
    if routing not in ROUTINGS:
        raise ValueError(f"routing must be one of {', '.join(ROUTINGS)}, got {routing!r}")
    if selection not in SELECTIONS:
        raise ValueError(f"selection must be one of {', '.join(SELECTIONS)}, got {selection!r}")
    if not 0 <= least < 1:
        raise ValueError(f"least must be at least 0 and less than 1, got {least}")


def is_matrix(shape: Sequence[int]) -> bool:
    """Whether a tensor has rows and columns: class tokens and position tables [1, ..] have not."""
    return len(shape) > 1 and rank_of(shape, 1.0) > 1


def _rank(name: str, shape: Sequence[int], ratio: float, rule: str, rank: int | None) -> int:
    found = rank_of(shape, ratio, rule) if rank is None else min(rank, rank_of(shape, 1.0))
    if found < 1:
        raise ValueError(
            f"rank_ratio {ratio} of {name!r} {list(shape)} is rank 0, expected at least 1: raise "
            "rank_ratio, give rank=, or keep the tensor whole (whole=)"
        )
    return found


def _shared(
    base: dict[str, Tensor], experts: dict[str, dict[str, Tensor]], how: float | Mapping[str, Any]
) -> dict[str, Tensor]:
    options = dict(how) if isinstance(how, Mapping) else {"scaling": how}
    options = {"method": "task_arithmetic", "allow_nonfinite": True} | options
    return merge(base, experts, **options) if base else {}


def _rest(
    name: str, shared: Tensor, experts: Sequence[Tensor], rank: int | None, svd: str, seed: int
) -> Deltas | None:
    """What each expert has beyond the shared one; None if that is nothing."""
    wide = torch.promote_types(shared.dtype, torch.float32)
    rests = [expert.to(wide) - shared.to(wide) for expert in experts]
    if not any(bool(rest.any()) for rest in rests):
        return None
    if rank is None or rank == rank_of(shared.shape, 1.0):
        return Dense([rest.to(shared.dtype).contiguous() for rest in rests])
    outer, inner = shared.shape[0], shared[0].numel()
    down, up = [], []
    for rest in rests:
        if bool(rest.any()):
            try:
                low, high = low_rank_factors(rest.flatten(1), rank, method=svd, seed=seed)
            except ValueError as error:
                raise ValueError(f"{name!r}: {error}") from error
        else:  # this expert is the shared one here
            low, high = rest.new_empty(0, inner), rest.new_empty(outer, 0)
        down.append(low.view(-1, *shared.shape[1:]).to(shared.dtype))
        up.append(high.to(shared.dtype))
    return LowRank(down, up)


def _factors_to_save(name: str, pairs: FactorPairs) -> dict[str, Tensor]:
    saved = {f"shared_down.{name}": pairs.down, f"shared_up.{name}": pairs.up}
    for side, rests in (("down", pairs.downs), ("up", pairs.ups)):
        saved |= {f"{side}{k}.{name}": rest for k, rest in enumerate(rests.tensors)}
    return saved


def _saved_factors(name: str, parts: Mapping[str, Mapping[str, Tensor]], count: int) -> FactorPairs:
    downs, ups = (
        Dense([parts[f"{side}{k}"][name] for k in range(count)]) for side in ("down", "up")
    )
    return FactorPairs(parts["shared_down"][name], parts["shared_up"][name], downs, ups)
