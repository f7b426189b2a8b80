"""The dense flops of a plan are those of torch's counter: sites, and what else multiplies with a weight."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from pixelfly_compiler.decision import Plan
from pixelfly_compiler.passes.cost import Device
from pixelfly_compiler.plan import plan

pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # Dynamo does it

Function = Callable[[Tensor, Tensor], Tensor]


class OneWeight(nn.Module):
    def __init__(self, function: Function, *shape: int) -> None:
        super().__init__()
        self.w, self.function = nn.Parameter(torch.randn(shape)), function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.w)


class Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x @ w

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        return g @ w.T, x.T @ g


class Rounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, w: Tensor) -> Tensor:
        return w.round()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g


def planned(function: Function, x: Tensor, *shape: int, training: bool = False) -> tuple[Plan, int]:
    """The plan of a model of one weight, and the flops that torch counts."""
    model = OneWeight(function, *shape)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x)
    return plan(model, x, force=True, training=training, device=Device()), counter.get_total_flops()


def picks(x: Tensor) -> Tensor:
    """One of two for each row."""
    return x[:, :2].argmax(1)


COMPUTED: dict[str, Function] = {
    "a mask": lambda x, w: x @ (w * torch.ones(64, 64).tril()),
    "one of x's size": lambda x, w: x @ (w + torch.eye(x.shape[1])),
    "zeros beside it": lambda x, w: x @ torch.cat([w, torch.zeros(64, 32)], 1),
    "some of it": lambda x, w: x @ torch.where(torch.arange(64) > 8, w, 0),
    "rounded": lambda x, w: x @ Rounded.apply(w),
}


@pytest.mark.parametrize("kind", COMPUTED)
def test_a_weight_computed_with_constants_is_counted_and_told_so(kind: str) -> None:
    made, counted = planned(COMPUTED[kind], torch.randn(8, 64), 64, 64, training=True)
    assert made.dense_flops == counted > 0
    assert "computed" in str(made["w"].reason) or kind == "rounded"


@pytest.mark.parametrize(
    ("function", "rows"),
    [
        (Product.apply, 8),
        (lambda x, w: x @ w[torch.arange(63, -1, -1)], 8),
        (lambda x, w: torch.vmap(lambda t: t @ w)(x.view(2, 2, 2, 64)), 8),
        (lambda x, w: torch.vmap(torch.vmap(lambda t: w.T @ t), in_dims=1)(x.view(2, 4, 64)), 8),
        (lambda x, w: torch.vmap(lambda part: x @ part)(w.view(2, 64, 32)), 8),
        (lambda x, w: torch.vmap(lambda t: t @ (w * 2))(x), 8),
        (lambda x, w: torch.bmm(x[:, None], torch.take_along_dim(w.view(2, 64, 32), picks(x)[:, None, None], 0)), 4),
        (lambda x, w: torch.bmm(x[:, None], torch.index_select(input=w.view(2, 64, 32), dim=0, index=picks(x))), 4),
        pytest.param(
            lambda x, w: torch.vmap(lambda t: checkpoint(torch.matmul, t, w, use_reentrant=False))(x),
            8,
            marks=pytest.mark.skipif(torch.__version__ < "2.12", reason="2.11 has no vmap over checkpoints"),
        ),
        (lambda x, w: torch.vmap(lambda t: torch.cond(x.sum() > 0, lambda t: t @ w, torch.sin, (t,)))(x), 8),
    ],
    ids=[
        "autograd.Function",
        "another order",
        "vmap",
        "two vmaps",
        "vmap over it",
        "computed under vmap",
        "gathered matrices",
        "picked by name",
        "checkpoint under vmap",
        "cond under vmap",
    ],
)
def test_all_rows_are_counted(function: Function, rows: int) -> None:
    made, counted = planned(function, torch.randn(8, 64), 64, 64, training=True)
    assert made.dense_flops == counted == 2 * rows * 64 * 64


def test_rows_under_vmap_decide() -> None:
    made, _ = planned(lambda x, w: torch.vmap(lambda t: t @ w)(x), torch.randn(50, 6, 64), 64, 64)
    assert (made["w"].rows, made["w"].rows_expr) == (300, "300")


@pytest.mark.parametrize(
    "function",
    [
        lambda x, w: x @ (torch.arange(512.0).view(8, 64) @ w).T,
        lambda x, w: (x @ w) @ F.embedding(torch.arange(8), w).sin().T,
    ],
    ids=["product", "lookup"],
)
def test_what_a_weight_makes_of_positions_is_no_weight(function: Function) -> None:
    made, counted = planned(function, torch.randn(8, 64), 64, 64)
    assert made.dense_flops == made["w"].dense_flops == 2 * 8 * 64 * 64 < counted


def test_a_flat_parameter_is_counted_and_a_bias_is_not_listed() -> None:
    flat, _ = planned(lambda x, w: x @ w[:4096].view(64, 64) + w[4096:] * 2, torch.randn(8, 64), 4160)
    assert [(entry.name, entry.dense_flops) for entry in flat] == [("w[0:4096]", 2 * 8 * 64 * 64)]
    packed, _ = planned(lambda x, w: F.linear(x, w[:4096].view(64, 64), w[4096:]), torch.randn(8, 64), 4160)
    assert [(entry.name, entry.dense_flops) for entry in packed.sparse] == [("w[0:4096]", 2 * 8 * 64 * 64)]
    made, counted = planned(lambda x, w: x @ torch.diag(w), torch.randn(8, 64), 64)
    assert made.dense_flops == counted and "computed from that" in str(made["w"].reason)
    assert not planned(lambda x, w: x + w, torch.randn(8, 64), 64)[0].entries


def test_the_largest_parameter_has_the_flops_of_what_several_are_computed_to() -> None:
    model = OneWeight(lambda x, w: torch.addmm(model.b, x, w.sin().view(64, 64)), 4096)
    model.b = nn.Parameter(torch.randn(64))
    made = plan(model, torch.randn(8, 64), force=True, device=Device())
    assert [(entry.name, entry.other_flops) for entry in made] == [("w", 2 * 8 * 64 * 64)]


TWO_LAYOUTS: list[Function] = [
    lambda x, w: torch.einsum("bsd,hde->bshe", x, w).sum(2),
    lambda x, w: torch.bmm(x[:4].reshape(4, -1, 64), w).sum(),
]


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("broken", [False, True])
def test_rows_of_two_layouts_of_a_weight_are_counted_as_long_as_they_are(order: int, broken: bool) -> None:
    def function(x: Tensor, w: Tensor) -> Tensor:
        first = TWO_LAYOUTS[::order][0](x, w)
        if broken:
            torch._dynamo.graph_break()
        return first + TWO_LAYOUTS[::order][1](x, w)

    made, counted = planned(function, torch.randn(6, 4, 64), 4, 64, 32)
    assert made.dense_flops == counted == 2 * (24 * 64 * 128 + 16 * 64 * 32)
    assert "as different matrices" in str(made["w"].reason)


PICKED: dict[str, Function] = {
    "indexed": lambda x, w: x @ w[x.argmax(1)].T,
    "selected": lambda x, w: x @ w.index_select(0, x.argmax(1)).T,
    "looked up": lambda x, w: x @ F.embedding(x.argmax(1), w).T,
    "looked up by position": lambda x, w: torch.einsum("bk,lk->bl", x, F.embedding(torch.arange(8), w)),
    "for each row": lambda x, w: torch.bmm(w[x.argsort(1)[:, :8]], x.unsqueeze(-1)),
    "copied": lambda x, w: (x.double() @ w[x.argmax(1)].double().T.contiguous()).float(),
}


@pytest.mark.parametrize("kind", PICKED)
def test_a_matmul_with_rows_that_an_index_picks_is_counted_and_told_so(kind: str) -> None:
    made, counted = planned(PICKED[kind], torch.randn(8, 64), 100, 64)
    assert made.dense_flops == counted == 2 * 8 * 8 * 64
    assert "a matmul takes the rows that it picks" in str(made["w"].reason)


def test_rows_that_are_picked_for_another_weight_do_not_count_twice() -> None:
    made, counted = planned(lambda x, w: F.embedding(x.argmax(1), w) @ (w * 2), torch.randn(8, 64), 64, 64)
    assert made.dense_flops == counted == 2 * 8 * 64 * 64


def into_a_buffer(x: Tensor, w: Tensor) -> Tensor:
    buffer = torch.empty(w.shape)
    buffer.copy_(w)
    return x @ buffer


def into_a_part(x: Tensor, w: Tensor) -> Tensor:
    buffer = x.new_empty(80, 64)
    buffer[:64] = w
    return x @ buffer[:64]


def into_zeros(x: Tensor, w: Tensor) -> Tensor:
    buffer = torch.zeros(64, 64)
    buffer.view(-1).copy_(w.flatten())
    return x @ buffer


@pytest.mark.parametrize("function", [into_a_buffer, into_a_part, into_zeros])
def test_a_weight_that_is_written_to_other_memory_is_counted(function: Function) -> None:
    made, counted = planned(function, torch.randn(8, 64), 64, 64)
    assert made.dense_flops == counted == 2 * 8 * 64 * 64
    assert "the weight of a matmul is computed from that" in str(made["w"].reason)


def both_by_items(x: Tensor, w: Tensor) -> Tensor:
    rows = torch.empty(16, 64)
    rows[:8] = w[:8]
    rows[8:] = x
    return rows


def both_by_views(x: Tensor, w: Tensor, make: Callable[..., Tensor] = torch.empty) -> Tensor:
    rows = make(16, 64)
    upper, lower = rows[:8], rows[8:]
    upper.copy_(x)
    lower.copy_(w[:8])
    return rows


def both_by_views_of_zeros(x: Tensor, w: Tensor) -> Tensor:
    return both_by_views(x, w, torch.zeros)


@pytest.mark.parametrize("both", [both_by_items, both_by_views, both_by_views_of_zeros])
def test_memory_that_data_is_written_to_as_well_is_no_weight(both: Function) -> None:
    made, counted = planned(lambda x, w: (x @ w) @ both(x, w).T, torch.randn(8, 64), 64, 64)
    assert made.dense_flops == 2 * 8 * 64 * 64 < counted


RANDOM: dict[str, Callable[[], Tensor]] = {
    "normal": lambda: torch.normal(0.0, 1.0, (8, 64)),
    "bernoulli": lambda: torch.bernoulli(torch.full((8, 64), 0.5)),
    "dropout": lambda: F.dropout(torch.ones(8, 64)),
    "in place": lambda: torch.zeros(8, 64).uniform_(),
    "in place, of a view": lambda: noise_below(torch.zeros(8, 64)),
    "rand_like": lambda: torch.rand_like(torch.ones(8, 64)),
    "empty": lambda: torch.empty(8, 64),
    "new_empty": lambda: torch.ones(4).new_empty(8, 64),
}


def noise_below(rows: Tensor) -> Tensor:
    rows[4:].normal_()
    return rows


@pytest.mark.parametrize("kind", RANDOM)
def test_random_numbers_are_no_weight(kind: str) -> None:
    def attended(x: Tensor, w: Tensor) -> Tensor:
        return (x @ w) @ (RANDOM[kind]() + w[:8]).T

    made, counted = planned(attended, torch.randn(8, 64), 64, 64)
    assert made.dense_flops == made["w"].dense_flops == 2 * 8 * 64 * 64 < counted


def test_a_weight_with_dropout_is_one() -> None:
    made, counted = planned(lambda x, w: x @ F.dropout(w), torch.randn(8, 64), 64, 64)
    assert made.dense_flops == counted == 2 * 8 * 64 * 64


def written_to_what_is_no_view(x: Tensor, w: Tensor) -> Tensor:
    a = w.exp()
    b = a * 2
    b.add_(x.mean(0))
    return x @ a + b.sum()


def asked_by_a_branch(x: Tensor, w: Tensor) -> Tensor:
    a = w.exp()
    return torch.cond(a.sum() > 0, lambda t: t.sin(), lambda t: t.cos(), (x,)) @ a


@pytest.mark.parametrize("function", [written_to_what_is_no_view, asked_by_a_branch])
def test_what_nothing_is_written_to_stays_a_weight(function: Function) -> None:
    made, _ = planned(function, torch.randn(8, 64), 64, 64)
    assert made.dense_flops == 2 * 8 * 64 * 64


def scattered(x: Tensor, w: Tensor) -> Tensor:
    rows = torch.zeros(16, 64)
    rows[4:][:8] = x
    return F.linear(rows, w)


def scattered_in_chunks(x: Tensor, w: Tensor) -> Tensor:
    rows = torch.zeros(16, 64)
    rows.chunk(2)[1].add_(x)
    return F.linear(rows, w)


def given_out(x: Tensor, w: Tensor) -> Tensor:
    rows = torch.zeros(16, 64)
    torch.cat([x, torch.ones(8, 64)], out=rows)
    return F.linear(rows, w)


@pytest.mark.parametrize("write", [scattered, scattered_in_chunks, given_out])
def test_a_tensor_that_data_is_written_to_is_no_constant(write: Function) -> None:
    def attended(x: Tensor, w: Tensor) -> Tensor:
        y = F.silu(write(x, w))
        return F.linear(y, w) @ (y + w[:16]).T

    made, counted = planned(attended, torch.randn(8, 64), 64, 64)
    assert made.dense_flops == made["w"].dense_flops == 2 * 32 * 64 * 64 < counted


def test_a_lookup_that_writes_counts_as_one() -> None:
    made, counted = planned(
        lambda x, w: F.embedding(input=x.argmax(1), weight=w.detach(), max_norm=1.0) @ w, torch.randn(8, 64), 64, 64
    )
    assert made.dense_flops == counted == 2 * 8 * 64 * 64
