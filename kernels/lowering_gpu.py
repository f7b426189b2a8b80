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
from torch._inductor.virtualized import V, ops

from pixelfly_compiler.kernels import reference
from pixelfly_compiler.kernels.compat import fuse_through_views, size_hint
from pixelfly_compiler.kernels.epilogue import epilogue_weight
from pixelfly_compiler.kernels.gpus import Gpu, gpu_of
from pixelfly_compiler.kernels.heuristics_gpu import (
    GradLaunch,
    GradShape,
    LinearShape,
    block_grad_launches,
    linear_launches,
    power_of_two,
)
from pixelfly_compiler.kernels.ir_inputs import are_int32, contiguous, empty, is_read, is_static, row_major
from pixelfly_compiler.kernels.reference import SupportIndex
from pixelfly_compiler.kernels.support import Support

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_BLOCKS = (16, 32, 64, 128)

# ---------------------------------------------------------------------------------------------------------- templates


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
    source = (Path(__file__).parent / "templates" / f"{name}.py.jinja").read_text()
    return _Template(f"pixelfly_{name}", _GRIDS[name], source)


class _Variant(NamedTuple):
    """A launch: the template's name and its constants, warps and stages."""

    template: str
    constants: dict[str, Any]
    warps: int
    stages: int


def _call(
    name: str,
    inputs: dict[str, TensorBox],
    layout: FixedLayout,
    variants: Sequence[_Variant],
    examples: dict[str, Callable[[ir.Buffer], Tensor]],
    dense: Any = None,
) -> TensorBox:
    """The output of operator `name` by its first variant, or by the fastest with autotuning.

    `examples` are of the inputs from which kernels read addresses: they must be valid while kernels are timed.
    """
    tuned = bool(inductor_config.max_autotune or inductor_config.max_autotune_gemm)
    nodes = list(inputs.values())
    choices: list[Any] = []
    failure: Exception | None = None
    for template, constants, warps, stages in variants if tuned else variants[:1]:
        error = _template(template).maybe_append_choice(
            choices, input_nodes=tuple(nodes), layout=layout, num_warps=warps, num_stages=stages, **constants
        )
        failure = failure or error
    if not choices:
        raise RuntimeError(f"no launch of the {name} kernel is valid") from failure
    if tuned and dense is not None:
        choices.append(dense)
    made = {place: examples[key] for place, key in enumerate(inputs) if key in examples}
    chosen = autotune_select_algorithm(f"pixelfly_{name}", choices, nodes, layout, input_gen_fns=made)
    return chosen[0] if isinstance(chosen, tuple) else chosen  # a pair since torch 2.12


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


def _precision(dtype: torch.dtype) -> str:
    tf32 = dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32
    return "tf32" if tf32 or dtype != torch.float32 else "ieee"


