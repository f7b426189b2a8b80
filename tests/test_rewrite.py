"""The rewrite: each form of matmul becomes the operator, means P(W), and nothing else of the graph changes."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_sites import SCALED
from torch import Tensor, nn
from torch._functorch._aot_autograd.autograd_cache import check_node_safe
from torch.fx import GraphModule
from torch.utils.checkpoint import checkpoint

from pixelfly_compiler.backend import own_copy, weight_positions
from pixelfly_compiler.compact import CompactInputs, CompactWeights
from pixelfly_compiler.decision import Entry
from pixelfly_compiler.passes.find import find_sites
from pixelfly_compiler.passes.rewrite import Rewritten, rewrite
from pixelfly_compiler.passes.sites import Found, SiteConfig
from pixelfly_compiler.passes.weights import parameter_names
from pixelfly_compiler.plan import project

CONFIG = SiteConfig(block=16, strides=0, rank=16)
X = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))


class OneWeight(nn.Module):
    """A weight and a function of it and the input."""

    def __init__(self, function: Callable[..., Tensor], *shape: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(*shape))
        self.bias = nn.Parameter(torch.randn(48))
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.w, self.bias)


@dataclass
class Result:
    """What came of one call: the graph before and after, and the output."""

    before: GraphModule
    after: GraphModule
    found: Found
    rewritten: Rewritten
    inputs: list[Any]
    y: Tensor

    def count(self, name: str = "pixelfly") -> int:
        """Calls of our operator, also in the bodies of checkpoints; or of nodes with another name."""
        modules = [module for module in self.after.modules() if isinstance(module, GraphModule)]
        nodes = [node for module in modules for node in module.graph.nodes if node.op != "placeholder"]
        return sum(name in (getattr(node.target, "namespace", ""), node.name) for node in nodes)


def rewritten(model: nn.Module, *args: Any, config: SiteConfig | None = CONFIG, **kwargs: Any) -> Result:
    """Run the rewritten graph in eager mode, with the operators' references."""
    results: list[Result] = []

    def backend(gm: GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        after = own_copy(gm)
        names = parameter_names(after, inputs)
        found = find_sites(after, inputs, names)
        configs = {} if config is None else {s.name: config for s in found.sites if s.reason is None}
        outcome = rewrite(after, found.matches, configs, weight_positions(after, names))
        compact = CompactInputs(outcome.added, CompactWeights(), "fixed")

        def run(*given: Any) -> Any:
            new = [*(given[position] for position in outcome.kept), *compact(given)]
            y = after(*new)
            results.append(Result(gm, after, found, outcome, new, y[0]))
            return y

        return run

    torch._dynamo.reset()
    torch.compile(model, backend=backend, fullgraph=True, **kwargs)(*args)
    return results[-1]


def expected(model: OneWeight, transposed: bool, *args: Any) -> Tensor:
    """The function with P(W)."""
    shape = tuple(model.w.shape)
    out_features, in_features = shape[::-1] if transposed else shape
    entry = Entry("w", shape, out_features, in_features, transposed, config=CONFIG)
    return model.function(*args, project(model.w.detach(), entry), model.bias)


FORMS: dict[str, tuple[Callable[..., Tensor], tuple[int, int], bool]] = {
    "linear": (lambda x, w, b: F.linear(x, w), (48, 32), False),
    "linear with a bias": (lambda x, w, b: F.linear(x, w, b), (48, 32), False),
    "linear of a transpose": (lambda x, w, b: F.linear(x, w.t(), b), (32, 48), True),
    "linear of a vector": (lambda x, w, b: F.linear(x[0, 0], w, b), (48, 32), False),
    "addmm": (lambda x, w, b: torch.addmm(b, x.view(-1, 32), w), (32, 48), True),
    "addmm transposed": (lambda x, w, b: torch.addmm(b, x.view(-1, 32), w.T), (48, 32), False),
    "addmm with a matrix": (lambda x, w, b: torch.addmm(x.new_ones(10, 48), x.view(-1, 32), w), (32, 48), True),
    "addmm with a column": (lambda x, w, b: torch.addmm(x.new_ones(10, 1), x.view(-1, 32), w), (32, 48), True),
    "mm": (lambda x, w, b: torch.mm(x.view(-1, 32), w), (32, 48), True),
    "mm transposed": (lambda x, w, b: x.view(-1, 32).mm(w.transpose(0, 1)), (48, 32), False),
    "matmul": (lambda x, w, b: torch.matmul(x, w), (32, 48), True),
    "@": (lambda x, w, b: x @ w.permute(1, 0) + b, (48, 32), False),
    "four dimensions": (lambda x, w, b: x.view(1, 2, 5, 32) @ w, (32, 48), True),
    "left addmm": (lambda x, w, b: torch.addmm(x.new_ones(10), w, x.view(-1, 32).t()), (48, 32), False),
    **SCALED,
    "addmm, scaled, without its term": (
        lambda x, w, b: torch.addmm(b, x.view(-1, 32), w, beta=0),
        (32, 48),
        True,
    ),
    "one of a batch": (lambda x, w, b: torch.bmm(x.view(1, 10, 32), w[None]), (32, 48), True),
    "bmm, expanded": (lambda x, w, b: torch.bmm(x, w.expand(x.shape[0], -1, -1)), (32, 48), True),
    "left bmm, expanded": (lambda x, w, b: torch.broadcast_to(w[None], (2, 48, 32)).bmm(x.mT), (48, 32), False),
    "einsum": (lambda x, w, b: torch.einsum("bsd,df->bsf", x, w), (32, 48), True),
    "einsum, weight first": (lambda x, w, b: torch.einsum("fd,bsd->bsf", w, x), (48, 32), False),
    "einsum to the left": (lambda x, w, b: torch.einsum("...d,df->f...", x, w), (32, 48), True),
    "left": (lambda x, w, b: w @ x.mT, (48, 32), False),
    "left of a matrix": (lambda x, w, b: w.mm(x[0].t()), (48, 32), False),
    "left of a vector": (lambda x, w, b: w @ x[0, 0], (48, 32), False),
    "left transposed": (lambda x, w, b: torch.matmul(w.T, x.mT), (32, 48), True),
    "arguments by name, in another order": (lambda x, w, b: torch.mm(mat2=w, input=x.view(-1, 32)), (32, 48), True),
    "of a square, by name": (lambda x, w, b: torch.matmul(other=w, input=x), (32, 32), True),
    "a convolution": (lambda x, w, b: F.conv1d(x.mT, w[..., None]), (48, 32), False),
    "a convolution without a batch": (lambda x, w, b: F.conv1d(x[0].mT, w[..., None], b), (48, 32), False),
    "einsum that permutes": (lambda x, w, b: torch.einsum("bsd,df->sfb", x, w), (32, 48), True),
}


@pytest.mark.parametrize("form", FORMS)
def test_each_form_becomes_one_operator_and_means_the_projected_weight(form: str) -> None:
    function, shape, transposed = FORMS[form]
    model = OneWeight(function, *shape)
    result = rewritten(model, X)
    assert result.rewritten.sites == result.count() == 1
    torch.testing.assert_close(result.y, expected(model, transposed, X), rtol=1e-4, atol=1e-4)
    assert result.y.stride() == function(X, model.w, model.bias).stride()
    assert [key.part for key in result.rewritten.added] == ["blocks", "index", "u", "v"]
    assert all(key.transposed == transposed for key in result.rewritten.added)
    assert not any(value is model.w for value in result.inputs), "the dense weight is still an input"


@pytest.mark.parametrize(
    ("function", "x"),
    [
        (lambda x, w: torch.einsum("bk,bkn->bn", x, w), torch.randn(6, 32)),
        (lambda x, w: x @ w, torch.randn(2, 6, 5, 32)),
        (lambda x, w: torch.bmm(x[:, None], w), torch.randn(6, 32)),
        (lambda x, w: x[:1] @ w, torch.randn(2, 5, 32)),
        (lambda x, w: torch.einsum("bsk,bkn->bsn", x[:1], w), torch.randn(2, 5, 32)),
    ],
)
@pytest.mark.parametrize("dynamic", [None, True])
def test_matrices_that_an_index_gathers(function: Callable[..., Tensor], x: Tensor, dynamic: bool | None) -> None:
    """Negative indices count from the end."""
    index = torch.tensor([2, 0, -1, 1, -3, 1])

    class Gathered(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(3, 32, 48))

        def forward(self, x: Tensor, index: Tensor) -> Tensor:
            return function(x, self.w[index])

    model = Gathered()
    result = rewritten(model, x, index, dynamic=dynamic)
    entry = Entry("w", (3, 32, 48), 48, 32, True, config=CONFIG, matrices=3)
    assert result.count() == 1
    exact = function(x, project(model.w.detach(), entry)[index])
    torch.testing.assert_close(result.y, exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dynamic", [None, True])
def test_an_index_that_gathers_nothing(dynamic: bool | None) -> None:
    w = torch.randn(3, 32, 48)
    model = OneWeight(lambda x, w, b: torch.bmm(x[:, None], w[x[:, :3].argmax(-1)]), *w.shape)
    result = rewritten(model, torch.randn(0, 32), dynamic=dynamic)
    assert result.count() == 1 and result.y.shape == (0, 1, 48)


def test_a_term_that_counts_nothing_has_gradients_of_zeros() -> None:
    """And not even a NaN of it reaches the result."""
    model = OneWeight(lambda x, w, b: torch.addmm(b, x.view(-1, 32), w, beta=0), 32, 48)
    model.bias.data[0] = torch.nan
    y = rewritten(model, X).y
    torch.testing.assert_close(y, expected(model, True, X), rtol=1e-4, atol=1e-4)
    (gradient,) = torch.autograd.grad(y.sum(), model.bias)
    assert torch.equal(gradient, torch.zeros(48))


def test_two_matmuls_with_one_weight_share_its_compact_form() -> None:
    model = OneWeight(lambda x, w, b: F.linear(x, w) + F.linear(x.relu(), w, b), 48, 32)
    result = rewritten(model, X)
    assert result.count() == 2
    assert len(result.rewritten.added) == 4
    torch.testing.assert_close(result.y, expected(model, False, X), rtol=1e-4, atol=1e-4)


def test_a_matmul_of_the_result_of_another() -> None:
    """Also as the term that is added: nothing between them keeps the first result's node alive."""
    first, second = nn.Linear(32, 48), nn.Linear(48, 32)

    class Chain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = first, second

        def forward(self, x: Tensor) -> Tensor:
            y = self.second(self.first(x)).view(-1, 32)
            return torch.addmm(y, self.first(y), self.second.weight.t())

    model = Chain()
    result = rewritten(model, X)
    assert result.count() == 4
    with torch.no_grad():
        for name, module in (("first.weight", first), ("second.weight", second)):
            shape = tuple(module.weight.shape)
            module.weight.copy_(project(module.weight, Entry(name, shape, *shape, config=CONFIG)))
    torch.testing.assert_close(result.y, model(X))


def test_parts_of_a_weight_are_projected_one_by_one_and_the_whole_leaves_the_graph() -> None:
    def function(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        q, k = w.chunk(2)
        return F.linear(x, q, b) + x.sin() @ k.t()

    model = OneWeight(function, 96, 32)
    result = rewritten(model, X)
    weight = model.w.detach()
    for site in result.found.sites:
        weight = project(weight, Entry(site.name, (96, 32), 48, 32, config=CONFIG, region=site.region))
    torch.testing.assert_close(result.y, function(X, weight, model.bias), rtol=1e-4, atol=1e-4)
    assert result.count() == 2
    assert not any(value is model.w for value in result.inputs), "the dense weight is still an input"


def test_weights_of_equal_shape_share_index_and_basis() -> None:
    result = rewritten(nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32)), X)
    assert sorted(key.part for key in result.rewritten.added) == ["blocks", "blocks", "index", "u", "u", "v"]


def test_without_a_low_rank_term_there_are_only_blocks() -> None:
    model = OneWeight(lambda x, w, b: F.linear(x, w, b), 48, 32)
    result = rewritten(model, X, config=SiteConfig(16, 1, 0))
    assert [key.part for key in result.rewritten.added] == ["blocks", "index"]


def test_every_block_kept_is_the_dense_result() -> None:
    model = OneWeight(lambda x, w, b: F.linear(x, w, b), 48, 32)
    torch.testing.assert_close(rewritten(model, X, config=SiteConfig(16, 1, 0)).y, model(X), rtol=1e-4, atol=1e-4)


# ---- what must not match ----


@pytest.mark.parametrize(
    "function",
    [
        lambda x, w, b: x @ (w * 2),  # not the weight itself
        lambda x, w, b: x @ w + w.sum(),  # the weight has another use
        lambda x, w, b: (x @ w) @ w.T,  # both orientations
        lambda x, w, b: x @ w[:, ::2],  # part of a weight, with gaps
        lambda x, w, b: x @ w[:, :32] + x @ w[:, 16:],  # overlapping parts
        lambda x, w, b: torch.einsum("bsd,df->bsdf", x, w),  # no matmul
        lambda x, w, b: x * w[:, 0],  # no matmul
        lambda x, w, b: torch.einsum("bsk,kn->bsn", x[..., :1], w),  # x is broadcast
        lambda x, w, b: torch.tensordot(x[..., :1], w, ([2], [0])),
        lambda x, w, b: torch.einsum("bsk,kn->bsn", x, w[:1]),  # the weight is broadcast
    ],
)
def test_what_is_no_site_is_left_as_it_is(function: Callable[..., Tensor]) -> None:
    model = OneWeight(function, 32, 48)
    result = rewritten(model, X)
    assert result.rewritten.sites == result.count() == 0
    assert result.rewritten.added == ()
    torch.testing.assert_close(result.y, model(X))


@pytest.mark.parametrize("matrices", [1, 2])
@pytest.mark.parametrize("multiply", [torch.matmul, torch.bmm])
def test_a_weight_of_several_matrices_becomes_one_operator(matrices: int, multiply: Callable[..., Tensor]) -> None:
    x = X[:matrices] if multiply is torch.bmm else X
    model = OneWeight(lambda x, w, b: multiply(x, w), matrices, 32, 48)
    result = rewritten(model, x)
    assert result.count() == 1 and result.count("w") == 0
    entry = Entry("w", (matrices, 32, 48), 48, 32, True, config=CONFIG, matrices=matrices)
    exact = x.double() @ project(model.w.detach().double(), entry)
    assert (result.y - exact).norm() <= 1e-5 * exact.norm()


def test_a_site_without_a_config_stays_dense() -> None:
    model = OneWeight(lambda x, w, b: F.linear(x, w, b), 48, 32)
    result = rewritten(model, X, config=None)
    assert result.count() == 0
    assert result.after.code == result.before.code
    torch.testing.assert_close(result.y, model(X))


# ---- what else uses the weight or the result ----


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(48, 32)

    def forward(self, ids: Tensor) -> Tensor:
        return F.linear(self.emb(ids), self.emb.weight)


def test_a_lookup_keeps_the_dense_weight() -> None:
    model, ids = Tied(), torch.arange(10)
    result = rewritten(model, ids)
    entry = Entry("emb.weight", (48, 32), 48, 32, config=CONFIG)
    exact = F.linear(model.emb(ids), project(model.emb.weight.detach(), entry))
    assert result.count() == 1
    assert any(value is model.emb.weight for value in result.inputs)
    torch.testing.assert_close(result.y, exact, rtol=1e-4, atol=1e-4)


def test_a_result_that_many_nodes_use() -> None:
    model = OneWeight(lambda x, w, b: (y := F.linear(x, w, b)).relu() + y.sin() * y, 48, 32)
    result = rewritten(model, X)
    assert result.count() == 1
    torch.testing.assert_close(result.y, expected(model, False, X), rtol=1e-4, atol=1e-4)


def test_matmuls_in_the_body_of_a_checkpoint() -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(32, 48), nn.Linear(48, 32)

        def forward(self, x: Tensor) -> Tensor:
            y = checkpoint(lambda x: self.b(self.a(x).relu()), x, use_reentrant=False)
            assert isinstance(y, Tensor)
            return y

    model = Checkpointed()
    result = rewritten(model, X.clone().requires_grad_())
    assert result.rewritten.sites == result.count() == 2
    assert not any(value is linear.weight for value in result.inputs for linear in (model.a, model.b))
    for linear in (model.a, model.b):
        out_features, in_features = linear.weight.shape
        entry = Entry("w", (out_features, in_features), out_features, in_features, config=CONFIG)
        linear.weight.data = project(linear.weight.data, entry)
    torch.testing.assert_close(result.y, model(X), rtol=1e-4, atol=1e-4)


def test_symbolic_rows() -> None:
    model = OneWeight(lambda x, w, b: F.linear(x, w, b).relu(), 48, 32)
    result = rewritten(model, X, dynamic=True)
    assert result.count() == 1
    torch.testing.assert_close(result.y, expected(model, False, X), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_the_compact_weight_has_the_dtype_of_the_matmul(dtype: torch.dtype) -> None:
    def function(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype):
            return F.linear(x, w, b)

    model = OneWeight(function, 48, 32)
    result = rewritten(model, X)
    assert {key.dtype for key in result.rewritten.added} == {dtype}
    assert result.y.dtype == dtype
    torch.testing.assert_close(result.y, expected(model, False, X), rtol=5e-2, atol=0.5)


# ---- the graph ----

BEFORE = """
def forward(self, weight, bias, x):
    linear = torch._C._nn.linear(x, weight, bias)
    relu = linear.relu()
    return (relu,)
"""
AFTER = """
def forward(self, bias, x, blocks, index, u, v):
    to = bias.to(torch.float32)
    linear_default = torch.ops.pixelfly.linear.default(x, blocks, u, v, index, 48, False, to)
    getitem = linear_default[0]
    relu = getitem.relu()
    return (relu,)
"""


def _text(gm: GraphModule) -> str:
    """The graph's code with plain names, without types, comments and `del`."""
    text = re.sub(r"#.*", "", gm.code)
    text = re.sub(r";\s*\w+( = \w+)* = None", "", text)
    text = re.sub(r" : [\w.\[\], ]+?(?=[,)] ?)", "", text)
    names = {"w": "weight", "bias": "bias", "x": "x"}
    for old, new in names.items():
        text = re.sub(rf"\b[lL]_(self_parameters_)?{old}_\b", new, text)
    text = re.sub(r"\bpixelfly_(\w+?)_\d+", r"\1", text)
    lines = [line.rstrip() for line in text.splitlines() if line.strip()]
    return "\n".join(line for line in lines if not re.match(r"\s*(\w+) = \1$", line) and "import" not in line) + "\n"


def test_the_graph_before_and_after() -> None:
    result = rewritten(OneWeight(lambda x, w, b: F.linear(x, w, b).relu(), 48, 32), X)
    assert _text(result.before) == BEFORE.lstrip()
    assert _text(result.after) == AFTER.lstrip()


@pytest.mark.parametrize("form", FORMS)
def test_the_graph_is_well_formed_and_nothing_else_changed(form: str) -> None:
    function, shape, _ = FORMS[form]
    result = rewritten(OneWeight(function, *shape), X)
    graph = result.after.graph
    graph.lint()
    assert not graph.eliminate_dead_code()
    ours = [node for node in graph.nodes if getattr(node.target, "namespace", "") == "pixelfly"]
    assert not any(node.target._schema.is_mutable for node in ours)
    assert not any(alias.alias_info for node in ours for alias in node.target._schema.returns)
    kept = [node.name for node in result.before.graph.nodes if node.op == "placeholder"]
    inputs = [node.name for node in graph.nodes if node.op == "placeholder"]
    assert inputs[: len(result.rewritten.kept)] == [kept[i] for i in result.rewritten.kept]
    assert all(name.startswith("pixelfly_") for name in inputs[len(result.rewritten.kept) :])
    old = {node.name for node in result.before.graph.nodes}
    gone = old - {node.name for node in graph.nodes}
    assert result.found.matches[0].node.name in gone
    last = graph.output_node().args[0][0]
    assert last.meta["example_value"].shape == result.y.shape
    for node in graph.nodes:
        check_node_safe(node)  # AOTAutograd caches no graph where this raises


class Elsewhere(Tensor):
    """As a tensor on a GPU is seen from the CPU; counts how often one is read."""

    reads = 0

    @property
    def is_cpu(self) -> bool:  # type: ignore[override]
        return False

    def tolist(self) -> Any:
        Elsewhere.reads += 1
        return self.as_subclass(Tensor).tolist()


def test_a_weight_on_a_gpu_that_is_written_to_without_a_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    added = rewritten(OneWeight(*FORMS["linear"][:2]), X).rewritten.added
    inputs, weight = CompactInputs(added, CompactWeights(), "fixed"), torch.randn(48, 32).as_subclass(Elsewhere)
    args = (weight,) * (max(part.weight for part in added) + 1)
    with torch.no_grad():
        first = [part.clone() for part in inputs(args)]
        Elsewhere.reads = 0
        assert all(torch.equal(a, b) for a, b in zip(first, inputs(args), strict=True)) and Elsewhere.reads == 1
        weight.data.mul_(-1)
        assert not torch.equal(first[0], inputs(args)[0]) and Elsewhere.reads == 2
        weight.mul_(-1)
        assert torch.equal(first[0], inputs(args)[0]) and Elsewhere.reads <= 3


@torch.library.custom_op("pixelfly_tests::flat", mutates_args=())
def flat(y: Tensor) -> Tensor:
    return y.view(-1).clone()


@flat.register_fake
def _(y: Tensor) -> Tensor:
    return y.new_empty(y.numel())


VIEWED: dict[str, tuple[Callable[..., Tensor], tuple[int, ...]]] = {
    "from the left": (lambda x, w, b: (w @ x.mT).view(-1), (48, 32)),
    "one matrix on the left": (lambda x, w, b: (w @ x.mT).relu().view(2, -1), (1, 48, 32)),
    "1 x 1": (lambda x, w, b: F.gelu(F.conv1d(x.mT, w, b)).view(2, -1), (48, 32, 1)),
    "1 x 1, transposed": (lambda x, w, b: F.conv_transpose1d(x.mT, w, b).view(2, -1), (32, 48, 1)),
    "by a function": (lambda x, w, b: torch.ops.aten.view((w @ x.mT).sin(), (2, -1)), (48, 32)),
    "reshaped before": (lambda x, w, b: (w @ x.mT).reshape(2, 8, 6, 5).view(2, 48, 5), (48, 32)),
    "strided": (lambda x, w, b: (w @ x.mT).as_strided((2, 240), (240, 1)), (48, 32)),
    "complex": (lambda x, w, b: torch.view_as_complex((w @ x.mT).mT.contiguous().unflatten(2, (24, 2))).real, (48, 32)),
    "changed by a view": (lambda x, w, b: doubled(y := w @ x.mT, y.flatten()[:5]), (48, 32)),
    "changed by a line of it": (
        lambda x, w, b: F.layer_norm(doubled(y := w @ x.mT, y.flatten()[:5]), (5,)).mul(2),
        (48, 32),
    ),
    "changed by what is no copy": (lambda x, w, b: doubled(y := w @ x.mT, y.contiguous()), (48, 32)),
    "by the operator of another": (lambda x, w, b: torch.ops.pixelfly_tests.flat(w @ x.mT), (48, 32)),
    "in a sub-graph": (
        lambda x, w, b: torch.cond(x.sum() > 0, lambda y: y.sin().view(2, -1), lambda y: -y.view(2, -1), (w @ x.mT,)),
        (48, 32),
    ),
    "outside": (lambda x, w, b: (w @ x.mT).relu() + 1, (48, 32)),
    "after another matmul": (lambda x, w, b: F.layer_norm((w @ x.mT).mT, (48,)).view(-1), (48, 32)),
    "as a sum": (lambda x, w, b: (w @ x.mT).exp().sum(), (48, 32)),
}


def doubled(y: Tensor, view: Tensor) -> Tensor:
    """y after a change of its view."""
    view *= 2
    return y


@pytest.mark.parametrize("form", VIEWED)
def test_a_result_whose_strides_are_seen_has_those_of_the_matmul(form: str) -> None:
    function, shape = VIEWED[form]
    model = OneWeight(function, *shape)
    result = rewritten(model, X)
    same = OneWeight(function, *shape)
    same.load_state_dict(model.state_dict())
    (site,) = result.found.sites
    sides = site.out_features, site.in_features, site.transposed
    entry = Entry("w", shape, *sides, config=CONFIG, matrices=site.matrices, region=site.region)
    same.w.data = project(model.w.detach(), entry)
    exact = same(X)
    assert result.count() == 1 and result.y.stride() == exact.stride()
    torch.testing.assert_close(result.y, exact, rtol=1e-4, atol=1e-4)
    assert result.count("clone") == (form not in ("after another matmul", "as a sum"))


@pytest.mark.parametrize("model", [nn.Conv2d(32, 48, 2, 2), nn.ConvTranspose2d(32, 48, 2, 2)])
def test_patches_can_be_cached(model: nn.Module) -> None:
    result = rewritten(model, torch.randn(2, 32, 4, 6))
    assert result.count() == 1
    for node in result.after.graph.nodes:
        check_node_safe(node)


# ---- what has no users, but an effect ----


class Counts(nn.Module):
    """Writes to a buffer, and the result of that has no users."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(32, 48), nn.BatchNorm1d(48)

    def forward(self, x: Tensor) -> Tensor:
        x[0].mul_(2)
        y = self.norm(self.linear(x).flatten(0, 1))
        assert isinstance(y, Tensor)
        return y


def test_operations_in_place_remain() -> None:
    model, x, seen = Counts(), X.clone(), X.clone()
    assert rewritten(model, x).count() == 1
    assert model.norm.num_batches_tracked == 1
    seen[0].mul_(2)
    torch.testing.assert_close(x, seen)


def test_vmap_inside_the_graph_remains() -> None:
    def function(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return torch.vmap(torch.dot)(F.linear(x, w, b)[0], F.linear(x, w, b)[1])

    model = OneWeight(function, 48, 32)
    result = rewritten(model, X)
    assert result.count() == 2
    torch.testing.assert_close(result.y, expected(model, False, X), rtol=1e-4, atol=1e-4)


@torch.library.custom_op("pixelfly_tests::double", mutates_args=("w",))
def double(w: Tensor) -> None:
    w.mul_(2)


@pytest.mark.parametrize(
    "write",
    [
        lambda w: w.mul_(2),
        lambda w: w.copy_(w * 2),
        lambda w: w.detach().mul_(2),
        lambda w: w[0].zero_(),
        lambda w: F.relu(w, inplace=True),
        lambda w: F.embedding(torch.arange(3), w, max_norm=0.5),
        double,
    ],
)
def test_a_weight_that_the_model_writes_to_stays_dense(write: Callable[[Tensor], object]) -> None:
    def function(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        with torch.no_grad():
            write(w)
        return F.linear(x, w, b)

    assert rewritten(OneWeight(function, 48, 32), X).count() == 0
