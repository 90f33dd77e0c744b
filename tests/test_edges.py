"""A pass with edges is what a slow one gives that writes attention out and computes one reader after another."""
from dataclasses import replace

import pytest
import torch

from families import TINY, pairs, tiny
from mgprune.arguments import InputError
from mgprune.attribution import WORTH
from mgprune.checks import is_norm, short_pairs, trusted
from mgprune.circuit import from_kept, full_circuit
from mgprune.compiled import build, read_program
from mgprune.edge_pass import check_parts, edge_logits, edge_scores, framed, logits_with, prepare_edges, wired_logits, wires_of
from mgprune.passes import answer_logits
from mgprune.streams import prepare
from mgprune.wiring import Wiring, edges_among, writers_of

KINDS = "gpt2", "llama", "qwen2", "qwen3", "gpt_neox"
DEEPER = {kind: {"n_layer" if kind == "gpt2" else "num_hidden_layers": 3} for kind in KINDS}
NO_ROWS, NO_NORM = {"bloom", "gpt_bigcode", "deepseek_v3"}, {"gemma2", "gemma3_text", "olmo2", "olmoe"}  # what is refused, and why


@pytest.fixture(params=KINDS)
def kind(request, monkeypatch):
    monkeypatch.setitem(TINY, request.param, TINY[request.param] | DEEPER[request.param])
    return request.param


