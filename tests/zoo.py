"""Small models of many families, built without downloads, and an independent count of the flops of their weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

WIDTH = 64
Built = tuple[nn.Module, dict[str, Tensor]]


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _ids(batch: int = 2) -> Tensor:
    return torch.randint(3, 90, (batch, 8), generator=_generator())


def _randn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=_generator())


_SIZES: dict[str, Any] = {
    "hidden_size": WIDTH,
    "intermediate_size": 2 * WIDTH,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
_TEXT: dict[str, Any] = {**_SIZES, "vocab_size": 96, "max_position_embeddings": 32}
_IMAGE: dict[str, Any] = {**_SIZES, "image_size": 32, "patch_size": 8}
_NO_DROPOUT: dict[str, Any] = {"dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0}


def gpt2(batch: int) -> Built:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_embd=WIDTH, n_layer=2, n_head=2, vocab_size=96, n_positions=32, use_cache=False)
    return GPT2LMHeadModel(config), {"input_ids": _ids(batch)}


def llama(batch: int) -> Built:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**_TEXT, num_key_value_heads=1, use_cache=False)), {"input_ids": _ids(batch)}


def mixtral(batch: int) -> Built:
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(**_TEXT, num_key_value_heads=1, num_local_experts=4, num_experts_per_tok=2, use_cache=False)
    return MixtralForCausalLM(config), {"input_ids": _ids(batch)}


def mixtral_batched(batch: int) -> Built:
    """The weights of the experts gathered for each row."""
    model, inputs = mixtral(batch)
    model.set_experts_implementation("batched_mm")
    return model, inputs


def gpt_oss(batch: int) -> Built:
    from transformers import GptOssConfig, GptOssForCausalLM

    config = GptOssConfig(
        **_TEXT, num_key_value_heads=1, head_dim=32, num_local_experts=4, num_experts_per_tok=2, use_cache=False
    )
    return GptOssForCausalLM(config), {"input_ids": _ids(batch)}


def bert(batch: int) -> Built:
    from transformers import BertConfig, BertForMaskedLM

    return BertForMaskedLM(BertConfig(**_TEXT)), {"input_ids": _ids(batch)}


def electra(batch: int) -> Built:
    from transformers import ElectraConfig, ElectraModel

    return ElectraModel(ElectraConfig(**_TEXT, embedding_size=32)), {"input_ids": _ids(batch)}


def xlnet(batch: int) -> Built:
    from transformers import XLNetConfig, XLNetLMHeadModel

    config = XLNetConfig(d_model=WIDTH, d_inner=2 * WIDTH, n_layer=1, n_head=2, vocab_size=96, use_mems_train=False)
    return XLNetLMHeadModel(config), {"input_ids": _ids(batch)}


def t5(batch: int) -> Built:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(d_model=WIDTH, d_ff=128, d_kv=32, num_heads=2, num_layers=1, vocab_size=96, use_cache=False)
    return T5ForConditionalGeneration(config), {"input_ids": _ids(batch), "decoder_input_ids": _ids(batch).flip(1)}


def whisper(batch: int) -> Built:
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    config = WhisperConfig(
        **_NO_DROPOUT,
        d_model=WIDTH,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=2 * WIDTH,
        decoder_ffn_dim=2 * WIDTH,
        vocab_size=96,
        num_mel_bins=16,
        max_source_positions=20,
        max_target_positions=16,
        pad_token_id=0,
        use_cache=False,
    )
    model = WhisperForConditionalGeneration(config)
    return model, {"input_features": _randn(batch, 16, 40), "decoder_input_ids": _ids(batch)}


def vit(batch: int) -> Built:
    from transformers import ViTConfig, ViTModel

    return ViTModel(ViTConfig(**_IMAGE)), {"pixel_values": _randn(batch, 3, 32, 32)}


def siglip(batch: int) -> Built:
    from transformers import SiglipVisionConfig, SiglipVisionModel

    return SiglipVisionModel(SiglipVisionConfig(**_IMAGE)), {"pixel_values": _randn(batch, 3, 32, 32)}


def clip(batch: int) -> Built:
    from transformers import CLIPConfig, CLIPModel

    config = CLIPConfig(text_config={**_TEXT, "eos_token_id": 2}, vision_config=_IMAGE, projection_dim=32)
    return CLIPModel(config), {"input_ids": _ids(batch), "pixel_values": _randn(batch, 3, 32, 32)}


class _Mlp(nn.Sequential):
    def __init__(self, width: int) -> None:
        super().__init__(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))


class MixerBlock(nn.Module):
    """MLP-Mixer: across patches, then across channels."""

    def __init__(self, patches: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.tokens, self.channels = _Mlp(patches), _Mlp(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.tokens(self.norm1(x).mT).mT
        return x + self.channels(self.norm2(x))


def mixer(batch: int) -> Built:
    return nn.Sequential(MixerBlock(32), MixerBlock(32)), {"input": _randn(batch, 32, WIDTH)}


class ConvNextBlock(nn.Module):
    """A depthwise convolution, then an MLP written as 1 x 1 convolutions."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.depthwise, self.norm = nn.Conv2d(width, width, 7, padding=3, groups=width), nn.GroupNorm(1, width)
        self.up, self.down = nn.Conv2d(width, 4 * width, 1), nn.Conv2d(4 * width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(self.depthwise(x)))))


def convnext(batch: int) -> Built:
    model = nn.Sequential(
        nn.Conv2d(3, WIDTH, 4, 4), ConvNextBlock(WIDTH), nn.Conv2d(WIDTH, 2 * WIDTH, 2, 2), ConvNextBlock(2 * WIDTH)
    )
    return model, {"input": _randn(batch, 3, 34, 32)}


