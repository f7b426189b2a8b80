"""Quality at equal steps: compact models and the one line against dense, on the Python standard library's source.

    python benchmarks/quality.py                                  # everything: hours on two cores
    python benchmarks/quality.py --contenders dense "compact 0.25" --seeds 0
    python benchmarks/quality.py --time                           # step times: two minutes on a quiet machine
    python benchmarks/quality.py --size tiny                      # does it run?

A byte-level GPT-2 of about ten million parameters; AdamW with warm-up and cosine to 10%; all contenders see the same
data in the same order. Each contender's learning rate is tuned first, on one seed, downhill over the same grid; then it
trains with the best one on all seeds. Reported against steps, flops of the weight matmuls (forward and backward) and
seconds, which are steps times the median step time: `--time` measures that by itself, so that the training may run
beside other load.

Each run appends one row to `results/quality.jsonl`, and one that is there already is not run again: stop and go on at
any time. `results/quality.csv` and `quality.png` are made of all rows of the size and number of steps asked for, each
contender's at its best rate.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import math
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _common import DTYPES, HERE, append_rows, dtypes_here, interleave, load_example, print_table
from torch import Tensor, nn

import pixelfly_compiler
from pixelfly_compiler.kernels.ops import support_index
from pixelfly_compiler.kernels.support import Support
from pixelfly_compiler.sparsify import compact_weights

RATES = (2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3, 8e-3)
CLIP = 1.0
VALIDATION_SEED = 1234


@dataclass(frozen=True)
class Size:
    """The model, the data of one step, the precision, and how often to look."""

    width: int
    layers: int
    sequence: int
    batch: int
    steps: int
    dtype: str
    evaluations: int
    validation_batches: int

    def autocast(self) -> torch.autocast:
        """In fp32 where the processor has no bf16."""
        return torch.autocast("cpu", DTYPES[self.dtype], enabled=self.dtype != "fp32" and self.dtype in dtypes_here())


SIZES = {
    "full": Size(384, 6, sequence=256, batch=32, steps=2000, dtype="fp32", evaluations=20, validation_batches=16),
    "short": Size(384, 6, sequence=128, batch=16, steps=600, dtype="bf16", evaluations=6, validation_batches=32),
    "tiny": Size(128, 1, sequence=32, batch=4, steps=4, dtype="fp32", evaluations=2, validation_batches=1),
}


@dataclass(frozen=True)
class Run:
    """What a row of results is about: rows of equal runs are interchangeable."""

    contender: str
    rate: float
    seed: int
    steps: int
    size: str


# --------------------------------------------------------------------------------------------------------- contenders


@dataclass(frozen=True)
class Built:
    """A model ready to train: its parameters, what to call, and the share of the dense matmul compute it does."""

    model: nn.Module
    call: Callable[..., Any]
    kept: float


def gpt(size: Size) -> nn.Module:
    """HF's GPT-2; the head has a weight of its own, so that each contender may make it sparse."""
    example = load_example("train_gpt")
    model = example.gpt(example.Size(size.width, size.layers, size.sequence, size.batch, steps=0))
    model.set_attn_implementation("eager")  # the faster one here, for dense as for sparse models
    model.config.tie_word_embeddings = False
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    return model


def dense(size: Size, ids: Tensor) -> Built:
    model = gpt(size)
    return Built(model, torch.compile(model), 1.0)


def compact(size: Size, ids: Tensor, **options: Any) -> Built:
    model = pixelfly_compiler.sparsify_(gpt(size), (ids,), {"labels": ids}, force=True, **options)
    return Built(model, torch.compile(model, backend="pixelfly"), pixelfly_compiler.plan_of(model).kept)


def one_line(size: Size, ids: Tensor, rescaled: bool = False, **options: Any) -> Built:
    model = gpt(size)
    plan = pixelfly_compiler.plan(model, (ids,), {"labels": ids}, force=True, **options)
    if rescaled:
        pixelfly_compiler.rescale_(model, plan)
    planned: dict[str, Any] = {"plan": plan}
    return Built(model, torch.compile(model, backend="pixelfly", options=planned), plan.kept)


def random_blocks(size: Size, ids: Tensor, budget: float) -> Built:
    """As compact, but each block row keeps as many blocks at random places."""
    built = compact(size, ids, budget=budget)
    generator = np.random.RandomState(0)
    for held in compact_weights(built.model):
        weight = held.parametrization
        weight.support = shuffled(weight.support, generator)
        weight.index = support_index(weight.support)
    return built


def shuffled(support: Support, generator: np.random.RandomState) -> Support:
    counts = support.row_counts()
    cols = [generator.permutation(support.block_cols)[:count] for count in counts]
    return Support.from_coordinates(
        support.out_features, support.in_features, support.block, support.rows(), np.concatenate(cols)
    )


