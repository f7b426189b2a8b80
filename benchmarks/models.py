"""Whole models: training step and inference, the one line and the compact model against `torch.compile`.

    python benchmarks/models.py                                        # everything; an hour
    python benchmarks/models.py --models gpt2 --dtypes bf16 --modes train --contenders torch.compile pixelfly
    python benchmarks/models.py --scale tiny                           # does it run?

Contenders: `density-1` is our own kernels with every block kept, `compact` the compact model, `compact-untied` the same
with a head of its own where the dense model's is tied to the embedding (GPT-2).

Modes: `train` is forward, backward and AdamW; `batch` is inference on the training batch (GPT-2: prefill, 2048 rows);
`single` is inference on one token or one image (GPT-2: the matmuls of a decode step, 1 row). Contenders have the same
initial weights and take turns in one process. Each is first checked against the oracle: the eager model with P(W) in
place of W; the compact model (training only) against itself in eager mode. Memory and compile times come from fresh
processes, with an empty compile cache, then again with a full one.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import math
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from _common import (
    DTYPES,
    Times,
    append_rows,
    dtypes_here,
    interleave,
    load_example,
    peak_memory,
    print_table,
    relative_error,
    reset_peak_memory,
    run_child,
)
from torch import Tensor, nn

MODES = ("train", "batch", "single")
CONTENDERS = "torch.compile", "pixelfly", "density-1", "compact", "compact-untied"
DENSE, SPARSE, DENSITY_1, COMPACT, UNTIED = CONTENDERS
COMPACT_ONES = COMPACT, UNTIED
MAX_SECONDS = 120.0  # per case
FP32_TOLERANCE = 1e-3  # relative, outputs and gradients, between two fp32 computations
CHILD_STEPS = 3
CLASSES = 1000


# ------------------------------------------------------------------------------------------------------------- models


@dataclass(frozen=True)
class Workload:
    """A model, its training batch and one row of it. `items` are tokens or images of the batch."""

    model: nn.Module
    batch: tuple[Tensor, ...]
    single: tuple[Tensor, ...]
    items: int
    labels: Tensor
    labels_go_in: bool = False  # the model computes its own loss

    def to(self, device: str) -> Workload:
        batch, single = (tuple(t.to(device) for t in tensors) for tensors in (self.batch, self.single))
        return replace(self, model=self.model.to(device), batch=batch, single=single, labels=self.labels.to(device))

    def parts(self, rows: int) -> list[Workload]:
        """The same work in batches of at most so many rows, in equal parts if there are several."""
        count = math.ceil(len(self.labels) / rows)
        batches = zip(*(tensor.chunk(count) for tensor in self.batch), strict=True)
        return [
            replace(self, batch=batch, labels=labels)
            for batch, labels in zip(batches, self.labels.chunk(count), strict=True)
        ]

    def forward(self, model: Callable[..., Any], mode: str) -> Tensor:
        """The logits, or the loss when training."""
        if mode != "train":
            return logits_of(model(*(self.single if mode == "single" else self.batch)))
        if self.labels_go_in:
            return model(*self.batch, labels=self.labels).loss
        return F.cross_entropy(logits_of(model(*self.batch)), self.labels)

    def plan_arguments(self, mode: str) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
        kwargs = {"labels": self.labels} if mode == "train" and self.labels_go_in else {}
        return (self.single if mode == "single" else self.batch), kwargs


def logits_of(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output.logits


def gpt2(
    tiny: bool, width: int = 768, layers: int = 12, heads: int = 12, batch: int = 4, tokens: int = 512
) -> Workload:
    """HF's GPT-2, small if nothing else is said; no dropout, so that runs can be compared number by number."""
    from transformers import GPT2Config, GPT2LMHeadModel

    if tiny:
        width, layers, heads, batch, tokens = 128, 1, 2, 2, 64
    sizes: dict[str, Any] = {"n_embd": width, "n_layer": layers, "n_head": heads, "n_positions": max(tokens, 1024)}
    sizes |= {"vocab_size": 512} if tiny else {}
    off: dict[str, Any] = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "use_cache": False}
    config = GPT2Config(**sizes, **off, bos_token_id=None, eos_token_id=None)
    model = GPT2LMHeadModel(config)
    model.loss_type = "ForCausalLM"  # what it falls back to with a warning
    ids = torch.randint(config.vocab_size, (batch, tokens))
    return Workload(model, (ids,), (ids[:1, :1],), ids.numel(), ids, labels_go_in=True)


