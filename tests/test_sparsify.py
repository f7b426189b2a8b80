"""Compact models in eager mode: what sparsify_, densify_ and load_weights_ make of a model, and what they refuse."""

from __future__ import annotations

import copy
import gc
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

import pixelfly_compiler as pf
from pixelfly_compiler.decision import Entry, Plan
from pixelfly_compiler.errors import CompactError, OptionError, PlanMismatchError
from pixelfly_compiler.kernels.support import flat_butterfly
from pixelfly_compiler.parametrization import CompactWeight, Scales
from pixelfly_compiler.passes import calibration
from pixelfly_compiler.passes.cost import Device
from pixelfly_compiler.passes.sites import SiteConfig

OPTIONS: dict[str, Any] = {"budget": 0.5, "force": True, "block_size": 32}
WIDTH = 128

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


class Functional(nn.Module):
    """A weight that no Linear owns, stored (in, out)."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.randn(WIDTH, 2 * WIDTH) / 16)
        self.second = nn.Parameter(torch.randn(WIDTH, 2 * WIDTH) / 16)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear((x @ self.first).relu(), self.second)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb, self.body = nn.Embedding(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, WIDTH, bias=False)
        self.head.weight = self.emb.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.body(self.emb(ids)))


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.ReLU(), nn.Linear(2 * WIDTH, WIDTH))


def some_x() -> Tensor:
    return torch.randn(32, WIDTH)


def compact(model: nn.Module | None = None, *args: Any, **options: Any) -> nn.Module:
    return pf.sparsify_(model or mlp(), args or (some_x(),), **OPTIONS | options)


def entry(name: str, weight: Tensor, rank: int = 16, transposed: bool = False) -> Entry:
    out_features, in_features = weight.shape[:: -1 if transposed else 1]
    return Entry(
        name,
        tuple(weight.shape),
        out_features,
        in_features,
        transposed,
        rows=32,
        role=name,
        config=SiteConfig(32, 1, rank),
    )


def plan_for(model: nn.Module, *names: str, **rest: Any) -> Plan:
    return Plan(tuple(entry(name, model.get_parameter(name), **rest) for name in names), 0.5)


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.name == "pixelfly_compiler"]


def state_of(model: nn.Module) -> dict[str, Any]:
    """All that `sparsify_` may change."""
    return {
        "parameters": [(name, id(p), p.detach().clone()) for name, p in model.named_parameters()],
        "types": [type(module) for module in model.modules()],
        "attributes": [name for name, module in model.named_modules() if "_pixelfly_plan" in vars(module)],
    }


def assert_unchanged(model: nn.Module, before: dict[str, Any]) -> None:
    after = state_of(model)
    assert [p[:2] for p in after["parameters"]] == [p[:2] for p in before["parameters"]]
    assert all(torch.equal(a[2], b[2]) for a, b in zip(after["parameters"], before["parameters"], strict=True))
    assert after["types"] == before["types"] and after["attributes"] == before["attributes"]


# ---- what becomes compact ----


def test_only_the_factors_remain() -> None:
    model = mlp()
    dense = {name: p.numel() for name, p in model.named_parameters()}
    assert compact(model) is model
    plan, held = pf.plan_of(model), pf.factors(model)
    assert [e.name for e in plan.sparse] == list(held) == ["0.weight", "2.weight"]
    for e in plan.sparse:
        assert list(held[e.name]) == ["blocks", "u", "v", "gamma"]
        assert sum(p.numel() for p in held[e.name].values()) == e.kept + 1 < dense[e.name]
    names = [name for name, _ in model.named_parameters()]
    assert "0.weight" not in names and "0.bias" in names and len(names) == 2 + 2 * 4
    assert "block 32" in repr(model)


def test_the_weight_is_gamma_blocks_plus_the_rest_low_rank() -> None:
    model = compact()
    held: CompactWeight = model[0].parametrizations.weight[0]  # type: ignore[index]
    parts, scales, support = pf.factors(model)["0.weight"], held.scales, held.support
    with torch.no_grad():
        parts["gamma"].fill_(0.3)
    blocks = torch.zeros(support.block_rows, support.block_cols, 32, 32)
    blocks[support.rows(), support.cols()] = parts["blocks"].detach() * scales.blocks
    dense = 0.3 * blocks.transpose(1, 2).reshape(2 * WIDTH, WIDTH)
    dense += 0.7 * (scales.u * parts["u"]) @ (scales.v * parts["v"]).mT
    torch.testing.assert_close(model[0].weight, dense)  # type: ignore[index]


def test_all_factors_learn() -> None:
    model = compact()
    model(some_x()).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())


def test_layers_begin_at_different_strides_unless_told_otherwise() -> None:
    def plan_of(**options: bool) -> Plan:
        model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4)))
        return pf.plan_of(compact(model, some_x(), **options))

    varied, same = plan_of(), plan_of(vary_strides=False)
    assert len({entry.support() for entry in varied.sparse[:3]}) == 3
    assert len({entry.support() for entry in same.sparse[:3]}) == 1
    assert varied.kept == same.kept


@pytest.mark.parametrize("transposed", [False, True])
def test_weights_in_either_orientation_without_an_owner_of_a_known_class(transposed: bool) -> None:
    model, x = Functional(), some_x()
    before, exact = copy.deepcopy(model), model(x)
    compact(model, x, init="project", budget=1.0, block_size=32, lowrank_share=0.0)
    assert [e.transposed for e in pf.plan_of(model).sparse] == [True, False]
    torch.testing.assert_close(model(x), exact)  # every block is kept
    name = "first" if transposed else "second"
    assert getattr(model, name).shape == getattr(before, name).shape


def test_conv1d_of_transformers() -> None:
    pytest.importorskip("transformers")
    from transformers.pytorch_utils import Conv1D

    model, x = nn.Sequential(Conv1D(2 * WIDTH, WIDTH), nn.ReLU()), some_x()
    before = copy.deepcopy(model)
    compact(model, x, init="project")
    oracle = pf.project_(before, pf.plan_of(model))
    torch.testing.assert_close(model(x), oracle(x), rtol=1e-4, atol=1e-5)


def test_the_packed_projection_of_multihead_attention() -> None:
    model, x = nn.MultiheadAttention(WIDTH, 2, batch_first=True), torch.randn(2, 8, WIDTH)
    oracle = copy.deepcopy(model)
    plan = plan_for(model, "in_proj_weight", "out_proj.weight")
    pf.sparsify_(model, plan=plan, init="project")
    pf.project_(oracle, plan, basis="svd")
    for mode in (model.train, model.eval):
        mode()
        oracle.train(model.training)
        torch.testing.assert_close(model(x, x, x)[0], oracle(x, x, x)[0], rtol=1e-4, atol=1e-5)


def test_tied_weights_stay_tied_and_dense_with_the_reason() -> None:
    model, ids = Tied(), torch.arange(WIDTH)
    compact(model, ids)
    assert model.head.weight is model.emb.weight
    plan = pf.plan_of(model)
    assert [e.name for e in plan.sparse] == ["body.weight"]
    assert "tied" in str(plan["emb.weight"].reason)


@pytest.mark.parametrize("given", ["inputs", "plan"])
def test_an_untied_head_is_compact_and_the_table_stays(given: str) -> None:
    model, ids = Tied(), torch.arange(WIDTH)
    oracle, table = copy.deepcopy(model), model.emb.weight
    if given == "plan":
        pf.sparsify_(model, plan=pf.plan(model, ids, **OPTIONS), untie=True, init="project")
    else:
        compact(model, ids, untie=True, init="project")
    assert list(pf.factors(model)) == ["body.weight", "head.weight"]
    assert model.emb.weight is table and isinstance(table, nn.Parameter)
    pf.project_(oracle, pf.plan_of(model), basis="svd")
    torch.testing.assert_close(model(ids), oracle(ids), rtol=1e-4, atol=1e-5)
    model(ids).square().mean().backward()
    assert table.grad is not None and pf.factors(model)["head.weight"]["u"].grad is not None
    before = model(ids)
    pf.densify_(model)
    torch.testing.assert_close(model(ids), before, rtol=1e-4, atol=1e-5)
    assert model.head.weight is not model.emb.weight


@pytest.mark.parametrize("how", ["torch", "safetensors"])
def test_an_untied_head_is_saved_and_loaded(how: str, tmp_path: Path) -> None:
    ids = torch.arange(WIDTH)
    model = compact(Tied(), ids, untie=True)
    state = saved(model, how, tmp_path)
    for other in (Tied(), compact(Tied(), ids, untie=True)):
        pf.load_weights_(other, state)
        assert torch.equal(other(ids), model(ids))
    dense = Tied()  # what is tied in the file becomes the table, and the head's projection
    pf.load_weights_(model, saved(dense, how, tmp_path))
    assert torch.equal(model.emb.weight, dense.emb.weight)
    pf.project_(dense, pf.plan_of(model), basis="svd")
    torch.testing.assert_close(model(ids), dense(ids), rtol=1e-4, atol=1e-5)


def test_a_table_that_multiplies_by_itself_cannot_be_untied() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.emb, self.body = nn.Embedding(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

        def forward(self, ids: Tensor) -> Tensor:
            return F.linear(self.body(self.emb(ids)), self.emb.weight)

    model, ids = Own(), torch.arange(WIDTH)
    compact(model, ids, untie=True)
    assert list(pf.factors(model)) == ["body.weight"]
    assert "looks it up multiplies with it too" in str(pf.plan_of(model)["emb.weight"].reason)
    with pytest.raises(CompactError, match=r"(?s)emb\.weight: is tied: what else uses.*exclude") as caught:
        pf.sparsify_(Own(), plan=pf.plan(Own(), ids, **OPTIONS), untie=True)
    assert "untie" not in str(caught.value), "it would not help"


def test_a_plan_of_a_tied_model_does_not_fit_an_untied_one() -> None:
    plan, model = pf.plan(Tied(), torch.arange(WIDTH), **OPTIONS), Tied()
    model.head.weight = nn.Parameter(model.head.weight.detach().clone())
    with pytest.raises(PlanMismatchError, match=r"emb\.weight: is tied in the plan"):
        pf.sparsify_(model, plan=plan, untie=True)


def test_a_table_and_a_head_that_differ_do_not_fit_a_tied_model() -> None:
    ids = torch.arange(WIDTH)
    state = pf.densify_(compact(Tied(), ids, untie=True)).state_dict()
    model = Tied()
    before = state_of(model)
    with pytest.raises(CompactError, match=r"head\.weight: differs from emb\.weight"):
        pf.load_weights_(model, state)
    assert_unchanged(model, before)


def test_a_part_of_an_untied_head_is_not_made_up_from_the_table() -> None:
    model, ids = compact(Tied(), torch.arange(WIDTH), untie=True), torch.arange(WIDTH)
    state = {name: tensor for name, tensor in model.state_dict().items() if not name.endswith("_extra_state")}
    with pytest.raises(CompactError, match="missing"):
        pf.load_weights_(model, state)
    before = model(ids) - model.emb.weight.sum()
    pf.load_weights_(model, {"emb.weight": model.emb.weight.detach().clone()}, strict=False)
    assert torch.equal(model(ids) - model.emb.weight.sum(), before)


def test_an_untied_head_of_a_part_of_another_model_is_loaded() -> None:
    ids, whole = torch.arange(WIDTH), nn.ModuleDict({"backbone": compact(Tied(), torch.arange(WIDTH), untie=True)})
    dense = Tied()
    pf.load_weights_(whole, {f"backbone.{name}": t for name, t in dense.state_dict().items() if name != "head.weight"})
    pf.project_(dense, pf.plan_of(whole), basis="svd")
    torch.testing.assert_close(whole["backbone"](ids), dense(ids), rtol=1e-4, atol=1e-5)


MATRICES: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], tuple[int, ...]]] = {
    "a dimension ahead": (lambda x, w: x @ w, (1, WIDTH, 96)),
    "a dimension ahead, left": (lambda x, w: w @ x.mT, (1, 96, WIDTH)),
    "for each head": (lambda x, w: torch.einsum("bsd,hde->bshe", x, w), (4, WIDTH, 24)),
    "for each head, turned": (lambda x, w: torch.einsum("bsd,hed->bhse", x, w), (4, 24, WIDTH)),
    "heads in between": (lambda x, w: torch.einsum("bsd,dhe->bshe", x, w), (WIDTH, 4, 24)),
    "the sum over heads": (lambda x, w: torch.einsum("bshe,hde->bsd", x.unflatten(2, (4, -1)), w), (4, 96, 32)),
    "1 x 1": (lambda x, w: F.conv1d(x.mT, w), (96, WIDTH, 1)),
    "patches": (lambda x, w: F.conv1d(x.mT, w, stride=2), (96, WIDTH, 2)),
}


class OneMatrix(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.function, shape = MATRICES[kind]
        self.w = nn.Parameter(torch.randn(shape) / WIDTH**0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.w)


@pytest.mark.parametrize("kind", MATRICES)
def test_one_matrix_in_a_parameter_of_any_shape_becomes_compact(kind: str) -> None:
    dense, x = OneMatrix(kind), torch.randn(3, 8, WIDTH)
    model = compact(copy.deepcopy(dense), x, init="project")
    assert list(pf.factors(model)) == ["w"] and model.w.shape == dense.w.shape
    oracle = pf.project_(copy.deepcopy(dense), pf.plan_of(model), basis="svd")
    torch.testing.assert_close(model(x), oracle(x), rtol=1e-4, atol=1e-4)
    other = pf.load_weights_(OneMatrix(kind), model.state_dict())
    torch.testing.assert_close(other(x), model(x))
    torch.testing.assert_close(pf.densify_(other).w, model.w)


@pytest.mark.parametrize("shape", [(3, WIDTH, 96), (2, 96, WIDTH)])
def test_parts_and_several_matrices_stay_dense(shape: tuple[int, ...]) -> None:
    class Several(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w, self.body = nn.Parameter(torch.randn(shape)), nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            x = self.body(x)
            return x @ self.w if shape[1] == WIDTH else F.linear(x, self.w[0])

    model = compact(Several(), torch.randn(3, WIDTH, WIDTH))
    assert list(pf.factors(model)) == ["body.weight"]
    assert "a part of a parameter, or several matrices" in str([e.reason for e in pf.plan_of(model)])


def test_a_module_of_two_names_is_one_owner() -> None:
    shared = nn.Linear(WIDTH, WIDTH)
    model = compact(nn.Sequential(shared, nn.ReLU(), shared))
    assert list(pf.factors(model)) == ["0.weight"]


def test_rank_zero_has_blocks_alone() -> None:
    model = mlp()
    pf.sparsify_(model, plan=plan_for(model, "0.weight", rank=0), init="project")
    assert list(pf.factors(model)["0.weight"]) == ["blocks"]
    model(some_x()).sum().backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_factors_have_the_weight_s_dtype(dtype: torch.dtype) -> None:
    for init in ("scratch", "project"):
        model = mlp().to(dtype)
        pf.sparsify_(model, plan=plan_for(model, "0.weight"), init=init)
        assert {p.dtype for p in model.parameters()} == {dtype}
        assert model(some_x().to(dtype)).dtype == dtype


def test_frozen_weights_give_frozen_factors() -> None:
    model = mlp()
    model[0].weight.requires_grad_(False)
    compact(model)
    assert not any(p.requires_grad for p in pf.factors(model)["0.weight"].values())
    assert all(p.requires_grad for p in pf.factors(model)["2.weight"].values())
    assert not pf.densify_(model)[0].weight.requires_grad  # type: ignore[index]


# ---- values ----


def test_projected_is_the_oracle_with_the_best_basis() -> None:
    model = mlp()
    before, x = copy.deepcopy(model), some_x()
    compact(model, x, init="project")
    plan = pf.plan_of(model)
    oracle = pf.project_(before, plan, basis="svd")
    assert plan.basis == "svd"  # `project_(model, plan)` alone means the same
    for ours, exact in zip(pf.densify_(model).parameters(), oracle.parameters(), strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-5, atol=1e-6)


def deep(layers: int, width: int, hidden: int) -> nn.Sequential:
    pairs = [(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, width), nn.ReLU()) for _ in range(layers)]
    model = nn.Sequential(*(module for pair in pairs for module in pair))
    for module in model:
        if isinstance(module, nn.Linear):
            nn.init.kaiming_normal_(module.weight)
            nn.init.zeros_(module.bias)
    return model


@pytest.mark.parametrize("rank", [0, 16])
@pytest.mark.parametrize(("width", "hidden"), [(256, 512), (200, 360)], ids=["blocks", "tails"])
def test_scratch_keeps_the_variance_of_activations_and_gradients(rank: int, width: int, hidden: int) -> None:
    dense, x = deep(6, width, hidden), torch.randn(256, width)
    model = copy.deepcopy(dense)
    names = [f"{i}.weight" for i, module in enumerate(model) if isinstance(module, nn.Linear)]
    pf.sparsify_(model, plan=plan_for(model, *names, rank=rank))
    sizes = []
    for each in (dense, model):
        inner = [x.clone().requires_grad_()]
        for module in each:
            inner.append(module(inner[-1]))
            inner[-1].retain_grad()
        (inner[-1] * torch.randn(inner[-1].shape, generator=torch.Generator().manual_seed(1))).sum().backward()
        sizes.append(torch.tensor([[t.detach().norm(), t.grad.norm()] for t in inner if t.grad is not None]))
    ratio = sizes[1] / sizes[0]
    assert ratio.min() > 0.6 and ratio.max() < 1.6, ratio


def test_scratch_follows_the_seed_and_the_module_s_own_scale() -> None:
    def start(scale: float) -> nn.Module:
        torch.manual_seed(3)
        model = mlp()
        with torch.no_grad():
            model[0].weight.mul_(scale)
        pf.sparsify_(model, plan=plan_for(model, "0.weight"))
        return model[0]

    one, again, double, zero = start(1.0), start(1.0), start(2.0), start(0.0)
    assert torch.equal(one.weight, again.weight)
    torch.testing.assert_close(double.weight, 2 * one.weight)
    assert zero.weight.abs().max() == 0


def moves(optimizer: Callable[..., torch.optim.Optimizer], kind: str, x: Tensor, g: Tensor, rank: int) -> float:
    """How far one step moves a compact layer's output for one input, relative to the dense layer."""
    dense = nn.Linear(x.shape[1], g.shape[1], bias=False)
    model = nn.Sequential(copy.deepcopy(dense))
    pf.sparsify_(model, plan=plan_for(model, "0.weight", rank=rank), optimizer=kind)
    moved = []
    for layer in (dense, model):
        step = optimizer(layer.parameters(), lr=1e-6)
        before = layer(x).detach()
        layer(x).backward(g)
        step.step()
        moved.append((layer(x).detach() - before).norm())
    return float(moved[1] / moved[0])