class LowRank(nn.Module):
    """Parametrization W = U V^T, scaled for Adam as `CompactWeight` scales u."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.rank = rank

    def forward(self, u: Tensor, v: Tensor) -> Tensor:
        return (v.shape[0] / (4 * self.rank)) * u @ v.mT

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        out_features, in_features = weight.shape
        v = torch.randn(in_features, self.rank) / math.sqrt(in_features)
        u = torch.randn(out_features, self.rank) * weight.std() * math.sqrt(in_features / self.rank)
        return u * 4 * self.rank / in_features, v


def low_rank(size: Size, ids: Tensor, budget: float) -> Built:
    """Every planned weight as U V^T with as many elements as the budget gives it."""
    model = gpt(size)
    plan = pixelfly_compiler.plan(model, (ids,), {"labels": ids}, budget=budget, force=True)
    for entry in plan.sparse:
        path, _, attribute = entry.name.rpartition(".")
        rank = max(1, entry.kept // (entry.out_features + entry.in_features))
        with torch.autocast("cpu", enabled=False):  # what it gives is to have the weight's own dtype
            nn.utils.parametrize.register_parametrization(model.get_submodule(path), attribute, LowRank(rank))
    return Built(model, torch.compile(model), plan.kept)


def smaller_dense(size: Size, ids: Tensor, budget: float) -> Built:
    """A narrower model whose weight matmuls cost the budget's share: width^2 per layer, in whole multiples of 16."""
    width = max(16, round(size.width * math.sqrt(budget) / 16) * 16)
    model = gpt(replace(size, width=width))
    return Built(model, torch.compile(model), (width / size.width) ** 2)


CONTENDERS: dict[str, Callable[[Size, Tensor], Built]] = {
    "dense": dense,
    "compact 0.5": lambda size, ids: compact(size, ids, budget=0.5),
    "compact 0.25": lambda size, ids: compact(size, ids, budget=0.25),
    "compact 0.125": lambda size, ids: compact(size, ids, budget=0.125),
    "compact 0.25, same strides": lambda size, ids: compact(size, ids, budget=0.25, vary_strides=False),
    "one line 0.25": lambda size, ids: one_line(size, ids, budget=0.25),
    "one line 0.25, varied strides": lambda size, ids: one_line(size, ids, budget=0.25, vary_strides=True),
    "one line 0.25, rescaled": lambda size, ids: one_line(size, ids, rescaled=True, budget=0.25, vary_strides=True),
    "butterfly 0.25": lambda size, ids: compact(size, ids, budget=0.25, lowrank_share=0.0),
    "low rank 0.25": lambda size, ids: low_rank(size, ids, 0.25),
    "random blocks 0.25": lambda size, ids: random_blocks(size, ids, 0.25),
    "smaller dense 0.25": lambda size, ids: smaller_dense(size, ids, 0.25),
}


# ----------------------------------------------------------------------------------------------------------- training


@torch.no_grad()
def validation(built: Built, size: Size, batches: Sequence[Tensor]) -> float:
    """Nats per byte; the mode stays `train`, since nothing depends on it and another one would compile anew."""
    with size.autocast():
        return float(torch.stack([built.call(ids, labels=ids).loss for ids in batches]).mean())


def train(run: Run) -> dict[str, Any]:
    """One row: the validation loss at evenly spaced steps."""
    example, training = load_example("train_gpt"), load_example("_training")
    size = SIZES[run.size]
    torch._dynamo.reset()
    held_in, held_out = example.standard_library()
    data: Iterator[Tensor] = example.batches(held_in, size, run.seed)
    held_out_batches = list(itertools.islice(example.batches(held_out, size, VALIDATION_SEED), size.validation_batches))
    built = build(run.contender, size, next(data), run.seed)
    optimizer = torch.optim.AdamW(built.model.parameters(), lr=run.rate, fused=True)
    schedule = training.warmup_and_cosine(
        optimizer, training.Training(run.steps, run.rate, torch.float32, size.batch * size.sequence, run.seed)
    )
    looks = {round(run.steps * (i + 1) / size.evaluations) for i in range(size.evaluations)}
    curve = []
    for step, ids in enumerate(itertools.islice(data, run.steps), start=1):
        train_step(built, size, optimizer, ids)
        schedule.step()
        if step in looks:
            curve.append({"step": step, "loss": validation(built, size, held_out_batches)})
    parameters = sum(p.numel() for p in built.model.parameters())
    return {
        **asdict(run),
        "curve": curve,
        "flops": built.kept * flops(size),
        "kept": built.kept,
        "elements": parameters,
    }