def mixer(tiny: bool, base: bool = False, batch: int = 16) -> Workload:
    """Mixer-S/16 or -B/16 at 224 pixels."""
    example = load_example("image_mixer")
    config = example.SIZES["tiny"].mixer if tiny else example.mixer_b16() if base else example.mixer_s16()
    return images(example.Mixer(config), config.channels, config.image, config.classes, 16 if tiny else batch)


def vit(tiny: bool, width: int = 384, heads: int = 6, batch: int = 16) -> Workload:
    """ViT-S/16 at 224 pixels, by transformers."""
    from transformers import ViTConfig, ViTForImageClassification

    layers, pixels = 12, 224
    if tiny:
        width, layers, heads, pixels, batch = 128, 1, 2, 32, 16
    sizes: dict[str, Any] = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads}
    rest: dict[str, Any] = {"intermediate_size": 4 * width, "image_size": pixels, "num_labels": CLASSES}
    config = ViTConfig(**sizes, **rest, patch_size=16)
    return images(ViTForImageClassification(config), 3, pixels, CLASSES, batch)


def images(model: nn.Module, channels: int, pixels: int, classes: int, batch: int) -> Workload:
    inputs = torch.randn(batch, channels, pixels, pixels)
    return Workload(model, (inputs,), (inputs[:1],), batch, torch.randint(classes, (batch,)))


SMALL: dict[str, Callable[[bool], Workload]] = {"gpt2": gpt2, "mixer": mixer, "vit": vit}
LARGE: dict[str, Callable[[bool], Workload]] = {  # for a GPU
    "gpt2-medium": partial(gpt2, width=1024, layers=24, heads=16, batch=8, tokens=1024),
    "gpt2-small": partial(gpt2, batch=16, tokens=1024),
    "vit-b": partial(vit, width=768, heads=12, batch=128),
    "mixer-b": partial(mixer, base=True, batch=128),
}
MODELS = SMALL | LARGE


# --------------------------------------------------------------------------------------------------------- contenders


@dataclass(frozen=True)
class Case:
    """What is compared."""

    model: str
    dtype: str
    mode: str
    budget: float
    tiny: bool
    attention: str = "sdpa"
    device: str = "cpu"

    def workload(self) -> Workload:
        torch.manual_seed(0)
        workload = MODELS[self.model](self.tiny)
        choose: Any = getattr(workload.model, "set_attn_implementation", None)
        if choose is not None:
            choose(self.attention)
        return workload.to(self.device)

    def autocast(self) -> torch.autocast:
        dtype = DTYPES[self.dtype]
        return torch.autocast(self.device, dtype, enabled=dtype != torch.float32)

    def options(self, contender: str) -> dict[str, Any]:
        """Options of the backend; what `plan` takes, too."""
        if contender == DENSITY_1:
            return {"budget": 1.0, "lowrank_share": 0.0, "force": True}
        return {"budget": self.budget}


@dataclass
class Runner:
    """One contender, compiled on its own copy of the model. Calling it does one step. `mode`: that of torch.compile."""

    case: Case
    name: str
    workload: Workload
    mode: str | None = None
    model: nn.Module = field(init=False)
    compiled: Any = field(init=False)

    def __post_init__(self) -> None:
        training = self.case.mode == "train"
        self.model = copy.deepcopy(self.workload.model).train(training)
        options = dict(torch._inductor.list_mode_options(self.mode)) if self.mode else {}
        if self.name == DENSE:
            self.compiled = torch.compile(self.model, options=options or None)
        else:
            import pixelfly_compiler

            if self.name in COMPACT_ONES:
                args, kwargs = self.workload.plan_arguments(self.case.mode)
                pixelfly_compiler.sparsify_(
                    self.model, args, kwargs, untie=self.name == UNTIED, **self.case.options(self.name)
                )
            else:
                options |= self.case.options(self.name)
            # The function and not its name, which is known where the package is installed.
            self.compiled = torch.compile(self.model, backend=pixelfly_compiler.pixelfly, options=options or None)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True) if training else None

    def __call__(self) -> None:
        if self.optimizer is None:
            with torch.no_grad(), self.case.autocast():
                self.workload.forward(self.compiled, self.case.mode)
            return
        with self.case.autocast():
            loss = self.workload.forward(self.compiled, self.case.mode)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


# -------------------------------------------------------------------------------------------------------- correctness


