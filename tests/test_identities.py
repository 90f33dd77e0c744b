"""What the two-stream forward promises, on a tiny model of every family of architectures, with random weights."""
import pytest
import torch
from torch.nn.functional import linear

from families import LENGTHS, TINY, pairs, tiny
from mgprune.experts import Routed, written_as
from mgprune.hooks import Hook, hooks, host_of, placed
from mgprune.models import frozen
from mgprune.pairs import Batch
from mgprune.passes import answer_logits, at_mlp, circuit_logits, record
from mgprune.sites import find_sites
from mgprune.streams import prepare
from mgprune.tree import FINEST, LEVELS, SiteMasks, close, level_shapes, site_masks

# families that compute throughout in double precision when asked to; the others keep norms, rotations or scores in single precision
DOUBLE = {"gpt2", "gpt_neox", "opt", "falcon", "phi", "stablelm", "starcoder2", "gpt_bigcode"}
kinds = pytest.mark.parametrize("kind", TINY)


@pytest.fixture
def model(kind):
    return tiny(kind)


@pytest.fixture
def batch():
    return pairs()


def gates(model, value=None, levels=LEVELS, binary=False):
    draw = torch.Generator().manual_seed(2)
    def fill(shape):
        if value is not None: return torch.full(shape, value)
        u = torch.rand(shape, generator=draw)
        return (u > .3).float() if binary else u
    return {l: fill(s) for l, s in level_shapes(find_sites(model), levels).items()}


def masks_of(model, **options):
    return site_masks(gates(model, **options), find_sites(model))


def logits_of(model, batch, masks):
    return prepare(model, batch, output=True).logits(masks)


def masked_logits_of(model, batch, masks):
    "The same with ablated nodes computed too, and replaced to the last bit"
    examples = prepare(model, batch)
    with torch.no_grad(), frozen(model): return circuit_logits(examples.host, examples.batch, masks, examples.held.over(batch.clean.shape[1]))


def untouched(model, ids, batch):
    with torch.no_grad(), frozen(model): return answer_logits(model, ids, batch.attention_mask)


@kinds
def test_all_open_is_the_untouched_model(model, batch):
    assert torch.equal(logits_of(model, batch, masks_of(model, value=1.)), untouched(model, batch.clean, batch))


@kinds
def test_all_closed_is_the_corrupt_prompt(model, batch):
    closed = logits_of(model, batch, masks_of(model, value=0., levels=LEVELS[:-1]))
    assert torch.equal(closed, untouched(model, batch.corrupt, batch))
    assert not torch.allclose(closed, untouched(model, batch.clean, batch), atol=.1)