@pytest.mark.parametrize("rank", [0, 32])
@pytest.mark.parametrize("kind", ["adam", "sgd"])
def test_a_step_moves_the_output_as_far_as_in_the_dense_layer(kind: str, rank: int) -> None:
    optimizer = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}[kind]
    x, g = torch.randn(1, 512).double(), torch.randn(1, 512).double()
    torch.set_default_dtype(torch.float64)
    try:
        ratio = moves(optimizer, kind, x, g, rank)
    finally:
        torch.set_default_dtype(torch.float32)
    assert 0.75 < ratio < 1.35


def test_scales_of_the_docstring() -> None:
    support = flat_butterfly(512, 256, 32, 1)
    d, r, n = support.density, 16, 256
    assert Scales.of(support, r, "adam") == Scales(1 / d, n / (4 * r), 1.0)
    assert Scales.of(support, 0, "adam").blocks == 1 / d
    assert Scales.of(support, r, "sgd").u == 2 * math.sqrt(n / (4 * r))


# ---- back, copies, moves ----


def test_densify_gives_the_same_values_in_the_same_order() -> None:
    model, x = mlp(), some_x()
    before = [(name, p.shape) for name, p in model.named_parameters()]
    types = [type(module) for module in model.modules()]
    compact(model, x)
    y = model(x)
    assert pf.densify_(model) is model
    assert torch.equal(model(x), y)
    assert [(name, p.shape) for name, p in model.named_parameters()] == before
    assert [type(module) for module in model.modules()] == types
    with pytest.raises(CompactError, match="no compact weight"):
        pf.densify_(model)
    compact(model, x)  # and compact once more


