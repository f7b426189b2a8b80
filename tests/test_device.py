"""The real device: templates against float64, in every dtype and block; models in training and inference; modes.

These tests need a GPU and are passed over elsewhere; `--device cpu` runs them on the CPU, to try the tests themselves.
They know the backend by its function, so that a checkout that is not installed will do.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from numerics import assert_as_good_as, error, to_double
from torch import Tensor, nn

import pixelfly_compiler as pf
from pixelfly_compiler.kernels import lowering, ops, reference
from pixelfly_compiler.kernels.projector import Projector
from pixelfly_compiler.kernels.support import Support, flat_butterfly

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
UNEVEN = Support(100, 150, 32, crow=(0, 4, 4, 5, 7), col=(0, 1, 3, 4, 2, 0, 4))  # an empty row, tails on both sides
OPTIONS: dict[str, Any] = {"budget": 0.5, "force": True, "block_size": 32}

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("fresh_dynamo")]


# ---- operators ----


def operands(support: Support, rows: int, rank: int, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """x, blocks, u, v, bias as leaves that want gradients, and the index; values are the same on every device."""
    out_features, in_features, block = support.out_features, support.in_features, support.block
    leaves = [
        torch.randn(rows, in_features),
        torch.randn(support.nnz, block, block) / in_features**0.5,
        torch.randn(out_features, rank) / rank**0.5,
        torch.randn(in_features, rank) / in_features**0.5,
        torch.randn(out_features),
    ]
    leaves = [leaf.to(device, dtype).requires_grad_() for leaf in leaves]
    return [*leaves, ops.support_index(support, device)]


def layer(x: Tensor, blocks: Tensor, u: Tensor, v: Tensor, bias: Tensor, index: Tensor) -> tuple[Tensor, ...]:
    """With low rank and an epilogue, and without either."""
    linear, features = torch.ops.pixelfly.linear, u.shape[0]
    y = F.gelu(linear(x, blocks, u, v, index, features, False, bias)[0])
    return y, linear(x, blocks, None, None, index, features, False)[0]


def results(function: Callable[..., tuple[Tensor, ...]], args: Sequence[Tensor]) -> list[Tensor]:
    """The outputs, then the gradients of all arguments that want one."""
    outputs = function(*args)
    generator = torch.Generator().manual_seed(1)
    total = sum((y * torch.randn(y.shape, generator=generator).to(y)).float().sum() for y in outputs)
    leaves = [arg for arg in args if arg.requires_grad]
    return [y.detach() for y in outputs] + list(torch.autograd.grad(total, leaves))


def in_double(args: Sequence[Tensor]) -> list[Tensor]:
    return [to_double(arg.detach()).requires_grad_(arg.requires_grad) for arg in args]


def check(function: Callable[..., tuple[Tensor, ...]], args: Sequence[Tensor], compiled: Any = None) -> None:
    """Outputs and gradients of the compiled function are as near to float64 as eager's; no reference runs in it.

    Gradients are sums over all rows, and twice as far off again where those are added up one after the other.
    """
    lowering.register()
    compiled = compiled or torch.compile(function, fullgraph=True)
    with counted() as called:
        ours = results(compiled, args)
    assert not called or args[0].device.type == "cpu", f"compiled code ran the slow reference of {called}"
    eager, exact = results(function, args), results(function, in_double(args))
    for place, (one, other, right) in enumerate(zip(ours, eager, exact, strict=True)):
        assert_as_good_as(one, other, right, factor=2 if place < 2 else 4)


@contextmanager
def counted() -> Iterator[list[str]]:
    """The list gets the name of every operator whose reference runs in the block."""
    called: list[str] = []

    def counting(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args: called.append(name) or original(*args)

    with pytest.MonkeyPatch.context() as patches:
        for name in ("linear", "block_grad", "grouped_linear", "grouped_block_grad"):
            patches.setattr(reference, name, counting(name, getattr(reference, name)))
        yield called


@pytest.mark.parametrize("rows", [5, 1100])
@pytest.mark.parametrize("block", [16, 32, 64, 128])
@pytest.mark.parametrize("dtype", DTYPES)
def test_forward_and_all_gradients(device: torch.device, dtype: torch.dtype, block: int, rows: int) -> None:
    check(layer, operands(flat_butterfly(320, 256, block, 1), rows, 32, dtype, device))


@pytest.mark.parametrize("dtype", DTYPES)
def test_odd_sizes_and_an_uneven_support(device: torch.device, dtype: torch.dtype) -> None:
    check(layer, operands(UNEVEN, 77, 24, dtype, device))


@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_of_several_matrices(device: torch.device, dtype: torch.dtype) -> None:
    """Uneven groups, an empty one, and rows that are in none; and as many rows for each."""
    each = [operands(flat_butterfly(320, 256, 64, 1), 700, 32, dtype, device) for _ in range(4)]
    x, v, index = each[0][0], each[0][3], each[0][5]
    blocks, u = (torch.stack([one[place].detach() for one in each]).requires_grad_() for place in (1, 2))
    ends = torch.tensor([100, 100, 450, 690], dtype=torch.int32, device=device)

    def experts(x: Tensor, blocks: Tensor, u: Tensor, v: Tensor, ends: Tensor, index: Tensor) -> tuple[Tensor, ...]:
        grouped = torch.ops.pixelfly.grouped_linear
        y = F.silu(grouped(x, blocks, u, v, ends, index, 320, False)[0])
        return y, grouped(x, blocks, u, v, None, index, 320, False)[0]

    check(experts, [x, blocks, u, v, ends, index])


@pytest.mark.parametrize("rows", [1, 4096])
def test_shapes_of_models(device: torch.device, rows: int) -> None:
    check(layer, operands(flat_butterfly(3072, 768, 64, 2), rows, 64, torch.bfloat16, device))


def test_tf32_is_as_good_as_torch_s(device: torch.device) -> None:
    args = operands(flat_butterfly(320, 256, 64, 1), 512, 32, torch.float32, device)
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        check(layer, args)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def test_symbolic_rows(device: torch.device) -> None:
    lowering.register()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True)
    for rows in (100, 33, 1000):
        torch.manual_seed(0)
        check(layer, operands(flat_butterfly(96, 64, 32, 0), rows, 32, torch.float32, device), compiled)


@pytest.mark.parametrize("variant", range(8))
@pytest.mark.parametrize("block", [32, 64, 128])
def test_every_launch_that_autotuning_may_choose(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, block: int, variant: int
) -> None:
    if device.type == "cpu":
        pytest.skip("launches are a GPU's")
    from pixelfly_compiler.kernels import heuristics_gpu, lowering_gpu_grad, lowering_gpu_linear

    for module, name in ((lowering_gpu_linear, "linear_launches"), (lowering_gpu_grad, "block_grad_launches")):
        launches = getattr(heuristics_gpu, name)
        monkeypatch.setattr(module, name, lambda *args, of=launches: [of(*args)[variant % len(of(*args))]])
    check(layer, operands(flat_butterfly(512, 640, block, 1), 700, 64, torch.bfloat16, device))


def test_results_repeat_bit_by_bit(device: torch.device) -> None:
    lowering.register()
    args = operands(flat_butterfly(512, 512, 64, 1), 4096, 64, torch.bfloat16, device)
    compiled = torch.compile(layer, fullgraph=True)
    first, second = results(compiled, args), results(compiled, args)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_inputs_of_more_than_two_to_the_31_elements(device: torch.device) -> None:
    if device.type == "cpu" or torch.cuda.get_device_properties(device).total_memory < 40 * 2**30:
        pytest.skip("needs 20 GB of a GPU's memory")
    lowering.register()
    rows, support = 270_000, flat_butterfly(64, 8192, 64, 0)
    x = torch.randn(rows, 8192, dtype=torch.bfloat16, device=device)
    blocks = torch.randn(support.nnz, 64, 64, dtype=torch.bfloat16, device=device)
    index = ops.support_index(support, device)
    compiled = torch.compile(lambda x: torch.ops.pixelfly.linear(x, blocks, None, None, index, 64, False)[0])
    tail = slice(rows - 100, rows)
    exact = torch.ops.pixelfly.linear(x[tail].double(), blocks.double(), None, None, index, 64, False)[0]
    assert error(compiled(x)[tail], exact) < 1e-2


@pytest.mark.parametrize("part", DTYPES)
@pytest.mark.parametrize("support", [flat_butterfly(320, 256, 32, 1), UNEVEN])
def test_projection_and_its_adjoint(device: torch.device, support: Support, part: torch.dtype) -> None:
    weight, rank = torch.randn(support.out_features, support.in_features, device=device), 48
    here, there = Projector.of(support, rank, device), Projector.of(support, rank, torch.device("cpu"))
    blocks, u = here.project(weight, part)
    gradient = here.adjoint(blocks, u, weight)
    assert device.type == "cpu" or str(here.native(weight, part).__name__).endswith("projection_gpu")
    exact = there.project(weight.cpu().double(), torch.float64)
    tolerance = 4 * torch.finfo(part).eps
    assert error(blocks.cpu(), exact[0]) < tolerance and error(u.cpu(), exact[1]) < tolerance
    assert error(gradient.cpu(), there.adjoint(blocks.cpu().double(), u.cpu().double(), weight.cpu().double())) < 1e-5
    assert all(map(torch.equal, here.project(weight, part), (blocks, u))), "results do not repeat"


# ---- models ----


def mlp(device: torch.device) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(256, 512), nn.GELU(), nn.Linear(512, 256), nn.Tanh(), nn.Linear(256, 64)).to(device)


def transformer(device: torch.device) -> nn.Module:
    torch.manual_seed(0)
    one = nn.TransformerEncoderLayer(128, 4, 512, batch_first=True, dropout=0.0)
    return nn.TransformerEncoder(one, 2, enable_nested_tensor=False).to(device)


MODELS: dict[str, tuple[Callable[[torch.device], nn.Module], tuple[int, ...]]] = {
    "mlp": (mlp, (100, 256)),
    "transformer": (transformer, (4, 50, 128)),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_one_line_is_the_model_with_projected_weights(
    device: torch.device, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    make, shape = MODELS[name]
    model, x = make(device), torch.randn(shape).to(device)
    plan = pf.plan(model, x, **OPTIONS)
    oracle = pf.project_(copy.deepcopy(model), plan)
    compiled = torch.compile(model, backend=pf.pixelfly, options=OPTIONS)
    with caplog.at_level(logging.WARNING, logger="pixelfly_compiler"):
        y = compiled(x)
        y.square().mean().backward()
    assert "could not be compiled" not in caplog.text
    eager, exact = oracle(x), copy.deepcopy(oracle).double()(x.double())
    assert_as_good_as(y.detach(), eager.detach(), exact.detach(), factor=8)
    eager.square().mean().backward()
    for key, parameter in model.named_parameters():
        if any(entry.name.startswith(f"{key}[") for entry in plan.entries):
            continue  # several weights in one parameter
        expected = oracle.get_parameter(key).grad
        assert parameter.grad is not None and expected is not None
        expected = pf.project(expected, plan[key]) if key in plan and plan[key].config else expected
        assert error(parameter.grad, expected) < 1e-3, key


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_training_under_autocast(device: torch.device, dtype: torch.dtype) -> None:
    """The same losses as the projected model's, to the precision of the dtype."""
    x, target = torch.randn(256, 256).to(device), torch.randn(256, 64).to(device)

    def losses(model: Any, parameters: Any) -> list[float]:
        optimizer = torch.optim.AdamW(parameters, lr=1e-3, fused=True)
        found = []
        for _ in range(6):
            with torch.autocast(device.type, dtype):
                loss = F.mse_loss(model(x).float(), target)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(loss.item())
        return found

    model = mlp(device)
    eager = pf.sparsify_(copy.deepcopy(model), x, init="project", **OPTIONS)
    same = copy.deepcopy(eager)
    compact = losses(torch.compile(same, backend=pf.pixelfly), same.parameters())
    assert compact == pytest.approx(losses(eager, eager.parameters()), rel=2e-2)
    one_line = losses(torch.compile(model, backend=pf.pixelfly, options=OPTIONS), model.parameters())
    assert one_line[-1] < one_line[0] and compact[-1] < compact[0]


