"""Names after graph breaks: those of the compiled model, and one decision where code serves several layers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.backends.debugging import aot_eager

from pixelfly_compiler import backend
from pixelfly_compiler.decision import Plan
from pixelfly_compiler.export import export
from pixelfly_compiler.plan import plan, project_
from pixelfly_compiler.sparsify import sparsify_

OPTIONS: dict[str, Any] = {"budget": 0.5, "force": True}

pytestmark = [pytest.mark.usefixtures("fresh_dynamo"), pytest.mark.filterwarnings("ignore::UserWarning")]


@pytest.fixture(autouse=True)
def plans(monkeypatch: pytest.MonkeyPatch) -> list[Plan]:
    """The plan of each graph that becomes sparse. They run by AOTAutograd without Inductor, node by node."""
    made: list[Plan] = []
    monkeypatch.setattr(backend, "inductor", lambda gm, inputs, patches: aot_eager(gm, list(inputs)))
    monkeypatch.setattr(backend, "_trace", made.append)
    return made


def sparse_names(plans: list[Plan]) -> set[str]:
    return {entry.name for made in plans for entry in made.sparse}


class Layer(nn.Module):
    def __init__(self, broken: bool) -> None:
        super().__init__()
        self.up, self.down, self.broken = nn.Linear(64, 128), nn.Linear(128, 64), broken

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.up(x))
        if self.broken:
            torch._dynamo.graph_break()
        return self.down(x)


class Model(nn.Module):
    """Breaks between its layers, or inside of each."""

    def __init__(self, inside: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer(inside) for _ in range(3)])
        self.head, self.inside = nn.Linear(64, 64), inside

    def forward(self, x: Tensor) -> Tensor:
        x = self.layers[0](x)
        if not self.inside:
            torch._dynamo.graph_break()
        x = self.layers[1](x)
        if not self.inside:
            torch._dynamo.graph_break()
        return self.head(self.layers[2](x).sin())  # no loop: Dynamo gives up on one with a break in it


def test_names_are_the_models_between_breaks(plans: list[Plan]) -> None:
    model, x = Model(inside=False), torch.randn(8, 64)
    options = {**OPTIONS, "exclude": ("layers.0.*", "*.1.up.*")}
    torch.compile(model, backend="pixelfly", options=options)(x)
    assert sparse_names(plans) == {
        "layers.1.down.weight",
        "layers.2.up.weight",
        "layers.2.down.weight",
        "head.weight",
    }


def test_a_plan_is_followed_by_name_in_every_piece() -> None:
    model, x = Model(inside=False), torch.randn(8, 64)
    made = plan(model, x, include=("layers.2.*", "head.*"), **OPTIONS)
    assert {entry.name for entry in made.sparse} == {"layers.2.up.weight", "layers.2.down.weight", "head.weight"}
    ours = torch.compile(model, backend="pixelfly", options={"plan": made})(x)
    torch.testing.assert_close(ours, project_(copy.deepcopy(model), made)(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", [False, True])
def test_code_that_serves_several_layers_makes_none_sparse_that_is_excluded(plans: list[Plan], method: bool) -> None:
    model, x = Model(inside=True), torch.randn(8, 64)
    options = {**OPTIONS, "exclude": "layers.2.*"}
    if method:
        model.compile(backend="pixelfly", options=options)
    (model if method else torch.compile(model, backend="pixelfly", options=options))(x)
    assert sparse_names(plans) == {"head.weight"}


def test_code_that_serves_several_layers_is_sparse_where_they_agree(plans: list[Plan]) -> None:
    model, x = Model(inside=True), torch.randn(8, 64)
    torch.compile(model, backend="pixelfly", options={**OPTIONS, "exclude": "layers.*.down.*"})(x)
    assert {name.split(".")[-2] for name in sparse_names(plans)} == {"up", "head"}


class Mixed(nn.Module):
    """Its sizes differ from call to call, and what feeds it."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.v = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        y = self.q(x)[:, :8] + self.v(z)[:, :8]
        torch._dynamo.graph_break()
        return y.relu()


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.spare = Mixed(), Mixed(), Mixed()

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        return self.two(self.one(x, x), z)


