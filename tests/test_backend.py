"""The compiled model is the eager model with every planned weight W replaced by P(W): values, gradients, and in use."""

from __future__ import annotations

import copy
import gc
import io
import logging
import math
import pickle
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from numerics import assert_as_good_as, to_double
from torch import Tensor, nn
from torch._dynamo.backends.debugging import aot_eager
from torch._dynamo.utils import counters
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

import pixelfly_compiler
from pixelfly_compiler import backend, compact
from pixelfly_compiler.config import Config
from pixelfly_compiler.decision import Plan
from pixelfly_compiler.errors import OptionError, PlanMismatchError
from pixelfly_compiler.kernels import lowering_cpu, projection_cpu
from pixelfly_compiler.passes import calibration
from pixelfly_compiler.passes.cost import Device
from pixelfly_compiler.passes.find import find_sites
from pixelfly_compiler.passes.sites import Found, Site
from pixelfly_compiler.plan import plan, project, project_

# Every model here has the same few shapes, so that most kernels are compiled once for all tests.
OPTIONS: dict[str, Any] = {"budget": 0.5, "force": True, "block_size": 32}
WIDTH, ROWS = 128, 32

# Of an input that is no leaf; with any backend.
DYNAMO_LOOKS_AT_GRAD = pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(x)))


class Mlp(nn.Module):
    def __init__(self, layers: int = 2) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class Broken(Mlp):
    """Dynamo gives up on this forward and compiles the layers one by one."""

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
            torch._dynamo.graph_break()
        return x


class Mixer(nn.Module):
    """A token MLP, across the patches, and a channel MLP: weights on the right of x and of its transpose."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.channels, self.norm = Block(), Block(), nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.tokens(self.norm(x).transpose(1, 2)).transpose(1, 2)
        return self.channels(self.norm(x))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb, self.head = nn.Embedding(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH, bias=False)
        self.head.weight = self.emb.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.emb(ids).relu())


def compiled(model: Any, **options: Any) -> Any:
    return torch.compile(model, backend="pixelfly", fullgraph=True, options=OPTIONS | options)


def some_x() -> Tensor:
    return torch.randn(ROWS, WIDTH)


def planned(model: nn.Module, *args: Any, **options: Any) -> Plan:
    return plan(model, args or (some_x(),), **OPTIONS | options)


def oracle(model: nn.Module, made: Plan) -> nn.Module:
    return project_(copy.deepcopy(model), made)


def projected(model: nn.Module, made: Plan) -> Callable[..., Tensor]:
    """The oracle as a differentiable function of the model's own weights."""

    def run(*args: Any) -> Tensor:
        weights = {entry.name: project(model.get_parameter(entry.name), entry) for entry in made.sparse}
        return functional_call(model, weights, args)

    return run


def assert_equal(ours: Tensor, exact: Tensor) -> None:
    torch.testing.assert_close(ours, exact, rtol=1e-4, atol=1e-5)


def assert_same_gradients(
    model: nn.Module, ours: Callable[..., Tensor], exact: Callable[..., Tensor], *args: Any
) -> None:
    found = []
    for function in (ours, exact):
        model.zero_grad()
        function(*args).square().sum().backward()
        found.append({name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()})
    for name, grad in found[1].items():
        if grad is None:
            assert found[0][name] is None, name
        else:
            torch.testing.assert_close(found[0][name], grad, rtol=1e-3, atol=1e-4 * grad.abs().max().item(), msg=name)


def compilations() -> int:
    return counters["stats"]["unique_graphs"]


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.name.startswith("pixelfly") and r.levelno >= logging.WARNING]


# ---- whole models ----

IDS = torch.randint(0, WIDTH, (2, ROWS // 2), generator=torch.Generator().manual_seed(0))


def gpt2() -> tuple[nn.Module, dict[str, Tensor]]:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        n_embd=WIDTH, n_inner=2 * WIDTH, n_layer=1, n_head=2, vocab_size=WIDTH, n_positions=32, use_cache=False
    )
    return GPT2LMHeadModel(config), {"input_ids": IDS}


def llama() -> tuple[nn.Module, dict[str, Tensor]]:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**_sizes(), vocab_size=WIDTH, use_cache=False)), {"input_ids": IDS}


def bert() -> tuple[nn.Module, dict[str, Tensor]]:
    from transformers import BertConfig, BertModel

    return BertModel(BertConfig(**_sizes(), vocab_size=WIDTH)), {"input_ids": IDS}


def vit() -> tuple[nn.Module, dict[str, Tensor]]:
    from transformers import ViTConfig, ViTModel

    # 15 patches and the class token: as many rows as the other models
    model = ViTModel(ViTConfig(**_sizes(), image_size=(24, 40), patch_size=8))
    return model, {"pixel_values": torch.randn(2, 3, 24, 40, generator=torch.Generator().manual_seed(0))}


def t5() -> tuple[nn.Module, dict[str, Tensor]]:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        d_model=WIDTH, d_ff=2 * WIDTH, d_kv=WIDTH // 2, num_heads=2, num_layers=1, vocab_size=WIDTH, use_cache=False
    )
    return T5ForConditionalGeneration(config), {"input_ids": IDS, "decoder_input_ids": IDS.flip(1)}


def mlp() -> tuple[nn.Module, dict[str, Tensor]]:
    return Mlp(1), {"x": torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(0))}


def mixer() -> tuple[nn.Module, dict[str, Tensor]]:
    return Mixer(), {"x": torch.randn(2, WIDTH, WIDTH, generator=torch.Generator().manual_seed(0))}


def _sizes() -> dict[str, int]:
    return {"hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_hidden_layers": 1, "num_attention_heads": 2}


