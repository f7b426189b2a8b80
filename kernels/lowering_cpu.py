"""CPU lowerings: each `pixelfly::` operator becomes a TorchInductor C++ template, with pointwise epilogues fused.

Everything private of Inductor that the CPU side leans on stands in this file. The C++ itself is in `templates/`.
What a template cannot take (other dtypes, odd ranks) is answered with None.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any
from unittest.mock import patch

import jinja2
import sympy
import torch
from torch._inductor import config as inductor_config
from torch._inductor import ir

# Before the templates: Inductor's own import order, another one is circular.
from torch._inductor.lowering import lowerings as L  # isort: skip
from torch._inductor.codegen.cpp_gemm_template import gen_2d_view_of_epilogue_buf
from torch._inductor.codegen.cpp_template import CppTemplate
from torch._inductor.codegen.cpp_template_kernel import CppTemplateKernel
from torch._inductor.codegen.cpp_utils import DTYPE_TO_CPP, cexpr_index
from torch._inductor.ir import FixedLayout, IRNode, TensorBox
from torch._inductor.utils import Placeholder, parallel_num_threads, sympy_product
from torch._inductor.virtualized import V, ops

from pixelfly_compiler.kernels.cpus import has_matrix_unit
from pixelfly_compiler.kernels.ir_inputs import are_int32, contiguous, empty, is_read, is_static, row_major
from pixelfly_compiler.kernels.ops import DTYPES
from pixelfly_compiler.kernels.reference import SupportIndex

_FEW_ROWS = 32  # up to here blocks are read in place; beyond, packing them pays
_FEWEST_ROWS_OF_UNIT = 4  # up to here dot products are faster than a matrix unit's tiles, mostly empty
# Rows of x per tile: with 64 outputs in fp32 the accumulator tile takes 12 KiB of L1. The matrix unit's are 32 high.
_ROW_TILE, _ROW_TILE_OF_UNIT = 48, 64
# A packed panel of x, in bytes per strip of rows: longer ones fall out of the L2 cache, where rows a power of two apart
# share sets.
_PANEL_BYTES = 8192
_PANEL_OF_UNIT = 128  # rows; the sums are loaded and stored once for each panel

_templates = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"), undefined=jinja2.StrictUndefined
)


def _round_natively(epilogue: str) -> str:
    """Inductor's code of an epilogue, with its rounding to bfloat16 replaced by `micro.cpp.jinja`'s."""
    return epilogue.replace("at::vec::convert<at::BFloat16,1,float,2>(", "rounded_to_bf16(")


_templates.filters["round_natively"] = _round_natively


class PixelflyCppTemplate(CppTemplate):
    """A template whose output is a 2d buffer: tile by tile in local fp32 accumulators, then Inductor's epilogue."""

    def __init__(self, name: str, inputs: dict[str, IRNode], layout: FixedLayout, params: dict[str, Any]) -> None:
        self.named = {key: ir.InputsKernel.unwrap_storage_for_input(node) for key, node in inputs.items()}
        super().__init__(f"pixelfly_{name}", list(self.named.values()), layout, parallel_num_threads())
        self.file = f"{name}.cpp.jinja"
        self.params = params
        self._render_state: dict[str, Any] = {}

    def stub(self, kernel: CppTemplateKernel) -> str:
        """The kernel's signature; a buffer given for two inputs (x^T x) is one argument."""
        state = self._render_state
        unique = {node.get_name(): name for name, node in reversed(self.named.items())}
        inputs = {name: node for name, node in self.named.items() if unique[node.get_name()] == name}
        header = kernel.def_kernel(inputs=inputs, outputs={"Y": state["Y"]}, aliases=state["aliases"])
        return f'extern "C" {header}'

    def start_of(self, kernel: CppTemplateKernel, node: IRNode) -> str:
        """A pointer to the first element. `kernel.index` says the same, but parses expressions, which takes long."""
        name, offset = kernel.args.input(node.get_name()), node.get_layout().offset
        return name if offset == 0 else f"({name} + {cexpr_index(kernel.rename_indexing(offset))})"

    def make_kernel_render(self, node: ir.CppTemplateBuffer, **kwargs: Any) -> tuple[CppTemplateKernel, Any]:
        """The kernel of this node, and what writes its code. Inductor's `generate` writes it once more, for tuning."""
        kernel = CppTemplateKernel(kernel_name=str(Placeholder.KERNEL_NAME), num_threads=self.num_threads)
        return kernel, partial(kernel.render, self, template_buffer_node=node, **kwargs)

    def local_buffer(self, kernel: CppTemplateKernel, name: str, sizes: list[int]) -> ir.Buffer:
        """An fp32 buffer that the template declares itself."""
        layout = ir.FixedLayout(torch.device("cpu"), torch.float32, [sympy.Integer(size) for size in sizes])
        return kernel.local_buffers.setdefault(name, ir.Buffer(name=name, layout=layout))

    def render(  # type: ignore[override]
        self,
        kernel: CppTemplateKernel,
        template_buffer_node: ir.CppTemplateBuffer,
        flag_template_buffer_has_other_users: bool | None = None,
        epilogue_nodes: list[IRNode] | None = None,
        **kwargs: Any,
    ) -> str:
        other_users = bool(flag_template_buffer_has_other_users)
        state = self._epilogue_state(template_buffer_node, other_users, epilogue_nodes or [])
        self._render_state = state
        threads = "" if inductor_config.cpp.dynamic_threads else f"num_threads({self.num_threads})"
        with patch.object(V.graph, "get_dtype", self._fake_get_dtype(state["fake_buffers"])):
            return _templates.get_template(self.file).render(
                template=self,
                kernel=kernel,
                num_threads=self.num_threads,
                num_threads_clause=threads,
                scalar=DTYPE_TO_CPP[self.layout.dtype],
                **self.named,
                **self.params,
                **state,
            )

    def _epilogue_state(self, template_buffer: Any, has_other_users: bool, nodes: list[IRNode]) -> dict[str, Any]:
        """Where the tiles are stored and through which pointwise nodes; see NOTE in Inductor's cpp_gemm_template."""
        epilogues: list[Any] = []
        reindexers: list[Callable[..., Any] | None] = []
        aliases: set[str] = set()
        gemm_out = template_buffer
        fake_buffers = [template_buffer]
        if nodes and has_other_users:
            # The accumulators are local, so the plain result needs a store of its own.
            gemm_out = ir.Buffer(name=f"{template_buffer.get_name()}_GemmOut", layout=template_buffer.layout)
            epilogues.append(
                ir.ComputedBuffer(
                    name=template_buffer.get_name(), layout=template_buffer.layout, data=_rounded(gemm_out)
                )
            )
            reindexers.append(None)
            aliases.add(gemm_out.get_name())
            fake_buffers.append(gemm_out)
        y = y_2d = template_buffer
        if nodes:
            if not has_other_users:
                aliases.add(template_buffer.get_name())
            epilogues.extend(nodes)
            y = epilogues[-1]
            y_2d, reindexers = gen_2d_view_of_epilogue_buf(
                y, template_buffer, nodes, reindexers, default_reindexers=[None] * len(nodes)
            )
        return {
            "Y": y,
            "Y_2d": y_2d,
            "GemmOut": gemm_out,
            "epilogue_nodes": epilogues,
            "reindexers": reindexers,
            "aliases": {alias: y.get_name() for alias in aliases},
            "fake_buffers": fake_buffers,
        }