def test_a_copy_made_dense_leaves_the_original_alone() -> None:
    model, x = compact(), some_x()
    y = model(x)
    pf.densify_(copy.deepcopy(model))
    assert torch.equal(model(x), y) and len(pf.factors(model)) == 2


def test_other_parametrizations_of_the_module_survive() -> None:
    model = mlp()
    parametrize.register_parametrization(model[0], "bias", nn.Softplus(), unsafe=True)
    pf.sparsify_(model, plan=plan_for(model, "0.weight"))
    y = model(some_x() * 0)
    pf.densify_(model)
    assert parametrize.is_parametrized(model[0], "bias") and isinstance(model[0].weight, nn.Parameter)
    assert torch.equal(model(some_x() * 0), y)


def test_a_weight_parametrized_by_others_is_left_alone() -> None:
    model = nn.utils.parametrizations.weight_norm(nn.Linear(WIDTH, WIDTH))
    with_norm = nn.Sequential(model, nn.Linear(WIDTH, WIDTH))
    compact(with_norm)
    assert list(pf.factors(with_norm)) == ["1.weight"]


def test_assigning_a_dense_weight_projects_it() -> None:
    model, weight = compact(), torch.randn(2 * WIDTH, WIDTH)
    model[0].weight = weight  # type: ignore[index]
    exact = pf.project(weight, pf.plan_of(model)["0.weight"], "svd")
    torch.testing.assert_close(model[0].weight, exact, rtol=1e-4, atol=1e-5)  # type: ignore[index]


