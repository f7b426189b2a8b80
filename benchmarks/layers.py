"""One weight matmul at a time: forward, input gradient and weight gradient, against everything that runs here.

    python benchmarks/layers.py                                  # all shapes, dtypes, operations
    python benchmarks/layers.py --shapes 4096,1024,1024 --kept 0.25 --dtypes fp32 --operations forward

Every contender computes with its own matrix, and is first checked against float64 with that matrix. Rates are on the
flops a contender keeps, also as a share of oneDNN's dense rate at the same dtype; speed-ups are in time over the faster
dense one. Operands start outside the caches, as in a model that has other layers.
"""

from __future__ import annotations

import argparse
import copy
import functools
import importlib.util
import itertools
import math
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from _common import DTYPES, append_rows, dtypes_here, interleave, print_table, relative_error
from torch import Tensor

SHAPES = [  # rows, in, out
    (4096, 1024, 1024),
    (2048, 1024, 4096),
    (2048, 4096, 1024),
    (4096, 768, 3072),
    (4096, 3072, 768),
    (1000, 1000, 3000),
    (16, 4096, 4096),
    (1, 4096, 4096),
]
OPERATIONS = ("forward", "input_grad", "weight_grad")
DENSE = ("addmm", "onednn")
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}  # relative, Frobenius
MAX_SECONDS = 20.0  # per table row group, so that a slow contender does not hold up the rest


@dataclass(frozen=True)
class Problem:
    """x (M, in), g (M, out), and a dense weight (out, in) that contenders take their kept part from."""

    x: Tensor
    g: Tensor
    weight: Tensor
    bias: Tensor
    kept: float
    block: int
    lowrank_share: float

    @classmethod
    def random(
        cls,
        shape: tuple[int, int, int],
        kept: float,
        dtype: torch.dtype,
        block: int,
        lowrank_share: float,
        device: str = "cpu",
    ) -> Problem:
        rows, inputs, outputs = shape
        generator = torch.Generator().manual_seed(0)

        def normal(*size: int) -> Tensor:
            return torch.randn(size, generator=generator).to(device, dtype)

        weight = normal(outputs, inputs) / math.sqrt(inputs)
        return cls(normal(rows, inputs), normal(rows, outputs), weight, normal(outputs), kept, block, lowrank_share)

    @property
    def rows(self) -> int:
        return self.x.shape[0]

    @property
    def outputs(self) -> int:
        return self.weight.shape[0]

    @property
    def inputs(self) -> int:
        return self.weight.shape[1]


@dataclass(frozen=True)
class Contender:
    """One way to do the operations; those it cannot do are absent from `run`.

    `weight` is the matrix it computes with, in float64. `weight_grad_of` maps the dense weight gradient to what
    `run["weight_grad"]` returns. `flops` is what each operation needs at least, given what is kept.
    """

    weight: Tensor
    run: Mapping[str, Callable[[], Any]]
    flops: Mapping[str, int]
    weight_grad_of: Callable[[Tensor], Tensor] = lambda grad: grad
    notes: Mapping[str, str] = field(default_factory=dict)


class NotHere(Exception):
    """This contender does not run on this machine, for this dtype or shape; the message says why."""


def same_flops(problem: Problem, kept: int) -> dict[str, int]:
    return dict.fromkeys(OPERATIONS, 2 * problem.rows * kept)


# ---------------------------------------------------------------------------------------------------- pixelfly (ours)


