"""Emitted GPU code: what is written, what the machine code looks like on each architecture, and that nothing leaks."""

from __future__ import annotations

import functools
import gc
import importlib.util
import json
import re
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor, nn

import pixelfly_compiler
from pixelfly_compiler.cli import main
from pixelfly_compiler.errors import EmitError, OptionError, PlanError
from pixelfly_compiler.kernels import ops
from pixelfly_compiler.kernels.codegen_gpu import Code
from pixelfly_compiler.kernels.gpus import KNOWN, Gpu, gpu_of, why_no_kernels
from pixelfly_compiler.kernels.heuristics_gpu import (
    GradShape,
    LinearShape,
    block_grad_launches,
    linear_launches,
    narrowing_for,
)
from pixelfly_compiler.kernels.projector import Projector
from pixelfly_compiler.kernels.support import flat_butterfly
from pixelfly_compiler.kernels.virtual_device import virtual_device

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="GPU code needs triton: pip install triton (Linux)"
)
pytestmark = pytest.mark.usefixtures("fresh_dynamo")

TENSOR_CORES = {"cuda:80": "mma.sync", "cuda:90": "wgmma", "cuda:100": "tcgen05"}


def mlp(dtype: torch.dtype = torch.bfloat16) -> tuple[nn.Module, tuple[Tensor]]:
    model = nn.Sequential(nn.Linear(256, 512), nn.GELU(), nn.Linear(512, 256)).to(dtype)
    return model, (torch.randn(256, 256, dtype=dtype),)


# ---- what is emitted ----


@needs_triton
def test_training_emits_wrappers_kernels_and_a_report(tmp_path: Path) -> None:
    model, args = mlp()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    emission = pixelfly_compiler.emit(model, args, out_dir=tmp_path, training=True, force=True)
    ours = [kernel for kernel in emission.kernels if kernel.sites]
    served = {(kernel.graph, site) for kernel in ours for site in kernel.sites}
    sites = {"0.weight", "2.weight"}
    assert served == {(graph, site) for graph in ("forward_0", "backward_1") for site in sites}
    # The model's input needs no gradient: one forward and one block gradient per site, one input gradient.
    assert len(ours) == 5
    for kernel in emission.kernels:
        endings = {Path(file).suffix for file in kernel.files}
        assert endings == {".py", ".ptx", ".cubin"}
        assert all((tmp_path / file).stat().st_size for file in kernel.files)
    assert all(kernel.tensor_core.get("wgmma") and kernel.spills == 0 and kernel.seconds for kernel in ours)
    assert all("pixelfly" not in line for line in calls(tmp_path / "forward_0.py"))
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["target"] == "cuda:90" and len(report["kernels"]) == len(emission.kernels)
    assert "0.weight" in str(emission)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def calls(wrapper: Path) -> list[str]:
    return [line for line in wrapper.read_text().splitlines() if "torch.ops" in line and not line.startswith("#")]


@needs_triton
def test_the_same_model_gets_the_same_files(tmp_path: Path) -> None:
    def files() -> dict[Path, bytes]:
        pixelfly_compiler.emit(model, args, out_dir=tmp_path, force=True)
        return {path: path.read_bytes() for path in tmp_path.rglob("*.*")}

    model, args = mlp()
    once = files()
    assert files() == once and not any(b"pixelfly-emit" in text for text in once.values())


@needs_triton
def test_amd_gets_an_hsaco_with_mfma(tmp_path: Path) -> None:
    model, args = mlp()
    with torch.no_grad():
        emission = pixelfly_compiler.emit(model, args, target="hip:gfx942", out_dir=tmp_path, force=True)
    ours = [kernel for kernel in emission.kernels if kernel.sites]
    assert len(ours) == 2
    assert all(kernel.tensor_core.get("mfma") and kernel.spills == 0 for kernel in ours)
    assert {Path(file).suffix for kernel in ours for file in kernel.files} == {".py", ".amdgcn", ".hsaco"}


@needs_triton
def test_attention_and_tied_layers_of_a_transformer(tmp_path: Path) -> None:
    layer = nn.TransformerEncoderLayer(128, 4, 256, batch_first=True, dropout=0.0)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    emission = pixelfly_compiler.emit(model, torch.randn(2, 64, 128), out_dir=tmp_path, force=True, block_size=32)
    shared = [kernel for kernel in emission.kernels if len(kernel.sites) == 2]
    assert any({"layers.0.linear1.weight", "layers.1.linear1.weight"} == set(kernel.sites) for kernel in shared)


@needs_triton
def test_a_kernel_of_weights_at_different_depths_is_reported(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(64, 64, bias=False), nn.Sequential(nn.Linear(64, 64, bias=False)))
    emission = pixelfly_compiler.emit(model, torch.randn(64, 64), out_dir=tmp_path, force=True, block_size=16)
    assert [kernel.sites for kernel in emission.kernels] == [("0.weight", "1.0.weight")]
    assert "0.weight, 1.0.weight (2)" in str(emission)


