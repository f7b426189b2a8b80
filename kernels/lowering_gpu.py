"""GPU lowerings: each `pixelfly::` operator becomes a TorchInductor Triton template, with pointwise epilogues fused.

The Triton itself is in `templates/`, launch parameters are made in `heuristics_gpu`. By default the launch predicted
best is compiled; with Inductor's `max_autotune` several are timed, and the dense matmul of the densified weight too.
What is a thin dense product (t = x v, the gradients of u and v) is a library matmul.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._inductor import config as inductor_config
from torch._inductor import ir

# Before the templates: Inductor's own import order, another one is circular.
from torch._inductor.lowering import lowerings as L  # isort: skip
from torch._inductor.ir import FixedLayout, TensorBox
from torch._inductor.select_algorithm import (
    ExternKernelChoice,
    SymbolicGridFn,
    TritonTemplate,
    TritonTemplateKernel,
    autotune_select_algorithm,
)
from torch._inductor.utils import can_use_tma, sympy_product
from torch._inductor.virtualized import V

from pixelfly_compiler.kernels import reference
from pixelfly_compiler.kernels.compat import fuse_through_views, size_hint
from pixelfly_compiler.kernels.epilogue import epilogue_weight
from pixelfly_compiler.kernels.gpus import Gpu, gpu_of
from pixelfly_compiler.kernels.heuristics_gpu import (
    GradShape,
    LinearShape,
    block_grad_launches,
    linear_launches,
)
from pixelfly_compiler.kernels.ir_inputs import contiguous, is_static, row_major
from pixelfly_compiler.kernels.reference import SupportIndex
from pixelfly_compiler.kernels.support import Support

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_BLOCKS = (16, 32, 64, 128)

# ---------------------------------------------------------------------------------------------------------- templates


@SymbolicGridFn
def _linear_grid(rows: Any, features: Any, meta: dict[str, Any], *, cdiv: Any) -> tuple[Any, int, int]:
    return cdiv(rows, meta["BLOCK_M"]) * cdiv(features, meta["GROUPS"] * meta["BLOCK_N"]), 1, 1


@SymbolicGridFn
def _persistent_grid(rows: Any, features: Any, meta: dict[str, Any], *, cdiv: Any, min: Any) -> tuple[Any, int, int]:
    tiles = cdiv(rows, meta["BLOCK_M"]) * cdiv(features, meta["GROUPS"] * meta["BLOCK_N"])
    return min(tiles, meta["PROGRAMS"]), 1, 1


@SymbolicGridFn
def _block_grad_grid(_slots: Any, _b_out: Any, _b_in: Any, meta: dict[str, Any]) -> tuple[Any, int, int]:
    return meta["SPLIT"] * meta["BLOCK_ROWS"] * meta["GRID_G"], 1, 1


class _Kernel(TritonTemplateKernel):
    """Tells those who listen which kernel computes which node of the graph."""

    def call_kernel(self, name: str, *args: Any, **kwargs: Any) -> Any:
        for listen in listeners:
            listen(name, tuple(self.output_node.origins))
        return super().call_kernel(name, *args, **kwargs)


class _Template(TritonTemplate):
    kernel_type = _Kernel


listeners: list[Callable[[str, tuple[torch.fx.Node, ...]], None]] = []


_GRIDS = {
    "linear": _linear_grid,
    "linear_tma": _persistent_grid,
    "block_grad": _block_grad_grid,
    "block_grad_tma": _block_grad_grid,
}


@cache
def _template(name: str) -> TritonTemplate:
    fuse_through_views()
    grid = _GRIDS[name]
    source = (Path(__file__).parent / "templates" / f"{name}.py.jinja").read_text()
    return _Template(f"pixelfly_{name}", grid, source)


class _Variant(NamedTuple):
    """A launch: the template's name and its constants, warps and stages."""

    template: str
    constants: dict[str, Any]
    warps: int
    stages: int


