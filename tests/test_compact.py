"""A circuit computed from its open nodes alone is the masked one: for every family, every ablation, and whatever is put around a model."""
import pytest
import torch
from transformers import AutoModelForCausalLM

from families import TINY, VOCABULARY, pairs, tiny
from mgprune import evaluate, load_model, tasks
from mgprune.ablations import ABLATIONS, Held, hold
from mgprune.checks import trusted
from mgprune.circuit import from_scores
from mgprune.compact import LAYOUTS, readers_at
from mgprune.evaluation import measures
from mgprune.models import fingerprint, frozen
from mgprune.passes import circuit_logits, open_at, projected
from mgprune.streams import prepare
from mgprune.tree import SiteMasks, level_shapes
from test_ablations import given_pairs, model_of

NOT_THE_ATTENTION = {"bloom", "gpt_bigcode", "olmo2", "olmoe", "deepseek_v3"}  # its rows cannot be told, or are normed together


def random_masks(sites, share, draw):
    "Masks of zeros and ones, of which one layer's attention and another's MLP are closed"
    attention, mlp = ((torch.rand(sites.n_layers, n, generator=draw) < share).float() for n in (sites.n_heads * sites.head_width, sites.mlp_width))
    attention[0], mlp[-1] = 0, 0
    return SiteMasks(attention, mlp)


def state(model):
    "Whatever a context may have changed"
    return [(name, [*vars(m)], m.training, {k: v for k, v in vars(m).items() if type(v) is int}, [*m._parameters.items()]) for name, m in model.named_modules()]


@pytest.mark.parametrize("kind", TINY)
def test_every_family_is_compacted_or_masked(kind):
    model = tiny(kind)
    host = trusted(model)
    sites, layout = host.sites, LAYOUTS[model]
    assert all(layout.attention) == (kind not in NOT_THE_ATTENTION)
    dense = [not (sites.experts and sites.experts[i]) for i in range(sites.n_layers)]
    assert [bool(readers) for readers in layout.mlp] == dense
    batch, draw = pairs(), torch.Generator().manual_seed(0)
    held, before = projected(host, hold(host, batch, ABLATIONS["corrupt"], None, False).over(batch.clean.shape[1])), state(model)
    for share in (0., .1, .4, .65):
        masks = random_masks(sites, share, draw)
        only = open_at(host, masks)
        with torch.no_grad(), frozen(model): alone, masked = (circuit_logits(host, batch, masks, held, which) for which in (only, {}))
        assert torch.allclose(alone, masked, atol=1e-4), share
        assert len(only) == sum(bool(readers_at(host, site, i)) for site in ("attention", "mlp") for i in range(sites.n_layers))
    assert str(state(model)) == str(before)


@pytest.mark.parametrize("ablation", ABLATIONS)
@pytest.mark.parametrize("kind", ["embedded", "llama", "gpt_neox", "qwen2_moe"])
def test_fifty_random_circuits_under_every_ablation(kind, ablation):
    model = model_of(kind)
    batch, reference = given_pairs(model, kind)
    examples = prepare(model, batch, ablation=ablation, reference=reference)
    host, draw = examples.host, torch.Generator().manual_seed(1)
    held = examples.held.over(batch.clean.shape[1])
    for i in range(50):
        masks = random_masks(host.sites, (i % 10 + 1) / 12, draw)
        with torch.no_grad(), frozen(model): masked = circuit_logits(host, examples.batch, masks, held)
        assert open_at(host, masks)
        assert torch.allclose(examples.logits(masks), masked, atol=1e-4)


def test_values_that_an_ablation_of_your_own_changes_are_projected_anew():
    def half(host, pairs, reference, output): return ABLATIONS["corrupt"](host, pairs, reference, output).map(lambda t: t / 2 if t.is_floating_point() else t)
    model = load_model()  # whose projections have biases
    examples = prepare(model, tasks.ioi(model, n=(8, 8, 8)), ablation=half)
    masks, held = random_masks(examples.sites, .3, torch.Generator().manual_seed(0)), examples.held.over(examples.batch.clean.shape[1])
    with torch.no_grad(), frozen(model): masked = circuit_logits(examples.host, examples.batch, masks, held)
    assert open_at(examples.host, masks) and torch.allclose(examples.logits(masks), masked, atol=1e-4)


def test_measures_are_the_masked_ones():
    model = load_model()
    task, draw = tasks.ioi(model, n=(8, 8, 70)), torch.Generator().manual_seed(3)
    examples = prepare(model, task)
    scores = {l: torch.randn(s, generator=draw) for l, s in level_shapes(examples.sites).items()}
    circuit = from_scores(scores, examples.sites, threshold=.5)
    with torch.no_grad(), frozen(model):
        masked = circuit_logits(examples.host, examples.batch, circuit.masks(), examples.held.over(examples.batch.clean.shape[1]))
    assert evaluate(circuit, model, examples) == pytest.approx(measures(masked, examples), abs=1e-5)


def test_a_gradient_to_closed_nodes_is_not_left_out():
    examples = prepare(load_model(), tasks.ioi(load_model(), n=(8, 8, 8)))
    masks = SiteMasks(*(m.requires_grad_() for m in random_masks(examples.sites, .2, torch.Generator().manual_seed(0))[:2]))
    gradients = torch.autograd.grad(examples.logits(masks)[:, 5].sum(), masks[:2])
    assert all((g[m == 0] != 0).float().mean() > .9 for g, m in zip(gradients, masks))


