"""Models of many kinds: every known family end to end, unlisted ones found by shape, other precisions, packed weights and uneven layers."""
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn.functional import linear, scaled_dot_product_attention
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel

from families import TINY, VOCABULARY, holds, pairs, short_search, tiny
from mgprune import load_model
from mgprune.circuit import Circuit, from_kept
from mgprune.masks import LEVELS, level_shapes, n_nodes, site_masks
from mgprune.models import InputError, fingerprint
from mgprune.sites import FAMILIES, find_sites
from mgprune.streams import circuit_logits, differences, nbytes, record, recording_bytes, verify

kinds = pytest.mark.parametrize("kind", TINY)
DENSE = [kind for kind in TINY if not FAMILIES[kind].experts]


def test_every_family_is_tried():
    assert {*FAMILIES} == {*TINY}


@kinds
def test_discover(kind, tmp_path):
    model = tiny(kind)
    circuit = short_search(model)
    total = sum(n_nodes(circuit.sites)[l] for l in ("attention_neuron", "mlp_neuron"))
    assert 0 < circuit.n_neurons() <= round(.3 * total)  # neurons of experts that no prompt visits tie
    assert ("expert" in circuit.counts()) == bool(circuit.sites.experts) == bool(circuit.experts())
    assert Circuit.load(circuit.save(tmp_path / "circuit.json"), model) == circuit
    assert circuit.provenance["metrics"]["kl"] > 0
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@kinds
def test_the_size_of_a_recording_is_known_before(kind):
    model, batch = tiny(kind), pairs()
    assert recording_bytes(model, batch) == nbytes(record(model, batch.corrupt, batch.attention_mask))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@kinds
def test_half_precision_is_exact_at_both_ends(kind, dtype):
    model = tiny(kind, dtype)
    assert model.dtype == dtype
    measured = differences(model)
    assert measured["open"][0] == measured["closed"][0] == 0, measured
    verify(model)


@pytest.mark.parametrize("kind", DENSE)
def test_shape_finds_what_the_table_says(kind, monkeypatch):
    model = tiny(kind)
    listed = find_sites(model)
    monkeypatch.delitem(FAMILIES, kind)
    assert find_sites(model) == listed


# --- made-up architectures

class MadeUpConfig(PreTrainedConfig):
    model_type = "made_up"
    vocab_size, hidden_size, num_hidden_layers, num_attention_heads, head_dim = VOCABULARY, 24, 2, 3, 6


class Stage(nn.Module):
    "A transformer layer under other names, whose MLP comes first"
    def __init__(self, width, heads, head_width, hidden):
        super().__init__()
        self.heads = heads
        self.feed = nn.ModuleDict(dict(grow=nn.Linear(width, hidden), shrink=nn.Linear(hidden, width)))
        self.mixer = nn.ModuleDict(dict(read=nn.Linear(width, 3 * heads * head_width), merge=nn.Linear(heads * head_width, width)))

    def forward(self, x, allowed):
        x = x + self.feed["shrink"](self.feed["grow"](x).relu())
        q, k, v = self.mixer["read"](x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return x + self.mixer["merge"](scaled_dot_product_attention(q, k, v, attn_mask=allowed).transpose(1, 2).flatten(2))


class MadeUp(PreTrainedModel):
    config_class = MadeUpConfig
    def __init__(self, config, hidden=40):
        super().__init__(config)
        self.words = nn.Embedding(config.vocab_size, config.hidden_size)
        self.stages = nn.ModuleList(Stage(config.hidden_size, config.num_attention_heads, config.head_dim, hidden) for _ in range(config.num_hidden_layers))
        self.out = nn.Linear(config.hidden_size, config.vocab_size)

    def forward(self, input_ids, attention_mask):
        n = input_ids.shape[1]
        allowed = torch.ones(n, n, dtype=torch.bool).tril() & (attention_mask[:, None, None] > 0) | torch.eye(n, dtype=torch.bool)
        x = self.words(input_ids)
        for stage in self.stages: x = stage(x, allowed)
        return SimpleNamespace(logits=self.out(x))


def made_up(**options):
    torch.manual_seed(0)
    return MadeUp(MadeUpConfig(), **options).eval()


def test_an_unlisted_architecture_is_found_by_shape():
    sites = holds(made_up())
    assert sites.attention == ("stages.0.mixer.merge", "stages.1.mixer.merge") and sites.mlp == ("stages.0.feed.shrink", "stages.1.feed.shrink")
    assert (sites.n_heads, sites.head_width, sites.mlp_width) == (3, 6, 40)


def test_an_ambiguous_shape_is_refused():
    with pytest.raises(InputError, match=r"FAMILIES\['made_up'\] = Family\(layers, attention, mlp\)"): find_sites(made_up(hidden=18))


def test_an_architecture_without_such_modules_is_refused():
    model = made_up()
    for stage in model.stages: stage.mixer, stage.feed = nn.Identity(), nn.Identity()
    with pytest.raises(InputError, match=r"FAMILIES\['made_up'\] = Family\(layers, attention, mlp\)"): find_sites(model)


def test_a_part_outside_the_sites_is_refused():
    class Leaking(MadeUp):
        def forward(self, input_ids, attention_mask):
            seen = super().forward(input_ids, attention_mask).logits
            return SimpleNamespace(logits=seen + self.out(self.words(input_ids)).mean(1, keepdim=True))  # reads earlier tokens past every site

    torch.manual_seed(0)
    with pytest.raises(InputError, match="closed is off by"): verify(Leaking(MadeUpConfig()).eval())


def test_a_skipped_module_is_refused():
    class Fused(MadeUp):
        def forward(self, input_ids, attention_mask):
            return SimpleNamespace(logits=self.out(self.words(input_ids)))

    with pytest.raises(InputError, match="without calling"): verify(Fused(MadeUpConfig()).eval())


# --- other layers and places

class Packed(nn.Module):
    "A linear layer with its weight in eight bits"
    def __init__(self, layer):
        super().__init__()
        self.in_features, self.out_features, self.bias = layer.in_features, layer.out_features, layer.bias
        self.scale = nn.Buffer(layer.weight.detach().abs().amax(1, keepdim=True) / 127)
        self.weight = nn.Parameter((layer.weight.detach() / self.scale).round().to(torch.int8), requires_grad=False)

    def forward(self, x): return linear(x, self.weight * self.scale, self.bias)


class Rounding(Packed):
    "Rounds what it reads to 127 steps of each row's largest number too, and lets the gradient through"
    def forward(self, x):
        step = x.detach().abs().amax(-1, keepdim=True).clamp(min=1e-9) / 127
        return super().forward(x + ((x / step).round() * step - x).detach())


@pytest.mark.parametrize("packing", [Packed, Rounding])
@pytest.mark.parametrize("kind", ["opt", "qwen3"])
def test_packed_weights(kind, packing):
    model = tiny(kind)
    for name, module in [*model.named_modules()]:
        if isinstance(module, nn.Linear) and name != "lm_head": model.set_submodule(name, packing(module))
    sites = holds(model)
    assert sites == find_sites(tiny(kind)) and type(model.get_submodule(sites.mlp[0])) is packing


@pytest.mark.parametrize("bits", [8, 4])
def test_bitsandbytes(bits, tmp_path):
    pytest.importorskip("bitsandbytes")
    tiny("llama").save_pretrained(tmp_path)
    packing = BitsAndBytesConfig(load_in_8bit=bits == 8, load_in_4bit=bits == 4, bnb_4bit_compute_dtype=torch.float32, bnb_4bit_quant_type="nf4")
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=packing, device_map="cpu")
    sites = holds(model)
    assert not model.get_submodule(sites.mlp[0]).weight.is_floating_point()
    circuit = short_search(model)
    assert Circuit.load(circuit.save(tmp_path / "circuit.json"), model) == circuit


