"""Scores by gradients equal slow, obvious references: one prompt and one node's place at a time, with plain PyTorch hooks."""
import pytest
import torch
from torch.overrides import _get_current_function_mode_stack as modes
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from families import TINY, pairs, tiny
from mgprune.attribution import attribute, gim
from mgprune.models import InputError
from mgprune.passes import answer_logits
from mgprune.sites import find_sites
from mgprune.streams import prepare
from mgprune.tree import NEURONS, SiteMasks

METHODS = ("gradient", "gim", "inputs", "activations", "masks", "random_masks")


def prompts():
    "Each pair alone, without padding: clean ids, corrupt ids, right token, wrong token"
    batch = pairs()
    for clean, corrupt, mask, right, wrong in zip(batch.clean, batch.corrupt, batch.attention_mask, batch.answer, batch.wrong):
        yield clean[mask.bool()][None], corrupt[mask.bool()][None], right.item(), wrong.item()


def at_sites(model, f, run):
    "What `run` returns while `f` stands before each projection, called with the site, the layer and its input"
    sites = find_sites(model)
    def before(site, i): return lambda module, args: (f(site, i, args[0]),)
    handles = [model.get_submodule(name).register_forward_pre_hook(before(site, i))
               for site in ("attention", "mlp") for i, name in enumerate(getattr(sites, site))]
    try: return run()
    finally:
        for handle in handles: handle.remove()


def seen(model, run):
    "What goes through the sites in `run`, by site and layer, and what it returns"
    values = {}
    def keep(site, i, x): return values.setdefault((site, i), x.clone())
    return at_sites(model, keep, run), values


def worth(logits, right, wrong): return logits[0, -1, right] - logits[0, -1, wrong]


def by_level(model, found):
    "Site and layer -> scores, as level -> tensor"
    sites = find_sites(model)
    def layers(site): return torch.stack([found[site, i] for i in range(sites.n_layers)])
    return dict(attention_neuron=layers("attention").view(sites.n_layers, sites.n_heads, -1), mlp_neuron=layers("mlp"))


def slow_inputs(model, steps):
    "EAP-IG inputs: gradient of every activation with the embeddings on their way, times the difference of activations"
    total, embed = {}, model.get_input_embeddings()
    for clean, corrupt, right, wrong in prompts():
        with torch.no_grad(): (_, ran), (_, closed) = (seen(model, lambda ids=ids: model(input_ids=ids)) for ids in (clean, corrupt))
        for point in [(k + .5) / steps for k in range(steps)]:
            embeddings = ((1 - point) * embed(corrupt) + point * embed(clean)).detach().requires_grad_()
            out, values = seen(model, lambda: model(inputs_embeds=embeddings))
            for place, g in zip(values, torch.autograd.grad(worth(out.logits, right, wrong), [*values.values()])):
                total[place] = total.get(place, 0) + (g * (ran[place] - closed[place])).sum((0, 1)) / steps / 3
    return by_level(model, total)


def slow_activations(model, steps):
    "EAP-IG activations: the activations of one site of one layer on their way, all others as they come"
    total = {}
    for clean, corrupt, right, wrong in prompts():
        with torch.no_grad(): (_, ran), (_, closed) = (seen(model, lambda ids=ids: model(input_ids=ids)) for ids in (clean, corrupt))
        for place in ran:
            for point in [(k + .5) / steps for k in range(steps)]:
                mixed = (point * ran[place] + (1 - point) * closed[place]).requires_grad_()
                out = at_sites(model, lambda site, i, x: mixed if (site, i) == place else x, lambda: model(input_ids=clean))
                g, = torch.autograd.grad(worth(out.logits, right, wrong), mixed)
                total[place] = total.get(place, 0) + (g * (ran[place] - closed[place])).sum((0, 1)) / steps / 3
    return by_level(model, total)


def same(found, wanted, atol=2e-6):
    for level, values in wanted.items(): torch.testing.assert_close(found[level].double(), values.detach().double(), atol=atol, rtol=2e-4)


@pytest.mark.parametrize("kind", ["gpt2", "llama", "gpt_neox", "gemma3_text"])
def test_ways_of_the_authors_are_theirs(kind):
    model, batch = tiny(kind, torch.double), pairs()
    batch.wrong[:, 1:] = -1
    def found(method): return attribute(model, batch, method, "logit_difference", signed=True, steps=3, batch_size=2)
    same(found("inputs"), slow_inputs(model, 3))
    same(found("activations"), slow_activations(model, 3))


