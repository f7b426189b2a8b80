"""`export` and `package`: the program computes what the oracle does, and the packaged file needs nothing of ours."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from numerics import assert_as_good_as, to_double
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

import pixelfly_compiler
from pixelfly_compiler.cli import main
from pixelfly_compiler.errors import ExportError, OptionError, PlanMismatchError
from pixelfly_compiler.export import export, package
from pixelfly_compiler.kernels import attention
from pixelfly_compiler.plan import plan, project_

OPTIONS: dict[str, Any] = {"budget": 0.5, "force": True}

pytestmark = [pytest.mark.usefixtures("fresh_dynamo"), pytest.mark.filterwarnings("ignore::FutureWarning")]


class Zoo(nn.Module):
    """Many ways to use a weight, a buffer that changes, keyword arguments, nested results."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(64, 128), nn.Linear(128, 64)
        self.attention = nn.MultiheadAttention(64, 4, batch_first=True)
        self.patches = nn.Conv2d(3, 64, 4, 4)
        self.table = nn.Embedding(32, 64)
        self.head = nn.Linear(64, 32, bias=False)
        self.head.weight = self.table.weight
        self.free = nn.Parameter(torch.randn(64, 128) / 8)
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, image: Tensor, *, ids: Tensor) -> dict[str, Any]:
        self.calls.add_(1)
        x = self.patches(image).flatten(2).transpose(1, 2) + self.table(ids)[:, None]
        x = x + self.attention(x, x + 1, x + 2, need_weights=False)[0]
        x = self.down(nn.functional.gelu(self.up(x))) + torch.einsum("bsf,df->bsd", x @ self.free, self.free)
        return {"logits": self.head(x), "rest": (x, self.calls)}


def inputs(batch: int) -> tuple[tuple[Tensor], dict[str, Tensor]]:
    return (torch.randn(batch, 3, 8, 8),), {"ids": torch.arange(batch)}


def operators(program: ExportedProgram) -> Counter[str]:
    return Counter(str(node.target) for node in program.graph.nodes if node.op == "call_function")


def test_the_program_equals_the_oracle_at_every_batch_size() -> None:
    model = Zoo().eval()
    args, kwargs = inputs(4)
    batch = Dim("batch", min=2, max=64)
    shapes = {"image": {0: batch}, "ids": {0: batch}}
    made = plan(model, args, kwargs, **OPTIONS)
    program = export(model, args, kwargs, dynamic_shapes=shapes, **OPTIONS)
    assert operators(program)["pixelfly.linear.default"] == len(made.sparse) == 8
    assert model.calls.item() == 0, "the model is not run"
    oracle = project_(copy.deepcopy(model), made)
    for size in (4, 9):
        args, kwargs = inputs(size)
        ours, eager = program.module()(*args, **kwargs), oracle(*args, **kwargs)
        exact = copy.deepcopy(oracle).double()(to_double(args[0]), **kwargs)
        assert_as_good_as(ours["logits"], eager["logits"], exact["logits"])
        assert_as_good_as(ours["rest"][0], eager["rest"][0], exact["rest"][0])


def test_planned_weights_are_replaced_and_others_stay() -> None:
    model = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64))
    program = export(model, torch.randn(8, 64), exclude="2.*", force=True, budget=0.8, lowrank_share=0.3)
    compact = {f"0.weight_{part}" for part in ("blocks", "u", "v", "index")}
    assert set(program.state_dict) == {"0.bias", "2.weight", "2.bias"} | compact
    assert operators(program)["pixelfly.linear.default"] == operators(program)["aten.linear.default"] == 1


def test_encoder_layers_are_opened_also_without_gradients() -> None:
    layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True).eval()
    x = torch.randn(2, 16, 64)
    with torch.no_grad():
        made = plan(layer, x, **OPTIONS)
        program = export(layer, x, **OPTIONS)
        torch.testing.assert_close(program.module()(x), project_(copy.deepcopy(layer), made)(x), rtol=1e-4, atol=1e-5)
    assert operators(program)["pixelfly.linear.default"] == len(made.sparse) == 4


