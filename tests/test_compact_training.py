"""Compact models in training as people do it: optimizers, AMP, accumulation, EMA, checkpoints, HF's Trainer."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pixelfly_compiler as pf

WIDTH, CLASSES = 128, 32
OPTIONS: dict[str, Any] = {"budget": 0.5, "force": True, "block_size": 32}

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def dense_model() -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH), nn.GELU()
    return nn.Sequential(*layers, nn.Linear(WIDTH, CLASSES))


def compact_model(**options: Any) -> nn.Module:
    model = pf.sparsify_(dense_model(), torch.randn(4, WIDTH), **OPTIONS, exclude=["4.*"], **options)
    gc.collect()
    return model


def batches(count: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Inputs around one centre for each class."""
    generator = torch.Generator().manual_seed(1)
    centres = torch.randn(CLASSES, WIDTH, generator=generator)
    for _ in range(count):
        y = torch.randint(CLASSES, (64,), generator=generator)
        yield centres[y] + 0.5 * torch.randn(64, WIDTH, generator=generator), y


def train(model: Any, optimizer: torch.optim.Optimizer, steps: int = 30, skip: int = 0) -> list[float]:
    losses = []
    for x, y in list(batches(skip + steps))[skip:]:
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


OPTIMIZERS: dict[str, tuple[Callable[..., torch.optim.Optimizer], str]] = {
    "AdamW": (lambda p: torch.optim.AdamW(p, lr=2e-3), "adam"),
    "fused AdamW": (lambda p: torch.optim.AdamW(p, lr=2e-3, fused=True), "adam"),
    "foreach Adam": (lambda p: torch.optim.Adam(p, lr=2e-3, foreach=True), "adam"),
    "Adafactor": (lambda p: torch.optim.Adafactor(p, lr=2e-2), "adam"),
    "SGD": (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), "sgd"),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_dense_model_s_learning_rate_trains_as_fast(name: str) -> None:
    make, kind = OPTIMIZERS[name]
    dense, compact = dense_model(), compact_model(optimizer=kind)
    exact, ours = train(dense, make(dense.parameters())), train(compact, make(compact.parameters()))
    learned = exact[0] - sum(exact[-5:]) / 5
    assert learned > 1
    assert ours[0] - sum(ours[-5:]) / 5 > 0.8 * learned


def test_autocast_with_a_grad_scaler() -> None:
    model = compact_model()
    optimizer, scaler = torch.optim.AdamW(model.parameters(), lr=2e-3), torch.amp.GradScaler("cpu")
    losses = []
    for x, y in batches(20):
        with torch.autocast("cpu", torch.float16):
            loss = F.cross_entropy(model(x), y)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        losses.append(loss.item())
        assert torch.isfinite(norm)
    assert losses[-1] < losses[0] - 1


def test_accumulated_gradients_are_those_of_the_whole_batch() -> None:
    model, (x, y) = compact_model(), next(batches(1))
    F.cross_entropy(model(x), y).backward()
    whole = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    for half_x, half_y in zip(x.chunk(2), y.chunk(2), strict=True):
        (F.cross_entropy(model(half_x), half_y) / 2).backward()
    for p, grad in zip(model.parameters(), whole, strict=True):
        torch.testing.assert_close(p.grad, grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("use_buffers", [False, True])
def test_moving_averages(use_buffers: bool) -> None:
    model = compact_model()
    average = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9), use_buffers=use_buffers
    )
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    average.update_parameters(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    train(model, optimizer, 1)
    average.update_parameters(model)
    for name, p in average.module.named_parameters():
        torch.testing.assert_close(p, 0.9 * before[name] + 0.1 * model.get_parameter(name))
    index = average.module[0].parametrizations.weight[0].index
    assert torch.equal(index, model[0].parametrizations.weight[0].index)  # type: ignore[index]


def test_training_some_factors_only() -> None:
    model = compact_model(init="project")
    for parts in pf.factors(model).values():
        parts["blocks"].requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    train(model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3), 2)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    kinds = {name.rpartition(".")[2] for name in changed}
    assert kinds == {"bias", "weight", "original1", "original2", "original3"}


