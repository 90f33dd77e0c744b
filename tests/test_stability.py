"""Several circuits of one behaviour: shares, the circuits made of them, ties, agreement beside chance, and what is refused."""
from dataclasses import replace

import pytest
import torch

from mgprune import tasks
from mgprune.circuit import Circuit, from_kept, from_scores, full_circuit, jaccard
from mgprune.evaluation import cut_by_size, cuts, evaluate
from mgprune.gates import HardConcrete, Sigmoid
from mgprune.many import arguments_of, named
from mgprune.models import InputError
from mgprune.recipe import Asked, Goal, Recipe
from mgprune.resume import begin, depends_on
from mgprune.search import Search, step
from mgprune.sites import find_sites
from mgprune.stability import Consensus, by_chance, consensus, rank, ranks
from mgprune.streams import prepare
from mgprune.training import discover
from mgprune.tree import DEFAULT_LEVELS, level_shapes


@pytest.fixture(scope="module")
def sites(model):
    return find_sites(model)


def ranked(sites, seed, share=.2):
    "A circuit of random scores at the default levels, such as a search leaves it"
    noise = torch.Generator().manual_seed(seed)
    scores = {l: torch.randn(shape, generator=noise) + 2 * (l in ("block", "mlp")) for l, shape in level_shapes(sites).items()}
    return from_scores(scores, sites, cut_by_size(scores, sites, share), dict(task="ioi", seed=seed, ablation="corrupt"))


def test_shares_are_counts_over_the_number_of_circuits(sites):
    circuits = [ranked(sites, seed) for seed in range(3)]
    found = consensus(iter(circuits))
    assert isinstance(found, Consensus) and found.circuits == tuple(circuits)
    for place in [(0, 0), (1, 17), (3, 511)]:
        by_hand = sum(bool(c.kept["mlp_neuron"][place]) for c in circuits) / 3
        assert found.shares["mlp_neuron"][place].item() == pytest.approx(by_hand)
    with pytest.raises(AttributeError): found.shares = {}


@pytest.mark.parametrize("n", [2, 3, 7, 10])
def test_a_cut_keeps_the_neurons_of_its_share(sites, n):
    circuits = [ranked(sites, seed, .3) for seed in range(n)]
    found = consensus(circuits)
    for times in range(1, n + 1):
        kept = found.circuit(times / n).kept  # three of seven is no exact number
        for level in ("attention_neuron", "mlp_neuron"):
            assert kept[level].equal(sum(c.kept[level].int() for c in circuits) >= times)
        for level in kept: assert (kept[level] <= (found.shares[level] >= times / n - 1e-6)).all()


def test_more_circuits_come_before_a_higher_rank(sites):
    circuits = [ranked(sites, seed, .4) for seed in range(4)]
    found = consensus(circuits)
    share, score = (torch.cat([values[l].flatten() for l in found.scores]) for values in (found.shares, found.scores))
    mean = torch.stack([torch.cat([r.flatten() for r in ranks(c).values()]) for c in circuits]).mean(0)
    order = score.argsort(descending=True).tolist()
    pairs = [(round(share[i].item() * 4), mean[i].item()) for i in order]
    assert all(a[0] > b[0] or a[0] == b[0] and a[1] >= b[1] - 1e-12 for a, b in zip(pairs, pairs[1:]))
    assert cuts(found.scores, sites).unique().numel() > 1000  # few ties are left


def test_ranks_are_the_share_below(sites):
    noise = torch.Generator().manual_seed(0)
    values = torch.randint(0, 20, (200,), generator=noise).double()
    slow = [((values < v).sum() + (values == v).sum() / 2) / 200 for v in values]
    assert torch.allclose(rank(values), torch.stack(slow).to(rank(values)))
    assert all((r == .5).all() for r in ranks(full_circuit(sites)).values())  # nothing was scored
    circuit = ranked(sites, 0)
    least = min(ranks(circuit)[l][k].min() for l, k in circuit.kept.items() if l in ranks(circuit))
    assert least > max(ranks(circuit)[l][~k].max() for l, k in circuit.kept.items() if l in ranks(circuit))