def evaluate(
    case: Case, workload: Workload, model: nn.Module, call: Callable[..., Any], rows: int | None = None
) -> tuple[Tensor, ...]:
    """The output and, when training, the gradient of every parameter in `named_parameters` order, aliases included.

    `rows`: run in batches of so many, for whom memory is short.
    """
    parts = workload.parts(rows) if rows and case.mode != "single" else [workload]
    if case.mode != "train":
        with torch.no_grad():
            return (torch.cat([part.forward(call, case.mode) for part in parts]),)
    losses = []
    for part in parts:
        loss = part.forward(call, case.mode) / len(parts)
        loss.backward()
        losses.append(loss.detach())
    grads = [p.grad for _, p in model.named_parameters(remove_duplicate=False)]
    model.zero_grad()
    return (torch.stack(losses).sum(), *(losses[0].new_zeros(()) if grad is None else grad for grad in grads))


def through_projection(plan: Any, dense: nn.Module, oracle: nn.Module, values: Sequence[Tensor]) -> list[Tensor]:
    """The oracle's gradients as the dense parameters must see them: P of each planned weight's, aliases added up."""
    import pixelfly_compiler

    originals = dict(dense.named_parameters(remove_duplicate=False))
    projected = dict(oracle.named_parameters(remove_duplicate=False))
    grads = dict(zip(projected, values[1:], strict=True))
    expected = [values[0]]
    for weight in originals.values():
        names = [name for name, other in originals.items() if other is weight]
        distinct = {id(projected[name]): name for name in names}.values()
        parts = []
        for name in distinct:
            changed = not torch.equal(projected[name], weight)  # an embedding's lookup of a tied weight is not
            entry = next((plan[alias] for alias in names if alias in plan), None) if changed else None
            parts.append(grads[name] if entry is None else pixelfly_compiler.project(grads[name], entry))
        expected.append(torch.stack(parts).sum(0) if len(parts) > 1 else parts[0])
    return expected


def check(case: Case, runner: Runner, rows: int | None = None) -> float:
    """Worst relative error of outputs and gradients against the eager oracle in fp32; raises if it is too large.

    A compact model is its own oracle. In bf16 it may be twice the error of the eager oracle under the same autocast.
    `rows`: the oracle runs in batches of so many.
    """
    workload = runner.workload
    oracle = copy.deepcopy(runner.model)
    plan = None
    if runner.name not in (DENSE, *COMPACT_ONES):
        import pixelfly_compiler

        args, kwargs = workload.plan_arguments(case.mode)
        plan = pixelfly_compiler.plan(runner.model, args, kwargs, **case.options(runner.name))
        pixelfly_compiler.project_(oracle, plan)

    def as_dense_sees(values: tuple[Tensor, ...]) -> Sequence[Tensor]:
        if plan is None or case.mode != "train":
            return values
        return through_projection(plan, runner.model, oracle, values)

    exact = as_dense_sees(evaluate(case, workload, oracle, oracle, rows))
    with case.autocast():
        ours = evaluate(case, workload, runner.model, runner.compiled)
    error = worst_error(ours, exact)
    allowed = FP32_TOLERANCE
    if case.dtype != "fp32":
        with case.autocast():
            allowed = 2 * worst_error(as_dense_sees(evaluate(case, workload, oracle, oracle, rows)), exact)
    if not error <= allowed:  # NaN is wrong too
        raise AssertionError(f"{runner.name}: error {error:.1e} against the oracle, {allowed:.1e} allowed")
    return error


