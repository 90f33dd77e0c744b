"""With gradient checkpointing slopes are those without, less is kept for them, and the model leaves as it came."""
import pytest
import torch

from families import pairs, tiny
from mgprune import discover, load_model, tasks
from mgprune.ablations import ABLATIONS, hold
from mgprune.checks import trusted
from mgprune.models import frozen
from mgprune.passes import circuit_logits, kept_for_return, open_at, projected
from mgprune.recipe import Recipe
from mgprune.tree import SiteMasks
from test_compact import random_masks, state


def held_for(model):
    "Host, pairs and what ablated nodes hold for them"
    host, batch = trusted(model), pairs()
    return host, batch, projected(host, hold(host, batch, ABLATIONS["corrupt"], None, False).over(batch.clean.shape[1]))


@pytest.mark.parametrize("kind", ["llama", "gpt_neox", "falcon", "bloom", "qwen2_moe", "deepseek_v3"])
def test_slopes_are_those_without(kind):
    model = tiny(kind)
    host, batch, held = held_for(model)
    masks, before = random_masks(host.sites, .4, torch.Generator().manual_seed(0)), state(model)
    asking = SiteMasks(*((.3 + m / 2).requires_grad_() for m in masks[:2]))
    for only in ({}, open_at(host, masks)):
        with frozen(model):
            once, twice = (torch.autograd.grad(circuit_logits(host, batch, asking, held, only, again)[:, 5].sum(), asking[:2]) for again in (False, True))
        for a, b in zip(once, twice): assert torch.allclose(a, b, rtol=1e-5, atol=1e-5 * float(a.abs().max()))
    assert str(state(model)) == str(before)


def test_what_is_outside_of_blocks_alone_is_kept():
    model = tiny("llama")
    host, batch, held = held_for(model)
    masks = SiteMasks(*(torch.rand_like(m).requires_grad_() for m in random_masks(host.sites, .4, torch.Generator().manual_seed(0))[:2]))
    def kept(again): return kept_for_return(host, lambda: circuit_logits(host, batch, masks, held, {}, again), held)
    with frozen(model): assert kept(True) < kept(False) / 3


def test_an_interrupt_on_the_way_back_leaves_the_model_as_it_came():
    model = tiny("llama")
    host, batch, held = held_for(model)
    masks, before, runs = SiteMasks(*(m.requires_grad_() for m in random_masks(host.sites, .4, torch.Generator().manual_seed(0))[:2])), state(model), []
    def second_time(module, args):
        runs.append(module)
        if len(runs) > 1: raise KeyboardInterrupt
    with frozen(model):
        handle = model.model.layers[0].self_attn.register_forward_pre_hook(second_time)
        answer = circuit_logits(host, batch, masks, held, {}, True)
        with pytest.raises(KeyboardInterrupt): torch.autograd.grad(answer.sum(), masks[:2])
        handle.remove()
    assert str(state(model)) == str(before) and not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


def test_a_search_finds_the_same():
    model = load_model()
    task = tasks.ioi(model, n=(32, 64, 16))
    def found(again): return discover(model, task, kl=.5, recipe=Recipe(steps=20, gradient_checkpointing=again), progress=False)
    once, twice = found(False), found(True)
    assert once == twice and all(torch.equal(once.scores[l], twice.scores[l]) for l in once.scores)
