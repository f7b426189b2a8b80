"""Options are checked before anything is compiled, and an error names the option and what is valid."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pixelfly_compiler.config import Config
from pixelfly_compiler.decision import Plan
from pixelfly_compiler.errors import OptionError, PixelflyError, PlanError, UnknownSiteError


def test_defaults() -> None:
    config, others = Config.from_options(None)
    assert config == Config(budget=0.25, allocator="proportional", basis="fixed", force=False)
    assert others == {}


def test_inductor_options_pass_through() -> None:
    config, others = Config.from_options({"budget": 0.5, "max_autotune": True, "cpp.threads": 2})
    assert config.budget == 0.5
    assert others == {"max_autotune": True, "cpp.threads": 2}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"budget": 0}, ["'budget'", "(0, 1]"]),
        ({"budget": 1.5}, ["'budget'", "(0, 1]"]),
        ({"budget": float("nan")}, ["'budget'", "(0, 1]"]),
        ({"budget": "half"}, ["'budget'", "number"]),
        ({"budget": True}, ["'budget'", "number"]),
        ({"allocator": "best"}, ["'allocator'", "'error'", "'proportional'"]),
        ({"allocator": []}, ["'allocator'", "'error'", "'proportional'"]),
        ({"block_size": 48}, ["'block_size'", "None, 16, 32, 64, 128"]),
        ({"lowrank_share": 1.0}, ["'lowrank_share'", "[0, 1)"]),
        ({"basis": "random"}, ["'basis'", "'fixed', 'svd'"]),
        ({"vary_strides": "yes"}, ["'vary_strides'", "False, True"]),
        ({"force": 1}, ["'force'", "False, True"]),
        ({"include": 3}, ["'include'", "glob"]),
        ({"exclude": ["a", 3]}, ["'exclude'", "glob"]),
        ({"plan": 3}, ["'plan'", "a Plan"]),
        ({"bugdet": 0.5}, ["'bugdet'", "budget, exclude", "plan"]),
        ({3: 0.5}, ["3", "budget, exclude"]),
    ],
)
def test_a_wrong_option_is_named_with_what_is_valid(options: dict[Any, Any], words: list[str]) -> None:
    with pytest.raises(OptionError) as caught:
        Config.from_options(options)
    assert all(word in str(caught.value) for word in words)
    assert isinstance(caught.value, PixelflyError | ValueError)


def test_a_plan_leaves_nothing_to_decide() -> None:
    ready = Plan((), budget=0.5)
    assert Config.from_options({"plan": ready})[0].plan == ready
    with pytest.raises(OptionError, match="already decides 'budget'"):
        Config.from_options({"plan": ready, "budget": 0.5})


def test_a_plan_can_be_a_path(tmp_path: Path) -> None:
    Plan((), budget=0.5).save(tmp_path / "plan.json")
    config, _ = Config.from_options({"plan": str(tmp_path / "plan.json")})
    assert config.plan == Plan((), budget=0.5)
    with pytest.raises(PlanError, match="cannot read a plan"):
        Config.from_options({"plan": str(tmp_path / "none.json")})


def test_include_and_exclude() -> None:
    config = Config(include=("*.mlp.*", "head"), exclude="*.0.*")  # type: ignore[arg-type]
    assert config.excludes(["h.1.mlp.fc"]) is None
    assert config.excludes(["wte", "head"]) is None
    assert config.excludes(["h.1.attn.q"]) == "not in `include`"
    assert config.excludes(["h.0.mlp.fc"]) == "excluded by '*.0.*'"


def test_names_of_parts_are_no_globs_and_globs_that_match_nothing_are_told() -> None:
    names = ["h.0.fc.weight", "h.1.fc.weight", "w[0:48]", "w"]
    config = Config(
        exclude=("w[0:48]", "w[1, :, 7:9]", "h.[01].*", "h[1].fc.weight", "h.0.fc.wieght", "x*"), include="w"
    )  # type: ignore[arg-type]
    assert config.excludes(["w[0:48]", "w"]) == "excluded by 'w[0:48]'"
    assert config.excludes(["w[48:96]", "w"]) is None
    assert [text.partition(" matches the name of no weight: ")[::2] for text in config.why_unmatched(names)] == [
        ("'h[1].fc.weight'", "did you mean 'h.1.fc.weight'?"),
        ("'h.0.fc.wieght'", "did you mean 'h.0.fc.weight' or 'h.1.fc.weight'?"),
        ("'x*'", "print(plan) lists the names"),
    ]


def test_config_is_a_value() -> None:
    assert hash(Config(exclude=("a",))) == hash(Config(exclude=["a"]))  # type: ignore[arg-type]
    assert Config().replace(budget=0.5) == Config(budget=0.5)


def test_unknown_site_reads_well() -> None:
    assert str(UnknownSiteError("h.0.fc", ["h.0.fc1", "x"])).endswith("did you mean h.0.fc1?")
