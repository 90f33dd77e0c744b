"""On a second device everything comes out as on the CPU, and no tensor is left behind: what a GPU would refuse is refused."""
from dataclasses import replace

import pytest
import torch

from far_device import far_device, is_far, moved
from families import Pairs, holds, pairs, short_search, tiny
from mgprune import discover, evaluate
from mgprune.attribution import activation_difference, attribute
from mgprune.circuit import from_kept, from_scores, full_circuit
from mgprune.edge_pass import edge_logits, edge_scores
from mgprune.edge_search import edges
from mgprune.necessity import necessity
from mgprune.passes import open_at
from mgprune.recipe import Recipe
from mgprune.sites import find_sites
from mgprune.streams import prepare
from mgprune.trimming import trimmed
from mgprune.tree import level_shapes
from test_attribution import METHODS
from test_compact import random_masks

pytestmark = pytest.mark.filterwarnings("ignore")  # a random model is right on few pairs
QUICK = Recipe(steps=12, confidence=None, batch_size=3)
CLOSE = dict(rtol=1e-4, atol=1e-4)  # it normalises and attends in another order of operations


@pytest.fixture(scope="module", autouse=True)
def far():
    with far_device(): yield


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def models(request, far):
    "The same model on the CPU and on the device"
    return tiny(request.param), moved(tiny(request.param))


def circuit_of(model, share=.4):
    "A circuit by chance, the same for the same model"
    sites, draw = prepare(model, pairs()).sites, torch.Generator().manual_seed(2)
    return from_scores({l: torch.rand(s, generator=draw) for l, s in level_shapes(sites).items()}, sites, 1 - share)


def alike(one, other):
    "Assert that two results are the same: tensors, wherever they are, and numbers, in whatever holds them"
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one: alike(one[key], other[key])
    elif torch.is_tensor(one): torch.testing.assert_close(other.cpu(), one.cpu(), **CLOSE)
    else: assert other == (pytest.approx(one, rel=1e-3, abs=1e-4) if isinstance(one, float) else one)


def on_both(models, f):
    "What a function gives on the device, which is what it gives on the CPU"
    one, other = map(f, models)
    alike(one, other)
    return other


# --- the device

here, three = torch.arange(12.).view(3, 4), torch.tensor([0, 2])


@pytest.mark.parametrize("use", [
    lambda there: there + here, lambda there: here * there, lambda there: there @ here.T, lambda there: torch.cat([there, here]),
    lambda there: there.index_select(0, three), lambda there: torch.nn.functional.embedding(three, there),
    lambda there: torch.where(here > 3, there, 0.), lambda there: there.masked_fill(here > 3, 0.), lambda there: torch.lerp(there, there, here),
    lambda there: here[three.to("far")], lambda there: here.index_put_((three,), there[:2]), lambda there: torch.zeros(()).add_(there.sum()),
    lambda there: torch.rand(3, device="far", generator=torch.Generator()), lambda there: there.numpy(),
])
def test_several_devices_are_refused(use):
    with pytest.raises((RuntimeError, TypeError), match="same device|device type"): use(here.to("far"))


def test_what_a_gpu_takes_is_computed():
    there = here.to("far")
    for given, wanted in [
        (there + torch.tensor(2.), here + 2), (there[three], here[three]), (there[here > 3], here[here > 3]), (there[1:, 2].sum(), here[1:, 2].sum()),
        (torch.empty(3, 4, device="far").copy_(here), here), (torch.empty(3, 4).copy_(there), here), (there.to(torch.double), here.double()),
        (torch.arange(3, device="far").topk(2).values, torch.tensor([2, 1]))]: alike(wanted, given)
    row = there.clone()[1]
    changed = row.view(2, 2)
    changed[0] += torch.tensor(1.)  # a view shares what it is of
    changed[torch.tensor([1])] = torch.tensor(5.)
    assert is_far(row) and row.tolist() == [5., 6., 5., 5.] and there[1].tolist() == [4., 5., 6., 7.]


