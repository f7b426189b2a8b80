"""What the GPU lowerings share: the Triton templates, and how an operator's output comes of one.

The Triton itself is in `templates/`, launch parameters are made in `heuristics_gpu`. By default the launch predicted
best is compiled; with Inductor's `max_autotune` several are timed, and the dense matmul of the densified weight too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor
from torch._inductor import config as inductor_config
from torch._inductor import ir

# Before the templates: Inductor's own import order, another one is circular.
from torch._inductor.lowering import lowerings as L  # isort: skip  # noqa: F401
from torch._inductor.ir import FixedLayout, TensorBox
from torch._inductor.select_algorithm import (
    SymbolicGridFn,
    TritonTemplate,
    TritonTemplateKernel,
    autotune_select_algorithm,
)
from torch._inductor.utils import can_use_tma
from torch._inductor.virtualized import V

from pixelfly_compiler.kernels.compat import fuse_through_views, size_hint
from pixelfly_compiler.kernels.epilogue import epilogue_weight
from pixelfly_compiler.kernels.gpus import Gpu, gpu_of
from pixelfly_compiler.kernels.heuristics_gpu import power_of_two
from pixelfly_compiler.kernels.reference import SupportIndex
from pixelfly_compiler.kernels.support import Support

BLOCKS = (16, 32, 64, 128)

listeners: list[Callable[[str, tuple[torch.fx.Node, ...]], None]] = []


class _Kernel(TritonTemplateKernel):
    """Tells those who listen which kernel computes which node of the graph."""

    def call_kernel(self, name: str, *args: Any, **kwargs: Any) -> Any:
        for listen in listeners:
            listen(name, tuple(self.output_node.origins))
        return super().call_kernel(name, *args, **kwargs)


class _Template(TritonTemplate):
    kernel_type = _Kernel


@SymbolicGridFn
def _linear_grid(rows: Any, features: Any, meta: dict[str, Any], *, cdiv: Any) -> tuple[Any, int, int]:
    across, matrices = cdiv(features, meta["GROUPS"] * meta["BLOCK_N"]), meta["MATRICES"]
    if meta["ENDS_GIVEN"]:  # at most: the last tile of each matrix need not be full
        return (cdiv(rows, meta["BLOCK_M"]) + matrices) * across, 1, 1
    return max(matrices, 1) * cdiv(rows // max(matrices, 1), meta["BLOCK_M"]) * across, 1, 1


@SymbolicGridFn
def _persistent_grid(rows: Any, features: Any, meta: dict[str, Any], *, cdiv: Any, min: Any) -> tuple[Any, int, int]:
    tiles = cdiv(rows, meta["BLOCK_M"]) * cdiv(features, meta["GROUPS"] * meta["BLOCK_N"])
    return min(tiles, meta["PROGRAMS"]), 1, 1


@SymbolicGridFn
def _block_grad_grid(_slots: Any, _b_out: Any, _b_in: Any, meta: dict[str, Any]) -> tuple[Any, int, int]:
    return meta["SPLIT"] * meta["BLOCK_ROWS"] * meta["GRID_G"], 1, 1


_GRIDS = {
    "linear": _linear_grid,
    "linear_tma": _persistent_grid,
    "block_grad": _block_grad_grid,
    "block_grad_tma": _block_grad_grid,
}


@cache
def _template(name: str) -> TritonTemplate:
    fuse_through_views()
    source = (Path(__file__).parent / "templates" / f"{name}.py.jinja").read_text()
    return _Template(f"pixelfly_{name}", _GRIDS[name], source)


class Variant(NamedTuple):
    """A launch: the template's name and its constants, warps and stages."""

    template: str
    constants: dict[str, Any]
    warps: int
    stages: int