def test_moves_from_meta_and_between_dtypes() -> None:
    whole, x = compact(), some_x()
    with torch.device("meta"):
        model = mlp()
    pf.sparsify_(model, plan=pf.plan_of(whole))
    assert {p.device.type for p in model.parameters()} == {"meta"}
    model.to_empty(device="cpu")
    model.load_state_dict(whole.state_dict())
    assert torch.equal(model(x), whole(x))
    low = copy.deepcopy(model).bfloat16()
    assert low[0].parametrizations.weight[0].index.dtype == torch.int32
    torch.testing.assert_close(low(x.bfloat16()).float(), whole(x), rtol=0.05, atol=0.05)


def test_the_plan_travels() -> None:
    model = compact()
    plan = pf.plan_of(model)
    assert pf.plan_of(torch.optim.swa_utils.AveragedModel(model)) == plan
    assert pf.plan_of(torch.compile(model)) == plan
    with pytest.raises(CompactError, match="not compact"):
        pf.plan_of(mlp())


def test_a_saved_plan_needs_no_inputs(tmp_path: Path) -> None:
    pf.plan_of(compact()).save(tmp_path / "plan.json")
    model = pf.sparsify_(mlp(), plan=tmp_path / "plan.json")
    assert len(pf.factors(model)) == 2


