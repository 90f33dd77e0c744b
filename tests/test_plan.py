"""What a search is said to take, beside what it takes: bytes as autograd and the recordings have them."""
import warnings
import weakref
from dataclasses import replace

import pytest
import torch

from families import TINY, Pairs, tiny
from mgprune import discover, evaluate, load_model, plan, tasks
from mgprune.ablations import ABLATIONS, hold
from mgprune.checks import trusted, verify
from mgprune.circuit import full_circuit
from mgprune.compact import blended
from mgprune.gates import HardConcrete, Sigmoid
from mgprune.models import InputError, frozen
from mgprune.passes import free_bytes, kept_for_return, nbytes
from mgprune.planning import check_plan, in_words, tried
from mgprune.recipe import Asked, Goal, Recipe
from mgprune.search import Search, next_size, slopes, step
from mgprune.sites import find_sites
from mgprune.streams import MOST_KEPT, bind, prepare, reference_of, room
from mgprune.tree import DEFAULT_LEVELS

SMALL = Recipe(steps=30, batch_size=16, pairs=24, confidence=None)


@pytest.fixture(scope="module")
def task(model):
    return tasks.ioi(model, n=(48, 12, 20))


class Many(Pairs):
    "The same pairs again and again"
    train = valid = test = (None,) * 30
    def batch(self, split): return super().batch(split)[list(range(6)) * 5]


def kept_in_steps(model, task, recipe):
    "The most that autograd keeps for the way back in the steps of a search"
    examples = prepare(model, task.batch("train")[:recipe.pairs])
    search, most = Search(examples, Goal(kl=.1), DEFAULT_LEVELS, recipe), 0
    with torch.enable_grad(), frozen(model):
        while search.steps < recipe.steps:
            most = max(most, kept_for_return(examples.host, lambda: step(search), examples.held.recording))
    return most


def test_the_parts_add_up(model, task):
    p = plan(model, task, recipe=SMALL)
    assert p.weights == sum({t.untyped_storage().data_ptr(): t.nbytes for t in model.parameters()}.values())
    during, later = p.recorded + p.answers + max(p.passes, p.gates + p.step), p.held_out + p.passes
    assert p.memory == p.weights + max(during, later) and p.seconds == p.preparing + p.stepping + p.cutting
    assert p.kept and p.at_once == 16 and min(p.preparing, p.stepping, p.cutting) > 0
    for said in ("weights", "recorded values, kept", "a step, 16 pairs at once", "memory at its peak", "time in sum"): assert said in repr(p)
    assert p.line.startswith(f"about {in_words(p.memory)} of memory")


def test_a_step_keeps_what_was_said(model, task):
    long = replace(SMALL, steps=100)  # in which nodes are shut
    said, found = plan(model, task, recipe=long).step, kept_in_steps(model, task, long)
    assert abs(said - found) < .2 * found


@pytest.mark.parametrize("kind", ["gpt2", "llama", "gpt_neox", "qwen2_moe"])
def test_a_step_of_a_tiny_model_keeps_what_was_said(kind):
    model, recipe = tiny(kind), Recipe(steps=20, batch_size=24, pairs=30, confidence=None)
    said, found = plan(model, Many(), recipe=recipe).step, kept_in_steps(model, Many(), recipe)
    assert abs(said - found) < .2 * found


@pytest.mark.parametrize("ablation", ABLATIONS)
def test_recorded_values_take_what_was_said(ablation, model, task):
    host, reference = trusted(model), reference_of(model, task, None)
    said = plan(model, task, ablation=ablation, recipe=SMALL)
    def bound(split, most=None, closed=True): return bind(host, task.batch(split)[:most], ABLATIONS[ablation], reference, closed=closed)
    train, later = bound("train", SMALL.pairs), [bound("valid", closed=False), bound("test")]
    assert said.recorded == nbytes(train.held.recording) and said.answers == train.full.nbytes + train.closed.nbytes
    assert said.held_out == max(nbytes(x.held.recording) + sum(t.nbytes for t in (x.full, x.closed) if t is not None) for x in later)


