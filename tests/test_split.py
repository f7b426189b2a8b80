"""Weights joined from several parameters: each parameter is a site, and the graph computes what it did."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule

from pixelfly_compiler.backend import own_copy
from pixelfly_compiler.passes.find import find_sites
from pixelfly_compiler.passes.sites import Found
from pixelfly_compiler.passes.split import split_joined_weights

X = torch.randn(3, 5, 64, dtype=torch.float64)


class Joined(nn.Module):
    """Two weights and a bias, and a function of x and them."""

    def __init__(self, function: Callable[..., Tensor], *shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.function = function
        self.q, self.k, self.bias = (nn.Parameter(torch.randn(shape, dtype=torch.float64)) for shape in shapes)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.q, self.k, self.bias)


def split(model: nn.Module, x: Tensor, dynamic: bool = False) -> tuple[Found, Tensor]:
    """What is found in the split graph, and what it returns."""
    found: list[Found] = []

    def backend(gm: GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        own = split_joined_weights(own_copy(gm))
        own.graph.lint()
        found.append(find_sites(own, inputs))
        return own.forward

    torch._dynamo.reset()
    result = torch.compile(model, backend=backend, fullgraph=True, dynamic=dynamic)(x)
    return found[0], result


SPLIT: dict[str, tuple[Callable[..., Tensor], tuple[tuple[int, ...], ...]]] = {
    "outputs": (lambda x, q, k, b: F.linear(x, torch.cat([q, k]), b), ((32, 64), (48, 64), (80,))),
    "outputs, transposed": (lambda x, q, k, b: x @ torch.cat((q, k), dim=-1), ((64, 32), (64, 48), (1,))),
    "outputs, turned later": (lambda x, q, k, b: x @ torch.vstack([q, k]).T, ((32, 64), (48, 64), (1,))),
    "inputs": (lambda x, q, k, b: F.linear(x, torch.hstack([q, k]), b), ((48, 32), (48, 32), (48,))),
    "inputs, from the left": (lambda x, q, k, b: torch.cat(tensors=[q, k], dim=1) @ x.mT, ((48, 40), (48, 24), (1,))),
    "views": (lambda x, q, k, b: F.linear(x, torch.cat([q.T, k[:32]])), ((64, 48), (48, 64), (1,))),
    "an addend": (
        lambda x, q, k, b: torch.addmm(b, x.flatten(0, 1), torch.cat([q, k])),
        ((32, 48), (32, 48), (15, 48)),
    ),
    "a scaled addend": (
        lambda x, q, k, b: torch.addmm(b, x.flatten(0, 1), torch.cat([q, k]), beta=2, alpha=3),
        ((32, 48), (32, 48), (15, 48)),
    ),
}


@pytest.mark.parametrize("kind", SPLIT)
@pytest.mark.parametrize("dynamic", [False, True])
def test_each_parameter_is_a_site(kind: str, dynamic: bool) -> None:
    function, shapes = SPLIT[kind]
    model = Joined(function, *shapes)
    found, result = split(model, X, dynamic)
    torch.testing.assert_close(result, model(X))
    assert result.stride() == model(X).stride()
    assert [(site.parameter, site.rows, site.reason) for site in found.sites] == [("q", 15, None), ("k", 15, None)]
    model.zero_grad()
    gradients = torch.autograd.grad(result.sin().sum(), (model.q, model.k))
    for ours, theirs in zip(gradients, torch.autograd.grad(model(X).sin().sum(), (model.q, model.k)), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    "function",
    [
        lambda x, q, k, b: F.linear(x, torch.cat([q, k])) + torch.cat([q, k]).sum(),
        lambda x, q, k, b: F.linear(x, torch.cat([q, k.sin()])),
        lambda x, q, k, b: F.linear(x, torch.cat([q, k])[8:]),
        lambda x, q, k, b: F.linear(x, torch.cat([q, x[0, :2]])) + k.sum(),
    ],
    ids=["also computed with", "computed", "in part", "with data"],
)
def test_other_joined_weights_are_left_alone(function: Callable[..., Tensor]) -> None:
    def join(x: Tensor, q: Tensor, k: Tensor, b: Tensor) -> Tensor:
        return function(x, q, k, b)

    model = Joined(join, (32, 64), (48, 64), (1,))
    found, result = split(model, X)
    torch.testing.assert_close(result, model(X))
    assert found.matches == ()


def test_a_part_that_is_written_to_after_it_was_joined_keeps_the_value_it_had() -> None:
    def function(x: Tensor, q: Tensor, k: Tensor, b: Tensor) -> Tensor:
        w = torch.cat([q, k])
        with torch.no_grad():
            q.detach().mul_(2)
        return F.linear(x, w)

    model = Joined(function, (32, 64), (48, 64), (1,))
    expected = F.linear(X, torch.cat([model.q, model.k])).detach()
    found, result = split(model, X)
    torch.testing.assert_close(result, expected)
    assert found.matches == ()


def test_under_autocast_the_sites_have_its_type() -> None:
    def function(x: Tensor, q: Tensor, k: Tensor, b: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return F.linear(x, torch.cat([q, k]), b)

    model = Joined(function, (32, 64), (48, 64), (80,)).float()
    found, result = split(model, X.float())
    assert {site.dtype for site in found.sites} == {"bfloat16"} and len(found.sites) == 2
    torch.testing.assert_close(result, model(X.float()), rtol=1e-2, atol=1e-2)


def test_joined_activations_may_have_as_many_rows_as_data_says() -> None:
    def function(x: Tensor, q: Tensor, k: Tensor, b: Tensor) -> Tensor:
        few, many = x[0].split(b.long().tolist())
        return torch.cat([few @ q, many @ k])

    model = Joined(function, (64, 32), (64, 32), (2,))
    with torch.no_grad():
        model.bias.copy_(torch.tensor([2, 3]))
    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        found, result = split(model, X)
    torch.testing.assert_close(result, model(X))
    assert [site.parameter for site in found.sites] == ["q", "k"]
