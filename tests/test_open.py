"""Composites are opened: attention and encoder layers become graphs with sites, and compute what they did."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from pixelfly_compiler.backend import own_copy
from pixelfly_compiler.passes.find import find_sites
from pixelfly_compiler.passes.open import open_composites
from pixelfly_compiler.passes.sites import Found

X, MEMORY = torch.randn(2, 5, 32), torch.randn(2, 7, 32)
MASK = torch.zeros(2, 7, dtype=torch.bool).index_fill(1, torch.tensor([6]), True)


def opened(model: nn.Module, *args: Any, dynamic: bool = False, **kwargs: Any) -> tuple[Found, Any]:
    """What is found in the opened graph, and what it returns."""
    found: list[Found] = []

    def backend(gm: GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        own = open_composites(own_copy(gm))
        own.graph.lint()
        found.append(find_sites(own, inputs))
        return own.forward

    torch._dynamo.reset()
    result = torch.compile(model, backend=backend, fullgraph=True, dynamic=dynamic)(*args, **kwargs)
    return found[0], result


class Attention(nn.Module):
    """Self-attention, or attention to a memory."""

    def __init__(self, weights: bool = False, **kwargs: Any) -> None:
        super().__init__()
        self.attention, self.weights = nn.MultiheadAttention(32, 2, batch_first=True, **kwargs), weights

    def forward(self, x: Tensor, memory: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        return self.attention(x, memory, memory, key_padding_mask=mask, need_weights=self.weights)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_self_attention_has_one_packed_site(training: bool, dynamic: bool) -> None:
    model = Attention().train(training)
    with torch.set_grad_enabled(training):
        found, result = opened(model, X, X, dynamic=dynamic)
        torch.testing.assert_close(result[0], model(X, X)[0])
    assert [site.name for site in found.sites] == ["attention.in_proj_weight", "attention.out_proj.weight"]
    assert all(site.reason is None and site.rows == 10 for site in found.sites)


def test_attention_to_a_memory_has_the_parts_of_the_packed_weight() -> None:
    model = Attention(weights=True)
    found, result = opened(model, X, MEMORY, MASK)
    for ours, theirs in zip(result, model(X, MEMORY, MASK), strict=True):
        torch.testing.assert_close(ours, theirs)
    sites = {site.name: (site.out_features, site.rows, site.reason) for site in found.sites}
    assert sites["attention.in_proj_weight[0:32]"] == (32, 10, None)
    assert sites["attention.in_proj_weight[32:96]"] == (64, 14, None)


def test_weights_of_their_own_for_query_key_and_value() -> None:
    model = Attention(kdim=48, vdim=48)
    memory = torch.randn(2, 7, 48)
    found, result = opened(model, X, memory)
    torch.testing.assert_close(result[0], model(X, memory)[0])
    assert sorted(site.in_features for site in found.sites) == [32, 32, 48, 48]


@pytest.mark.parametrize("dynamic", [False, True])
def test_keys_and_values_of_zeros_and_of_parameters(dynamic: bool) -> None:
    """The zeros are made while the attention is opened."""
    model = Attention(add_bias_kv=True, add_zero_attn=True)
    found, result = opened(model, X, MEMORY, dynamic=dynamic)
    torch.testing.assert_close(result[0], model(X, MEMORY)[0])
    assert all(site.reason is None for site in found.sites) and len(found.sites) == 3


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_an_encoder_layer_has_the_same_sites_in_evaluation_and_in_training(norm_first: bool, activation: str) -> None:
    model = nn.TransformerEncoderLayer(32, 2, 64, 0.0, activation, batch_first=True, norm_first=norm_first)
    names = []
    for training in (True, False):
        model.train(training)
        with torch.set_grad_enabled(training):
            found, result = opened(model, X)
            torch.testing.assert_close(result, model(X), rtol=1e-4, atol=1e-5)
        names.append([(site.name, site.transposed, site.rows, site.reason) for site in found.sites])
    assert sorted(names[0]) == sorted(names[1]) and len(names[0]) == 4


@pytest.mark.parametrize("padding", [False, True])
def test_masks_of_an_encoder_layer(padding: bool) -> None:
    model = nn.TransformerEncoderLayer(32, 2, 64, batch_first=True).eval()
    causal = nn.Transformer.generate_square_subsequent_mask(7)
    mask = {"src_key_padding_mask": MASK} if padding else {"src_mask": causal}
    with torch.no_grad():
        found, result = opened(model, MEMORY, **mask)
        torch.testing.assert_close(result, model(MEMORY, **mask), rtol=1e-4, atol=1e-5)
    assert len(found.sites) == 4


@pytest.mark.parametrize(("kind", "shape"), [(0, (5, 5)), (1, (2, 5)), (2, (2, 2, 5, 5)), (None, None)])
def test_every_kind_of_mask_of_native_attention(kind: int | None, shape: tuple[int, ...] | None) -> None:
    mask = None if shape is None else (torch.rand(shape) > 0.5).index_fill(-1, torch.tensor([0]), False)

    class Native(Attention):
        def forward(self, x: Tensor, memory: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
            inner, out = self.attention, self.attention.out_proj
            weights = (inner.in_proj_weight, inner.in_proj_bias, out.weight, out.bias)
            return torch._native_multi_head_attention(x, x, x, 32, 2, *weights, mask, False, True, kind)

    model = Native()
    with torch.no_grad():
        found, result = opened(model, X, X, mask)
        torch.testing.assert_close(result[0], model(X, X, mask)[0])
    assert len(found.sites) == 2


def test_under_autocast_the_sites_have_its_type() -> None:
    class Autocast(Attention):
        def forward(self, x: Tensor, memory: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
            with torch.autocast("cpu", torch.bfloat16):
                return super().forward(x, memory, mask)

    model = Autocast()
    found, result = opened(model, X, X)
    assert {site.dtype for site in found.sites} == {"bfloat16"}
    torch.testing.assert_close(result[0], model(X, X)[0], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("cell", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
def test_the_cells_of_recurrent_networks_have_two_sites(cell: Any, bias: bool) -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = cell(32, 48, bias)

        def forward(self, x: Tensor) -> Any:
            state = None
            for step in x.unbind(1):
                state = self.cell(step, state)
            return state

    model = Recurrent()
    found, result = opened(model, X)
    torch.testing.assert_close(result, model(X))
    sites = {site.name: (site.out_features, site.in_features, site.rows, site.reason) for site in found.sites}
    gates = model.cell.weight_ih.shape[0]
    assert sites == {"cell.weight_ih": (gates, 32, 10, None), "cell.weight_hh": (gates, 48, 10, None)}


FACTORS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "letters": lambda x, a, b: torch.einsum("ni,ij,jk->nk", x, a, b),
    "sublists": lambda x, a, b: torch.einsum(x, [0, 1], a, [1, 2], b, [2, 3], [0, 3]),
    "multi_dot": lambda x, a, b: torch.linalg.multi_dot([x, a, b]),
}


class Factors(nn.Module):
    def __init__(self, form: str) -> None:
        super().__init__()
        self.a, self.b = (nn.Parameter(torch.randn(size) / 8) for size in ((32, 64), (64, 128)))
        self.form = FACTORS[form]

    def forward(self, x: Tensor) -> Tensor:
        return self.form(x.flatten(0, 1), self.a, self.b)


@pytest.mark.parametrize("form", FACTORS)
def test_products_of_three_factors_have_two_sites(form: str) -> None:
    model = Factors(form)
    found, result = opened(model, X)
    torch.testing.assert_close(result, model(X))
    assert [(site.name, site.rows, site.reason) for site in found.sites] == [("a", 10, None), ("b", 10, None)]


def test_a_product_whose_factor_gets_another_shape_in_place_stays_whole() -> None:
    class Turned(Factors):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
            x = x[0].sin()
            return self.form(x, self.a, self.b), x.unsqueeze_(1)

    for form in FACTORS:
        model = Turned(form)
        found, result = opened(model, X)
        torch.testing.assert_close(result, model(X))
        assert found.sites == ()


def test_a_weight_that_is_two_of_three_factors() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Parameter(torch.randn(32, 32) / 8)

        def forward(self, x: Tensor) -> Tensor:
            return torch.einsum("...i,ij,jk->...k", x, self.a, self.a)

    model = Twice()
    found, result = opened(model, X)
    torch.testing.assert_close(result, model(X))
    assert [(site.name, site.rows, site.reason) for site in found.sites] == [("a", 20, None)]


@pytest.mark.parametrize("kind", ["LSTMCell", "GRUCell", "letters", "sublists"])
def test_what_is_opened_under_autocast(kind: str) -> None:
    """The input is of autocast's type already, so that it does not tell."""

    class Autocast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(32, 32)
            self.inner = getattr(nn, kind)(32, 48) if kind.endswith("Cell") else Factors(kind)

        def forward(self, x: Tensor) -> Any:
            with torch.autocast("cpu", torch.bfloat16):
                return self.inner(self.first(x))

    model, x = Autocast(), X.flatten(0, 1) if kind.endswith("Cell") else X
    found, result = opened(model, x)
    torch.testing.assert_close(result, model(x), rtol=2e-2, atol=2e-2)
    assert {site.dtype for site in found.sites if site.reason is None} == {"bfloat16"} and len(found.sites) == 3


def test_what_autocast_surrounds_where_no_type_tells() -> None:
    """Inputs, states and results are float32; only what the first cell does inside is not."""

    class Cells(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.low, self.full = nn.LSTMCell(32, 32), nn.LSTMCell(32, 32)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            with torch.autocast("cpu", torch.bfloat16):
                state = self.low(x, (x, x))
            return self.full(x, state)

    model, x = Cells(), X.flatten(0, 1)
    found, result = opened(model, x)
    torch.testing.assert_close(result, model(x), rtol=1e-5, atol=1e-5)
    assert {(site.name.partition(".")[0], site.dtype) for site in found.sites} == {
        ("low", "bfloat16"),
        ("full", "float32"),
    }


def test_a_product_of_two_stays_whole() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(32, 48))

        def forward(self, x: Tensor) -> Tensor:
            return torch.einsum("bsi,io->bso", x, self.w)

    found, _ = opened(Two(), X)
    assert [site.nodes for site in found.sites] == [("einsum",)]