def _rounded(buffer: ir.Buffer) -> ir.Pointwise:
    load, dtype = buffer.make_loader(), buffer.get_dtype()
    return ir.Pointwise(
        device=buffer.get_device_or_error(),
        dtype=dtype,
        inner_fn=lambda index: ops.to_dtype(load(index), dtype),
        ranges=buffer.get_size(),
    )


class _TemplateBuffer(ir.CppTemplateBuffer):
    """A template's output, together with the inputs that the template writes to."""

    def __init__(self, template: PixelflyCppTemplate, written: Iterable[IRNode]) -> None:
        super().__init__(template.layout, template.input_nodes, template.make_kernel_render, template, None)
        none = ir.NoneLayout(device=template.layout.device)
        self.mutation_outputs = [ir.MutationOutput(none, buffer, self) for buffer in written]

    def get_outputs(self) -> list[ir.Buffer]:
        return [self, *self.mutation_outputs]


def call(
    name: str, inputs: dict[str, Any], size: list[Any], params: dict[str, Any], written: Iterable[str] = ()
) -> TensorBox:
    """The output of template `name` as a 2d contiguous buffer of the first input's dtype and device.

    `written`: the inputs that the template writes to, and does not read.
    """
    first = next(iter(inputs.values()))
    layout = FixedLayout(first.get_device(), first.get_dtype(), size)
    template = PixelflyCppTemplate(name, inputs, layout, params)
    return TensorBox.create(_TemplateBuffer(template, [template.named[key] for key in written]))


