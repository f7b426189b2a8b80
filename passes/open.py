"""Open operations that hide matmuls with weights, and that Dynamo keeps as one node: attention, encoder layers, the
cells of recurrent networks, products of many factors.

    def forward(self, x, w_in, b_in, w_out, b_out):             def forward(self, x, w_in, b_in, w_out, b_out):
        y, _ = F.multi_head_attention_forward(                      qkv = aten.linear(x, w_in, b_in)
            x, x, x, 32, 2, w_in, b_in, ..., w_out, b_out)  -->     ...
        return (y,)                                                 o = aten.scaled_dot_product_attention(q, k, v)
                                                                    y = aten.linear(o, w_out, b_out)
                                                                    return (y,)

The code of the operation itself is traced, above autograd and autocast, so that the graph computes what it did.
Inductor, which opens them too, then generates the same code for what stays dense.
"""

from __future__ import annotations

import logging
import operator
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.fx import GraphModule, Node
from torch.utils._pytree import tree_leaves

from pixelfly_compiler.passes.contractions import einsum_operands
from pixelfly_compiler.passes.scopes import reshaped_in_place
from pixelfly_compiler.passes.weights import is_call

log = logging.getLogger("pixelfly_compiler")

Code = Callable[..., Any]


def open_composites(gm: GraphModule) -> GraphModule:
    """Open every composite of the graph and of its sub-graphs, in place."""
    reshaped = reshaped_in_place(gm)
    for module in [module for module in gm.modules() if isinstance(module, GraphModule)]:
        composites = [(node, code) for node in module.graph.nodes if (code := _code_of(node))]
        opened = [(node, code) for node, code in composites if reshaped.isdisjoint((node, *node.all_input_nodes))]
        for node, code in opened:
            _open(module, node, code)
        if opened:
            module.recompile()
    return gm


def _code_of(node: Node) -> Code | None:
    if 0 < len(einsum_operands(node)) < 3:
        return None  # a pattern of `contractions`
    return next((code for composite, code in _COMPOSITES.items() if is_call(node, (composite,))), None)


def _open(module: GraphModule, node: Node, function: Code) -> None:
    inputs = node.all_input_nodes

    def run(*given: Any) -> Any:
        of = dict(zip(inputs, given, strict=True))
        args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), of.__getitem__)
        return function(*args, **kwargs)

    put_code(module, node, run, inputs, {operation: operation.decompose for operation in _OF_MATMULS})


def put_code(
    module: GraphModule,
    node: Node,
    code: Code,
    inputs: Sequence[Node],
    decompositions: Mapping[Any, Code] | None = None,
) -> None:
    """Put what `code` does with the values of `inputs` in place of `node`; nothing if that cannot be traced."""
    from torch.fx.experimental.proxy_tensor import make_fx  # heavy to import, and only needed here

    values = [source.meta["example_value"] for source in inputs]
    if any(isinstance(value, Tensor) and value.is_nested for value in values):
        return
    try:
        with torch.no_grad(), _autocast_of(node), _fake_mode_of(values):
            traced = make_fx(code, dict(decompositions or {}), pre_dispatch=True)(*values)
    except Exception:  # an argument of a kind that only the operation itself understands: any error is possible
        log.debug("pixelfly: %s stays whole", node, exc_info=True)
        return
    traced.graph.eliminate_dead_code()
    if any(original.op == "get_attr" for original in traced.graph.nodes):
        return  # a constant made on the way: nobody's module would hold it
    copies = dict(zip((n for n in traced.graph.nodes if n.op == "placeholder"), inputs, strict=True))
    with module.graph.inserting_before(node):
        result = module.graph.graph_copy(traced.graph, copies)
    kept = {key: node.meta[key] for key in ("nn_module_stack", "stack_trace") if key in node.meta}
    for original, copy in copies.items():
        if original.op != "placeholder":
            copy.meta = {"example_value": original.meta.get("val"), **kept}
    put_in_place(node, result)


def _autocast_of(node: Node) -> AbstractContextManager[Any]:
    """Autocast as it is where the node stands: entered in the graph, or around it, as the types of its tensors tell."""
    entered: list[Node] = []
    for other in node.graph.nodes:
        if other is node:
            break
        if is_call(other, (torch.amp.autocast_mode._enter_autocast,)):
            entered.append(other)
        elif is_call(other, (torch.amp.autocast_mode._exit_autocast,)):
            entered.remove(other.all_input_nodes[0])
    if entered:
        arguments: Any = entered[-1].args
        return torch.autocast(*arguments)
    given = [value for source in node.all_input_nodes for value in tree_leaves(source.meta["example_value"])]
    result = tree_leaves(node.meta["example_value"])[0]
    if all(value.dtype == result.dtype for value in given if isinstance(value, Tensor) and value.is_floating_point()):
        return nullcontext()
    return torch.autocast(result.device.type, result.dtype)


