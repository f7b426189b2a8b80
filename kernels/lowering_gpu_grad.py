"""`pixelfly::block_grad` and `pixelfly::grouped_block_grad` on a GPU, as a Triton template.

Where every block is kept, and for u, whose gradient is a thin dense product, it is a library matmul.
"""

from __future__ import annotations

from typing import Any

import torch

# Before the templates: Inductor's own import order, another one is circular.
from torch._inductor.lowering import lowerings as L  # isort: skip
from torch._inductor.ir import FixedLayout, TensorBox

from pixelfly_compiler.kernels.gpus import gpu_of
from pixelfly_compiler.kernels.heuristics_gpu import GradLaunch, GradShape, block_grad_launches, power_of_two
from pixelfly_compiler.kernels.ir_inputs import are_int32, contiguous, empty, is_static, row_major
from pixelfly_compiler.kernels.ops import DTYPES
from pixelfly_compiler.kernels.reference import SupportIndex
from pixelfly_compiler.kernels.templates_gpu import (
    BLOCKS,
    Variant,
    by_template,
    is_ready_for_tma,
    of_matrices,
    precision_of,
    rows_hint,
)


def lower_block_grad(
    a: TensorBox, x: TensorBox, t: TensorBox | None, index: TensorBox | None, b_out: int, b_in: int
) -> tuple[TensorBox, TensorBox] | None:
    """The gradients of blocks and u, or None where the template does not apply."""
    blocks = _lower_blocks(a, x, index, b_out, b_in)
    if blocks is None:
        return None
    if t is not None:
        return blocks, L[torch.ops.aten.mm](L[torch.ops.aten.permute](a, [1, 0]), t)
    return blocks, empty(a, [a.get_size()[1], 0])


