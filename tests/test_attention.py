"""Attention: the operator against PyTorch's own and float64, its kernels, and which calls the pass replaces."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from numerics import assert_as_good_as, to_double
from torch import Tensor, nn
from torch._functorch import config as functorch_config
from torch._inductor import config as inductor_config
from torch._inductor.utils import run_and_get_code
from torch.nn.attention import SDPBackend, sdpa_kernel

import pixelfly_compiler.kernels.attention
from pixelfly_compiler.kernels import lowering
from pixelfly_compiler.passes.attention import replace_attention

BATCH, HEADS = 2, 3


def operands(queries: int, keys: int, features: int, dtype: torch.dtype) -> list[Tensor]:
    """q, k and v as a model has them: heads next to features in memory."""
    sizes = (queries, keys, keys)
    return [torch.randn(BATCH, size, HEADS, features).to(dtype).transpose(1, 2) for size in sizes]


def masks(queries: int, keys: int) -> list[Tensor | None]:
    some = torch.rand(BATCH, 1, queries, keys) > 0.3
    some[0, 0, 5] = False  # a query that sees nothing
    return [None, some, torch.randn(1, HEADS, 1, keys)]


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
    return torch.ops.pixelfly.attention(q, k, v, mask, causal, 0.2)[0]


def of_torch(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
    mask = mask if mask is None or mask.dtype == torch.bool else mask.to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=0.2)


def with_gradients(function: Callable[..., Tensor], args: list[Tensor], g: Tensor) -> tuple[Tensor, ...]:
    leaves = [arg.detach().requires_grad_() for arg in args]
    y = function(*leaves)
    return y.detach(), *torch.autograd.grad(y, leaves, g.to(y.dtype))


def test_opcheck_and_gradcheck() -> None:
    args = [arg.double().requires_grad_() for arg in operands(5, 7, 16, torch.float32)]
    for mask, causal in ((None, True), (torch.rand(1, 1, 5, 7) > 0.3, False)):
        torch.library.opcheck(torch.ops.pixelfly.attention.default, (*args, mask, causal, 0.2))
        assert torch.autograd.gradcheck(lambda *a, m=mask, c=causal: attention(*a, m, c), args, fast_mode=True)


def test_the_reference_spreads_a_row_that_a_mask_all_but_hides() -> None:
    args, mask = operands(5, 7, 16, torch.float32), torch.zeros(5, 7).index_fill(0, torch.tensor(2), -1e9)
    ours = with_gradients(lambda *a: attention(*a, mask), args, torch.ones(()).expand_as(args[0]))
    with sdpa_kernel(SDPBackend.MATH):  # the others of PyTorch lose the logarithm of 7 beside 1e9
        theirs = with_gradients(lambda *a: of_torch(*a, mask), args, torch.ones(()).expand_as(args[0]))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("queries", "keys", "features"), [(70, 171, 32), (130, 67, 80)])
def test_the_kernels(dtype: torch.dtype, queries: int, keys: int, features: int) -> None:
    args, (g, *_) = operands(queries, keys, features, dtype), operands(queries, keys, features, dtype)
    variants = [*((mask, False) for mask in masks(queries, keys)), (None, True)]

    def every(of: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *a: torch.cat([of(*a, mask, causal) for mask, causal in variants])

    gs = torch.cat([g] * len(variants))
    lowering.register()
    with inductor_config.patch(fx_graph_cache=False), functorch_config.patch(enable_autograd_cache=False):
        compiled = torch.compile(every(attention), fullgraph=True, dynamic=False)
        ours, code = run_and_get_code(with_gradients, compiled, args, gs)
    emulated = dtype == torch.bfloat16 and not torch.cpu._is_avx512_bf16_supported()  # there the references run
    assert ("torch.ops.pixelfly" in "\n".join(code)) == emulated
    plain = with_gradients(every(of_torch), args, gs)
    exact = with_gradients(every(of_torch), [to_double(arg) for arg in args], gs)
    for one, eager, truth in zip(ours, plain, exact, strict=True):
        assert_as_good_as(one, eager, truth)


def test_a_nan_reaches_what_depends_on_it() -> None:
    q, k, v = operands(66, 66, 16, torch.float32)
    q[0, 0, 3, 0] = torch.nan
    lowering.register()
    y = torch.compile(attention)(q, k, v, None, True)
    assert y[0, 0, 3].isnan().all()
    assert not y[0, 0, :3].isnan().any() and not y[1].isnan().any()


# ---- the pass ----


class Asks(nn.Module):
    def __init__(self, **kwargs: Any) -> None:
        super().__init__()
        self.kwargs = kwargs
        self.learned = nn.Parameter(torch.zeros(32, 32))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = {"attn_mask": self.learned} if self.kwargs.get("learned") else {}
        given = {key: value for key, value in self.kwargs.items() if key != "learned"}
        return F.scaled_dot_product_attention(q, k, v, **given, **mask)


def replaced(model: nn.Module, *args: Tensor) -> int:
    counts = []

    def backend(gm: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        counts.append(replace_attention(gm))
        gm.graph.lint()
        return gm.forward

    torch._dynamo.reset()
    result = torch.compile(model, backend=backend)(*args)
    torch.testing.assert_close(result, model(*args))
    return sum(counts)


@pytest.fixture
def slow_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a CPU where PyTorch's attention is slow."""
    monkeypatch.setattr(pixelfly_compiler.kernels.attention, "is_faster_here", lambda backward: True)


@pytest.mark.usefixtures("slow_library")
@pytest.mark.parametrize(
    ("kwargs", "count"),
    [
        ({}, 1),
        ({"is_causal": True}, 1),
        ({"scale": 0.3}, 1),
        ({"scale": 0.0}, 1),
        ({"attn_mask": torch.ones(32, 32, dtype=torch.bool).tril()}, 1),
        ({"attn_mask": torch.randn(2, 1, 1, 32)}, 1),
        ({"learned": True}, 0),
    ],
)
def test_what_is_replaced(kwargs: dict[str, Any], count: int) -> None:
    q = torch.randn(2, 4, 32, 16)
    assert replaced(Asks(**kwargs), q, q + 1, q - 1) == count


@pytest.mark.usefixtures("slow_library")
def test_what_the_kernel_does_not_do_stays() -> None:
    q = torch.randn(2, 4, 32, 16)
    few, grouped, odd = q[:, :, :4], q[:, :2], torch.randn(2, 4, 32, 20)
    assert replaced(Asks(), few, q, q) == 0
    assert replaced(Asks(enable_gqa=True), q, grouped, grouped) == 0
    assert replaced(Asks(), odd, odd, odd) == 0
    assert replaced(Asks(), q.double(), q.double(), q.double()) == 0
    assert replaced(Asks(dropout_p=1e-12), q, q, q) == 0
    assert replaced(Asks(), q[0], q[0], q[0]) == 0


@pytest.mark.usefixtures("slow_library")
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_under_transforms_of_torch_func_it_stays() -> None:
    class Transformed(nn.Module):
        def forward(self, q: Tensor, several: Tensor) -> Tensor:
            gradient = torch.func.grad(lambda x: F.scaled_dot_product_attention(x, q, q).sum())(q)
            return gradient + torch.vmap(lambda x: F.scaled_dot_product_attention(x, q, q))(several).sum(0)

    q = torch.randn(2, 4, 32, 16)
    assert replaced(Transformed(), q, torch.stack([q, -q])) == 0


def test_elsewhere_nothing_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pixelfly_compiler.kernels.attention, "is_faster_here", lambda backward: False)
    q = torch.randn(2, 4, 32, 16)
    assert replaced(Asks(), q, q, q) == 0
