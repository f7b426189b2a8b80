"""Densified weights folded into their matmuls: what matches, what does not, and that the dense weight never exists."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from numerics import assert_as_good_as, to_double
from torch import Tensor, nn
from torch._dynamo.backends.debugging import aot_eager
from torch._functorch import config as functorch_config
from torch.func import functional_call
from torch.fx import GraphModule
from torch.utils.checkpoint import checkpoint

import pixelfly_compiler as pf
from pixelfly_compiler import backend
from pixelfly_compiler.decision import Plan
from pixelfly_compiler.passes.fold_densify import DENSIFY, fold_densify
from pixelfly_compiler.passes.sites import SiteConfig
from pixelfly_compiler.plan import Entry

OUT, IN, ROWS = 128, 96, 48
LINEAR = torch.ops.pixelfly.linear.default
OPTIONS: dict[str, Any] = {"budget": 0.5, "force": True, "block_size": 32}

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


class One(nn.Module):
    """One compact weight, (out, in), used by `function(x, weight)`."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor], rank: int = 16, transposed: bool = False) -> None:
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(torch.randn(OUT, IN) / 10)
        out_features, in_features = (IN, OUT) if transposed else (OUT, IN)
        config = SiteConfig(32, 1, rank)
        entry = Entry("weight", (OUT, IN), out_features, in_features, transposed, ROWS, role="w", config=config)
        pf.sparsify_(self, plan=Plan((entry,), 0.5), init="project")

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.weight)


def dynamo_graph(model: nn.Module, *args: Any) -> GraphModule:
    graphs: list[GraphModule] = []

    def keep(gm: GraphModule, _: Any) -> Any:
        graphs.append(gm)
        return gm.forward

    torch.compile(model, backend=keep, fullgraph=True)(*args)
    return graphs[0]


def count(gm: GraphModule, *targets: object) -> int:
    modules = [module for module in gm.modules() if isinstance(module, GraphModule)]
    return sum(node.target in targets for module in modules for node in module.graph.nodes)


def folded(model: nn.Module, *args: Any) -> tuple[int, int]:
    """(matmuls folded, densified weights left), and the graph still computes the same."""
    gm = dynamo_graph(model, *args)
    inputs = [node.meta["example_value"] for node in gm.graph.nodes if node.op == "placeholder"]
    number = fold_densify(gm, lambda device: device.type == "cpu")
    assert len(inputs) == sum(node.op == "placeholder" for node in gm.graph.nodes)
    assert count(gm, LINEAR) == number
    return number, count(gm, *DENSIFY)


X = torch.randn(ROWS, IN)
G = torch.randn(ROWS, OUT)
BIAS = torch.randn(OUT)

MATMULS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], Tensor]] = {
    "linear": (lambda x, w: F.linear(x, w), X),
    "linear with bias": (lambda x, w: F.linear(x, w, BIAS), X),
    "3d": (lambda x, w: F.linear(x.view(4, -1, IN), w), X),
    "matmul": (lambda x, w: x @ w.t(), X),
    "addmm": (lambda x, w: torch.addmm(BIAS, x, w.T), X),
    "other side": (lambda x, w: x @ w, G),
    "from the left": (lambda x, w: w @ x.t(), X),
    "both orientations": (lambda x, w: (x @ w.t()) @ w, X),
    "beside a write": (lambda x, w: F.linear(torch.vmap(lambda row: row.clone().mul_(2))(x), w), X),
    "cast back": (lambda x, w: F.linear(x.bfloat16(), w.bfloat16()).float(), X),
    "cast of the transpose": (lambda x, w: (x.bfloat16() @ w.t().to(torch.bfloat16)).float(), X),
}


@pytest.mark.parametrize("name", MATMULS)
@pytest.mark.parametrize("rank", [0, 16])
def test_every_way_to_write_a_matmul_is_folded(name: str, rank: int) -> None:
    function, x = MATMULS[name]
    for transposed in (False, True):
        torch._dynamo.reset()
        expected = 2 if name == "both orientations" else 1
        assert folded(One(function, rank, transposed), x) == (expected, 0)


PER_HEAD: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], tuple[int, ...]]] = {
    "einsum": (lambda x, w: torch.einsum("sd,hde->she", x, w), (4, IN, 32)),
    "einsum, turned": (lambda x, w: torch.einsum("sd,hed->hse", x, w), (4, 32, IN)),
    "einsum over heads": (lambda x, w: torch.einsum("she,hde->sd", x.unflatten(1, (3, 32)), w), (3, OUT, 32)),
    "matmul": (lambda x, w: x @ w, (4, IN, 32)),
    "reshape": (lambda x, w: x @ w.permute(1, 0, 2).reshape(IN, -1), (4, IN, 32)),
    "patches": (lambda x, w: F.conv1d(x[None], w, stride=2), (OUT, ROWS, 2)),
}


