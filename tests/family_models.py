"""A small model of each family of transformers, and what to feed it, without downloads.

A configuration is the default with its sizes cut down by the names of its fields, inputs follow from what a model's
forward asks for; where that does not do, `FIELDS` and `INPUTS` say what does.
"""

from __future__ import annotations

import copy
import importlib
import inspect
import itertools
import math
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from zoo import without_dropout

MOST_PARAMETERS = 60_000_000
# Batch norms over few numbers amplify rounding without bounds, and a bias ahead of one has no gradient but rounding:
# with running statistics neither is so.
EVALUATED = (
    "deimv2",
    "levit",
    "mobilenet_v1",
    "mobilenet_v2",
    "mobilevit",
    "mobilevitv2",
    "resnet",
    "swiftformer",
    "textnet",
    "upernet",
    "vitmatte",
)
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
STAGES: tuple[tuple[str, int], ...] = (
    ("(depths|layers|blocks)", 1),
    ("heads", 2),
    ("window_size", 2),
    ("(sizes|dims?|channels)", 64),
)
BACKBONE: dict[str, Any] = {
    "model_type": "resnet",
    "embedding_size": 16,
    "hidden_sizes": [32, 32, 64, 64],
    "depths": [1, 1, 1, 1],
    "out_features": ["stage2", "stage3", "stage4"],
}
# Fields without a default that have to have a value, or no model can be made.
UNSET = {"num_key_value_heads": 2, "head_dim": 32, "vocab_size": 128, "prediction_length": 8}
TEXT = {"input_ids", "attention_mask", "decoder_input_ids"}


def zeros(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.long)


def ones(*shape: int) -> Tensor:
    return torch.ones(shape, dtype=torch.long)


def floats(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def integers(low: int, high: int, *shape: int) -> Tensor:
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(0))


# ---- what the rules do not find ----