@pytest.mark.parametrize("change", ["hook", "pre-hook", "activation", "forward", "adapter"])
def test_what_is_put_around_a_projection_is_not_passed_by(change):
    model = tiny("llama")
    host, batch = trusted(model), pairs()
    projection = model.model.layers[0].mlp.up_proj
    if change == "hook": projection.register_forward_hook(lambda module, args, result: 2 * result)
    if change == "pre-hook": projection.register_forward_pre_hook(lambda module, args: (2 * args[0],))
    if change == "activation": model.model.layers[0].mlp.act_fn.register_forward_hook(lambda module, args, result: result * (torch.arange(40) != 3))
    if change == "forward":
        plain = projection.forward
        projection.forward = lambda x: 2 * plain(x)
    if change == "adapter": model.model.layers[0].mlp.up_proj = torch.nn.Sequential(projection, torch.nn.Identity())
    masks = random_masks(host.sites, .3, torch.Generator().manual_seed(0))
    assert not readers_at(host, "mlp", 0) or change == "adapter"  # which is another model, that is measured anew
    if change == "adapter": host = trusted(model)
    held = projected(host, hold(host, batch, ABLATIONS["corrupt"], None, False).over(batch.clean.shape[1]))
    with torch.no_grad(), frozen(model):
        alone, masked = (circuit_logits(host, batch, masks, held, which) for which in (open_at(host, masks), {}))
    assert torch.allclose(alone, masked, atol=1e-4)


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_parameters_that_are_trained_get_their_gradient(name):
    model = tiny("phi")
    host, batch = trusted(model), pairs()
    masks, reader = random_masks(host.sites, .3, torch.Generator().manual_seed(0)), model.model.layers[1].self_attn.q_proj
    held = projected(host, hold(host, batch, ABLATIONS["corrupt"], None, False).over(batch.clean.shape[1]))
    with frozen(model):
        getattr(reader, name).requires_grad_()
        each = [torch.autograd.grad(circuit_logits(host, batch, masks, held, only)[:, 5].sum(), getattr(reader, name))[0] for only in (open_at(host, masks), {})]
    assert each[1].any() and torch.allclose(*each, atol=1e-4)


def test_a_layout_that_misleads_is_found_out():
    "Heads that lie in another order than the shapes suggest are masked"
    model = tiny("gpt_neox")
    attention = model.gpt_neox.layers[0].attention
    turn, plain = torch.randperm(attention.query_key_value.out_features, generator=torch.Generator().manual_seed(0)), attention.query_key_value.forward
    class Turned(torch.nn.Linear):
        def forward(self, x): return super().forward(x)[..., turn]
    attention.query_key_value.__class__ = Turned
    host = trusted(model)
    assert not LAYOUTS[model].attention[0] and LAYOUTS[model].attention[1] and all(LAYOUTS[model].mlp)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.double])
def test_other_precisions(dtype):
    model = tiny("llama", dtype)
    host, batch = trusted(model), pairs()
    assert all(LAYOUTS[model].attention) and all(LAYOUTS[model].mlp)
    masks = random_masks(host.sites, .3, torch.Generator().manual_seed(0))
    held = projected(host, hold(host, batch, ABLATIONS["corrupt"], None, False).over(batch.clean.shape[1]))
    with torch.no_grad(), frozen(model):
        alone, masked = (circuit_logits(host, batch, masks, held, which) for which in (open_at(host, masks), {}))
    assert torch.allclose(alone, masked, atol=1e-4 if dtype == torch.double else .1 * masked.abs().max().item())


def test_an_interrupt_inside_leaves_the_model_as_it_was():
    model = load_model()
    examples, before, weights = prepare(model, tasks.ioi(model, n=(8, 8, 8))), str(state(model)), fingerprint(model)
    circuit = from_scores({l: torch.randn(s, generator=torch.Generator().manual_seed(0)) for l, s in level_shapes(examples.sites).items()}, examples.sites)
    with pytest.raises(KeyboardInterrupt):
        with circuit.compact(model, examples): raise KeyboardInterrupt
    assert str(state(model)) == before and fingerprint(model) == weights


def test_saved_while_it_is_compacted_the_weights_are_whole(tmp_path):
    model = tiny("llama")
    batch = pairs()
    scores = {l: torch.randn(s, generator=torch.Generator().manual_seed(0)) for l, s in level_shapes(trusted(model).sites).items()}
    with from_scores(scores, trusted(model).sites).compact(model, batch): model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters()))


def test_looking_at_attentions_leaves_the_model_as_it_came_and_hides_nothing_from_compaction():
    "What transformers hooks in for good where a user asks for attentions is no reason to mask either"
    from mgprune.plots import attention_patterns
    model = load_model()
    host, before = trusted(model), state(model)
    attention_patterns(model, "Mary and John", [(0, 1)])
    assert str(state(model)) == str(before) and not any(m._forward_hooks for m in model.modules())
    model.set_attn_implementation("eager")
    model(torch.tensor([[1, 2]]), output_attentions=True)
    assert any(m._forward_hooks for m in model.modules()) and all(readers_at(host, "attention", i) for i in range(host.sites.n_layers))
    handle = host.module(host.sites.attention[0]).register_forward_hook(lambda *_: None)
    assert not readers_at(host, "attention", 0) and readers_at(host, "attention", 1)
    handle.remove()
