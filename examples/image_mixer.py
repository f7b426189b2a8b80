"""Train an MLP-Mixer on scikit-learn's handwritten digits: dense against the one line.

    python examples/image_mixer.py

The 8 x 8 digits are upscaled and cut into patches. Token and channel MLPs both become sparse: the token MLP multiplies
the transposed activations, which needs nothing special.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from _training import Contender, Result, Training, parser, peak_memory, race, report, train
from torch import Tensor, nn


@dataclass(frozen=True)
class MixerConfig:
    """Sizes as in the paper "MLP-Mixer" (Tolstikhin et al., 2021), table 1."""

    image: int
    patch: int
    channels: int
    width: int
    depth: int
    token_hidden: int
    channel_hidden: int
    classes: int

    @property
    def tokens(self) -> int:
        return (self.image // self.patch) ** 2


class Mlp(nn.Sequential):
    def __init__(self, features: int, hidden: int) -> None:
        super().__init__(nn.Linear(features, hidden), nn.GELU(), nn.Linear(hidden, features))


class MixerBlock(nn.Module):
    """Mix over tokens, then over channels; (batch, tokens, width) in and out."""

    def __init__(self, config: MixerConfig) -> None:
        super().__init__()
        self.token_norm = nn.LayerNorm(config.width)
        self.token_mlp = Mlp(config.tokens, config.token_hidden)
        self.channel_norm = nn.LayerNorm(config.width)
        self.channel_mlp = Mlp(config.width, config.channel_hidden)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.token_mlp(self.token_norm(x).transpose(1, 2)).transpose(1, 2)
        return x + self.channel_mlp(self.channel_norm(x))


class Mixer(nn.Module):
    """Images (batch, channels, image, image) to logits (batch, classes)."""

    def __init__(self, config: MixerConfig) -> None:
        super().__init__()
        self.stem = nn.Conv2d(config.channels, config.width, config.patch, config.patch)
        self.blocks = nn.Sequential(*(MixerBlock(config) for _ in range(config.depth)))
        self.norm = nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, config.classes)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.stem(images).flatten(2).transpose(1, 2)
        return self.head(self.norm(self.blocks(tokens)).mean(1))


def mixer_s16() -> MixerConfig:
    """Mixer-S/16 at 224 pixels, for the benchmarks."""
    return MixerConfig(224, 16, 3, width=512, depth=8, token_hidden=256, channel_hidden=2048, classes=1000)


def mixer_b16() -> MixerConfig:
    """Mixer-B/16 at 224 pixels, likewise."""
    return MixerConfig(224, 16, 3, width=768, depth=12, token_hidden=384, channel_hidden=3072, classes=1000)


@dataclass(frozen=True)
class Size:
    mixer: MixerConfig
    batch: int
    steps: int


SIZES = {
    "tiny": Size(MixerConfig(16, 4, 1, width=64, depth=1, token_hidden=32, channel_hidden=128, classes=10), 8, 20),
    "small": Size(MixerConfig(64, 8, 1, width=512, depth=4, token_hidden=256, channel_hidden=2048, classes=10), 64, 60),
}
DIGITS_MAX = 16.0


def digits(pixels: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images (n, 1, pixels, pixels) and labels, then the test set's: one image in four."""
    from sklearn.datasets import load_digits  # here: the benchmarks use the model without the data
    from sklearn.model_selection import train_test_split

    data = load_digits()
    images = torch.tensor(data.images / DIGITS_MAX * 2 - 1, dtype=torch.float32)[:, None]
    images = F.interpolate(images, (pixels, pixels), mode="bilinear")
    labels = torch.tensor(data.target)
    order = range(len(labels))
    held_in, held_out = train_test_split(order, test_size=0.25, random_state=0, stratify=data.target)
    return images[held_in], labels[held_in], images[held_out], labels[held_out]


def batches(images: Tensor, labels: Tensor, batch: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        for chunk in torch.randperm(len(labels), generator=generator).split(batch):
            if len(chunk) == batch:  # one shape, one compilation
                yield images[chunk], labels[chunk]


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor, batch: int, training: Training) -> float:
    model.eval()
    usable = len(labels) // batch * batch
    with training.autocast():
        guesses = torch.cat([model(chunk).argmax(1) for chunk in images[:usable].split(batch)])
    return float((guesses == labels[:usable]).float().mean())


def run(contender: Contender, size: Size, training: Training) -> Result:
    """Train one contender from scratch and score it on the test images."""
    torch.manual_seed(training.seed)
    images, labels, test_images, test_labels = digits(size.mixer.image)
    model = Mixer(size.mixer)
    compiled = contender.compile(model)
    data = batches(images, labels, size.batch, training.seed)
    speed = train(contender.name, model, lambda batch: F.cross_entropy(compiled(batch[0]), batch[1]), data, training)
    peak = peak_memory()
    correct = accuracy(compiled, test_images, test_labels, size.batch, training)
    return Result(contender, speed, correct, contender.kept(model, images[: size.batch]), peak)


def main(argv: Sequence[str] | None = None) -> list[Result]:
    args = parser(__doc__ or "", SIZES, lr=1e-3).parse_args(argv)
    size = SIZES[args.size]
    results = race(run, args, size, size.batch)
    mixer = size.mixer
    title = f"MLP-Mixer: width {mixer.width}, {mixer.depth} blocks, {size.batch} x {mixer.tokens} tokens, {args.dtype}"
    report(title, results, size.batch, items="images", score="test accuracy")
    return results


if __name__ == "__main__":
    main()