EFFICIENTNET = {
    "in_channels": [32, 16],
    "out_channels": [16, 64],
    "kernel_sizes": [3, 3],
    "strides": [1, 2],
    "num_block_repeats": [1, 1],
    "expand_ratios": [1, 6],
    "width_coefficient": 1.0,
    "depth_coefficient": 1.0,
    "hidden_dim": 1280,
}
FIELDS: dict[str, dict[str, Any]] = {
    "align": {"vision_config": EFFICIENTNET},
    "autoformer": {"context_length": 16, "moving_average": 5, "label_length": 4, "num_time_features": 2},
    "bit": {"num_groups": 8},
    "blip-2": {"image_token_index": 99, "num_query_tokens": 4, "qformer_config": {"encoder_hidden_size": 64}},
    "blt": {
        "encoder_hash_byte_group_size": [3],
        "encoder_hash_byte_group_vocab": 128,
        "encoder_config": {"hidden_size_global": 64},
        "decoder_config": {"hidden_size_global": 64},
    },
    "chameleon": {"vocabulary_map": {"<image>": 99}},
    "clap": {"audio_config": {"spec_size": 128, "num_mel_bins": 64, "hidden_size": 512}},
    "csm": {"num_codebooks": 4, "codec_config": {"upsample_groups": 64}},
    "cvt": {"depth": [1, 2, 3]},
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "depth_anything": {
        "backbone_config": {
            "model_type": "dinov2",
            "hidden_size": 64,
            "num_hidden_layers": 4,
            "num_attention_heads": 2,
            "image_size": 64,
            "patch_size": 16,
            "out_indices": [1, 2, 3, 4],
            "reshape_hidden_states": False,
        },
        "patch_size": 16,
    },
    "depth_pro": {
        "patch_size": 32,
        "intermediate_hook_ids": [0, 0],
        **{f"{part}_model_config": {"patch_size": 8, "image_size": 32} for part in ("image", "patch", "fov")},
    },
    "efficientloftr": {
        "out_features": [16, 32, 64],
        "stage_num_blocks": [1, 1, 1],
        "stage_stride": [2, 1, 2],
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0},
    },
    "efficientnet": EFFICIENTNET,
    "esm": {"pad_token_id": 1},
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "layer_types": 2 * ["sliding_attention", "full_attention"],
        "num_kv_shared_layers": 2,
    },
    "gpt_neo": {"num_layers": 2, "attention_types": [[["global", "local"], 1]]},
    "hgnet_v2": {"stem_channels": [3, 32, 64]},
    "instructblip": {"image_token_index": 99, "num_query_tokens": 4, "qformer_config": {"encoder_hidden_size": 64}},
    "kosmos-2": {"latent_query_num": 8},
    "kyutai_speech_to_text": {"num_codebooks": 3, "codec_config": {"upsample_groups": 64}},
    "layoutlmv3": {"coordinate_size": 11, "shape_size": 10, "input_size": 64},
    "led": {"attention_window": 8},
    "lfm2_moe": {"num_hidden_layers": 3, "num_dense_layers": 1, "layer_types": ["conv", "full_attention", "conv"]},
    "lilt": {"hidden_size": 96},
    "longcat_flash": {"n_routed_experts": 4, "zero_expert_num": 2, "moe_topk": 2},
    "lw_detr": {"projector_scale_factors": [1.0]},
    "mamba2": {"num_heads": 4, "n_groups": 1},
    "mimi": {"upsample_groups": 64, "codebook_dim": 64, "vector_quantization_hidden_dimension": 64},
    "molmo2": {"adapter_config": {"vision_feature_layer": [0], "text_hidden_size": 64}},
    "musicgen": {"num_codebooks": 2},
    "musicgen_decoder": {"num_codebooks": 2},
    "musicgen_melody": {"num_codebooks": 2},
    "nemotron_h": {"layers_block_type": ["mamba", "attention", "moe"], "mamba_num_heads": 4, "n_groups": 2},
    "olmo_hybrid": {"num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"]},
    "oneformer": {"decoder_layers": 2},
    "openai_privacy_filter": {"experts_implementation": "grouped_mm"},
    "patchtsmixer": {"d_model": 64},
    "perceiver": {"d_latents": 64, "num_latents": 8, "num_self_attends_per_block": 1},
    "pix2struct": {"vision_config": {"patch_embed_hidden_size": 768}},
    "reformer": {
        "axial_pos_embds_dim": [32, 32],
        "axial_pos_shape": [3, 4],
        "attn_layers": ["local", "lsh"],
        "local_attn_chunk_length": 4,
        "lsh_attn_chunk_length": 4,
        "num_buckets": 2,
        "attention_head_size": 32,
    },
    "rwkv": {"num_hidden_layers": 2},
    "sam": {"vision_config": {"output_channels": 64, "num_pos_feats": 32, "global_attn_indexes": [0]}},
    "sam2": {
        "vision_config": {
            "backbone_config": {
                "model_type": "sam2_hiera_det_model",
                "hidden_size": 32,
                "image_size": [64, 64],
                "embed_dim_per_stage": [32, 64, 128, 256],
                "num_attention_heads": 1,
                "num_attention_heads_per_stage": [1, 2, 4, 8],
                "blocks_per_stage": [1, 1, 2, 1],
                "window_size_per_stage": [4, 4, 4, 4],
                "global_attention_blocks": [3],
                "window_positional_embedding_background_size": [4, 4],
            },
            "backbone_channel_list": [256, 128, 64, 32],
            "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]],
        },
    },
    "seggpt": {
        "image_size": [64, 32],
        "pretrain_image_size": 32,
        "num_hidden_layers": 2,
        "merge_index": 0,
        "intermediate_hidden_state_indices": [1],
    },
    "speech_to_text": {"num_conv_layers": 2, "conv_channels": 64},
    "superglue": {"keypoint_detector_config": {"keypoint_decoder_dim": 65}},
    "superpoint": {"keypoint_decoder_dim": 65},
    "time_series_transformer": {"context_length": 16, "num_time_features": 2},
    "tvp": {
        "max_img_size": 64,
        "visual_prompt_size": 8,
        "num_frames": 2,
        "backbone_config": BACKBONE | {"out_features": ["stage4"]},
    },
    "vibevoice_asr": {
        "acoustic_tokenizer_encoder_config": {"num_filters": 4},
        "semantic_tokenizer_encoder_config": {"num_filters": 4},
    },
    "vitmatte": {
        "backbone_config": {
            "model_type": "vitdet",
            "hidden_size": 64,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_channels": 4,
            "image_size": 64,
            "out_features": ["stage1"],
        },
        "hidden_size": 64,
        "convstream_hidden_sizes": [16, 32, 32],
        "fusion_hidden_sizes": [32, 32, 32, 16],
    },
    "wav2vec2-bert": {"feature_projection_input_dim": 160},
    "xcodec": {"acoustic_model_config": {"downsampling_ratios": [8, 5, 4, 2]}},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 3, "layers_block_type": ["mamba", "hybrid", "hybrid"]},
    "zamba2": {"num_hidden_layers": 2, "layers_block_type": ["mamba", "hybrid"]},
    "zoedepth": {
        "backbone_config": {
            "model_type": "beit",
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 4,
            "num_attention_heads": 2,
            "image_size": 64,
            "out_features": ["stage1", "stage2", "stage3", "stage4"],
            "reshape_hidden_states": False,
        },
        "bottleneck_features": 64,
    },
}
WITH_IMAGE = torch.cat([torch.full((2, 4), 99), integers(3, 30, 2, 8)], 1)
INPUTS: dict[str, dict[str, Any]] = {
    "blip-2": {"input_ids": WITH_IMAGE},
    "clap": {"input_features": floats(2, 1, 200, 64), "is_longer": torch.zeros(2, 1, dtype=torch.bool)},
    "csm": {"input_ids": integers(3, 30, 2, 12, 4)},
    "decision_transformer": {
        "states": floats(2, 5, 17),
        "actions": floats(2, 5, 4),
        "rewards": floats(2, 5, 1),
        "returns_to_go": floats(2, 5, 1),
        "timesteps": integers(0, 5, 2, 5),
        "attention_mask": ones(2, 5),
    },
    "depth_pro": {"pixel_values": floats(1, 3, 128, 128)},
    "efficientloftr": {"pixel_values": floats(1, 2, 3, 64, 64)},
    "idefics": {"pixel_values": floats(2, 1, 3, 64, 64), "image_attention_mask": torch.ones(2, 12, 1)},
    "instructblip": {"input_ids": WITH_IMAGE, "qformer_input_ids": integers(3, 30, 2, 8)},
    "kosmos-2": {"input_ids": integers(3, 30, 2, 12), "image_embeds_position_mask": torch.arange(12).expand(2, 12) < 8},
    "kyutai_speech_to_text": {"input_ids": integers(3, 30, 2, 8, 4)},
    "lxmert": {"visual_feats": floats(2, 5, 64), "visual_pos": floats(2, 5, 4)},
    "molmo2": {"mm_token_type_ids": zeros(2, 12)},
    "oneformer": {"task_inputs": integers(0, 50, 2, 77)},
    "pp_ocrv5_mobile_rec": {"pixel_values": floats(2, 3, 96, 128)},
    "seggpt": {name: floats(2, 3, 32, 32) for name in ("pixel_values", "prompt_pixel_values", "prompt_masks")},
    "speech-encoder-decoder": {"input_values": floats(2, 8000)},
    "superglue": {"pixel_values": floats(1, 2, 3, 64, 64)},
    "timesfm": {"past_values_padding": zeros(2, 512), "freq": zeros(2, 1)},
    "tvp": {"input_ids": integers(3, 30, 1, 12), "pixel_values": floats(1, 2, 3, 64, 64)},
    "vitmatte": {"pixel_values": floats(2, 4, 64, 64)},
}


