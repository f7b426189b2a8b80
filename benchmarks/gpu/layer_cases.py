"""Single matmuls on a GPU: forward and both gradients against cuBLAS, and the forward against other sparse formats.

The cases vary one thing of a headline case, then two, and so on: what comes first matters most, where time runs out.
Every call is captured as a CUDA graph if it can be, so that the host's overhead is not measured.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import layers
import torch
from _common import interleave, timer_of
from layers import OPERATIONS, TOLERANCE, Contender, NotHere, Problem, error, masked, same_flops
from torch._inductor import config as inductor_config

SIZES = ((4096, 4096), (1024, 4096), (4096, 1024), (2048, 2048), (1024, 1024), (8192, 8192))  # in, out
AXES: Any = (  # rows, sizes, kept, block, against whom
    (4096, 16384, 16, 1, 512),
    SIZES,
    (0.25, 0.125, 0.5, 0.0625),
    (64, 128, 32),
    ("ours", "tuned", "peers"),
)
TINY: Any = ((64, 1), ((128, 128),), (0.5, 0.25), (32,), ("ours", "tuned", "peers"))
LOWRANK_SHARE = 0.25
ROUNDS = 21


def keys(tiny: bool) -> list[str]:
    """All cases as `ROWS,IN,OUT,KEPT,BLOCK,GROUP`, those nearest to the first first."""
    axes = TINY if tiny else AXES
    choices = itertools.product(*map(range, map(len, axes)))
    ordered = sorted(choices, key=lambda places: (sum(map(bool, places)), sum(places)))
    cases = ([axis[place] for axis, place in zip(axes, places, strict=True)] for places in ordered)
    return [f"{rows},{size[0]},{size[1]},{kept},{block},{group}" for rows, size, kept, block, group in cases]


def prepare(key: str, device: str) -> Callable[[], list[dict[str, Any]]]:
    """Build and check the contenders of a case."""
    *numbers, share, size, group = key.split(",")
    rows, inputs, outputs = map(int, numbers)
    kept, block = float(share), int(size)
    torch._dynamo.reset()  # else many shapes meet Dynamo's recompile limit
    problem = Problem.random((rows, inputs, outputs), kept, torch.bfloat16, block, LOWRANK_SHARE, device)
    contenders, left_out = build(problem, group)
    errors = {
        (operation, name): error(problem, contender, operation)
        for operation in OPERATIONS
        for name, contender in contenders.items()
        if operation in contender.run
    }
    facts = {"rows": rows, "in": inputs, "out": outputs, "kept": kept, "block": block, "dtype": "bf16"}

    def measure() -> list[dict[str, Any]]:
        found = [row for operation in OPERATIONS for row in timed(problem, contenders, operation, errors)]
        found += [{"contender": name, "left_out": why} for name, why in left_out.items()]
        return [{**facts, **row} for row in found]

    return measure


def build(p: Problem, group: str) -> tuple[dict[str, Contender], dict[str, str]]:
    """The contenders that run here, and why the others do not: a peer's error is no error of the case."""
    found: dict[str, Contender] = {}
    left_out: dict[str, str] = {}
    for name, make in CONTENDERS[group].items():
        try:
            contender = make(p)
            for run in contender.run.values():
                run()
            found[name] = contender
        except NotHere as why:
            left_out[name] = str(why)
        except Exception as cause:
            if group != "peers":
                raise
            left_out[name] = f"{type(cause).__name__}: {cause}"[:300]
    return found, left_out


def timed(
    p: Problem, contenders: Mapping[str, Contender], operation: str, errors: Mapping[tuple[str, str], float]
) -> list[dict[str, Any]]:
    """One row for each contender that can do the operation; those that do it wrong are not timed."""
    device, dense = p.x.device.type, "cuBLAS"
    names = [name for name in contenders if (operation, name) in errors]
    right = [name for name in names if errors[operation, name] <= TOLERANCE[p.x.dtype]]  # NaN is wrong
    runs, captured = {}, {}
    for name in right:
        runs[name], captured[name] = graphed(contenders[name].run[operation], device)
    times = interleave(runs, ROUNDS, warmup=2, flush=True, timer=timer_of(device), device=device)
    rows = []
    for name in names:
        row: dict[str, Any] = {"operation": operation, "contender": name, "error": errors[operation, name]}
        if name not in right:
            rows.append(row | {"wrong": f"relative error {errors[operation, name]:.1e}"})
            continue
        flops = contenders[name].flops[operation]
        row |= {"seconds": times.median(name), "flops": flops, "bytes": least_bytes(p, flops)}
        if dense in right:
            row |= {"speedup": times.speedup(name, dense), "spread": times.spread(name, dense)}
            row["of_cublas_rate"] = row["speedup"] * flops / contenders[dense].flops[operation]
        rows.append(row | {"graph": captured[name], "note": contenders[name].notes.get(operation, "")})
    return rows