def _call(
    name: str,
    inputs: Sequence[ir.IRNode],
    layout: FixedLayout,
    variants: Sequence[_Variant],
    shape: SupportIndex,
    dense: Any = None,
) -> TensorBox:
    """The output of operator `name` by its first variant, or by the fastest with autotuning.

    The last input is the index of a support of this shape.
    """
    tuned = bool(inductor_config.max_autotune or inductor_config.max_autotune_gemm)
    choices: list[Any] = []
    failure: Exception | None = None
    for template, constants, warps, stages in variants if tuned else variants[:1]:
        error = _template(template).maybe_append_choice(
            choices, input_nodes=tuple(inputs), layout=layout, num_warps=warps, num_stages=stages, **constants
        )
        failure = failure or error
    if not choices:
        raise RuntimeError(f"no launch of the {name} kernel is valid") from failure
    if tuned and dense is not None:
        choices.append(dense)
    # The index must be a valid one while kernels are timed: it is what they read the addresses from.
    fake_index = {len(inputs) - 1: partial(_example_index, shape)}
    chosen = autotune_select_algorithm(f"pixelfly_{name}", choices, list(inputs), layout, input_gen_fns=fake_index)
    return chosen[0] if isinstance(chosen, tuple) else chosen  # a pair since torch 2.12


