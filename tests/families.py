"""Every family of transformers that can be built small, compiled and compared with the oracle, as one table.

    python tests/families.py [--compiled] [--limit SECONDS] [FAMILY ...]

Configurations are the defaults with their sizes cut down, without downloads; a family that cannot be built, or fed, by
these rules is listed as such. The rewritten graphs run node by node, without a C++ compiler, or, a minute each, as
TorchInductor compiles them. Each family has a process of its own, which is stopped when it takes too long. Failures
come first.
"""

from __future__ import annotations

import argparse
import copy
import inspect
import logging
import multiprocessing
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from test_zoo import OPTIONS, assert_equals_the_oracle
from torch import Tensor, nn
from torch._dynamo.utils import counters
from zoo import WeightFlops, without_dropout

from pixelfly_compiler import backend
from pixelfly_compiler.plan import plan

MOST_PARAMETERS = 60_000_000
# Batch norms over few numbers amplify rounding without bounds, and a bias ahead of one has no gradient but rounding:
# with running statistics neither is so.
EVALUATED = ("deimv2", "levit", "mobilenet_v1", "swiftformer")
# The first head that a family has is what is compiled.
HEADS = [
    "CAUSAL_LM",
    "SEQ_TO_SEQ_CAUSAL_LM",
    "SPEECH_SEQ_2_SEQ",
    "CTC",
    "MASKED_LM",
    "OBJECT_DETECTION",
    "UNIVERSAL_SEGMENTATION",
    "SEMANTIC_SEGMENTATION",
    "IMAGE_CLASSIFICATION",
    "DEPTH_ESTIMATION",
    "AUDIO_CLASSIFICATION",
    "VIDEO_CLASSIFICATION",
    "IMAGE_TEXT_TO_TEXT",
]
# End of a field's name -> its size.
SIZES: tuple[tuple[str, int], ...] = (
    ("(key_value|kv|query)_?(heads|groups)", 2),
    ("heads?", 2),
    ("(head_dim|d_kv|kv_channels)", 32),
    ("(rope_head_dim|rotary_dim)", 16),
    ("(layers|n_layers?|num_blocks|depth|num_stages)", 1),
    ("(intermediate_size|ffn_dim|ff_dim|d_ff|d_inner|n_inner|mlp_dim|feedforward|ffn_hidden_size)", 128),
    ("(hidden_size|hidden_dim|d_model|n_embd|embed_dim|embedding_size|projection_dim|embedding_dim|model_dim)", 64),
    ("(lru_width|base_channels|output_dim)", 64),
    ("(^|_)dim", 64),
    ("rank", 32),
    ("experts", 4),
    ("(experts_per_tok|top_?k|n_group|topk_group)", 1),
    ("vocab_size.*", 128),
    ("(image_size|img_size|input_size)", 64),
    ("patch_size", 16),
    ("window_size", 2),
    ("(position_embeddings|n_positions|max_seq_len|seq_length|(source|target)_positions|sequence_length)", 64),
    ("mel_bins", 16),
    ("(queries|query_tokens)", 8),
    ("mask_time_length", 2),
)
# The same for fields that hold one number for each stage.
STAGES: tuple[tuple[str, int], ...] = (("(depths|layers|blocks)", 1), ("heads", 2), ("(sizes|dims?|channels)", 64))
BACKBONE: dict[str, Any] = {
    "model_type": "resnet",
    "embedding_size": 16,
    "hidden_sizes": [32, 32, 64, 64],
    "depths": [1, 1, 1, 1],
    "out_features": ["stage2", "stage3", "stage4"],
}


# ---- small configurations ----


def small_config(kind: Any) -> Any:
    """The configuration of this class with its sizes, and those of its parts, cut down."""
    fields = _fields(kind)
    values = {name: _small(name, value) for name, value in fields.items() if _small(name, value) != value}
    parts = getattr(kind, "sub_configs", None) or {}
    default = kind() if parts else None
    for name in parts:
        part = getattr(default, name, None)
        if name == "backbone_config":
            values[name] = BACKBONE
        elif name in fields and hasattr(part, "model_type"):
            values[name] = small_config(type(part)).to_dict()
    config = kind(**values)
    if isinstance(getattr(config, "rope_parameters", None), dict):
        config.rope_parameters |= {"mrope_section": [4, 6, 6]}  # defaults are for a head_dim of 128
    return config


