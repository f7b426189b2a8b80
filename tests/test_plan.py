"""Plans: the budget is met, every decision has its reason, text forms are faithful, and project_ puts in P(W)."""

from __future__ import annotations

import copy
import inspect
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from pixelfly_compiler.cli import main
from pixelfly_compiler.config import Config
from pixelfly_compiler.decision import Entry, Plan
from pixelfly_compiler.errors import OptionError, PlanError, PlanMismatchError, UnknownSiteError
from pixelfly_compiler.passes import calibration, cost
from pixelfly_compiler.passes.candidates import candidates, relative_errors
from pixelfly_compiler.passes.regions import Region
from pixelfly_compiler.passes.sites import Found, Site, SiteConfig
from pixelfly_compiler.plan import make_plan, plan, project, project_, rescale_
from pixelfly_compiler.report import render

DEVICE = cost.Device()  # the defaults: tests must not depend on this machine


class Mlp(nn.Module):
    def __init__(self, width: int = 128, layers: int = 2) -> None:
        super().__init__()
        self.layers: Any = nn.ModuleList(
            nn.ModuleList([nn.Linear(width, 4 * width), nn.Linear(4 * width, width)]) for _ in range(layers)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for up, down in self.layers:
            x = x + down(F.gelu(up(x)))
        return x


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb, self.head = nn.Embedding(192, 128), nn.Linear(128, 192, bias=False)
        self.head.weight = self.emb.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.emb(ids))


def site(out_features: int, in_features: int, rows: int = 512, name: str = "w", **changes: Any) -> Site:
    values: dict[str, Any] = {
        "name": name,
        "weight_shape": (out_features, in_features),
        "out_features": out_features,
        "in_features": in_features,
        "transposed": False,
        "rows": rows,
        "rows_expr": str(rows),
        "role": name,
        "dtype": "float32",
        "device": "cpu",
    }
    return Site(**values | changes)


def planned(*sites: Site, **options: Any) -> Plan:
    return make_plan(Found(sites, (), ()), Config(**options), device=DEVICE)


def small_plan(model: nn.Module | None = None, **options: Any) -> Plan:
    return plan(model or Mlp(), torch.randn(64, 128), device=DEVICE, training=False, **options)


# ---- budget ----

SIZES = st.sampled_from([64, 96, 100, 128, 192, 256, 300, 384, 768, 1000, 1024, 3072])


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(SIZES, SIZES), min_size=1, max_size=4),
    st.floats(0.02, 1.0),
    st.sampled_from(["proportional", "error"]),
    st.booleans(),
)
def test_any_sizes_meet_any_budget_or_the_plan_says_why(
    shapes: list[tuple[int, int]], budget: float, allocator: str, force: bool
) -> None:
    sites = [site(*shape, name=f"w{index}") for index, shape in enumerate(shapes)]
    made = planned(*sites, budget=budget, allocator=allocator, force=force)
    total = sum(2 * s.rows * s.elements for s in sites)
    assert made.kept == pytest.approx(sum(entry.kept_flops for entry in made) / total)
    assert made.notes or 0.95 * budget * (1 - 1e-5) <= made.kept <= budget * (1 + 1e-9)
    for entry in made:
        assert (entry.config is None) == (entry.reason is not None)
        if entry.config is not None:
            assert entry.config.rank % 16 == 0
            assert entry.support().kept + entry.config.rank * (entry.out_features + entry.in_features) == entry.kept
            assert force or (entry.speedup is not None and entry.speedup > 1)


@pytest.mark.parametrize(
    ("shape", "budget", "config"),
    [
        ((768, 768), 0.25, SiteConfig(64, 1, 32)),
        ((3072, 768), 0.25, SiteConfig(64, 1, 48)),
        ((1024, 1024), 0.25, SiteConfig(64, 2, 32)),
        ((1024, 4096), 0.125, SiteConfig(64, 0, 48)),
        ((512, 2048), 0.25, SiteConfig(64, 0, 48)),
        ((384, 384), 0.25, SiteConfig(64, 0, 16)),
    ],
)
def test_decisions_for_the_shapes_people_use(shape: tuple[int, int], budget: float, config: SiteConfig) -> None:
    entry = planned(site(*shape), budget=budget)["w"]
    assert entry.config == config


def test_varied_strides_take_smaller_blocks_rather_than_the_bare_diagonal() -> None:
    assert planned(site(384, 384), vary_strides=True)["w"].config == SiteConfig(32, 1, 16)
    assert planned(site(768, 768), vary_strides=True)["w"].config == SiteConfig(64, 1, 32)
    only = planned(site(384, 384), vary_strides=True, block_size=64)["w"]
    assert only.config == SiteConfig(64, 0, 16), "there is nothing smaller to take"


