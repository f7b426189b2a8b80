"""CPU lowerings of `pixelfly::attention` and its backward: one C++ template each."""

from __future__ import annotations

from typing import Any

import sympy
import torch
from torch._inductor import ir

# Before the templates: Inductor's own import order, another one is circular.
from torch._inductor.lowering import lowerings as L  # isort: skip
from torch._inductor.codegen.cpp_utils import DTYPE_TO_CPP
from torch._inductor.cpu_vec_isa import pick_vec_isa
from torch._inductor.ir import TensorBox

from pixelfly_compiler.kernels.cpus import multiplies_pairs
from pixelfly_compiler.kernels.ir_inputs import contiguous, is_read, is_static
from pixelfly_compiler.kernels.lowering_cpu import call, takes_tiles, to_be_written


def lower_attention(
    q: TensorBox, k: TensorBox, v: TensorBox, mask: TensorBox | None, causal: bool, scale: float
) -> tuple[TensorBox, TensorBox] | None:
    """(o, lse), or None where the template does not apply."""
    if not _applies(q, k, v):
        return None
    batch, heads, rows, features = q.get_size()
    inputs, params = _operands({"Q": q, "K": k, "V": v}, mask, causal, scale)
    lse = to_be_written(q, [batch, heads, rows], torch.float32)
    params["stores_lse"] = is_read(1)
    if params["stores_lse"]:
        inputs["LSE"] = lse
    o = call("attention", inputs, [batch * rows, heads * features], params, ["LSE"] if params["stores_lse"] else [])
    return _heads_of(o, q), lse


def lower_attention_backward(
    g: TensorBox,
    q: TensorBox,
    k: TensorBox,
    v: TensorBox,
    o: TensorBox,
    lse: TensorBox,
    mask: TensorBox | None,
    causal: bool,
    scale: float,
) -> tuple[TensorBox, TensorBox, TensorBox] | None:
    """The gradients of q, k and v, or None where the template does not apply."""
    if not _applies(q, k, v):
        return None
    batch, heads, rows, features = q.get_size()
    inputs, params = _operands({"Q": q, "K": k, "V": v, "G": g, "O": o}, mask, causal, scale)
    inputs["LSE"] = contiguous(lse)
    size = [batch, k.get_size()[2], heads, features]
    gk, gv = to_be_written(q, size), to_be_written(q, size)
    inputs |= {"GK": gk, "GV": gv}
    gq = call("attention_backward", inputs, [batch * rows, heads * features], params, ["GK", "GV"])
    return _heads_of(gq, q), _turned(gk), _turned(gv)


def _applies(*tensors: TensorBox) -> bool:
    """Dtypes that the micro-kernel multiplies as they are: fp32, and bf16 in pairs."""
    dtypes = {x.get_dtype() for x in tensors}
    pairs = multiplies_pairs() and pick_vec_isa().bit_width() == 512
    features = tensors[0].get_size()[3]
    return dtypes in ({torch.float32}, {torch.bfloat16} if pairs else None) and is_static(features)


def _operands(
    tensors: dict[str, TensorBox], mask: TensorBox | None, causal: bool, scale: float
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The templates' inputs, and the parameters that both have."""
    inputs: dict[str, Any] = {name: _rows_apart(x) for name, x in tensors.items()}
    params: dict[str, Any] = {f"ld{name.lower()}": x.get_stride()[2] for name, x in inputs.items()}
    params |= {"features": tensors["Q"].get_size()[3], "causal": causal, "scale": float(scale).hex()}
    params |= {"tiles": takes_tiles(tensors["Q"]), "reduction": params["features"]}
    params["has_mask"] = mask is not None
    if mask is not None:
        inputs["MASK"] = contiguous(mask)
        one = [size == 1 for size in mask.get_size()[:3]]
        params["mask_index"] = [0 if alone else name for alone, name in zip(one, ("b", "h", "m"), strict=True)] + ["n"]
        params |= {"mask_scalar": DTYPE_TO_CPP[mask.get_dtype()], "mask_is_bool": mask.get_dtype() == torch.bool}
    return inputs, params


def _rows_apart(x: TensorBox) -> TensorBox:
    """x (B, H, M, D) with neighbouring features and rows a static distance apart; copied only if needed."""
    x = ir.ExternKernel.realize_input(x)
    if isinstance(x.get_layout(), ir.FlexibleLayout):
        x.freeze_layout()
    _, _, leading, unit = x.get_stride()
    return x if unit == 1 and isinstance(leading, (int, sympy.Integer)) else contiguous(x)


def _heads_of(y: TensorBox, like: TensorBox) -> TensorBox:
    """(B * M, H * D) as (B, H, M, D)."""
    batch, heads, rows, features = like.get_size()
    return _turned(L[torch.ops.aten.view](y, [batch, rows, heads, features]))


def _turned(x: TensorBox) -> TensorBox:
    turned: TensorBox = L[torch.ops.aten.permute](x, [0, 2, 1, 3])
    return turned