class Written:
    "A model's parts as functions of one reader's residual stream"
    def __init__(self, model, kind, batch):
        self.kind, self.batch, self.base = kind, batch, getattr(model, model.base_model_prefix)
        self.layers = self.base.h if kind == "gpt2" else self.base.layers
        self.positions = (batch.attention_mask.cumsum(-1) - 1).clamp(min=0)
        self.head, self.sites = model.get_output_embeddings(), trusted(model).sites
        length = batch.clean.shape[1]
        self.seen = (batch.attention_mask[:, None] > 0) & torch.ones(length, length).tril().bool()

    def embedded(self, ids):
        if self.kind == "gpt2": return self.base.wte(ids) + self.base.wpe(self.positions)
        return (self.base.embed_in if self.kind == "gpt_neox" else self.base.embed_tokens)(ids)

    def norm(self, place, x):
        layer, later = divmod(place, 2)
        if layer == len(self.layers): return {"gpt2": "ln_f", "gpt_neox": "final_layer_norm"}.get(self.kind, "norm"), x
        names = ("ln_1", "ln_2") if self.kind == "gpt2" else ("input_layernorm", "post_attention_layernorm")
        return self.layers[layer].get_submodule(names[later])(x)

    def final(self, x):
        name, x = self.norm(2 * len(self.layers), x)
        return self.head(self.base.get_submodule(name)(x))[:, -1]

    def read(self, layer, part, number, x):
        "Queries, keys or values of a head or group, from a normed stream"
        width, heads, at = self.sites.head_width, self.sites.n_heads, "qkv".index(part)
        rows = torch.arange(number * width, (number + 1) * width)
        if self.kind == "gpt2":
            c = self.layers[layer].attn.c_attn
            return x @ c.weight[:, at * heads * width + rows] + c.bias[at * heads * width + rows]
        if self.kind == "gpt_neox":
            c, rows = self.layers[layer].attention.query_key_value, (3 * number + at) * width + torch.arange(width)
            return x @ c.weight[rows].T + c.bias[rows]
        a = self.layers[layer].self_attn
        c = a.get_submodule(f"{part}_proj")
        y = x @ c.weight[rows].T + (0 if c.bias is None else c.bias[rows])
        return a.get_submodule(f"{part}_norm")(y) if self.kind == "qwen3" and part != "v" else y

    def rotated(self, x):
        if self.kind == "gpt2": return x
        cos, sin = self.base.rotary_emb(x, self.positions)
        n = cos.shape[-1]
        first, second = x[..., :n // 2], x[..., n // 2:n]
        return torch.cat([x[..., :n] * cos + torch.cat([-second, first], -1) * sin, x[..., n:]], -1)

    def attend(self, q, k, v):
        weights = self.rotated(q) @ self.rotated(k).mT / self.sites.head_width ** .5
        return weights.masked_fill(~self.seen, torch.finfo(q.dtype).min).softmax(-1) @ v

    def neurons(self, layer, x):
        m = self.layers[layer].mlp
        if self.kind == "gpt2": return m.act(m.c_fc(x))
        return m.act(m.dense_h_to_4h(x)) if self.kind == "gpt_neox" else m.act_fn(m.gate_proj(x)) * m.up_proj(x)

    def out(self, layer, mlp):
        "The output projection of attention or MLP, [inputs, width]"
        l = self.layers[layer]
        if self.kind == "gpt2": return (l.mlp if mlp else l.attn).c_proj
        if self.kind == "gpt_neox": return l.mlp.dense_4h_to_h if mlp else l.attention.dense
        return l.mlp.down_proj if mlp else l.self_attn.o_proj

    def weight(self, layer, mlp):
        weight = self.out(layer, mlp).weight
        return weight if self.kind == "gpt2" else weight.T


def heads_and_neurons(w, read):
    "What every head gathers and every MLP's neurons are, layer by layer, where read(place, reader) says a reader's normed stream"
    groups = w.sites.n_heads // w.sites.n_groups
    letter = "g" if groups > 1 else "h"
    for layer in range(len(w.layers)):
        def part(kind, head, name): return w.read(layer, kind, head, read(2 * layer, name))
        gathered = []
        for head in range(w.sites.n_heads):
            group = head // groups
            k, v = (part(kind, group, f"a{layer}.{letter}{group}<{kind}>") for kind in "kv")
            gathered.append(w.attend(part("q", head, f"a{layer}.h{head}<q>"), k, v))
        yield layer, False, gathered
        yield layer, True, w.neurons(layer, read(2 * layer + 1, f"m{layer}"))


def corrupted(w):
    "Residual streams by place, and what heads and MLPs hold, of a plain run on the corrupted prompts"
    x = w.embedded(w.batch.corrupt)
    streams, holds, pending = [x], {}, 0
    def read(place, name): return w.norm(place, streams[place])
    for layer, mlp, values in heads_and_neurons(w, read):
        holds[layer, mlp] = values
        projection, whole = w.out(layer, mlp), values if mlp else torch.cat(values, -1)
        pending = pending + projection(whole)
        if w.kind == "gpt_neox" and not mlp: streams.append(x)  # its MLP reads what its attention reads
        else: x, pending = x + pending, 0; streams.append(x)
    return streams, holds


def slowly(w, streams, holds, masks, wiring, edges):
    "Answer logits with these edges, one reader after another, where the corrupted run had these streams and held this"
    deltas = {"input": w.embedded(w.batch.clean) - streams[0]}
    def stream(place, name):
        row = edges[wiring.readers.index(name)]
        x = streams[place]
        for writer, open, exists in zip(wiring.writers, row, wiring.exists[wiring.readers.index(name)]):
            if exists: x = x + open * deltas[writer]
        return x
    def read(place, name): return w.norm(place, stream(place, name))
    width = w.sites.head_width
    for layer, mlp, values in heads_and_neurons(w, read):
        mask, weight = (masks.mlp if mlp else masks.attention)[layer], w.weight(layer, mlp)
        if mlp: deltas[f"m{layer}"] = ((values - holds[layer, mlp]) * mask) @ weight
        else:
            for head, z in enumerate(values):
                rows = slice(head * width, (head + 1) * width)
                deltas[f"a{layer}.h{head}"] = ((z - holds[layer, mlp][head]) * mask[rows]) @ weight[rows]
    return w.final(stream(2 * len(w.layers), "logits"))


def random_circuit(sites, draw):
    "A circuit of most heads and a part of the neurons"
    return from_kept({"head": torch.rand(sites.n_layers, sites.n_heads, generator=draw) < .7,
                      "mlp_neuron": torch.rand(sites.n_layers, sites.mlp_width, generator=draw) < .6}, sites)


def random_edges(wiring, draw, hard, n=()):
    u = torch.rand(*n, *wiring.exists.shape, generator=draw)
    return (u < .5).float() if hard else u


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["single", "double"])
def test_twenty_random_masks_are_the_slow_reference(kind, dtype):
    model, batch, draw = tiny(kind, dtype), pairs(), torch.Generator().manual_seed(0)
    sites = trusted(model).sites
    wiring, circuit = Wiring(sites), random_circuit(sites, draw)
    examples, masks = prepare_edges(circuit, model, batch), circuit.masks()
    wires, exact = wires_of(examples.host, masks, writers_of(circuit)), 1e-5 if dtype == torch.float32 else 1e-13
    masks = masks._replace(attention=masks.attention.to(dtype), mlp=masks.mlp.to(dtype))
    written = Written(model, kind, examples.batch)
    with torch.no_grad():
        run = corrupted(written)
        for i in range(20):
            edges = random_edges(wiring, draw, hard=i % 2).to(dtype)
            slow = slowly(written, *run, masks, wiring, edges)
            assert (logits_with(wires, examples, edges) - slow).abs().max() < exact * slow.abs().max(), i