def pixelfly(p: Problem) -> Contender:
    """Our own operators through torch.compile, on the support and rank that a budget gives one weight.

    THE ADAPTER: the only place in this file that knows our kernels.
    """
    from pixelfly_compiler.backend import cache_tag
    from pixelfly_compiler.kernels import lowering, ops, projection
    from pixelfly_compiler.kernels.support import flat_butterfly, strides_within

    lowering.register()  # this, and the tag, the backend does for its users
    rank = int(p.lowrank_share * p.kept * p.outputs * p.inputs / (p.outputs + p.inputs)) // 16 * 16
    left = p.kept - rank * (p.outputs + p.inputs) / (p.outputs * p.inputs)
    strides = strides_within(p.outputs, p.inputs, p.block, left)
    if strides is None:
        raise NotHere(f"no flat butterfly of block {p.block} keeps {left:.1%} or less")
    support = flat_butterfly(p.outputs, p.inputs, p.block, strides)
    index = ops.support_index(support, p.x.device)
    rows, cols = projection.block_index(support, p.x.device)
    blocks = projection.gather_blocks(p.weight, rows, cols, p.block).contiguous()
    generator = torch.Generator().manual_seed(1)
    u = torch.randn(p.outputs, rank, generator=generator).to(p.x) / math.sqrt(p.inputs) if rank else None
    v = projection.fixed_basis(p.inputs, rank).to(p.x) if rank else None
    dense = projection.scatter_blocks(blocks.double(), rows, cols, p.outputs, p.inputs)
    if u is not None and v is not None:
        dense = dense + u.double() @ v.double().T
    t = p.x @ v if v is not None else None  # what the forward hands to the weight gradient

    def forward(x: Tensor, blocks: Tensor, u: Tensor | None, v: Tensor | None, bias: Tensor) -> Tensor:
        return torch.ops.pixelfly.linear(x, blocks, u, v, index, support.out_features, False, bias)[0]

    def input_grad(g: Tensor, blocks: Tensor, u: Tensor | None, v: Tensor | None) -> Tensor:
        return torch.ops.pixelfly.linear(g, blocks, v, u, index, support.in_features, True)[0]

    def weight_grad(g: Tensor, x: Tensor, t: Tensor | None) -> tuple[Tensor, ...]:
        grads = torch.ops.pixelfly.block_grad(g, x, t, index, p.block, p.block)
        return grads[:1] if t is None else grads

    def grad_of(grad: Tensor) -> Tensor:
        parts = [projection.gather_blocks(grad, rows, cols, p.block)]
        return flat([*parts, grad @ v.double()] if v is not None else parts)

    low = rank * (p.outputs + p.inputs)
    flops = same_flops(p, support.kept + low)
    flops["weight_grad"] = 2 * p.rows * (support.kept + rank * p.outputs)  # v is fixed and t is the forward's
    run: dict[str, Callable[[], Any]] = {
        "forward": functools.partial(torch.compile(forward), p.x, blocks, u, v, p.bias),
        "input_grad": functools.partial(torch.compile(input_grad), p.g, blocks, u, v),
        "weight_grad": functools.partial(torch.compile(weight_grad), p.g, p.x, t),
    }
    with cache_tag():  # compiled code of other versions is not ours
        for compile_now in run.values():
            compile_now()
    note = f"block {p.block}, {strides} strides, rank {rank}"
    return Contender(dense, run, flops, grad_of, dict.fromkeys(OPERATIONS, note))


# ------------------------------------------------------------------------------------------------------------- dense


def addmm(p: Problem) -> Contender:
    run = {
        "forward": lambda: torch.addmm(p.bias, p.x, p.weight.T),
        "input_grad": lambda: p.g @ p.weight,
        "weight_grad": lambda: p.g.T @ p.x,
    }
    return Contender(p.weight.double(), run, same_flops(p, p.weight.numel()))


def onednn(p: Problem) -> Contender:
    """oneDNN's inner product, which takes any strides: x W^T, g W = g (W^T)^T, and (x^T g)^T, the faster way round."""
    if not torch.backends.mkldnn.is_available():
        raise NotHere("torch was built without oneDNN")
    if p.x.dtype == torch.bfloat16 and "bf16" not in dtypes_here():
        raise NotHere("oneDNN has no bf16 on this processor")

    def inner_product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(a, b, bias, "none", [], "")

    run = {
        "forward": lambda: inner_product(p.x, p.weight, p.bias),
        "input_grad": lambda: inner_product(p.g, p.weight.T),
        "weight_grad": lambda: inner_product(p.x.T, p.g.T).T,
    }
    return Contender(p.weight.double(), run, same_flops(p, p.weight.numel()))


# ------------------------------------------------------------------------------------------------------------- peers


def torch_bsr(p: Problem) -> Contender:
    """torch's block-sparse rows, called as W x^T: several times faster than F.linear with the same weight."""
    warnings.filterwarnings("ignore", message="Sparse BSR tensor support")
    if p.x.dtype != torch.float32:
        raise NotHere("torch BSR on the CPU is fp32 only")
    if p.outputs % p.block or p.inputs % p.block:
        raise NotHere(f"BSR needs sizes that are multiples of the block, {p.block}")
    weight, mask = masked(p, p.block)
    bsr = weight.to_sparse_bsr((p.block, p.block))
    transposed = weight.T.contiguous().to_sparse_bsr((p.block, p.block))
    run = {"forward": lambda: (bsr @ p.x.T).T + p.bias, "input_grad": lambda: (transposed @ p.g.T).T}
    return Contender(weight.double(), run, same_flops(p, int(mask.sum())))