def _fields(kind: Any) -> dict[str, Any]:
    """The fields of a configuration and their defaults, without those that all have."""
    found: dict[str, Any] = {}
    for parent in kind.__mro__:
        if parent.__name__ in ("PretrainedConfig", "PreTrainedConfig"):
            break
        for name, parameter in inspect.signature(parent.__init__).parameters.items():
            if parameter.default is not inspect.Parameter.empty:
                found.setdefault(name, parameter.default)
    return found


def _small(name: str, value: Any) -> Any:
    if name in ("use_cache", "use_timm_backbone"):
        return False
    if isinstance(value, float) and ("drop" in name or name == "mask_time_prob"):
        return 0.0
    if isinstance(value, tuple | list) and value and all(type(item) is int for item in value):
        size = _matching(name, STAGES)
        return value if size is None else type(value)([size] * len(value))
    if type(value) is not int or value < 2:
        return value
    if name.endswith(("token_id", "token_index")):
        return value if value < 128 else 120
    size = _matching(name, SIZES)
    return value if size is None else min(size, value)


def _matching(name: str, rules: tuple[tuple[str, int], ...]) -> int | None:
    return next((size for pattern, size in rules if re.search(f"{pattern}$", name)), None)


# ---- models and inputs ----


def inputs_of(model: Any) -> Iterator[dict[str, Tensor]]:
    """What the model's forward asks for, as far as its configuration tells how large; then, if it can, text alone."""
    generator = torch.Generator().manual_seed(0)
    config, forward = model.config, inspect.signature(model.forward).parameters
    ids = torch.randint(3, 90, (2, 12), generator=generator)
    side = _find(config, "image_size", 64)
    height, width = (side, side) if isinstance(side, int) else side
    frames = _find(config, "num_frames", 4)
    shapes = {
        "pixel_values": (2, 3, height, width),
        "pixel_values_videos": (2, frames, 3, height, width),
        "input_features": (2, _find(config, "num_mel_bins", 80), 40),
        "input_values": (2, 8000),
    }
    asked = [name for name, given in forward.items() if given.default is inspect.Parameter.empty]
    asked += [model.main_input_name, *(["pixel_values"] if "vision_config" in vars(config) else [])]
    given = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items() if name in asked}
    given |= {"input_ids": ids} if "input_ids" in asked else {}
    if config.is_encoder_decoder and "decoder_input_ids" in forward:
        given["decoder_input_ids"] = ids.flip(1)
    if "input_ids" in given and config.is_encoder_decoder:  # without it Dynamo gives up on LongT5
        given["attention_mask"] = torch.ones_like(ids)
    given = {name: value for name, value in given.items() if name in forward}
    yield given
    text = {name: value for name, value in given.items() if not value.is_floating_point()}
    if "input_ids" in forward and text != given:
        yield {"input_ids": ids} | text


def _find(config: Any, name: str, default: Any) -> Any:
    """The field of this name in a configuration or in one of its parts."""
    parts = [config, *(getattr(config, part, None) for part in getattr(config, "sub_configs", None) or {})]
    return next((value for part in parts if (value := getattr(part, name, None)) is not None), default)


def classes_of(family: str) -> Iterator[Any]:
    """The family's models, the most telling first."""
    import transformers
    from transformers.models.auto import modeling_auto

    for mapping in (*(f"MODEL_FOR_{head}_MAPPING_NAMES" for head in HEADS), "MODEL_MAPPING_NAMES"):
        names = getattr(modeling_auto, mapping).get(family, ())
        yield from (getattr(transformers, name) for name in ((names,) if isinstance(names, str) else names))