@pytest.mark.parametrize("faster", [False, True])
def test_attention_is_ours_where_it_is_faster_here(monkeypatch: pytest.MonkeyPatch, faster: bool) -> None:
    monkeypatch.setattr(attention, "is_faster_here", lambda backward: faster)
    layer, x = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True).eval(), torch.randn(2, 16, 64)
    program = export(layer, x, **OPTIONS)
    assert operators(program)["pixelfly.attention.default"] == int(faster)
    expected = project_(copy.deepcopy(layer), plan(layer, x, **OPTIONS))(x)
    torch.testing.assert_close(program.module()(x), expected, rtol=1e-4, atol=1e-5)


class TwoUses(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(64, 128), nn.Linear(64, 128)

    def forward(self, x: Tensor) -> Tensor:
        return self.one(x) + self.two(x) + self.two.weight.sum()


def test_a_compact_model_is_folded_and_its_constants_computed() -> None:
    model, x = TwoUses(), torch.randn(8, 64)
    pixelfly_compiler.sparsify_(model, x, plan=_without_the_sum(x))
    program = export(model, x)
    assert operators(program)["pixelfly.linear.default"] == 2
    assert not operators(program)["pixelfly.densify.default"], "what else needs the weight has it as a constant"
    assert not any("gamma" in name for name in program.state_dict)
    torch.testing.assert_close(program.module()(x), model(x), rtol=1e-4, atol=1e-4)


def _without_the_sum(x: Tensor) -> pixelfly_compiler.Plan:
    class Plain(TwoUses):
        def forward(self, x: Tensor) -> Tensor:
            return self.one(x) + self.two(x)

    return plan(Plain(), x, **OPTIONS)


def joined(model: Uses, x: Tensor) -> Tensor:
    return nn.functional.linear(x, torch.cat([model.a, model.b[0]]))


def branch(model: Uses, x: Tensor) -> Tensor:
    def frozen(x: Tensor) -> Tensor:
        with torch.no_grad():
            return joined(model, x) + 1

    return torch.cond(x.sum() > 0, lambda x: joined(model, x).detach(), frozen, (x,))


def modes(model: Uses, x: Tensor) -> Tensor:
    with torch.no_grad():
        y = branch(model, x).sum(1, keepdim=True) + x
        with torch.autocast("cpu", torch.bfloat16):
            y = nn.functional.linear(y, model.a)
    return y.float() @ model.b[2]


def selected(model: Uses, x: Tensor) -> Tensor:
    return torch.bmm((x @ model.a)[:, None], model.b[torch.arange(x.shape[0]) % 3])


def returned(model: Uses, x: Tensor) -> tuple[Tensor, Tensor]:
    return x @ model.a, model.a


class Uses(nn.Module):
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function
        self.a, self.b = nn.Parameter(torch.randn(64, 64) / 8), nn.Parameter(torch.randn(3, 64, 64) / 8)

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


@pytest.mark.parametrize("function", [joined, branch, modes, selected, returned])
def test_what_the_plan_makes_sparse_is_sparse_in_the_program(function: Callable[..., Any], caplog: Any) -> None:
    model, x = Uses(function).eval(), torch.randn(6, 64)
    made = plan(model, x, **OPTIONS)
    assert made.sparse
    program = export(model, x, plan=made)
    assert "a" not in program.state_dict and "dense matrix" not in caplog.text
    torch.testing.assert_close(program.module()(x), project_(copy.deepcopy(model), made)(x), rtol=1e-4, atol=1e-5)


class Parts(nn.Module):
    """`torch.export` sees matmuls with parts of these weights; Dynamo follows no index from data and skips the loop."""

    def __init__(self) -> None:
        super().__init__()
        self.experts, self.packed = nn.Parameter(torch.randn(3, 64, 64) / 8), nn.Parameter(torch.randn(128, 64) / 8)

    def forward(self, x: Tensor, index: Tensor) -> Tensor:
        y = x[..., :32] @ self.experts[index, :32]
        return nn.functional.linear(y, self.packed[:64]) + (0 if self.skips() else y @ self.packed[64:])

    def skips(self) -> bool:
        return torch.compiler.is_dynamo_compiling() and not torch.compiler.is_exporting()


def test_parts_that_a_plan_does_not_list_stay_dense() -> None:
    model, inputs = Parts().eval(), (torch.randn(2, 5, 64), torch.tensor([2, 0]))
    made = plan(model, inputs, **OPTIONS)
    assert [entry.name for entry in made.sparse] == ["packed[0:64]"]
    program = export(model, inputs, plan=made)
    exact = project_(copy.deepcopy(model), made)(*inputs)
    torch.testing.assert_close(program.module()(*inputs), exact, rtol=1e-4, atol=1e-4)
    with pytest.raises(PlanMismatchError, match=r"packed\[0:64\]: not in the plan"):
        export(model, inputs, plan=replace(made, entries=tuple(e for e in made if e.name == "experts")))


class Tied(nn.Module):
    def __init__(self, more: bool) -> None:
        super().__init__()
        self.table, self.head, self.more = nn.Embedding(64, 64), nn.Linear(64, 64, bias=False), more
        self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        y = self.head(self.table(ids))
        return y + self.head.weight.sum(0) if self.more else y


def test_a_planned_weight_that_cannot_be_compact_is_projected_and_named(caplog: pytest.LogCaptureFixture) -> None:
    model, ids = Tied(more=True).eval(), torch.arange(8)
    made = plan(Tied(more=False).eval(), ids, **OPTIONS)
    program = export(model, ids, plan=made)
    assert "pixelfly: table.weight is sparse in the plan, but" in caplog.text and "by `sum`" in caplog.text
    assert set(program.state_dict) == {"table.weight", "table.weight_projected"}
    torch.testing.assert_close(program.module()(ids), project_(copy.deepcopy(model), made)(ids), rtol=1e-4, atol=1e-5)


def test_what_sparsify_left_dense_stays_dense_unless_asked() -> None:
    model, x = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64)), torch.randn(8, 64)
    pixelfly_compiler.sparsify_(model, x, exclude="2.*", **OPTIONS)
    assert operators(export(model, x))["aten.linear.default"] == 1
    assert operators(export(model, x, **OPTIONS))["pixelfly.linear.default"] == 2