def sparseprop(p: Problem) -> Contender:
    """Unstructured, fp32. One call computes both gradients, so each is charged for both."""
    needs_fp32(p)
    linear = optional("sparseprop.modules.linear").SparseLinear
    weight, mask = masked(p, 1)
    layer = linear(weight, torch.nn.Parameter(p.bias.clone()))
    return with_autograd(p, layer, weight, mask, layer.W_val, "both gradients in one call")


def sparselab(p: Problem) -> Contender:
    """Unstructured, fp32, features before rows: the transposes are part of the call."""
    needs_fp32(p)
    spmm, core = optional("sparselab").spmm, optional("sparselab._core")
    layout = optional("sparselab.layout")
    weight, mask = masked(p, 1)
    csr, transposed = layout.from_dense(weight), layout.from_dense(weight.T.contiguous())
    packed = layout.from_dense(weight, padding_ratio=0.0)  # without room to grow, gradients are in CSR order
    run = {
        "forward": lambda: spmm(csr, p.x.T).T + p.bias,
        "input_grad": lambda: spmm(transposed, p.g.T).T,
        "weight_grad": lambda: torch.from_numpy(
            core.spmm_grad_w_simd(packed, p.g.T.contiguous().numpy(), p.x.T.contiguous().numpy())
        ),
    }
    return Contender(weight.double(), run, same_flops(p, int(mask.sum())), lambda grad: grad[mask])