def build(contender: str, size: Size, ids: Tensor, seed: int) -> Built:
    torch.manual_seed(seed)
    with size.autocast():  # a plan is made for the precision it runs in
        return CONTENDERS[contender](size, ids)


def train_step(built: Built, size: Size, optimizer: torch.optim.Optimizer, ids: Tensor) -> None:
    with size.autocast():
        loss = built.call(ids, labels=ids).loss
    loss.backward()
    nn.utils.clip_grad_norm_(built.model.parameters(), CLIP)
    optimizer.step()
    optimizer.zero_grad()


def flops(size: Size) -> float:
    """Of the dense model's weight matmuls in one step, forward and backward."""
    weights = 12 * size.layers * size.width**2 + 256 * size.width
    return 6.0 * size.batch * size.sequence * weights


# --------------------------------------------------------------------------------------------------------------- rows


class Results:
    """The rows so far; a run that has one is not run again."""

    def __init__(self, path: Path, record: bool) -> None:
        self.path, self.record = path, record
        lines = path.read_text().splitlines() if record and path.exists() else []
        self.rows: dict[Run, dict[str, Any]] = {self._run(row): row for row in map(json.loads, lines)}

    @staticmethod
    def _run(row: Mapping[str, Any]) -> Run:
        return Run(**{key: row[key] for key in Run.__dataclass_fields__})

    def get(self, run: Run) -> dict[str, Any]:
        if run not in self.rows:
            row = train(run)
            if self.record:
                append_rows("quality", [row])
            self.rows[run] = row
            print(f"{run.contender}, learning rate {run.rate:g}, seed {run.seed}: {final(row):.4f}", flush=True)
        return self.rows[run]


def final(row: Mapping[str, Any]) -> float:
    loss = float(row["curve"][-1]["loss"])
    return loss if math.isfinite(loss) else math.inf


def tuned(contender: str, args: argparse.Namespace, results: Results) -> list[dict[str, Any]]:
    """The rows of all seeds at the contender's best learning rate, which the first seed decides."""

    def row(rate: float, seed: int) -> dict[str, Any]:
        return results.get(Run(contender, rate, seed, args.steps, args.size))

    best = lowest(lambda rate: final(row(rate, args.seeds[0])), sorted(args.rates))
    return [row(best, seed) for seed in args.seeds]


def lowest(loss: Callable[[float], float], rates: Sequence[float]) -> float:
    """The rate where `loss` has a local minimum, walking downhill from the middle of `rates`."""
    at, step = len(rates) // 2, 1
    if at + step >= len(rates) or loss(rates[at + step]) >= loss(rates[at]):
        step = -1
    while 0 <= at + step < len(rates) and loss(rates[at + step]) < loss(rates[at]):
        at += step
    return rates[at]


# --------------------------------------------------------------------------------------------------------- step times


def step_times(contenders: Sequence[str], size: Size, budget_s: float = 60.0) -> dict[str, float]:
    """Median seconds of each contender's training step: one step of each in turn, so that noise hits all alike."""
    example = load_example("train_gpt")
    ids = next(example.batches(example.standard_library()[0], size, seed=0))
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=2 * len(CONTENDERS)):  # they share the code of one forward
        steppers = {name: stepper(name, size, ids) for name in contenders}
        times = interleave(steppers, rounds=40, warmup=2, budget_s=budget_s)
    return {name: times.median(name) for name in contenders}


def stepper(contender: str, size: Size, ids: Tensor) -> Callable[[], None]:
    built = build(contender, size, ids, seed=0)
    optimizer = torch.optim.AdamW(built.model.parameters(), lr=1e-4, fused=True)
    return lambda: train_step(built, size, optimizer, ids)


def record_step_times(args: argparse.Namespace) -> None:
    times = step_times(args.contenders, SIZES[args.size])
    append_rows("quality_steps", [{"size": args.size, "contender": name, "seconds": s} for name, s in times.items()])
    print_table("median training step", ("contender", "ms"), [(name, f"{s * 1e3:.0f}") for name, s in times.items()])


def recorded_step_times(size: str) -> dict[str, float]:
    """Contender -> seconds per step, as last recorded at this size."""
    path = HERE / "results" / "quality_steps.jsonl"
    rows = map(json.loads, path.read_text().splitlines() if path.exists() else ())
    return {row["contender"]: row["seconds"] for row in rows if row["size"] == size}


# ------------------------------------------------------------------------------------------------------------- report

Groups = Mapping[str, Sequence[Mapping[str, Any]]]


