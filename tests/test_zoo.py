"""Many families: the compiled model equals the oracle, its sites cover what they can, no flop of a weight is missed.

Most run the operators' references, without a C++ compiler: what is tested is what the passes make of a model.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.backends.debugging import aot_eager
from torch._dynamo.utils import counters
from torch.utils._pytree import tree_leaves
from zoo import ZOO, Built, WeightFlops, mixtral, without_dropout

from pixelfly_compiler import backend
from pixelfly_compiler.decision import Plan
from pixelfly_compiler.owners import Owner, heads
from pixelfly_compiler.plan import plan, project, project_

OPTIONS: dict[str, Any] = {"budget": 0.5, "force": True}

pytestmark = [
    pytest.mark.usefixtures("fresh_dynamo"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"),
]


@pytest.fixture
def _references(monkeypatch: pytest.MonkeyPatch) -> None:
    """AOTAutograd without Inductor: the rewritten graph runs node by node."""
    monkeypatch.setattr(backend, "inductor", lambda gm, inputs, patches: aot_eager(gm, list(inputs)))


def step(model: Any, inputs: dict[str, Tensor]) -> tuple[list[Tensor], dict[str, Tensor]]:
    """All floating-point outputs, and the gradients of a random linear function of them; the same random masks."""
    model.zero_grad()
    torch.manual_seed(0)
    result = model(**inputs)
    leaves = tree_leaves(result.to_tuple() if hasattr(result, "to_tuple") else result)
    outputs = [x for x in leaves if isinstance(x, Tensor) and x.requires_grad]
    generator = torch.Generator().manual_seed(1)
    torch.stack([(x * torch.randn(x.shape, generator=generator)).sum() for x in outputs]).sum().backward()
    names = {name.removeprefix("_orig_mod."): p.grad for name, p in model.named_parameters() if p.grad is not None}
    return [x.detach() for x in outputs], {name: grad.clone() for name, grad in names.items()}


def oracle_gradient(name: str, exact: nn.Module, gradients: dict[str, Tensor], made: Plan) -> Tensor:
    """P of the dense gradient, part by part; of a tied weight, which is several in `exact`, only the head's share."""
    gradient = gradients[name]
    for entry in made.sparse:
        if entry.parameter == name and not entry.shared:
            gradient = project(gradient, entry)
        elif entry.parameter == name:
            tied = [other for other in (name, *entry.aliases) if other in gradients]
            holders = [
                Owner(path, exact.get_submodule(path), key) for path, _, key in (n.rpartition(".") for n in tied)
            ]
            of_heads = heads(holders, entry.heads)
            parts = zip((gradients[other] for other in tied), holders, strict=True)
            gradient = torch.stack([project(g, entry) if held in of_heads else g for g, held in parts]).sum(0)
    return gradient


def assert_equals_the_oracle(model: nn.Module, inputs: dict[str, Tensor], made: Plan, **options: Any) -> None:
    buffers = copy.deepcopy(dict(model.named_buffers()))
    exact = project_(copy.deepcopy(model), made)
    ours, our_gradients = step(torch.compile(model, backend="pixelfly", options=options), inputs)
    expected, gradients = step(exact, inputs)
    for y, other in zip(ours, expected, strict=True):
        finite = other.isfinite()  # scores of what is masked may be infinite
        assert torch.equal(y.isfinite(), finite)
        assert (y - other)[finite].norm() <= 1e-5 * other[finite].norm()
    scale = max(gradient.norm() for gradient in gradients.values())
    assert our_gradients.keys() >= {name for name in gradients if name in dict(model.named_parameters())}
    for name, gradient in our_gradients.items():
        if name not in gradients:
            assert not gradient.any(), name
            continue
        other = oracle_gradient(name, exact, gradients, made)
        assert (gradient - other).norm() <= 1e-4 * max(other.norm(), 1e-3 * scale), name
    for name, buffer in exact.named_buffers():
        torch.testing.assert_close(dict(model.named_buffers())[name], buffer, rtol=1e-4, atol=1e-5)
    assert buffers.keys() == dict(model.named_buffers()).keys()


def count_graphs(model: nn.Module, build: Callable[[int], Built], backend: Any, **options: Any) -> list[int]:
    """Graphs compiled after one step and after another of a second batch size."""
    torch._dynamo.reset()
    counters.clear()
    compiled, counts = torch.compile(model, backend=backend, **options), []
    for batch in (2, 3):
        step(compiled, build(batch)[1])
        counts.append(counters["stats"]["unique_graphs"])
    return counts


@pytest.mark.usefixtures("_references")
@pytest.mark.parametrize("family", ZOO)
def test_every_family(family: str) -> None:
    build, share = ZOO[family]
    model, inputs = build(2)
    without_dropout(model)
    made = plan(model, (), inputs, **OPTIONS)
    counter = WeightFlops(model)
    with torch.no_grad(), counter:
        model(**inputs)
    found = sum(entry.dense_flops for entry in made if entry.is_site)
    print(f"{family}: {found / counter.weight:.1%} of the flops of weights are sites, {len(made.sparse)} sparse")
    assert made.dense_flops == counter.weight
    assert found >= share * counter.weight
    assert all(entry.config or entry.reason for entry in made)
    assert all(entry.config for entry in made if entry.is_site)
    assert_equals_the_oracle(model, inputs, made, **OPTIONS)
    ours = count_graphs(model, build, "pixelfly", options=OPTIONS)
    assert ours == count_graphs(model, build, "aot_eager")


def test_experts_in_a_loop_that_dynamo_leaves_to_python_are_listed_with_a_reason() -> None:
    model, inputs = mixtral(2)
    model.set_experts_implementation("eager")
    made = plan(model, (), inputs, **OPTIONS)
    for name in ("gate_up_proj", "down_proj"):
        assert "in no graph" in str(made[f"model.layers.0.mlp.experts.{name}"].reason)


@pytest.mark.usefixtures("_references")
@pytest.mark.parametrize("family", ["GPT-2", "Llama", "Mixtral"])
def test_generate_with_a_static_cache(family: str) -> None:
    """The oracle's logits, by as many graphs as without us; what is decided for the prompt holds for one row too."""

    def generate(model: Any, backend: Any = None, **options: Any) -> tuple[Tensor, int]:
        torch._dynamo.reset()
        counters.clear()
        if backend is not None:
            model.forward = torch.compile(type(model).forward.__get__(model), backend=backend, **options)
        how = {"do_sample": False, "max_new_tokens": 6, "use_cache": True, "cache_implementation": "static"}
        result = model.generate(inputs["input_ids"], return_dict_in_generate=True, output_logits=True, **how)
        return torch.stack(result.logits), counters["stats"]["unique_graphs"]

    model, inputs = ZOO[family][0](2)
    model.eval()
    made = plan(model, (), inputs, **OPTIONS)
    expected, _ = generate(project_(copy.deepcopy(model), made))
    dense, graphs = generate(model, "aot_eager")
    ours, our_graphs = generate(model, "pixelfly", options={"plan": made})
    torch.testing.assert_close(ours, expected)
    assert not torch.allclose(ours, dense, rtol=1e-2)
    assert our_graphs == graphs > 0


# ---- the same through the kernels ----


@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=() if name == "DiT" else pytest.mark.slow) for name in ZOO]
)
def test_families_through_the_kernels(family: str) -> None:
    model, inputs = ZOO[family][0](2)
    without_dropout(model)
    assert_equals_the_oracle(model, inputs, plan(model, (), inputs, **OPTIONS), **OPTIONS)