def lower_grouped_block_grad(
    a: TensorBox,
    x: TensorBox,
    t: TensorBox | None,
    ends: TensorBox | None,
    index: TensorBox | None,
    groups: int,
    b_out: int,
    b_in: int,
) -> tuple[TensorBox, TensorBox] | None:
    """The gradients of blocks and u of each group, or None where the template does not apply."""
    out_features, in_features = a.get_size()[1], x.get_size()[1]
    if not is_static(out_features, in_features) or not are_int32(ends) or not _are_operands(a, x):
        return None
    view = L[torch.ops.aten.view]
    if index is None:
        if b_in != in_features or b_out not in BLOCKS:
            return None
        rows_of_blocks = _whole_grads(a, x, ends, groups, b_out)
        block_rows = -(-int(out_features) // b_out)
        return view(rows_of_blocks, [groups, block_rows, b_out, b_in]), empty(a, [groups, out_features, 0])
    stacked = _lower_blocks(a, x, index, b_out, b_in, matrices=groups, ends=ends)
    if stacked is None:
        return None
    blocks = view(stacked, [groups, int(stacked.get_size()[0]) // groups, b_out, b_in])
    if t is None:
        return blocks, empty(a, [groups, out_features, 0])
    rank = int(t.get_size()[1])
    whole = _whole_grads(a, t, ends, groups, 64 if out_features >= 64 else 16)
    gu = view(whole, [groups, int(whole.get_size()[0]) // groups * int(whole.get_size()[1]), rank])
    return blocks, L[torch.ops.aten.slice](gu, 1, 0, out_features)


def _are_operands(a: TensorBox, x: TensorBox) -> bool:
    return x.get_dtype() in DTYPES and a.get_dtype() == x.get_dtype()


def _whole_grads(a: TensorBox, x: TensorBox, ends: TensorBox | None, matrices: int, b_out: int) -> TensorBox:
    """a^T x of each group, cut into blocks of b_out rows: (groups * block rows, b_out, in)."""
    block_rows, in_features = -(-int(a.get_size()[1]) // b_out), int(x.get_size()[1])
    return _grads(a, x, None, ends, matrices, SupportIndex(block_rows, 1, block_rows), b_out, in_features)


def _lower_blocks(
    a: TensorBox,
    x: TensorBox,
    index: TensorBox | None,
    b_out: int,
    b_in: int,
    *,
    matrices: int = 0,
    ends: TensorBox | None = None,
) -> TensorBox | None:
    out_features, in_features = a.get_size()[1], x.get_size()[1]
    if not _are_operands(a, x) or not is_static(out_features, in_features):
        return None
    if index is None:
        return _every_block(a, x, b_out, b_in)
    support = SupportIndex.of_length(int(index.get_size()[0]), int(out_features), int(in_features), b_out, b_in)
    if b_out not in BLOCKS or b_in not in BLOCKS or support.nnz == 0:
        return None
    return _grads(a, x, index, ends, matrices, support, b_out, b_in)


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


def _grads(
    a: TensorBox,
    x: TensorBox,
    index: TensorBox | None,
    ends: TensorBox | None,
    matrices: int,
    support: SupportIndex,
    b_out: int,
    b_in: int,
) -> TensorBox:
    """The kept blocks of a^T x, or without `index` whole rows of them; stacked if there are several matrices."""
    a, x, whole = row_major(a), row_major(x), index is None
    in_features, device, dtype = int(x.get_size()[1]), x.get_device(), x.get_dtype()
    width = min(max(power_of_two(in_features), 64), 128) if whole else b_in  # of a tile's block
    inputs = {"a": a, "x": x} | ({} if ends is None else {"ends": contiguous(ends)})
    inputs |= {} if index is None else {"index": contiguous(index)}
    shape = GradShape(
        rows_hint(x.get_size()[0], matrices),
        support.block_rows,
        support.nnz,
        b_out,
        width,
        dtype.itemsize,
        exact=precision_of(dtype) == "ieee",
        tma=not matrices and is_ready_for_tma(a, x),
        matrices=max(matrices, 1),
    )
    launches = block_grad_launches(shape, gpu_of(device))
    split = launches[0].split  # part of the output's shape, so not a choice
    constants = _constants(inputs, support, b_out, width) | of_matrices(matrices, ends)
    constants |= {"DENSE": whole, "SPLIT": matrices or split}
    across = -(-in_features // width) if whole else shape.per_row
    variants = [_variant(constants, launch, across) for launch in launches if launch.split == split]
    parts = max(matrices, 1) * split
    layout = FixedLayout(device, dtype if split == 1 else torch.float32, [parts * support.nnz, b_out, b_in])
    found = by_template("block_grad", inputs, layout, variants, support)
    if split == 1:
        return found
    total = L[torch.ops.aten.sum](L[torch.ops.aten.view](found, [split, support.nnz, b_out, b_in]), [0])
    return L[torch.ops.prims.convert_element_type](total, dtype)


def _constants(inputs: dict[str, TensorBox], support: SupportIndex, b_out: int, width: int) -> dict[str, Any]:
    a, x = inputs["a"], inputs["x"]
    out_features, in_features = int(a.get_size()[1]), int(x.get_size()[1])
    return {
        "OUT": out_features,
        "IN": in_features,
        "B_OUT": b_out,
        "B_IN": width,
        "NNZ": support.nnz,
        "BLOCK_ROWS": support.block_rows,
        "LDA": int(a.get_stride()[0]),
        "LDX": int(x.get_stride()[0]),
        "EVEN_OUT": out_features % b_out == 0,
        "EVEN_IN": in_features % width == 0,
        "COL_AT": support.block_rows + 1,
        "PRECISION": repr(precision_of(x.get_dtype())),
    }


def _variant(constants: dict[str, Any], launch: GradLaunch, across: int) -> Variant:
    """`across`: how many blocks of a row there are for the programs to share, on average."""
    tile = {"PACK": launch.pack, "BLOCK_M": launch.block_m, "GRID_G": -(-across // launch.pack)}
    template = "block_grad_tma" if launch.tma else "block_grad"
    return Variant(template, constants | tile, launch.warps, launch.stages)
