"""`pixelfly::linear` and `pixelfly::grouped_linear` on a GPU: one Triton template, with pointwise epilogues fused.

The thin dense product t = x v is a library matmul, or, with a v for each matrix, the same template.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch._inductor import ir

# Before the templates: Inductor's own import order, another one is circular.
from torch._inductor.lowering import lowerings as L  # isort: skip
from torch._inductor.ir import FixedLayout, TensorBox
from torch._inductor.select_algorithm import ExternKernelChoice
from torch._inductor.utils import sympy_product
from torch._inductor.virtualized import ops

from pixelfly_compiler.kernels import reference
from pixelfly_compiler.kernels.gpus import gpu_of
from pixelfly_compiler.kernels.heuristics_gpu import (
    LinearLaunch,
    LinearShape,
    linear_launches,
    narrowing_for,
    power_of_two,
)
from pixelfly_compiler.kernels.ir_inputs import are_int32, contiguous, empty, is_read, is_static, row_major
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
    lowered = _lower_products(x, blocks, u, v, index, features, transposed)
    if lowered is None or bias is None:
        return lowered
    return L[torch.ops.aten.add](lowered[0], bias), lowered[1]


def lower_grouped_linear(
    x: TensorBox,
    blocks: TensorBox,
    u: TensorBox | None,
    v: TensorBox | None,
    ends: TensorBox | None,
    index: TensorBox | None,
    features: int,
    transposed: bool,
) -> tuple[TensorBox, TensorBox] | None:
    """(y, t), or None where the template does not apply."""
    if not is_static(*blocks.get_size()) or not are_int32(ends):
        return None
    matrices, nnz, b_out, b_in = map(int, blocks.get_size())
    if index is not None:
        stacked = L[torch.ops.aten.view](contiguous(blocks), [matrices * nnz, b_out, b_in])
        return _lower_products(x, stacked, u, v, index, features, transposed, matrices=matrices, ends=ends)
    *lead, k = x.get_size()
    sides = (k, features) if transposed else (features, k)
    if v is not None or (nnz, b_out, b_in) != (1, *sides) or x.get_dtype() not in DTYPES:
        return None
    x, view = _rows_of(x), L[torch.ops.aten.view]
    y = _whole_products(x, view(blocks, [matrices, b_out, b_in]), ends, transposed)
    return view(y, [*lead, features]), empty(x, [*lead, 0])


def _lower_products(
    x: TensorBox,
    blocks: TensorBox,
    u: TensorBox | None,
    v: TensorBox | None,
    index: TensorBox | None,
    features: int,
    transposed: bool,
    *,
    matrices: int = 0,
    ends: TensorBox | None = None,
) -> tuple[TensorBox, TensorBox] | None:
    """(y, t) of one weight, or of each of so many stacked `matrices` with its own rows."""
    *lead, k = x.get_size()
    stacked, b_out, b_in = blocks.get_size()
    rank = 0 if v is None else v.get_size()[-1]
    if index is None or x.get_dtype() not in DTYPES or not is_static(k, stacked, b_out, b_in, rank, features):
        return None
    if b_out not in BLOCKS or b_in not in BLOCKS or stacked == 0:
        return None
    x = _rows_of(x)
    inputs = {"x": x, "blocks": contiguous(blocks)}
    t = contiguous(_lowrank_rows(x, v, ends)) if rank else empty(x, [x.get_size()[0], 0])
    inputs |= {"t": t, "u": contiguous(u)} if rank else {}
    inputs |= {} if ends is None else {"ends": contiguous(ends)}
    inputs |= {"index": contiguous(index)}
    y = _block_products(inputs, int(features), transposed, matrices)
    if ends is not None and rank and is_read(1):
        t = _without_tail(t, ends)
    view = L[torch.ops.aten.view]
    return view(y, [*lead, features]), view(t, [*lead, rank])


def _rows_of(x: TensorBox) -> TensorBox:
    *lead, k = x.get_size()
    return row_major(L[torch.ops.aten.view](x, [sympy_product(lead), k]))


def _lowrank_rows(x: TensorBox, v: TensorBox, ends: TensorBox | None) -> TensorBox:
    """t = x v, with the v of all matrices, or with each one's own."""
    return L[torch.ops.aten.mm](x, v) if len(v.get_size()) == 2 else _whole_products(x, v, ends, transposed=True)


def _without_tail(t: TensorBox, ends: TensorBox) -> TensorBox:
    """t with zeros behind the last end."""
    load, load_end, dtype = t.make_loader(), ends.make_loader(), t.get_dtype()
    last = ends.get_size()[0] - 1

    def inner_fn(index: Sequence[Any]) -> Any:
        in_a_group = ops.lt(ops.index_expr(index[0], torch.int32), load_end([last]))
        return ops.where(in_a_group, load(index), ops.constant(0.0, dtype))

    return ir.Pointwise.create(device=t.get_device(), dtype=dtype, inner_fn=inner_fn, ranges=t.get_size())