def test_strides_go_on_behind_sites_that_share_code() -> None:
    twins = [site(1024, 1024, name=name, namesakes=("a", "b")) for name in "ab"]
    made = planned(*twins, site(1024, 1024, name="c"), vary_strides=True)
    a, b, c = (made[name].config for name in "abc")
    assert a is not None and c is not None and a == b
    assert (a.first, c.first) == (0, a.strides)


@pytest.mark.parametrize("shape", [(768, 768), (768, 3072), (1024, 1024), (2304, 768)])
@pytest.mark.parametrize("budget", [0.25, 0.5])
def test_the_low_rank_share_is_a_quarter_to_a_third(shape: tuple[int, int], budget: float) -> None:
    entry = planned(site(*shape), budget=budget)["w"]
    assert entry.config is not None
    share = entry.config.rank * sum(shape) / entry.kept
    assert 0.25 - 1e-9 <= share <= 1 / 3 + 1e-9


def test_lowrank_share_and_block_size_are_obeyed() -> None:
    none = planned(site(768, 768), lowrank_share=0.0)["w"]
    assert none.config == SiteConfig(64, 2, 0)
    half = planned(site(1024, 1024), lowrank_share=0.5)["w"]
    assert half.config is not None
    assert half.config.rank * 2048 / half.kept == pytest.approx(0.5, abs=0.07)
    assert planned(site(768, 768), block_size=32)["w"].support().block == 32


def test_budget_one_forced_is_every_block_and_no_rank() -> None:
    entry = planned(site(768, 768), budget=1.0, force=True, lowrank_share=0.0)["w"]
    assert entry.config == SiteConfig(64, 11, 0)
    assert entry.kept_share == 1.0


def test_dense_sites_have_reasons_and_count_in_full() -> None:
    sites = (
        site(768, 768, name="a"),
        site(768, 768, name="b", reason="the weight is quantised"),
        site(8, 768, name="c"),
        site(768, 768, name="d", dtype="float64"),
    )
    made = planned(*sites, exclude=("a",), budget=0.5)
    assert made["a"].reason == "excluded by 'a'"
    assert made["b"].reason == "the weight is quantised"
    assert "too small" in str(made["c"].reason)
    assert "faster" in str(made["d"].reason)
    assert made.kept == 1.0
    assert "cannot be met" in made.notes[0]


def test_no_rows_and_empty_weights_do_no_harm() -> None:
    empty = site(32, 0, name="e", reason="the weight is empty")
    made = planned(site(768, 768, rows=0), empty)
    assert made["w"].config is not None
    assert "not a site" not in str(made)
    assert planned(empty).kept == 0


def test_force_overrides_the_prediction_and_not_the_user() -> None:
    slow = site(768, 768, dtype="float64")
    assert planned(slow, force=True)["w"].config is not None
    assert planned(slow, force=True, exclude="w")["w"].config is None


def test_earlier_decisions_stand() -> None:
    first = planned(site(768, 768, name="a"), site(768, 768, name="b"), budget=0.25)
    found = Found((site(768, 768, rows=1, name="a"), site(768, 768, rows=1, name="c")), (), ())
    again = make_plan(found, Config(budget=0.5), device=DEVICE, decided={"a": first["a"]})
    assert again["a"].config == first["a"].config
    assert again.kept <= 0.5


def test_a_step_of_training_must_pay_for_the_projection() -> None:
    def decided(rows: int, *, trained: bool = True, training: bool = True) -> Entry:
        found = Found((site(768, 768, rows=rows, trained=trained),), (), ())
        return make_plan(found, Config(), device=DEVICE, training=training)["w"]

    assert decided(4096).config and decided(4096).config == decided(4096, training=False).config
    assert decided(4096).speedup != decided(4096, training=False).speedup
    assert "its projection costs a training step more than 32 rows gain" in str(decided(32).reason)
    assert decided(32, training=False).config and decided(32, trained=False).config  # P of a frozen weight runs once
    assert decided(1).reason and decided(1, training=False).reason is None