def test_slopes_are_finite_differences():
    model = tiny("gpt2", torch.double)  # whose norms are computed in double precision
    examples, sites = prepare(model, pairs()), find_sites(model)
    def value(point, site, layer, place, by):
        masks = SiteMasks(*(torch.full((sites.n_layers, width), point, dtype=torch.double) for width in (sites.n_heads * sites.head_width, sites.mlp_width)))
        getattr(masks, site)[layer, place] += by
        logits = examples.logits(masks)
        return (logits.gather(1, examples.batch.answer[:, :1]) - logits.gather(1, examples.batch.wrong[:, :1])).mean()
    for method, points in (("gradient", [1.]), ("masks", [.25, .75])):
        scores = attribute(model, examples, method, "logit_difference", signed=True, steps=2)
        for level, site in zip(NEURONS, ("attention", "mlp")):
            for layer, place in ((0, 3), (1, 30)):
                slope = sum(value(p, site, layer, place, 1e-4) - value(p, site, layer, place, -1e-4) for p in points) / 2e-4 / len(points)
                assert abs(scores[level].flatten(1)[layer, place] - slope) < 1e-5 + 1e-4 * abs(slope)


def test_random_circuits_are_drawn_anew_by_every_seed():
    model = tiny("gpt2")
    one, again, other = (attribute(model, pairs(), "random_masks", seed=seed)["mlp_neuron"] for seed in (0, 0, 1))
    assert torch.equal(one, again) and not torch.equal(one, other)


def half(x, share): return share * x + (1 - share) * x.detach()


class Softmax(torch.autograd.Function):
    "Softmax with the way back of twice the temperature, as the paper gives it"
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.softmax(-1)

    @staticmethod
    def backward(ctx, g):
        p = (ctx.saved_tensors[0] / 2).softmax(-1)
        return p * (g - (p * g).sum(-1, keepdim=True))


def llama_by_hand(model, ids):
    "A llama's answer with GIM's way back, written out, and what goes through its sites"
    config, n, values = model.config, ids.shape[1], {}
    def norm(module, x): return x / (x.pow(2).mean(-1, keepdim=True) + config.rms_norm_eps).sqrt().detach() * module.weight
    x = model.model.embed_tokens(ids).detach().requires_grad_()
    cos, sin = model.model.rotary_emb(x, torch.arange(n)[None])
    for i, layer in enumerate(model.model.layers):
        attention, h = layer.self_attn, norm(layer.input_layernorm, x)
        def heads(projection): return projection(h).view(1, n, -1, config.head_dim).transpose(1, 2)
        q, k = apply_rotary_pos_emb(heads(attention.q_proj), heads(attention.k_proj), cos, sin)
        k, v = (t.repeat_interleave(2, 1) for t in (k, heads(attention.v_proj)))
        scores = half(q, .25) @ half(k, .25).mT / config.head_dim ** .5  # a half at each of the two products that they take part in
        weights = Softmax.apply(scores.masked_fill(~torch.ones(n, n, dtype=torch.bool).tril(), -1e30))
        values["attention", i] = (weights @ half(v, .5)).transpose(1, 2).reshape(1, n, -1)
        x = x + attention.o_proj(values["attention", i])
        h = norm(layer.post_attention_layernorm, x)
        values["mlp", i] = half(layer.mlp.act_fn(layer.mlp.gate_proj(h)), .5) * half(layer.mlp.up_proj(h), .5)
        x = x + layer.mlp.down_proj(values["mlp", i])
    return model.lm_head(norm(model.model.norm, x)), values


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_the_corrected_way_back_is_that_of_the_paper(implementation):
    model, total = tiny("llama", torch.double if implementation == "sdpa" else torch.float32), {}
    model.set_attn_implementation(implementation)
    for clean, corrupt, right, wrong in prompts():
        (logits, ran), (_, closed) = llama_by_hand(model, clean), llama_by_hand(model, corrupt)
        torch.testing.assert_close(logits, model(input_ids=clean).logits, atol=1e-5, rtol=1e-3)  # the model's norms are in single precision
        for place, g in zip(ran, torch.autograd.grad(worth(logits, right, wrong), [*ran.values()])):
            total[place] = total.get(place, 0) + (g * (ran[place] - closed[place])).sum((0, 1)) / 3
    same(attribute(model, pairs(), "gim", signed=True), by_level(model, total), 1e-5)


def state(model): return [(m.training, [*m._forward_hooks.values()], [*m._forward_pre_hooks.values()], m.__dict__.keys() - {"loss_function"}) for m in model.modules()]