@pytest.mark.parametrize(
    "options",
    [{"budget": 0.4}, {"budget": 0.45}, {"vary_strides": True}, {"exclude": "two.v.*", "budget": 0.7}],
    ids=str,
)
def test_a_plan_decides_alike_for_weights_whose_code_is_one(options: dict[str, Any]) -> None:
    model, args = Twice(), (torch.randn(2, 16, 64), torch.randn(2, 24, 64))
    made = plan(model, args, **{**OPTIONS, **options})
    for name in ("q.weight", "v.weight"):
        assert made[f"one.{name}"].config == made[f"two.{name}"].config
    assert {"one.q.weight", "two.q.weight"} <= {entry.name for entry in made.sparse}
    if "exclude" in options:
        reason = "after a graph break its code also runs for two.v.weight, which stays dense"
        assert (made["one.v.weight"].reason, made["two.v.weight"].reason) == (reason, "excluded by 'two.v.*'")
    ours = torch.compile(model, backend="pixelfly", options={"plan": made})(*args)
    torch.testing.assert_close(ours, project_(copy.deepcopy(model), made)(*args), rtol=1e-4, atol=1e-5)


def test_a_layer_compiled_by_itself_has_the_name_that_the_model_gives_it(plans: list[Plan]) -> None:
    model, x = Model(inside=True), torch.randn(8, 64)
    model.layers[1] = torch.compile(model.layers[1], backend="eager")
    torch.compile(model, backend="pixelfly", options={**OPTIONS, "exclude": "layers.1.*"})(x)
    assert sparse_names(plans) == {"head.weight"}


def test_weights_that_a_function_closes_over_are_not_mixed_up() -> None:
    a, b, x = nn.Linear(64, 64), nn.Linear(64, 64), torch.randn(8, 64)

    class Holds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fn, self.inner = (lambda x: a(x) - b(x).sin()), nn.Linear(64, 64)

        def forward(self, x: Tensor) -> Tensor:
            return self.fn(self.inner(x))

    model = Holds()
    ours = torch.compile(model, backend="pixelfly", options=OPTIONS)(x)
    projected = [project_(copy.deepcopy(one), plan(one, x, **OPTIONS)) for one in (model.inner, a, b)]
    y = projected[0](x)
    torch.testing.assert_close(ours, projected[1](y) - projected[2](y).sin(), rtol=1e-4, atol=1e-5)


def test_keys_of_modules_and_parameters_may_look_like_indices() -> None:
    class Keys(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.m = nn.ModuleDict({"3x3[a]": nn.Linear(64, 64)})
            self.p = nn.ParameterDict({"w[0]": torch.randn(128, 64) / 8})

        def forward(self, x: Tensor) -> Tensor:
            x = self.m["3x3[a]"](x)
            return x @ self.p["w[0]"][:64] + x.sin() @ self.p["w[0]"][64:]

    model, x = Keys(), torch.randn(8, 64)
    made = plan(model, x, **OPTIONS)
    assert [(entry.name, entry.parameter) for entry in made.sparse] == [
        ("m.3x3[a].weight", "m.3x3[a].weight"),
        ("p.w[0][0:64]", "p.w[0]"),
        ("p.w[0][64:128]", "p.w[0]"),
    ]
    ours = torch.compile(model, backend="pixelfly", options=OPTIONS)(x)
    exact = project_(copy.deepcopy(model), made)(x)
    torch.testing.assert_close(ours, exact, rtol=1e-4, atol=1e-5)
    program = export(model, (x,), **OPTIONS)
    torch.testing.assert_close(program.module()(x), exact, rtol=1e-4, atol=1e-5)
    compact = sparsify_(model, x, exclude="p.*", **OPTIONS)
    assert compact.m["3x3[a]"].weight.shape == (64, 64)


@pytest.mark.parametrize(
    ("second", "reason"),
    [
        (lambda x, w: x[:, :64] @ w[:, 32:], "parts of the weight that overlap: w[:, 0:64] and w[:, 32:96]"),
        (lambda x, w: x @ w.view(96, 64), "parts of the weight that overlap: w[:, 0:64] and w"),
        (lambda x, w: x + w.sum(), "in another graph: used by `sum`"),
    ],
)
def test_uses_of_a_part_on_both_sides_of_a_break_agree_or_the_weight_is_dense(second: Any, reason: str) -> None:
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(64, 96) / 8)

        def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            x = x @ self.w[:, :64]
            torch._dynamo.graph_break()
            return x, second(y, self.w)

    model, args = Broken(), (torch.randn(8, 64), torch.randn(8, 96))
    made = plan(model, args, **OPTIONS)
    assert not made.sparse and reason in str(made["w[:, 0:64]"].reason)