def _step(
    model: Any, inputs: Mapping[str, Tensor], context: AbstractContextManager[Any]
) -> tuple[Tensor, dict[str, Tensor]]:
    """The output, and all gradients of a random linear function of it."""
    model.zero_grad()
    with context:
        result = model(**inputs)
    y = result if isinstance(result, Tensor) else result[0]
    probe = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    (y.float() if y.dtype != torch.float64 else y).mul(probe).sum().backward()
    return y.detach(), {n.removeprefix("_orig_mod."): p.grad for n, p in model.named_parameters() if p.grad is not None}


def _oracle_gradient(name: str, gradients: Mapping[str, Tensor], made: Plan) -> Tensor:
    """P of the dense gradient; of a tied weight only the head's share."""
    own = gradients.get(name, torch.zeros(()))  # unused: compiled code gives zeros, eager nothing
    entry = made.find(name)
    if entry is None or entry.config is None or name not in gradients:
        return own
    if not entry.shared:
        return project(own, entry)
    return own + sum(project(gradients[head], entry) for head in entry.aliases if head in gradients and head != name)


slow = pytest.mark.slow
MODELS = [
    pytest.param(gpt2, None),
    pytest.param(mixer, None),
    pytest.param(bert, None, marks=slow),
    pytest.param(llama, None, marks=slow),
    pytest.param(vit, None, marks=slow),
    pytest.param(t5, None, marks=slow),
    pytest.param(mlp, torch.bfloat16),
    pytest.param(mixer, torch.bfloat16, marks=slow),
    pytest.param(gpt2, torch.bfloat16, marks=slow),
    pytest.param(bert, torch.bfloat16, marks=slow),
    pytest.param(llama, torch.bfloat16, marks=slow),
    pytest.param(vit, torch.bfloat16, marks=slow),
    pytest.param(t5, torch.bfloat16, marks=slow),
]


@pytest.mark.parametrize(("factory", "autocast"), MODELS)
def test_models_equal_the_oracle(factory: Callable[[], Any], autocast: torch.dtype | None) -> None:
    model, inputs = factory()
    model.eval()  # no dropout; gradients flow all the same
    made = plan(model, (), inputs, **OPTIONS)
    assert made.sparse and all(entry.config for entry in made if entry.is_site)

    def context() -> AbstractContextManager[Any]:
        return torch.autocast("cpu", autocast) if autocast else nullcontext()

    ours, our_grads = _step(compiled(model), inputs, context())
    eager, eager_grads = _step(oracle(model, made), inputs, context())
    truth_inputs = {key: to_double(value) for key, value in inputs.items()}
    truth, truth_grads = _step(oracle(copy.deepcopy(model).double(), made), truth_inputs, nullcontext())
    assert_as_good_as(ours, eager, truth)
    # Some gradients are zero but for rounding (the keys' bias): they are compared with what the largest is off by.
    scale = max(grad.norm().item() for grad in truth_grads.values())
    for name, grad in our_grads.items():
        plain, exact = (_oracle_gradient(name, grads, made).double() for grads in (eager_grads, truth_grads))
        rounding = torch.finfo(autocast or torch.float32).eps
        least = max(8e-7 * exact.norm().item(), 1e-3 * rounding * scale)  # sums run in another order in Inductor's code
        allowed = 2 * max((plain - exact).norm().item(), least)
        assert (grad.double() - exact).norm().item() <= allowed, name
    assert {p for p, _ in model.named_parameters()} >= our_grads.keys() and len(our_grads) > len(made.sparse)


# ---- inference ----


def test_inference_notices_every_change_of_the_weights() -> None:
    model, x = Mlp(), some_x()
    made, run = planned(model, x), compiled(model)

    def check() -> Tensor:
        y = run(x)
        assert_equal(y, oracle(model, made)(x))
        return y

    with torch.no_grad():
        before = check()
        model.load_state_dict(Mlp().state_dict())
        assert not torch.allclose(before, check())
        model.layers[0].up.weight.mul_(2)
        check()
        model.layers[0].up.weight.data = torch.randn(2 * WIDTH, WIDTH)
        check()
        model.layers[1].down.weight.data.mul_(-1)  # leaves no trace in the version
        check()
        model.load_state_dict(Mlp().state_dict(), assign=True)
        check()


