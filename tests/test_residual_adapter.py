"""`residual_adapter`: values and gradients against every row's adapter by itself."""

from __future__ import annotations

import pytest
import torch

from fastmerge import use_backend
from fastmerge.ops import residual_adapter

from .samples import DTYPE_PAIRS, LAYOUTS, dtype_id, laid_out, random, raw
from .tolerances import assert_no_worse_than_eager

RANK, WIDTH, COUNT = 3, 9, 4

# Leading dimensions of x and the samples' tasks: for all rows, a sample, a token; few rows of a
# sample (which are grouped) and many; runs of equal tasks; tasks that nobody has.
PLACES = {
    "one": ((5,), 2),
    "one of many rows": ((2, 20), 1),
    "no leading dimension": ((), 3),
    "sorted": ((4,), [0, 0, 1, 3]),
    "mixed": ((6,), [3, 0, 3, 1, 0, 3]),
    "tokens": ((3, 4), [2, 0, 3]),
    "many tokens": ((3, 17), [2, 0, 3]),
    "runs of many tokens": ((4, 16), [1, 1, 0, 3]),
    "flattened": ((12,), [3, 1, 0]),
    "a task a token": ((2, 3), [0, 1, 2, 3, 2, 1]),
    "images": ((2, 3, 4), [1, 0]),
    "one for a list": ((2, 5), [2]),
    "nothing": ((0, 4), []),
    "no tokens": ((2, 0), [1, 3]),
}


