"""Put `pixelfly::attention` in place of PyTorch's attention, on CPUs where that is the slower one.

    def forward(self, q, k, v):                            def forward(self, q, k, v):
        y = F.scaled_dot_product_attention(          -->       y, _ = pixelfly.attention(q, k, v, None, True, 0.125)
            q, k, v, is_causal=True)                           return (y,)
        return (y,)

Nothing is approximated: it is the same function, as exact as PyTorch's. What the kernel does not do (dropout, grouped
heads, a mask that is learned, single queries, transforms of torch.func) stays as it is.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import GraphModule, Node

from pixelfly_compiler.kernels import attention
from pixelfly_compiler.passes.flops import hint
from pixelfly_compiler.passes.scopes import Scopes
from pixelfly_compiler.passes.weights import is_call, value_of

_NAMES = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
_DTYPES = (torch.float32, torch.bfloat16)
_FEWEST_QUERIES = 16  # below, packing the keys costs more than what is saved


def replace_attention(gm: GraphModule) -> int:
    """Replace what can be, in the graph and its sub-graphs, in place. Returns how many."""
    if not attention.is_faster_here(backward=True):
        return 0
    replaced = 0
    differentiated = Scopes.of(gm).differentiated
    for module in [module for module in gm.modules() if isinstance(module, GraphModule)]:
        calls = [node for node in module.graph.nodes if is_call(node, (F.scaled_dot_product_attention,))]
        done = [node for node in calls if node not in differentiated and _replace(node)]
        if done:
            module.recompile()
        replaced += len(done)
    return replaced


def _replace(node: Node) -> bool:
    """Replace one call, if the kernel does what it asks for."""
    given: dict[str, Any] = {"attn_mask": None, "dropout_p": 0.0, "is_causal": False, "scale": None}
    given |= dict(zip(_NAMES, node.args, strict=False)) | node.kwargs
    query, key, value, mask = (given[name] for name in _NAMES[:4])
    if not _fits(node, query, key, value) or not _is_plain(given) or not (mask is None or _is_constant(mask)):
        return False
    features = value_of(query).shape[-1]  # type: ignore[union-attr]
    scale = 1 / math.sqrt(features) if given["scale"] is None else given["scale"]
    with node.graph.inserting_before(node):
        operands = (query, key, value, _four_dimensional(mask), given["is_causal"], scale)
        pair = node.graph.call_function(torch.ops.pixelfly.attention.default, operands)
        y = node.graph.call_function(operator.getitem, (pair, 0))
    y.meta.update(node.meta)
    node.replace_all_uses_with(y)
    node.graph.erase_node(node)
    return True


def _fits(node: Node, query: Node, key: Node, value: Node) -> bool:
    """Are the sizes, the device and the dtype such that the kernel can, and should, compute it?"""
    q, k, v, out = map(value_of, (query, key, value, node))
    if q is None or k is None or v is None or out is None or not q.dim() == k.dim() == v.dim() == 4:
        return False
    if torch._C._functorch.is_functorch_wrapped_tensor(out):  # of vmap
        return False
    features = q.shape[3]
    return (
        attention.is_faster_here(out.requires_grad)
        and out.device.type == "cpu"
        and out.dtype in _DTYPES
        and isinstance(features, int)
        and features % 16 == 0
        and q.shape[:2] == k.shape[:2] == v.shape[:2]
        and features == k.shape[3] == v.shape[3]
        and hint(q.shape[2]) >= _FEWEST_QUERIES
    )


def _is_plain(given: Mapping[str, Any]) -> bool:
    """No dropout, and nothing that is known only at run time."""
    scale, causal = given["scale"], given["is_causal"]
    return given["dropout_p"] == 0.0 and isinstance(causal, bool) and (scale is None or isinstance(scale, float))


def _is_constant(mask: Node) -> bool:
    value = value_of(mask)
    return value is not None and not value.requires_grad and 2 <= value.dim() <= 4


def _four_dimensional(mask: Node | None) -> Node | None:
    value = value_of(mask)
    if mask is None or value is None:
        return None
    for _ in range(4 - value.dim()):
        mask = mask.graph.call_method("unsqueeze", (mask, 0))
    return mask