@pytest.mark.parametrize("allocator", ["proportional", "error"])
def test_no_choice_of_a_training_plan_is_predicted_slower(allocator: str) -> None:
    """Also where the allocator takes another than what is nearest to the weight's own share of the budget."""
    for b in (96, 112):
        sites = site(384, 768, rows=64, name="a", trained=True), site(b, 96, rows=8192, name="b", trained=True)
        made = make_plan(Found(sites, (), ()), Config(allocator=allocator), device=DEVICE, training=True)
        assert all(entry.speedup > 1.1 for entry in made.sparse)


def test_frozen_and_trained_weights_of_one_role_share_a_decision() -> None:
    sites = tuple(site(768, 768, rows=32, name=name, role="q", trained=name == "b") for name in "ab")
    made = make_plan(Found(sites, (), ()), Config(), device=DEVICE, training=True)
    assert made["a"].reason == made["b"].reason and "its projection" in str(made["a"].reason)


# ---- cost ----


def test_cost_expressions_agree_with_counting() -> None:
    config = SiteConfig(64, 1, 32)
    kept = 2 * 12 * 64 * 64 + 32 * (768 + 768)
    assert cost.evaluate(cost.SPARSE_FLOPS, site(768, 768, rows=10), config) == 2 * 10 * kept
    assert cost.dense_flops(site(768, 768, rows=10)) == 2 * 10 * 768 * 768
    assert cost.evaluate(cost.SPARSE_PARAMS, site(768, 768), config) == kept
    assert cost.evaluate(cost.PROJECTION_FLOPS, site(768, 512), config) == 2 * (2 * 768 * 512 * 32)
    assert cost.evaluate(cost.PROJECTION_BYTES, site(768, 512), config) == 2 * 4 * 3 * 768 * 512


def test_fewer_flops_are_predicted_faster_until_overhead_rules() -> None:
    big, tiny = site(1024, 1024, rows=4096), site(32, 32, rows=1)
    times = [cost.sparse_time(big, SiteConfig(64, strides, 0), DEVICE) for strides in range(16)]
    assert times == sorted(times)
    assert times[0] < cost.dense_time(big, DEVICE)
    assert cost.sparse_time(tiny, SiteConfig(16, 0, 0), DEVICE) == pytest.approx(DEVICE.overhead, rel=0.1)


def test_what_costs_more_than_it_saves_stays_dense() -> None:
    """Kernels beat dense in flops everywhere here; for a handful of rows of a small weight the call costs more."""
    small = [candidates(site(128, 128, rows=rows), (64, 32, 16), DEVICE, budget=0.25) for rows in (1, 4096)]
    assert not small[0]
    assert small[1]


def test_dense_time_meets_its_grid_and_grows_beyond_it() -> None:
    grid = DEVICE.dense["bfloat16"]
    for row, rows in enumerate(cost.DENSE_ROWS):
        for column, width in enumerate(cost.DENSE_WIDTHS):
            one = site(width, width, rows=rows, dtype="bfloat16")
            assert cost.dense_time(one, DEVICE) == pytest.approx(grid[row][column])
    wide, wider = site(8192, 32768, rows=100), site(32768, 131072, rows=100)
    assert cost.dense_time(wider, DEVICE) == pytest.approx(16 * cost.dense_time(wide, DEVICE))


def test_projecting_in_every_step_pays_only_with_many_rows() -> None:
    speedups = []
    for rows in (16, 64, 1024, 4096):
        one = site(3072, 768, rows=rows, dtype="bfloat16", trained=True)
        sparse = cost.sparse_time(one, SiteConfig(64, 1, 48), DEVICE, training=True)
        speedups.append(cost.dense_time(one, DEVICE, training=True) / sparse)
    assert speedups == sorted(speedups)
    assert speedups[0] < 1 < speedups[2]


@pytest.mark.parametrize(("unit", "pairs", "bfloat16"), [(False, False, 1e12), (False, True, 2e12), (True, True, 5e12)])
def test_bf16_runs_in_pairs_or_on_the_matrix_unit(
    unit: bool, pairs: bool, bfloat16: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibration, "has_matrix_unit", lambda: unit)
    monkeypatch.setattr(calibration, "multiplies_pairs", lambda: pairs)
    rates = calibration._kernel_rates(1e12, 1e13)
    assert (rates["float16"], rates["bfloat16"]) == (1e12, bfloat16)
    few_rows = calibration._few_rows_rates(rates)
    assert few_rows["float16"] < few_rows["bfloat16"] or not (unit or pairs)
    assert few_rows["bfloat16"] < bfloat16