def worst_error(values: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """The largest relative error; for a gradient far below the mean norm, all rounding, relative to a tenth of that."""
    norms = torch.stack([e.double().norm() for e in exact[1:]]) if len(exact) > 1 else torch.zeros(1)
    floor = 0.1 * float(norms.mean())
    errors = [relative_error(values[0], exact[0])]
    for value, e in zip(values[1:], exact[1:], strict=True):
        errors.append(float((value.double() - e.double()).norm() / max(float(e.double().norm()), floor)))
    return max(errors, key=lambda error: (error != error, error))  # a NaN is the worst


# ----------------------------------------------------------------------------------------------------- fresh processes


def child(case: Case, contender: str) -> dict[str, float]:
    """What a fresh process can tell: time to compile, and the peak of memory."""
    runner = Runner(case, contender, case.workload())
    start = time.perf_counter()
    runner()
    first = time.perf_counter() - start
    peak_with_compiler = peak_memory()
    reset = reset_peak_memory()
    steps = []
    for _ in range(CHILD_STEPS):
        start = time.perf_counter()
        runner()
        steps.append(time.perf_counter() - start)
    facts = {"compile_s": first - min(steps), "peak_bytes": max(peak_with_compiler, peak_memory())}
    if reset:
        facts["step_peak_bytes"] = peak_memory()
    return facts


def in_fresh_processes(case: Case, contender: str) -> dict[str, Any]:
    """Run `child` with an empty compile cache, then again with what that left there."""
    flags = ["--child", contender, "--models", case.model, "--dtypes", case.dtype, "--modes", case.mode]
    flags += ["--budget", str(case.budget), "--scale", "tiny" if case.tiny else "full"]
    flags += ["--attention", case.attention]
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as cache:
        cold = run_child(__file__, flags, {"TORCHINDUCTOR_CACHE_DIR": cache})
        warm = run_child(__file__, flags, {"TORCHINDUCTOR_CACHE_DIR": cache})
    for answer in (cold, warm):
        if "child_error" in answer:
            return answer
    return {**warm, "compile_s": cold["compile_s"], "warm_compile_s": warm["compile_s"]}


# ---------------------------------------------------------------------------------------------------------- measuring


def measure(case: Case, names: Sequence[str], args: argparse.Namespace) -> list[dict[str, Any]]:
    """One row per contender."""
    torch._dynamo.reset()  # else the contenders of many cases meet Dynamo's recompile limit
    workload = case.workload()
    runners = {name: Runner(case, name, workload) for name in names}
    errors = {} if args.no_check else {name: check(case, runner) for name, runner in runners.items()}
    times = interleave(runners, args.rounds, warmup=2, budget_s=MAX_SECONDS)
    del runners
    rows = []
    for name in names:
        row: dict[str, Any] = {
            "contender": name,
            "seconds": times.median(name),
            "best_seconds": min(times.seconds[name]),
        }
        row |= {"error": errors.get(name), **compared(times, name)}
        row["items_per_second"] = (1 if case.mode == "single" else workload.items) / row["seconds"]
        rows.append(row if args.no_children else {**row, **in_fresh_processes(case, name)})
    return rows


def compared(times: Times, name: str) -> dict[str, Any]:
    if DENSE not in times.seconds:
        return {}
    return {"speedup": times.speedup(name, DENSE), "spread": times.spread(name, DENSE)}


COLUMNS = ("contender", "ms", "items/s", "speed-up", "middle half", "error", "peak MiB", "compile cold s", "warm s")


def cells(row: Mapping[str, Any]) -> list[str]:
    def cell(key: str, spec: str, scale: float = 1.0) -> str:
        return "-" if row.get(key) is None else format(row[key] * scale, spec)

    middle = "-" if "spread" not in row else "{:.2f}-{:.2f}".format(*row["spread"])
    return [
        row["contender"],
        cell("seconds", ".1f", 1e3),
        cell("items_per_second", ",.0f"),
        cell("speedup", ".2f"),
        middle,
        cell("error", ".0e"),
        cell("peak_bytes", ",.0f", 2**-20),
        cell("compile_s", ".1f"),
        cell("warm_compile_s", ".1f"),
    ]


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--models", nargs="+", choices=MODELS, default=list(SMALL))
    flags.add_argument("--dtypes", nargs="+", choices=DTYPES, default=dtypes_here())
    flags.add_argument("--modes", nargs="+", choices=MODES, default=MODES)
    flags.add_argument("--budget", type=float, default=0.25)
    flags.add_argument("--attention", choices=("sdpa", "eager"), default="sdpa", help="of all contenders")
    flags.add_argument("--rounds", type=int, default=7)
    flags.add_argument("--scale", choices=("full", "tiny"), default="full")
    flags.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=CONTENDERS, help="compact: training only")
    flags.add_argument("--no-check", action="store_true", help="skip the check against the oracle")
    flags.add_argument("--no-children", action="store_true", help="skip memory and compile times")
    flags.add_argument("--child", choices=CONTENDERS, help=argparse.SUPPRESS)
    return flags.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    args = parse(argv)
    cases = [
        Case(model, dtype, mode, args.budget, args.scale == "tiny", args.attention)
        for model, dtype, mode in itertools.product(args.models, args.dtypes, args.modes)
    ]
    if args.child:
        print(json.dumps(child(cases[0], args.child)))
        return []
    results = []
    for case in cases:
        names = [name for name in args.contenders if case.mode == "train" or name not in COMPACT_ONES]
        rows = measure(case, names, args)
        title = f"{case.model} {case.dtype} {case.mode}, budget {case.budget:.0%}, {case.attention}"
        print_table(title, COLUMNS, map(cells, rows))
        for row in rows:
            if "child_error" in row:
                print(f"  {row['contender']}: no memory or compile time: {row['child_error']}", file=sys.stderr)
        facts: dict[str, Any] = {"model": case.model, "dtype": case.dtype, "mode": case.mode}
        facts |= {"budget": case.budget, "attention": case.attention}
        if not case.tiny:
            append_rows("models", ({**facts, **row} for row in rows))
        results += rows
    return results


if __name__ == "__main__":
    main()