class Case:
    """Inputs, and the same computation row by row in the inputs' dtypes and in fp64."""

    def __init__(self, place="mixed", dtypes=DTYPE_PAIRS[0], *, layout="contiguous", rank=RANK,
                 width=WIDTH, count=COUNT):  # fmt: skip
        lead, tasks = PLACES[place]
        self.tasks = torch.tensor(tasks, dtype=torch.int64)
        self.x = laid_out(random((*lead, width), dtypes[0], seed=1), layout)
        self.down = laid_out(random((count, rank, width), dtypes[1], seed=2), layout)
        self.up = laid_out(random((count, width, rank), dtypes[1], seed=3), layout)
        self.grad = random((*lead, width), dtypes[0], seed=4)

    def fused(self, x, down, up):
        return residual_adapter(x, down, up, self.tasks)

    def row_tasks(self, x):
        rows, ids = x.shape[:-1].numel(), self.tasks.reshape(-1)
        return ids.repeat_interleave(rows // max(1, len(ids)))

    def plain(self, x, down, up):
        rows, ids = x.reshape(x.shape[:-1].numel(), x.shape[-1]), self.row_tasks(x)
        down, up = down.to(x.dtype)[ids], up.to(x.dtype)[ids]
        thin = (down @ rows.unsqueeze(-1)).relu()
        return (rows - (up @ thin).squeeze(-1)).view(x.shape)

    def run(self, call, dtype=None):
        """[y, dx, ddown, dup], with inputs converted to `dtype` if given."""
        inputs = [
            t.detach().to(dtype or t.dtype).requires_grad_() for t in (self.x, self.down, self.up)
        ]
        y = call(*inputs)
        y.backward(self.grad.to(y.dtype))
        return [y.detach(), *(t.grad for t in inputs)]

    def scales(self):
        """Sums of the magnitudes that are added up in each of the results."""
        x, down, up = (t.double().abs().requires_grad_() for t in (self.x, self.down, self.up))
        y = self.plain(x, down, -up)
        y.backward(self.grad.double().abs())
        return [y.detach(), x.grad, down.grad, up.grad.abs()]

    def check(self):
        actual, eager = self.run(self.fused), self.run(self.plain)
        truth = self.run(self.plain, torch.float64)
        names = ("y", "dx", "ddown", "dup")
        for name, found, plain, exact, scale in zip(
            names, actual, eager, truth, self.scales(), strict=True
        ):
            try:
                assert_no_worse_than_eager(found, plain, exact, scale, dtype=self.x.dtype)
            except AssertionError as error:
                raise AssertionError(f"{name}: {error}") from error


@pytest.fixture(params=["reference", None])
def backend(request):
    if request.param is None:
        yield
        return
    with use_backend(request.param):
        yield


@pytest.mark.parametrize("place", PLACES)
def test_places_of_tasks(backend, place):
    Case(place).check()


@pytest.mark.parametrize("dtypes", DTYPE_PAIRS[:-1], ids=dtype_id)
@pytest.mark.parametrize("place", ["one", "mixed", "many tokens"])
def test_dtypes(backend, dtypes, place):
    Case(place, dtypes).check()


@pytest.mark.parametrize("place", PLACES)
def test_fp64_is_computed_in_fp64(backend, place):
    case = Case(place, DTYPE_PAIRS[-1])
    for found, expected in zip(case.run(case.fused), case.run(case.plain), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("rank", [0, 1, 64])
@pytest.mark.parametrize("width", [0, 1, 257])
def test_shapes(rank, width):
    for place in ("one", "mixed", "many tokens"):
        Case(place, rank=rank, width=width).check()


@pytest.mark.parametrize("count", [4, 17])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, count):
    for place in ("one", "mixed", "tokens", "many tokens"):
        Case(place, layout=layout, count=count).check()


@pytest.mark.parametrize("place", ["one", "mixed", "tokens", "many tokens"])
def test_gradcheck(place):
    case = Case(place, DTYPE_PAIRS[-1], width=4, rank=2)
    inputs = [t.clone().requires_grad_() for t in (case.x, case.down, case.up)]
    assert torch.autograd.gradcheck(case.fused, inputs)


@pytest.mark.parametrize("place", ["mixed", "tokens", "many tokens"])
def test_a_mixed_batch_is_its_samples_alone(place):
    case = Case(place, DTYPE_PAIRS[-1])
    y = case.fused(case.x, case.down, case.up)
    for sample, (x, task) in enumerate(zip(case.x, case.tasks, strict=True)):
        alone = residual_adapter(x, case.down, case.up, task)
        torch.testing.assert_close(y[sample], alone, rtol=1e-13, atol=1e-13)


def test_zero_up_changes_no_byte():
    for place in ("one", "mixed", "many tokens"):
        case = Case(place)
        y = case.fused(case.x, case.down, torch.zeros_like(case.up))
        assert raw(y) == raw(case.x)


@pytest.mark.parametrize("place", ["mixed", "many tokens"])
def test_nan_stays_with_its_rows(place):
    case = Case(place)
    case.down[0] = float("nan")  # an adapter's
    case.x.view(-1, WIDTH)[-1, 2] = float("nan")  # a row's
    hit = case.row_tasks(case.x) == 0
    hit[-1] = True
    y = case.fused(case.x, case.down, case.up).view(-1, WIDTH)
    assert y.isnan().all(1).tolist() == y.isnan().any(1).tolist() == hit.tolist()


@pytest.mark.parametrize("needed", [(1, 0, 0), (0, 1, 0), (0, 0, 1)])
def test_only_the_gradients_asked_for(needed):
    case = Case()
    expected = case.run(case.fused)[1:]
    inputs = [
        t.clone().requires_grad_(bool(n))
        for t, n in zip((case.x, case.down, case.up), needed, strict=True)
    ]
    case.fused(*inputs).backward(case.grad)
    for tensor, gradient, wanted in zip(inputs, expected, needed, strict=True):
        if wanted:
            torch.testing.assert_close(tensor.grad, gradient)
        else:
            assert tensor.grad is None


def test_two_runs_give_the_same_bytes():
    for place in PLACES:
        case = Case(place, width=40)
        assert [raw(t) for t in case.run(case.fused)] == [raw(t) for t in case.run(case.fused)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(x=torch.zeros(2, 5)), r"x is \[2, 5\] on cpu, expected \[..., 3\]"),
        (dict(x=torch.zeros(())), r"x is \[\]"),
        (dict(x=torch.zeros(2, 3, dtype=int)), "x must be a floating-point tensor"),
        (dict(down=torch.zeros(2, 3)), r"down has shape \[2, 3\], expected \[K >= 1, rank, d\]"),
        (dict(down=torch.zeros(0, 1, 3)), r"down has shape \[0, 1, 3\]"),
        (dict(up=torch.zeros(2, 1, 3)), r"up is \[2, 1, 3\] on cpu, expected \[2, 3, 1\]"),
        (dict(tasks=torch.zeros(2)), r"tasks is torch.float32 \[2\] on cpu, expected torch.int64"),
        (dict(tasks=torch.zeros(3, dtype=int)), "3 tasks for 2 rows"),
        (dict(tasks=torch.zeros(0, dtype=int)), "0 tasks for 2 rows"),
        (dict(x=torch.zeros(2, 3, device="meta")), "x is .* on meta"),
    ],
)
def test_errors_name_the_argument(change, message):
    good = dict(
        x=torch.zeros(2, 3),
        down=torch.zeros(2, 1, 3),
        up=torch.zeros(2, 3, 1),
        tasks=torch.zeros(2, dtype=int),
    )
    with pytest.raises(RuntimeError, match=message):
        residual_adapter(**(good | change))


@pytest.mark.parametrize("tasks", [[0, 2], [-1, 0]], ids=str)
def test_tasks_out_of_range(tasks):
    with pytest.raises(IndexError, match=r"expected 0\.\.1"):
        residual_adapter(
            torch.zeros(2, 3), torch.zeros(2, 1, 3), torch.zeros(2, 3, 1), torch.tensor(tasks)
        )