def test_open_is_the_node_circuit_and_closed_the_corrupted_run(kind):
    model, batch, draw = tiny(kind), pairs(), torch.Generator().manual_seed(1)
    sites = trusted(model).sites
    wiring = Wiring(sites)
    with torch.no_grad():
        corrupt = answer_logits(model, batch.corrupt, batch.attention_mask)
        for circuit in (full_circuit(sites), random_circuit(sites, draw)):
            examples = prepare_edges(circuit, model, batch)
            opened, closed = (edge_logits(circuit, model, examples, wiring.exists.float() * value) for value in (1, 0))
            nodes = prepare(model, batch).logits(circuit.masks())
            assert (opened - nodes).abs().max() < 1e-5 * nodes.abs().max()
            assert torch.equal(closed, corrupt)


def test_masks_of_each_pair_are_those_of_the_pair_alone(kind):
    model, batch, draw = tiny(kind), pairs(), torch.Generator().manual_seed(2)
    whole = full_circuit(trusted(model).sites)
    wiring, examples = Wiring(whole.sites), prepare_edges(whole, model, batch)
    each = random_edges(wiring, draw, hard=True, n=(len(batch),))
    together = edge_logits(whole, model, examples, each)
    for i in range(len(batch)):
        alone = edge_logits(whole, model, examples, each[i])[i]
        assert (together[i] - alone).abs().max() < 1e-5 * alone.abs().max()


@pytest.mark.parametrize("measure", WORTH)
def test_one_pass_gives_the_slopes_of_autograd(kind, measure):
    model, batch, draw = tiny(kind), pairs(), torch.Generator().manual_seed(3)
    sites = trusted(model).sites
    wiring, circuit = Wiring(sites), random_circuit(sites, draw)
    examples = prepare_edges(circuit, model, batch)
    edges = (wiring.exists * .5).requires_grad_()
    slopes, = torch.autograd.grad(WORTH[measure](edge_logits(circuit, model, examples, edges), examples).mean(), edges)
    once = edge_scores(circuit, model, examples, 1, measure)
    assert (once - slopes).abs().max() < 2e-5 * slopes.abs().max() and (once[edges_among(wiring, circuit)] != 0).float().mean() > .9
    each = (wiring.exists * .5).expand(len(batch), -1, -1).clone().requires_grad_()
    by_pair, = torch.autograd.grad(WORTH[measure](edge_logits(circuit, model, examples, each), examples).mean(), each)
    assert (by_pair.sum(0) - slopes).abs().max() < 2e-5 * slopes.abs().max()


