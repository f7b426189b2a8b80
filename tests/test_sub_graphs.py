"""Branches and loops: sparse inside where that is sound, or dense and why."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from numerics import assert_as_good_as, to_double
from torch import Tensor, nn
from torch._dynamo.backends.debugging import aot_eager
from torch._higher_order_ops.map import map as map_
from torch._higher_order_ops.scan import scan
from torch._higher_order_ops.while_loop import while_loop
from torch.fx import GraphModule

from pixelfly_compiler import backend
from pixelfly_compiler.passes.find import find_sites
from pixelfly_compiler.passes.sites import Site
from pixelfly_compiler.plan import plan, project, project_

OPTIONS: dict[str, Any] = {"budget": 0.5, "force": True}

pytestmark = [
    pytest.mark.usefixtures("fresh_dynamo"),
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning"),
]


@pytest.fixture(autouse=True)
def _references(monkeypatch: pytest.MonkeyPatch) -> None:
    """AOTAutograd without Inductor: the rewritten graph runs node by node."""
    monkeypatch.setattr(backend, "inductor", lambda gm, inputs, patches: aot_eager(gm, list(inputs)))


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(64, 64), nn.Linear(64, 64)


class Branch(Layers):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cond(x.sum() > 0, lambda x: self.a(x), lambda x: torch.relu(self.b(x)) + self.a(x), (x,))


class Recurrent(Layers):
    def forward(self, x: Tensor) -> Tensor:
        def step(h: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
            h = torch.tanh(self.a(h) + self.b(t))
            return h, h.clone()

        return scan(step, x[0], x, dim=0)[1]


class Each(Layers):
    def forward(self, x: Tensor) -> Tensor:
        return map_(lambda row: torch.tanh(self.a(row)), x) + self.b(x)


class Loop(Layers):
    def forward(self, x: Tensor) -> Tensor:
        def body(i: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
            return i + 1, torch.tanh(self.a(h))

        return self.b(while_loop(lambda i, h: i < 3, body, (torch.tensor(0), x))[1])


def gradients(model: Any, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    y = model(x)
    (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
    return y.detach(), {
        name.removeprefix("_orig_mod."): p.grad for name, p in model.named_parameters() if p.grad is not None
    }


@pytest.mark.parametrize("build", [Branch, Recurrent, Each])
@pytest.mark.parametrize("sign, dynamic", [(1, False), (-1, True)])
def test_sub_graphs_are_entered(build: Callable[[], nn.Module], sign: int, dynamic: bool) -> None:
    model, x = build(), (sign * torch.rand(5, 9, 64))[:, :8]  # not a view of rows
    made = plan(model, x, **OPTIONS)
    assert [entry.name for entry in made.sparse] == ["a.weight", "b.weight"]
    oracle = project_(copy.deepcopy(model), made)
    exact, exact_grads = gradients(copy.deepcopy(oracle).double(), to_double(x))
    eager, eager_grads = gradients(oracle, x)
    ours, grads = gradients(torch.compile(model, backend="pixelfly", options=OPTIONS, dynamic=dynamic), x)
    assert_as_good_as(ours, eager, exact)
    for name, gradient in exact_grads.items():
        if name.endswith("weight"):
            entry = made[name]
            eager_grad, gradient = project(eager_grads[name], entry), project(gradient, entry)
        else:
            eager_grad = eager_grads[name]
        if gradient.any():  # not of the branch that did not run
            assert_as_good_as(grads[name], eager_grad, gradient)


def test_a_loop_without_gradients_is_entered() -> None:
    model, x = Loop(), torch.randn(5, 64)
    made = plan(model, x, **OPTIONS)
    assert len(made.sparse) == 2
    with torch.no_grad():
        ours = torch.compile(model, backend="pixelfly", options=OPTIONS)(x)
        torch.testing.assert_close(ours, project_(copy.deepcopy(model), made)(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dynamic", [False, True])
def test_rows_count_each_run_of_a_loop(dynamic: bool) -> None:
    sites: list[Site] = []

    def look(gm: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        sites.extend(find_sites(gm, inputs).sites)
        return gm.forward

    torch.compile(Each(), backend=look, dynamic=dynamic)(torch.randn(5, 8, 64))
    assert [site.rows for site in sites] == [40, 40]
    assert all(("s" in site.rows_expr) == dynamic for site in sites)


def test_a_result_of_a_branch_with_a_batch_of_one() -> None:
    class Heads(Layers):
        def forward(self, x: Tensor) -> Tensor:
            def heads(x: Tensor) -> Tensor:
                y = torch.einsum("hnk,bsk->bhsn", self.a.weight.view(2, 32, 64), x)
                return y.transpose(1, 2).flatten(2)

            return torch.cond(x.sum() > 0, heads, lambda x: -heads(x), (x,))

    model, x = Heads(), torch.rand(1, 4, 64)
    made = plan(model, x, **OPTIONS)
    ours = torch.compile(model, backend="pixelfly", options=OPTIONS)(x)
    assert made["a.weight"].config is not None
    torch.testing.assert_close(ours, project_(model, made)(x), rtol=1e-4, atol=1e-5)


def test_a_weight_that_a_loop_slices_stays_dense_with_the_reason() -> None:
    class Stacked(Layers):
        def forward(self, x: Tensor) -> Tensor:
            return map_(lambda row: self.a(x) * row, self.b.weight)

    made = plan(Stacked(), torch.randn(5, 64), **OPTIONS)
    assert made["a.weight"].config is not None
    assert made["b.weight"].reason == "used by `map_impl`, which takes it apart"