def test_calibration_is_measured_once_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(calibration, "_is_disturbed", lambda device: False)  # though other tests run beside it
    calibration._calibrated.cache_clear()
    first = calibration.calibrate()
    assert all(rate > 1e8 for rate in (*first.rate.values(), first.bandwidth))
    assert all(0 < seconds < 1e5 for grid in first.dense.values() for line in grid for seconds in line)
    (saved,) = (tmp_path / "pixelfly").iterdir()
    calibration._calibrated.cache_clear()
    monkeypatch.setattr(calibration, "measure", lambda: pytest.fail("measured again"))
    assert calibration.calibrate() == first
    saved.write_text("{}")
    calibration._calibrated.cache_clear()
    monkeypatch.setattr(calibration, "measure", cost.Device)
    assert calibration.calibrate() == cost.Device()  # a damaged file is no error
    calibration._calibrated.cache_clear()


def test_what_a_busy_machine_measures_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def device(seconds: float) -> cost.Device:
        return cost.Device(dense={"float32": tuple(tuple(seconds for _ in cost.DENSE_WIDTHS) for _ in cost.DENSE_ROWS)})

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(calibration.time, "sleep", lambda seconds: None)
    measured = [device(4e-3), device(8e-3), device(1e-5)]
    monkeypatch.setattr(calibration, "_measure", lambda: measured.pop(0))
    calibration._calibrated.cache_clear()
    assert calibration.calibrate() == device(8e-3)  # for this process, after another try
    assert "too busy" in caplog.text and not list(tmp_path.iterdir())
    calibration._calibrated.cache_clear()
    assert calibration.calibrate() == device(1e-5)
    assert list(tmp_path.iterdir())
    calibration._calibrated.cache_clear()


def test_a_call_takes_longer_on_a_machine_whose_calls_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def overhead(smallest: float) -> float:
        grid = tuple(tuple(smallest * row * width for width in cost.DENSE_WIDTHS) for row in cost.DENSE_ROWS)
        monkeypatch.setattr(calibration, "_dense_grid", lambda dtype: grid)
        return calibration.measure().overhead / cost.Device.overhead

    assert overhead(1e-9 / cost.DENSE_WIDTHS[0]) == 1
    assert overhead(1e-5 / cost.DENSE_WIDTHS[0]) == pytest.approx(5)


def test_expected_error_is_near_the_real_one() -> None:
    torch.manual_seed(0)
    weight = torch.randn(256, 384)
    weight[:64] *= 4
    one = site(256, 384)
    for config in (SiteConfig(32, 0, 32), SiteConfig(64, 1, 16), SiteConfig(32, 2, 0)):
        entry = Entry("w", (256, 384), 256, 384, config=config)
        real = float((weight - project(weight, entry)).square().sum() / weight.square().sum())
        assert relative_errors(one, [config], weight)[0] == pytest.approx(real, rel=0.03)


def test_candidates_keep_less_than_all() -> None:
    one = site(192, 320)
    assert all(0 < way.kept < one.elements for way in candidates(one, (64, 32, 16), DEVICE, budget=0.25))


# ---- values ----


def test_json_round_trip_and_hash(tmp_path: Path) -> None:
    made = small_plan()
    again = Plan.from_json(made.to_json())
    assert again == made
    assert hash(again) == hash(made)
    assert again.digest == made.digest
    assert again.digest != small_plan(budget=0.5).digest
    made.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == made


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"version": 99, "entries": []}', '{"version": 1, "entries": [1]}'])
def test_what_is_no_plan_is_an_error(text: str) -> None:
    with pytest.raises(PlanError):
        Plan.from_json(text)


def test_lookup_by_any_name() -> None:
    made = plan(Tied(), torch.arange(40), device=DEVICE)
    assert made["emb.weight"] is made["head.weight"]
    assert "head.weight" in made
    with pytest.raises(UnknownSiteError, match=r"did you mean head\.weight"):
        made["haed.weight"]


def test_find_by_the_end_of_a_name() -> None:
    made = small_plan(Mlp(128, layers=2))
    entry = made.find("0.weight", (512, 128))
    assert entry is not None
    assert entry.config == made["layers.0.0.weight"].config
    assert made.find("2.weight") is None
    assert made.find("ayers.0.0.weight") is None


def test_a_plan_for_another_model_is_refused() -> None:
    made = small_plan(Mlp(128))
    with pytest.raises(PlanMismatchError, match=r"layers\.0\.0\.weight: has shape \(1024, 256\)"):
        plan(Mlp(256), torch.randn(8, 256), plan=made)
    with pytest.raises(PlanMismatchError, match=r"layers\.2\.0\.weight: not in the plan"):
        plan(Mlp(128, layers=3), torch.randn(8, 128), plan=made)
    with pytest.raises(PlanMismatchError, match=r"layers\.0\.0\.weight"):
        project_(Mlp(256), made)