# ---- weights ----


def saved(model: nn.Module, way: str, folder: Path) -> dict[str, Tensor]:
    if way == "torch":
        torch.save(model.state_dict(), folder / "weights.pt")
        return torch.load(folder / "weights.pt", weights_only=True)
    safetensors = pytest.importorskip("safetensors.torch")
    safetensors.save_model(model, folder / "weights.safetensors")
    return safetensors.load_file(folder / "weights.safetensors")


@pytest.mark.parametrize("way", ["torch", "safetensors"])
def test_state_dict_round_trip_is_strict(way: str, tmp_path: Path) -> None:
    model, x = compact(), some_x()
    other = pf.sparsify_(mlp(), plan=pf.plan_of(model))
    other.load_state_dict(saved(model, way, tmp_path), strict=True)
    assert torch.equal(other(x), model(x))


def test_state_dict_carries_the_scales() -> None:
    """The factors mean the same, whichever optimizer the other model was made for."""
    model, x = compact(optimizer="sgd"), some_x()
    other = pf.sparsify_(mlp(), plan=pf.plan_of(model), optimizer="adam")
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x), model(x))


@pytest.mark.parametrize("way", ["torch", "safetensors"])
def test_compact_weights_into_a_dense_model_and_back(way: str, tmp_path: Path) -> None:
    model, x = compact(), some_x()
    other = pf.load_weights_(mlp(), saved(model, way, tmp_path))
    assert torch.equal(other(x), model(x)) and list(pf.factors(other)) == list(pf.factors(model))
    assert [e.config for e in pf.plan_of(other).sparse] == [e.config for e in pf.plan_of(model).sparse]
    assert "loaded" in str(pf.plan_of(other))