# ---- small configurations ----


def small_config(kind: Any, given: dict[str, Any], backbone: dict[str, Any] | None = None) -> Any:
    """The configuration of this class with its sizes, and those of its parts, cut down, and with what is given."""
    fields = _fields(kind)
    values = {name: _small(name, value) for name, value in fields.items() if _small(name, value) != value}
    parts = getattr(kind, "sub_configs", None) or {}
    default = kind() if parts else None
    for name in parts:
        part, of_part = getattr(default, name, None), given.get(name, {})
        if name == "backbone_config" and ("model_type" in of_part or (backbone and not of_part)):
            values[name] = of_part or backbone
        elif name in fields and hasattr(part, "model_type"):
            values[name] = small_config(type(part), of_part, backbone).to_dict()
    config = kind(**values | {name: value for name, value in given.items() if name not in parts or name not in values})
    rope = getattr(config, "rope_parameters", None) or {}
    if rope and not any(isinstance(value, dict) for value in rope.values()):
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
    if value is None:
        return UNSET.get(name)
    if isinstance(value, float) and ("drop" in name or name == "mask_time_prob"):
        return 0.0
    if "kernel" in name or name == "patch_sizes":  # of convolutions
        return value
    if isinstance(value, tuple | list) and value and all(type(item) is int for item in value):
        size = _matching(name.removesuffix("_per_stage"), STAGES)
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


