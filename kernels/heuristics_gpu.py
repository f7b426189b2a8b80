"""Launch parameters of the Triton templates: one function per family of GPUs, the only place where they are made.

A *default* is what runs without autotuning; `linear_launches` and `block_grad_launches` list it first, then what
`mode="max-autotune"` tries besides. All keep within the GPU's shared memory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from pixelfly_compiler.kernels.gpus import Gpu


@dataclass(frozen=True)
class LinearShape:
    """What decides the launch of `linear`: a hint of the rows, sizes, the block as (k, n), and the operands' bytes.

    `exact` asks for IEEE fp32 products, which no tensor core computes. `narrowing`: how often the outputs of a
    thread, 64, are halved. `tma`: the operands lie as tensor descriptors need them. `matrices`: so many, each with
    those rows.
    """

    rows: int
    in_features: int
    out_features: int
    block_k: int
    block_n: int
    rank: int
    itemsize: int
    exact: bool = False
    narrowing: int = 0
    tma: bool = False
    matrices: int = 1


@dataclass(frozen=True)
class LinearLaunch:
    """Tile of one program: block_m rows by `groups` accumulators of block_n outputs each, block_k inputs per step.

    Small blocks: `groups` block rows share a program, and a step gathers block_k / block of their blocks.
    Large blocks: block_k is a part of a block. block_r is the step through the low-rank term; group_m row tiles
    run next to each other, so that the weight stays in the L2 cache.

    programs > 0: only so many programs, which stay for several tiles and read through tensor descriptors (TMA). They
    cannot gather blocks: block_k is at most a block.
    """

    block_m: int
    block_n: int
    groups: int
    block_k: int
    block_r: int
    group_m: int
    warps: int
    stages: int
    programs: int = 0

    def shared_memory(self, itemsize: int, rank: int) -> int:
        """Bytes that the stages of the pipeline hold, in the larger of the loops over blocks and over the rank."""
        step = self.block_k * (self.block_m + self.block_n) * self.groups
        return max(self.stages * step * itemsize, self.low_rank_memory(itemsize, rank))

    def low_rank_memory(self, itemsize: int, rank: int) -> int:
        """Those of t and u; a single step is not pipelined."""
        stages = self.stages if rank > self.block_r else 1
        return stages * self.block_r * (self.block_m + self.block_n * self.groups) * itemsize


@dataclass(frozen=True)
class GradShape:
    """What decides the launch of `block_grad`: rows, block rows, kept blocks, the block as (out, in), bytes."""

    rows: int
    block_rows: int
    nnz: int
    b_out: int
    b_in: int
    itemsize: int
    exact: bool = False
    tma: bool = False
    matrices: int = 1

    @property
    def per_row(self) -> int:
        """Kept blocks of a block row, on average."""
        return max(-(-self.nnz // self.block_rows), 1)


@dataclass(frozen=True)
class GradLaunch:
    """Tile of one program: `pack` kept blocks of one block row, block_m rows of the inputs per step.

    split > 1: as many programs share the rows of one tile; their fp32 results are added by a second kernel.
    tma: read through tensor descriptors.
    """

    pack: int
    block_m: int
    split: int
    warps: int
    stages: int
    tma: bool = False

    def shared_memory(self, shape: GradShape) -> int:
        return self.stages * self.block_m * (self.pack * shape.b_in + shape.b_out) * shape.itemsize


# ------------------------------------------------------------------------------------------------------------- linear


def linear_launches(shape: LinearShape, gpu: Gpu) -> list[LinearLaunch]:
    """The default, then its variants, each once."""
    default = _linear_default(shape, gpu)
    if shape.rows <= 64 or shape.exact:
        others = [replace(default, stages=default.stages + 1), replace(default, warps=max(default.warps // 2, 1))]
    else:
        others = [
            replace(default, stages=default.stages + 1),
            replace(default, stages=default.stages - 1),
            replace(default, block_m=default.block_m // 2, warps=max(default.warps // 2, 4)),
            replace(default, block_m=default.block_m * 2, warps=8),
            replace(default, block_k=default.block_k * 2, stages=default.stages - 1),
            *_persistent(default, shape, gpu),
        ]
    others += [_linear_default(replace(shape, narrowing=times), gpu) for times in (1, 2, 3)]
    fitting = [launch for launch in others if _is_sound(launch, shape, gpu)]
    return list(dict.fromkeys([default, *fitting]))


def narrowing_for(epilogue: float) -> int:
    """How often the outputs of a thread are halved for an epilogue of this weight, so that no register is spilled.

    Of `EPILOGUES` in tests/test_emit.py, on each NVIDIA architecture (Triton 3.7), those of 4 and more spill at 64
    outputs, or just fit in 252 to 255 registers; those of 7 and more take 245 to 255 registers at 32, those of 11 and
    more up to 228 at 16, and of 20 and more they spill.
    """
    return sum(epilogue > most for most in (3.5, 6.5, 10.0, 20.0))


def _linear_default(shape: LinearShape, gpu: Gpu) -> LinearLaunch:
    return _within(_LINEAR[gpu.family](shape), shape, gpu)


def _ampere(shape: LinearShape) -> LinearLaunch:
    """mma.sync takes any tile of 16 x 8; shared memory is what limits the pipeline.

    Four accumulators side by side need the registers of eight warps: with four Triton 3.9 spills.
    """
    launch = _common(shape, most_m=128, most_n=128)
    wide = launch.block_n * launch.groups
    step = 32 if wide > 64 or launch.groups > 1 else 64
    return replace(launch, block_k=_step(shape, step), warps=8 if wide > 64 or launch.groups > 2 else 4, stages=3)


def _hopper(shape: LinearShape) -> LinearLaunch:
    """wgmma takes 64 rows per warp group and reads both operands from shared memory: deep pipelines, steps of 64.

    Blackwell's tcgen05 takes 128 rows and accumulates in tensor memory; wide tiles need the 8 warps for the epilogue.
    """
    launch = _common(shape, most_m=128, most_n=128)
    wide = launch.block_n * launch.groups
    step = 64 if launch.groups == 1 else 32
    return replace(launch, block_k=_step(shape, step), warps=8 if wide > 64 else 4, stages=4)


def _cdna(shape: LinearShape) -> LinearLaunch:
    """MFMA, warps of 64, 64 KiB of shared memory."""
    launch = _common(shape, most_m=128, most_n=128)
    return replace(launch, block_k=_step(shape, 32), warps=4, stages=2)


_LINEAR: dict[str, Callable[[LinearShape], LinearLaunch]] = {
    "ampere": _ampere,
    "hopper": _hopper,
    "blackwell": _hopper,
    "cdna": _cdna,
}


def _common(shape: LinearShape, most_m: int, most_n: int) -> LinearLaunch:
    """What all families agree on: tiles as tall as the rows allow, small blocks side by side up to 64 outputs."""
    if shape.exact:
        most_m, most_n = min(most_m, 64), min(most_n, 64)
    wide = 64 >> max(shape.narrowing - 2, 0)
    if shape.narrowing:
        most_n = min(most_n, wide)
    if shape.narrowing > 1:
        most_m = min(most_m, 64)
    block_m = min(max(power_of_two(shape.rows), 16), most_m)
    block_n = min(shape.block_n, most_n)
    groups = max(wide // block_n, 1) if block_n == shape.block_n and shape.out_features > block_n else 1
    block_r = min(max(power_of_two(shape.rank), 16), 64)
    return LinearLaunch(block_m, block_n, groups, 32, block_r, 8, 4, 3)


def _step(shape: LinearShape, most: int) -> int:
    """Inputs per step: fp32 operands take twice the room, FMA without tensor cores wants short steps."""
    if shape.exact:
        return 16
    return max(most * 2 // shape.itemsize, 16)


def _persistent(launch: LinearLaunch, shape: LinearShape, gpu: Gpu) -> list[LinearLaunch]:
    """The same tile for as many programs as run at a time, one or two a multiprocessor; and with half the stages."""
    if not shape.tma or launch.block_k > shape.block_k:
        return []
    found = []
    for stages in (launch.stages, max(launch.stages // 2, 1)):
        fewer = replace(launch, stages=stages)
        at_a_time = min(_room(gpu) // fewer.shared_memory(shape.itemsize, shape.rank), 2)
        found.append(replace(fewer, programs=at_a_time * gpu.multiprocessors))
    return found


def _within(launch: LinearLaunch, shape: LinearShape, gpu: Gpu) -> LinearLaunch:
    """The launch for few rows spread over more programs, and with no more stages than fit."""
    if shape.exact:
        launch = replace(launch, warps=8)
    if shape.narrowing:
        launch = replace(launch, warps=max(launch.warps, 256 // gpu.warp))
    if shape.rows <= 64:
        launch = replace(launch, groups=1)
        outputs = shape.matrices * shape.out_features
        while launch.block_n > 16 and 2 * outputs < launch.block_n * gpu.multiprocessors:
            launch = replace(launch, block_n=launch.block_n // 2)
        if launch.block_n <= 64 and not shape.exact and shape.narrowing < 2:  # each thread loads 16 bytes at a time
            step = launch.block_k * min(launch.block_m, launch.block_n) * shape.itemsize
            launch = replace(launch, warps=min(launch.warps, 4, max(step // (16 * gpu.warp), 1)))
    while launch.block_r > 16 and launch.low_rank_memory(shape.itemsize, shape.rank) > _room(gpu):
        launch = replace(launch, block_r=launch.block_r // 2)
    while launch.stages > 1 and launch.shared_memory(shape.itemsize, shape.rank) > _room(gpu):
        launch = replace(launch, stages=launch.stages - 1)
    return launch


def _is_sound(launch: LinearLaunch, shape: LinearShape, gpu: Gpu) -> bool:
    fits = launch.shared_memory(shape.itemsize, shape.rank) <= _room(gpu)
    registers = launch.block_m * launch.block_n * launch.groups <= 128 * 128 * (launch.warps // 4 or 1)
    return fits and registers and launch.stages >= 1 and launch.block_m >= 16 and launch.block_k <= 128


# --------------------------------------------------------------------------------------------------------- block_grad


def block_grad_launches(shape: GradShape, gpu: Gpu) -> list[GradLaunch]:
    """The default, then its variants, each once."""
    default = _grad_default(shape, gpu)
    others = [
        replace(default, stages=default.stages + 1),
        replace(default, block_m=default.block_m * 2, stages=max(default.stages - 1, 1)),
        replace(default, pack=max(default.pack // 2, 1)),
        replace(default, split=default.split * 2),
    ]
    if shape.tma and not shape.exact and shape.b_in >= 64:
        others += [replace(default, tma=True), replace(default, stages=default.stages + 1, tma=True)]
    fitting = [
        launch for launch in others if launch.shared_memory(shape) <= _room(gpu) and launch.split <= _most_split(shape)
    ]
    return list(dict.fromkeys([default, *fitting]))


def _grad_default(shape: GradShape, gpu: Gpu) -> GradLaunch:
    pack = _pack(shape, gpu)
    tile = pack * shape.b_in * shape.b_out
    block_m = 16 if shape.exact else 64 * 2 // shape.itemsize
    stages = 2 if gpu.family == "cdna" else 3
    wide = tile > 64 * 128 and gpu.family != "blackwell"
    several = shape.exact and shape.matrices > 1  # with four warps 8 bytes spill on sm_90
    launch = GradLaunch(pack, block_m, 1, 8 if wide or several else 4, stages)
    while launch.stages > 1 and launch.shared_memory(shape) > _room(gpu):
        launch = replace(launch, stages=launch.stages - 1)
    tiles = shape.block_rows * -(-shape.per_row // pack)
    split = 1
    while split < _most_split(shape) and tiles * split * 2 <= 2 * gpu.multiprocessors:
        split *= 2
    return replace(launch, split=split)


def _pack(shape: GradShape, gpu: Gpu) -> int:
    """Blocks of a row per program: up to 128 columns (64 without tensor cores), if little of it is empty.

    Hopper's and Blackwell's tensor cores take 64 columns or more, empty or not.
    """
    most = 64 if shape.exact else 128
    if gpu.family in ("hopper", "blackwell") and not shape.exact and shape.per_row * shape.b_in <= 64:
        return max(64 // shape.b_in, 1)
    pack = 1
    while 2 * pack * shape.b_in <= most and pack < shape.per_row:
        pack *= 2
    while pack > 1 and -(-shape.per_row // pack) * pack > 1.25 * shape.per_row:
        pack //= 2
    return pack


def _most_split(shape: GradShape) -> int:
    """Every part gets 512 rows or more: the sum of the parts has to pay. The rows of each matrix are one part."""
    return max(shape.rows // 512, 1) if shape.matrices == 1 else 1


# ---------------------------------------------------------------------------------------------------------- projection


@dataclass(frozen=True)
class ProjectionLaunch:
    """Tiles of P: `rows` rows of the weight times block_k columns a step, for block_r of the rank's directions; then
    block_m rows of a block.
    """

    rows: int
    block_k: int
    block_m: int
    block_r: int
    warps: int
    stages: int
    precision: str


def projection_launch(block: int, rank: int, gpu: Gpu) -> ProjectionLaunch:
    """Weights have few block rows: 16 rows a program, so that all multiprocessors read, 16 bytes a thread. Three
    products in tf32 are as good as one in fp32, and run on the tensor cores.
    """
    rows, tile = 16, min(block, 32)
    return ProjectionLaunch(
        rows=rows,
        block_k=tile,
        block_m=tile,
        block_r=min(max(power_of_two(rank), 16), 64 if block < 128 else 32),
        warps=min(rows * tile // (4 * gpu.warp), 4),
        stages=2 if gpu.family == "cdna" else 3,
        precision="tf32x3" if gpu.backend == "cuda" else "ieee",
    )


def _room(gpu: Gpu) -> int:
    return gpu.shared_memory - (4 << 10)  # barriers, layout conversions


def power_of_two(number: int) -> int:
    """The least power of two that is not below `number`."""
    return 1 << max(number - 1, 0).bit_length()