@pytest.mark.parametrize("kind", ["gpt2", "gpt_neox"], indirect=True)
def test_slopes_are_finite_differences(kind):
    "In families that compute throughout in double precision"
    model, batch, draw = tiny(kind, torch.double), pairs(), torch.Generator().manual_seed(4)
    whole = full_circuit(trusted(model).sites)
    wiring, examples = Wiring(whole.sites), prepare_edges(whole, model, batch)
    edges = random_edges(wiring, draw, hard=False).double().requires_grad_()
    target = torch.randn(len(batch), model.config.vocab_size, generator=draw, dtype=torch.double)
    def value(e): return (edge_logits(whole, model, examples, e) * target).sum()
    slopes, = torch.autograd.grad(value(edges), edges)
    for _ in range(10):
        step = torch.randn(edges.shape, generator=draw, dtype=torch.double) * wiring.exists * 1e-5
        with torch.no_grad(): found = (value(edges + step) - value(edges - step)) / 2
        assert torch.isclose((slopes * step).sum(), found, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("family", [family for family in TINY if family not in KINDS])
def test_every_other_family_is_exact_or_refused(family):
    "What is accepted was measured: open edges are the model, closed ones the corrupted run to the bit"
    model = tiny(family)
    host = trusted(model)
    if family in NO_ROWS | NO_NORM:
        with pytest.raises(InputError, match="edges"): framed(host)
    else: assert framed(host) is framed(host)


@pytest.mark.parametrize("family", [family for family in TINY if family not in NO_ROWS | NO_NORM])
def test_norms_of_equal_weights_are_told_apart(family):
    "As those of parallel branches in a model that was not trained yet"
    model = tiny(family)
    with torch.no_grad():
        for module in filter(is_norm, model.modules()):
            for name, p in module.named_parameters(): p.fill_(float(name == "weight"))
    host = trusted(model)
    assert len({*framed(host).norms}) >= host.sites.n_layers + 1


@pytest.mark.parametrize("one, other", ["qk", "qv", "kv"])
def test_parts_that_changed_places_are_noticed(one, other):
    model = tiny("gpt2")
    host = trusted(model)
    frame = framed(host)
    part, n = frame.parts[0][0], host.sites.n_heads
    blocks = dict(zip("qkv", part.rows.split(n)))
    blocks[one], blocks[other] = blocks[other], blocks[one]
    wrong = replace(part, rows=torch.cat([blocks[kind] for kind in "qkv"]))
    check_parts(host, frame)
    with pytest.raises(InputError, match="in the order that is known"):
        check_parts(host, replace(frame, parts=((wrong,), *frame.parts[1:])))


def test_a_model_is_left_as_it_came():
    model, batch = tiny("qwen3"), pairs()
    whole = full_circuit(trusted(model).sites)
    examples, wiring = prepare_edges(whole, model, batch), Wiring(whole.sites)
    before = [(name, [*vars(m)], len(m._forward_hooks) + len(m._forward_pre_hooks)) for name, m in model.named_modules()]
    edge_scores(whole, model, examples, 1)
    edge_logits(whole, model, examples, wiring.exists.float())
    wires = wires_of(examples.host, whole.masks(), writers_of(whole))
    with pytest.raises(RuntimeError): wired_logits(wires, examples, torch.full((3, 3), .5))  # in the middle of a pass
    after = [(name, [*vars(m)], len(m._forward_hooks) + len(m._forward_pre_hooks)) for name, m in model.named_modules()]
    assert after == before and not any(p.grad is not None for p in model.parameters())


def test_a_model_whose_logits_cancel_to_nothing_is_not_refused():
    model, *_ = build(read_program("count"), 0)
    host, batch = trusted(model), short_pairs(model)
    with torch.no_grad(): full = answer_logits(model, batch.clean, batch.attention_mask)
    assert full.abs().max() < 1e-3 and framed(host).wiring == Wiring(host.sites)