def test_circuits_of_heads_alone_have_a_consensus(sites):
    def of_heads(seed):
        scores = dict(head=torch.randn(4, 4, generator=torch.Generator().manual_seed(seed)))
        return from_scores(scores, sites)
    found = consensus([of_heads(seed) for seed in range(3)])
    assert found.table().loc["mlp_neuron", "core"] == found.table().loc["mlp_neuron", "nodes"]  # none was searched
    assert set(found.circuit(.6).heads()) == {h for h in full_circuit(sites).heads() if found.shares["head"][h] > .6}


def test_the_table_counts_every_kept_node_once(sites):
    circuits = [ranked(sites, seed) for seed in range(5)]
    found = consensus(circuits)
    count = sum(c.kept["mlp_neuron"].int() for c in circuits)
    def row(few): return found.table(few).loc["mlp_neuron"]
    for few, most in ((.25, 1), (.05, 1), (.4, 2), (1., 4)):
        assert row(few).noise == ((count > 0) & (count <= most)).sum() and row(few).core == (count == 5).sum()
        assert row(few)[["core", "contingent", "noise"]].sum() == (count > 0).sum()
    pairs = found.pairs()
    assert len(pairs) == 10 * len(found.shares)
    first = pairs.query("first == 0 and second == 1").set_index("level")
    assert first.jaccard.to_dict() == jaccard(*circuits[:2]) and first.chance.to_dict() == by_chance(*circuits[:2])
    assert row(.25).jaccard == pytest.approx(pairs.query("level == 'mlp_neuron'").jaccard.mean())


def test_chance_is_the_closed_form_and_what_random_sets_give(sites):
    noise = torch.Generator().manual_seed(1)
    def drawn(k): return from_kept(dict(mlp_neuron=(torch.randperm(2048, generator=noise) < k).view(4, 512)), sites)
    for k in (50, 500, 1500):
        two = [(drawn(k), drawn(k)) for _ in range(30)]
        expected = by_chance(*two[0])["mlp_neuron"]
        assert expected == pytest.approx(k / (2 * 2048 - k))
        assert sum(jaccard(*t)["mlp_neuron"] for t in two) / 30 == pytest.approx(expected, abs=.01)
    assert by_chance(drawn(0), drawn(0))["mlp_neuron"] == 1 and by_chance(drawn(0), drawn(9))["mlp_neuron"] == 0


def test_what_all_circuits_say_of_themselves_is_kept(sites, tmp_path):
    a, b = ranked(sites, 0), ranked(sites, 1)
    about = consensus([a, b]).circuit(.5).provenance
    assert about.task == "ioi" and about.ablation == "corrupt" and about.seed is None
    assert about["consensus"] == dict(circuits=2, seeds=[0, 1], least=.5)
    other = replace(b, provenance=dict(task="ioi", seed=1, ablation="mean"))
    mixed = consensus([a, other]).circuit(1.)
    assert mixed.provenance.ablation == "corrupt and mean"  # which no measure takes: it has to be said
    assert Circuit.load(mixed.save(tmp_path / "both.json")) == mixed


def test_a_consensus_is_cut_and_measured_like_any_circuit(model, sites):
    found = consensus([ranked(sites, seed, .8) for seed in range(3)])
    some = prepare(model, tasks.ioi(model, n=(8, 32, 8)), "valid")
    cut = found.cut(some, "50%")
    measures = evaluate(cut, model, some)
    assert measures["kl"] <= .5 * measures["closed_kl"] and cut.provenance["consensus"]["kl"] == "50%"
    lowest_kept, highest_left = found.scores["mlp_neuron"][cut.kept["mlp_neuron"]], found.scores["mlp_neuron"][~cut.kept["mlp_neuron"]]
    assert not len(lowest_kept) or not len(highest_left) or lowest_kept.min() > highest_left.max()