def least_bytes(p: Problem, flops: int) -> int:
    """Each input and output once: both activations, and of the weight what is kept."""
    kept = flops // (2 * p.rows)
    return p.x.element_size() * (p.rows * (p.inputs + p.outputs) + kept)


def graphed(run: Callable[[], Any], device: str) -> tuple[Callable[[], Any], bool]:
    """The call as a CUDA graph; the call itself where it cannot be captured."""
    if device != "cuda":
        return run, False
    try:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                run()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            kept = run()
    except Exception as error:  # a library that waits for the device, say
        torch.cuda.synchronize()
        print(f"not captured: {error}"[:300])
        return run, False
    return _Replay(graph, kept), True


@dataclass
class _Replay:
    """A captured call; it keeps its result, which every replay writes again."""

    graph: Any
    result: Any

    def __call__(self) -> None:
        self.graph.replay()


def tuned(p: Problem) -> Contender:
    """Ours with the launches that Inductor finds fastest, those that read by TMA among them; or dense, if that is."""
    with inductor_config.patch(max_autotune_gemm=True):
        contender = layers.pixelfly(p)
        for run in contender.run.values():
            run()
    return contender


# ------------------------------------------------------------------------------------------------------------- peers


def torch_bsr(p: Problem) -> Contender:
    """torch's own Triton kernel for block-sparse rows, with the fastest of a few launches."""
    if p.outputs % p.block or p.inputs % p.block:
        raise NotHere(f"BSR needs sizes that are multiples of the block, {p.block}")
    from torch.sparse._triton_ops import bsr_dense_addmm

    weight, mask = masked(p, p.block)
    bsr, bias = weight.to_sparse_bsr((p.block, p.block)), p.bias[:, None].expand(-1, p.rows)
    timer = timer_of(p.x.device.type)
    best: tuple[float, dict[str, int]] = (math.inf, {})
    for split, warps, stages in itertools.product((64, 128, 256), (4, 8), (2, 4)):
        meta = {"SPLIT_N": max(p.rows // split, 1), "num_warps": warps, "num_stages": stages, "GROUP_SIZE_ROW": 4}
        try:
            for _ in range(3):
                seconds = timer(lambda meta=meta: bsr_dense_addmm(bias, bsr, p.x.T, meta=meta))  # type: ignore[misc]
        except Exception:  # a launch that does not fit
            continue
        best = min(best, (seconds, meta), key=lambda pair: pair[0])
    if not best[1]:
        raise NotHere("no launch of torch's BSR kernel works")
    run = {"forward": lambda: bsr_dense_addmm(bias, bsr, p.x.T, meta=best[1]).T}
    return Contender(weight.double(), run, same_flops(p, int(mask.sum())), notes={"forward": f"{best[1]}"})


def semi_structured(p: Problem) -> Contender:
    """Two of every four weights, by torch's 2:4 tensors; half of the dense flops whatever the budget."""
    if p.kept != 0.5:
        raise NotHere("2:4 keeps 50%")
    from torch.sparse import to_sparse_semi_structured

    groups = p.weight.view(-1, 4)
    mask = torch.zeros_like(groups).scatter(1, groups.abs().topk(2).indices, 1.0).view_as(p.weight)
    sparse = to_sparse_semi_structured((p.weight * mask).contiguous())
    run = {"forward": lambda: torch.nn.functional.linear(p.x, sparse, p.bias)}
    return Contender((p.weight * mask).double(), run, same_flops(p, p.weight.numel() // 2))


def monarch(p: Problem) -> Contender:
    """The forward of two block-diagonal factors, as batched matmuls."""
    both = layers.monarch(p)
    return Contender(both.weight, {"forward": torch.no_grad()(both.run["forward"])}, both.flops, notes=both.notes)


CONTENDERS: dict[str, dict[str, Callable[[Problem], Contender]]] = {
    "ours": {"cuBLAS": layers.addmm, "pixelfly": layers.pixelfly},
    "tuned": {"cuBLAS": layers.addmm, "pixelfly, tuned": tuned},
    "peers": {"cuBLAS": layers.addmm, "monarch": monarch, "2:4": semi_structured, "torch BSR": torch_bsr},
}