def _fake_mode_of(values: Sequence[Any]) -> AbstractContextManager[Any]:
    """The mode that the values are of, so that tensors made on the way, such as zeros, are of it too."""
    return next((value.fake_mode for value in values if isinstance(value, FakeTensor)), nullcontext())


def put_in_place(node: Node, result: Any) -> None:
    """Let the users of `node` use what was traced; a tuple that they index is taken apart."""
    for user in list(node.users):
        if is_call(user, (operator.getitem,)) and isinstance(result, tuple | list):
            part = result[int(str(user.args[1]))]
            if isinstance(part, Node):
                user.replace_all_uses_with(part)
        args, kwargs = torch.fx.node.map_arg((user.args, user.kwargs), lambda n: result if n is node else n)
        user.args, user.kwargs = args, kwargs
    node.graph.erase_node(node)


# ---- what is opened, and the code of each ----


def _native_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim: int,
    num_heads: int,
    w_in: Tensor,
    b_in: Tensor,
    w_out: Tensor,
    b_out: Tensor,
    mask: Tensor | None = None,
    need_weights: bool = True,
    average_attn_weights: bool = True,
    mask_type: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """`torch._native_multi_head_attention`: batch first; a mask for all (type 0), of keys (1), or for each head (2)."""
    turned = {id(x): x.transpose(0, 1) for x in (query, key, value)}
    mask = None if mask is None else mask.bool()
    y, weights = F.multi_head_attention_forward(
        turned[id(query)],
        turned[id(key)],
        turned[id(value)],
        embed_dim,
        num_heads,
        w_in,
        b_in,
        bias_k=None,
        bias_v=None,
        add_zero_attn=False,
        dropout_p=0.0,
        out_proj_weight=w_out,
        out_proj_bias=b_out,
        training=False,
        key_padding_mask=mask if mask_type == 1 else None,
        need_weights=need_weights,
        attn_mask=mask.flatten(0, 1) if mask is not None and mask_type == 2 else mask if mask_type == 0 else None,
        average_attn_weights=average_attn_weights,
    )
    return y.transpose(0, 1), weights


def _encoder_layer(
    x: Tensor,
    embed_dim: int,
    num_heads: int,
    w_in: Tensor,
    b_in: Tensor,
    w_out: Tensor,
    b_out: Tensor,
    use_gelu: bool,
    norm_first: bool,
    eps: float,
    *norms_and_ffn: Any,
) -> Tensor:
    """`torch._transformer_encoder_layer_fwd`: an `nn.TransformerEncoderLayer` in evaluation without gradients."""
    norm_w1, norm_b1, norm_w2, norm_b2, w1, b1, w2, b2, mask, mask_type = (*norms_and_ffn, None, None)[:10]

    def attend(x: Tensor) -> Tensor:
        weights = (embed_dim, num_heads, w_in, b_in, w_out, b_out)
        return _native_attention(x, x, x, *weights, mask, need_weights=False, mask_type=mask_type)[0]

    def feed(x: Tensor) -> Tensor:
        activation = F.gelu if use_gelu else F.relu
        return F.linear(activation(F.linear(x, w1, b1)), w2, b2)

    def norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.layer_norm(x, (embed_dim,), weight, bias, eps)

    if norm_first:
        x = x + attend(norm(x, norm_w1, norm_b1))
        return x + feed(norm(x, norm_w2, norm_b2))
    x = norm(x + attend(x), norm_w1, norm_b1)
    return norm(x + feed(x), norm_w2, norm_b2)


_CELLS = (torch.lstm_cell, torch.gru_cell, torch.rnn_tanh_cell, torch.rnn_relu_cell)
_COMPOSITES: dict[Any, Code] = {
    F.multi_head_attention_forward: F.multi_head_attention_forward,
    torch._native_multi_head_attention: _native_attention,
    torch._transformer_encoder_layer_fwd: _encoder_layer,
    torch.einsum: torch.einsum,
    **{cell: cell for cell in _CELLS},
    torch.linalg.multi_dot: torch.linalg.multi_dot,
}
# What these are made of in C++ has no code in Python to trace.
_OF_MATMULS = tuple(
    getattr(torch.ops.aten, name).default
    for name in (*(cell.__name__ for cell in _CELLS), "einsum", "linalg_multi_dot")
)
