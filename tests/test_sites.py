"""Which matmuls are found in Dynamo's graph, under which names, in which roles; and which are not, and why."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, cast

import pytest
import sympy
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.func import grad, vmap
from torch.fx import GraphModule
from torch.utils.checkpoint import checkpoint

from pixelfly_compiler.passes.find import find_sites
from pixelfly_compiler.passes.reasons import ineligible
from pixelfly_compiler.passes.regions import Region
from pixelfly_compiler.passes.sites import Found, Match
from pixelfly_compiler.passes.weights import qualified_name


def found_in(
    model: nn.Module | Callable[..., Any], *args: Any, dynamic: bool | None = None, **kwargs: Any
) -> list[Found]:
    """What is found in each graph of one call under Dynamo."""
    found: list[Found] = []

    def backend(gm: GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        found.append(find_sites(gm, inputs))
        return gm.forward

    torch._dynamo.reset()
    torch.compile(model, backend=backend, dynamic=dynamic)(*args, **kwargs)
    return found


class OneWeight(nn.Module):
    """A weight and a function of it and the input."""

    def __init__(self, function: Callable[..., torch.Tensor], *shape: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(*shape))
        self.bias = nn.Parameter(torch.randn(48))
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x, self.w, self.bias)


X = torch.randn(2, 5, 32)
SCALED: dict[str, tuple[Callable[..., torch.Tensor], tuple[int, int], bool]] = {
    "addmm, scaled": (lambda x, w, b: torch.addmm(b, x.view(-1, 32), w, beta=0.5, alpha=-2), (32, 48), True),
    "left addmm, scaled": (
        lambda x, w, b: torch.addmm(x.new_ones(10), w, x.view(-1, 32).t(), alpha=3),
        (48, 32),
        False,
    ),
    "addmv": (lambda x, w, b: b.addmv(w, x[0, 0], beta=2), (48, 32), False),
}
FORMS: dict[str, tuple[Callable[..., torch.Tensor], tuple[int, int], bool]] = {
    "linear": (lambda x, w, b: F.linear(x, w, b), (48, 32), False),
    "linear keywords": (lambda x, w, b: F.linear(input=x, weight=w, bias=b), (48, 32), False),
    "linear of a transpose": (lambda x, w, b: F.linear(x, w.t(), b), (32, 48), True),
    "addmm": (lambda x, w, b: torch.addmm(b, x.view(-1, 32), w), (32, 48), True),
    "addmm method": (lambda x, w, b: b.addmm(x.view(-1, 32), w), (32, 48), True),
    "addmm transposed": (lambda x, w, b: torch.addmm(b, x.view(-1, 32), w.T), (48, 32), False),
    "mm": (lambda x, w, b: torch.mm(x.view(-1, 32), w), (32, 48), True),
    "mm method": (lambda x, w, b: x.view(-1, 32).mm(w.transpose(0, 1)), (48, 32), False),
    "matmul": (lambda x, w, b: torch.matmul(x, w), (32, 48), True),
    "matmul keywords": (lambda x, w, b: torch.matmul(x, other=w), (32, 48), True),
    "matmul method": (lambda x, w, b: x.matmul(w.mT), (48, 32), False),
    "@": (lambda x, w, b: x @ w.permute(1, 0), (48, 32), False),
    "@ twice transposed": (lambda x, w, b: x @ w.t().contiguous().T, (32, 48), True),
    "@ a copy as it lies": (lambda x, w, b: x @ w.T.contiguous().as_strided((32, 48), (1, 32)), (32, 48), True),
    "left addmm": (lambda x, w, b: torch.addmm(x.new_ones(10), w, x.view(-1, 32).t()), (48, 32), False),
    **SCALED,
    "addmm, scaled, without its term": (
        lambda x, w, b: torch.addmm(b * torch.nan, x.view(-1, 32), w, beta=0),
        (32, 48),
        True,
    ),
    "einsum": (lambda x, w, b: torch.einsum("bsd,df->bsf", x, w), (32, 48), True),
    "einsum, weight first": (lambda x, w, b: torch.einsum("fd,bsd->bsf", w, x), (48, 32), False),
    "einsum to the left": (lambda x, w, b: torch.einsum("...d,df->f...", x, w), (32, 48), True),
    "einsum, no arrow": (lambda x, w, b: torch.einsum("abc,cd", x, w), (32, 48), True),
    "linalg": (lambda x, w, b: torch.linalg.matmul(x, w), (32, 48), True),
    "inner": (lambda x, w, b: torch.inner(x, w), (48, 32), False),
    "inner, weight first": (lambda x, w, b: w.inner(x), (48, 32), False),
    "tensordot": (lambda x, w, b: torch.tensordot(x, w, 1), (32, 48), True),
    "tensordot, weight first": (lambda x, w, b: torch.tensordot(w, x, ([-1], [2])), (48, 32), False),
    "a cast": (lambda x, w, b: x.double() @ w.double(), (32, 48), True),
    "a cast to more digits and back": (lambda x, w, b: x @ w.double().float(), (32, 48), True),
    "left": (lambda x, w, b: w @ x.mT, (48, 32), False),
    "left of a vector": (lambda x, w, b: w @ x[0, 0], (48, 32), False),
    "left transposed": (lambda x, w, b: torch.matmul(w.T, x.mT), (32, 48), True),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_matmul_is_found_and_means_what_the_match_says(form: str) -> None:
    function, shape, transposed = FORMS[form]
    model = OneWeight(function, *shape)
    (found,) = found_in(model, X)
    (site,), (match,) = found.sites, found.matches
    assert (site.name, site.out_features, site.in_features, site.transposed) == ("w", 48, 32, transposed)
    assert site.rows == (1 if form in ("left of a vector", "addmv") else 10)
    assert site.reason is None
    assert match.transposed == transposed
    assert (match.bias is not None) == ("linear" in form or (form.startswith("addmm") and "scaled" not in form))


def test_the_match_recomputes_the_node() -> None:
    for function, shape, _ in FORMS.values():
        model = OneWeight(function, *shape)
        match, (result, x, weight, bias, addend, *given) = one_match(model, X)
        parts = match.operands
        expected = parts.leave(F.linear(parts.enter(x, *given), parts.matrix(weight), bias), *given)
        torch.testing.assert_close(result, expected if addend is None else expected + addend)
        stored = model.w if match.region is None else match.region.view(model.w)
        torch.testing.assert_close(parts.matrix(weight).float(), stored.t() if match.transposed else stored)


def one_match(model: nn.Module, *args: Any) -> tuple[Match, tuple[Any, ...]]:
    """The match of a graph that has one, and the values of node, x, weight, bias, addend and what else is given."""
    seen: dict[str, Any] = {}

    def backend(gm: GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        (match,) = find_sites(gm, inputs).matches
        gm.graph.output_node().args = (
            (match.node, match.x, match.weight, match.bias, match.addend, *match.operands.given),
        )
        gm.recompile()
        seen["match"] = match

        def run(*args: Any) -> Any:
            seen["values"] = gm(*args)
            return (seen["values"][0],)

        return run

    torch._dynamo.reset()
    torch.compile(model, backend=backend)(*args)
    return seen["match"], seen["values"]


# ---- matrices whose dimensions are in another order in memory, or are several ----

HEADS = (4, 32, 12)  # matrices (in, out)
TURNED = (4, 12, 32)  # matrices (out, in)
PER_HEAD: dict[str, tuple[Callable[..., torch.Tensor], tuple[int, ...]]] = {
    "einsum": (lambda x, w: torch.einsum("bsd,hde->bshe", x, w), HEADS),
    "einsum, turned": (lambda x, w: torch.einsum("bsd,hed->bhse", x, w), TURNED),
    "einsum, heads in between": (lambda x, w: torch.einsum("bsd,dhe->bhse", x, w), (32, 4, 12)),
    "einsum, heads last": (lambda x, w: torch.einsum("bsd,edh->bshe", x, w), (12, 32, 4)),
    "einsum, of x for each head": (
        lambda x, w: torch.einsum("bhsd,hde->bhse", x[:, None].expand(2, 4, 5, 32), w),
        HEADS,
    ),
    "tensordot": (lambda x, w: torch.tensordot(x, w, ([2], [1])), HEADS),
    "matmul": (lambda x, w: x[:, None] @ w, HEADS),
    "matmul, of more dimensions": (lambda x, w: x[:, None] @ w[None], HEADS),
    "matmul, of one row": (lambda x, w: x[0, 0] @ w, HEADS),
    "matmul, left": (lambda x, w: w @ x.mT[:, None], TURNED),
    "matmul, of two and two": (lambda x, w: x[:, None, None] @ w.unflatten(0, (2, 2)), HEADS),
    "matmul, unsqueezed": (lambda x, w: x.unsqueeze(1).unsqueeze(-4) @ w.unflatten(0, (1, 4)), HEADS),
    "bmm": (lambda x, w: x.view(10, 32).expand(4, 10, 32).bmm(w), HEADS),
    "baddbmm": (lambda x, w: torch.baddbmm(x.new_ones(12), x[0][None].expand(4, 5, 32), w), HEADS),
    "reshape": (lambda x, w: x @ w.permute(1, 0, 2).reshape(32, 48), HEADS),
    "flatten": (lambda x, w: F.linear(x, w.mT.flatten(0, 1)), HEADS),
    "a copy, and a view of it": (lambda x, w: x @ w.permute(1, 2, 0).contiguous().view(32, 48), HEADS),
}


@pytest.mark.parametrize("form", PER_HEAD)
def test_matrices_which_all_rows_meet_are_one(form: str) -> None:
    function, shape = PER_HEAD[form]
    model = OneWeight(lambda x, w, b: function(x, w), *shape)
    match, (result, x, weight, _, addend, *given) = one_match(model, X)
    assert (match.site, match.out_features, match.in_features, match.matrices) == ("w", 48, 32, None)
    assert match.rows == result.numel() // 48
    parts = match.operands
    matrix = parts.matrix(weight)
    product = parts.leave(F.linear(parts.enter(x, *given), matrix), *given)
    torch.testing.assert_close(result, product if addend is None else product + addend)
    stored = match.region.view(model.w) if match.region else model.w
    torch.testing.assert_close(matrix, stored.t() if match.transposed else stored)


def test_the_sum_over_heads_is_one_matmul() -> None:
    model = OneWeight(lambda x, w, b: torch.einsum("bshe,hde->bsd", x.unflatten(2, (4, 8)), w), 4, 48, 8)
    match, (result, x, weight, *_) = one_match(model, X)
    parts = match.operands
    assert (match.out_features, match.in_features, match.rows) == (48, 32, 10)
    torch.testing.assert_close(result, parts.leave(F.linear(parts.enter(x), parts.matrix(weight))))


def test_a_weight_that_is_repeated_or_used_in_two_orders_is_dense_with_the_reason() -> None:
    (found,) = found_in(OneWeight(lambda x, w, b: x @ w.repeat_interleave(2, 1), 32, 24), X)
    assert "is repeated" in str(found.sites[0].reason)
    twice = OneWeight(
        lambda x, w, b: (torch.einsum("bsd,hde->bshe", x, w), x.view(1, 10, 32).repeat(4, 1, 1) @ w), *HEADS
    )
    (found,) = found_in(twice, X)
    assert "as different matrices" in str(found.sites[0].reason)


OF_X_OR_OF_ITS_ROWS: dict[str, Callable[..., torch.Tensor]] = {
    "bmm": lambda x, w: torch.bmm(x.expand(4, -1, -1), w),
    "matmul": lambda x, w: x @ w,
    "einsum": lambda x, w: torch.einsum("ebk,ekn->ben", x, w),
    "left": lambda x, w: w.mT @ x[None].mT,
}


@pytest.mark.parametrize("form", OF_X_OR_OF_ITS_ROWS)
def test_not_the_values_of_x_decide_how_many_matrices_a_weight_is(form: str) -> None:
    model = OneWeight(lambda x, w, b: OF_X_OR_OF_ITS_ROWS[form](x, w), *HEADS)
    for x in (torch.randn(4, 6, 32), torch.randn(1, 6, 32), torch.randn(1, 6, 32).expand(4, -1, -1)):
        match, (result, x, weight, *_) = one_match(model, x)
        assert (match.matrices, match.out_features, match.region, match.rows) == (4, 12, None, 24)
        rows = match.operands.enter(x)
        product = rows.flatten(1, -2) @ match.operands.matrix(weight).mT
        torch.testing.assert_close(result, match.operands.leave(product.view(*rows.shape[:-1], 12)))


def test_each_row_of_an_x_that_repeats_itself_has_its_gradient() -> None:
    x = torch.randn(1, 6, 32).expand(4, -1, -1).detach().requires_grad_()
    match, _ = one_match(OneWeight(lambda x, w, b: torch.bmm(x, w), *HEADS), x)
    (gradient,) = torch.autograd.grad(match.operands.enter(x).sum(), x)
    torch.testing.assert_close(gradient, torch.ones(4, 6, 32))


@pytest.mark.parametrize(
    "function",
    [
        lambda x, w: x @ w[::3].repeat_interleave(2, 0).T,
        lambda x, w: x @ w[:2].expand(2, 2, 32).flatten(0, 1).T,
        lambda x, w: x @ w.as_strided((4, 32), (32, 0)).T,
    ],
)
def test_repeats_that_are_as_many_as_the_elements_of_a_box_are_repeats(function: Callable[..., torch.Tensor]) -> None:
    (found,) = found_in(OneWeight(lambda x, w, b: function(x, w), 4, 32), X)
    assert found.sites[0].reason == "the weight is repeated"


@pytest.mark.parametrize(
    "function",
    [
        lambda x, w: x @ w.t() + w.t().contiguous()[:0].sum(),
        lambda x, w: torch.cat([x @ w.t().contiguous()[:, :0], x @ w.t()], -1),
        lambda x, w: torch.cat([x @ w[:0].t(), x @ w.t()], -1),
    ],
)
def test_an_empty_slice_of_a_weight_is_no_use_of_it(function: Callable[..., torch.Tensor]) -> None:
    (found,) = found_in(OneWeight(lambda x, w, b: function(x, w), 48, 32), X)
    assert [(site.name, site.reason, site.rows) for site in found.sites] == [("w", None, 10)]


@pytest.mark.parametrize("equation", ["...sd,...df->...sf", "b...d,...df->b...f", "...sd,...df", "...d,...df"])
def test_an_ellipsis_stands_for_the_same_dimensions_in_both(equation: str) -> None:
    x = X[:, None] if "s" in equation else X
    match, (result, x, weight, *_) = one_match(OneWeight(lambda x, w, b: torch.einsum(equation, x, w), 5, 32, 48), x)
    parts = match.operands
    rows, matrix = parts.enter(x), parts.matrix(weight)
    product = torch.einsum("e...d,efd->e...f", rows, matrix) if match.matrices else rows @ matrix.mT
    torch.testing.assert_close(result, parts.leave(product))


def test_addmm_with_a_matrix_has_an_addend_and_a_factor_from_data_is_left_alone() -> None:
    model = OneWeight(lambda x, w, b: torch.addmm(x.new_ones(10, 48), x.view(-1, 32), w), 32, 48)
    (match,) = found_in(model, X)[0].matches
    assert match.bias is None
    assert match.addend is not None
    model = OneWeight(lambda x, w, b: torch.addmm(b, x.view(-1, 32), w, alpha=x.sum().item()), 32, 48)
    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        assert "addmm" in found_in(model, X)[0].skipped[0].reason


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda x, w, b: torch.einsum("bsd,df->bsdf", x, w), "`einsum`"),
        (lambda x, w, b: x @ (w * 2), "`mul`"),
        (lambda x, w, b: x @ w.half().float(), "what another has rounded"),
        (lambda x, w, b: torch.tensordot(x, w, 0), "`tensordot`"),
        (lambda x, w, b: x @ torch._neg_view(w), "`_neg_view`"),
        (lambda x, w, b: x @ w.view(torch.int32).view(torch.float32), "`view`"),
        (lambda x, w, b: x @ w.bfloat16().view(torch.float32), "`view`"),
        (lambda x, w, b: x * torch.view_as_complex(w.unflatten(-1, (-1, 2)))[0, 0], "`view_as_complex`"),
        (lambda x, w, b: torch.baddbmm(w.view(2, 16, 48), x[..., :16].mT, x.new_ones(2, 5, 48)), "which adds it"),
    ],
)
def test_other_uses_are_passed_over_with_the_reason(function: Callable[..., Any], reason: str) -> None:
    (found,) = found_in(OneWeight(function, 32, 48), X)
    assert found.sites == ()
    assert reason in found.skipped[0].reason


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda x, w, b: x @ w + w.sum(), "also used by `sum`"),
        (lambda x, w, b: (x @ w) @ w.T, "both orientations"),
        (lambda x, w, b: x @ w + x @ w.data, "which no gradients go through"),
        (lambda x, w, b: x @ w + (x[0] @ w).unsqueeze_(0), "also used by `matmul`, and the shape of its result"),
        (lambda x, w, b: x @ w[:, :32] + w.view(-1)[30:49].sum(), "also used by `sum`"),
        (lambda x, w, b: x @ w[:, :16] + w.view(-1)[20:130].sum(), "also used by `sum`"),
    ],
)
def test_a_matmul_that_must_stay_dense_is_a_site_with_a_reason(function: Callable[..., Any], reason: str) -> None:
    (found,) = found_in(OneWeight(function, 32, 48), X)
    assert found.matches == ()
    assert reason in str(found.sites[0].reason)
    assert found.sites[0].rows > 0


@pytest.mark.parametrize(
    "function",
    [
        lambda x, w, b, y: torch.addmm(b, x[0], w, out=y[0]),
        lambda x, w, b, y: torch.addmv(b, w.t(), x[0, 0], out=y[0, 0]),
        lambda x, w, b, y: torch.bmm(x, w.expand(2, 32, 48), out=y),
        lambda x, w, b, y: torch.baddbmm(b, x, w.expand(2, 32, 48), out=y),
        lambda x, w, b, y: torch.addbmm(b, x[:1], w[None], out=y[0]),
        lambda x, w, b, y: torch.tensordot(x, w, 1, out=y),
        lambda x, w, b, y: torch.inner(x, w.t(), out=y),
        lambda x, w, b, y: torch.ops.aten.mm.out(x[0], w, out=y[0]),
        lambda x, w, b, y: torch._C._nn.linear(x, w.t(), out=y),
    ],
)
def test_a_matmul_into_a_tensor_that_is_there_is_no_site(function: Callable[..., torch.Tensor]) -> None:
    model = OneWeight(lambda x, w, b: function(x, w, b, x.new_zeros(2, 5, 48)), 32, 48)
    with torch.no_grad():
        (found,) = found_in(model, X)
    assert found.sites == () and "writes its result to a tensor" in found.skipped[0].reason


def test_a_matmul_whose_result_nothing_uses_is_no_site_and_told_so() -> None:
    (found,) = found_in(OneWeight(lambda x, w, b: (F.linear(x, w), x * 2)[1], 48, 32), X)
    assert found.sites == () and "nothing uses" in found.skipped[0].reason and found.skipped[0].flops


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    "function",
    [
        lambda x, w, b: x @ w.detach(),
        lambda x, w, b: x @ w.data,
        lambda x, w, b: x @ w.mT.data.mT,
        lambda x, w, b: F.linear(x, w.data[:, :16].t()),
        lambda x, w, b: x @ torch.ops.aten.detach(w),
        lambda x, w, b: x @ torch.ops.aten.detach.default(w),
    ],
)
def test_a_view_that_no_gradients_go_through_is_no_weight(function: Callable[..., Any], training: bool) -> None:
    with torch.set_grad_enabled(training):
        (found,) = found_in(OneWeight(function, 32, 48), X)
    assert found.sites == () and "which no gradients go through" in found.skipped[0].reason


RESHAPED: dict[str, Callable[..., Any]] = {
    "x": lambda z, w, b: (torch.einsum("bsk,kn->bsn", z, w), z.squeeze_(0)),
    "x, through another name": lambda z, w, b: (torch.inner(z, w.t()), z.cos_().squeeze_(0)),
    "x, by a function": lambda z, w, b: (z @ w, torch.ops.aten.unsqueeze_(z, 0)),
    "x, in a checkpoint": lambda z, w, b: (checkpoint(lambda z: z @ w, z, use_reentrant=False), z.squeeze_(0)),
    "bias": lambda z, w, b: (c := b.sin(), F.linear(z, w.t(), c), c.unsqueeze_(0)),
    "addend": lambda z, w, b: (c := z[0, :, :1].sin(), torch.addmm(c, z[0], w), c.t_()),
    "result": lambda z, w, b: torch.einsum("bsk,kn->nbs", z, w).transpose_(0, 1),
    "result, through another name": lambda z, w, b: (z @ w).sin_().squeeze_(0),
}


@pytest.mark.parametrize("form", RESHAPED)
def test_a_matmul_whose_tensors_get_another_shape_in_place_is_no_site(form: str) -> None:
    (found,) = found_in(OneWeight(lambda x, w, b: RESHAPED[form](x[:1].sin(), w, b), 32, 48), X)
    assert found.sites == () and "is changed in place" in found.skipped[0].reason


def test_an_index_that_gets_another_shape_in_place_picks_no_weight() -> None:
    def function(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> Any:
        index = x[0, :, :3].argmax(-1)
        return torch.bmm(x[0, :, None], w[index]), index.unsqueeze_(0)

    (found,) = found_in(OneWeight(function, 3, 32, 48), X)
    assert found.sites == () and "is changed in place" in found.skipped[0].reason


def test_other_changes_in_place_are_in_no_ones_way() -> None:
    (found,) = found_in(OneWeight(lambda x, w, b: (x.sin_() @ w).mul_(2).detach_(), 32, 48), X.clone())
    assert [(site.name, site.reason) for site in found.sites] == [("w", None)]


def test_a_term_of_another_name_or_place_is_not_dropped() -> None:
    (found,) = found_in(OneWeight(lambda x, w, b: torch.ops.aten.addmm(self=b, mat1=x[0], mat2=w), 32, 48), X)
    assert found.sites == () and "`addmm`" in found.skipped[0].reason


PACKETS: dict[str, Callable[..., torch.Tensor]] = {
    "mm": lambda x, w, b: torch.ops.aten.mm(x[0], w),
    "matmul": lambda x, w, b: torch.ops.aten.matmul(x, w),
    "linear": lambda x, w, b: torch.ops.aten.linear(x, torch.ops.aten.t(w), b),
    "addmm": lambda x, w, b: torch.ops.aten.addmm(b, x[0], w),
    "bmm": lambda x, w, b: torch.ops.aten.bmm(x, w.expand(2, 32, 48)),
    "einsum": lambda x, w, b: torch.ops.aten.einsum("bsk,kn->bsn", [x, w]),
    "tensordot": lambda x, w, b: torch.ops.aten.tensordot(x, w, [2], [0]),
    "conv1d": lambda x, w, b: torch.ops.aten.conv1d(x.mT, w.t().unsqueeze(-1), b),
}


@pytest.mark.parametrize("form", PACKETS)
def test_operators_of_aten_without_their_overload_are_known(form: str) -> None:
    (found,) = found_in(OneWeight(PACKETS[form], 32, 48), X)
    assert [(site.name, site.transposed, site.reason) for site in found.sites] == [("w", True, None)]


def test_no_such_tensor_is_in_no_ones_way() -> None:
    (found,) = found_in(OneWeight(lambda x, w, b: torch.mm(x[0], w, out=None), 32, 48), X)
    assert [(site.name, site.reason) for site in found.sites] == [("w", None)]


def test_as_strided_is_a_view_of_a_weight_that_lies_in_memory_as_it_is_indexed() -> None:
    model = OneWeight(lambda x, w, b: x @ w.as_strided((32, 48), (48, 1)), 32, 48)
    assert [site.name for site in found_in(model, X)[0].sites] == ["w"]
    for weight in (torch.randn(48, 32).t(), torch.randn(1 + 32 * 48)[1:].view(32, 48)):
        model.w = nn.Parameter(weight)
        assert found_in(model, X)[0].sites == ()


def test_in_a_product_of_two_parameters_the_right_one_is_the_weight() -> None:
    model = OneWeight(lambda x, w, b: x @ (m.left @ w), 32, 48)
    m = cast(Any, model)
    m.left = nn.Parameter(torch.randn(32, 32))
    (found,) = found_in(model, X)
    assert [(site.name, site.rows, site.reason) for site in found.sites] == [("w", 32, None)]
    assert len(found.matches) == 1
    assert [item.name for item in found.skipped] == ["left"]
    assert found.skipped[0].reason == "used by `matmul`, of which another parameter is taken for the weight"


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, w)
        return x @ w

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x, w = ctx.saved_tensors
        return g @ w.T, x.flatten(0, 1).T @ g.flatten(0, 1)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # Dynamo does it
@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda x, w, b: grad(lambda y: (y @ w).sin().sum())(x), "inside of a transform of torch.func"),
        (lambda x, w, b: vmap(lambda row: x @ row)(w.unflatten(0, (2, 16)).mT), "gives vmap one part of it"),
        (lambda x, w, b: _Product.apply(x, w), "custom autograd.Function"),
    ],
    ids=["grad", "vmap", "autograd.Function"],
)
def test_transforms_and_functions_of_their_own_keep_their_weights(function: Callable[..., Any], reason: str) -> None:
    (found,) = found_in(OneWeight(function, 32, 32), X)
    assert found.sites == ()
    assert reason in found.skipped[0].reason


def test_a_matmul_under_vmap_is_a_site() -> None:
    (found,) = found_in(OneWeight(lambda x, w, b: vmap(lambda row: row @ w)(x), 32, 48), X)
    assert [(site.name, site.reason) for site in found.sites] == [("w", None)]


CONVOLUTIONS: dict[str, tuple[nn.Module, tuple[int, ...], bool]] = {
    "1 x 1": (nn.Conv2d(32, 48, 1), (2, 32, 4, 5), True),
    "1 x 1 with strides": (nn.Conv2d(32, 48, 1, (2, 3)), (2, 32, 4, 5), True),
    "patches": (nn.Conv2d(32, 48, 2, 2), (2, 32, 4, 5), True),
    "long patches": (nn.Conv2d(32, 48, (1, 4), (1, 4)), (2, 32, 4, 9), True),
    "patches in time": (nn.Conv3d(32, 48, (2, 1, 1), (2, 1, 1)), (2, 32, 4, 2, 2), True),
    "one dimension": (nn.Conv1d(32, 48, 3, 3, bias=False), (2, 32, 7), True),
    "no batch": (nn.Conv2d(32, 48, 2, 2), (32, 4, 5), True),
    "windows that overlap": (nn.Conv2d(32, 48, 3), (2, 32, 4, 5), False),
    "gaps between windows": (nn.Conv1d(32, 48, 2, 3), (2, 32, 8), False),
    "gaps inside of windows": (nn.Conv1d(32, 48, 2, 2, dilation=2), (2, 32, 8), False),
    "padding": (nn.Conv1d(32, 48, 2, 2, padding=1), (2, 32, 8), False),
    "groups": (nn.Conv1d(32, 48, 1, groups=2), (2, 32, 8), False),
}


@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_convolutions_that_are_matmuls_are_sites_and_others_are_counted(kind: str) -> None:
    model, shape, is_site = CONVOLUTIONS[kind]
    x = torch.randn(shape)
    if not is_site:
        (found,) = found_in(model, x)
        assert found.sites == () and "convolution" in found.skipped[0].reason
        assert found.skipped[0].flops == 2 * model(x).numel() * model.get_parameter("weight").numel() // 48
        return
    match, (result, x, weight, bias, _) = one_match(model, x)
    parts = match.operands
    torch.testing.assert_close(result, parts.leave(F.linear(parts.enter(x), parts.matrix(weight), bias)))
    assert match.rows == result.numel() // 48


@pytest.mark.parametrize(
    "model, shape",
    [
        (nn.ConvTranspose1d(32, 48, 3, 3), (2, 32, 5)),
        (nn.ConvTranspose2d(32, 48, (2, 4), (2, 4), bias=False), (2, 32, 4, 5)),
        (nn.ConvTranspose3d(32, 48, (1, 2, 3), (1, 2, 3)), (2, 32, 2, 3, 4)),
        (nn.ConvTranspose1d(32, 48, 3, 3), (32, 5)),
    ],
)
def test_a_transposed_convolution_of_patches_is_a_matmul(model: nn.Module, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    match, (result, x, weight, _, _, *terms) = one_match(model, x)
    parts = match.operands
    product = F.linear(parts.enter(x, *terms), parts.matrix(weight))
    torch.testing.assert_close(parts.leave(product, *terms), result)
    assert 2 * match.rows * match.out_features * match.in_features == 2 * x.numel() * weight[0].numel()


def test_other_transposed_convolutions_are_counted_and_called_what_they_are() -> None:
    for size in (3, 1):  # windows that overlap, and gaps between them
        model, x = nn.ConvTranspose2d(32, 48, size, 2), torch.randn(2, 32, 4, 5)
        (found,) = found_in(model, x)
        reason = "a transposed convolution with groups, padding or windows that overlap or leave gaps"
        assert found.sites == () and reason in found.skipped[0].reason
        assert found.skipped[0].flops == 2 * x.numel() * 48 * size**2


def test_a_view_made_without_gradients_is_no_weight_in_training() -> None:
    def function(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            view = w.t()
        return x @ view

    (found,) = found_in(OneWeight(function, 48, 32), X.clone().requires_grad_())
    assert found.sites == () and "made without gradients" in found.skipped[0].reason


def test_values_that_a_cast_changes_are_no_weight() -> None:
    model = OneWeight(lambda x, w, b: x @ w.to(torch.float8_e4m3fn).to(x.dtype), 32, 48)
    assert found_in(model, X)[0].sites == ()


def test_parts_of_a_weight_are_sites_named_as_python_indexes_them() -> None:
    def function(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (F.linear(x, w[:48, :32]) + F.linear(x.sin(), w[48:, :32])) @ w[:48, 32:]

    (found,) = found_in(OneWeight(function, 96, 64), X)
    assert [(site.name, site.transposed, site.reason) for site in found.sites] == [
        ("w[0:48, 0:32]", False, None),
        ("w[48:96, 0:32]", False, None),
        ("w[0:48, 32:64]", True, None),
    ]
    assert {site.parameter for site in found.sites} == {"w"}


def test_a_part_of_each_of_several_matrices_that_fold_to_one_is_a_site() -> None:
    model = OneWeight(lambda x, w, b: torch.einsum("bsk,hnk->bshn", x, w[..., 16:48]), 2, 24, 64)
    (found,) = found_in(model, X)
    assert [(site.name, site.out_features, site.reason) for site in found.sites] == [("w[:, :, 16:48]", 48, None)]


@settings(max_examples=300, deadline=None)
@given(st.data(), st.lists(st.integers(1, 5), min_size=1, max_size=3))
def test_a_region_lies_in_its_box(data: st.DataObject, shape: list[int]) -> None:
    count = math.prod(shape)
    size, stride, last = [], [], data.draw(st.integers(0, count - 1), "offset")
    offset = last
    for _ in range(data.draw(st.integers(1, 3), "dimensions")):
        stride.append(data.draw(st.integers(0, count), "stride"))
        size.append(data.draw(st.integers(1, 1 + (count - 1 - last) // stride[-1] if stride[-1] else 3), "size"))
        last += (size[-1] - 1) * stride[-1]
    elements = torch.arange(count).as_strided(size, stride, offset).flatten().tolist()
    box = Region(tuple(size), tuple(stride), offset).box(shape)
    inside = torch.arange(count).view(shape)[tuple(slice(part.start, part.stop) for part in box)].flatten().tolist()
    assert set(elements) <= set(inside)


def test_what_is_computed_from_a_weight_and_never_used_is_in_no_ones_way() -> None:
    (found,) = found_in(OneWeight(lambda x, w, b: (w.sum(), x @ w)[1], 32, 48), X)
    assert [(site.name, site.reason) for site in found.sites] == [("w", None)]


@pytest.mark.parametrize(
    "function",
    [
        lambda x, w, b: x @ w + w.new_zeros(48),
        lambda x, w, b: x @ w + torch.zeros_like(w)[0],
        lambda x, w, b: x.type_as(w) @ w,
        lambda x, w, b: x.to(w) @ w,
        lambda x, w, b: x @ w + b.expand(32, 48).reshape_as(w)[0],
        lambda x, w, b: x @ w + x.new_zeros(32, 48).view_as(w.T.mT)[0],
    ],
)
def test_a_use_that_reads_no_numbers_is_in_no_ones_way(function: Callable[..., Any]) -> None:
    (found,) = found_in(OneWeight(function, 32, 48), X)
    assert [(site.name, site.reason, site.other_flops) for site in found.sites] == [("w", None, 0)]


def test_of_weights_that_are_computed_with_together_each_has_the_reason() -> None:
    model = OneWeight(lambda x, w, b: x @ torch.stack([w, cast(Any, model).v]), 32, 48)
    model.v = nn.Parameter(torch.randn(32, 48))
    (found,) = found_in(model, X)
    assert len(found.skipped) == 2
    assert all("the weight of a matmul is computed from that" in item.reason for item in found.skipped)


def test_a_weight_that_its_own_product_is_added_to_is_no_site() -> None:
    (found,) = found_in(OneWeight(lambda x, w, b: torch.addmm(w, x[0].t() @ x[0], w), 32, 32), X)
    assert found.sites == () and "which adds it to a product" in found.skipped[0].reason


def test_a_weight_times_itself_is_no_site() -> None:
    (found,) = found_in(OneWeight(lambda x, w, b: x @ torch.matmul(w, w.T), 32, 48), X)
    assert found.sites == ()


def test_one_weight_used_twice_is_one_site_with_the_rows_of_both() -> None:
    (found,) = found_in(OneWeight(lambda x, w, b: x @ w + torch.relu(x[:, :1]) @ w, 32, 48), X)
    (site,) = found.sites
    assert (site.uses, site.rows, site.rows_expr, len(found.matches)) == (2, 12, "12", 2)


def test_a_tied_head_is_a_site_and_its_lookup_is_not() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.emb = nn.Embedding(64, 32)
            self.pos = nn.Embedding(8, 32)
            self.head = nn.Linear(32, 64, bias=False)
            self.head.weight = self.emb.weight

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.head(self.emb(ids) + self.pos(ids % 8))

    (found,) = found_in(Tied(), torch.arange(6))
    assert [(site.name, site.shared, site.reason) for site in found.sites] == [("emb.weight", True, None)]
    assert found.sites[0].aliases == ("head.weight",)
    assert [(item.name, item.lookup) for item in found.skipped] == [("pos.weight", True)]


def test_dynamic_rows_are_an_expression_with_a_hint() -> None:
    (found,) = found_in(nn.Linear(32, 48), X, dynamic=True)
    (site,) = found.sites
    assert site.rows == 10
    expression = sympy.sympify(site.rows_expr)
    assert len(expression.free_symbols) == 2 and not expression.atoms(sympy.Number)


def test_autocast_decides_the_dtype() -> None:
    linear = nn.Linear(32, 48)

    def under_autocast(x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return linear(x)

    assert found_in(under_autocast, X)[0].sites[0].dtype == "bfloat16"


def test_sites_inside_activation_checkpoints() -> None:
    inner = nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 32))

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = inner
            self.w = nn.Parameter(torch.randn(32, 48))

        def block(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x) + (x @ self.w) @ self.w.new_ones(48, 32)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return checkpoint(self.block, x, use_reentrant=False)

    (found,) = found_in(Model(), X)
    assert {site.name for site in found.sites} >= {"inner.0.weight", "inner.2.weight"}
    for match in found.matches:
        assert match.weight.graph is match.node.graph is match.module.graph


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_what_no_weight_may_be() -> None:
    assert ineligible(torch.zeros(4, 4)) is None
    assert ineligible(nn.Parameter(torch.zeros(4, 4, dtype=torch.bfloat16))) is None
    assert "complex" in str(ineligible(torch.zeros(4, 4, dtype=torch.complex64)))
    assert "int8" in str(ineligible(torch.zeros(4, 4, dtype=torch.int8)))
    assert "float8" in str(ineligible(torch.zeros(4, 4, dtype=torch.float8_e4m3fn)))
    assert "empty" in str(ineligible(torch.zeros(0, 4)))
    assert "quantised" in str(ineligible(torch.quantize_per_tensor(torch.zeros(4, 4), 1.0, 0, torch.qint8)))

    class Subclass(torch.Tensor):
        pass

    assert "subclass" in str(ineligible(torch.zeros(4, 4).as_subclass(Subclass)))


@pytest.mark.parametrize("weight", [torch.zeros(32, 48, dtype=torch.complex64), torch.zeros(32, 0)])
def test_a_model_with_an_ineligible_weight_says_so(weight: torch.Tensor) -> None:
    model = OneWeight(lambda x, w, b: x.to(w.dtype) @ w, 1, 1)
    model.w = nn.Parameter(weight)
    (found,) = found_in(model, X)
    assert found.matches == ()
    assert found.sites[0].reason is not None


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("L['self']._modules['h']._modules['0']._modules['attn']._parameters['weight']", "h.0.attn.weight"),
        ("L['self'].lin.weight", "lin.weight"),
        ("L['self'].layers[3].weight", "layers.3.weight"),
        ("L['self']._modules['_orig_mod']._modules['lin']._parameters['weight']", "lin.weight"),
        ("G['model']._modules['lin'].weight", "lin.weight"),
        ("L['fn'].__closure__[0].cell_contents._modules['lin']._parameters['weight']", "lin.weight"),
        ("L['w']", "w"),
    ],
)
def test_names_from_sources(source: str, name: str) -> None:
    assert qualified_name(source)[1] == name


def test_two_roots_keep_their_names_apart() -> None:
    def both(a: nn.Module, b: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return a(x) + b(x)

    (found,) = found_in(both, nn.Linear(32, 48), nn.Linear(32, 48), X)
    assert [site.name for site in found.sites] == ["a.weight", "b.weight"]


G = nn.Linear(32, 48)


def test_weights_of_one_name_and_one_root_are_told_apart_by_all_of_the_way_to_them() -> None:
    a, b, c = nn.Linear(32, 48), nn.Linear(32, 48), nn.Linear(32, 48)

    def two(x: torch.Tensor) -> torch.Tensor:
        return a(x) + b(x)

    def run(fn: Callable[..., torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        return fn(x)

    (found,) = found_in(run, two, X)
    assert [site.name for site in found.sites] == ["L.fn.__closure__.0.weight", "L.fn.__closure__.1.weight"]
    (found,) = found_in(run, lambda x: two(x) + c(x), X)
    assert len({site.name for site in found.sites}) == len(found.sites) == 3

    def teacher(x: torch.Tensor) -> torch.Tensor:
        return G(x)

    def step(G: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return G(x) - teacher(x)

    (found,) = found_in(step, a, X)
    assert [site.name for site in found.sites] == ["L.G.weight", "G.G.weight"]


# ---- roles ----


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(32), nn.LayerNorm(32)
        self.q, self.k, self.v, self.o = (nn.Linear(32, 32) for _ in range(4))
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm1(x)
        q, k, v = (f(y).unflatten(-1, (2, 16)).transpose(1, 2) for f in (self.q, self.k, self.v))
        x = x + self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Transformer(nn.Module):
    def __init__(self, layers: int = 3) -> None:
        super().__init__()
        self.emb = nn.Embedding(40, 32)
        self.layers = nn.ModuleList(Block() for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(32), nn.Linear(32, 40)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.emb(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


def test_repeated_layers_share_roles_also_the_first_and_the_last() -> None:
    (found,) = found_in(Transformer(), torch.arange(10).view(2, 5))
    members: dict[str, list[str]] = {}
    for site in found.sites:
        members.setdefault(site.role, []).append(site.name)
    assert sorted(len(names) for names in members.values()) == [1, 3, 3, 3, 3, 3, 3]


def test_structure_tells_apart_what_names_do_not() -> None:
    model = nn.Sequential(nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32))
    (found,) = found_in(model, X)
    assert len({site.role for site in found.sites}) == 3


# ---- real models ----


def gpt2() -> tuple[nn.Module, dict[str, Any], set[str]]:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_layer=2, n_embd=32, n_head=2, vocab_size=60, n_positions=16, bos_token_id=0, eos_token_id=0)
    names = {f"transformer.h.*.{part}.weight" for part in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")}
    return GPT2LMHeadModel(config), {"input_ids": torch.arange(8)[None]}, names | {"transformer.wte.weight"}


def bert() -> tuple[nn.Module, dict[str, Any], set[str]]:
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=60)
    parts = ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense")
    names = {f"bert.encoder.layer.*.{part}.weight" for part in (*parts, "intermediate.dense", "output.dense")}
    head = {"cls.predictions.transform.dense.weight", "bert.embeddings.word_embeddings.weight"}
    return BertForMaskedLM(config), {"input_ids": torch.arange(8)[None]}, names | head


def llama() -> tuple[nn.Module, dict[str, Any], set[str]]:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=60
    )
    parts = [*(f"self_attn.{p}_proj" for p in "qkvo"), *(f"mlp.{p}_proj" for p in ("gate", "up", "down"))]
    names = {f"model.layers.*.{part}.weight" for part in parts} | {"lm_head.weight"}
    return LlamaForCausalLM(config), {"input_ids": torch.arange(8)[None]}, names


def vit() -> tuple[nn.Module, dict[str, Any], set[str]]:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        image_size=16,
        patch_size=8,
        num_labels=10,  # type: ignore[call-arg]
    )
    return ViTForImageClassification(config), {"pixel_values": torch.randn(1, 3, 16, 16)}, set()


def t5() -> tuple[nn.Module, dict[str, Any], set[str]]:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(d_model=32, d_ff=64, d_kv=16, num_layers=2, num_heads=2, vocab_size=60)
    config.decoder_start_token_id = 0
    ids = torch.arange(8)[None]
    return T5ForConditionalGeneration(config), {"input_ids": ids, "labels": ids}, set()


t5_is_one_graph = pytest.mark.skipif(torch.__version__ < "2.12", reason="Dynamo of 2.11 breaks the graph of T5")


@pytest.mark.parametrize(
    ("build", "sites"), [(gpt2, 9), (bert, 14), (llama, 15), (vit, 14), pytest.param(t5, 33, marks=t5_is_one_graph)]
)
def test_real_models(build: Callable[[], tuple[nn.Module, dict[str, Any], set[str]]], sites: int) -> None:
    model, kwargs, names = build()
    (found,) = found_in(model.eval(), **kwargs)
    assert len(found.sites) == sites
    assert all(site.reason is None for site in found.sites)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    assert all(tuple(parameters[site.name].shape) == site.weight_shape for site in found.sites)
    folded = {site.role.partition("#")[0] for site in found.sites}
    assert not names or folded == names
    assert len({site.role for site in found.sites}) <= 2 * len(folded)


# ---- weights of several matrices, and computed weights ----


class Experts(nn.Module):
    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(*shape))

    def forward(self, x: torch.Tensor, index: torch.Tensor | None = None) -> torch.Tensor:
        if index is None:
            return torch.bmm(x, self.w)
        return F.linear(x, self.w[index])


def test_a_weight_of_several_matrices_is_one_site() -> None:
    (found,) = found_in(Experts(3, 32, 48), torch.randn(3, 5, 32))
    (site,), (match,) = found.sites, found.matches
    assert (site.name, site.matrices, site.out_features, site.in_features, site.rows) == ("w", 3, 48, 32, 15)
    assert site.transposed and site.region is None and match.matrices == 3


def test_an_index_from_data_picks_from_all_matrices_and_a_constant_a_part() -> None:
    (found,) = found_in(Experts(3, 48, 32), torch.randn(5, 32), torch.tensor(1))
    (site,), (match,) = found.sites, found.matches
    assert (site.name, site.matrices, site.rows, site.transposed) == ("w", 3, 5, False)
    ends = match.operands.ends
    assert ends is not None
    assert ends(torch.randn(5, 32), torch.tensor(1)).tolist() == [0, 5, 5]
    (constant,) = found_in(Experts(3, 48, 32), torch.randn(5, 32), 1)
    assert [site.name for site in constant.sites] == ["w[1]"]


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("picks", [1, 4])
def test_matrices_that_an_index_picks_are_not_joined(rows: int, picks: int) -> None:
    model = OneWeight(lambda x, w, b: x[:rows] @ w[x[:picks, 0, :3].argmax(-1)], 3, 32, 48)
    for x in (torch.randn(4, 5, 32)[:rows].expand(max(rows, picks), -1, -1), torch.randn(4, 5, 32)):
        if picks in (1, len(x[:rows])) or rows == 1:
            (found,) = found_in(model, x)
            assert [(site.matrices, site.out_features, site.reason) for site in found.sites] == [(3, 48, None)]


LISTS: dict[str, tuple[Callable[..., torch.Tensor], tuple[int, ...]]] = {
    "out": (lambda x, w: torch.einsum("bsk,ekn->besn", x, w), (3, 32, 48)),
    "tensordot": (lambda x, w: torch.tensordot(x, w, ([2], [1])), (3, 32, 48)),
    "inner": (lambda x, w: torch.inner(x, w), (3, 48, 32)),
    "contracted": (lambda x, w: torch.einsum("bek,ekn->bn", x[:, : len(w)], w), (3, 32, 48)),
    "addbmm": (lambda x, w: torch.addbmm(x.new_ones(48), x[:1].expand(len(w), -1, -1), w), (3, 32, 48)),
    "channels": (lambda x, w: F.conv1d(x.mT, w, stride=2).sum(1), (3, 32, 2)),
    "turned": (lambda x, w: x[..., : len(w)] @ w.transpose(0, 1), (3, 2, 48)),
    "some": (lambda x, w: x[:1] @ w[:2], (3, 32, 48)),
    "one of them": (lambda x, w: x @ w[-1], (3, 32, 48)),
    "in another order": (
        lambda x, w: x[:1] @ w.unflatten(0, (2, -1)).transpose(0, 1).flatten(0, 1) if len(w) > 1 else x @ w,
        (3, 32, 48),
    ),
}


@pytest.mark.parametrize("form", LISTS)
def test_a_list_of_picked_matrices_is_one_matrix_only_if_it_has_one(form: str) -> None:
    function, shape = LISTS[form]
    for picks in (1, 4):
        model = OneWeight(lambda x, w, b, n=picks: function(x, w[x.flatten(0, 1)[:n, :3].argmax(-1)]), *shape)
        (found,) = found_in(model, X)
        if picks > 1 or form == "turned":
            assert not found.matches
            assert all("not by a matmul" not in item.reason for item in found.skipped)
        else:
            assert [(site.matrices, site.reason) for site in found.sites] == [(3, None)]


def test_several_matrices_for_each_row_are_dense_with_the_reason_and_their_flops_count() -> None:
    class TopK(Experts):
        def forward(self, x: torch.Tensor, index: torch.Tensor | None = None) -> torch.Tensor:
            return torch.einsum("bk,bekn->ben", x, self.w[index])

    (found,) = found_in(TopK(3, 32, 48), torch.randn(5, 32), torch.tensor([[0, 1], [1, 2], [2, 0], [0, 2], [1, 0]]))
    assert not found.sites
    assert [(item.name, item.flops) for item in found.skipped] == [("w", 2 * 5 * 2 * 32 * 48)]
    assert "an index that pixelfly does not follow" in found.skipped[0].reason


@pytest.mark.parametrize(
    "wrap", [nn.utils.parametrizations.weight_norm, nn.utils.weight_norm, nn.utils.parametrizations.spectral_norm]
)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_computed_weights_are_dense_with_a_reason_and_their_flops_count(wrap: Any) -> None:
    (found,) = found_in(wrap(nn.Linear(64, 96)), torch.randn(4, 64))
    assert not found.sites
    assert any("the weight of a matmul is computed from that" in item.reason for item in found.skipped)
    assert sum(item.flops for item in found.skipped) >= 2 * 4 * 64 * 96