@pytest.mark.parametrize("ablation", ["corrupt", "zero", "mean"])
@pytest.mark.parametrize("kind", [k for k, options in TINY.items() if "num_experts_per_tok" in options])
def test_mixtures_are_planned(kind, ablation):
    model, recipe = tiny(kind), Recipe(steps=3, batch_size=3, confidence=None)
    reference = Pairs().batch("train")
    said = plan(model, Pairs(), keep=.3, recipe=recipe, ablation=ablation)
    assert said.recorded == nbytes(bind(trusted(model), reference, ABLATIONS[ablation], reference).held.recording)


@pytest.mark.parametrize("asked", [dict(keep=.1), dict(keep=[.1, .3]), dict(penalties={"mlp_neuron": .1}), dict(gate=HardConcrete()),
                                   dict(levels=("head", "mlp")), dict(levels=("mlp_output", *DEFAULT_LEVELS))], ids=str)
def test_whatever_is_asked_for_is_planned(asked, model, task):
    assert plan(model, task, recipe=SMALL, **asked).step > 0


def test_half_precision_halves_what_depends_on_it(model, task):
    whole, half = (plan(m, task, recipe=SMALL) for m in (model, load_model(dtype=torch.bfloat16)))
    assert half.weights == whole.weights // 2 and half.recorded == whole.recorded // 2 and half.answers == whole.answers


def test_planning_changes_nothing(model, task):
    torch.manual_seed(0)
    first = discover(model, task, keep=.2, recipe=SMALL, progress=False)
    torch.manual_seed(0)
    plan(model, task, recipe=SMALL)
    drawn = torch.rand(1)
    assert torch.equal(drawn, torch.rand(1, generator=torch.Generator().manual_seed(0)))
    assert first == discover(model, task, keep=.2, recipe=SMALL, progress=True)


def test_it_is_said_before_the_search(model, task, capsys):
    discover(model, task, keep=.2, recipe=SMALL)
    said = capsys.readouterr().out.splitlines()
    assert "the full model is correct" in said[0]
    assert said[1].startswith("the search takes about ") and said[1].endswith("seconds")


# --- without weights

@pytest.mark.parametrize("asked", [dict(kl=.1), dict(keep=[.1, .3]), dict(ablation="mean"), dict(ablation="mean_by_position"), dict(levels=("head", "mlp")),
                                   dict(over="answers", kl="10%")], ids=str)
def test_memory_is_counted_without_weights(asked, model, task):
    tried, empty = (plan(m, task, recipe=SMALL, **asked) for m in (model, load_model(device="meta")))
    for part in ("weights", "answers", "gates", "kept", "at_once"): assert getattr(empty, part) == getattr(tried, part), part
    assert tried.recorded <= empty.recorded <= tried.recorded + 3e5 and tried.held_out <= empty.held_out <= tried.held_out + 3e5  # means may be over positions, too
    assert empty.step >= tried.step and empty.memory > 0 and "seconds" not in repr(empty) + empty.line


def test_without_weights_dtype_and_checkpointing_count(model, task):
    whole, half = (plan(load_model(device="meta", dtype=d), task, recipe=SMALL) for d in ("float32", "bfloat16"))
    assert half.weights == whole.weights // 2 and half.recorded == whole.recorded // 2
    again = plan(load_model(device="meta"), task, recipe=replace(SMALL, gradient_checkpointing=True))
    assert again.step < whole.step / 2


@pytest.mark.parametrize("kind", ["llama", "gpt_neox", "qwen2_moe"])
def test_other_architectures_are_counted_without_weights(kind):
    recipe = Recipe(steps=3, batch_size=3, confidence=None)
    tried, empty = (plan(m, Many(), keep=.3, recipe=recipe) for m in (tiny(kind), tiny(kind).to("meta")))
    assert (empty.weights, empty.answers, empty.gates) == (tried.weights, tried.answers, tried.gates) and empty.recorded >= .9 * tried.recorded