def _rows_hint(rows: Any, matrices: int = 0) -> int:
    """The likely number of rows, or of those that each of several matrices meets."""
    return max(size_hint(rows, fallback=4096) // max(matrices, 1), 1)


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
    if v is not None or (nnz, b_out, b_in) != (1, *sides) or x.get_dtype() not in _DTYPES:
        return None
    x, view = _rows_of(x), L[torch.ops.aten.view]
    y = _whole_products(x, view(blocks, [matrices, b_out, b_in]), ends, transposed)
    return view(y, [*lead, features]), empty(x, [*lead, 0])


def _rows_of(x: TensorBox) -> TensorBox:
    *lead, k = x.get_size()
    return row_major(L[torch.ops.aten.view](x, [sympy_product(lead), k]))


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
    if index is None or x.get_dtype() not in _DTYPES or not is_static(k, stacked, b_out, b_in, rank, features):
        return None
    if b_out not in _BLOCKS or b_in not in _BLOCKS or stacked == 0:
        return None
    x, device = _rows_of(x), x.get_device()
    rows = x.get_size()[0]
    nnz = int(stacked) // max(matrices, 1)
    inputs = {"x": x, "blocks": contiguous(blocks)}
    if rank:
        t = contiguous(_lowrank_rows(x, v, ends))
        inputs |= {"t": t, "u": contiguous(u)}
    else:
        t = empty(x, [rows, 0])
    if ends is not None:
        inputs["ends"] = contiguous(ends)
    inputs["index"] = contiguous(index)
    layout = FixedLayout(device, x.get_dtype(), [rows, features])
    constants = _linear_constants(x, nnz, int(b_out), int(b_in), int(rank), int(features), transposed)
    constants |= {
        "MATRIX_SIZE": nnz * int(b_out) * int(b_in),
        "OWN_U": u is not None and len(u.get_size()) == 3,
        **_matrices(matrices, ends),
    }
    shape = LinearShape(
        _rows_hint(rows, matrices),
        int(k),
        int(features),
        constants["BK"],
        constants["BN"],
        int(rank),
        x.get_dtype().itemsize,
        exact=constants["PRECISION"] == "'ieee'",
        epilogue=epilogue_weight(V.graph.current_node),
        tma=not matrices and _can_use_tma(*list(inputs.values())[:-1]),
        matrices=max(matrices, 1),
    )
    dense = None
    if not matrices:
        operands = list(inputs.values())
        dense = dense_choice().bind(operands, layout, features=int(features), transposed=transposed, rank=int(rank))
    out_features, in_features = (k, features) if transposed else (features, k)
    support = SupportIndex.shape_of(None, int(out_features), int(in_features), int(b_out), int(b_in))
    examples = {
        "index": partial(_example_index, replace(support, nnz=nnz)),
        "ends": partial(_example_ends, _rows_hint(rows)),
    }
    y = _call("linear", inputs, layout, _linear_variants(constants, shape, device), examples, dense)
    if ends is not None and rank and is_read(1):
        t = _without_tail(t, ends)
    view = L[torch.ops.aten.view]
    return view(y, [*lead, features]), view(t, [*lead, rank])


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


def _whole_products(x: TensorBox, weight: TensorBox, ends: TensorBox | None, transposed: bool) -> TensorBox:
    """x W_e^T (x W_e if transposed), with whole matrices (E, out, in)."""
    rows, k = x.get_size()
    matrices, out_features, in_features = map(int, weight.get_size())
    features = in_features if transposed else out_features
    inputs = {"x": x, "weight": contiguous(weight)} | ({} if ends is None else {"ends": contiguous(ends)})
    precision = _precision(x.get_dtype())
    constants = {
        "N": features,
        "K": int(k),
        "BK": int(k),
        "BN": features,
        "RANK": 0,
        "LDX": int(x.get_stride()[0]),
        "TRANSPOSED": transposed,
        "MATRIX_SIZE": out_features * in_features,
        "OWN_U": False,
        "PRECISION": repr(precision),
        **_matrices(matrices, ends, dense=True),
    }
    shape = LinearShape(
        _rows_hint(rows, matrices),
        int(k),
        features,
        128,
        min(max(power_of_two(features), 16), 128),
        0,
        x.get_dtype().itemsize,
        exact=precision == "ieee",
        matrices=matrices,
    )
    layout = FixedLayout(x.get_device(), x.get_dtype(), [rows, features])
    examples = {"ends": partial(_example_ends, _rows_hint(rows))}
    return _call("whole", inputs, layout, _linear_variants(constants, shape, x.get_device()), examples)


def _matrices(matrices: int, ends: TensorBox | None, dense: bool = False) -> dict[str, Any]:
    """What templates must know of a weight of several matrices; 0: of one."""
    stretches = power_of_two(matrices + 1)  # of rows: those behind the last end are one too
    return {"MATRICES": matrices, "ENDS_GIVEN": ends is not None, "STRETCHES": stretches, "DENSE": dense}


def _linear_variants(constants: dict[str, Any], shape: LinearShape, device: torch.device) -> list[_Variant]:
    gpu = gpu_of(device)
    variants = []
    for launch in linear_launches(shape, gpu):
        if constants["DENSE"]:
            launch = replace(launch, groups=1)
        tile = {key.upper(): value for key, value in asdict(launch).items() if key not in ("warps", "stages")}
        template = "linear_tma" if launch.programs else "linear"
        variants.append(_Variant(template, constants | tile | _backend_options(gpu), launch.warps, launch.stages))
    return variants


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
        if b_in != in_features or b_out not in _BLOCKS:
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


def _whole_grads(a: TensorBox, x: TensorBox, ends: TensorBox | None, matrices: int, b_out: int) -> TensorBox:
    """a^T x of each group, cut into blocks of b_out rows: (groups * block rows, b_out, in)."""
    return _grads(a, x, None, ends, matrices, b_out, int(x.get_size()[1]))


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
    if not _are_operands(a, x) or not is_static(a.get_size()[1], x.get_size()[1]):
        return None
    if index is None:
        return _every_block(a, x, b_out, b_in)
    if b_out not in _BLOCKS or b_in not in _BLOCKS or _kept(index, a, x, b_out, b_in).nnz == 0:
        return None
    return _grads(a, x, index, ends, matrices, b_out, b_in)


def _are_operands(a: TensorBox, x: TensorBox) -> bool:
    return x.get_dtype() in _DTYPES and a.get_dtype() == x.get_dtype()


def _kept(index: TensorBox, a: TensorBox, x: TensorBox, b_out: int, b_in: int) -> SupportIndex:
    """The shape of the support of this index."""
    block_rows, block_cols = -(-int(a.get_size()[1]) // b_out), -(-int(x.get_size()[1]) // b_in)
    return SupportIndex(block_rows, block_cols, (int(index.get_size()[0]) - block_rows - block_cols - 2) // 4)


def _grads(
    a: TensorBox,
    x: TensorBox,
    index: TensorBox | None,
    ends: TensorBox | None,
    matrices: int,
    b_out: int,
    b_in: int,
) -> TensorBox:
    """The kept blocks of a^T x, or without `index` whole rows of them; stacked if there are several matrices."""
    a, x = row_major(a), row_major(x)
    rows, out_features = a.get_size()[0], int(a.get_size()[1])
    in_features, device, dtype = int(x.get_size()[1]), x.get_device(), x.get_dtype()
    whole = index is None
    block_rows = -(-out_features // b_out)
    support = SupportIndex(block_rows, 1, block_rows) if index is None else _kept(index, a, x, b_out, b_in)
    width = min(max(power_of_two(in_features), 64), 128) if whole else b_in  # of a tile's block
    constants = {
        "OUT": out_features,
        "IN": in_features,
        "B_OUT": b_out,
        "B_IN": width,
        "NNZ": support.nnz,
        "BLOCK_ROWS": block_rows,
        "LDA": int(a.get_stride()[0]),
        "LDX": int(x.get_stride()[0]),
        "EVEN_OUT": out_features % b_out == 0,
        "EVEN_IN": in_features % width == 0,
        "COL_AT": block_rows + 1,
        "PRECISION": repr(_precision(dtype)),
        **_matrices(matrices, ends, dense=whole),
    }
    shape = GradShape(
        _rows_hint(rows, matrices),
        block_rows,
        support.nnz,
        b_out,
        width,
        dtype.itemsize,
        exact=_precision(dtype) == "ieee",
        tma=not matrices and _can_use_tma(a, x),
        matrices=max(matrices, 1),
    )
    launches = block_grad_launches(shape, gpu_of(device))
    split = launches[0].split  # part of the output's shape, so not a choice
    across = -(-in_features // width) if whole else shape.per_row
    variants = [
        _grad_variant(constants | {"SPLIT": matrices or split}, launch, across, gpu_of(device))
        for launch in launches
        if launch.split == split
    ]
    inputs = {"a": a, "x": x} | ({} if ends is None else {"ends": contiguous(ends)})
    inputs |= {} if index is None else {"index": contiguous(index)}
    examples = {"index": partial(_example_index, support), "ends": partial(_example_ends, _rows_hint(rows))}
    parts = max(matrices, 1) * split
    layout = FixedLayout(device, dtype if split == 1 else torch.float32, [parts * support.nnz, b_out, b_in])
    found = _call("block_grad", inputs, layout, variants, examples)
    if split == 1:
        return found
    total = L[torch.ops.aten.sum](L[torch.ops.aten.view](found, [split, support.nnz, b_out, b_in]), [0])
    return L[torch.ops.prims.convert_element_type](total, dtype)


def _grad_variant(constants: dict[str, Any], launch: GradLaunch, across: int, gpu: Gpu) -> _Variant:
    """`across`: how many blocks of a row there are for the programs to share, on average."""
    tile = {"PACK": launch.pack, "BLOCK_M": launch.block_m, "GRID_G": -(-across // launch.pack)}
    template = "block_grad_tma" if launch.tma else "block_grad"
    return _Variant(template, constants | tile | _backend_options(gpu), launch.warps, launch.stages)


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