def test_dense_weights_into_a_compact_model() -> None:
    dense, x = mlp(), some_x()
    model = compact()
    pf.load_weights_(model, dense.state_dict())
    oracle = pf.project_(dense, pf.plan_of(model))
    torch.testing.assert_close(model(x), oracle(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["dense", "compact"])
def test_weights_of_the_same_kind_and_of_compiled_models(kind: str) -> None:
    model, x = mlp(), some_x()
    if kind == "compact":
        compact(model, x)
    other = copy.deepcopy(model)
    for p in other.parameters():
        nn.init.zeros_(p)
    pf.load_weights_(other, torch.compile(model).state_dict())
    assert torch.equal(other(x), model(x))


def test_a_tied_weight_may_be_saved_under_one_name(tmp_path: Path) -> None:
    model, ids = compact(Tied(), torch.arange(WIDTH)), torch.arange(WIDTH)
    state = saved(model, "safetensors", tmp_path)
    assert len([name for name in ("emb.weight", "head.weight") if name in state]) == 1
    other = pf.load_weights_(Tied(), state)
    assert torch.equal(other(ids), model(ids)) and other.head.weight is other.emb.weight


def test_weights_that_do_not_fit_are_errors_and_change_nothing() -> None:
    model = compact()
    other = mlp()
    before = state_of(other)
    with pytest.raises(PlanMismatchError, match=r"0\.weight: compact in the state"):
        pf.load_weights_(nn.Sequential(nn.ReLU()), model.state_dict())
    with pytest.raises(CompactError, match=r"missing \['2\.bias'\], unexpected \[\]"):
        pf.load_weights_(other, {k: v for k, v in model.state_dict().items() if k != "2.bias"})
    assert_unchanged(other, before)
    with pytest.raises(PlanMismatchError, match=r"0\.weight: has shape \(128, 128\)"):
        pf.load_weights_(compact(), nn.Sequential(nn.Linear(WIDTH, WIDTH)).state_dict())
    finer = compact(block_size=16)
    with pytest.raises(PlanMismatchError, match=r"0\.weight: was saved as block 32"):
        pf.load_weights_(finer, model.state_dict())
    half = pf.sparsify_(mlp(), plan=plan_for(mlp(), "0.weight"))
    with pytest.raises(CompactError, match="densify_"):
        pf.load_weights_(half, compact().state_dict())


# ---- errors: clear, and the model is what it was ----


def test_twice() -> None:
    model = compact()
    before = state_of(model)
    with pytest.raises(CompactError, match=r"0\.weight: is compact already\n.*densify_"):
        compact(model)
    assert_unchanged(model, before)


def test_an_optimizer_that_holds_the_weights() -> None:
    model = mlp()
    before = state_of(model)
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(CompactError, match=r"AdamW.*already holds"):
        compact(model)
    assert_unchanged(model, before)
    del optimizer
    compact(model)  # also if it was only waiting for the collector


def test_an_optimizer_of_another_model_is_in_no_one_s_way() -> None:
    optimizer = torch.optim.AdamW(mlp().parameters())
    compact()
    assert optimizer.param_groups


def test_a_plan_for_another_model() -> None:
    model = mlp()
    before, plan = state_of(model), plan_for(mlp(), "0.weight", "2.weight")
    first = plan.entries[0]
    for wrong, match in [
        (replace(first, name="8.weight"), r"8\.weight: the model has no such weight"),
        (replace(first, weight_shape=(64, 64)), r"0\.weight: has shape \(256, 128\), \(64, 64\) in the plan"),
    ]:
        with pytest.raises(PlanMismatchError, match=match):
            pf.sparsify_(model, plan=replace(plan, entries=(plan.entries[1], wrong)))
        assert_unchanged(model, before)


def test_a_plan_that_makes_a_tied_weight_sparse() -> None:
    model = Tied()
    before = state_of(model)
    plan = pf.plan(model, torch.arange(WIDTH), **OPTIONS)
    assert plan["emb.weight"].config is not None
    with pytest.raises(CompactError, match=r"emb\.weight: is tied"):
        pf.sparsify_(model, plan=plan)
    assert_unchanged(model, before)


def test_inference_mode() -> None:
    model = mlp()
    before = state_of(model)
    with torch.inference_mode():
        with pytest.raises(CompactError, match="inference_mode"):
            compact(model)
        born = mlp()
    with pytest.raises(CompactError, match="inference_mode"):
        compact(born)
    assert_unchanged(model, before)


def test_no_inputs_and_wrong_options() -> None:
    model = mlp()
    before = state_of(model)
    with pytest.raises(OptionError, match="neither example inputs nor a plan"):
        pf.sparsify_(model)
    with pytest.raises(OptionError, match="'init' is 'svd'"):
        compact(model, init="svd")
    with pytest.raises(OptionError, match="'optimizer' is 'muon'"):
        compact(model, optimizer="muon")
    with pytest.raises(OptionError, match="basis"):
        compact(model, basis="fixed")
    with pytest.raises(OptionError, match="unknown option 'budgets'"):
        compact(model, budgets=0.5)
    with pytest.raises(TypeError, match="max_autotune"):
        compact(model, max_autotune=True)
    assert_unchanged(model, before)


def test_a_failure_half_way_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = mlp()
    before, original = state_of(model), CompactWeight.from_scratch

    def second_fails(self: CompactWeight, weight: Tensor) -> Any:
        if self.entry.name == "2.weight":
            raise MemoryError("no room")
        return original(self, weight)

    monkeypatch.setattr(CompactWeight, "from_scratch", second_fails)
    with pytest.raises(MemoryError):
        compact(model)
    assert_unchanged(model, before)


def test_nothing_to_make_compact_is_said(caplog: pytest.LogCaptureFixture) -> None:
    compact(nn.Sequential(nn.LayerNorm(WIDTH)))
    assert len(said(caplog)) == 1 and "nothing was made compact: no site" in said(caplog)[0]


def test_no_site_stays_dense_for_a_projection_that_compact_weights_have_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "calibrate", Device)  # not what this machine is like
    model = nn.Linear(96, 96)
    pf.sparsify_(model, torch.randn(64, 96))
    assert len(pf.plan_of(model).sparse) == 1


def test_what_was_done_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    compact(init="project")
    assert len(said(caplog)) == 1
    assert "2 of 2 matmul weights are compact now" in said(caplog)[0] and "relative error is 0." in said(caplog)[0]


def test_dead_models_are_forgotten() -> None:
    from pixelfly_compiler.sparsify import dense_parameters_of_compact_models

    model = compact()
    ids = {id(p) for p in model.parameters()}
    assert ids <= dense_parameters_of_compact_models()
    del model
    gc.collect()
    assert not ids & dense_parameters_of_compact_models()


def test_a_second_model_with_other_supports_has_no_symbolic_ones() -> None:
    placeholders: list[Any] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        placeholders.extend(inputs)
        return graph.forward

    x = torch.randn(64, 256)
    for block in (32, 16):
        model = pf.sparsify_(nn.Sequential(nn.Linear(256, 256)), x, budget=0.25, block_size=block, force=True)
        torch.compile(model, backend=backend)(x)
    assert sum(isinstance(value, Tensor) and value.dtype == torch.int32 for value in placeholders) == 2
    assert not any(isinstance(value, torch.SymInt) for value in placeholders)