def _block_products(inputs: dict[str, TensorBox], features: int, transposed: bool, matrices: int) -> TensorBox:
    """x W^T (x W if transposed), with the kept blocks of one weight, or of each of so many matrices."""
    x, blocks, u = inputs["x"], inputs["blocks"], inputs.get("u")
    k, (stacked, b_out, b_in) = int(x.get_size()[1]), map(int, blocks.get_size())
    out_features, in_features = (k, features) if transposed else (features, k)
    every = SupportIndex.of_length(None, out_features, in_features, b_out, b_in)
    support = replace(every, nnz=stacked // max(matrices, 1))
    block = (b_out, b_in) if transposed else (b_in, b_out)
    crow_t = support.block_rows + 1 + 2 * support.nnz
    constants = {
        **_constants(inputs, features, transposed, matrices),
        "BK": block[0],
        "BN": block[1],
        "RANK": 0 if u is None else int(u.get_size()[-1]),
        "EVEN_K": k % block[0] == 0,
        "CROW_AT": crow_t if transposed else 0,
        "COL_AT": crow_t + support.block_cols + 1 if transposed else support.block_rows + 1,
        "SLOT_AT": crow_t + support.block_cols + 1 + support.nnz if transposed else 0,
        "MATRIX_SIZE": support.nnz * b_out * b_in,
        "OWN_U": u is not None and len(u.get_size()) == 3,
        "DENSE": False,
    }
    return _products(inputs, constants, block, support)


def _whole_products(x: TensorBox, weight: TensorBox, ends: TensorBox | None, transposed: bool) -> TensorBox:
    """x W_e^T (x W_e if transposed), with whole matrices (E, out, in)."""
    matrices, out_features, in_features = map(int, weight.get_size())
    features, k = (in_features, out_features) if transposed else (out_features, in_features)
    inputs = {"x": x, "weight": contiguous(weight)} | ({} if ends is None else {"ends": contiguous(ends)})
    constants = {
        **_constants(inputs, features, transposed, matrices),
        "BK": k,
        "BN": features,
        "RANK": 0,
        "MATRIX_SIZE": out_features * in_features,
        "OWN_U": False,
        "DENSE": True,
    }
    return _products(inputs, constants, (128, min(max(power_of_two(features), 16), 128)))


def _constants(inputs: dict[str, TensorBox], features: int, transposed: bool, matrices: int) -> dict[str, Any]:
    x = inputs["x"]
    return {
        "N": features,
        "K": int(x.get_size()[1]),
        "LDX": int(x.get_stride()[0]),
        "TRANSPOSED": transposed,
        "PRECISION": repr(precision_of(x.get_dtype())),
        **of_matrices(matrices, inputs.get("ends")),
    }


def _products(
    inputs: dict[str, TensorBox],
    constants: dict[str, Any],
    block: tuple[int, int],
    support: SupportIndex | None = None,
) -> TensorBox:
    """The products by the template with these constants. `block`: (k, n), by which launches are chosen."""
    x, matrices, whole = inputs["x"], constants["MATRICES"], constants["DENSE"]
    rows, features, rank, device = x.get_size()[0], constants["N"], constants["RANK"], x.get_device()
    layout = FixedLayout(device, x.get_dtype(), [rows, features])
    dense = None
    if not matrices:
        given = {"features": features, "transposed": constants["TRANSPOSED"], "rank": rank}
        dense = dense_choice().bind(list(inputs.values()), layout, **given)
    shape = LinearShape(
        rows_hint(rows, matrices),
        constants["K"],
        features,
        *block,
        rank,
        x.get_dtype().itemsize,
        exact=precision_of(x.get_dtype()) == "ieee",
        tma=not matrices and is_ready_for_tma(*list(inputs.values())[:-1]),
        matrices=max(matrices, 1),
    )

    def variants(epilogue: float = 0.0) -> list[Variant]:
        launches = linear_launches(replace(shape, narrowing=narrowing_for(epilogue)), gpu_of(device))
        return [_variant(constants, launch) for launch in launches]

    name = "whole" if whole else "linear"
    return by_template(name, inputs, layout, variants(), support, dense, lambda epilogue: variants(epilogue)[0])


def _variant(constants: dict[str, Any], launch: LinearLaunch) -> Variant:
    launch = replace(launch, groups=1) if constants["DENSE"] else launch
    tile = {key.upper(): value for key, value in asdict(launch).items() if key not in ("warps", "stages")}
    template = "linear_tma" if launch.programs else "linear"
    return Variant(template, constants | tile, launch.warps, launch.stages)


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