class DiTBlock(nn.Module):
    """A block of a diffusion transformer: the time step scales and shifts what attention and MLP see."""

    def __init__(self) -> None:
        super().__init__()
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(WIDTH, 6 * WIDTH))
        self.norm1, self.norm2 = (nn.LayerNorm(WIDTH, elementwise_affine=False) for _ in range(2))
        self.attention, self.mlp = nn.MultiheadAttention(WIDTH, 2, batch_first=True), _Mlp(WIDTH)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(time)[:, None].chunk(6, -1)
        y = self.norm1(x) * (1 + scale1) + shift1
        x = x + gate1 * self.attention(y, y, y, need_weights=False)[0]
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


def dit(batch: int) -> Built:
    return DiTBlock(), {"x": _randn(batch, 16, WIDTH), "time": _randn(batch, WIDTH)}


class Recommender(nn.Module):
    """Embeddings of categories beside numbers, an MLP for each, interactions, one score."""

    def __init__(self) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.EmbeddingBag(50, 32, mode="sum") for _ in range(3))
        self.numbers = nn.Sequential(nn.Linear(40, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU())
        self.top = nn.Sequential(nn.Linear(38, 64), nn.ReLU(), nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 1))

    def forward(self, numbers: Tensor, categories: Tensor) -> Tensor:
        found = [table(categories[:, i]) for i, table in enumerate(self.tables)]
        rows = torch.stack([self.numbers(numbers), *found], 1)
        i, j = torch.triu_indices(4, 4, 1)
        pairs = torch.bmm(rows, rows.mT)[:, i, j]
        return self.top(torch.cat([rows[:, 0], pairs], -1))


def recommender(batch: int) -> Built:
    categories = torch.randint(50, (4 * batch, 3, 5), generator=_generator())
    return Recommender(), {"numbers": _randn(4 * batch, 40), "categories": categories}


def transformer(batch: int) -> Built:
    model = nn.Transformer(WIDTH, 2, 1, 1, 2 * WIDTH, dropout=0.0, batch_first=True)
    return model, {"src": _randn(batch, 5, WIDTH), "tgt": _randn(batch, 7, WIDTH)}


class Recurrent(nn.Module):
    """Two kinds of cells, one after the other in time, and a factored head."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.lstm, self.gru = nn.Embedding(96, WIDTH), nn.LSTMCell(WIDTH, WIDTH), nn.GRUCell(WIDTH, WIDTH)
        self.thin, self.wide = (nn.Parameter(torch.randn(size) / 8) for size in ((WIDTH, 32), (32, 96)))

    def forward(self, input_ids: Tensor) -> Tensor:
        state, second, outputs = None, None, []
        for x in self.table(input_ids).unbind(1):
            state = self.lstm(x, state)
            second = self.gru(state[0], second)
            outputs.append(second)
        return torch.einsum("bti,ij,jk->btk", torch.stack(outputs, 1), self.thin, self.wide)


def recurrent(batch: int) -> Built:
    return Recurrent(), {"input_ids": _ids(batch)}


# What a model's sites must cover of the flops that its weights cost.
ZOO: dict[str, tuple[Callable[[int], Built], float]] = {
    "GPT-2": (gpt2, 1.0),
    "Llama": (llama, 1.0),
    "Mixtral": (mixtral, 1.0),
    "Mixtral, batched": (mixtral_batched, 1.0),
    "GPT-OSS": (gpt_oss, 1.0),  # experts stored (in, out), with biases
    "BERT": (bert, 1.0),
    "ELECTRA": (electra, 1.0),
    "XLNet": (xlnet, 1.0),
    "T5": (t5, 1.0),
    "Whisper": (whisper, 0.73),  # two convolutions of width 3
    "ViT": (vit, 1.0),
    "SigLIP": (siglip, 0.99),  # a parameter as the query of attention
    "CLIP": (clip, 1.0),
    "MLP-Mixer": (mixer, 1.0),
    "ConvNeXt": (convnext, 0.9),  # depthwise convolutions
    "DiT": (dit, 1.0),
    "recommender": (recommender, 1.0),
    "nn.Transformer": (transformer, 1.0),
    "recurrent cells": (recurrent, 1.0),
}


def without_dropout(model: nn.Module) -> nn.Module:
    """In training mode, and all the same every time."""
    for module in model.modules():
        for name, value in vars(module).items():
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model.train()


class WeightFlops(TorchDispatchMode):
    """Counts, below autograd, the flops of matmuls and convolutions with a weight: `weight` is their sum.

    An operand is a weight if it shares memory with a parameter, or was computed from such operands alone; vectors, and
    what is computed from vectors alone, are not counted.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.weight = 0
        self._memory = {p.untyped_storage().data_ptr(): p.dim() > 1 for p in model.parameters()}  # -> does it count
        self._alive: list[Tensor] = []  # so that no memory is used twice

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        given = [
            self._memory.get(x.untyped_storage().data_ptr())
            for x in tree_leaves((args, kwargs))
            if isinstance(x, Tensor)
        ]
        made = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        self._alive += made
        packet = func._overloadpacket
        if packet in flop_registry:
            first = 1 if packet in (torch.ops.aten.addmm, torch.ops.aten.baddbmm) else 0
            if any(given[first : first + 2]):
                self.weight += flop_registry[packet](*args, **kwargs, out_val=result)
        if str(packet).startswith(("aten._grouped_mm", "transformers.grouped_mm")):  # torch does not count these
            self.weight += 2 * result.numel() * args[0].shape[-1]
        # Matrices that an index picks from a weight are weights, rows of a table are not.
        if given and (None not in given or (packet is torch.ops.aten.index and given[0] and args[0].dim() > 2)):
            self._memory |= {x.untyped_storage().data_ptr(): any(given) for x in made}
        return result
