"""Make a trained model compact, fine-tune it, save it and load it again.

    python examples/finetune_compact.py                # a few minutes on two cores

Trains a small dense GPT-2 on the standard library's source. `sparsify_(model, ..., init="project")` then puts the best
compact weights in place of the dense ones, and fine-tuning wins back what that cost: parameters, gradients and
optimizer state are compact, and the compiled model never makes a dense weight.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from _training import DENSE, SPARSE, Contender, Training, train
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_model
from torch import nn
from train_gpt import SIZES, Size, batches, gpt, standard_library, validation_loss

import pixelfly_compiler


@dataclass(frozen=True)
class Stage:
    """The model at one moment: validation loss in nats per byte, elements of all parameters."""

    name: str
    loss: float
    parameters: int


def elements(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def saved_and_loaded(model: nn.Module, size: Size) -> nn.Module:
    """Through a file, into a model that is not compact yet."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        save_model(model, str(path))
        return pixelfly_compiler.load_weights_(gpt(size), load_file(path))


def main(argv: Sequence[str] | None = None) -> list[Stage]:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--size", choices=SIZES, default="small")
    flags.add_argument("--steps", type=int, default=60, help="training steps, dense and then compact")
    flags.add_argument("--lr", type=float, default=3e-3, help="of the dense model; fine-tuning takes a third")
    flags.add_argument("--budget", type=float, default=0.25)
    args = flags.parse_args(argv)
    size = SIZES[args.size]

    torch.manual_seed(0)
    held_in, held_out = standard_library()
    data = batches(held_in, size, seed=0)
    tokens = size.batch * size.sequence
    model = gpt(size)
    stages: list[Stage] = []

    def note(name: str, of: nn.Module) -> None:
        stages.append(Stage(name, validation_loss(of, held_out, size, training), elements(of)))
        of.train()

    training = Training(args.steps, args.lr, torch.float32, tokens, seed=0)
    compiled = Contender(DENSE, 1.0).compile(model)
    train("dense", model, lambda ids: compiled(ids, labels=ids).loss, data, training)
    note("dense", model)

    ids = next(data)
    pixelfly_compiler.sparsify_(model, (ids,), {"labels": ids}, budget=args.budget, init="project")
    print(pixelfly_compiler.plan_of(model))
    note("compact, as projected", model)

    training = Training(args.steps, args.lr / 3, torch.float32, tokens, seed=0)
    sparse = torch.compile(model, backend=SPARSE)
    train("compact", model, lambda ids: sparse(ids, labels=ids).loss, data, training)
    note("compact, fine-tuned", model)
    note("saved and loaded", saved_and_loaded(model, size))

    table = Table("", "validation loss (nats per byte)", "parameters")
    for stage in stages:
        table.add_row(stage.name, f"{stage.loss:.3f}", f"{stage.parameters:,}")
    Console().print(table)
    return stages


if __name__ == "__main__":
    main()