class PerHead(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.function, shape = PER_HEAD[kind]
        self.weight = nn.Parameter(torch.randn(shape) / 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.weight)


@pytest.mark.parametrize("kind", PER_HEAD)
def test_a_matrix_in_a_parameter_of_another_shape_is_folded(kind: str) -> None:
    model = pf.sparsify_(PerHead(kind), X, **OPTIONS)
    torch._dynamo.reset()
    assert folded(model, X) == (1, 0)


def bias_of_the_weight(x: Tensor, w: Tensor) -> Tensor:
    return F.linear(x, w) + w.mean()


def into_another(x: Tensor, w: Tensor) -> Tensor:
    y = x.new_zeros(ROWS, OUT)
    with torch.no_grad():
        torch.addmm(BIAS, x, w.t(), out=y)
    return y


NOT_FOLDED: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], int, int]] = {
    "another use beside": (bias_of_the_weight, 1, 1),
    "only another use": (lambda x, w: x.sum() * w, 0, 1),
    "changed before": (lambda x, w: F.linear(x, w.relu()), 0, 1),
    "with itself": (lambda x, w: w @ w.t(), 0, 1),
    "part of it": (lambda x, w: F.linear(x, w[:64]), 0, 1),
    "into a tensor that is there": (into_another, 0, 1),
    "without gradients": (lambda x, w: F.linear(x, w.data), 0, 1),
    "written to": (lambda x, w: (w.mul_(2), F.linear(x, w))[1], 0, 1),
    "written to by examples": (lambda x, w: (torch.vmap(lambda row: row.mul_(2))(w), F.linear(x, w))[1], 0, 1),
    "a view written to": (lambda x, w: (w.detach()[0].zero_(), F.linear(x, w))[1], 0, 1),
    "a cast written to": (lambda x, w: (v := w.bfloat16(), v.mul_(2), F.linear(x.bfloat16(), v).float())[2], 0, 1),
    "turned in place": (lambda x, w: (F.linear(x, w), w.t_())[0], 0, 1),
    "double": (lambda x, w: F.linear(x.double(), w.double()), 0, 1),
}


@pytest.mark.parametrize("name", NOT_FOLDED)
def test_any_other_use_stays_densified(name: str) -> None:
    function, matmuls, left = NOT_FOLDED[name]
    assert folded(One(function), X) == (matmuls, left)


def test_without_kernels_nothing_is_folded() -> None:
    gm = dynamo_graph(One(MATMULS["linear"][0]), X)
    assert fold_densify(gm, lambda device: False) == 0 and count(gm, *DENSIFY) == 1


# ---- compiled ----


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[GraphModule]]:
    """What Inductor is given: forward and backward graphs, in aten operators, each node with its value."""
    seen: list[GraphModule] = []
    original = backend._inner_compile

    def keep(gm: GraphModule, *args: Any, **kwargs: Any) -> Any:
        seen.append(backend._copy_of_graph(gm))
        return original(gm, *args, **kwargs)

    monkeypatch.setattr(backend, "_inner_compile", keep)
    with functorch_config.patch(enable_autograd_cache=False):  # what it holds never gets to Inductor
        yield seen


def values(graphs: list[GraphModule]) -> list[Tensor]:
    found = []
    for gm in graphs:
        for node in gm.graph.nodes:
            value = node.meta.get("val")
            found += [v for v in (value if isinstance(value, tuple | list) else (value,)) if isinstance(v, Tensor)]
    return found


class Block(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(x)))


class Head(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(x).tanh()


class Net(nn.Module):
    """Two blocks and a head that stays dense; `broken`: Dynamo breaks the graph behind each block."""

    def __init__(self, checkpointed: bool = False, broken: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block(IN, OUT), Block(IN, OUT)])
        self.head = Head(IN)
        self.checkpointed, self.broken = checkpointed, broken

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False) if self.checkpointed else layer(x)
            if self.broken:
                torch._dynamo.graph_break()
        return self.head(x)


def net(**options: Any) -> Net:
    model = Net(**options)
    pf.sparsify_(model, X, **OPTIONS, exclude=["head.*"])
    return model