def at_their_best(results: Results, size: str, steps: int) -> Groups:
    """Each contender's rows of this size and number of steps, at its best rate, which its first seed decides."""
    groups = {}
    for name in CONTENDERS:
        rows = [row for run, row in results.rows.items() if (run.contender, run.size, run.steps) == (name, size, steps)]
        if rows:
            seed = min(row["seed"] for row in rows)
            best = min((row for row in rows if row["seed"] == seed), key=final)
            groups[name] = [row for row in rows if row["rate"] == best["rate"]]
    return groups


def write_csv(path: Path, groups: Groups, times: Mapping[str, float]) -> None:
    columns = ("contender", "rate", "seed", "step", "seconds", "flops", "loss")
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        for name, row in [(name, row) for name, rows in groups.items() for row in rows]:
            for point in row["curve"]:
                step = point["step"]
                seconds = step * times[name] if name in times else ""
                writer.writerow((name, row["rate"], row["seed"], step, seconds, step * row["flops"], point["loss"]))


def plot(path: Path, groups: Groups, times: Mapping[str, float]) -> None:
    """Mean validation loss over seeds against steps, flops and seconds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(18, 5), sharey=True)
    for place, (name, rows) in enumerate(groups.items()):
        points = list(zip(*(row["curve"] for row in rows), strict=True))
        loss = [statistics.mean(point["loss"] for point in same) for same in points]
        steps = [same[0]["step"] for same in points]
        for axis, unit in zip(axes, (1, rows[0]["flops"], times.get(name, math.nan)), strict=True):
            axis.plot([step * unit for step in steps], loss, "-" if place < 10 else "--", label=name)  # of ten colours
    for axis, label in zip(axes, ("steps", "flops of weight matmuls", "seconds"), strict=True):
        axis.set_xlabel(label)
    axes[0].set_ylabel("validation loss (nats per byte)")
    axes[-1].legend(loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, bbox_inches="tight")
    pyplot.close(figure)


def dense_within(results: Results, args: argparse.Namespace, steps: float) -> float:
    """The lowest loss of any dense run of at most so many steps, whatever its schedule; infinite if there is none."""
    rows = [row for run, row in results.rows.items() if run.contender == "dense" and run.size == args.size]
    return min((point["loss"] for row in rows for point in row["curve"] if point["step"] <= steps), default=math.inf)


def cells(name: str, groups: Groups, times: Mapping[str, float], dense_by: Callable[[float], float]) -> list[str]:
    """One row of the table."""
    rows, base = groups[name], groups.get("dense")
    loss = statistics.mean(map(final, rows))
    spread = max(map(final, rows)) - min(map(final, rows))
    ratio = times[name] / times["dense"] if {name, "dense"} <= times.keys() else math.nan
    by_then = dense_by(rows[0]["steps"] * ratio)
    return [
        name,
        f"{rows[0]['rate']:g}",
        f"{rows[0]['kept']:.1%}",
        f"{rows[0]['elements'] / 1e6:.2f}",
        f"{loss:.4f}",
        f"{spread:.4f}" if len(rows) > 1 else "-",
        f"{loss / statistics.mean(map(final, base)) - 1:+.1%}" if base else "-",
        f"{times[name] * 1e3:.0f}" if name in times else "-",
        f"{by_then:.4f}" if math.isfinite(by_then) else "-",
    ]


COLUMNS = (
    "contender",
    "best rate",
    "kept",
    "M parameters",
    "loss",
    "spread",
    "against dense",
    "ms per step",
    "dense by then",
)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    flags.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    flags.add_argument("--rates", nargs="+", type=float, default=list(RATES))
    flags.add_argument("--size", choices=SIZES, default="short", help="tiny is not recorded")
    flags.add_argument("--steps", type=int, help="default: the size's own")
    flags.add_argument("--time", action="store_true", help="record the contenders' step times, and train nothing")
    args = flags.parse_args(argv)
    args.steps = args.steps or SIZES[args.size].steps
    return args


def main(argv: Sequence[str] | None = None) -> Groups:
    args = parse(argv)
    if args.time:
        record_step_times(args)
        return {}
    recorded = args.size != "tiny"
    folder = HERE / "results" if recorded else Path(tempfile.mkdtemp())
    results = Results(HERE / "results" / "quality.jsonl", recorded)
    groups = {name: tuned(name, args, results) for name in args.contenders}
    times = recorded_step_times(args.size)
    everything = at_their_best(results, args.size, args.steps)
    write_csv(folder / "quality.csv", everything, times)
    plot(folder / "quality.png", everything, times)
    title = f"validation loss after {args.steps} steps, nats per byte; mean of {len(args.seeds)} seeds"
    dense_by = partial(dense_within, results, args)
    print_table(title, COLUMNS, [cells(name, groups, times, dense_by) for name in groups])
    print(f"{folder / 'quality.csv'}, {folder / 'quality.png'}")
    return groups


if __name__ == "__main__":
    main()