def test_what_is_no_set_of_circuits_of_one_model_is_refused(sites):
    a, b = ranked(sites, 0), ranked(sites, 1)
    def known(circuit, by): return replace(circuit, provenance=dict(fingerprint=by))
    outputs = from_kept(dict(mlp_output=torch.ones(level_shapes(sites, ["mlp_output"])["mlp_output"], dtype=torch.bool)), sites)
    for wrong, says in (([], "has 0"), ([a], "has 1: expected two or more"), ([a, None], r"circuits\[1\]=None: expected a Circuit"),
                        ([a, full_circuit(replace(sites, mlp_width=9))], "different shape"), ([a, outputs], "different levels"),
                        ([known(a, "1"), known(b, "2")], "fingerprints 1, 2"), (a, "a list of circuits")):
        with pytest.raises(InputError, match=says): consensus(wrong)
    assert len(consensus([known(a, "1"), b]).circuits) == 2  # one does not say which model it is of
    for least in (0, 1.5, "half"):
        with pytest.raises(InputError, match="least="): consensus([a, b]).circuit(least)


@pytest.mark.parametrize("gate", [Sigmoid(), HardConcrete()], ids=["sigmoid", "hard concrete"])
def test_a_price_of_nothing_changes_no_search_and_a_high_one_does(model, sites, gate):
    examples, given = prepare(model, tasks.ioi(model, n=(16, 8, 8)), "train"), ranked(sites, 0)
    def after(price, away):
        search = Search(examples, Goal(kl=.1), DEFAULT_LEVELS, Recipe(away_price=price), gate, away=away)
        for _ in range(4): step(search)
        return search.ways.part(search.scores.detach())["mlp_neuron"]
    plain, free, dear = after(3., None), after(0., given), after(30., given)
    assert plain.equal(free)
    kept = given.kept["mlp_neuron"]
    assert (dear - plain)[kept].mean() < (dear - plain)[~kept].mean()


def test_a_search_away_from_a_circuit_says_so_and_is_another_search(model, sites):
    task, given, other = tasks.ioi(model, n=(32, 16, 8)), ranked(sites, 0), ranked(sites, 1)
    quick = Recipe(steps=3, confidence=None, trim=False)
    with pytest.warns(UserWarning): found = discover(model, task, keep=.2, recipe=quick, away=given, progress=False)
    assert found.provenance.settings["away"]["neurons"] == given.n_neurons() and found.provenance.settings["recipe"]["away_price"] == 3
    asked = Asked(Goal(keep=.2), DEFAULT_LEVELS, "corrupt", 0, quick, Sigmoid())
    known = [depends_on(begin(model, task, replace(asked, away=away))) for away in (None, given, other)]
    assert known[0] != known[1] != known[2] and "away.digest" in known[1] and "away.digest" not in known[0]
    jobs = named([arguments_of(dict(model=model, task=task, keep=.2, away=away), 0) for away in (None, given, other, given)])
    assert len({job.name for job in jobs}) == 3 and jobs[1].name == jobs[3].name


def test_a_circuit_to_stay_away_from_must_be_of_the_model(model, sites):
    task = tasks.ioi(model, n=(16, 8, 8))
    elsewhere = replace(ranked(sites, 0), provenance=dict(fingerprint="other"))
    for wrong, goal, says in ((elsewhere, dict(kl=.1), "away: .*fingerprint other"), ("ioi.json", dict(kl=.1), "away='ioi.json'"),
                              (full_circuit(replace(sites, mlp_width=9)), dict(kl=.1), "away: "),
                              (ranked(sites, 0), dict(penalties=dict(head=.1)), "away: .*Give kl or keep")):
        with pytest.raises(InputError, match=says):
            discover(model, task, **goal, recipe=Recipe(steps=2, confidence=None), away=wrong, progress=False)