def step(model: nn.Module, call: Any, x: Tensor, low: bool = False) -> list[Tensor]:
    """The output, and the gradient of every parameter."""
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=low):
        y = call(x)
    probe = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    (y.to(x.dtype) * probe.to(x.dtype)).sum().backward()
    return [y.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # Dynamo's, of an input that is no leaf
@pytest.mark.parametrize("how", ["plain", "autocast", "checkpointed", "broken", "dynamic"])
def test_compiled_equals_eager_and_the_dense_weight_never_exists(how: str, graphs: list[GraphModule]) -> None:
    model = net(checkpointed=how == "checkpointed", broken=how == "broken")
    low = how == "autocast"
    compiled = torch.compile(
        model, backend="pixelfly", fullgraph=how != "broken", dynamic=True if how == "dynamic" else None
    )
    ours = step(model, compiled, X, low)
    eager = step(model, model, X, low)
    double = copy.deepcopy(model).double()
    exact = step(double, double, to_double(X))
    assert len(ours) == len(eager) == 1 + len(list(model.parameters()))
    for mine, plain, truth in zip(ours, eager, exact, strict=True):
        if truth.numel() > 1:  # a gamma's gradient is one sum, in which rounding may or may not cancel
            assert_as_good_as(mine, plain, truth, factor=4.0)
    assert sum(count(gm, LINEAR) for gm in graphs) >= 4
    assert not any(list(value.shape) in ([OUT, IN], [IN, OUT]) for value in values(graphs))
    assert any(list(value.shape) == [IN, IN] for value in values(graphs)), "the head is to stay dense"


@pytest.mark.parametrize("kind", ["einsum", "patches"])
def test_a_matrix_in_a_parameter_of_another_shape_learns_as_in_eager_mode(kind: str) -> None:
    model = pf.sparsify_(PerHead(kind), X, **OPTIONS)
    ours, eager = (step(model, call, X) for call in (torch.compile(model, backend="pixelfly"), model))
    double = copy.deepcopy(model).double()
    for mine, plain, truth in zip(ours, eager, step(double, double, to_double(X)), strict=True):
        if truth.numel() > 1:
            assert_as_good_as(mine, plain, truth, factor=4.0)


def test_generated_code_has_no_dense_weight() -> None:
    from torch._inductor.utils import run_and_get_code

    model = net()
    compiled = torch.compile(model, backend="pixelfly")
    _, code = run_and_get_code(lambda: compiled(X).sum().backward())
    shapes = re.findall(r"\((\d+), (\d+)\)", "\n".join(code))
    assert (str(IN), str(IN)) in shapes
    assert (str(OUT), str(IN)) not in shapes and (str(IN), str(OUT)) not in shapes


# ---- with what sparsify_ left dense ----


@pytest.mark.parametrize("broken", [False, True])
def test_what_was_left_dense_stays_so_unless_asked(broken: bool, caplog: pytest.LogCaptureFixture) -> None:
    model = net(broken=broken)
    caplog.clear()
    copies = {"default": copy.deepcopy(model), "asked": copy.deepcopy(model)}
    with torch.no_grad():
        default = torch.compile(copies["default"], backend="pixelfly")(X)
        asked = torch.compile(copies["asked"], backend="pixelfly", options=OPTIONS)(X)
    torch.testing.assert_close(default, model(X), rtol=1e-4, atol=1e-5)
    assert (asked - model(X)).abs().max() > 1e-2
    said = [r.getMessage() for r in caplog.records if r.name == "pixelfly_compiler"]
    assert len(said) == 1 and "1 of 1 matmul weights" in said[0]


def test_a_dense_model_beside_a_compact_one_is_made_sparse() -> None:
    compact = net()
    dense = nn.Sequential(nn.Linear(IN, OUT))
    plan = pf.plan(dense, X, **OPTIONS)
    with torch.no_grad():
        y = torch.compile(dense, backend="pixelfly", options=OPTIONS)(X)
        torch.testing.assert_close(y, pf.project_(dense, plan)(X), rtol=1e-4, atol=1e-5)
    assert compact.head.out.weight.shape == (IN, IN)


def test_computed_factors_in_place_of_the_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    """While it runs, the model has tensors that are no parameters."""
    monkeypatch.setattr(backend, "inductor", lambda gm, inputs, patches: gm.forward)
    model = net()
    doubled = {name: 2 * value for name, value in model.named_parameters()}
    compiled = torch.compile(model, backend="pixelfly", fullgraph=True)
    y = functional_call(compiled, {f"_orig_mod.{name}": value for name, value in doubled.items()}, X)
    torch.testing.assert_close(y, functional_call(model, doubled, X), rtol=1e-4, atol=1e-4)


def test_gradients_inside_of_compiled_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "inductor", lambda gm, inputs, patches: aot_eager(gm, list(inputs)))
    model = net()
    loss = lambda parts, x: functional_call(model, parts, x).square().sum()  # noqa: E731
    parts = dict(model.named_parameters())
    ours = torch.compile(torch.func.grad(loss), backend="pixelfly", fullgraph=True)(parts, X)
    exact = torch.autograd.grad(loss(parts, X), list(parts.values()))
    for mine, plain in zip(ours.values(), exact, strict=True):
        torch.testing.assert_close(mine, plain, rtol=1e-4, atol=1e-4)


def test_other_backends_densify() -> None:
    model = net()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for mine, plain in zip(step(model, compiled, X), step(model, model, X), strict=True):
        torch.testing.assert_close(mine, plain, rtol=1e-4, atol=1e-4)