def test_a_model_without_weights_is_planned_with_and_not_run(model, task):
    empty = load_model(device="meta")
    for run in (lambda: discover(empty, task), lambda: evaluate(full_circuit(find_sites(model)), empty, task), lambda: verify(empty)):
        with pytest.raises(InputError, match="has no weights, only their shapes"): run()


# --- little memory

def test_what_fits_is_a_part_of_what_is_free(model, monkeypatch):
    for free, most in ((1000, 250), (1 << 60, MOST_KEPT)):
        monkeypatch.setattr("mgprune.streams.free_bytes", lambda device: free)
        assert room("cpu") == most
    assert free_bytes("cpu") > 0


def test_a_search_that_records_anew_finds_the_same(model, task, monkeypatch):
    kept = discover(model, task, keep=.2, recipe=SMALL, progress=False)
    monkeypatch.setattr("mgprune.streams.free_bytes", lambda device: 1)
    said = plan(model, task, keep=.2, recipe=SMALL)
    anew = discover(model, task, keep=.2, recipe=SMALL, progress=False)
    first = hold(trusted(model), task.batch("train")[:SMALL.batch_size], ABLATIONS["corrupt"], None, False)
    assert not said.kept and said.recorded == nbytes(replace(first.recording, logits=None))
    for level, scores in kept.scores.items(): assert torch.allclose(scores, anew.scores[level], atol=1e-2)


@pytest.mark.parametrize("gate", [Sigmoid(), HardConcrete()], ids=lambda g: type(g).__name__)
def test_a_step_in_parts_is_the_same_step(gate, model, task):
    examples = prepare(model, task.batch("train"))
    def slope(at_once):
        search = tried(examples, Asked(Goal(kl=.1), DEFAULT_LEVELS, None, 0, SMALL, gate), .3)
        search.at_once = at_once
        with torch.enable_grad(), frozen(model): kl, _ = slopes(search, next_size(search))
        return kl, search.scores.grad, search.felt
    whole, parts = slope(32), slope(9)
    assert whole[0] > .1 and torch.equal(whole[2], parts[2]) and torch.allclose(whole[0], parts[0], rtol=1e-4)
    assert torch.allclose(whole[1], parts[1], atol=1e-4 * whole[1].abs().max().item())


def test_a_step_goes_in_parts_where_memory_is_short(model, task, monkeypatch):
    examples = prepare(model, task.batch("train"))
    monkeypatch.setattr("mgprune.passes.free_bytes", lambda device: 1)
    search = Search(examples, Goal(kl=.1), DEFAULT_LEVELS, SMALL)
    assert search.at_once == 1
    assert plan(model, task, recipe=SMALL).at_once == 1


def test_what_goes_through_a_site_is_made_again_rather_than_kept():
    first, second, mask = (torch.rand(2, n, 8, requires_grad=True) for n in (6, 6, 1))
    x = first * second
    kept = weakref.ref(x)
    result = blended(x, mask, lambda: torch.zeros(2, 6, 8))
    del x
    assert kept() is None
    slopes = torch.autograd.grad(result.sum(), (first, mask))
    assert torch.allclose(slopes[0], mask * second) and torch.allclose(slopes[1], (first * second).sum(1, keepdim=True))


# --- warnings

def test_a_small_search_is_not_warned_about(model, task):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_plan(plan(model, task, recipe=SMALL), SMALL)


@pytest.mark.parametrize("part, says", [("recorded", "pairs=24"), ("answers", "pairs=24"), ("step", "batch_size=16"), ("passes", "prompts"),
                                        ("held_out", "fewer")])
def test_a_large_search_is_warned_about(part, says, model, task):
    large = replace(plan(model, task, recipe=SMALL), **{part: 5 << 30})
    with pytest.warns(UserWarning, match=says): check_plan(large, SMALL)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_plan(replace(large, weights=6 << 30), SMALL)


def test_what_is_asked_for_is_looked_at(model, task):
    with pytest.raises(InputError): plan(model, task, kl=.1, keep=.2)
    with pytest.raises(InputError): plan(model, task, ablation="nothing")