def test_bad_input_is_named() -> None:
    model, x = nn.Sequential(nn.Linear(64, 128)), torch.randn(8, 64)
    with pytest.raises(TypeError, match="unexpected option 'max_autotune'"):
        export(model, x, max_autotune=True)
    with pytest.raises(OptionError, match="budget"):
        export(model, x, budget=2)
    with pytest.raises(PlanMismatchError, match=r"0\.weight"):
        export(model, x, plan=plan(nn.Sequential(nn.Linear(64, 64)), x))
    with pytest.raises(ExportError, match=r"suffix \.pt2"):
        package(export(model, x, **OPTIONS), "model.so")


FACTORY = """
import torch
from torch import nn

def build():
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(64, 2, 128, batch_first=True).eval()
    return model, torch.randn(4, 24, 64), {}, ({0: torch.export.Dim("batch", min=1, max=4096)},)
"""

ALONE = """
import sys, torch
sys.modules["pixelfly_compiler"] = None  # importing it fails
model = torch._inductor.aoti_load_package(sys.argv[1])
for x, y in torch.load(sys.argv[2]):
    torch.testing.assert_close(model(x), y, rtol=1e-4, atol=1e-5)
assert not hasattr(torch.ops.pixelfly, "linear")
"""


def test_a_package_runs_where_this_package_is_missing(tmp_path: Path) -> None:
    source, out, expected = tmp_path / "model.py", tmp_path / "model.pt2", tmp_path / "expected.pt"
    source.write_text(FACTORY)
    arguments = ["export", f"{source}:build", str(out), "--budget", "0.5", "--force"]
    result = CliRunner().invoke(main, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    namespace: dict[str, Any] = {}
    exec(FACTORY, namespace)
    model, x, *_ = namespace["build"]()
    oracle = project_(model, plan(model, x, **OPTIONS))
    rows = [torch.randn(size, 24, 64) for size in (1, 4, 100)]
    torch.save([(x, oracle(x).detach()) for x in rows], expected)
    subprocess.run([sys.executable, "-c", ALONE, str(out), str(expected)], check=True, cwd=tmp_path)