def inputs_of(model: Any, given: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """What forward asks for, each input in every form it may have; then text alone; then all that forward knows.

    What is given is part of each.
    """
    forward = inspect.signature(model.forward).parameters
    required = {name for name, parameter in forward.items() if parameter.default is inspect.Parameter.empty}
    main = model.main_input_name  # one, or a list
    asked = required | set([main] if isinstance(main, str) else main)
    asked |= {"pixel_values"} if "vision_config" in vars(model.config) else set()
    if model.config.is_encoder_decoder:
        asked |= {"decoder_input_ids", "future_values", "future_time_features"}
        asked |= {"attention_mask"} if "input_ids" in asked else set()  # without it Dynamo gives up on LongT5
    known = {name: forms for name, forms in _forms(model.config).items() if name in forward and name not in given}
    everything = known.keys() - ({"attention_mask"} if "input_ids" not in known else set())
    for names in (asked & known.keys(), (asked | {"input_ids"}) & TEXT & known.keys(), everything):
        for turn in range(max((len(known[name]) for name in names), default=1)):
            yield {name: known[name][min(turn, len(known[name]) - 1)] for name in names} | given


def _forms(config: Any) -> dict[str, list[Tensor]]:
    """The inputs that are known by name, in the forms that models give to this name."""
    ids = integers(3, 30, 2, 12)
    height, width = _pair(_find(config, ["image_size"], 64))
    channels, frames = _find(config, ["num_channels"], 3), _find(config, ["num_frames"], 4)
    patch = channels * math.prod(_pair(_find(config, ["patch_size"], 16)))
    tubelet = patch * _find(config, ["temporal_patch_size"], 1)
    length = _find(config, ["context_length"], 16) + max(_find(config, ["lags_sequence"], [0]))
    ahead, features = _find(config, ["prediction_length"], 8), _find(config, ["num_time_features"], 1)
    mel = _find(config, ["num_mel_bins", "feature_projection_input_dim", "input_feat_per_channel"], 80)
    positions = 2 * _find(config, ["max_source_positions"], 20)
    video = floats(2, frames, channels, height, width)
    return {
        "input_ids": [ids],
        "attention_mask": [ones(2, 12)],
        "decoder_input_ids": [ids.flip(1)],
        "pixel_values": [floats(2, channels, height, width), video, floats(2, 16, patch), floats(16, tubelet)],
        "pixel_values_videos": [video],
        "pixel_attention_mask": [ones(2, 16)],
        "spatial_shapes": [torch.tensor([[4, 4], [4, 4]])],
        "hidden_states": [floats(16, tubelet)],
        "grid_thw": [torch.tensor([[1, 4, 4]])],
        "flattened_patches": [torch.cat([integers(1, 5, 2, 16, 2), floats(2, 16, patch)], -1)],
        "input_features": [floats(2, mel, 40), floats(2, 40, mel), floats(2, mel, positions)],
        "input_values": [floats(2, 8000), floats(2, 1, 8000), floats(2, _find(config, ["max_length"], 40), mel)],
        "past_values": [floats(2, length), floats(2, length, _find(config, ["num_input_channels"], 1))],
        "past_time_features": [floats(2, length, features)],
        "past_observed_mask": [torch.ones(2, length)],
        "future_values": [floats(2, ahead)],
        "future_time_features": [floats(2, ahead, features)],
        "bbox": [torch.tensor([10, 20, 30, 40]).expand(2, 12, 4)],
    }


def _find(config: Any, names: list[str], default: Any) -> Any:
    """The first field of these names in a configuration or in one of its parts."""
    parts = [config, *(getattr(config, part, None) for part in getattr(config, "sub_configs", None) or {})]
    found = (getattr(part, name, None) for name in names for part in parts)
    return next((value for value in found if value is not None), default)


def _pair(side: Any) -> tuple[int, int]:
    return (side, side) if isinstance(side, int) else tuple(side)


def classes_of(family: str) -> Iterator[Any]:
    """The family's models, the most telling first; for a part of a model, what takes its configuration."""
    import transformers
    from transformers import CONFIG_MAPPING
    from transformers.models.auto import modeling_auto

    mappings = [*(f"MODEL_FOR_{head}_MAPPING_NAMES" for head in HEADS), "MODEL_MAPPING_NAMES"]
    found = [names for mapping in mappings if (names := getattr(modeling_auto, mapping).get(family))]
    for names in found:
        yield from (getattr(transformers, name) for name in ((names,) if isinstance(names, str) else names))
    if not found:
        config = CONFIG_MAPPING[family]
        module = importlib.import_module(config.__module__.replace(".configuration_", ".modeling_"))
        yield from (one for one in reversed(vars(module).values()) if getattr(one, "config_class", None) is config)


def build(family: str) -> tuple[nn.Module, dict[str, Any]]:
    """The first of the family's models that can be built and run; the last error if there is none."""
    from transformers import CONFIG_MAPPING

    error: Exception = LookupError("no model of this name")
    kinds = [(kind, CONFIG_MAPPING[family]) for kind in classes_of(family)]
    kinds += [(kind, kind.config_class) for kind, _ in kinds]  # the head may be of a part of the family's models
    for (kind, of_kind), backbone in itertools.product(kinds, (BACKBONE, None)):
        try:
            config = small_config(of_kind, FIELDS.get(family, {}), backbone)
            with torch.device("meta"):
                parameters = kind(copy.deepcopy(config)).num_parameters()
            if parameters > MOST_PARAMETERS:
                raise ValueError(f"{parameters:,} parameters")
            torch.manual_seed(0)
            model = kind(config)
        except Exception as cause:
            error = cause
            continue
        for given in inputs_of(model, INPUTS.get(family, {})):
            try:
                with torch.no_grad():
                    model(**given)
                return without_dropout(model).train(family not in EVALUATED), given
            except Exception as cause:
                error = cause
    raise error