def by_template(
    name: str,
    inputs: dict[str, TensorBox],
    layout: FixedLayout,
    variants: Sequence[Variant],
    support: SupportIndex | None = None,
    dense: Any = None,
    fitted: Callable[[float], Variant] | None = None,
) -> TensorBox:
    """The output of operator `name` by its first variant, or by the fastest with autotuning.

    `support`: the shape of the one in the inputs, if there is one. `fitted`: in place of the first variant, when it is
    known what is fused behind it, that for this weight of the epilogue.
    """
    tuned = bool(inductor_config.max_autotune or inductor_config.max_autotune_gemm)
    nodes = list(inputs.values())

    def append(choices: list[Any], variant: Variant) -> Exception | None:
        template, constants, warps, stages = variant
        constants = constants | _backend_options(gpu_of(layout.device))
        return _template(template).maybe_append_choice(
            choices, input_nodes=tuple(nodes), layout=layout, num_warps=warps, num_stages=stages, **constants
        )

    choices: list[Any] = []
    failures = [append(choices, variant) for variant in (variants if tuned else variants[:1])]
    if not choices:
        raise RuntimeError(f"no launch of the {name} kernel is valid") from next(filter(None, failures), None)
    if tuned and dense is not None:
        choices.append(dense)
    # What kernels read addresses from must be valid while they are timed.
    examples = {
        "index": partial(_example_index, support),
        "ends": partial(_example_ends, rows_hint(inputs["x"].get_size()[0])),
    }
    made = {place: examples[key] for place, key in enumerate(inputs) if key in examples}
    chosen = autotune_select_algorithm(f"pixelfly_{name}", choices, nodes, layout, input_gen_fns=made)
    y = chosen[0] if isinstance(chosen, tuple) else chosen  # a pair since torch 2.12
    if fitted is not None and not tuned:
        _fit_when_fused(y.data.data, variants[0], fitted, append)
    return y


def _fit_when_fused(
    product: Any, first: Variant, fitted: Callable[[float], Variant], append: Callable[[list[Any], Variant], Any]
) -> None:
    """Inductor asks the output of a template for its kernel when it has fused what follows."""
    render_first = product.make_kernel_render

    def make_kernel_render(output: ir.Buffer, *args: Any, **kwargs: Any) -> Any:
        variant, choices = fitted(epilogue_weight(output)), list[Any]()
        if variant != first:
            with patch.object(V.graph, "scheduler", None):  # it does not know the output that a choice is tried with
                append(choices, variant)
        render = choices[0].make_kernel_render if choices else render_first
        return render(output, *args, **kwargs)

    product.make_kernel_render = make_kernel_render


def _example_index(shape: SupportIndex, index: ir.Buffer) -> Tensor:
    """The index of a balanced support of this shape: for timing."""
    rows, cols, nnz = shape.block_rows, shape.block_cols, shape.nnz
    each = -(-nnz // rows)
    places = [(place // each, (place // each + place % each) % cols) for place in range(nnz)]
    crow, col = zip(*places, strict=True)
    return SupportIndex.pack(Support.from_coordinates(rows, cols, 1, crow, col)).to(index.get_device())


def _example_ends(rows: int, ends: ir.Buffer) -> Tensor:
    """Where the rows of each matrix end if all have as many."""
    matrices = int(ends.get_size()[0])
    made = torch.arange(1, matrices + 1, dtype=torch.int32) * (rows // matrices)
    return made.to(ends.get_device())


def _backend_options(gpu: Gpu) -> dict[str, int]:
    """AMD's compiler takes its own."""
    return {"matrix_instr_nonkdim": 16, "waves_per_eu": 0, "kpack": 1} if gpu.backend == "hip" else {}


def precision_of(dtype: torch.dtype) -> str:
    tf32 = dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32
    return "tf32" if tf32 or dtype != torch.float32 else "ieee"


def rows_hint(rows: Any, matrices: int = 0) -> int:
    """The likely number of rows, or of those that each of several matrices meets."""
    return max(size_hint(rows, fallback=4096) // max(matrices, 1), 1)


def of_matrices(matrices: int, ends: TensorBox | None) -> dict[str, Any]:
    """What templates must know of a weight of several matrices; 0: of one."""
    stretches = power_of_two(matrices + 1)  # of rows: those behind the last end are one too
    return {"MATRICES": matrices, "ENDS_GIVEN": ends is not None, "STRETCHES": stretches}


def is_ready_for_tma(*operands: TensorBox) -> bool:
    """TMA asks for rows that begin at multiples of 16 bytes."""
    if not gpu_of(operands[0].get_device()).has_tma:
        return False
    offsets = (operand.get_layout().offset * operand.get_dtype().itemsize for operand in operands)
    aligned = all(V.graph.sizevars.statically_known_multiple_of(offset, 16) for offset in offsets)
    return aligned and can_use_tma(*operands)