def to_be_written(like: TensorBox, size: list[Any], dtype: torch.dtype | None = None) -> TensorBox:
    """A buffer for a template to write to."""
    buffer = empty(like, size, dtype)
    buffer.realize()
    return buffer


def takes_tiles(x: TensorBox) -> bool:
    """Are products of this tensor those of the matrix unit?"""
    return x.get_dtype() == torch.bfloat16 and has_matrix_unit()


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
    """(y, t), or None where the template does not apply."""
    return _lower_products(x, blocks, u, v, index, features, transposed, bias=bias)


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
    groups, nnz, b_out, b_in = map(int, blocks.get_size())
    own = {"own_u": u is not None and len(u.get_size()) == 3, "own_v": v is not None and len(v.get_size()) == 3}
    blocks = L[torch.ops.aten.view](contiguous(blocks), [groups * nnz, b_out, b_in])
    return _lower_products(
        x, blocks, _stacked(u), _stacked(v), index, features, transposed, groups=groups, own=own, ends=ends
    )


def _stacked(factor: TensorBox | None) -> TensorBox | None:
    """(groups, n, r) as (groups * n, r)."""
    if factor is None or len(factor.get_size()) == 2:
        return factor
    groups, n, rank = factor.get_size()
    return L[torch.ops.aten.view](contiguous(factor), [groups * n, rank])


def _lower_products(
    x: TensorBox,
    blocks: TensorBox,
    u: TensorBox | None,
    v: TensorBox | None,
    index: TensorBox | None,
    features: int,
    transposed: bool,
    *,
    bias: TensorBox | None = None,
    groups: int = 0,
    own: Mapping[str, bool] = MappingProxyType({"own_u": False, "own_v": False}),
    ends: TensorBox | None = None,
) -> tuple[TensorBox, TensorBox] | None:
    """(y, t) of one weight, or of each of `groups` stacked ones with its own rows.

    `own` says whose factors are stacked; `ends` is where the rows of each group end, None if all are of equal size.
    """
    *lead, k = x.get_size()
    stacked, b_out, b_in = blocks.get_size()
    rank = 0 if v is None else v.get_size()[1]
    supported = x.get_dtype() in DTYPES and is_static(k, stacked, b_out, b_in, rank, features) and stacked > 0
    if not supported or b_out % 16 or b_in % 16 or rank % 16:
        return None
    rows = sympy_product(lead)
    x = row_major(L[torch.ops.aten.view](x, [rows, k]))
    inputs = {"X": x, "BLOCKS": contiguous(blocks)}
    if rank:
        inputs |= {"U": contiguous(u), "V": contiguous(v)}
    t = to_be_written(x, [rows, rank])
    stores_t = rank > 0 and is_read(1)
    if stores_t:
        inputs["T"] = t
    if bias is not None:
        inputs["BIAS"] = contiguous(bias)
    if ends is not None:
        inputs["ENDS"] = contiguous(ends)
    if index is not None:
        inputs["INDEX"] = contiguous(index)
    each = rows if not groups or ends is not None else rows // groups
    params = _linear_params(x, b_out, b_in, rank, features, transposed, index is None)
    params |= _few_rows(None if ends is not None else each, transposed, params["tiles"])
    params |= {
        "stores_t": stores_t,
        "has_bias": bias is not None,
        "groups": groups,
        "has_ends": ends is not None,
        **own,
    }
    y = call("linear", inputs, [rows, features], params, ["T"] if stores_t else [])
    view = L[torch.ops.aten.view]
    return view(y, [*lead, features]), view(t, [*lead, rank])


