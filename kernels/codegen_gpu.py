"""GPU code for a graph, on a machine without the GPU: Inductor's own way up to the point where it would load the code.

    aten graph on the CPU  --`to_device`-->  the same graph on cuda:0  --compile_fx_inner on a virtual device-->  `Code`

The graph is traced on the CPU because autograd needs a real device (a CPU build of torch cannot run a CUDA backward,
not even on fake tensors). From AOTAutograd on, nothing is different from a machine that has the GPU.
"""

from __future__ import annotations

import ast
import contextlib
import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch._inductor import config as inductor_config
from torch._subclasses.fake_tensor import FakeTensor, in_kernel_invocation_manager
from torch.fx import GraphModule, Node
from torch.fx.node import map_aggregate
from torch.utils._pytree import tree_map_only

from pixelfly_compiler.kernels import templates_gpu
from pixelfly_compiler.kernels.gpus import Gpu
from pixelfly_compiler.kernels.virtual_device import virtual_device

_GPU = torch.device("cuda", 0)
_PASSING = re.compile(r"^# (?:AOT ID|kernel path): .*\n", re.MULTILINE)  # a count of compilations, scratch files


@dataclass(frozen=True)
class Code:
    """What Inductor made of one graph: the wrapper's source, and by kernel name the Triton source of each kernel.

    `nodes`: for our kernels, the graph's nodes that they compute: several, if layers share a kernel.
    """

    wrapper: str
    kernels: dict[str, str]
    nodes: dict[str, tuple[Node, ...]] = field(repr=False)
    graph: GraphModule = field(repr=False)


def generate(gm: GraphModule, example_inputs: Sequence[Any], gpu: Gpu, **kwargs: Any) -> Code:
    """The code of `gm`, a graph as AOTAutograd hands it to Inductor, for `gpu`. `kwargs`: compile_fx_inner's."""
    from torch._inductor.compile_fx import compile_fx_inner

    computed: dict[str, tuple[Node, ...]] = {}

    def listen(name: str, origins: tuple[Node, ...]) -> None:
        # Through views Inductor also counts what computed the operands; the kernel's own node is the last of them.
        ours = sorted(node for node in origins if getattr(node.target, "namespace", None) == "pixelfly")
        computed[name] = (*computed.get(name, ()), *ours[-1:])

    moved, inputs = to_device(gm, example_inputs)
    with virtual_device(gpu), _untuned(), _not_loaded() as wrappers, _listening(listen):
        compile_fx_inner(moved, inputs, **kwargs)
    wrapper = _PASSING.sub("", wrappers[0]) if wrappers else ""
    return Code(wrapper, _kernels(wrapper), computed, gm)


# ------------------------------------------------------------------------------------------------------ to the device


def to_device(gm: GraphModule, example_inputs: Sequence[Any]) -> tuple[GraphModule, list[Any]]:
    """The graph with cuda:0 in place of the CPU, in its nodes' arguments and in their fake values; `gm` is changed, and
    so are the branches and loops inside of it.

    Operators are not run again here: behind a convolution, whose output a GPU lays out otherwise, there are views that
    only the CPU's layout allows. Inductor runs them, after it has made reshapes of views.
    """
    moved = _Moved()
    inputs = tree_map_only(FakeTensor, moved, list(example_inputs))
    for module in (module for module in gm.modules() if isinstance(module, GraphModule)):
        for node in list(module.graph.nodes):
            if node.op == "get_attr":
                _move_constant(node, getattr(module, str(node.target), None))
            else:
                node.args, node.kwargs = map_aggregate(node.args, _device), map_aggregate(node.kwargs, _device)
                node.meta["val"] = tree_map_only(FakeTensor, moved, node.meta.get("val"))
        module.recompile()
    return gm, inputs


def _device(value: Any) -> Any:
    return _GPU if isinstance(value, torch.device) and value.type == "cpu" else value


def _move_constant(node: Node, constant: Any) -> None:
    """Constants with dimensions must be where the others are; numbers may stay on the CPU.

    Of the operators only `lift_fresh_copy` takes a real tensor among fake ones, as Inductor runs them again; what it
    gives is a fake one, which `device_put` may take.
    """
    if not isinstance(constant, Tensor) or constant.dim() == 0:
        return
    with node.graph.inserting_after(node):
        lifted = node.graph.call_function(torch.ops.aten.lift_fresh_copy.default, (node,))
    with node.graph.inserting_after(lifted):
        copy = node.graph.call_function(torch.ops.prims.device_put.default, (lifted, _GPU))
    node.replace_all_uses_with(copy, delete_user_cb=lambda user: user is not lifted)


class _Moved:
    """The fake value on cuda:0 that stands for one on the CPU, once for each. They share what those shared: Inductor
    decides by the storages what it may overwrite.
    """

    def __init__(self) -> None:
        self.made: dict[int, tuple[FakeTensor, FakeTensor]] = {}

    def __call__(self, value: FakeTensor) -> FakeTensor:
        if value.device.type != "cpu":
            return value
        if id(value) not in self.made:
            with in_kernel_invocation_manager(value.fake_mode):
                self.made[id(value)] = value, FakeTensor(value.fake_mode, value, _GPU)
        return self.made[id(value)][1]


# ------------------------------------------------------------------------------------------- around Inductor's compile


@contextlib.contextmanager
def _untuned() -> Iterator[None]:
    """Code is made anew, by rules alone: nothing can be timed."""
    settings = {"fx_graph_cache": False, "fx_graph_remote_cache": False, "triton.cudagraphs": False}
    untuned = {"max_autotune": False, "max_autotune_gemm": False, "max_autotune_pointwise": False}
    with warnings.catch_warnings(), inductor_config.patch(settings | untuned):
        # Inductor's advice to switch tf32 on is for whoever runs the code.
        warnings.filterwarnings("ignore", "TensorFloat32 tensor cores")
        yield


@contextlib.contextmanager
def _not_loaded() -> Iterator[list[str]]:
    """The list gets the wrapper's source; its module, which would load the kernels, is not run. Constants stay here."""
    from torch._inductor.graph import GraphLowering

    wrappers: list[str] = []

    def compile_to_module(graph: Any) -> Any:
        code = graph.codegen()[0]
        wrappers.append(code.value if hasattr(code, "value") else code)
        return SimpleNamespace(call=_not_here)

    with (
        patch.object(GraphLowering, "compile_to_module", compile_to_module),
        patch.object(GraphLowering, "constant_name", lambda graph, name, device_override: name),
    ):
        yield wrappers


def _not_here(*args: Any) -> Any:
    raise RuntimeError("this code was generated for a GPU that is not here")


@contextlib.contextmanager
def _listening(listen: Any) -> Iterator[None]:
    templates_gpu.listeners.append(listen)
    try:
        yield
    finally:
        templates_gpu.listeners.remove(listen)


def _kernels(wrapper: str) -> dict[str, str]:
    """Kernel name -> source, from the wrapper's `name = async_compile.triton("name", source, ...)`."""
    found: dict[str, str] = {}
    for call in (node for node in ast.walk(ast.parse(wrapper)) if isinstance(node, ast.Assign)):
        value = call.value
        if isinstance(value, ast.Call) and ast.unparse(value.func) == "async_compile.triton":
            found[ast.unparse(call.targets[0])] = ast.literal_eval(value.args[1])
    return found