def build(family: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """The first of the family's models that can be built and run; the last error if there is none."""
    from transformers import CONFIG_MAPPING

    error: Exception = LookupError("no model of this name")
    for kind in classes_of(family):
        try:
            config = small_config(CONFIG_MAPPING[family])
            with torch.device("meta"):
                parameters = kind(copy.deepcopy(config)).num_parameters()
            if parameters > MOST_PARAMETERS:
                raise ValueError(f"{parameters:,} parameters")
            torch.manual_seed(0)
            model = kind(config)
        except Exception as cause:
            error = cause
            continue
        for given in inputs_of(model):
            try:
                with torch.no_grad():
                    model(**given)
                return without_dropout(model).train(family not in EVALUATED), given
            except Exception as cause:
                error = cause
    raise error


# ---- the table ----


@dataclass(frozen=True)
class Row:
    """What became of a family: `rank` sorts the table, `covered` is the sites' share of the flops of weights."""

    rank: int
    family: str
    model: str
    covered: str
    outcome: str


def check(family: str, compiled: bool = False) -> Row:
    torch._dynamo.reset()
    try:
        model, given = build(family)
    except Exception as cause:
        return Row(3, family, "", "", f"not built: {_first_line(cause)}")
    name = type(model).__name__
    try:
        return _compare(family, model, given, compiled)
    except Exception as cause:
        return Row(0, family, name, "", f"FAILED: {_first_line(cause)}")


def check_apart(family: str, compiled: bool, limit: float) -> Row:
    """The same in a process of its own: what crashes, hangs or eats up the memory does so there."""
    fork = multiprocessing.get_context("fork")  # transformers is imported once
    receiver, sender = fork.Pipe(duplex=False)
    child = fork.Process(target=lambda: sender.send(check(family, compiled)))
    child.start()
    sender.close()
    try:
        return receiver.recv() if receiver.poll(limit) else Row(0, family, "", "", f"FAILED: not done in {limit:.0f} s")
    except EOFError:
        return Row(0, family, "", "", "FAILED: its process died")
    finally:
        child.kill()
        child.join()


def _compare(family: str, model: nn.Module, given: dict[str, Tensor], compiled: bool) -> Row:
    made = plan(model, (), given, **OPTIONS)
    with torch.no_grad(), WeightFlops(model) as counter:
        model(**given)
    graphs = _graphs(model, given)
    torch._dynamo.reset()
    counters.clear()
    options = OPTIONS if graphs == 1 else {"plan": made}  # or the budget would be split over each graph by itself
    with nullcontext() if compiled else patch.object(backend, "inductor", lambda gm, inputs, patches: gm.forward):
        assert_equals_the_oracle(model, given, made, **options)
    found = sum(entry.dense_flops for entry in made if entry.is_site)
    notes = [f"{made.dense_flops:,} flops planned, {counter.weight:,} counted"] * (made.dense_flops != counter.weight)
    if counters["stats"]["unique_graphs"] != graphs:
        notes.append(f"{counters['stats']['unique_graphs']} graphs, {graphs} without us")
    notes += [f"{entry.name} dense: {entry.reason}" for entry in made if entry.is_site and not entry.config]
    covered = f"{found / max(counter.weight, 1):.1%}"
    return Row(1 if notes else 2, family, type(model).__name__, covered, "; ".join(notes) or "equal")


def _graphs(model: nn.Module, given: dict[str, Tensor]) -> int:
    """How many graphs Dynamo makes of a step."""
    torch._dynamo.reset()
    counters.clear()
    torch.compile(copy.deepcopy(model), backend="eager")(**given)
    return int(counters["stats"]["unique_graphs"])


def _first_line(cause: Exception) -> str:
    return f"{type(cause).__name__}: {cause}".strip().splitlines()[0][:160]


def main(argv: Sequence[str]) -> None:
    """Check these families, or all, and print the table."""
    from transformers import CONFIG_MAPPING

    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("families", nargs="*", metavar="FAMILY")
    flags.add_argument("--compiled", action="store_true", help="by TorchInductor")
    flags.add_argument("--limit", type=float, default=600, metavar="SECONDS", help="for a family (default: 600)")
    args = flags.parse_args(argv)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    families = args.families or sorted(CONFIG_MAPPING.keys())
    rows = [check_apart(family, args.compiled, args.limit) for family in track(families)]
    table = Table("family", "model", "covered", "outcome", box=None)
    for row in sorted(rows, key=lambda row: (row.rank, row.family)):
        table.add_row(row.family, row.model, row.covered, row.outcome)
    Console().print(table)
    print(f"{sum(row.rank == 0 for row in rows)} failed, {sum(row.rank in (1, 2) for row in rows)} equal to the oracle")


if __name__ == "__main__":
    main(sys.argv[1:])