@kinds
def test_product_is_nested_interpolation(model, batch):
    "Gate neurons, then heads and groups, experts or the MLP, then the block, each where it is, one after the other"
    host, g = host_of(model), gates(model)
    sites, corrupt = host.sites, record(host, batch.corrupt, batch.attention_mask, output=True)

    def attention(l):
        of_heads = torch.stack([g["group"][l, head * sites.n_groups // sites.n_heads] for head in range(sites.n_heads)])

        def neurons(module, args):
            x, other = (t.unflatten(-1, (sites.n_heads, -1)) for t in (args[0], corrupt.attention[l]))
            for gate in (g["attention_neuron"][l], g["head"][l][:, None], of_heads[:, None]): x = other + gate * (x - other)
            return (x.flatten(-2),)

        def sublayers(module, args, result):
            other = linear(corrupt.attention[l], weight(module), module.bias)
            for gate in (g["attention"][l], g["block"][l]): result = other + gate * (result - other)
            return result

        module = model.get_submodule(sites.attention[l])
        return [Hook(module, neurons), Hook(module, sublayers, after=True)]

    def written(l, result):
        other = corrupt.output[l]
        x = result.reshape(other.shape)
        for gate in (g["mlp_output"][l], g["mlp"][l], g["block"][l]): x = other + gate * (x - other)
        return x.reshape(result.shape)

    def dense(l):
        def hidden(module, args):
            other = corrupt.mlp[l]
            x = other + expert_gate * (g["mlp_neuron"][l][:other.shape[-1]] * (args[0].reshape(other.shape) - other))
            return (x.reshape(args[0].shape),)

        expert_gate = g["expert"][l, -1] if "expert" in g else 1
        module = model.get_submodule(sites.mlp[l])
        return [Hook(module, hidden), Hook(module, lambda module, args, result: written(l, result), after=True)]

    def mixture(l):
        experts, f = model.get_submodule(sites.experts[l]), sites.expert_width

        def summed(clean):
            total, other = 0, corrupt.mlp[l]
            for e in range(sites.n_routed):
                neuron = g["mlp_neuron"][l, e * f:(e + 1) * f]
                a, b = ((r.neurons * (r.index == e)[..., None]).sum(-2) for r in (clean, other))  # zero where e is not visited
                _, down, _, bias = written_as(experts, e, sites.width)
                if bias is not None: down = torch.cat([down, bias[:, None]], 1)
                total = total + linear(b + g["expert"][l, e] * (neuron * (a - b)), down)
            if clean.shared is None: return written(l, total)
            mixed = other.shared + g["expert"][l, -1] * (g["mlp_neuron"][l, sites.n_routed * f:][:clean.shared.shape[-1]] * (clean.shared - other.shared))
            return written(l, total + linear(mixed, model.get_submodule(sites.mlp[l]).weight))

        return at_mlp(host, l, summed)

    found = []
    for l in range(sites.n_layers): found += attention(l) + (mixture if isinstance(corrupt.mlp[l], Routed) else dense)(l)
    with torch.no_grad(), placed(found):
        nested = answer_logits(model, batch.clean, batch.attention_mask)
    assert torch.allclose(nested, logits_of(model, batch, site_masks(g, sites)), atol=1e-4, rtol=1e-4)


def weight(projection):
    "As Linear stores it: GPT-2's Conv1D has it transposed"
    return projection.weight.T if type(projection).__name__ == "Conv1D" else projection.weight


@kinds
def test_closure_keeps_the_function(model, batch):
    g = gates(model, binary=True)
    closed = close({l: x > .5 for l, x in g.items()}, find_sites(model))
    assert any((closed[l] != (g[l] > .5)).any() for l in g)
    after = site_masks({l: x.float() for l, x in closed.items()}, find_sites(model))
    assert torch.allclose(logits_of(model, batch, site_masks(g, find_sites(model))), logits_of(model, batch, after), atol=1e-5)


@kinds
def test_padded_batch_is_single_prompts(model, batch):
    masks = masks_of(model)
    together = logits_of(model, batch, masks)
    for i, n in enumerate(LENGTHS):
        alone = Batch(*(t[i:i + 1, -n:] for t in (batch.clean, batch.corrupt, batch.attention_mask)), batch.answer[i:i + 1], batch.wrong[i:i + 1])
        assert torch.allclose(logits_of(model, alone, masks)[0], together[i], atol=1e-4, rtol=1e-4)


@kinds
def test_head_mask_is_an_interchange(model, batch):
    sites = find_sites(model)
    corrupt = record(host_of(model), batch.corrupt, batch.attention_mask)
    for layer, head in ((0, 1), (1, 3)):
        part = slice(head * sites.head_width, (head + 1) * sites.head_width)

        def interchange(module, args):
            x = args[0].clone()
            x[..., part] = corrupt.attention[layer][..., part]
            return (x,)

        g = gates(model, value=1., levels=("head",))
        g["head"][layer, head] = 0
        with torch.no_grad(), frozen(model), hooks(model.get_submodule(sites.attention[layer]).register_forward_pre_hook(interchange)):
            by_hand = answer_logits(model, batch.clean, batch.attention_mask)
        assert torch.equal(masked_logits_of(model, batch, site_masks(g, sites)), by_hand)
        assert torch.allclose(logits_of(model, batch, site_masks(g, sites)), by_hand, atol=1e-4)


@kinds
def test_mask_gradient_is_a_finite_difference(kind, batch):
    host, rounded, batch = host_of(tiny(kind, torch.double)), kind not in DOUBLE, batch[:1]  # eager attention to padding alone is not a number in double precision
    model, corrupt = host.model, record(host, batch.corrupt, batch.attention_mask, output=True)
    point = [m.double().requires_grad_() for m in masks_of(model, levels=tuple(FINEST.values()))]
    def f(masks): return circuit_logits(host, batch, SiteMasks(*masks), corrupt)[:, 3].sum()
    size = 1e-2 if rounded else 1e-5
    with frozen(model):
        gradients = torch.autograd.grad(f(point), point)
        for i, g in enumerate(gradients):
            where = divmod(g.abs().flatten().argmax().item(), g.shape[1])
            step = torch.zeros_like(g)
            step[where] = size
            up, down = (f([p.detach() + d * step if j == i else p.detach() for j, p in enumerate(point)]) for d in (1, -1))
            assert torch.isclose(g[where], (up - down) / (2 * size), rtol=2e-3 if rounded else 1e-7, atol=0)


def closed_experts(model, batch, layer, closed):
    "Logits with some experts closed, by running each expert by itself as the model does, clean and corrupted"
    sites = find_sites(model)
    experts = model.get_submodule(sites.experts[layer])
    def alone(args, e):
        x, index, weights = args
        return experts.forward(x, torch.full_like(index[:, :1], e), (weights * (index == e)).sum(-1, keepdim=True).to(weights.dtype))

    seen = []
    with torch.no_grad(), frozen(model):
        with hooks(experts.register_forward_pre_hook(lambda module, args: seen.append(args))): answer_logits(model, batch.corrupt, batch.attention_mask)
        def change(module, args, result): return result + sum(alone(seen[0], e) - alone(args, e) for e in closed)
        with hooks(experts.register_forward_hook(change)): return answer_logits(model, batch.clean, batch.attention_mask)


mixtures = pytest.mark.parametrize("kind", [k for k, options in TINY.items() if "num_experts_per_tok" in options])


@mixtures
def test_expert_mask_is_an_interchange(model, batch):
    sites, layer = find_sites(model), 1
    corrupt, clean = (record(host_of(model), ids, batch.attention_mask).mlp[layer].index for ids in (batch.corrupt, batch.clean))
    assert not torch.equal(corrupt.sort(-1).values, clean.sort(-1).values)  # clean and corrupted prompts are routed differently
    g = gates(model, value=1., levels=("expert",))
    g["expert"][layer, 1:3] = 0
    by_hand = closed_experts(model, batch, layer, (1, 2))
    assert torch.allclose(logits_of(model, batch, site_masks(g, sites)), by_hand, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(by_hand, untouched(model, batch.clean, batch), atol=.01)


@mixtures
def test_expert_neuron_closed_to_zero_is_its_column_of_zeros(model, batch):
    sites, layer, expert, neuron = find_sites(model), 1, 2, 5
    zero = record(host_of(model), batch.clean, batch.attention_mask).map(torch.zeros_like)
    g = gates(model, value=1., levels=("mlp_neuron",))
    g["mlp_neuron"][layer, expert * sites.expert_width + neuron] = 0
    masked = circuit_logits(host_of(model), batch, SiteMasks(None, site_masks(g, sites).mlp), zero)
    down = written_as(model.get_submodule(sites.experts[layer]), expert, sites.width)[1]
    with torch.no_grad():
        down[:, neuron] = 0
        assert torch.allclose(masked, answer_logits(model, batch.clean, batch.attention_mask), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["gpt2", "qwen2_moe", "deepseek_v3"])
def test_recording_anew_gives_the_same(model, batch):
    masks = masks_of(model)
    kept, anew = (prepare(model, batch, output=True, memory=m) for m in (1 << 30, 0))
    assert anew.held is None and torch.equal(kept.logits(masks), anew.logits(masks))


@pytest.mark.parametrize("kind", ["llama", "opt", "qwen2_moe", "gpt_oss"])
def test_one_mask_for_each_example(model, batch):
    sites, draw = find_sites(model), torch.Generator().manual_seed(3)
    masks = site_masks({l: torch.rand(len(batch), *s, generator=draw) for l, s in level_shapes(sites, LEVELS).items()}, sites)
    together = logits_of(model, batch, masks)
    for i in range(len(batch)):
        assert torch.allclose(together[i], logits_of(model, batch, SiteMasks(*(m[i] for m in masks)))[i], atol=1e-4, rtol=1e-4)