def test_a_part_of_a_weight_fits_only_where_the_plan_leaves_the_weight_dense() -> None:
    half = replace(site(64, 128, name="w[0:64]", region=Region((64, 128), (128, 1), 0)), weight_shape=(128, 128))
    planned(site(128, 128), exclude="w").check([half])
    with pytest.raises(PlanMismatchError, match=r"w\[0:64\]: not in the plan"):
        planned(site(128, 128), force=True).check([half])


def test_a_glob_that_matches_nothing_is_noted() -> None:
    made = small_plan(Mlp(128, layers=3), exclude=["*.2.0.*", "*.bias", "layers[1].*"], budget=0.5)
    assert [note for note in made.notes if "matches" in note] == [
        "'layers[1].*' matches the name of no weight: did you mean 'layers.1.*'?"
    ]


def test_a_table_at_any_width_names_all_and_folds_layers() -> None:
    made = small_plan(Mlp(128, layers=3), exclude="*.2.0.*", budget=0.5)
    for width in (40, 80, 200):
        text = render(made, width)
        assert max(map(len, text.splitlines())) <= width
    wide = render(made, 200)
    assert "layers.*.1.weight" in wide
    assert "excluded by '*.2.0.*'" in wide
    assert "of 6 sites sparse" in wide
    assert str(made).count("\n") > 3


def test_varied_strides_keep_as_much_and_stay_one_row_of_the_table() -> None:
    model = Mlp(128, layers=3)
    same, varied = (small_plan(model, budget=0.5, vary_strides=vary) for vary in (False, True))
    supports = [[varied[f"layers.{layer}.{place}.weight"].support() for layer in range(3)] for place in (0, 1)]
    assert all(len(set(layers)) == 3 for layers in supports)
    assert varied.kept == same.kept
    assert str(varied).count("varied") == len(same.sparse) // 3
    assert Plan.from_json(varied.to_json()) == varied
    assert varied.digest != same.digest


# ---- from a model ----


class Forces(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        energy = self.down(F.silu(self.up(x))).sum()
        return torch.autograd.grad(energy, x, create_graph=True)[0]


def test_a_model_may_differentiate_in_its_forward() -> None:
    model, x = Forces().eval(), torch.randn(8, 64)
    evaluated, trained = (plan(model, x, device=DEVICE, force=True, training=flag) for flag in (False, True))
    assert [(entry.name, entry.config) for entry in evaluated] == [(entry.name, entry.config) for entry in trained]
    assert len(evaluated) == 2
    with torch.no_grad(), pytest.raises(RuntimeError, match="does not require grad"):
        plan(model, x, device=DEVICE)


class Jittered(nn.Linear):
    """Draws from Python's and NumPy's random numbers, as what masks speech does."""

    @torch.compiler.disable
    def factor(self) -> float:
        return random.random() * float(np.random.rand())

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.factor()


def test_a_plan_draws_no_random_numbers() -> None:
    random.seed(0)
    np.random.seed(0)
    before = random.getstate(), np.random.get_state()[2]
    plan(Jittered(64, 64), torch.randn(16, 64), device=DEVICE)
    assert (random.getstate(), np.random.get_state()[2]) == before


def test_a_plan_changes_nothing_of_the_model() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64), nn.Dropout(0.5), nn.Linear(64, 64))
    before = copy.deepcopy(model.state_dict())
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    plan(model, torch.randn(16, 64, generator=torch.Generator().manual_seed(0)), device=DEVICE)
    torch.testing.assert_close(torch.rand(3), expected)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


