"""The router of Twin-Merging: from what the shared model makes of an input to task weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..learning_step import call_model

SLOPE = 0.01  # of LeakyReLU below 0
BINS = 20
KMEANS_STEPS = 20


class TaskRouter(nn.Module):
    """Logits over tasks: three linear layers, the first two with BatchNorm, LeakyReLU and dropout.

    d -> 2d -> 2d -> K; in evaluation mode every sample's logits depend on it alone.

    Args:
        width: d, features of the input.
        tasks: the K tasks' names, in the order of the logits.
        dropout: fraction dropped in training.

    Raises:
        ValueError: no tasks, or a name repeats.

    Source: Twin-Merging (arXiv 2406.15479) and its code.
    """

    def __init__(self, width: int, tasks: Sequence[str], dropout: float = 0.5):
        super().__init__()
        self.width, self.tasks = width, list(tasks)
        if not self.tasks or len(set(self.tasks)) != len(self.tasks):
            raise ValueError(f"a router needs different tasks, got {self.tasks}")
        layers: list[nn.Module] = []
        for inputs in (width, 2 * width):
            layers += [
                nn.Linear(inputs, 2 * width),
                nn.BatchNorm1d(2 * width),
                nn.LeakyReLU(SLOPE),
                nn.Dropout(dropout),
            ]
        self.layers = nn.Sequential(*layers, nn.Linear(2 * width, len(self.tasks)))

    def forward(self, features: Tensor) -> Tensor:
        """Logits [B, K] of features [B, d], in the parameters' dtype."""
        if features.dim() != 2 or features.shape[1] != self.width:
            raise ValueError(
                f"the router's features are {list(features.shape)}, expected [B, {self.width}]"
            )
        return self.layers(features.to(self.layers[0].weight.dtype))

    def extra_repr(self) -> str:
        return f"width={self.width}, tasks={self.tasks}"