def test_memory_of_the_planned_weights_in_training() -> None:
    """Parameters, gradients and AdamW's state: in proportion to what is kept."""
    dense = nn.Sequential(nn.Linear(1024, 1024), nn.GELU(), nn.Linear(1024, 1024))
    weights = sum(module.weight.numel() for module in dense if isinstance(module, nn.Linear))
    model = pf.sparsify_(dense, torch.randn(256, 1024), budget=0.25, force=True)
    factors = [part for parts in pf.factors(model).values() for part in parts.values()]
    optimizer = torch.optim.AdamW(factors)
    model(torch.randn(4, 1024)).sum().backward()
    optimizer.step()
    held = sum(p.numel() + (0 if p.grad is None else p.grad.numel()) for p in factors)
    held += sum(t.numel() for state in optimizer.state.values() for t in state.values())
    assert held <= 0.30 * 4 * weights


# ---- checkpoints ----


@pytest.mark.parametrize("compiled", [False, True])
def test_a_resumed_run_is_bit_equal(compiled: bool, tmp_path: Path) -> None:
    def call(model: nn.Module) -> Any:
        return torch.compile(model, backend="pixelfly") if compiled else model

    model = compact_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    train(call(model), optimizer, 2)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "checkpoint.pt")
    losses = train(call(model), optimizer, 2, skip=2)

    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    resumed = pf.load_weights_(dense_model(), saved["model"])
    again = torch.optim.AdamW(resumed.parameters(), lr=2e-3)
    again.load_state_dict(saved["optimizer"])
    assert train(call(resumed), again, 2, skip=2) == losses
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), resumed.parameters(), strict=True))


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
def test_distributed_checkpoint(tmp_path: Path) -> None:
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    model = compact_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    train(model, optimizer, 1)
    state, optimizer_state = get_state_dict(model, optimizer)
    checkpoint.save({"model": state, "optimizer": optimizer_state}, checkpoint_id=tmp_path)
    losses = train(model, optimizer, 1, skip=1)

    other = pf.sparsify_(dense_model(), plan=pf.plan_of(model))
    again = torch.optim.AdamW(other.parameters(), lr=2e-3)
    state, optimizer_state = get_state_dict(other, again)
    loaded = {"model": state, "optimizer": optimizer_state}
    checkpoint.load(loaded, checkpoint_id=tmp_path)
    set_state_dict(other, again, model_state_dict=loaded["model"], optim_state_dict=loaded["optimizer"])
    assert train(other, again, 1, skip=1) == losses


# ---- Hugging Face ----


def gpt2_config() -> Any:
    from transformers import GPT2Config

    sizes: dict[str, Any] = {"n_embd": WIDTH, "n_layer": 1, "n_head": 2, "vocab_size": 64, "n_positions": 32}
    return GPT2Config(**sizes, bos_token_id=None, eos_token_id=None, use_cache=False)


def trainer(model: Any, folder: Path, **arguments: Any) -> Any:
    from transformers import Trainer, TrainingArguments

    ids = torch.randint(64, (1, 16), generator=torch.Generator().manual_seed(0)).expand(32, -1)
    data = [{"input_ids": row, "labels": row} for row in ids]
    settings: dict[str, Any] = {"max_steps": 4, "save_steps": 2, "logging_steps": 1, "learning_rate": 2e-3} | arguments
    chosen = TrainingArguments(
        str(folder), **settings, use_cpu=True, report_to=[], disable_tqdm=True, dataloader_pin_memory=False
    )
    return Trainer(model=model, args=chosen, train_dataset=data)


def losses_of(run: Any) -> list[float]:
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
def test_hf_trainer_saves_and_resumes(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    from safetensors.torch import load_file
    from transformers import GPT2Config, GPT2LMHeadModel

    def model() -> Any:
        torch.manual_seed(0)
        return pf.sparsify_(GPT2LMHeadModel(gpt2_config()).eval(), torch.zeros(2, 16, dtype=torch.long), **OPTIONS)

    first = model()
    whole = trainer(first, tmp_path / "a")
    whole.train()
    assert losses_of(whole)[-1] < losses_of(whole)[0]
    resumed = trainer(model(), tmp_path / "b")
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    assert losses_of(resumed)[-2:] == pytest.approx(losses_of(whole)[-2:], rel=1e-6)

    # the recipe of the README
    first.save_pretrained(tmp_path / "saved")
    loaded = GPT2LMHeadModel(GPT2Config.from_pretrained(tmp_path / "saved"))
    pf.load_weights_(loaded, load_file(tmp_path / "saved" / "model.safetensors"))
    ids = torch.arange(16)[None]
    first.eval(), loaded.eval()
    assert torch.equal(loaded(ids).logits, first(ids).logits)