class Branched(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.whether, self.otherwise = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cond(x.sum() > 0, lambda x: self.whether(x).sin(), lambda x: self.otherwise(x).exp(), (x,))


@needs_triton
def test_kernels_of_branches_serve_their_sites(tmp_path: Path) -> None:
    emission = pixelfly_compiler.emit(
        Branched(), torch.randn(64, 64), out_dir=tmp_path, training=True, force=True, block_size=16
    )
    ours = [kernel for kernel in emission.kernels if "triton_tem" in kernel.name]
    forward = [kernel.sites for kernel in ours if kernel.graph == "forward_0"]
    assert sorted(forward) == [("otherwise.weight",), ("whether.weight",)]
    gradients = {site for kernel in ours if "block_grad" in kernel.name for site in kernel.sites}
    assert gradients == {"otherwise.weight", "whether.weight"} and all(kernel.sites for kernel in ours)


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(64, 128), nn.Linear(64, 128), nn.Linear(128, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(nn.functional.gelu(self.gate(x)) * self.up(x))


@needs_triton
def test_a_kernel_serves_not_what_its_operands_come_from(tmp_path: Path) -> None:
    emission = pixelfly_compiler.emit(Gated(), torch.randn(2, 64, 64), out_dir=tmp_path, force=True, block_size=16)
    served = [kernel.sites for kernel in emission.kernels if kernel.sites]
    assert sorted(served) == [("down.weight",), ("gate.weight",), ("up.weight",)]


class Sliced(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(192, 64))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight[:64]) * nn.functional.linear(x.exp(), self.weight[64:128])


@needs_triton
def test_parts_of_a_weight_are_sites_of_their_own(tmp_path: Path) -> None:
    args = torch.randn(64, 64)
    emission = pixelfly_compiler.emit(Sliced(), args, out_dir=tmp_path, training=True, force=True, block_size=16)
    ours = [kernel for kernel in emission.kernels if kernel.sites]
    assert {site for kernel in ours for site in kernel.sites} == {entry.name for entry in emission.plan.sparse}
    assert all(kernel.seconds for kernel in ours) and "weight[0:64]" in str(emission)


class Experts(nn.Module):
    """Each row goes to one of four experts, in order of the experts."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 128, 128, dtype=torch.bfloat16))

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        return torch._grouped_mm(x, self.weight, offs=ends)


@needs_triton
def test_experts(tmp_path: Path) -> None:
    args = torch.randn(512, 128, dtype=torch.bfloat16), torch.tensor([100, 100, 300, 512], dtype=torch.int32)
    emission = pixelfly_compiler.emit(Experts(), args, out_dir=tmp_path, training=True, force=True)
    served = {(kernel.graph, site) for kernel in emission.kernels for site in kernel.sites}
    assert served == {("forward_0", "weight"), ("backward_1", "weight")}
    assert all(kernel.seconds for kernel in emission.kernels if kernel.sites)


@needs_triton
def test_a_compact_model_never_makes_the_dense_weight(tmp_path: Path) -> None:
    model, args = mlp()
    pixelfly_compiler.sparsify_(model, args, force=True)
    emission = pixelfly_compiler.emit(model, args, out_dir=tmp_path, training=True)
    assert emission.plan.sparse == pixelfly_compiler.plan_of(model).sparse
    ours = [kernel for kernel in emission.kernels if kernel.sites]
    served = {(kernel.graph, site) for kernel in ours for site in kernel.sites}
    assert served == {(graph, site) for graph in ("forward_0", "backward_1") for site in ("0.weight", "2.weight")}
    assert len(ours) == 5  # as with the one line
    assert not any("densify" in line for name in emission.wrappers for line in calls(tmp_path / name))


@needs_triton
def test_the_report_of_a_compact_model_has_its_budget(tmp_path: Path) -> None:
    model, args = mlp()
    pixelfly_compiler.sparsify_(model, args, force=True, budget=0.1)
    own = pixelfly_compiler.plan_of(model)
    plan = pixelfly_compiler.emit(model, args, out_dir=tmp_path).plan
    assert replace(plan, entries=plan.sparse) == replace(own, training=False)
    plan = pixelfly_compiler.emit(model, args, out_dir=tmp_path, budget=0.5).plan
    assert (plan.budget, plan.sparse) == (0.5, own.sparse) and set(own.notes) <= set(plan.notes)


@needs_triton
def test_a_submodule_may_be_compiled_already(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(64, 64), torch.compile(nn.Linear(64, 64)))
    emission = pixelfly_compiler.emit(model, torch.randn(64, 64), out_dir=tmp_path, force=True, block_size=16)
    assert {site for kernel in emission.kernels for site in kernel.sites} == {"0.weight", "1.weight"}


@needs_triton
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_training_is_emitted_also_where_gradients_are_off(mode: Any, tmp_path: Path) -> None:
    model, args = nn.Linear(64, 64), torch.randn(64, 64)
    with mode():
        emission = pixelfly_compiler.emit(model, args, out_dir=tmp_path, training=True, force=True, block_size=16)
    assert emission.wrappers == ("forward_0.py", "backward_1.py")


class Masked(nn.Module):
    """Its gradient has a shape that depends on data: AOTAutograd refuses the graph, and Dynamo runs it eagerly."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.masked = nn.Linear(64, 64), nn.Parameter(torch.zeros(64))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        y = self.layer(x)
        y[mask] = self.masked
        return self.layer(y)


@needs_triton
def test_a_graph_that_cannot_be_compiled_is_left_to_dynamo(tmp_path: Path) -> None:
    args = torch.randn(64, 64), torch.rand(64) > 0.5
    emission = pixelfly_compiler.emit(Masked(), args, out_dir=tmp_path, training=True, force=True, block_size=16)
    assert not emission.kernels and "No kernel serves layer.weight (1)" in str(emission)


class Forces(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64))

    def forward(self, x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        return -torch.autograd.grad(self.layers(x).square().sum(), x, create_graph=self.training)[0]


@needs_triton
def test_a_forward_that_differentiates_gets_its_gradients(tmp_path: Path) -> None:
    emission = pixelfly_compiler.emit(Forces(), torch.randn(64, 64), out_dir=tmp_path, force=True, block_size=16)
    served = {(kernel.graph[:-2], site) for kernel in emission.kernels for site in kernel.sites}
    weights = ("layers.0.weight", "layers.2.weight")
    assert served == {(graph, weight) for graph in ("forward", "backward") for weight in weights}


def test_second_derivatives_are_missed_in_training_alone() -> None:
    model, x = Forces(), torch.randn(64, 64)
    notes = [pixelfly_compiler.plan(model, x, training=training).notes for training in (False, True)]
    assert ["second derivatives" in str(each) for each in notes] == [False, True]
    assert "second derivatives" not in str(pixelfly_compiler.plan(model.eval(), x, training=True).notes)
    layers = model.layers
    model.forward = torch.func.grad(lambda x: layers(x).square().sum())  # which always keeps what a second would need
    assert "second derivatives" not in str(pixelfly_compiler.plan(model, x, training=True).notes)


@needs_triton
def test_what_sparsify_left_dense_stays_dense(tmp_path: Path) -> None:
    model, args = nn.Sequential(nn.Linear(1024, 4096), nn.Linear(4096, 1024)).bfloat16(), torch.randn(4096, 1024)
    pixelfly_compiler.sparsify_(model, args.bfloat16(), force=True, exclude=["1.weight"])
    emission = pixelfly_compiler.emit(model, args.bfloat16(), out_dir=tmp_path)
    assert {site for kernel in emission.kernels for site in kernel.sites} == {"0.weight"}
    assert "sparsify_ left it dense" in str(emission.plan["1.weight"].reason)


class Assorted(nn.Module):
    """What is no matmul, of a language model and of a vision model."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(100, 64)
        self.row = nn.Conv1d(64, 64, 4, padding=3, groups=64)
        self.image = nn.Conv2d(64, 64, 7, padding=3, groups=64)
        self.first, self.second = nn.Linear(64, 128), nn.Linear(128, 64)

    def forward(self, tokens: Tensor) -> Tensor:
        x = nn.functional.dropout(self.table(tokens), 0.1, self.training)
        x = self.row(x.mT)[:, :, :64].mT.clone()
        x[:, 1:] = x[:, :-1] * torch.tensor([2.0]).to(x) + torch.arange(64).to(x)
        x = self.image(x.reshape(-1, 8, 8, 64).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        x = self.second(nn.functional.gelu(self.first(x))) * torch.tensor([0.1 * i for i in range(64)]).to(x)
        return torch.cond(x.sum() > 0, lambda x: self.second(self.first(x)), lambda x: x + x.new_ones(()), (x,))


@needs_triton
def test_a_model_of_more_than_matmuls(tmp_path: Path) -> None:
    """Dropout, an embedding's gradient, convolutions, constants, writes, branches: what is else in models."""
    model = Assorted().bfloat16()
    tokens = torch.randint(0, 100, (4, 64))
    emission = pixelfly_compiler.emit(model, tokens, out_dir=tmp_path, training=True, force=True)
    assert {"first.weight", "second.weight"} == {site for kernel in emission.kernels for site in kernel.sites}
    assert all(kernel.sites for kernel in emission.kernels if "triton_tem" in kernel.name)  # also in the branch
    assert all("cpu" not in line for name in emission.wrappers for line in calls(tmp_path / name))


@needs_triton
def test_on_the_command_line(tmp_path: Path) -> None:
    file = tmp_path / "model.py"
    file.write_text("import torch\ndef make():\n    return torch.nn.Linear(256, 256), torch.randn(8, 256)\n")
    command = ["emit", f"{file}:make", "--out-dir", str(tmp_path / "out"), "--force", "--target", "cuda:80"]
    done = CliRunner().invoke(main, command)
    assert done.exit_code == 0, done.output
    assert "triton_tem" in done.output and (tmp_path / "out" / "report.json").exists()


@needs_triton
def test_a_compact_model_keeps_its_plan_on_the_command_line(tmp_path: Path) -> None:
    file = tmp_path / "model.py"
    file.write_text(
        "import torch, pixelfly_compiler\n"
        "def make():\n"
        "    model, x = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 64)), torch.randn(64, 64)\n"
        "    kept = dict(force=True, block_size=16, budget=0.5, exclude=['1.weight'])\n"
        "    return pixelfly_compiler.sparsify_(model, x, **kept), x\n"
    )
    wide = CliRunner(env={"COLUMNS": "200"})
    done = wide.invoke(main, ["emit", f"{file}:make", "--out-dir", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    assert "sparsify_ left it dense" in done.output and "budget 50.0%" in done.output


class Rotary(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.sin() * x.cos()


@needs_triton
def test_arrays_in_local_memory_are_no_spills(tmp_path: Path) -> None:
    (kernel,) = pixelfly_compiler.emit(Rotary(), torch.randn(4096), out_dir=tmp_path).kernels
    assert "__local_depot" in (tmp_path / kernel.files[1]).read_text() and kernel.files[1].endswith(".ptx")
    assert kernel.spills == 0


@needs_triton
def test_an_emission_without_anything_sparse_says_the_next_step(tmp_path: Path) -> None:
    model, args = nn.Linear(512, 512).bfloat16(), torch.randn(8, 512).bfloat16()
    assert "more rows" in str(pixelfly_compiler.emit(model, args, out_dir=tmp_path))
    assert "more rows" not in str(pixelfly_compiler.emit(model, args, out_dir=tmp_path, force=True))


# ---- what bad input gets ----


@pytest.mark.parametrize("target", ["cuda:42", "cuda:75"])
def test_an_unknown_target_lists_the_known_ones(tmp_path: Path, target: str) -> None:
    model, args = mlp()
    with pytest.raises(OptionError, match=rf"'{target}' is not known[^$]*known targets: cuda:80.*cuda:90.*hip:gfx942"):
        pixelfly_compiler.emit(model, args, target=target, out_dir=tmp_path)


@pytest.mark.parametrize(
    ("model", "args", "message"),
    [
        (nn.Linear(64, 64, device="meta"), torch.randn(8, 64), r"weight is on 'meta'[^$]*on the CPU"),
        (nn.Linear(64, 64), torch.randn(8, 64, device="meta"), "an argument is on 'meta'"),
        (torch.sin, torch.randn(8, 64), "the model is a builtin_function_or_method"),
    ],
)
@needs_triton
def test_what_cannot_be_traced_here_is_refused(model: Any, args: Tensor, message: str, tmp_path: Path) -> None:
    with pytest.raises(EmitError, match=message):
        pixelfly_compiler.emit(model, args, out_dir=tmp_path)


@needs_triton
def test_a_basis_of_trained_weights_is_refused_in_training(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="'svd'"):
        pixelfly_compiler.emit(*mlp(), out_dir=tmp_path, basis="svd", force=True, training=True)


@needs_triton
def test_what_was_emitted_before_is_replaced(tmp_path: Path) -> None:
    report = {"wrappers": ["backward_1.py"], "kernels": [{"files": ["kernels/old.cubin"]}]}
    (tmp_path / "kernels").mkdir()
    files = {"report.json": json.dumps(report), "backward_1.py": "", "kernels/old.cubin": "", "own": ""}
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    pixelfly_compiler.emit(nn.ReLU(), torch.randn(8), out_dir=tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"kernels", "report.json", "forward_0.py", "own"}
    assert not (tmp_path / "kernels" / "old.cubin").exists()


@needs_triton
def test_what_was_emitted_before_outlives_a_failure(tmp_path: Path) -> None:
    pixelfly_compiler.emit(nn.ReLU(), torch.randn(8), out_dir=tmp_path)
    with pytest.raises(OptionError, match="'svd'"):
        pixelfly_compiler.emit(*mlp(), out_dir=tmp_path, basis="svd", force=True, training=True)
    assert {path.name for path in tmp_path.iterdir()} == {"kernels", "report.json", "forward_0.py"}


def fails(*args: Any, **kwargs: Any) -> Any:
    raise ValueError("no layout")


@needs_triton
@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("codegen_gpu.generate", "backward_1 cannot be compiled for cuda:90: ValueError: no layout"),
        (
            "triton_binary.compile_kernel",
            "the kernel triton_tem_fused_linear_0 of 0.weight cannot be compiled for cuda:90",
        ),
    ],
)
def test_an_error_of_a_compiler_names_the_cause_and_changes_nothing(
    where: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pixelfly_compiler.kernels import codegen_gpu

    def generate(gm: Any, inputs: Any, gpu: Gpu, **kwargs: Any) -> Code:
        return fails() if kwargs.get("is_backward") else original(gm, inputs, gpu, **kwargs)

    model = nn.Sequential(nn.Linear(64, 64, bias=False))
    pixelfly_compiler.emit(nn.ReLU(), torch.randn(8), out_dir=tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.*")}
    original = codegen_gpu.generate
    monkeypatch.setattr(f"pixelfly_compiler.kernels.{where}", generate if "generate" in where else fails)
    with pytest.raises(EmitError, match=message) as error:
        pixelfly_compiler.emit(model, torch.randn(64, 64), out_dir=tmp_path, training=True, force=True, block_size=16)
    assert "next step" in str(error.value) and isinstance(error.value.__cause__, ValueError)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.*")} == before


@needs_triton
@pytest.mark.parametrize("name", ["forward_0.py", "kernels/backward_1_triton_tem_fused_linear_0.cubin"])
def test_files_of_others_are_not_overwritten(name: str, tmp_path: Path) -> None:
    (tmp_path / "kernels").mkdir()
    (tmp_path / name).touch()
    with pytest.raises(EmitError, match=f"{name} is in no report[^$]*another folder"):
        pixelfly_compiler.emit(nn.ReLU(), torch.randn(8), out_dir=tmp_path)


@needs_triton
def test_a_folder_that_cannot_be_written_to(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(EmitError, match=r"cannot write to '[^']*/file/out': Not a directory[^$]*another folder"):
        pixelfly_compiler.emit(nn.ReLU(), torch.randn(8), out_dir=tmp_path / "file" / "out")


@needs_triton
@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_torchscript_is_refused(tmp_path: Path) -> None:
    model = torch.jit.script(nn.Linear(64, 64))
    with pytest.raises(PlanError, match="TorchScript"):
        pixelfly_compiler.emit(model, torch.randn(8, 64), out_dir=tmp_path)


BAD_FACTORIES = {
    "exits": ("sys.exit(3)", "raised SystemExit: 3"),
    "wrong": ("return layer", r"must return \(model, args\)"),
    "kwargs": ("return layer, (), [x]", "returned kwargs a list, which must be a dictionary of named arguments"),
    "missing": ("return layer, ()", "does not run with its arguments: TypeError.*missing"),
    "shape": (
        "return layer, x[:, 1:], None",
        r"does not run with its arguments: RuntimeError.*shapes[^$]*\(model, args",
    ),
}


@needs_triton
@pytest.mark.parametrize("name", BAD_FACTORIES)
@pytest.mark.parametrize("command", ["emit", "plan"])
def test_a_bad_factory_on_the_command_line(command: str, name: str, tmp_path: Path) -> None:
    body, message = BAD_FACTORIES[name]
    file = tmp_path / "model.py"
    file.write_text(
        f"import sys, torch\nlayer, x = torch.nn.Linear(64, 64), torch.randn(8, 64)\ndef make():\n    {body}\n"
    )
    out = ["--out-dir", str(tmp_path / "out")] if command == "emit" else []
    done = CliRunner().invoke(main, [command, f"{file}:make", *out])
    assert done.exit_code == 1 and isinstance(done.exception, SystemExit)
    assert re.search(message, done.output), done.output


@needs_triton
@pytest.mark.parametrize("file", ["../own", "{folder}/own", "kernels/../../own"])
def test_only_what_is_in_the_folder_is_removed(file: str, tmp_path: Path) -> None:
    file = file.format(folder=tmp_path)
    report, own = tmp_path / "out" / "report.json", tmp_path / "own"
    own.touch()
    report.parent.mkdir()
    report.write_text(json.dumps({"wrappers": [], "kernels": [{"files": [file]}]}))
    with pytest.raises(EmitError, match="is not what emit wrote"):
        pixelfly_compiler.emit(nn.ReLU(), torch.randn(8), out_dir=report.parent)
    assert own.exists() and report.exists()


@needs_triton
def test_a_report_of_others_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text("[1, 2]")
    with pytest.raises(EmitError, match="is not what emit wrote"):
        pixelfly_compiler.emit(nn.ReLU(), torch.randn(8), out_dir=tmp_path)
    assert (tmp_path / "report.json").read_text() == "[1, 2]"


def test_without_triton_emit_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    model, args = mlp()
    with pytest.raises(EmitError, match="pip install triton"):
        pixelfly_compiler.emit(model, args, out_dir=tmp_path)


@pytest.mark.parametrize(
    ("capability", "reason"),
    [((7, 0), "compute capability 7.0"), ((7, 5), "from 8.0 on"), ((8, 0), None), ((12, 1), None)],
)
def test_old_gpus_stay_dense_with_a_reason(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], reason: str | None
) -> None:
    major, minor = capability

    class Properties:
        name, multi_processor_count, shared_memory_per_block_optin = "some GPU", 80, 96 << 10

    Properties.major, Properties.minor = major, minor  # type: ignore[attr-defined]
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    gpu_of.cache_clear()
    try:
        why = why_no_kernels(torch.device("cuda", 0))
        assert why is None if reason is None else reason in str(why)
    finally:
        gpu_of.cache_clear()


# ---- nothing leaks ----


@needs_triton
def test_nothing_of_the_virtual_device_remains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch._inductor.compile_fx
    from torch.utils._triton import has_triton

    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)  # as in a new process
    before = snapshot()
    pixelfly_compiler.emit(*mlp(), out_dir=tmp_path, force=True)
    assert snapshot() == before and has_triton() == torch.cuda.is_available()
    assert not any(b"H100" in repr(value).encode() for value in snapshot().values())
    model, args = mlp(torch.float32)
    compiled = torch.compile(model)  # the CPU path works as before
    torch.testing.assert_close(compiled(*args), model(*args), rtol=1e-4, atol=1e-4)


@needs_triton
def test_nothing_remains_after_an_error() -> None:
    before = snapshot()
    with pytest.raises(ZeroDivisionError), virtual_device(KNOWN["cuda:80"]):
        assert torch.cuda.get_device_capability() == (8, 0)
        raise ZeroDivisionError
    assert snapshot() == before


@needs_triton
def test_compiled_graphs_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor.virtualized import V

    from pixelfly_compiler.kernels import templates_gpu

    graphs: list[weakref.ref[Any]] = []

    def epilogue_weight(product: Any) -> float:
        graphs.append(weakref.ref(V.graph))
        return original(product)

    original = templates_gpu.epilogue_weight
    monkeypatch.setattr(templates_gpu, "epilogue_weight", epilogue_weight)
    with_epilogue("cast", torch.bfloat16, "cuda:90")
    torch._dynamo.reset()
    gc.collect()
    assert graphs and not any(graph() for graph in graphs)


INDICES: list[Any] = [
    (slice(1, None), slice(None, 2)),
    (..., slice(None, None, 2)),
    (-1, None, ..., 0),
    (slice(None), torch.tensor([2, 0])),
    (..., [1, 0]),
    (torch.tensor([1, 0]), None, slice(1)),
    (..., torch.tensor([[True, False, True, False]] * 3)),
    (None, True, 1),
]


@needs_triton
@pytest.mark.parametrize("index", INDICES, ids=str)
@pytest.mark.parametrize("device", ["cpu", "cuda:0"])
def test_an_index_is_traced_on_the_virtual_device(device: str, index: Any) -> None:
    from torch._subclasses import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    def function(x: Tensor) -> Tensor:
        return (x + 1)[index] * 2

    with virtual_device(KNOWN["cuda:90"]), FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv()):
        traced = make_fx(function)(torch.empty(2, 3, 4, device=device))
    (add,) = (node for node in traced.graph.nodes if node.target is torch.ops.aten.add.Tensor)
    assert add.users
    x = torch.randn(2, 3, 4)
    assert torch.equal(traced(x), function(x))


def snapshot() -> dict[str, Any]:
    """Everything that a virtual device replaces or that may remember one."""
    import os

    from torch._dynamo import device_interface
    from torch._inductor.graph import GraphLowering
    from triton.runtime import driver

    from pixelfly_compiler.kernels import templates_gpu, virtual_device

    replaced = {
        f"{getattr(where, '__name__', where)}.{name}": vars(where).get(name)
        for where, name, _ in virtual_device._answers(KNOWN["cuda:90"])
    }
    return replaced | {
        "driver": driver._active,
        "properties": dict(device_interface.caching_worker_device_properties),
        "environment": dict(os.environ),
        "compile": GraphLowering.compile_to_module,
        "listeners": list(templates_gpu.listeners),
        "available": torch.cuda.is_available(),
    }


# ---- the machine code of each architecture ----


@functools.cache
def compiled(
    target: str, dtype: torch.dtype, block: int, rows: int, inputs: int = 1024, outputs: int = 1024, rank: int = 64
) -> list[Any]:
    """Forward with bias and GELU, input gradient and block gradient, compiled for the target."""
    from emitted import binaries, generate

    support = flat_butterfly(outputs, inputs, block, 1)
    x = torch.randn(rows, inputs, dtype=dtype, requires_grad=True)
    blocks = torch.randn(support.nnz, block, block, dtype=dtype, requires_grad=True)
    u, v = torch.randn(outputs, rank, dtype=dtype, requires_grad=True), torch.randn(inputs, rank, dtype=dtype)
    args = [x, blocks, u, v, ops.support_index(support), torch.randn(outputs).to(dtype)]

    def function(x: Tensor, blocks: Tensor, u: Tensor, v: Tensor, index: Tensor, bias: Tensor) -> Tensor:
        return nn.functional.gelu(torch.ops.pixelfly.linear(x, blocks, u, v, index, outputs, False)[0] + bias)

    return [binary for code in generate(function, args, target) for binary in binaries(code, KNOWN[target]).values()]


@pytest.fixture(params=[16, 32, 64, 128])
def block(request: pytest.FixtureRequest) -> Iterator[int]:
    yield request.param


@needs_triton
@pytest.mark.parametrize("target", TENSOR_CORES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_uses_tensor_cores_without_spills(target: str, dtype: torch.dtype, block: int) -> None:
    for binary in compiled(target, dtype, block, 4096):
        assert binary.tensor_core.get(TENSOR_CORES[target]), f"{binary.name}: {binary.tensor_core}"
        check_resources(binary, KNOWN[target])
        assert binary.async_copies, f"{binary.name} is not pipelined"


@needs_triton
@pytest.mark.parametrize(
    ("target", "size", "place"), [("cuda:90", 32, 0), ("cuda:90", 64, 1), ("cuda:90", 128, 0), ("cuda:100", 64, 0)]
)
def test_launches_that_read_by_tma(target: str, size: int, place: int) -> None:
    from emitted import by_tma

    with by_tma(place):
        kernels = compiled.__wrapped__(target, torch.bfloat16, size, 4096)
    for binary in kernels:
        check_resources(binary, KNOWN[target])
        assert binary.tensor_core.get(TENSOR_CORES[target]), f"{binary.name}: {binary.tensor_core}"
    copies = ["cp.async.bulk.tensor" in binary.code["ptx"] for binary in kernels]
    assert sum(copies) == (2 if size < 64 else 3)


@needs_triton
@pytest.mark.parametrize(
    ("target", "size", "dtype"),
    [
        ("cuda:80", 32, torch.bfloat16),
        ("cuda:90", 64, torch.float32),
        ("cuda:90", 128, torch.float16),
        ("cuda:100", 64, torch.bfloat16),
    ],
)
def test_weights_of_several_matrices(target: str, size: int, dtype: torch.dtype) -> None:
    """With uneven groups: forward with SiLU, its low-rank rows and gradients, each a kernel of its own."""
    from emitted import binaries, generate

    support = flat_butterfly(512, 512, size, 1)
    x = torch.randn(4096, 512, dtype=dtype, requires_grad=True)
    blocks = torch.randn(8, support.nnz, size, size, dtype=dtype, requires_grad=True)
    u, v = torch.randn(8, 512, 64, dtype=dtype, requires_grad=True), torch.randn(512, 64, dtype=dtype)
    ends = torch.tensor([100, 100, 900, 1500, 2500, 2600, 4000, 4090], dtype=torch.int32)

    def function(*args: Tensor) -> Tensor:
        return nn.functional.silu(torch.ops.pixelfly.grouped_linear(*args, 512, False)[0])

    args = [x, blocks, u, v, ends, ops.support_index(support)]
    codes = generate(function, args, target)
    kernels = [binary for code in codes for binary in binaries(code, KNOWN[target]).values()]
    assert len(kernels) == 5
    for binary in kernels:
        check_resources(binary, KNOWN[target])
        assert dtype == torch.float32 or binary.tensor_core.get(TENSOR_CORES[target]), binary.name


@needs_triton
@pytest.mark.parametrize("target", TENSOR_CORES)
def test_fp32_and_few_rows(target: str) -> None:
    few = [binary for block in (32, 64) for binary in compiled(target, torch.bfloat16, block, 16)]
    for binary in [*compiled(target, torch.float32, 64, 4096), *few]:
        check_resources(binary, KNOWN[target])


@needs_triton
@pytest.mark.parametrize("target", ["cuda:80", "cuda:90"])
def test_tf32_fits_the_shared_memory(target: str) -> None:
    from emitted import binaries

    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        made = compiled.__wrapped__(target, torch.float32, 128, 4096, rank=128)
        (affine,) = with_epilogue("affine", torch.float32, target)[:1]
        made += binaries(affine, KNOWN[target]).values()
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    for binary in made:
        assert binary.spills == 0 and binary.shared_memory <= KNOWN[target].shared_memory
        assert binary.tensor_core.get(TENSOR_CORES[target])


Layer = Callable[[Tensor], Tensor]
gelu = nn.functional.gelu


def to_experts(x: Tensor, layer: Layer) -> Tensor:
    """A loop over experts: each row has one, and a bias."""
    expert, bias = x.sum(-1, keepdim=True).long(), x.sum(0)
    return sum((torch.where(expert == i, layer(x * i) + bias * i, 0.0) for i in range(4)), torch.zeros_like(x))


# Products and what follows them: the weights of their epilogues, forward and then backward, where the input needs none.
EPILOGUES: dict[str, tuple[Callable[[Tensor, Layer], Tensor], list[float]]] = {
    "gelu": (lambda x, layer: layer(gelu(layer(x))), [2.5, 1, 3]),  # the backward evaluates erf and exp again
    "residual": (lambda x, layer: x + layer(x), [2]),
    "cast": (lambda x, layer: layer(x).float(), [1]),
    "norm": (lambda x, layer: layer(nn.functional.layer_norm(layer(x), (512,))), [1, 1, 1]),
    "dropout": (lambda x, layer: nn.functional.dropout(gelu(layer(x)), 0.1), [6.5]),
    "geglu": (lambda x, layer: layer(gelu(layer(x), approximate="tanh") * layer(-x)), [3, 3.5, 1, 4.5]),
    "mish": (lambda x, layer: layer(nn.functional.mish(layer(x))), [3.5, 1, 4]),
    "power": (lambda x, layer: layer(layer(x).abs() ** 2.5 * x), [4, 1, 4]),
    "affine": (lambda x, layer: ((layer(x) - x[0]) * x[1] * x[2] + x[3]).relu(), [2]),
    "sine": (lambda x, layer: layer(layer(x).sin()), [7, 1, 2]),
    "experts": (to_experts, [1, 1, 1, 8]),
}
HEAVY = ["dropout", "geglu", "mish", "sine", "experts"]


def with_epilogue(name: str, dtype: torch.dtype, target: str) -> list[Code]:
    """Training code of layers of 512 x 512 with blocks of 128, for 1024 rows."""
    from emitted import generate

    support = flat_butterfly(512, 512, 128, 1)
    blocks = torch.randn(support.nnz, 128, 128, dtype=dtype, requires_grad=True)
    u, v = torch.randn(512, 64, dtype=dtype, requires_grad=True), torch.randn(512, 64, dtype=dtype)

    def function(x: Tensor, blocks: Tensor, u: Tensor, v: Tensor, index: Tensor) -> Tensor:
        return EPILOGUES[name][0](x, lambda x: torch.ops.pixelfly.linear(x, blocks, u, v, index, 512, False)[0])

    return generate(function, [torch.randn(1024, 512, dtype=dtype), blocks, u, v, ops.support_index(support)], target)


@needs_triton
@pytest.mark.parametrize("name", EPILOGUES)
def test_what_is_fused_is_weighed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from pixelfly_compiler.kernels import templates_gpu

    weights: list[float] = []

    def epilogue_weight(product: Any) -> float:
        weights.append(found := original(product))
        return found

    original = templates_gpu.epilogue_weight
    monkeypatch.setattr(templates_gpu, "epilogue_weight", epilogue_weight)
    with_epilogue(name, torch.bfloat16, "cuda:90")
    assert weights == EPILOGUES[name][1]


@pytest.mark.parametrize("gpu", KNOWN.values(), ids=lambda gpu: gpu.target)
@pytest.mark.parametrize("rows", [64, 4096])
@pytest.mark.parametrize("size", [16, 32, 64, 128])
def test_only_heavy_epilogues_make_tiles_narrower(gpu: Gpu, rows: int, size: int) -> None:
    shape = LinearShape(rows, 1024, 4096, size, size, 64, 2)
    assert [narrowing_for(weight) for weight in (3.5, 4.0, 7.0, 11.0, 21.0)] == [0, 1, 2, 3, 4]
    for narrowing in (1, 2, 3, 4):
        launch = linear_launches(replace(shape, narrowing=narrowing), gpu)[0]
        outputs = launch.block_m * launch.block_n * launch.groups // (launch.warps * gpu.warp)
        assert outputs <= 64 >> narrowing and (narrowing > 3 or launch in linear_launches(shape, gpu))


@needs_triton
@pytest.mark.parametrize("target", TENSOR_CORES)
@pytest.mark.parametrize("name", HEAVY)
def test_heavy_epilogues_do_not_spill(name: str, target: str) -> None:
    from emitted import binaries

    for code in with_epilogue(name, torch.bfloat16, target):
        fused = {
            kernel: nodes for kernel, nodes in code.nodes.items() if re.search("dropout|gelu|mish|sin|where", kernel)
        }
        for binary in binaries(replace(code, nodes=fused), KNOWN[target]).values():
            check_resources(binary, KNOWN[target])
            assert binary.tensor_core.get(TENSOR_CORES[target])


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("rows", [1, 512, 16384])
@pytest.mark.parametrize(("inputs", "outputs"), [(4096, 1024), (1024, 4096), (8192, 8192)])
def test_what_the_gpu_suite_launches_compiles_for_hopper(rows: int, inputs: int, outputs: int, block: int) -> None:
    for binary in compiled("cuda:90", torch.bfloat16, block, rows, inputs, outputs):
        check_resources(binary, KNOWN["cuda:90"])


def check_resources(binary: Any, gpu: Gpu) -> None:
    assert binary.spills == 0, f"{binary.name}: {binary.spills} bytes spilled"
    assert binary.registers <= 255 and binary.shared_memory <= gpu.shared_memory
    assert binary.vector_loads, f"{binary.name} loads from global memory in small pieces"


@needs_triton
@pytest.mark.parametrize("target", [*TENSOR_CORES, "hip:gfx942"])
@pytest.mark.parametrize("part", [torch.float32, torch.bfloat16])
def test_kernels_of_the_projection(target: str, part: torch.dtype, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """P of an fp32 weight and its adjoint, compiled as they are launched."""
    from triton.runtime.jit import JITFunction

    from pixelfly_compiler.kernels import projection_gpu
    from pixelfly_compiler.kernels.triton_binary import describe

    launched: list[Any] = []
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        self.device_caches.clear()
        launched.append(describe(self.__name__, run(self, *args, grid=grid, warmup=True, **kwargs)))

    monkeypatch.setattr(JITFunction, "run", compile_only)
    monkeypatch.setattr(projection_gpu, "gpu_of", lambda device: KNOWN[target])
    projector, weight = (
        Projector.of(flat_butterfly(512, 1024, block, 1), 80, torch.device("cpu")),
        torch.randn(512, 1024),
    )
    monkeypatch.setattr(Projector, "native", lambda *args: projection_gpu)
    with virtual_device(KNOWN[target]):
        projector.adjoint(*projector.project(weight, part), weight)
    assert not projection_gpu._failures
    assert [binary.name for binary in launched] == ["_times_v", "_kept_blocks", "_times_v", "_dense"]
    for binary in launched:
        check_resources(binary, KNOWN[target])
        assert binary.tensor_core or target == "hip:gfx942", binary


@needs_triton
def test_without_its_kernels_the_projection_runs_as_plain_pytorch(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from pixelfly_compiler.kernels import projection_gpu

    projector, weight = Projector.of(flat_butterfly(64, 96, 16, 1), 16, torch.device("cpu")), torch.randn(64, 96)
    blocks, u = projector.project(weight, torch.float32)
    monkeypatch.setattr(projection_gpu, "_failures", [])
    monkeypatch.setattr(projection_gpu, "gpu_of", lambda device: KNOWN["cuda:90"])  # which is not there
    monkeypatch.setattr(Projector, "native", lambda *args: None if projection_gpu._failures else projection_gpu)
    again = projector.project(weight, torch.float32)
    torch.testing.assert_close(again, (blocks, u))
    assert "without its Triton kernels" in caplog.text and not projection_gpu.applies(projector, weight, torch.float32)


@pytest.mark.parametrize("gpu", KNOWN.values(), ids=lambda gpu: gpu.target)
@pytest.mark.parametrize(("itemsize", "exact"), [(2, False), (4, True), (4, False)])
@pytest.mark.parametrize("size", [16, 32, 64, 128])
@pytest.mark.parametrize("rows", [1, 64, 4096])
def test_every_launch_fits_its_gpu(gpu: Gpu, itemsize: int, exact: bool, size: int, rows: int) -> None:
    shape = LinearShape(rows, 1024, 4096, size, size, 128, itemsize, exact, tma=gpu.has_tma)
    for launch in linear_launches(shape, gpu):
        assert launch.shared_memory(itemsize, 128) <= gpu.shared_memory
        assert launch.block_n <= size and (launch.groups == 1 or launch.block_n == size)
        assert launch.programs == 0 or launch.block_k <= size
        assert launch.groups in (1, 2, 4) and launch.stages >= 1 and launch.warps in (1, 2, 4, 8)
    grad = GradShape(rows, 4096 // size, 4 * 4096 // size, size, size, itemsize, exact, gpu.has_tma)
    for other in block_grad_launches(grad, gpu):
        assert other.shared_memory(grad) <= gpu.shared_memory and other.split <= max(rows // 512, 1)