def test_a_model_and_its_slopes(models):
    def run(model):
        batch = pairs().to(model.device)
        out = model(input_ids=batch.clean, attention_mask=batch.attention_mask).logits
        slopes = torch.autograd.grad(out.log_softmax(-1)[:, -1, 3].sum(), [*model.parameters()])
        assert {t.device for t in (out, *slopes)} == {model.device}
        return dict(enumerate((out, *slopes)))
    on_both(models, run)


# --- what is done on it

def test_masks_hold_nothing_back(models):
    assert is_far(prepare(models[1], pairs()).full)
    holds(models[1])
    on_both(models, lambda model: dict(enumerate(filter(torch.is_tensor, (prepare(model, pairs()).full, prepare(model, pairs()).closed)))))


def test_a_compacted_pass(models):
    def run(model):
        examples, draw, found = prepare(model, pairs()), torch.Generator().manual_seed(1), {}
        for share in (.2, .6):
            masks = random_masks(examples.sites, share, draw).to(model.device)
            assert len(open_at(examples.host, masks)) == 4
            found[share] = examples.logits(masks)
        return found
    on_both(models, run)


def test_a_search(models):
    for asked in (dict(keep=.3), dict(kl="30%")):
        one, other = (discover(model, Pairs(), **asked, recipe=QUICK, progress=False) for model in models)
        assert one == other and all(s.device.type == "cpu" for s in other.scores.values())
        alike(one.provenance["metrics"], other.provenance["metrics"])


@pytest.mark.parametrize("method", METHODS)
def test_attribution(models, method):
    on_both(models, lambda model: attribute(model, pairs(), method))


def test_what_is_done_with_a_circuit(models):
    circuit = circuit_of(models[0])
    on_both(models, lambda model: activation_difference(model, pairs()))
    on_both(models, lambda model: dict(evaluate(circuit, model, pairs())))
    on_both(models, lambda model: trimmed(circuit, prepare(model, pairs()), 1.).kept)
    on_both(models, lambda model: necessity(circuit, model, pairs(), draws=2, steps=2, tries=2, progress=False).minimality.to_dict())


def test_edges(models):
    circuit, few = circuit_of(models[0]), {level: of.clone() for level, of in full_circuit(find_sites(models[0])).kept.items()}
    few["head"][:, 1:] = False
    few = from_kept(few, find_sites(models[0]))  # a search closes one edge after another
    def run(model):
        slopes = edge_scores(circuit, model, pairs(), 1)
        drawn = torch.rand(slopes.shape, generator=torch.Generator().manual_seed(3)).to(slopes.device)
        graph = edges(few, model, Pairs(), recipe=replace(QUICK, steps=3))
        return dict(slopes=slopes, logits=edge_logits(circuit, model, pairs(), drawn), kept=graph.kept, scores=graph.scores)
    assert on_both(models, run)["slopes"].any()


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("first, last", [("far", "cpu"), ("cpu", "far")])
def test_a_model_on_two_devices(kind, first, last):
    accelerate = pytest.importorskip("accelerate")
    here, sites = tiny(kind), find_sites(tiny(kind))
    base, words = here.base_model_prefix, "wte" if kind == "gpt2" else "embed_tokens"
    places = {f"{base}.{name}": first if name == words else last for name, _ in getattr(here, base).named_children() if name not in ("h", "layers")}
    places |= {sites.layers[0]: first, sites.layers[1]: last, "lm_head": first if kind == "gpt2" else last}  # whose weight is that of the words
    there = accelerate.dispatch_model(tiny(kind), places, main_device="cpu")
    assert {p.device.type for p in there.parameters()} == {"cpu", "far"}
    models = here, there
    holds(there)
    assert short_search(there) == short_search(here)
    on_both(models, lambda model: activation_difference(model, pairs()))
    for ablation in ("corrupt", "zero"):
        on_both(models, lambda model: prepare(model, pairs(), ablation=ablation).logits(circuit_of(here).masks().to(model.device)))