@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"])
def test_modes_of_compile(device: torch.device, mode: str) -> None:
    """CUDA graphs, and choices that are timed: the same training and inference as in the default mode."""
    x = torch.randn(512, 256).to(device)
    outputs: list[Tensor] = []
    expected, found = mlp(device), mlp(device)
    for model, options in ((expected, {}), (found, torch._inductor.list_mode_options(mode))):
        compiled = torch.compile(model, backend=pf.pixelfly, options=OPTIONS | options)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(4):
            torch.compiler.cudagraph_mark_step_begin()
            compiled(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            results = [compiled(x).clone() for _ in range(4)]
        outputs.append(results[-1])
        torch._dynamo.reset()
    assert error(outputs[1], outputs[0]) < 1e-3


def test_changed_weights_are_noticed_in_inference(device: torch.device) -> None:
    model, x = mlp(device), torch.randn(64, 256).to(device)
    compiled = torch.compile(model, backend=pf.pixelfly, options=OPTIONS)
    with torch.no_grad():
        first = compiled(x).clone()
        model[0].weight.mul_(2)  # type: ignore[union-attr, operator]
        assert error(compiled(x), first) > 0.1
        model[0].weight.data.div_(2)  # type: ignore[union-attr]
        assert error(compiled(x), first) < 1e-5