def pooled_state(model: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
    """Mean over tokens of the encoder's last hidden state, [B, d]: the default features.

    The encoder is `model.base_model` where transformers has one below the head. Padding, as
    `attention_mask` marks it, is left out of the mean; an output [B, d] is taken as it is.

    Raises:
        ValueError: the output has no such state; features= has to say what to take.
    """
    kwargs.pop("labels", None)
    output = getattr(model, "base_model", model)(*args, **kwargs)
    state = getattr(output, "last_hidden_state", None)
    if state is None and isinstance(output, Tensor):
        state = output
    if state is None or state.dim() not in (2, 3):
        found = type(output).__name__ if state is None else list(state.shape)
        raise ValueError(
            f"no pooled features in the model's output ({found}): pass features=, a function of "
            "the model and its inputs that returns [B, d]"
        )
    if state.dim() == 2:
        return state
    mask = kwargs.get("attention_mask")
    if mask is None or mask.shape != state.shape[:2]:
        return state.mean(1)
    mask = mask.to(state.dtype).unsqueeze(-1)
    return (state * mask).sum(1) / mask.sum(1).clamp(min=1)


def binned(weights: Tensor, groups: int = BINS) -> Tensor:
    """Each sample's router weights replaced by the mean of its group of similar samples.

    Samples are binned by their likeliest task; within each bin k-means makes groups, as many of
    `groups` as the bin has of the samples (one at least), starting from samples evenly apart in the
    order of their largest weight. So a batch of any size needs at most groups + K merged models.

    Args:
        weights: [B, K].
        groups: of all bins together, before each is rounded up.

    Returns:
        [B, K].

    Source: Twin-Merging (arXiv 2406.15479), batched inference; how groups are shared out among
    bins and where k-means starts are not published.
    """
    result = weights.clone()
    likeliest = weights.argmax(-1)
    for task in likeliest.unique():
        rows = (likeliest == task).nonzero().flatten()
        points = weights[rows].double()
        count = min(len(rows), -(-groups * len(rows) // len(weights)))
        order = points.max(-1).values.argsort(stable=True)
        steps = torch.arange(count, device=rows.device)
        centres = points[order[steps * len(rows) // count]]
        for _ in range(KMEANS_STEPS):
            nearest = torch.cdist(points, centres).argmin(1)
            members = F.one_hot(nearest, count).to(points.dtype)  # [n, count]
            sizes = members.sum(0).unsqueeze(1)
            means = (members.t() @ points) / sizes.clamp(min=1)
            moved = torch.where(sizes > 0, means, centres)
            if torch.equal(moved, centres):
                break
            centres = moved
        result[rows] = centres[nearest].to(weights.dtype)
    return result


@dataclass
class RouterHistory:
    """How a router's training went.

    Attributes:
        losses: mean cross-entropy of each epoch.
        accuracies: accuracy on the held-out inputs after each epoch.
        best: index of the epoch whose values the router has.
    """

    losses: list[float] = field(default_factory=list)
    accuracies: list[float] = field(default_factory=list)
    best: int = -1


def collect_features(
    features: Callable[[Any], Tensor], batches: Mapping[str, Iterable[Any]], tasks: Sequence[str]
) -> tuple[Tensor, Tensor]:
    """Features [N, d] fp32 of all inputs, and their tasks' numbers int64 [N].

    Args:
        features: of one batch of inputs, [B, d].
        batches: {task: batches of its inputs}.
        tasks: all tasks.

    Raises:
        ValueError: a task without inputs, or inputs of an unknown task.
    """
    if set(batches) != set(tasks):
        wrong = sorted(set(batches) ^ set(tasks))
        raise ValueError(
            f"batches are of tasks {list(batches)}, expected {list(tasks)} ({wrong[0]!r} is "
            f"{'unknown' if wrong[0] in batches else 'missing'})"
        )
    rows, labels = [], []
    for number, task in enumerate(tasks):
        found = [features(batch).float() for batch in batches[task]]
        if not found:
            raise ValueError(f"task {task!r} has no batches of inputs")
        rows += found
        labels += [torch.full((len(r),), number, device=r.device) for r in found]
    return torch.cat(rows), torch.cat(labels)


def fit_router(
    router: TaskRouter,
    features: Tensor,
    labels: Tensor,
    *,
    epochs: int = 10,
    batch_size: int = 1024,
    lr: float = 5e-4,
    held_out: float = 0.1,
    seed: int = 0,
) -> RouterHistory:
    """Train a router with cross-entropy: AdamW without weight decay, a rate that falls to 0.

    The router keeps the values of the epoch that is best on held-out inputs. Random numbers come
    from the seed alone.

    Args:
        router: trained in place.
        features: [N, d].
        labels: int64 [N], tasks' numbers.
        epochs, batch_size, lr: of the training.
        held_out: fraction of the inputs that choose the epoch; 0: the last one is kept.
        seed: of order, dropout and what is held out.

    Raises:
        ValueError: fewer than two inputs to train on, features that are not finite, or an option
            out of range.

    Source: Twin-Merging (arXiv 2406.15479): the paper trains 10 epochs and chooses on a validation
    split; its code 50 epochs, and chooses on the test inputs.
    """
    if epochs < 1 or batch_size < 2 or lr <= 0 or not 0 <= held_out < 1:
        raise ValueError(
            f"epochs {epochs}, batch_size {batch_size}, lr {lr}, held_out {held_out}: expected at "
            "least 1, at least 2, more than 0 and 0 to less than 1"
        )
    if not bool(torch.isfinite(features).all()):
        raise ValueError("the router's features have entries that are not finite")
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(features), generator=generator)
    apart = int(held_out * len(features))
    test, train = order[:apart].to(features.device), order[apart:]
    if len(train) < 2:
        raise ValueError(f"{len(train)} inputs to train a router on, expected at least 2")
    steps = epochs * math.ceil(len(train) / batch_size)
    optimizer = torch.optim.AdamW(router.parameters(), lr=lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    history, best = RouterHistory(), None
    devices = [features.device] if features.is_cuda else []
    with torch.random.fork_rng(devices), torch.enable_grad():
        torch.manual_seed(seed)  # of dropout
        for epoch in range(epochs):
            router.train()
            shuffled = train[torch.randperm(len(train), generator=generator)]
            total = 0.0
            for rows in shuffled.split(batch_size):
                if len(rows) == 1:  # has no variance
                    rows = torch.cat([rows, shuffled[:1]])
                rows = rows.to(features.device)
                loss = F.cross_entropy(router(features[rows]), labels[rows])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                total += float(loss.detach()) * len(rows)
            router.eval()
            history.losses.append(total / len(train))
            if apart == 0:
                history.best = epoch
                continue
            with torch.no_grad():
                hits = router(features[test]).argmax(1) == labels[test]
            history.accuracies.append(float(hits.float().mean()))
            if best is None or history.accuracies[epoch] > history.accuracies[history.best]:
                history.best = epoch
                best = {name: t.clone() for name, t in router.state_dict().items()}
    if best is not None:
        router.load_state_dict(best)
    return history


def train_router(model: Any, batches: Mapping[str, Iterable[Any]], **options: Any) -> RouterHistory:
    """Train the router of a Twin-Merging model from unlabelled inputs of known tasks.

    The shared model reads every input once; the router then learns from the pooled features. A
    router that is there is replaced.

    Args:
        model: what `fm.build(..., method="twin")` gave.
        batches: {task: batches of its inputs}, each a tensor, tuple, list or dict, as for `learn`.
        options: epochs, batch_size, lr, held_out and seed of `fit_router`, and dropout.

    Returns:
        Losses and held-out accuracies.

    Raises:
        ValueError: tasks that do not match the model's, or as `fit_router`.
    """
    features, labels = collect_features(
        lambda batch: call_model(model.features_of, batch), batches, model.tasks
    )
    dropout = options.pop("dropout", 0.5)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.get("seed", 0))  # of the initial values
        router = TaskRouter(features.shape[1], model.tasks, dropout)
    router.to(features.device)
    history = fit_router(router, features, labels, **options)
    model.set_router(router)
    return history
