"""Two ranks on this machine: DDP and FSDP2, both ways in, with and without torch.compile, against one process."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import pixelfly_compiler as pf
from pixelfly_compiler import backend
from pixelfly_compiler.passes import calibration

WIDTH, RANKS, STEPS = 128, 2, 3
OPTIONS: dict[str, Any] = {"budget": 0.5, "force": True, "block_size": 32}
# (compact or the one line, how it is distributed, is it compiled)
SCENARIOS = [
    "compact-ddp-eager",
    "compact-ddp-compiled",
    "compact-fsdp-eager",
    "compact-fsdp-compiled",
    "line-ddp-compiled",
    "line-fsdp-compiled",
]

pytestmark = [
    pytest.mark.usefixtures("fresh_dynamo"),
    pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo"),
]


class Block(nn.Module):
    """With activation checkpointing."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def inner(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))

    def forward(self, x: Tensor) -> Tensor:
        return x + checkpoint(self.inner, x, use_reentrant=False)


def make(kind: str) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(Block(), Block())
    return pf.sparsify_(model, batch(0)[0], **OPTIONS) if kind == "compact" else model


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(32, WIDTH, generator=generator), torch.randn(32, WIDTH, generator=generator)


def compiled(kind: str, model: Any) -> Any:
    return torch.compile(model, backend="pixelfly", options=OPTIONS if kind == "line" else None)


def train(call: Callable[[Tensor], Tensor], model: nn.Module, mine: Callable[[Tensor], Tensor]) -> list[float]:
    """The loss of each step over all ranks' parts of the batch."""
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=1e-2), []
    for step in range(STEPS):
        x, y = map(mine, batch(step))
        loss = F.mse_loss(call(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        total = loss.detach()
        if dist.is_initialized():
            dist.all_reduce(total)
            total /= RANKS
        losses.append(total.item())
    return losses


def distributed(model: nn.Module, how: str) -> nn.Module:
    if how == "ddp":
        return nn.parallel.DistributedDataParallel(model)
    from torch.distributed.fsdp import fully_shard

    mesh = dist.init_device_mesh("cpu", (RANKS,))
    for block in model.children():
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def rank_main(rank: int, folder: Path) -> None:
    """All scenarios, one after the other, in one process."""
    logging.getLogger("pixelfly_compiler").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    results: dict[str, Any] = {}
    for scenario in SCENARIOS:
        torch._dynamo.reset()
        kind, how, mode = scenario.split("-")
        model = make(kind)
        wrapped = distributed(model, how)
        call = compiled(kind, wrapped) if mode == "compiled" else wrapped
        results[scenario] = train(call, model, lambda t: t.chunk(RANKS)[rank])
        results[f"{scenario} versions"] = versions_of_cached_weights()
        if scenario == "line-fsdp-compiled":
            results["one element"] = changed_element(model, call)
        if scenario == "compact-fsdp-eager":
            results["full state"] = error_of_full_state(model, call)
    results["device"] = asdict(calibration._agreed(replace(calibration.calibrate(), bandwidth=1e9 * (1 + rank))))
    (folder / f"rank{rank}.json").write_text(json.dumps(results))
    dist.destroy_process_group()


def versions_of_cached_weights() -> list[int | None]:
    return [e.version for entries in backend._weights._entries for e in entries.values()]


def changed_element(model: nn.Module, call: Any) -> float:
    """How much the output changes with one element of a weight, behind the back of its version."""
    x = torch.ones(4, WIDTH)
    with torch.no_grad():
        before = call(x)
        model[0].up.weight.to_local()[3, 5] += 100.0  # type: ignore[index, union-attr, operator]
        return (call(x) - before).abs().max().item()


def error_of_full_state(model: nn.Module, call: Any) -> float:
    """The gathered weights, loaded into a dense model, give the same outputs."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    x = batch(9)[0]
    y = call(x).detach()
    if dist.get_rank():
        return 0.0
    return (pf.load_weights_(make("dense"), state)(x) - y).abs().max().item()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(rank_main, (folder,), nprocs=RANKS)
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(RANKS)]


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_losses_equal_those_of_one_process(scenario: str, ranks: list[dict[str, Any]]) -> None:
    kind, _, mode = scenario.split("-")
    model = make(kind)
    call = compiled(kind, model) if mode == "compiled" else model
    alone = train(call, model, lambda t: t)
    assert alone[0] > alone[-1]
    for rank in ranks:
        assert rank[scenario] == pytest.approx(alone, rel=1e-5)


def test_what_fsdp_gathers_again_is_projected_again(ranks: list[dict[str, Any]]) -> None:
    assert all(rank["one element"] > 0.1 for rank in ranks)
    for rank in ranks:
        assert set(rank["line-fsdp-compiled versions"]) == {None}  # so never valid
        assert None not in rank["line-ddp-compiled versions"] and rank["line-ddp-compiled versions"]


def test_gathered_compact_weights_load_elsewhere(ranks: list[dict[str, Any]]) -> None:
    assert ranks[0]["full state"] < 1e-5


def test_all_ranks_plan_with_the_same_constants(ranks: list[dict[str, Any]]) -> None:
    assert ranks[0]["device"] == ranks[1]["device"]