def test_weights_are_projected_once_per_version(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    original = compact._compact
    monkeypatch.setattr(compact, "_compact", lambda *args: made.append(1) or original(*args))
    model, x = Mlp(), some_x()
    run = compiled(model)
    with torch.no_grad():
        run(x), run(x)
        assert len(made) == 4
        model.layers[0].up.weight.mul_(2)
        run(x), run(x)
    assert len(made) == 5
    for _ in range(3):  # gradient accumulation
        run(x).sum().backward()
    assert len(made) == 5
    torch.optim.SGD(model.parameters(), 0.1).step()
    run(x).sum().backward()
    assert len(made) == 9


def test_what_was_written_without_a_trace_is_forgotten_after_one_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """As it is done for weights on a GPU, where each read costs a wait."""
    reads: list[int] = []
    original = Tensor.tolist
    model, x = Mlp(), some_x()
    run = compiled(model)
    weights = [weight for weight in model.parameters() if weight.dim() == 2]
    with torch.no_grad():
        run(x)
    monkeypatch.setattr(Tensor, "tolist", lambda self: reads.append(len(self)) or original(self))
    weights[2].data.mul_(-1)
    backend._weights.drop_changed(weights)
    assert reads == [4 * compact.MOST_SAMPLES]
    assert [len(backend._weights._of(weight)) for weight in weights] == [1, 1, 0, 1]


@pytest.mark.parametrize("shape", [(1, 3), (3, 200), (64, 64), (4, 64, 48)])
@pytest.mark.parametrize("turned", [False, True])
def test_samples_lie_in_the_weight_and_see_what_keeps_its_diagonal(shape: tuple[int, ...], turned: bool) -> None:
    whole = torch.randn(*shape[:-2], shape[-2] + 2, shape[-1] + 2)
    weight = whole[..., 1:-1, 1:-1].mT if turned else whole[..., 1:-1, 1:-1]
    sample = compact._sample(weight)
    assert sample.numel() == math.prod(shape[:-2]) * min(*shape[-2:], compact.MOST_SAMPLES)
    assert set(sample.view(torch.float32).flatten().tolist()) <= set(weight.flatten().tolist())
    before = sample.clone()
    now, then = compact._memory(sample), compact._memory(before)
    assert [line.tolist() for line in now] == torch.atleast_2d(sample).tolist()
    assert now == then
    weight.copy_(weight.mT.clone() if shape[-2] == shape[-1] else -weight)
    assert all(one != other for one, other in zip(now, then, strict=True))


def test_the_sample_of_an_expanded_weight_stays_in_its_memory() -> None:
    (line,) = compact._memory(compact._sample(torch.ones(1).expand(64, 64)))
    assert len(line) == 1


def test_no_weight_is_projected_while_the_model_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """What will project them is compiled beside the rest."""
    made: list[int] = []
    original, inductor = compact._compact, backend.inductor

    def compile(*args: Any, **kwargs: Any) -> Any:
        assert projection_cpu._compiling.cache_info().currsize == 1 and not made
        return inductor(*args, **kwargs)

    monkeypatch.setattr(compact, "_compact", lambda *args: made.append(1) or original(*args))
    monkeypatch.setattr(backend, "inductor", compile)
    projection_cpu._compiling.cache_clear()
    with torch.no_grad():
        compiled(Mlp())(some_x())
    assert len(made) == 4


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_inference_first_then_training(context: Any) -> None:
    model, x = Mlp(), some_x()
    made, run = planned(model, x), compiled(model)
    with context():
        assert_equal(run(x), oracle(model, made)(x))
    assert_same_gradients(model, run, projected(model, made), x)
    with torch.no_grad():
        model.layers[0].up.weight.mul_(2)
    with context():
        assert_equal(run(x), oracle(model, made)(x))
    assert_same_gradients(model, run, projected(model, made), x)


def test_a_model_born_in_inference_mode() -> None:
    with torch.inference_mode():
        model, x = Mlp(), some_x()
        made, run = planned(model, x), compiled(model)
        assert_equal(run(x), oracle(model, made)(x))
        model.layers[0].up.weight.mul_(2)
        assert_equal(run(x), oracle(model, made)(x))


@pytest.mark.parametrize("training", [False, True])
def test_cuda_graphs_are_told_which_inputs_stay_where_they_are(monkeypatch: pytest.MonkeyPatch, training: bool) -> None:
    moving: list[int] = []

    def inner_compile(gm: Any, inputs: Any, **kwargs: Any) -> Any:
        if not kwargs.get("is_backward"):
            moving.append(len(inputs) - len(set(kwargs["static_input_idxs"])))
        return gm.forward

    monkeypatch.setattr(backend, "_inner_compile", inner_compile)
    with torch.set_grad_enabled(training), torch._functorch.config.patch(enable_autograd_cache=False):
        torch.compile(Mlp(), backend="pixelfly", options=OPTIONS)(torch.randn(ROWS, WIDTH))
    assert moving == [1 + (4 * 2 if training else 0)]  # the model's input; blocks and u of each weight


def test_svd_basis_is_for_inference_and_says_so() -> None:
    model, x = Mlp(), some_x()
    made, run = planned(model, x, basis="svd"), compiled(model, basis="svd")
    with torch.no_grad():
        ours = run(x)
        assert_equal(ours, oracle(model, made)(x))
        exact = model(x)
        assert (ours - exact).norm() < (project_(copy.deepcopy(model), made, "fixed")(x) - exact).norm()
    with pytest.raises(OptionError, match="inference_mode"):
        run(x)


def test_nan_and_inf_propagate_as_in_the_oracle() -> None:
    model, x = Mlp(1), some_x()
    x[3, 4] = float("inf")
    with torch.no_grad():
        model.layers[0].down.weight[5, 7] = float("nan")
        made = planned(model, x)
        ours, exact = compiled(model)(x), oracle(model, made)(x)
    assert torch.equal(ours.isfinite(), exact.isfinite())
    assert ours[0, 5].isnan() and not ours[3].isfinite().any()


# ---- code that several modules share ----


@DYNAMO_LOOKS_AT_GRAD
def test_layers_compiled_one_by_one_share_code_and_not_weights() -> None:
    model, x = Mlp(3), some_x()
    made = planned(model, x)
    run, before = nn.Sequential(*map(compiled, model.layers)), compilations()
    with torch.no_grad():
        assert_equal(run(x), oracle(model, made)(x))
        assert compilations() == before + 1
    assert_same_gradients(model, run, projected(model, made), x)


@DYNAMO_LOOKS_AT_GRAD
def test_a_graph_break_in_a_loop_over_layers(caplog: pytest.LogCaptureFixture) -> None:
    model, x = Broken(3), some_x()
    made = planned(model, x)
    run: Any = torch.compile(model, backend="pixelfly", options=OPTIONS)
    assert len(made.sparse) == 6
    with torch.no_grad():
        assert_equal(run(x), oracle(model, made)(x))
        run(x)
    assert_same_gradients(model, run, projected(model, made), x)
    assert len(warnings_of(caplog)) == 1


def test_in_place_compile_of_each_layer() -> None:
    model, x = Mlp(), some_x()
    made = planned(model, x)
    exact = oracle(model, made)
    for layer in model.layers:
        layer.compile(backend="pixelfly", options=OPTIONS)
    with torch.no_grad():
        assert_equal(model(x), exact(x))


def test_a_copy_has_weights_of_its_own() -> None:
    model, x = Mlp(), some_x()
    made, run = planned(model, x), compiled(model)
    with torch.no_grad():
        run(x)
        other = copy.deepcopy(run)
        other._orig_mod.layers[0].up.weight.neg_()
        assert_equal(other(x), oracle(other._orig_mod, made)(x))
        assert_equal(run(x), oracle(model, made)(x))


# ---- training ----


@pytest.mark.parametrize("clip", [None, 0.1])
def test_training_takes_the_oracles_steps_and_lowers_the_loss(clip: float | None) -> None:
    model, x, target = Mlp(), some_x(), some_x()
    twin = copy.deepcopy(model)
    runs = [(model, compiled(model)), (twin, projected(twin, planned(model, x)))]
    losses: list[list[float]] = [[], []]
    for (own, run), history in zip(runs, losses, strict=True):
        optimizer = torch.optim.AdamW(own.parameters(), 3e-3)
        for _ in range(8):
            loss = F.mse_loss(run(x), target)
            optimizer.zero_grad()
            loss.backward()
            if clip:
                nn.utils.clip_grad_norm_(own.parameters(), clip)
            optimizer.step()
            history.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert losses[0][-1] < 0.8 * losses[0][0]


def test_an_optimizer_that_writes_to_data_is_noticed() -> None:
    model, x = Mlp(), some_x()
    made, run = planned(model, x), compiled(model)
    for _ in range(2):
        model.zero_grad()
        run(x).square().sum().backward()
        for parameter in model.parameters():
            parameter.data.add_(parameter.grad, alpha=-1e-3)
    assert_equal(run(x), projected(model, made)(x))


def test_gradients_accumulate_and_graphs_are_kept() -> None:
    model, x = Mlp(), some_x()
    made, run = planned(model, x), compiled(model)

    def twice(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda x: torch.cat([function(x), function(x.flip(0))])

    assert_same_gradients(model, twice(run), twice(projected(model, made)), x)


def test_layers_with_varied_strides() -> None:
    model, x = Mlp(), some_x()
    options = OPTIONS | {"vary_strides": True}
    made, run = plan(model, x, **options), torch.compile(model, backend="pixelfly", options=options)
    assert len({made[f"layers.{layer}.up.weight"].support() for layer in range(2)}) == 2
    assert_same_gradients(model, run, projected(model, made), x)


def test_train_and_eval_mean_the_same() -> None:
    model, x = nn.Sequential(Mlp(), nn.Dropout(0.5)), some_x()
    made, run = planned(model, x), compiled(model)
    run(x).sum().backward()
    model.eval()
    with torch.no_grad():
        assert_equal(run(x), oracle(model, made)(x))
    assert_same_gradients(model, run, projected(model, made), x)


def test_frozen_weights_get_no_gradient_and_pass_it_on() -> None:
    model, x = Mlp(), some_x()
    made, run = planned(model, x), compiled(model)
    model.layers[1].requires_grad_(False)
    model.layers[0].down.weight.requires_grad_(False)
    assert_same_gradients(model, run, projected(model, made), x)
    model.requires_grad_(False)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    run(inputs[0]).square().sum().backward()
    projected(model, made)(inputs[1]).square().sum().backward()
    assert inputs[0].grad is not None and inputs[1].grad is not None
    assert_equal(inputs[0].grad, inputs[1].grad)


def test_a_weight_that_no_result_depends_on_has_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not one of zeros, with which an optimizer would decay it."""

    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(64, 64), nn.Linear(64, 64)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.used(x), self.unused(x).detach()

    monkeypatch.setattr(backend, "inductor", lambda gm, inputs, patches: aot_eager(gm, list(inputs)))
    model = Unused()
    result, _ = torch.compile(model, backend="pixelfly", options={"budget": 0.5, "force": True})(torch.randn(8, 64))
    result.sum().backward()
    assert model.used.weight.grad is not None and model.unused.weight.grad is None


def test_a_tied_head_is_projected_and_the_lookup_is_not() -> None:
    model = Tied()
    made, run = planned(model, IDS), compiled(model)
    assert made["head.weight"].config and made["head.weight"].shared

    def exact(ids: Tensor) -> Tensor:
        return F.linear(model.emb(ids).relu(), project(model.emb.weight, made["emb.weight"]))

    with torch.no_grad():
        assert_equal(run(IDS), oracle(model, made)(IDS))
    assert_same_gradients(model, run, exact, IDS)


def test_a_weight_used_twice_is_projected_once() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            return self.lin(F.relu(self.lin(x)))

    model, x = Twice(), some_x()
    made, run = planned(model, x), compiled(model)
    assert len(made.sparse) == 1
    assert_same_gradients(model, run, projected(model, made), x)


def test_matmuls_in_activation_checkpoints() -> None:
    class Checkpointed(Mlp):
        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = checkpoint(layer, x, use_reentrant=False)  # type: ignore[assignment]
            return x

    model, plain, x = Checkpointed(), Mlp(), some_x()
    plain.layers = model.layers
    made, run = planned(model, x), compiled(model)
    assert len(made.sparse) == 4
    assert_same_gradients(model, run, projected(plain, made), x)


# ---- sizes that change ----


def _calls_compile_as_often_as_inductor(sizes: list[int], mark: bool, **kwargs: Any) -> None:
    graphs = {}
    for name in ("pixelfly", "inductor"):
        torch._dynamo.reset()
        before = compilations()
        model = Mlp(1)
        made = planned(model)
        options = {"options": OPTIONS} if name == "pixelfly" else {}
        run = torch.compile(model, backend=name, **options, **kwargs)
        for size in sizes:
            x = torch.randn(size, WIDTH)
            if mark:
                torch._dynamo.mark_dynamic(x, 0)
            y = run(x)
            if name == "pixelfly":
                assert_equal(y, projected(model, made)(x))
        graphs[name] = compilations() - before
    assert graphs["pixelfly"] == graphs["inductor"]


@pytest.mark.parametrize(
    ("mark", "kwargs"), [(True, {}), (False, {"dynamic": True}), (False, {}), (False, {"dynamic": False})]
)
def test_as_many_recompilations_as_inductor(mark: bool, kwargs: dict[str, Any]) -> None:
    _calls_compile_as_often_as_inductor(
        [ROWS, 48, 5, ROWS, 1, 100][: 3 if kwargs.get("dynamic") is False else 6], mark, **kwargs
    )


@pytest.mark.filterwarnings("ignore:Profiler record function:UserWarning")
def test_dynamo_does_not_look_into_our_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "inductor", lambda gm, inputs, patches: aot_eager(gm, list(inputs)))
    model = nn.Linear(WIDTH, WIDTH)

    def step(x: Tensor) -> None:
        model(x).square().mean().backward()

    graphs = []
    for options in ({"backend": "aot_eager"}, {"backend": "pixelfly", "options": OPTIONS}):
        torch._dynamo.reset()
        counters.clear()
        torch.compile(step, **options)(some_x())
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] == graphs[1]


def test_gradients_with_symbolic_rows() -> None:
    model = Mlp(1)
    made, run = planned(model), torch.compile(model, backend="pixelfly", options=OPTIONS, dynamic=True)
    for rows in (ROWS, 50):
        assert_same_gradients(model, run, projected(model, made), torch.randn(rows, WIDTH))


# ---- options ----


def test_the_backend_is_found_by_name() -> None:
    assert "pixelfly" in torch._dynamo.list_backends()


def test_mode_and_inductor_options_pass_through(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch._inductor.compile_fx as inductor

    seen: list[dict[str, Any]] = []
    original = inductor.compile_fx

    def spy(*args: Any, config_patches: Any = None, **kwargs: Any) -> Any:
        if config_patches is not None:
            seen.append(config_patches)
        return original(*args, config_patches=config_patches, **kwargs)

    monkeypatch.setattr(inductor, "compile_fx", spy)
    model, x = Mlp(1), some_x()
    with torch.no_grad():
        compiled(model, epilogue_fusion=True)(x)
        torch._dynamo.reset()
        torch.compile(model, backend="pixelfly", mode="max-autotune-no-cudagraphs")(x)
    assert seen[0] == {"epilogue_fusion": True}
    assert seen[1]["max_autotune"] is True


def test_a_ready_plan_decides(tmp_path: Path) -> None:
    model, x = Mlp(), some_x()
    made = planned(model, x, exclude="layers.0.*", budget=0.8)
    made.save(tmp_path / "plan.json")
    assert len(made.sparse) == 2
    for given in (made, Plan.from_json(made.to_json()), str(tmp_path / "plan.json")):
        torch._dynamo.reset()
        run: Any = torch.compile(model, backend="pixelfly", options={"plan": given})
        with torch.no_grad():
            assert_equal(run(x), oracle(model, made)(x))
    assert_same_gradients(model, run, projected(model, made), x)


def test_a_plan_for_another_model_is_refused() -> None:
    made = planned(Mlp(1))
    with pytest.raises(PlanMismatchError, match=r"layers\.1\.up\.weight: not in the plan") as error:
        torch.compile(Mlp(2), backend="pixelfly", options={"plan": made})(some_x())
    assert error.value.site == "layers.1.up.weight" and error.value.next_step


@pytest.mark.parametrize(
    ("options", "words"),
    [({"bugdet": 0.5}, "unknown option 'bugdet'"), ({"budget": 1.5}, r"\(0, 1\]"), ({"block_size": 48}, "block_size")],
)
def test_wrong_options_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(OptionError, match=words):
        torch.compile(Mlp(1), backend="pixelfly", options=options)(some_x())


# ---- what is said ----


def test_what_is_lossy_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    model, x = Mlp(1), some_x()
    run = compiled(model)
    run(x).sum().backward()
    with torch.no_grad():
        run(x)
    (text,) = warnings_of(caplog)
    assert "2 of 2 matmul weights" in text and "relative weight error" in text


@pytest.mark.parametrize(("dynamic", "with_plan"), [(None, False), (False, False), (None, True)])
def test_a_weight_that_a_later_graph_cuts_otherwise_is_named_once(
    dynamic: bool | None, with_plan: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(backend, "inductor", lambda gm, inputs, patches: aot_eager(gm, list(inputs)))

    class Cut(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weight[: x.shape[-1]]

    model = Cut(WIDTH, WIDTH).requires_grad_(False)
    options = {"plan": planned(model)} if with_plan else OPTIONS
    run = torch.compile(model, backend="pixelfly", options=options, dynamic=dynamic)
    for size in (WIDTH, 96, 64):
        run(torch.randn(ROWS, size))
    (text,) = [text for text in warnings_of(caplog) if "otherwise" in text]
    assert text.startswith(f"pixelfly: weight is sparse in {'the plan' if with_plan else 'an earlier graph'}")
    assert "options={'exclude': 'weight'}" in text


LAYOUTS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], Callable[[Tensor, Tensor], Tensor], str]] = {
    "turned": (lambda x, w: x @ w[0], lambda x, w: x @ w[0].T, "in both orientations"),
    "heads": (
        lambda x, w: torch.einsum("bd,hde->bhe", x, w).sum(1),
        lambda x, w: torch.bmm(x.expand(len(w), -1, -1) * 1, w).sum(0),
        "as different matrices",
    ),
}


@pytest.mark.parametrize("kind", LAYOUTS)
def test_a_later_graph_that_takes_a_weight_for_other_matrices_is_told_how_and_changes_no_decision(
    kind: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(backend, "inductor", lambda gm, inputs, patches: aot_eager(gm, list(inputs)))
    one, other, how = LAYOUTS[kind]

    class Layouts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(2, WIDTH, WIDTH) / WIDTH**0.5, requires_grad=False)

        def forward(self, x: Tensor, turn: bool = False) -> Tensor:
            return other(x, self.w) if turn else one(x, self.w)

    model, x = Layouts(), some_x()
    run = torch.compile(model, backend="pixelfly", options=OPTIONS, dynamic=False)
    run(x)
    decided = dict(backend._decided.of(model.w))
    run(x, turn=True)
    assert decided and decided.items() <= backend._decided.of(model.w).items()
    (text,) = [text for text in warnings_of(caplog) if "otherwise" in text]
    assert how in text


class TwoUses(nn.Module):
    """Uses a weight in two graphs: by a matmul, and by what `other` does."""

    def __init__(self, other: Callable[[Tensor, Tensor], Tensor], matmul_first: bool) -> None:
        super().__init__()
        self.w, self.v = (nn.Parameter(torch.randn(WIDTH, WIDTH) / WIDTH**0.5) for _ in range(2))
        steps = [lambda x: x @ self.w, lambda x: other(x, self.w)]
        self.steps = steps if matmul_first else steps[::-1]

    def forward(self, x: Tensor) -> Tensor:
        x = self.steps[0](x) @ self.v
        torch._dynamo.graph_break()
        return self.steps[1](x) @ self.v


@pytest.mark.parametrize("other", [lambda x, w: x @ (2 * w), lambda x, w: x + w.sum()], ids=["computed", "summed"])
@pytest.mark.parametrize("matmul_first", [False, True])
def test_a_weight_is_dense_or_sparse_in_all_graphs_or_a_warning_says_where_it_is_not(
    other: Callable[[Tensor, Tensor], Tensor],
    matmul_first: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(backend, "inductor", lambda gm, inputs, patches: aot_eager(gm, list(inputs)))
    model, x = TwoUses(other, matmul_first).requires_grad_(False), some_x()
    made = planned(model, x)
    assert [entry.name for entry in made.sparse] == ["v"]
    result = torch.compile(model, backend="pixelfly", options=OPTIONS)(x)
    texts = [text for text in warnings_of(caplog) if text.startswith("pixelfly: w ")]
    assert len(texts) == 1
    if matmul_first:
        assert "is sparse in an earlier graph and used otherwise" in texts[0]
    else:
        assert "stays dense here: in another graph: used by" in texts[0]
        torch.testing.assert_close(result, oracle(model, made)(x))


class ServedTwice(nn.Module):
    """The first piece is compiled once for both layers, the second once for each."""

    class Layer(nn.Module):
        def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
            super().__init__()
            self.w, self.function = nn.Parameter(torch.randn(WIDTH, WIDTH) / WIDTH**0.5), function

        def forward(self, x: Tensor) -> Tensor:
            x = x + self.w.mean()
            torch._dynamo.graph_break()
            return self.function(x @ self.w)

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([self.Layer(torch.sin), self.Layer(torch.cos)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def test_a_weight_stays_dense_for_all_layers_that_the_code_of_a_piece_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "inductor", lambda gm, inputs, patches: aot_eager(gm, list(inputs)))
    model, x = ServedTwice().requires_grad_(False), some_x()
    assert list(planned(model, x).sparse) == []
    torch.testing.assert_close(torch.compile(model, backend="pixelfly", options=OPTIONS)(x), model(x))


@pytest.mark.parametrize("order", [("sum", "run"), ("run", "sum")])
def test_what_another_call_does_with_a_weight_keeps_nothing_dense(
    order: tuple[str, str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Regularised(nn.Linear):
        def forward(self, x: Tensor, what: str = "run") -> Tensor:
            return super().forward(x) if what == "run" else self.weight.pow(2).sum()

    monkeypatch.setattr(backend, "inductor", lambda gm, inputs, patches: aot_eager(gm, list(inputs)))
    model, x = Regularised(WIDTH, WIDTH).requires_grad_(False), some_x()
    run = torch.compile(model, backend="pixelfly", options=OPTIONS)
    results = {what: run(x, what) for what in order}
    torch.testing.assert_close(results["run"], oracle(model, planned(model, x))(x))
    assert [text for text in warnings_of(caplog) if "another graph" in text] == []


def test_a_new_model_at_the_place_of_one_that_is_gone_inherits_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(backend, "inductor", lambda gm, inputs, patches: aot_eager(gm, list(inputs)))
    monkeypatch.setattr(backend, "id", lambda _: 0, raising=False)
    first, x = TwoUses(lambda x, w: x + w.sum(), False).requires_grad_(False), some_x()
    second = TwoUses(lambda x, w: x.sin(), False).requires_grad_(False)
    first.steps[1], second.w = torch.sin, first.w
    torch.compile(first, backend="pixelfly", options=OPTIONS)(x)
    torch.compile(second, backend="pixelfly", options=OPTIONS)(x)
    assert [text for text in warnings_of(caplog) if "stays dense" in text] == []


@pytest.mark.parametrize("kind", [torch.float64, torch.bfloat16])
def test_other_types_raise_as_without_us(kind: torch.dtype) -> None:
    model = nn.Linear(WIDTH, WIDTH)
    with pytest.raises(RuntimeError, match="must have the same dtype"):
        compiled(model)(some_x().to(kind))


class OneWeight(nn.Module):
    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.w, self.function = nn.Parameter(torch.randn(WIDTH, WIDTH) / WIDTH**0.5), function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.w)


def between_types(x: Tensor, w: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        y = x @ w
        with torch.autocast("cpu", enabled=False):
            y = y.float() @ w
    return y.bfloat16() @ w


OF_TWO_TYPES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "a bias": lambda x, w: F.linear(x, w, x[0].bfloat16()),
    "a bias of float64": lambda x, w: F.linear(x, w, x[0].double()),
    "a term": lambda x, w: torch.addmm(x.bfloat16(), x, w),
    "a scaled term": lambda x, w: torch.addmm(x.bfloat16(), x, w, beta=0.5),
    "integers": lambda x, w: x.long() @ w,
    "behind autocast": between_types,
}


@pytest.mark.parametrize("kind", OF_TWO_TYPES)
def test_other_types_of_any_operand_raise_as_without_us(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "inductor", lambda gm, inputs, patches: aot_eager(gm, list(inputs)))
    model = OneWeight(OF_TWO_TYPES[kind])
    for run in (model, torch.compile(model, backend="pixelfly", options=OPTIONS)):
        with pytest.raises(RuntimeError, match=r"dtype|scalar type"):
            run(some_x())


@pytest.mark.parametrize("around", [False, True])
def test_autocast_brings_two_types_together_also_in_a_checkpoint(around: bool) -> None:
    def low(x: Tensor, w: Tensor) -> Tensor:
        with nullcontext() if around else torch.autocast("cpu", torch.bfloat16):
            y = checkpoint(lambda t: t.bfloat16() @ torch.cat([w[:64], w[64:]]), x, use_reentrant=False)
        return y.float()

    model = OneWeight(low)
    with torch.autocast("cpu", torch.bfloat16, enabled=around):
        assert [entry.reason for entry in planned(model, some_x()).entries] == [None, None]


def test_globs_that_match_nothing_are_looked_for_once_and_are_no_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """One set of options may be for layers that are compiled one by one."""
    asked: list[Config] = []
    why = Config.why_unmatched
    monkeypatch.setattr(Config, "why_unmatched", lambda config, names: asked.append(config) or why(config, names))
    monkeypatch.setattr(backend, "inductor", lambda gm, inputs, patches: aot_eager(gm, list(inputs)))
    caplog.set_level(logging.INFO, "pixelfly_compiler")
    model, x = Mlp(1).requires_grad_(False), some_x()
    run = compiled(model, exclude=("layers[0].up.weight", "*.bias", "lm_head"))
    for rows in (1, 2):
        run(x[:rows])
    told = [record for record in caplog.records if "matches the name" in record.getMessage()]
    assert len(asked) == 1 and {record.levelno for record in told} == {logging.INFO}
    assert [record.getMessage() for record in told] == [
        "pixelfly: 'layers[0].up.weight' matches the name of no weight: did you mean 'layers.0.up.weight'?",
        "pixelfly: 'lm_head' matches the name of no weight: print(plan) lists the names",
    ]


def test_a_model_without_sites_runs_dense_with_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(WIDTH))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.scale

    model, x = Scale(), some_x()
    run = compiled(model)
    torch.testing.assert_close(run(x), model(x))
    with torch.no_grad():
        run(x)
    (text,) = warnings_of(caplog)
    assert "nothing was made sparse" in text


class Pieces(nn.Module):
    """Graph breaks around a function in the middle."""

    def __init__(self, middle: nn.Module) -> None:
        super().__init__()
        self.middle = middle

    def forward(self, x: Tensor) -> Tensor:
        x = x.sin()
        torch._dynamo.graph_break()
        x = self.middle(x)
        torch._dynamo.graph_break()
        return x.cos()


def test_a_graph_without_sites_is_no_model_without_sites(caplog: pytest.LogCaptureFixture) -> None:
    run = torch.compile(Pieces(Mlp(1)), backend="pixelfly", options=OPTIONS)
    with torch.no_grad():
        for _ in range(3):
            run(some_x())
    (text,) = warnings_of(caplog)
    assert "run sparse" in text


def test_a_broken_model_without_sites_is_told_too(caplog: pytest.LogCaptureFixture) -> None:
    run = torch.compile(Pieces(nn.ReLU()), backend="pixelfly", options=OPTIONS)
    for _ in range(3):
        run(some_x())
    (text,) = warnings_of(caplog)
    assert "nothing was made sparse" in text


@pytest.mark.parametrize("mode", ["trained", "evaluated", "without gradients", "frozen", "only biases"])
def test_steps_of_few_rows_stay_dense_where_they_train(
    mode: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Their projection would cost more than they gain. The plan says the same."""
    monkeypatch.setattr(backend, "inductor", lambda gm, inputs, patches: aot_eager(gm, list(inputs)))
    monkeypatch.setattr(calibration, "calibrate", Device)  # not what this machine is like
    model, x = nn.Linear(768, 768).requires_grad_(mode != "frozen").train(mode != "evaluated"), torch.randn(16, 768)
    if mode == "only biases":
        model.weight.requires_grad_(False)
    with torch.set_grad_enabled(mode != "without gradients"):
        made = plan(model, x)
        result = torch.compile(model, backend="pixelfly")(x)
    (text,) = warnings_of(caplog)
    if mode == "trained":
        assert not made.sparse and f"nothing was made sparse: weight: {made['weight'].reason}" in text
        torch.testing.assert_close(result, model(x))
    else:
        assert made.sparse and "1 of 1 matmul weights run sparse" in text
        torch.testing.assert_close(result, project_(model, made)(x))


# ---- dtypes and devices without kernels ----


def test_float64_is_dense_unless_forced() -> None:
    model, x = Mlp(1).double(), some_x().double()
    made = plan(model, x)
    assert all(entry.reason for entry in made)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, backend="pixelfly")(x), model(x))
        torch._dynamo.reset()
        exact = oracle(model, planned(model, x))(x)
        torch.testing.assert_close(compiled(model)(x), exact, rtol=1e-12, atol=1e-12)