class Writes(nn.Module):
    """To its weights, its buffers and its input."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(8, 64, max_norm=0.1), nn.Linear(64, 64)
        self.calls: Tensor
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.calls = self.calls + 1
        with torch.no_grad():
            self.head.weight.mul_(2)
        x.add_(self.table(torch.arange(4)))
        return self.head(x)


def test_a_plan_undoes_what_a_forward_writes() -> None:
    model, x = Writes(), torch.randn(4, 64)
    before = copy.deepcopy((model.state_dict(), x))
    plan(model, x, device=DEVICE)
    torch.testing.assert_close((model.state_dict(), x), before, rtol=0, atol=0)


def test_a_plan_leaves_dynamo_free_to_specialise() -> None:
    model = Mlp()
    torch._dynamo.reset()
    small_plan(model)
    shapes: list[Any] = []

    def backend(gm: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        shapes.extend(type(value) for value in inputs if not isinstance(value, torch.Tensor))
        return gm.forward

    torch.compile(model, backend=backend)(torch.randn(32, 128))
    assert shapes == []


def test_plans_do_not_run_into_the_recompile_limit_nor_use_it_up() -> None:
    """All these models run the same code object."""
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=2, fail_on_recompile_limit_hit=True):
        for layers in (1, 2, 3, 4):
            assert len(small_plan(Mlp(128, layers))) == 2 * layers
        if "isolate_recompiles" in inspect.signature(torch.compile).parameters:
            torch.compile(Mlp(), backend="eager")(torch.randn(2, 128))


def test_a_layer_that_meets_many_sizes_is_counted_with_each() -> None:
    """Code for any size, which Dynamo makes at the second one, would know but one of them."""

    class Broken(Mlp):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for rows in (3, 5, 7, 11):
                torch._dynamo.graph_break()
                x = x + self.step(x[:rows]).sum()
            return x

        def step(self, x: torch.Tensor) -> torch.Tensor:
            up, down = self.layers[0]
            return down(F.gelu(up(x)))

    made = plan(Broken(128, 1), torch.randn(16, 128))
    assert [entry.rows for entry in made] == [26, 26]


def test_a_plan_does_not_make_what_is_compiled_later_dynamic() -> None:
    """Dynamo makes a size dynamic when it sees a second value of it; that of the plan must not be the first."""
    torch._dynamo.reset()
    model, sizes = Mlp(), []

    def backend(gm: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        sizes.extend(value for value in inputs if isinstance(value, torch.SymInt))
        return gm.forward

    small_plan(model)
    torch.compile(model, backend=backend)(torch.randn(7, 128))
    assert not sizes


def test_a_weight_that_makes_another_is_a_site_and_the_flops_of_that_are_listed_with_it() -> None:
    class Generated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.h, self.z = nn.Linear(32, 64 * 32), nn.Parameter(torch.randn(32))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ self.h(self.z).view(64, 32)

    model, x = Generated(), torch.randn(24, 64)
    made = plan(model, x, budget=0.5, force=True, device=DEVICE)
    (entry,) = made
    assert (entry.name, entry.rows, entry.other_flops, entry.shared) == ("h.weight", 1, 2 * 24 * 64 * 32, False)
    assert made.find("h.weight") == made.sparse[0]
    dense = model.h.weight.detach().clone()
    assert not torch.equal(project_(model, made).h.weight, dense)


def test_each_part_of_a_tied_head_is_projected() -> None:
    class Chunks(Tied):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            x, (a, b) = self.emb(ids), self.head.weight.chunk(2)
            return torch.cat([F.linear(x, a), F.linear(x, b)], -1)

    model = Chunks()
    dense = model.emb.weight.detach().clone()
    made = plan(model, torch.arange(8), budget=0.5, force=True, device=DEVICE)
    expected = dense
    for entry in made.sparse:
        expected = project(expected, entry)
    assert len(made.sparse) == 2
    project_(model, made)
    assert torch.equal(model.head.weight, expected)
    assert torch.equal(model.emb.weight, dense)


def test_a_weight_that_is_not_registered_is_told_so() -> None:
    model = nn.Sequential(nn.Linear(64, 64))
    hidden = [nn.Linear(64, 64)]
    model.forward = lambda x: hidden[0](model[0](x))  # type: ignore[method-assign]
    made = plan(model, torch.randn(8, 64), budget=0.5, force=True, device=DEVICE)
    assert len(made.sparse) == 2
    for verb in (project_, rescale_):
        with pytest.raises(PlanMismatchError, match=r"model\.parameters\(\) has not got it"):
            verb(model, made)


def test_weights_in_no_graph_say_where_they_may_be() -> None:
    class Unseen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.experts, self.used = nn.GRU(64, 64), nn.Linear(64, 64), nn.Linear(64, 64)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.used(x)

    made = plan(Unseen(), torch.randn(8, 64), device=DEVICE)
    assert "nn.LSTM" in str(made["rnn.weight_ih_l0"].reason)
    assert "grouped_mm" in str(made["experts.weight"].reason)


def test_graph_breaks_and_shared_code_keep_names_and_count_every_layer() -> None:
    class Broken(Mlp):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for up, down in self.layers:
                x = x + self.step(up, down, x)
                torch._dynamo.graph_break()
            return x

        def step(self, up: nn.Module, down: nn.Module, x: torch.Tensor) -> torch.Tensor:
            return down(F.gelu(up(x)))

    made = small_plan(Broken(128, layers=3))
    assert sorted(made._by_name) == sorted(name for name, p in Mlp(128, 3).named_parameters() if p.dim() == 2)
    assert {entry.rows for entry in made} == {64}
    assert 0.95 * 0.25 <= made.kept <= 0.25


def test_parameters_outside_of_all_graphs_are_listed() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.seen, self.skipped = nn.Linear(64, 64), nn.LSTM(64, 32)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.skipped(self.seen(x))[0]

    made = plan(Model(), torch.randn(3, 64), device=DEVICE)
    assert "in no graph" in str(made["skipped.weight_ih_l0"].reason)


def test_names_do_not_tell_which_modules_are_compiled_by_themselves() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    x = torch.randn(8, 64)
    made = plan(model, x, device=DEVICE, force=True)
    expected = project_(copy.deepcopy(model), made)(x)
    model[1] = torch.compile(model[1], backend="eager")
    assert plan(model, x, device=DEVICE, force=True).digest == made.digest
    with torch.no_grad():
        torch.testing.assert_close(project_(model, made)(x), expected)


def test_compiled_models_and_keyword_inputs() -> None:
    model: Any = torch.compile(Mlp(), backend="eager")
    made = plan(model, (), {"x": torch.randn(64, 128)}, device=DEVICE)
    assert "layers.0.0.weight" in made


def test_a_model_without_sites_gets_a_plan_that_says_so() -> None:
    made = plan(nn.ReLU(), torch.randn(3), device=DEVICE)
    assert len(made) == 0
    assert "no site" in made.notes[0]
    assert "no site" in str(made)


def test_wrong_options_are_refused() -> None:
    with pytest.raises(OptionError, match="'budget'"):
        small_plan(budget=2)
    with pytest.raises(OptionError, match="'bugdet'"):
        small_plan(bugdet=0.5)


# ---- projection ----


def test_project_replaces_every_planned_weight_and_no_other() -> None:
    torch.manual_seed(0)
    model = Mlp()
    made = small_plan(model, exclude="*.0.1.*", budget=0.5)
    before = copy.deepcopy(model.state_dict())
    project_(model, made)
    for name, value in model.state_dict().items():
        if name in made and made[name].config is not None:
            assert not torch.equal(value, before[name])
            torch.testing.assert_close(value, project(before[name], made[name]))
            torch.testing.assert_close(project(value, made[name]), value, rtol=1e-4, atol=1e-6)
        else:
            assert torch.equal(value, before[name])


def test_rescaled_weights_lose_no_norm_to_the_projection() -> None:
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(64, 2, 128, dropout=0.0, batch_first=True)  # with parts of a packed weight
    nn.init.zeros_(model.linear2.weight)
    made = plan(model, torch.randn(2, 8, 64), budget=0.5, force=True, exclude="linear1.*")
    before = copy.deepcopy(model.state_dict())
    assert rescale_(model, made) is model
    changed = {entry.parameter for entry in made.sparse}
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) == (name not in changed or name == "linear2.weight")
    for entry in made.sparse:
        after, earlier = (project(model.get_parameter(entry.parameter), entry), before[entry.parameter])
        parts = [matrix if entry.region is None else entry.region.view(matrix) for matrix in (after, earlier)]
        torch.testing.assert_close(parts[0].norm(), parts[1].norm())


def test_a_plan_that_does_not_fit_rescales_nothing() -> None:
    made, model = small_plan(Mlp(), budget=0.5), Mlp()
    first, *others = made.entries
    wrong = replace(made, entries=(first, *(replace(entry, weight_shape=(8, 8)) for entry in others)))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(PlanMismatchError, match="has shape"):
        rescale_(model, wrong)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_rescaled_model_leaves_the_table_of_a_tied_head_as_it_is() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.emb, self.head = nn.Embedding(64, 64), nn.Linear(64, 64, bias=False)
            self.head.weight = self.emb.weight

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.head(self.emb(ids))

    model = Tied()
    made, before = plan(model, torch.arange(64), budget=0.5, force=True), model.emb.weight.detach().clone()
    assert made.sparse and torch.equal(rescale_(model, made).emb.weight, before)


def test_project_of_a_transposed_weight_is_the_transpose() -> None:
    weight = torch.randn(96, 160)
    config = SiteConfig(32, 0, 16)
    stored = Entry("w", (160, 96), 96, 160, transposed=True, config=config)
    plain = Entry("w", (96, 160), 96, 160, config=config)
    torch.testing.assert_close(project(weight.t().contiguous(), stored), project(weight, plain).t())


def test_the_svd_basis_is_never_worse() -> None:
    torch.manual_seed(0)
    weight = torch.randn(128, 16) @ torch.randn(16, 128)
    entry = Entry("w", (128, 128), 128, 128, config=SiteConfig(32, 0, 16))
    errors = {basis: (weight - project(weight, entry, basis)).norm() for basis in ("fixed", "svd")}
    assert errors["svd"] < errors["fixed"]
    with pytest.raises(PlanError, match="valid: fixed, svd"):
        project(weight, entry, "none")


def test_a_tied_head_is_projected_and_the_lookup_is_not() -> None:
    torch.manual_seed(0)
    model = Tied()
    table = model.emb.weight.detach().clone()
    made = plan(model, torch.arange(40), device=DEVICE, force=True)
    project_(model, made)
    assert torch.equal(model.emb.weight, table)
    torch.testing.assert_close(model.head.weight, nn.Parameter(project(table, made["emb.weight"])))
    assert model.head.weight.requires_grad


class Lookup(nn.Module):
    """An embedding of its author's own class, which may also be asked to multiply."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(192, 128))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return F.embedding(ids, self.weight)

    def attend(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight)