@pytest.mark.parametrize("kind", TINY)
def test_every_family_is_corrected_and_answers_the_same(kind):
    model, batch, scores = tiny(kind), pairs(), {}  # eager attention to padding alone is not a number in double precision
    before = state(model)
    for implementation in ("eager", "sdpa") if kind not in ("gpt_oss", "gemma2") else ("eager",):
        model.set_attn_implementation(implementation)
        with torch.no_grad():
            plain = answer_logits(model, batch.clean, batch.attention_mask)
            with gim(model): assert torch.equal(answer_logits(model, batch.clean, batch.attention_mask), plain)
        scores[implementation] = attribute(model, batch, "gim", signed=True)
        assert all(s.isfinite().all() and s.any() for s in scores[implementation].values())
    same(scores["eager"], [*scores.values()][-1], 1e-5)
    assert any((scores["eager"][level] - s).abs().max() > 1e-3 * s.abs().max() for level, s in attribute(model, batch, "gradient", signed=True).items())
    assert state(model) == before and not modes()


@pytest.mark.parametrize("method", METHODS)
def test_an_interrupted_model_is_as_it_came(method):
    model = tiny("llama").train()
    model.lm_head.weight.requires_grad_(False)
    wanted, before, calls = [p.requires_grad for p in model.parameters()], state(model), []
    def interrupt(module, args):
        calls.append(1)
        if len(calls) == 3: raise KeyboardInterrupt
    examples = prepare(model, pairs())
    with model.model.layers[1].post_attention_layernorm.register_forward_pre_hook(interrupt):
        for batch_size in (1,):
            with pytest.raises(KeyboardInterrupt): attribute(model, examples, method, batch_size=batch_size)
    assert state(model) == before and wanted == [p.requires_grad for p in model.parameters()] and not modes()
    assert model.training and attribute(model, examples, "gim")["mlp_neuron"].any()


def test_mixtures_and_outputs_have_scores():
    for kind in ("deepseek_v3", "gpt_oss"):
        model = tiny(kind)
        levels = ("block", "head", "mlp", "expert", *NEURONS, "mlp_output")
        for method in METHODS:
            scores = attribute(model, pairs(), method, "logit_difference", signed=True, steps=2, levels=levels)
            assert all(s.isfinite().all() and s.any() for s in scores.values())
            torch.testing.assert_close(scores["expert"].sum(-1), scores["mlp"])
            torch.testing.assert_close(scores["block"], scores["head"].sum(-1) + scores["mlp"])


def test_an_expert_on_the_way_of_the_inputs_counts_what_it_writes():
    model = tiny("mixtral", torch.double)
    found = attribute(model, pairs(), "inputs", "logit_difference", signed=True, steps=3, levels="mlp")["mlp"]
    total = {}
    def outputs(run):
        kept = {}
        def keep(i): return lambda module, args, result: kept.setdefault(i, result.clone())
        handles = [layer.mlp.register_forward_hook(keep(i)) for i, layer in enumerate(model.model.layers)]
        try: return run(), kept
        finally:
            for handle in handles: handle.remove()
    embed = model.get_input_embeddings()
    for clean, corrupt, right, wrong in prompts():
        with torch.no_grad(): (_, ran), (_, closed) = (outputs(lambda ids=ids: model(input_ids=ids)) for ids in (clean, corrupt))
        for point in (1 / 6, 3 / 6, 5 / 6):
            embeddings = ((1 - point) * embed(corrupt) + point * embed(clean)).detach().requires_grad_()
            out, values = outputs(lambda: model(inputs_embeds=embeddings))
            for i, g in zip(values, torch.autograd.grad(worth(out.logits, right, wrong), [*values.values()])):
                total[i] = total.get(i, 0) + (g * (ran[i] - closed[i])).sum() / 9
    same({"mlp": found}, {"mlp": torch.stack([total[i] for i in range(len(total))])})


def test_what_cannot_be_done_is_refused():
    model = tiny("llama")
    with pytest.raises(InputError, match="clean ones"): attribute(model, pairs(), "inputs", ablation="zero")
    with pytest.raises(InputError, match="no slope"): attribute(model, pairs(), "gim", "kl")
    with gim(model), pytest.raises(InputError, match="already"): attribute(model, pairs(), "gim")
    def plain(module, query, key, value, attention_mask, scaling, dropout=0., **named):
        k, v = (t.repeat_interleave(module.num_key_value_groups, 1) for t in (key, value))
        scores = (query @ k.mT * scaling + attention_mask).exp()
        return (scores / (scores.sum(-1, keepdim=True) + 1e-30) @ v).transpose(1, 2), None
    AttentionInterface.register("plain", plain)
    AttentionMaskInterface.register("plain", AttentionMaskInterface()["eager"])
    try:
        model.set_attn_implementation("plain")
        assert attribute(model, pairs(), "gradient")["mlp_neuron"].any()
        with pytest.raises(InputError, match="eager"): attribute(model, pairs(), "gim")
    finally:
        for registry in (AttentionInterface, AttentionMaskInterface): registry._global_mapping.pop("plain")