def test_devices_without_kernels_stay_dense() -> None:
    site = Site("w", (64, 64), 64, 64, False, 8, "8", "w", "float32", "mps")
    found = backend.dense_without_kernels(Found((site,), (), ()))
    assert "no kernels for device 'mps'" in str(found.sites[0].reason)


# ---- memory ----


class Nested(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        values = x.values() if x.is_nested else x
        y = x if x.is_nested else torch.nested.nested_tensor_from_jagged(x, torch.tensor([0, 3, len(x)]))
        return super().forward(y).values() + values


@pytest.mark.parametrize("within", [True, False])
def test_nested_tensors_run_dense_and_the_plan_says_so(monkeypatch: pytest.MonkeyPatch, within: bool) -> None:
    monkeypatch.setattr(backend, "inductor", lambda gm, inputs, patches: aot_eager(gm, list(inputs)))
    model, x = Nested(WIDTH, WIDTH), some_x()
    x = x if within else torch.nested.nested_tensor([x[:3], x[3:]], layout=torch.jagged)
    entry = planned(model, x)["weight"]
    assert "of a nested tensor" in str(entry.reason) and entry.other_flops == 2 * ROWS * WIDTH * WIDTH
    torch.testing.assert_close(torch.compile(model, backend="pixelfly", options=OPTIONS)(x), model(x))


def test_a_loss_that_is_kept_holds_no_compact_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "inductor", lambda gm, inputs, patches: aot_eager(gm, list(inputs)))
    model, x = nn.Linear(WIDTH, WIDTH), some_x()
    ours = compiled(model)
    loss = ours(x).sum()
    (entry,) = backend._weights._of(model.weight).values()
    blocks = weakref.ref(entry.compact.blocks)
    del entry
    loss.backward()
    with torch.no_grad():
        model.weight.mul_(2)
    ours(x)
    assert blocks() is None and loss.grad_fn is not None