def _example_index(shape: SupportIndex, index: ir.Buffer) -> Tensor:
    """The index of a balanced support of this shape: for timing."""
    rows, cols, nnz = shape.block_rows, shape.block_cols, shape.nnz
    each = -(-nnz // rows)
    places = [(place // each, (place // each + place % each) % cols) for place in range(nnz)]
    crow, col = zip(*places, strict=True)
    return SupportIndex.pack(Support.from_coordinates(rows, cols, 1, crow, col)).to(index.get_device())


def _precision(dtype: torch.dtype) -> str:
    tf32 = dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32
    return "tf32" if tf32 or dtype != torch.float32 else "ieee"


def _rows_hint(rows: Any) -> int:
    return max(size_hint(rows, fallback=4096), 1)


# ------------------------------------------------------------------------------------------------------------- linear


def lower_linear(
    x: TensorBox,
    blocks: TensorBox,
    u: TensorBox | None,
    v: TensorBox | None,
    index: TensorBox | None,
    features: int,
    transposed: bool,
    bias: TensorBox | None = None,
) -> tuple[TensorBox, TensorBox] | None:
    """(y, t), or None where the template does not apply. The scheduler fuses the bias, as any epilogue."""
    *lead, k = x.get_size()
    nnz, b_out, b_in = blocks.get_size()
    rank = 0 if v is None else v.get_size()[1]
    if index is None or x.get_dtype() not in _DTYPES or not is_static(k, nnz, b_out, b_in, rank, features):
        return None
    if b_out not in _BLOCKS or b_in not in _BLOCKS or nnz == 0:
        return None
    rows = sympy_product(lead)
    view, device = L[torch.ops.aten.view], x.get_device()
    x = row_major(view(x, [rows, k]))
    inputs = {"x": x, "blocks": contiguous(blocks)}
    if rank:
        t = L[torch.ops.aten.mm](x, v)
        inputs |= {"t": contiguous(t), "u": contiguous(u)}
    else:
        t = L[torch.ops.aten.empty.memory_format]([rows, 0], dtype=x.get_dtype(), device=device, layout=torch.strided)
    inputs["index"] = contiguous(index)
    layout = FixedLayout(device, x.get_dtype(), [rows, features])
    constants = _linear_constants(x, int(nnz), int(b_out), int(b_in), int(rank), int(features), transposed)
    shape = LinearShape(
        _rows_hint(rows),
        int(k),
        int(features),
        constants["BK"],
        constants["BN"],
        int(rank),
        x.get_dtype().itemsize,
        exact=constants["PRECISION"] == "'ieee'",
        epilogue=epilogue_weight(V.graph.current_node),
        tma=_can_use_tma(*list(inputs.values())[:-1]),
    )
    variants = []
    for launch in linear_launches(shape, gpu_of(device)):
        tile = {key.upper(): value for key, value in asdict(launch).items() if key not in ("warps", "stages")}
        template = "linear_tma" if launch.programs else "linear"
        constants_of = constants | tile | _backend_options(gpu_of(device))
        variants.append(_Variant(template, constants_of, launch.warps, launch.stages))
    dense = dense_choice().bind(
        list(inputs.values()), layout, features=int(features), transposed=transposed, rank=int(rank)
    )
    out_features, in_features = (k, features) if transposed else (features, k)
    support = SupportIndex.shape_of(None, int(out_features), int(in_features), int(b_out), int(b_in))
    y = _call("linear", list(inputs.values()), layout, variants, replace(support, nnz=int(nnz)), dense)
    y = view(y, [*lead, features])
    if bias is not None:
        y = L[torch.ops.aten.add](y, bias)
    return y, view(t, [*lead, rank])


def _linear_constants(
    x: TensorBox, nnz: int, b_out: int, b_in: int, rank: int, features: int, transposed: bool
) -> dict[str, Any]:
    k = int(x.get_size()[1])
    block_k, block_n = (b_out, b_in) if transposed else (b_in, b_out)
    block_rows = -(-(k if transposed else features) // b_out)
    block_cols = -(-(features if transposed else k) // b_in)
    crow_t = block_rows + 1 + 2 * nnz
    return {
        "N": features,
        "K": k,
        "BK": block_k,
        "BN": block_n,
        "RANK": rank,
        "LDX": int(x.get_stride()[0]),
        "TRANSPOSED": transposed,
        "EVEN_K": k % block_k == 0,
        "CROW_AT": crow_t if transposed else 0,
        "COL_AT": crow_t + block_cols + 1 if transposed else block_rows + 1,
        "SLOT_AT": crow_t + block_cols + 1 + nnz if transposed else 0,
        "PRECISION": repr(_precision(x.get_dtype())),
    }


def _can_use_tma(*operands: TensorBox) -> bool:
    """TMA asks for rows that begin at multiples of 16 bytes."""
    if not gpu_of(operands[0].get_device()).has_tma:
        return False
    offsets = (operand.get_layout().offset * operand.get_dtype().itemsize for operand in operands)
    aligned = all(V.graph.sizevars.statically_known_multiple_of(offset, 16) for offset in offsets)
    return aligned and can_use_tma(*operands)


def _backend_options(gpu: Gpu) -> dict[str, int]:
    """AMD's compiler takes its own."""
    return {"matrix_instr_nonkdim": 16, "waves_per_eu": 0, "kpack": 1} if gpu.backend == "hip" else {}


def _dense_linear(x: Tensor, blocks: Tensor, *rest: Tensor, features: int, transposed: bool, rank: int) -> Tensor:
    """The same product with the dense weight, for autotuning to compare with."""
    index = rest[-1]
    out_features, in_features = (x.shape[1], features) if transposed else (features, x.shape[1])
    weight = reference.scatter(blocks, index, out_features, in_features)
    y = x @ (weight if transposed else weight.mT)
    return torch.addmm(y, rest[0], rest[1].mT) if rank else y


@cache
def dense_choice() -> ExternKernelChoice:
    """Registers the dense product under the name by which generated code calls it, once."""
    return ExternKernelChoice(_dense_linear, name="pixelfly_dense_linear", has_out_variant=False)


# --------------------------------------------------------------------------------------------------------- block_grad


def lower_block_grad(
    a: TensorBox, x: TensorBox, t: TensorBox | None, index: TensorBox | None, b_out: int, b_in: int
) -> tuple[TensorBox, TensorBox] | None:
    """The gradients of blocks and u, or None where the template does not apply."""
    blocks = _lower_blocks(a, x, index, b_out, b_in)
    if blocks is None:
        return None
    if t is not None:
        return blocks, L[torch.ops.aten.mm](L[torch.ops.aten.permute](a, [1, 0]), t)
    none = L[torch.ops.aten.empty.memory_format](
        [a.get_size()[1], 0], dtype=a.get_dtype(), device=a.get_device(), layout=torch.strided
    )
    return blocks, none


def _lower_blocks(a: TensorBox, x: TensorBox, index: TensorBox | None, b_out: int, b_in: int) -> TensorBox | None:
    rows, out_features = a.get_size()
    in_features = x.get_size()[1]
    if x.get_dtype() not in _DTYPES or a.get_dtype() != x.get_dtype() or not is_static(out_features, in_features):
        return None
    if index is None:
        return _every_block(a, x, b_out, b_in)
    block_rows, block_cols = -(-int(out_features) // b_out), -(-int(in_features) // b_in)
    nnz = (int(index.get_size()[0]) - block_rows - block_cols - 2) // 4
    if b_out not in _BLOCKS or b_in not in _BLOCKS or nnz == 0:
        return None
    a, x = row_major(a), row_major(x)
    device, dtype = x.get_device(), x.get_dtype()
    constants = {
        "OUT": int(out_features),
        "IN": int(in_features),
        "B_OUT": b_out,
        "B_IN": b_in,
        "NNZ": nnz,
        "BLOCK_ROWS": block_rows,
        "LDA": int(a.get_stride()[0]),
        "LDX": int(x.get_stride()[0]),
        "EVEN_OUT": int(out_features) % b_out == 0,
        "EVEN_IN": int(in_features) % b_in == 0,
        "COL_AT": block_rows + 1,
        "PRECISION": repr(_precision(dtype)),
    }
    exact = _precision(dtype) == "ieee"
    shape = GradShape(_rows_hint(rows), block_rows, nnz, b_out, b_in, dtype.itemsize, exact, _can_use_tma(a, x))
    launches = block_grad_launches(shape, gpu_of(device))
    split = launches[0].split  # part of the output's shape, so not a choice
    variants = []
    for launch in launches:
        if launch.split == split:
            tile = {
                "PACK": launch.pack,
                "BLOCK_M": launch.block_m,
                "SPLIT": split,
                "GRID_G": -(-shape.per_row // launch.pack),
            }
            template = "block_grad_tma" if launch.tma else "block_grad"
            constants_of = constants | tile | _backend_options(gpu_of(device))
            variants.append(_Variant(template, constants_of, launch.warps, launch.stages))
    layout = FixedLayout(device, dtype if split == 1 else torch.float32, [split * nnz, b_out, b_in])
    support = SupportIndex(block_rows, block_cols, nnz)
    parts = _call("block_grad", [a, x, contiguous(index)], layout, variants, support)
    if split == 1:
        return parts
    total = L[torch.ops.aten.sum](L[torch.ops.aten.view](parts, [split, nnz, b_out, b_in]), [0])
    return L[torch.ops.prims.convert_element_type](total, dtype)


def _every_block(a: TensorBox, x: TensorBox, b_out: int, b_in: int) -> TensorBox:
    """A block gradient whose blocks are all kept is a dense product, cut into blocks."""
    product = L[torch.ops.aten.mm](L[torch.ops.aten.permute](a, [1, 0]), x)
    out_features, in_features = map(int, product.get_size())
    pads = [0, -in_features % b_in, 0, -out_features % b_out]
    if any(pads):
        product = L[torch.ops.aten.constant_pad_nd](product, pads, 0)
    rows, cols = -(-out_features // b_out), -(-in_features // b_in)
    tiles = L[torch.ops.aten.view](product, [rows, b_out, cols, b_in])
    tiles = L[torch.ops.aten.permute](tiles, [0, 2, 1, 3])
    return L[torch.ops.aten.reshape](tiles, [rows * cols, b_out, b_in])
