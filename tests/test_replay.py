"""What a GPU records of a step is used as if it had run: here with a stand-in, and on a GPU where there is one."""
import pytest
import torch

import mgprune.search
from families import pairs, tiny
from mgprune.checks import learn_layout, trusted
from mgprune.compact import LAYOUTS
from mgprune.hooks import Host
from mgprune.models import frozen
from mgprune.passes import Replayed, replayed
from mgprune.recipe import Goal, Recipe
from mgprune.search import Search, step
from mgprune.streams import prepare
from mgprune.tree import DEFAULT_LEVELS

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
STEPS = 25


def searched(model, recording=None, monkeypatch=None):
    "A search after some steps, with a stand-in for `replayed` if one is given"
    search = Search(prepare(model, pairs(), closed=False), Goal(kl=.1), DEFAULT_LEVELS, Recipe(batch_size=2, steps=50))
    search.period = 10  # as on an accelerator
    if recording:
        search.recorded = {}
        monkeypatch.setattr(mgprune.search, "replayed", recording)
    with frozen(model), torch.enable_grad():
        for _ in range(STEPS): step(search)
    return search


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_recorded_step_is_a_step(kind, monkeypatch):
    model, asked = tiny(kind), []
    def recording(f, given, known):
        asked.append(known)
        return lambda *now: f(*now)
    trusted(model)
    plain, again = searched(model), searched(model, recording, monkeypatch)
    assert torch.allclose(plain.scores, again.scores, atol=1e-5)
    assert again.history["kl"] == pytest.approx(plain.history["kl"], rel=1e-3)
    assert asked == [False, False, True, True]  # what a step computes changes at steps 10 and 20


def test_what_cannot_be_recorded_runs_as_it_is(monkeypatch):
    model, asked = tiny("gpt2"), []
    trusted(model)
    plain, again = searched(model), searched(model, lambda *given: asked.append(given), monkeypatch)
    assert torch.allclose(plain.scores, again.scores, atol=1e-5) and len(asked) == 1 and again.recorded is None


def test_an_accelerator_computes_one_head_at_least(monkeypatch):
    model = tiny("llama")
    host = trusted(model)
    assert LAYOUTS[model].fewest == 0
    monkeypatch.setattr(Host, "device", torch.device("cuda"))
    learn_layout(host)
    assert LAYOUTS[model].fewest == 1 and all(LAYOUTS[model].attention)


@on_gpu
@pytest.mark.parametrize("kind", ["gpt2", "llama", "gpt_neox"])
def test_a_gpu_repeats_steps(kind):
    model = tiny(kind).to("cuda")
    trusted(model)
    search = Search(prepare(model, pairs().to("cuda"), closed=False), Goal(kl=.1), DEFAULT_LEVELS, Recipe(batch_size=2, steps=50))
    with frozen(model), torch.enable_grad():
        for _ in range(STEPS): step(search)
    plain = Search(search.examples, Goal(kl=.1), DEFAULT_LEVELS, Recipe(batch_size=2, steps=50))
    plain.recorded = None
    with frozen(model), torch.enable_grad():
        for _ in range(STEPS): step(plain)
    assert isinstance(search.recorded["slopes"], Replayed)
    assert search.history["kl"] == pytest.approx(plain.history["kl"], rel=1e-2)


@on_gpu
def test_what_waits_is_not_recorded():
    x, stream = torch.ones(3, device="cuda"), torch.cuda.current_stream()
    def waits(t): return t * t.sum().item(),
    assert replayed(waits, (x,), False) is None
    assert torch.cuda.current_stream() == stream and (x + 1).sum().item() == 6
    calls = []
    def changes(t): return t * len(calls.append(0) or calls),
    assert replayed(changes, (x,), False) is None
    def same(t): return t * 2,
    again = replayed(same, (x,), False)
    assert torch.equal(again(x * 5)[0], x * 10)
