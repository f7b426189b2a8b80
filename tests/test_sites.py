"""Which matmuls are found in Dynamo's graph, under which names, in which roles; and which are not, and why."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import GraphModule
from torch.utils.checkpoint import checkpoint

from pixelfly_compiler.passes.sites import Found, find_sites, ineligible, qualified_name


def found_in(
    model: nn.Module | Callable[..., Any], *args: Any, dynamic: bool | None = None, **kwargs: Any
) -> list[Found]:
    """What is found in each graph of one call under Dynamo."""
    found: list[Found] = []

    def backend(gm: GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        found.append(find_sites(gm, inputs))
        return gm.forward

    torch._dynamo.reset()
    torch.compile(model, backend=backend, dynamic=dynamic)(*args, **kwargs)
    return found


class OneWeight(nn.Module):
    """A weight and a function of it and the input."""

    def __init__(self, function: Callable[..., torch.Tensor], *shape: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(*shape))
        self.bias = nn.Parameter(torch.randn(48))
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x, self.w, self.bias)


X = torch.randn(2, 5, 32)
FORMS: dict[str, tuple[Callable[..., torch.Tensor], tuple[int, int], bool]] = {
    "linear": (lambda x, w, b: F.linear(x, w, b), (48, 32), False),
    "linear keywords": (lambda x, w, b: F.linear(input=x, weight=w, bias=b), (48, 32), False),
    "linear of a transpose": (lambda x, w, b: F.linear(x, w.t(), b), (32, 48), True),
    "addmm": (lambda x, w, b: torch.addmm(b, x.view(-1, 32), w), (32, 48), True),
    "addmm method": (lambda x, w, b: b.addmm(x.view(-1, 32), w), (32, 48), True),
    "addmm transposed": (lambda x, w, b: torch.addmm(b, x.view(-1, 32), w.T), (48, 32), False),
    "mm": (lambda x, w, b: torch.mm(x.view(-1, 32), w), (32, 48), True),
    "mm method": (lambda x, w, b: x.view(-1, 32).mm(w.transpose(0, 1)), (48, 32), False),
    "matmul": (lambda x, w, b: torch.matmul(x, w), (32, 48), True),
    "matmul keywords": (lambda x, w, b: torch.matmul(x, other=w), (32, 48), True),
    "matmul method": (lambda x, w, b: x.matmul(w.mT), (48, 32), False),
    "@": (lambda x, w, b: x @ w.permute(1, 0), (48, 32), False),
    "@ twice transposed": (lambda x, w, b: x @ w.t().contiguous().T, (32, 48), True),
    "left": (lambda x, w, b: w @ x.mT, (48, 32), False),
    "left of a vector": (lambda x, w, b: w @ x[0, 0], (48, 32), False),
    "left transposed": (lambda x, w, b: torch.matmul(w.T, x.mT), (32, 48), True),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_matmul_is_found_and_means_what_the_match_says(form: str) -> None:
    function, shape, transposed = FORMS[form]
    model = OneWeight(function, *shape)
    (found,) = found_in(model, X)
    (site,), (match,) = found.sites, found.matches
    assert (site.name, site.out_features, site.in_features, site.transposed) == ("w", 48, 32, transposed)
    assert site.rows == (1 if form == "left of a vector" else 10)
    assert site.reason is None
    assert match.transposed == transposed
    assert match.left == form.startswith("left")
    assert (match.bias is not None) == ("linear" in form or "addmm" in form)


def test_the_match_recomputes_the_node() -> None:
    for function, shape, _ in FORMS.values():
        model = OneWeight(function, *shape)
        seen: dict[str, Any] = {}

        def backend(gm: GraphModule, inputs: list[Any], seen: dict[str, Any] = seen) -> Callable[..., Any]:
            (match,) = find_sites(gm, inputs).matches
            gm.graph.output_node().args = ((match.node, match.x, match.weight, match.bias),)
            gm.recompile()
            seen["match"] = match

            def run(*args: Any) -> Any:
                seen["values"] = gm(*args)
                return (seen["values"][0],)

            return run

        torch._dynamo.reset()
        torch.compile(model, backend=backend)(X)
        match, (result, x, weight, bias) = seen["match"], seen["values"]
        weight = weight.t() if match.transposed else weight
        expected = torch.matmul(weight, x) if match.left else F.linear(x, weight, bias)
        torch.testing.assert_close(result, expected)


def test_addmm_with_a_matrix_has_an_addend_and_scaled_addmm_is_left_alone() -> None:
    model = OneWeight(lambda x, w, b: torch.addmm(x.new_ones(10, 48), x.view(-1, 32), w), 32, 48)
    (match,) = found_in(model, X)[0].matches
    assert match.bias is None
    assert match.addend is not None
    scaled = OneWeight(lambda x, w, b: torch.addmm(b, x.view(-1, 32), w, beta=0.5), 32, 48)
    assert "addmm" in found_in(scaled, X)[0].skipped[0].reason


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda x, w, b: x @ w[:, :16], "`getitem`"),
        (lambda x, w, b: torch.einsum("bsd,df->bsf", x, w), "`einsum`"),
        (lambda x, w, b: x @ (w * 2), "`mul`"),
    ],
)
def test_other_uses_are_passed_over_with_the_reason(function: Callable[..., Any], reason: str) -> None:
    (found,) = found_in(OneWeight(function, 32, 48), X)
    assert found.sites == ()
    assert reason in found.skipped[0].reason


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda x, w, b: x @ w + w.sum(), "also used by `sum`"),
        (lambda x, w, b: (x @ w) @ w.T, "both orientations"),
    ],
)
def test_a_matmul_that_must_stay_dense_is_a_site_with_a_reason(function: Callable[..., Any], reason: str) -> None:
    (found,) = found_in(OneWeight(function, 32, 48), X)
    assert found.matches == ()
    assert reason in str(found.sites[0].reason)
    assert found.sites[0].rows > 0


def test_a_weight_times_itself_is_no_site() -> None:
    (found,) = found_in(OneWeight(lambda x, w, b: x @ torch.matmul(w, w.T), 32, 48), X)
    assert found.sites == ()


def test_one_weight_used_twice_is_one_site_with_the_rows_of_both() -> None:
    (found,) = found_in(OneWeight(lambda x, w, b: x @ w + torch.relu(x[:, :1]) @ w, 32, 48), X)
    (site,) = found.sites
    assert (site.uses, site.rows, len(found.matches)) == (2, 12, 2)


def test_a_tied_head_is_a_site_and_its_lookup_is_not() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.emb = nn.Embedding(64, 32)
            self.pos = nn.Embedding(8, 32)
            self.head = nn.Linear(32, 64, bias=False)
            self.head.weight = self.emb.weight

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.head(self.emb(ids) + self.pos(ids % 8))

    (found,) = found_in(Tied(), torch.arange(6))
    assert [(site.name, site.shared, site.reason) for site in found.sites] == [("emb.weight", True, None)]
    assert found.sites[0].aliases == ("head.weight",)
    assert [(item.name, item.lookup) for item in found.skipped] == [("pos.weight", True)]


def test_dynamic_rows_are_an_expression_with_a_hint() -> None:
    (found,) = found_in(nn.Linear(32, 48), X, dynamic=True)
    (site,) = found.sites
    assert site.rows == 10
    assert not site.rows_expr.isdigit()


def test_autocast_decides_the_dtype() -> None:
    linear = nn.Linear(32, 48)

    def under_autocast(x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return linear(x)

    assert found_in(under_autocast, X)[0].sites[0].dtype == "bfloat16"


def test_sites_inside_activation_checkpoints() -> None:
    inner = nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 32))

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = inner
            self.w = nn.Parameter(torch.randn(32, 48))

        def block(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x) + (x @ self.w) @ self.w.new_ones(48, 32)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return checkpoint(self.block, x, use_reentrant=False)

    (found,) = found_in(Model(), X)
    assert {site.name for site in found.sites} >= {"inner.0.weight", "inner.2.weight"}
    for match in found.matches:
        assert match.weight.graph is match.node.graph is match.module.graph


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_what_no_weight_may_be() -> None:
    assert ineligible(torch.zeros(4, 4)) is None
    assert ineligible(nn.Parameter(torch.zeros(4, 4, dtype=torch.bfloat16))) is None
    assert "complex" in str(ineligible(torch.zeros(4, 4, dtype=torch.complex64)))
    assert "int8" in str(ineligible(torch.zeros(4, 4, dtype=torch.int8)))
    assert "float8" in str(ineligible(torch.zeros(4, 4, dtype=torch.float8_e4m3fn)))
    assert "empty" in str(ineligible(torch.zeros(0, 4)))
    assert "quantised" in str(ineligible(torch.quantize_per_tensor(torch.zeros(4, 4), 1.0, 0, torch.qint8)))

    class Subclass(torch.Tensor):
        pass

    assert "subclass" in str(ineligible(torch.zeros(4, 4).as_subclass(Subclass)))


@pytest.mark.parametrize("weight", [torch.zeros(32, 48, dtype=torch.complex64), torch.zeros(32, 0)])
def test_a_model_with_an_ineligible_weight_says_so(weight: torch.Tensor) -> None:
    model = OneWeight(lambda x, w, b: x.to(w.dtype) @ w, 1, 1)
    model.w = nn.Parameter(weight)
    (found,) = found_in(model, X)
    assert found.matches == ()
    assert found.sites[0].reason is not None


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("L['self']._modules['h']._modules['0']._modules['attn']._parameters['weight']", "h.0.attn.weight"),
        ("L['self'].lin.weight", "lin.weight"),
        ("L['self'].layers[3].weight", "layers.3.weight"),
        ("L['self']._modules['_orig_mod']._modules['lin']._parameters['weight']", "lin.weight"),
        ("G['model']._modules['lin'].weight", "lin.weight"),
        ("L['fn'].__closure__[0].cell_contents._modules['lin']._parameters['weight']", "lin.weight"),
        ("L['w']", "w"),
    ],
)
def test_names_from_sources(source: str, name: str) -> None:
    assert qualified_name(source)[1] == name


def test_two_roots_keep_their_names_apart() -> None:
    def both(a: nn.Module, b: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return a(x) + b(x)

    (found,) = found_in(both, nn.Linear(32, 48), nn.Linear(32, 48), X)
    assert [site.name for site in found.sites] == ["a.weight", "b.weight"]


# ---- roles ----


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(32), nn.LayerNorm(32)
        self.q, self.k, self.v, self.o = (nn.Linear(32, 32) for _ in range(4))
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm1(x)
        q, k, v = (f(y).unflatten(-1, (2, 16)).transpose(1, 2) for f in (self.q, self.k, self.v))
        x = x + self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Transformer(nn.Module):
    def __init__(self, layers: int = 3) -> None:
        super().__init__()
        self.emb = nn.Embedding(40, 32)
        self.layers = nn.ModuleList(Block() for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(32), nn.Linear(32, 40)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.emb(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


def test_repeated_layers_share_roles_also_the_first_and_the_last() -> None:
    (found,) = found_in(Transformer(), torch.arange(10).view(2, 5))
    members: dict[str, list[str]] = {}
    for site in found.sites:
        members.setdefault(site.role, []).append(site.name)
    assert sorted(len(names) for names in members.values()) == [1, 3, 3, 3, 3, 3, 3]


def test_structure_tells_apart_what_names_do_not() -> None:
    model = nn.Sequential(nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32))
    (found,) = found_in(model, X)
    assert len({site.role for site in found.sites}) == 3


# ---- real models ----


def gpt2() -> tuple[nn.Module, dict[str, Any], set[str]]:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_layer=2, n_embd=32, n_head=2, vocab_size=60, n_positions=16, bos_token_id=0, eos_token_id=0)
    names = {f"transformer.h.*.{part}.weight" for part in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")}
    return GPT2LMHeadModel(config), {"input_ids": torch.arange(8)[None]}, names | {"transformer.wte.weight"}


def bert() -> tuple[nn.Module, dict[str, Any], set[str]]:
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=60)
    parts = ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense")
    names = {f"bert.encoder.layer.*.{part}.weight" for part in (*parts, "intermediate.dense", "output.dense")}
    head = {"cls.predictions.transform.dense.weight", "bert.embeddings.word_embeddings.weight"}
    return BertForMaskedLM(config), {"input_ids": torch.arange(8)[None]}, names | head


def llama() -> tuple[nn.Module, dict[str, Any], set[str]]:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=60
    )
    parts = [*(f"self_attn.{p}_proj" for p in "qkvo"), *(f"mlp.{p}_proj" for p in ("gate", "up", "down"))]
    names = {f"model.layers.*.{part}.weight" for part in parts} | {"lm_head.weight"}
    return LlamaForCausalLM(config), {"input_ids": torch.arange(8)[None]}, names


def vit() -> tuple[nn.Module, dict[str, Any], set[str]]:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        image_size=16,
        patch_size=8,
        num_labels=10,  # type: ignore[call-arg]
    )
    return ViTForImageClassification(config), {"pixel_values": torch.randn(1, 3, 16, 16)}, set()


def t5() -> tuple[nn.Module, dict[str, Any], set[str]]:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(d_model=32, d_ff=64, d_kv=16, num_layers=2, num_heads=2, vocab_size=60)
    config.decoder_start_token_id = 0
    ids = torch.arange(8)[None]
    return T5ForConditionalGeneration(config), {"input_ids": ids, "labels": ids}, set()


@pytest.mark.parametrize(("build", "sites"), [(gpt2, 9), (bert, 14), (llama, 15), (vit, 13), (t5, 33)])
def test_real_models(build: Callable[[], tuple[nn.Module, dict[str, Any], set[str]]], sites: int) -> None:
    model, kwargs, names = build()
    (found,) = found_in(model.eval(), **kwargs)
    assert len(found.sites) == sites
    assert all(site.reason is None for site in found.sites)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    assert all(tuple(parameters[site.name].shape) == site.weight_shape for site in found.sites)
    folded = {site.role.partition("#")[0] for site in found.sites}
    assert not names or folded == names
    assert len({site.role for site in found.sites}) <= 2 * len(folded)