def monarch(p: Problem) -> Contender:
    """Two block-diagonal factors with a permutation between them, as batched matmuls, of about the same size."""
    wanted = (p.inputs / p.outputs + 1) / p.kept
    common = math.gcd(p.inputs, p.outputs)
    nblocks = min((n for n in range(1, common + 1) if common % n == 0), key=lambda n: abs(math.log(n / wanted)))
    width, out_width = p.inputs // nblocks, p.outputs // nblocks
    generator = torch.Generator().manual_seed(1)
    first = (torch.randn(nblocks, width, width, generator=generator) / math.sqrt(width)).to(p.x)
    second = (torch.randn(nblocks, out_width, width, generator=generator) / math.sqrt(width)).to(p.x)

    def forward(x: Tensor, first: Tensor, second: Tensor) -> Tensor:
        hidden = torch.bmm(x.reshape(-1, nblocks, width).transpose(0, 1), first.mT)  # (nblocks, M, width)
        hidden = hidden.permute(1, 2, 0).reshape(-1, nblocks, width).transpose(0, 1)  # the permutation
        return torch.bmm(hidden, second.mT).permute(1, 2, 0).reshape(-1, nblocks * out_width)

    dense = forward(
        torch.eye(p.inputs, dtype=torch.float64, device=p.x.device), first.double(), second.double()
    ).T.contiguous()
    first.requires_grad_(), second.requires_grad_()
    x = p.x.clone().requires_grad_()
    out = forward(x, first, second)

    def grads(*wanted: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(out, wanted, p.g, retain_graph=True)

    kept = first.numel() + second.numel()
    run = {
        "forward": lambda: forward(p.x, first.detach(), second.detach()) + p.bias,
        "input_grad": lambda: grads(x)[0],
        "weight_grad": lambda: grads(first, second),
    }

    def grad_of(_: Tensor) -> Tensor:
        doubles = first.detach().double().requires_grad_(), second.detach().double().requires_grad_()
        return flat(torch.autograd.grad(forward(p.x.double(), *doubles), doubles, p.g.double()))

    note = f"{nblocks} blocks, {kept / p.weight.numel():.1%} kept"
    return Contender(dense, run, same_flops(p, kept), grad_of, dict.fromkeys(OPERATIONS, note))


def torch_structured(p: Problem) -> Contender:
    """Monarch again, by the package torch-structured."""
    layer_type = optional("torch_structured.monarch.monarch_linear", skip_init=True).MonarchLinear
    nblocks = max(2, round((p.inputs / p.outputs + 1) / p.kept))
    torch.manual_seed(1)
    layer = layer_type(p.inputs, p.outputs, bias=True, nblocks=nblocks).to(p.x.dtype)
    layer.bias.data.copy_(p.bias)
    exact = copy.deepcopy(layer).double()
    dense = exact.forward_matmul(torch.eye(p.inputs, dtype=torch.float64)).T.detach().contiguous()
    x = p.x.clone().requires_grad_()
    out, exact_out = layer(x), exact(p.x.double())

    def grads(*wanted: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(out, wanted, p.g, retain_graph=True)

    def grad_of(_: Tensor) -> Tensor:
        return flat(torch.autograd.grad(exact_out, (exact.w1, exact.w2), p.g.double(), retain_graph=True))

    kept = layer.w1.numel() + layer.w2.numel()
    run = {
        "forward": torch.no_grad()(lambda: layer(p.x)),
        "input_grad": lambda: grads(x)[0],
        "weight_grad": lambda: grads(layer.w1, layer.w2),
    }
    note = f"{nblocks} blocks, {kept / p.weight.numel():.1%} kept"
    return Contender(dense, run, same_flops(p, kept), grad_of, dict.fromkeys(OPERATIONS, note))


CONTENDERS: dict[str, Callable[[Problem], Contender]] = {
    "addmm": addmm,
    "onednn": onednn,
    "pixelfly": pixelfly,
    "torch BSR": torch_bsr,
    "sparseprop": sparseprop,
    "sparselab": sparselab,
    "monarch": monarch,
    "torch-structured": torch_structured,
}


# ----------------------------------------------------------------------------------------------------------- helpers


def optional(module: str, skip_init: bool = False) -> Any:
    """A module of a package that need not be installed; `skip_init` for a package whose own __init__ needs a GPU."""
    package = module.split(".")[0]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # theirs, about their own CUDA builds
            if skip_init and package not in sys.modules and (found := importlib.util.find_spec(package)):
                sys.modules[package] = importlib.util.module_from_spec(found)
            return importlib.import_module(module)
    except ImportError as error:
        raise NotHere(f"{package} does not import: {error}") from error


def needs_fp32(p: Problem) -> None:
    if p.x.dtype != torch.float32:
        raise NotHere("fp32 only")


def masked(p: Problem, block: int) -> tuple[Tensor, Tensor]:
    """The weight with a random share of its blocks kept, the same number in every block row; and the mask."""
    rows, cols = math.ceil(p.outputs / block), math.ceil(p.inputs / block)
    count = max(1, round(p.kept * cols))
    order = torch.rand(rows, cols, generator=torch.Generator().manual_seed(2)).argsort(1)
    mask = (order < count).repeat_interleave(block, 0).repeat_interleave(block, 1)[: p.outputs, : p.inputs]
    mask = mask.to(p.weight.device)
    return p.weight * mask, mask


def with_autograd(
    p: Problem, layer: Callable[[Tensor], Tensor], weight: Tensor, mask: Tensor, values: Tensor, note: str
) -> Contender:
    """A layer that is a module of an unstructured weight, its gradients through autograd."""
    x = p.x.clone().requires_grad_()
    out = layer(x)
    run = {
        "forward": torch.no_grad()(lambda: layer(p.x)),
        "input_grad": lambda: torch.autograd.grad(out, x, p.g, retain_graph=True)[0],
        "weight_grad": lambda: torch.autograd.grad(out, values, p.g, retain_graph=True)[0],
    }
    notes = {"input_grad": note, "weight_grad": note}
    return Contender(weight.double(), run, same_flops(p, int(mask.sum())), lambda grad: grad[mask], notes)


def flat(parts: Tensor | Sequence[Tensor]) -> Tensor:
    """One gradient or several as one vector."""
    parts = [parts] if isinstance(parts, Tensor) else parts
    return torch.cat([part.reshape(-1) for part in parts])


# ---------------------------------------------------------------------------------------------------------- measuring


def build(p: Problem, names: Sequence[str]) -> Iterator[tuple[str, Contender]]:
    """The contenders that run here; a line for each that does not."""
    for name in names:
        try:
            yield name, CONTENDERS[name](p)
        except NotHere as why:
            print(f"  {name}: left out: {why}")


def error(p: Problem, contender: Contender, operation: str) -> float:
    """Relative error of an operation against float64 with the contender's own matrix."""
    x, g = p.x.double(), p.g.double()
    expected = {
        "forward": lambda: x @ contender.weight.T + p.bias.double(),
        "input_grad": lambda: g @ contender.weight,
        "weight_grad": lambda: contender.weight_grad_of(g.T @ x),
    }[operation]()
    return relative_error(flat(contender.run[operation]()), flat(expected))


def correct(p: Problem, contenders: Mapping[str, Contender], operation: str) -> dict[str, float]:
    """The contenders that can do the operation, with their errors; the wrong ones are left out, loudly."""
    errors = {name: error(p, c, operation) for name, c in contenders.items() if operation in c.run}
    wrong = {name: e for name, e in errors.items() if not e <= TOLERANCE[p.x.dtype]}  # NaN is wrong too
    for name, e in wrong.items():
        print(f"  WRONG: {name} {operation}: relative error {e:.1e}; not timed")
    return {name: e for name, e in errors.items() if name not in wrong}


def measure(p: Problem, contenders: Mapping[str, Contender], operation: str, rounds: int) -> list[dict[str, Any]]:
    """One row per contender."""
    errors = correct(p, contenders, operation)
    runs = {name: contenders[name].run[operation] for name in errors}
    times = interleave(runs, rounds, warmup=2, flush=True, budget_s=MAX_SECONDS)
    dense = [name for name in DENSE if name in runs]
    best = min(dense, key=times.median, default=None)
    rows = []
    for name in runs:
        flops = contenders[name].flops[operation]
        row = {
            "operation": operation,
            "contender": name,
            "seconds": times.median(name),
            "best_seconds": min(times.seconds[name]),
            "error": errors[name],
        }
        row["gflops"] = flops / times.median(name) / 1e9
        if "onednn" in runs:
            share = times.speedup(name, "onednn") * flops / contenders["onednn"].flops[operation]
            row["of_onednn_rate"] = share
        if best is not None:
            row |= {"best_dense": best, "speedup": times.speedup(name, best), "spread": times.spread(name, best)}
        row["note"] = contenders[name].notes.get(operation, "")
        rows.append(row)
    return rows


COLUMNS = (
    "operation",
    "contender",
    "ms",
    "GFLOP/s kept",
    "of oneDNN's rate",
    "speed-up",
    "middle half",
    "error",
    "note",
)


def cells(row: Mapping[str, Any]) -> list[str]:
    low, high = row.get("spread", (math.nan, math.nan))
    return [
        row["operation"],
        row["contender"],
        f"{row['seconds'] * 1e3:.3f}",
        f"{row['gflops']:.0f}",
        f"{row.get('of_onednn_rate', math.nan):.0%}",
        f"{row.get('speedup', math.nan):.2f}x",
        f"{low:.2f}-{high:.2f}",
        f"{row['error']:.0e}",
        row["note"],
    ]


def shape(text: str) -> tuple[int, int, int]:
    rows, inputs, outputs = map(int, text.split(","))
    return rows, inputs, outputs


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--shapes", nargs="+", type=shape, default=SHAPES, metavar="ROWS,IN,OUT")
    flags.add_argument("--kept", nargs="+", type=float, default=[0.125, 0.25])
    flags.add_argument("--dtypes", nargs="+", choices=DTYPES, default=dtypes_here())
    flags.add_argument("--operations", nargs="+", choices=OPERATIONS, default=OPERATIONS)
    flags.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    flags.add_argument("--block", type=int, default=64)
    flags.add_argument("--lowrank", type=float, default=0.25, help="share of what is kept that goes to the low rank")
    flags.add_argument("--rounds", type=int, default=15)
    return flags.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    args = parse(argv)
    results = []
    for dtype, sizes, kept in itertools.product(args.dtypes, args.shapes, args.kept):
        rows, inputs, outputs = sizes
        title = f"{rows} x {inputs} -> {outputs}, {kept:.1%} kept, {dtype}"
        print(title)
        torch._dynamo.reset()  # else many shapes meet Dynamo's recompile limit
        problem = Problem.random(sizes, kept, DTYPES[dtype], args.block, args.lowrank)
        contenders = dict(build(problem, args.contenders))
        measured = [
            row for operation in args.operations for row in measure(problem, contenders, operation, args.rounds)
        ]
        print_table(title, COLUMNS, map(cells, measured))
        facts = {"rows": rows, "in": inputs, "out": outputs, "kept": kept, "dtype": dtype}
        append_rows("layers", ({**facts, **row} for row in measured))
        results += measured
    return results


if __name__ == "__main__":
    main()