def test_layers_may_differ_in_width():
    model = tiny("llama")
    for name, narrow in (("gate_proj", nn.Linear(32, 24)), ("up_proj", nn.Linear(32, 24)), ("down_proj", nn.Linear(24, 32))):
        setattr(model.model.layers[1].mlp, name, narrow)
    sites = holds(model)
    assert sites.dense == (40, 24) and n_nodes(sites)["mlp_neuron"] == 64
    assert from_kept({}, sites).kept["mlp_neuron"].sum() == 64


def test_layers_that_differ_in_heads_are_refused():
    model = tiny("llama")
    model.model.layers[1].self_attn.o_proj = nn.Linear(36, 32)
    with pytest.raises(InputError, match="differ in their heads"): find_sites(model)


def test_packed_experts_are_refused():
    model = tiny("mixtral")
    model.model.layers[0].mlp.experts.down_proj = nn.Parameter(model.model.layers[0].mlp.experts.down_proj.to(torch.int8), requires_grad=False)
    with pytest.raises(InputError, match="without quantisation"): find_sites(model)


def test_dispatched_model():
    accelerate = pytest.importorskip("accelerate")
    model = tiny("llama")
    parts = {name: "cpu" for name in ("model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "model.rotary_emb", "lm_head")}
    holds(accelerate.dispatch_model(model, parts, force_hooks=True))
    verify(load_model(device={"": "cpu"}))


def test_weights_kept_elsewhere():
    "What device_map='auto' does with a model that does not fit: the last layer's weights come when they are needed and go again"
    accelerate = pytest.importorskip("accelerate")
    model, whole = tiny("llama"), tiny("llama")
    accelerate.cpu_offload(model.model.layers[1], execution_device=torch.device("cpu"))
    holds(model)
    assert fingerprint(model) == fingerprint(whole)
    assert short_search(model) == short_search(whole)
    assert any(p.is_meta for p in model.parameters())
    routed = tiny("mixtral")
    accelerate.cpu_offload(routed.model.layers[1], execution_device=torch.device("cpu"))
    with pytest.raises(InputError, match="device_map"): verify(routed)


def test_masks_and_recordings_follow_their_site():
    "The model is on a device without numbers, the rest is not: each operation refuses tensors that do not lie together"
    model, batch = tiny("opt"), pairs()
    masks, corrupt = circuit_masks(model), record(model, batch.corrupt, batch.attention_mask, output=True)
    model.set_attn_implementation("eager")  # the other looks at the values of its padding mask
    model, batch = model.to("meta"), batch.to("meta")
    assert circuit_logits(model, batch, masks, corrupt).device.type == "meta"
    assert batch[torch.tensor([2, 0])].clean.shape == (2, batch.clean.shape[1])


def circuit_masks(model):
    sites = find_sites(model)
    return site_masks({l: torch.rand(s) for l, s in level_shapes(sites, LEVELS).items()}, sites)
