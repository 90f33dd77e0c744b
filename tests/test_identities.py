"""What the two-stream forward promises, on a GPT-2 and on a Llama with grouped queries, both with random weights."""
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from mgprune.masks import LEVELS, SiteMasks, close, level_shapes, site_masks
from mgprune.models import frozen
from mgprune.sites import find_sites
from mgprune.streams import Batch, all_masked_logits, answer_logits, circuit_logits, hooks, prepare, record

VOCABULARY, LENGTHS = 40, (9, 5, 7)


def gpt2():
    return GPT2LMHeadModel(GPT2Config(n_layer=3, n_head=4, n_embd=32, vocab_size=VOCABULARY, n_positions=16,
                                      bos_token_id=0, eos_token_id=0, initializer_range=.4))


def llama():
    return LlamaForCausalLM(LlamaConfig(num_hidden_layers=3, hidden_size=32, intermediate_size=48, num_attention_heads=4,
                                        num_key_value_heads=2, head_dim=12, vocab_size=VOCABULARY, initializer_range=.4))


@pytest.fixture(params=[gpt2, llama], ids=lambda f: f.__name__)
def model(request):
    torch.manual_seed(0)
    return request.param().eval()


@pytest.fixture
def batch():
    draw = torch.Generator().manual_seed(1)
    clean, corrupt = (torch.randint(1, VOCABULARY, (len(LENGTHS), max(LENGTHS)), generator=draw) for _ in range(2))
    mask = torch.stack([torch.arange(max(LENGTHS)) >= max(LENGTHS) - n for n in LENGTHS]).long()
    corrupt[:, -1] = clean[:, -1]  # the answer is read at the same token in both
    none = torch.full((len(LENGTHS), 1), -1)
    return Batch(clean * mask, corrupt * mask, mask, none, none)


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
    return all_masked_logits(model, prepare(model, batch, output=True), masks)


def test_all_open_is_the_untouched_model(model, batch):
    with torch.no_grad(), frozen(model):
        untouched = answer_logits(model, batch.clean, batch.attention_mask)
    assert torch.equal(logits_of(model, batch, masks_of(model, value=1.)), untouched)


def test_all_closed_is_the_corrupt_prompt(model, batch):
    with torch.no_grad(), frozen(model):
        corrupt = answer_logits(model, batch.corrupt, batch.attention_mask)
    assert torch.equal(logits_of(model, batch, masks_of(model, value=0., levels=LEVELS[:-1])), corrupt)


def test_product_is_nested_interpolation(model, batch):
    "Gate neurons, then heads or the MLP, then the block, each where it is, one after the other"
    sites, g, corrupt = find_sites(model), gates(model), record(model, batch.corrupt, batch.attention_mask, output=True)

    handles = []
    for l, (a, m) in enumerate(zip(sites.attention, sites.mlp)):
        def neurons(module, args, l=l):
            x, other = (t.unflatten(-1, (sites.n_heads, -1)) for t in (args[0], corrupt.attention[l]))
            x = other + g["attention_neuron"][l] * (x - other)
            x = other + g["head"][l][:, None] * (x - other)
            return (x.flatten(-2),)

        def sublayers(module, args, result, l=l):
            other = torch.nn.functional.linear(corrupt.attention[l], weight(module), module.bias)
            result = other + g["attention"][l] * (result - other)
            return other + g["block"][l] * (result - other)

        def hidden(module, args, l=l):
            return (corrupt.mlp[l] + g["mlp_neuron"][l] * (args[0] - corrupt.mlp[l]),)

        def written(module, args, result, l=l):
            other = corrupt.output[l]
            for gate in (g["mlp_output"][l], g["mlp"][l], g["block"][l]): result = other + gate * (result - other)
            return result

        handles += [model.get_submodule(a).register_forward_pre_hook(neurons), model.get_submodule(a).register_forward_hook(sublayers),
                    model.get_submodule(m).register_forward_pre_hook(hidden), model.get_submodule(m).register_forward_hook(written)]
    with torch.no_grad(), hooks(*handles):
        nested = answer_logits(model, batch.clean, batch.attention_mask)
    assert torch.allclose(nested, logits_of(model, batch, site_masks(g, sites)), atol=1e-4, rtol=1e-4)


def weight(projection):
    "As Linear stores it: GPT-2's Conv1D has it transposed"
    return projection.weight.T if type(projection).__name__ == "Conv1D" else projection.weight


def test_closure_keeps_the_function(model, batch):
    g = gates(model, binary=True)
    closed = close({l: x > .5 for l, x in g.items()}, find_sites(model))
    assert any((closed[l] != (g[l] > .5)).any() for l in g)
    after = site_masks({l: x.float() for l, x in closed.items()}, find_sites(model))
    assert torch.allclose(logits_of(model, batch, site_masks(g, find_sites(model))), logits_of(model, batch, after), atol=1e-5)


def test_padded_batch_is_single_prompts(model, batch):
    masks = masks_of(model)
    together = logits_of(model, batch, masks)
    for i, n in enumerate(LENGTHS):
        alone = Batch(*(t[i:i + 1, -n:] for t in (batch.clean, batch.corrupt, batch.attention_mask)), batch.answer[i:i + 1], batch.wrong[i:i + 1])
        assert torch.allclose(logits_of(model, alone, masks)[0], together[i], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("layer, head", [(0, 1), (2, 3)])
def test_head_mask_is_an_interchange(model, batch, layer, head):
    sites = find_sites(model)
    part = slice(head * sites.head_width, (head + 1) * sites.head_width)
    corrupt = record(model, batch.corrupt, batch.attention_mask)

    def interchange(module, args):
        x = args[0].clone()
        x[..., part] = corrupt.attention[layer][..., part]
        return (x,)

    g = gates(model, value=1., levels=("head",))
    g["head"][layer, head] = 0
    with torch.no_grad(), frozen(model), hooks(model.get_submodule(sites.attention[layer]).register_forward_pre_hook(interchange)):
        by_hand = answer_logits(model, batch.clean, batch.attention_mask)
    assert torch.equal(logits_of(model, batch, site_masks(g, sites)), by_hand)


def test_mask_gradient_is_a_finite_difference(model, batch):
    model = model.double()
    corrupt = record(model, batch.corrupt, batch.attention_mask, output=True)
    point = [m.double().requires_grad_() for m in masks_of(model)]
    def f(masks): return circuit_logits(model, batch, SiteMasks(*masks), corrupt)[:, 3].sum()
    with frozen(model):
        gradients = torch.autograd.grad(f(point), point)
        for i, g in enumerate(gradients):
            where = divmod(g.abs().flatten().argmax().item(), g.shape[1])
            step = torch.zeros_like(g)
            step[where] = 1e-3  # Llama's norms compute in single precision
            up, down = (f([p.detach() + d * step if j == i else p.detach() for j, p in enumerate(point)]) for d in (1, -1))
            assert torch.isclose(g[where], (up - down) / 2e-3, rtol=1e-2, atol=1e-3)


def test_recording_anew_gives_the_same(model, batch):
    masks = masks_of(model)
    kept, anew = (prepare(model, batch, output=True, memory=m) for m in (1 << 30, 0))
    assert anew.corrupt is None and torch.equal(all_masked_logits(model, kept, masks), all_masked_logits(model, anew, masks))