def test_a_weight_can_be_swapped_and_is_pickled_without_what_is_known_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "inductor", lambda gm, inputs, patches: aot_eager(gm, list(inputs)))
    model, x = nn.Linear(WIDTH, WIDTH), some_x()
    ours = compiled(model)
    with torch.no_grad():
        ours(x)
        size = len(pickle.dumps(model.weight)) - model.weight.nbytes
        torch.save(list(model.parameters()), saved := io.BytesIO())
        torch.utils.swap_tensors(model.weight, nn.Parameter(torch.randn(WIDTH, WIDTH)))
        torch.testing.assert_close(ours(x), projected(model, planned(model))(x), rtol=1e-4, atol=1e-5)
    assert size < 1000 and not any(vars(copy.deepcopy(model.weight)).values())
    saved.seek(0)
    loaded = vars(torch.load(saved)[0])  # with weights_only, the default
    assert not any(value for name, value in loaded.items() if "pixelfly" in name)


def test_compact_weights_live_as_long_as_the_weights_or_until_reset() -> None:
    model, x = Mlp(1), some_x()
    run = compiled(model)
    with torch.no_grad():
        run(x)
    (entry,) = backend._weights._of(model.layers[0].up.weight).values()
    parts = weakref.ref(entry.compact.blocks)
    del entry
    assert parts() is not None
    torch._dynamo.reset()
    gc.collect()
    assert parts() is None and len(backend._weights) == 0
    with torch.no_grad():
        run(x)
    assert len(backend._weights) == 2
    del model, run
    gc.collect()
    assert len(backend._weights) == 0


