"""Train a byte-level GPT-2 on the Python standard library's own source: dense against the one line.

    python examples/train_gpt.py                       # a few minutes on two cores
    python examples/train_gpt.py --size gpt2 --steps 200 --dtype bf16

Both contenders get the same model, data, optimizer, learning rate and schedule; nothing is tuned for either. A sparse
model wants a higher learning rate than its dense one; the default suits both (`--lr` changes it).
"""

from __future__ import annotations

import itertools
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from _training import Contender, Result, Training, parser, peak_memory, race, report, train
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

VOCABULARY = 256  # bytes
VALIDATION_EVERY = 10  # one file in ten is held out
NOT_SOURCE = {"site-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__"}


@dataclass(frozen=True)
class Size:
    width: int
    layers: int
    sequence: int
    batch: int
    steps: int
    validation_batches: int = 8


SIZES = {
    "tiny": Size(width=64, layers=1, sequence=32, batch=4, steps=20, validation_batches=1),
    "small": Size(width=512, layers=4, sequence=256, batch=8, steps=40),
    "gpt2": Size(width=768, layers=12, sequence=512, batch=4, steps=200),
}


def standard_library() -> tuple[Tensor, Tensor]:
    """The source of the standard library as bytes (uint8), split by files: training, validation."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [path for path in sorted(root.rglob("*.py")) if not NOT_SOURCE & set(path.relative_to(root).parts)]
    held_out = files[::VALIDATION_EVERY]
    held_in = sorted(set(files) - set(held_out))
    return as_bytes(held_in), as_bytes(held_out)


def as_bytes(files: Sequence[Path]) -> Tensor:
    return torch.frombuffer(bytearray(b"".join(path.read_bytes() for path in files)), dtype=torch.uint8)


def batches(data: Tensor, size: Size, seed: int) -> Iterator[Tensor]:
    """Random windows, (batch, sequence) int64, the same for the same seed, without end."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        starts = torch.randint(len(data) - size.sequence, (size.batch, 1), generator=generator)
        yield data[starts + torch.arange(size.sequence)].long()


def gpt(size: Size) -> GPT2LMHeadModel:
    """HF's GPT-2, random weights."""
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=size.sequence,
        n_embd=size.width,
        n_layer=size.layers,
        n_head=max(1, size.width // 64),
        resid_pdrop=0.0,  # far less than one epoch: nothing to regularise
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=None,
        eos_token_id=None,
        use_cache=False,
    )
    model = GPT2LMHeadModel(config)
    model.loss_type = "ForCausalLM"  # what it falls back to with a warning
    return model


def validation_loss(model: nn.Module, data: Tensor, size: Size, training: Training) -> float:
    """Nats per byte over the same held-out windows for every contender.

    In the graph that is compiled for training: nothing here depends on the mode, and another would take a minute more.
    """
    held_out = itertools.islice(batches(data, size, seed=1234), size.validation_batches)
    with training.autocast():
        losses = [model(ids, labels=ids).loss.detach() for ids in held_out]
    return float(torch.stack(losses).mean())


def run(contender: Contender, size: Size, training: Training) -> Result:
    """Train one contender from scratch and score it on the held-out files."""
    torch.manual_seed(training.seed)
    held_in, held_out = standard_library()
    model = gpt(size)
    compiled = contender.compile(model)
    data = batches(held_in, size, training.seed)
    speed = train(contender.name, model, lambda ids: compiled(ids, labels=ids).loss, data, training)
    peak = peak_memory()
    loss = validation_loss(compiled, held_out, size, training)
    ids = next(data)
    return Result(contender, speed, loss, contender.kept(model, ids, labels=ids), peak)


def main(argv: Sequence[str] | None = None) -> list[Result]:
    args = parser(__doc__ or "", SIZES, lr=3e-3).parse_args(argv)
    size = SIZES[args.size]
    tokens = size.batch * size.sequence
    results = race(run, args, size, tokens)
    title = f"GPT-2: width {size.width}, {size.layers} layers, {size.batch} x {size.sequence} bytes, {args.dtype}"
    report(title, results, tokens, items="tokens", score="validation loss (nats per byte)")
    return results


if __name__ == "__main__":
    main()