def _linear_params(
    x: TensorBox, b_out: int, b_in: int, rank: int, features: int, transposed: bool, dense: bool
) -> dict[str, Any]:
    tiles = takes_tiles(x)
    block_k, block_n = (b_out, b_in) if transposed else (b_in, b_out)
    return {
        "N": features,
        "K": x.get_size()[1],
        "block_k": block_k,
        "block_n": block_n,
        "rank": rank,
        "ldx": x.get_stride()[0],
        "block_m": _ROW_TILE_OF_UNIT if tiles else _ROW_TILE,
        "tiles": tiles,
        "reduction": block_k,
        "dense": dense,
        "blocks_transposed": transposed,
        "slot": ("(i % COLS) * ROWS + i / COLS" if dense else "slot[i]") if transposed else "i",
    }


def _few_rows(rows: Any, transposed: bool, tiles: bool) -> dict[str, Any]:
    """Which ways through the template there are, for so many rows of x; None if they are known only when it runs."""
    static = is_static(rows)
    few_rows = _FEW_ROWS if not transposed and not (static and rows > _FEW_ROWS) else 0
    if static and few_rows:
        few_rows = int(rows)
    few_tiles = tiles and not (static and rows <= _FEWEST_ROWS_OF_UNIT)
    return {"few_rows": few_rows, "few_tiles": few_tiles, "many_rows": not (static and few_rows)}


def lower_block_grad(
    a: TensorBox, x: TensorBox, t: TensorBox | None, index: TensorBox | None, b_out: int, b_in: int
) -> tuple[TensorBox, TensorBox] | None:
    """The gradients of blocks and u, or None where the template does not apply."""
    return _lower_gradients(a, x, t, index, b_out, b_in)


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
    stacked = _lower_gradients(a, x, t, index, b_out, b_in, groups=groups, ends=ends) if are_int32(ends) else None
    if stacked is None:
        return None
    return _unstacked(stacked[0], groups), _unstacked(stacked[1], groups)


def _unstacked(part: TensorBox, groups: int) -> TensorBox:
    """(groups * n, ...) as (groups, n, ...)."""
    n, *rest = part.get_size()
    return L[torch.ops.aten.view](part, [groups, n // groups, *rest])


def _lower_gradients(
    a: TensorBox,
    x: TensorBox,
    t: TensorBox | None,
    index: TensorBox | None,
    b_out: int,
    b_in: int,
    *,
    groups: int = 0,
    ends: TensorBox | None = None,
) -> tuple[TensorBox, TensorBox] | None:
    """The gradients of blocks and u, of one weight or stacked those of `groups`; see `_lower_products`."""
    out_features = a.get_size()[1]
    in_features = x.get_size()[1]
    rank = 0 if t is None else t.get_size()[1]
    supported = x.get_dtype() in DTYPES and is_static(out_features, in_features, rank)
    if not supported or b_out % 16 or b_in % 16 or rank % 16:
        return None
    length = None if index is None else int(index.get_size()[0])
    nnz = SupportIndex.of_length(length, int(out_features), int(in_features), b_out, b_in).nnz
    if nnz == 0:
        return None
    inputs = {"A": row_major(a), "X": row_major(x)} | ({} if index is None else {"INDEX": contiguous(index)})
    count = max(groups, 1)
    gu = to_be_written(a, [count * out_features, rank])
    if ends is not None:
        inputs["ENDS"] = contiguous(ends)
    rank = rank if is_read(1) else 0
    if rank:
        inputs |= {"T": contiguous(t), "GU": gu}
    tiles = takes_tiles(x)
    params = {
        "out_features": out_features,
        "in_features": in_features,
        "b_out": b_out,
        "b_in": b_in,
        "rank": rank,
        "lda": inputs["A"].get_stride()[0],
        "ldx": inputs["X"].get_stride()[0],
        "dense": index is None,
        "panel": _PANEL_OF_UNIT if tiles else min(max(_PANEL_BYTES // (b_in * x.get_dtype().itemsize), 32), 128),
        "tiles": tiles,
        "reduction": 32,  # a multiple of it: missing rows of a panel are zeros
        "chunk": 8,
        "groups": groups,
        "has_ends": ends is not None,
    }
    flat = call("block_grad", inputs, [count * nnz * b_out, b_in], params, ["GU"] if rank else [])
    return L[torch.ops.aten.view](flat, [count * nnz, b_out, b_in]), gu