# ---- kernels that cannot be compiled ----


@pytest.fixture
def _no_caches() -> Iterator[None]:
    import torch._functorch.config as functorch_config
    import torch._inductor.config as inductor_config

    with inductor_config.patch(fx_graph_cache=False), functorch_config.patch(enable_autograd_cache=False):
        yield


def _raise(render: Any, self: Any, *args: Any, **kwargs: Any) -> str:
    raise RuntimeError("this template is broken")


def _invalid(render: Any, self: Any, *args: Any, **kwargs: Any) -> str:
    return render(self, *args, **kwargs) + "\nthis is no C++;\n"


@pytest.mark.usefixtures("_no_caches")
@pytest.mark.parametrize("broken", [_raise, _invalid])
@pytest.mark.parametrize(("template", "graphs"), [("linear", ["forward", "backward"]), ("block_grad", ["backward"])])
def test_a_kernel_that_fails_is_replaced_by_the_reference(
    broken: Any, template: str, graphs: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    original = lowering_cpu.PixelflyCppTemplate.render

    def render(self: Any, *args: Any, **kwargs: Any) -> str:
        if self.file.startswith(template):
            return broken(original, self, *args, **kwargs)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(lowering_cpu.PixelflyCppTemplate, "render", render)
    model, x = Mlp(1), some_x()
    made, run = planned(model, x), compiled(model)
    assert_same_gradients(model, run, projected(model, made), x)
    texts = [text for text in warnings_of(caplog) if "reference runs" in text]
    assert [word for text in texts for word in ("forward", "backward") if f"the {word} graph" in text] == graphs
    assert all("broken" in text or "error" in text.lower() for text in texts)


def test_an_error_that_is_not_ours_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch._inductor.compile_fx as inductor

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("no compiler at all")

    monkeypatch.setattr(inductor, "compile_fx_inner", fail)
    with pytest.raises(Exception, match="no compiler at all"), torch.no_grad():
        compiled(Mlp(1))(torch.randn(7, WIDTH))


# ---- the graph ----


def test_dynamos_own_graph_is_left_alone() -> None:
    seen: dict[str, Any] = {}

    def spy(gm: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        before = gm.print_readable(print_output=False)
        run = backend.pixelfly(gm, inputs, options=OPTIONS)
        seen["same"] = gm.print_readable(print_output=False) == before
        seen["sites"] = len(find_sites(gm, inputs).matches)
        return run

    with torch.no_grad():
        torch.compile(Mlp(1), backend=spy)(some_x())
    assert seen == {"same": True, "sites": 2}


def test_the_public_names_are_there() -> None:
    assert all(hasattr(pixelfly_compiler, name) for name in pixelfly_compiler.__all__)