class Wrapped(Tied):
    """A tied head whose weight the module above multiplies with, and a break before it."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.emb(ids)
        torch._dynamo.graph_break()
        return F.linear(x, self.head.weight)


class Apart(Tied):
    """A lookup that no graph sees."""

    @torch.compiler.disable
    def look_up(self, ids: torch.Tensor) -> torch.Tensor:
        return self.emb(ids)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.look_up(ids))


@pytest.mark.parametrize("kind", [Tied, Wrapped, Apart])
@pytest.mark.parametrize("within", [False, True])
def test_a_lookup_of_any_class_and_place_stays_dense_and_the_head_does_not(kind: type[nn.Module], within: bool) -> None:
    torch.manual_seed(0)
    tied = kind()
    if kind is Tied:
        tied.emb = Lookup()
        tied.head.weight = tied.emb.weight
    table = tied.emb.weight.detach().clone()
    model = nn.Sequential(tied) if within else tied
    made = plan(model, torch.arange(40), device=DEVICE, force=True)
    project_(model, made)
    assert torch.equal(tied.emb.weight, table)
    torch.testing.assert_close(tied.head.weight, nn.Parameter(project(table, made.sparse[0])))


@pytest.mark.parametrize("kind", [lambda: nn.Embedding(192, 128), Lookup])
def test_a_table_that_multiplies_itself_cannot_be_untied(kind: Callable[[], nn.Module]) -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.emb = kind()

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            x = self.emb(ids)
            return self.emb.attend(x) if isinstance(self.emb, Lookup) else F.linear(x, self.emb.weight)

    model = Own()
    with pytest.raises(PlanError, match="module of its own"):
        project_(model, plan(model, torch.arange(40), device=DEVICE, force=True))


# ---- command line ----

FACTORY = """
import torch
def build():
    model = torch.nn.Sequential(torch.nn.Linear(256, 512), torch.nn.ReLU(), torch.nn.Linear(512, 256))
    return model, torch.ones(64, 256)
def wrong():
    return 3
"""


def test_the_command_line_prints_and_saves_a_plan(tmp_path: Path) -> None:
    (tmp_path / "model.py").write_text(FACTORY)
    out = tmp_path / "plan.json"
    result = CliRunner().invoke(main, ["plan", f"{tmp_path}/model.py:build", "--budget", "0.5", "--json", str(out)])
    assert result.exit_code == 0, result.output
    assert "0.weight" in result.output
    assert Plan.load(out).budget == 0.5


@pytest.mark.parametrize(
    ("target", "options", "words"),
    [
        ("model.py", [], "is not FILE.py:FACTORY"),
        ("none.py:build", [], "no file"),
        ("model.py:none", [], "no function 'none'"),
        ("model.py:wrong", [], "must return (model, args)"),
        ("model.py:build", ["--budget", "2"], "'budget'"),
    ],
)
def test_the_command_line_explains_errors(tmp_path: Path, target: str, options: list[str], words: str) -> None:
    (tmp_path / "model.py").write_text(FACTORY)
    result = CliRunner().invoke(main, ["plan", f"{tmp_path}/{target}", *options])
    assert result.exit_code == 1
    assert words in result.output
    assert "Traceback" not in result.output
