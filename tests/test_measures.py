"What a circuit is worth: the fast measures equal slow and obvious ones."
import importlib
import io
import json
import math
import warnings

import numpy as np
import pytest
import torch
from scipy.stats import t as student
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from families import SPECIAL, TINY, pairs, randomise, tiny
from mgprune import evaluate, prepare, streams, tasks
from mgprune.ablations import ABLATIONS, hold, zero
from mgprune.agreement import answers_with, fitted, loss_with, under_ablations
from mgprune.attribution import attribute, random_ranking
from mgprune.circuit import from_kept, from_scores, full_circuit
from mgprune.controls import controls
from mgprune.curves import FRACTIONS, best_items, items, mib_curve, read_scores
from mgprune.evaluation import bound, by_word, cut_by_size
from mgprune.hypotheses import NO_OTHER, drawn_like, gaussian, holm, hypotheses, matched, p_at_least, p_at_most, p_equivalent, p_independent
from mgprune.models import InputError, frozen
from mgprune.necessity import complement, necessity, nodes_of, without
from mgprune.objective import kl_divergence
from mgprune.pairs import Batch
from mgprune.passes import Recording, circuit_logits
from mgprune.prompts import beginnings, by_prompt, in_levels, own_scores, silhouette
from mgprune.report import faithful, report
from mgprune.sites import find_sites
from mgprune.tree import SiteMasks, level_shapes
from mgprune.worth import difference, interval, ratio_interval, standard_error, worth


@pytest.fixture(scope="module")
def task(model): return tasks.ioi(model, n=(48, 8, 48))


@pytest.fixture(scope="module")
def examples(model, task): return prepare(model, task)


def some_circuit(sites, seed=0, share=.7):
    "Random heads and MLP neurons"
    noise = torch.Generator().manual_seed(seed)
    shapes = dict(head=(sites.n_layers, sites.n_heads), mlp_neuron=(sites.n_layers, sites.mlp_width))
    return from_kept({level: torch.rand(shape, generator=noise) < share for level, shape in shapes.items()}, sites)


# --- worth

def test_worth_equals_a_loop_over_pairs(model, examples):
    circuit = some_circuit(examples.sites)
    found = worth(circuit, model, examples, clusters=None, draws=200)
    numbers = []
    for i in range(len(examples)):
        one = examples[i]
        logits = one.logits(circuit.masks())[0]
        answer, wrong = one.batch.answer[0, 0], one.batch.wrong[0, 0]
        numbers.append([kl_divergence(one.full, logits[None]).item(), logits.softmax(-1)[answer].item(),
                        *((x[answer] - x[wrong]).item() for x in (logits, one.full[0], one.closed[0]))])
    kl, probability, c, m, e = np.array(numbers).T
    assert np.allclose(found.pairs["kl"], kl, atol=1e-4) and np.allclose(found.pairs["probability"], probability, atol=1e-5)
    assert np.isclose(found.row("kl")["value"], kl.mean(), atol=1e-5)
    assert np.isclose(found.row("kl")["error"], kl.std() / len(kl) ** .5, atol=1e-5)
    assert np.isclose(found.row("kl")["p99"], np.quantile(kl, .99), atol=1e-4)
    assert np.isclose(found.row("faithfulness")["value"], (c.mean() - e.mean()) / (m.mean() - e.mean()), atol=1e-5)
    counts = np.random.default_rng(0).multinomial(48, np.full(48, 1 / 48), size=200)
    slow = []
    for drawn in counts:
        rows = np.repeat(np.arange(48), drawn)
        slow.append((c[rows].mean() - e[rows].mean()) / (m[rows].mean() - e[rows].mean()))
    assert np.allclose([found.row("faithfulness")[k] for k in ("low", "high")], np.quantile(slow, [.025, .975]), atol=1e-4)
    assert [*found.worst(3).index] == [*np.argsort(-kl, kind="stable")[:3]]


def test_standard_error_by_groups_equals_two_loops():
    rng = np.random.default_rng(0)
    values, groups = rng.normal(size=30), rng.integers(0, 7, 30)
    total = 0.
    for i in range(30):
        for j in range(30):
            if groups[i] == groups[j]: total += (values[i] - values.mean()) * (values[j] - values.mean())
    assert np.isclose(standard_error(values, groups), total ** .5 / 30)
    assert np.isclose(standard_error(values), values.std() / 30 ** .5)


@pytest.mark.parametrize("n", [1, 3, 50])
def test_two_groups_of_equal_values_are_two_draws(n):
    values, groups = np.repeat([0., 1.], n), np.repeat([0, 1], n)
    assert round(standard_error(values, groups), 4) == .3536
    assert np.isclose(standard_error(values), .5 / (2 * n) ** .5)


def test_intervals_hold_the_truth_as_often_as_they_say():
    rng = np.random.default_rng(0)
    held = {"mean": 0, "share": 0, "ratio": 0}
    for _ in range(300):
        x = rng.normal(1, 1, 40)
        low, high = interval(x)
        held["mean"] += low <= 1 <= high
        low, high = interval(rng.random(40) < .9)
        held["share"] += low <= .9 <= high
        below = rng.exponential(2, 40)
        low, high = ratio_interval(.5 * below + rng.normal(0, .2, 40), below, draws=200)
        held["ratio"] += low <= .5 <= high
    assert all(.9 < n / 300 <= 1 for n in held.values()), held


def test_pairs_that_the_model_gets_wrong_are_a_group(model):
    pairs = tasks.ioi(model, n=(32, 8, 8)).train
    turned = [tasks.Pair(p.clean, p.corrupt, p.wrong, p.answer) if i % 4 == 0 else p for i, p in enumerate(pairs)]
    examples = prepare(model, turned)
    found = worth(some_circuit(examples.sites), model, examples)
    wrong = int((~found.pairs["full_accuracy"]).sum())
    assert 0 < wrong < len(examples) and found.row("kl", "model wrong")["pairs"] == wrong
    assert found.row("kl")["pairs"] == len(examples)


def test_difference_equals_a_loop_over_pairs_and_resamples(model, task, examples):
    first, second = some_circuit(examples.sites), some_circuit(examples.sites, seed=1)
    found = difference(first, second, model, task, clusters="giver", draws=60, seed=4)
    names = [*dict.fromkeys(sorted(repr(pair.slots["giver"]) for pair in task.test))]
    group = [names.index(repr(pair.slots["giver"])) for pair in task.test]
    values = []
    for i in range(len(examples)):
        one, row = examples[i], []
        answer, wrong = one.batch.answer[0, 0], one.batch.wrong[0, 0]
        for circuit in (first, second):
            logits = one.logits(circuit.masks())[0]
            row.append((kl_divergence(one.full, logits[None]).item(), (logits[answer] - logits[wrong]).item()))
        values.append((*row, *((l[0, answer] - l[0, wrong]).item() for l in (one.full, one.closed))))

    def of(rows):
        kl = np.mean([values[i][0][0] - values[i][1][0] for i in rows])
        a, b, m, e = (np.mean([get(values[i]) for i in rows]) for get in (lambda v: v[0][1], lambda v: v[1][1], lambda v: v[2], lambda v: v[3]))
        return dict(kl=kl, logit_difference=a - b, faithfulness=(a - e) / (m - e) - (b - e) / (m - e))

    rng, again = np.random.default_rng(4), []
    for counts in rng.multinomial(len(names), np.full(len(names), 1 / len(names)), size=60):
        again.append(of([i for g, n in enumerate(counts) for _ in range(n) for i in range(len(group)) if group[i] == g]))
    for name, value in of(range(len(values))).items():
        row = found.row(name)
        ends = np.quantile([draw[name] for draw in again], [.025, .975])
        if name != "faithfulness":  # by Student's distribution of the sums of groups, as for any mean of clusters
            each = [value - of([i])[name] for i in range(len(group))]
            sums = [sum(each[i] for i in range(len(group)) if group[i] == g) for g in range(len(names))]
            error = math.sqrt(sum(s ** 2 for s in sums)) / len(group)
            ends = value + np.array([-1, 1]) * student.ppf(.975, len(names) - 1) * error
        assert np.allclose((row["difference"], row["low"], row["high"]), (value, *ends), atol=1e-4), name
        assert row["apart"] == (ends[0] > 0 or ends[1] < 0)
    assert found.draws == len(names) and found.clusters == "giver"


def test_a_difference_needs_two_circuits_of_one_model_and_ablation(model, task, examples):
    sites = examples.sites
    circuit = some_circuit(sites)
    by_mean, by_zero = (from_kept(circuit.kept, sites, provenance=dict(ablation=name)) for name in ("mean", "zero"))
    stranger = from_kept(circuit.kept, sites, provenance=dict(model="other", fingerprint="0" * 16))
    smaller = full_circuit(find_sites(tiny("gpt2")))
    for a, b, says in ((circuit, stranger, "fingerprint"), (stranger, circuit, "fingerprint"), (circuit, smaller, "other sites"),
                       (by_mean, by_zero, "different ablations")):
        with pytest.raises(InputError, match=says): difference(a, b, model, task, draws=5)
    with pytest.raises(InputError, match="a Circuit"): difference(circuit, model, model, task)
    assert difference(by_mean, circuit, model, task, draws=5).ablation == difference(circuit, by_mean, model, task, draws=5).ablation == "mean"
    assert difference(by_mean, by_zero, model, task, ablation="zero", draws=5).row("kl")["difference"] == 0


def test_a_group_that_is_all_pairs_is_not_told_twice(model):
    pairs = tasks.ioi(model, n=(32, 8, 8)).train
    turned = [tasks.Pair(p.clean, p.corrupt, p.wrong, p.answer) for p in pairs]
    for given, share in ((pairs, 1.), (turned, 0.)):
        found = worth(some_circuit(find_sites(model)), model, given, draws=5)
        assert [*found.table["group"].unique()] == ["all"] and found.row("full_accuracy")["value"] == share
        assert "full_accuracy" in repr(found).splitlines()[-1] and "exact interval" in repr(found)


# --- under every ablation

def one_neuron():
    "A model that says the number of its last token, 0 or 2; what else is in it is for the checks that a model has to pass"
    toy = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=1, n_embd=4, n_inner=2, vocab_size=18, n_positions=64, bos_token_id=0,
                                     activation_function="linear", tie_word_embeddings=False, eos_token_id=0)).eval()
    block = toy.transformer.h[0]
    block.ln_1 = block.ln_2 = toy.transformer.ln_f = torch.nn.Identity()
    with torch.no_grad():
        for p in toy.parameters(): p.zero_()
        toy.transformer.wte.weight[:, 0] = torch.tensor([1.] * 16 + [0., 2.])
        toy.transformer.wte.weight[:, 3] = torch.arange(18) / 18
        block.mlp.c_fc.weight[0, 0] = block.mlp.c_proj.weight[0, 1] = toy.lm_head.weight[0, 1] = 1
        block.attn.c_attn.weight[3, 8] = block.attn.c_proj.weight[0, 2] = toy.lm_head.weight[5, 2] = 1
        block.mlp.c_fc.weight[2, 1] = block.mlp.c_proj.weight[1, 2] = 1
    return toy


def test_constants_are_fitted_from_a_bad_start():
    toy, i = one_neuron(), torch.arange(64)
    clean = torch.stack([i // 16, i % 16, 16 + i % 2], 1)
    right, wrong = torch.zeros(64, 1, dtype=torch.long), torch.ones(64, 1, dtype=torch.long)
    pairs = Batch(clean, torch.cat([clean[:, :2], 33 - clean[:, 2:]], 1), torch.ones_like(clean), right, wrong)
    examples = prepare(toy, pairs, ablation="zero")
    masks = from_kept({"block": torch.tensor([False])}, examples.sites).masks()
    def squared(logits, examples): return ((logits[:, 0] - logits[:, 1]) - (examples.full[:, 0] - examples.full[:, 1])) ** 2
    zeros = zero(examples.host, pairs, None, False)
    with frozen(toy):
        bare = Recording(zeros.attention, zeros.mlp)
        found = fitted(examples, masks, bare, loss_with(examples, masks, bare, squared), squared, 100, .05, 64, 0)
        assert abs(loss_with(examples, masks, bare, squared) - 2) < 1e-5
        assert abs(loss_with(examples, masks, found, squared) - 1) < .01 and abs(found.mlp[0][0, 0, 0].item() - 1) < .1


def test_constants_that_are_projected_once_answer_as_those_of_every_pair(model, task):
    examples = prepare(model, task, ablation="mean")
    masks, held = some_circuit(examples.sites).masks(), hold(examples.host, examples.batch, ABLATIONS["mean"], examples.reference, False)
    with torch.no_grad(), frozen(model):
        slow = circuit_logits(examples.host, examples.batch, masks, held.over(examples.batch.clean.shape[1]))
        assert torch.allclose(answers_with(examples, masks, held.recording), slow, atol=1e-4)


def test_each_row_is_what_evaluate_says(model, task, examples):
    circuit = some_circuit(examples.sites)
    table = under_ablations(circuit, model, task, [*ABLATIONS], draws=20).set_index("ablation")
    for name in ABLATIONS:
        alone = evaluate(circuit, model, task, name)
        for measure in ("kl", "faithfulness", "accuracy", "closed_kl"):
            assert np.isclose(table[measure][name], alone[measure], atol=1e-5), (name, measure)
    spans = [(table["faithfulness_low"][n], table["faithfulness_high"][n]) for n in ABLATIONS]
    assert table.attrs["agree"] == (max(low for low, _ in spans) <= min(high for _, high in spans))


# --- curves

@pytest.mark.parametrize("level, members", [("head", ["head"]), ("mlp", ["mlp"]), ("node", ["head", "mlp"]),
                                            ("neuron", ["attention_neuron", "mlp_neuron"]), ("mlp_output", ["mlp_output"])])
def test_curve_equals_a_loop_over_circuits(model, examples, level, members):
    noise, sites = torch.Generator().manual_seed(1), examples.sites
    scores = {l: torch.randn(shape, generator=noise) for l, shape in level_shapes(sites, members).items()}
    some = examples[:6]
    curve = mib_curve(scores, model, some, level, "absolute", draws=50)
    places = {l: map(tuple, torch.ones_like(scores[l]).nonzero().tolist()) for l in members}
    ranked = sorted(((-abs(float(scores[l][place])), l, place) for l in members for place in places[l]), key=lambda row: row[0])

    def mean_difference(chosen):
        kept = {l: torch.zeros(s.shape, dtype=torch.bool) for l, s in scores.items()}
        for _, l, place in chosen: kept[l][place] = True
        logits = some.logits(from_kept(kept, sites).masks())
        return np.mean([(row[a] - row[w]).item() for row, a, w in zip(logits, some.batch.answer[:, 0], some.batch.wrong[:, 0])])

    empty, whole, slow = mean_difference([]), mean_difference(ranked), []
    for p in FRACTIONS: slow.append((mean_difference(ranked[:int(p * len(ranked))]) - empty) / (whole - empty))
    assert np.allclose(curve.table["faithfulness"], slow, atol=1e-4)
    steps = list(zip(FRACTIONS, FRACTIONS[1:], slow, slow[1:]))
    assert np.isclose(curve.cpr, sum((q - p) * (a + b) / 2 for p, q, a, b in steps), atol=1e-4)
    assert np.isclose(curve.cmd, sum((q - p) * (abs(1 - a) + abs(1 - b)) / 2 for p, q, a, b in steps), atol=1e-4)
    assert (curve.level, curve.sign) == (level, "absolute")


def test_sign_of_a_ranking_decides(model, examples):
    against = {"head": torch.full((4, 4), -1.)}
    against["head"][0, 0] = 0
    kept = [best_items(items(against, examples.sites, "head", sign), examples.sites, 15 / 16)[0] for sign in ("signed", "absolute")]
    assert (0, 0) in kept[0].heads() and (0, 0) not in kept[1].heads()


def test_a_file_of_the_benchmark_is_read_as_it_was_written(tmp_path, model, examples):
    scores = random_ranking(model)
    path = from_scores(scores, examples.sites).write(tmp_path / "nodes.mib.json")
    curves = [mib_curve(s, model, examples[:8], "node", draws=10) for s in (scores, read_scores(path, examples.sites))]
    assert curves[0].table.equals(curves[1].table)


def test_areas_are_resampled_in_groups(model, task, examples):
    scores, pairs, examples = random_ranking(model), task.test[:12], examples[:12]
    curve = mib_curve(scores, model, pairs, "neuron", fractions=(.1, .4, 1.), clusters="giver", draws=40, seed=2)
    alone = [mib_curve(scores, model, [pair], "neuron", fractions=(.1, .4, 1.), clusters=None, draws=2) for pair in pairs]
    with torch.no_grad(): empty = examples.logits(best_items(items(scores, examples.sites, "neuron", "signed"), examples.sites, 0)[0].masks())
    nothing = [(row[a] - row[w]).item() for row, a, w in zip(empty, examples.batch.answer[:, 0], examples.batch.wrong[:, 0])]
    names = sorted({repr(pair.slots["giver"]) for pair in pairs})
    group, found = [names.index(repr(pair.slots["giver"])) for pair in pairs], []
    for counts in np.random.default_rng(2).multinomial(len(names), np.full(len(names), 1 / len(names)), size=40):
        rows = [i for i, g in enumerate(group) for _ in range(counts[g])]
        at = np.mean([alone[i].table["logit_difference"] for i in rows], 0)
        base = np.mean([nothing[i] for i in rows])
        f = (at - base) / (at[-1] - base)
        found.append(.3 * (f[0] + f[1]) / 2 + .6 * (f[1] + f[2]) / 2)
    assert np.allclose(curve.cpr_interval, np.quantile(found, [.025, .975]), atol=1e-3) and curve.clusters == "giver"
    assert np.isnan(alone[0].cpr_interval).all()  # a single pair tells nothing of others
    with pytest.raises(InputError, match="clusters='verb'"): mib_curve(scores, model, examples, clusters="verb", draws=2)


def test_a_curve_says_what_is_ranked_and_where_it_keeps_nothing(model, examples):
    some, mlps = examples[:4], dict(mlp=torch.arange(4.))
    for scores, level, called, empty in ((read_scores([(0, 1)], some.sites), "node", "head", .05), (mlps, "node", "mlp", .2),
                                         (dict(attention_neuron=torch.rand(4, 4, 32)), "neuron", "attention_neuron", .001), (random_ranking(model), "node", "node", .02)):
        curve = mib_curve(scores, model, some, level, draws=5)
        assert curve.level == called and f"by {called}, signed" in repr(curve) and f"up to {empty:g} keep nothing" in repr(curve)
    assert "keep nothing" not in repr(mib_curve(mlps, model, some, "mlp", fractions=(.25, 1.), draws=5))


def test_scores_from_elsewhere_are_read_or_refused_in_words(tmp_path, model, examples):
    sites = examples.sites
    heads = {f"a{layer}.h{head}": layer * 4. + head for layer in range(4) for head in range(4)}
    mlps = {f"m{layer}": -float(layer) for layer in range(4)}
    whole = {name: dict(score=value, in_graph=True) for name, value in (heads | mlps).items()}
    for given in (heads | mlps, dict(nodes=heads | mlps), dict(nodes=whole), dict(nodes=whole | {"input": dict(in_graph=True)}, edges={"a->b": dict(score=1.)})):
        (tmp_path / "scores.json").write_text(json.dumps(given), encoding="utf-8")
        for found in (read_scores(given, sites), read_scores(tmp_path / "scores.json", sites)):
            assert torch.equal(found["head"].flatten(), torch.arange(16.).double()) and torch.equal(found["mlp"], -torch.arange(4.).double())
    assert [*read_scores(mlps, sites)] == ["mlp"] and [*read_scores(dict(nodes=heads), sites)] == ["head"]
    for given in (np.array([[0, 1], [2, 3]]), torch.tensor([[0, 1], [2, 3]]), [(np.int32(0), np.int64(1)), (2, 3)], dict(movers=np.array([[0, 1]]), others=[(2, 3)])):
        assert read_scores(given, sites)["head"].nonzero().tolist() == [[0, 1], [2, 3]]
    graph = {name: dict(in_graph=name != "m2") for name in whole}
    assert read_scores(dict(nodes=graph, edges={"a->b": dict(score=1.)}), sites)["mlp"].tolist() == [1, 1, 0, 1]
    for change, says in ((True, "a finite number"), (None, "a finite number"), ("1", "a finite number"), (dict(score=None), "a finite number"), (dict(score=[1.]), "a finite number"),
                         (dict(score=float("nan")), "a finite number"), (dict(score=float("-inf")), "a finite number"), (dict(score=True), "a finite number"),
                         (dict(in_graph=True), "a finite number"), (10 ** 400, "a finite number")):
        with pytest.raises(InputError, match=says): read_scores(dict(nodes=whole | {"a1.h1": change}), sites)
    scored = dict(edges={"a->b": dict(score=1., in_graph=True)})
    for given, says in ((scored | dict(nodes={name: dict(in_graph=True) for name in whole}), "scores edges and no nodes"), (dict(nodes=[1]), "under 'nodes'"),
                        (dict(nodes={}), "scores of 0 nodes"), (heads | {"m0": 1.}, "scores of 17 nodes"), ({"b0": 1., "a0.h0": 2.}, "expected a<layer>"), ({(0, 1): 4.2}, "from_scores"),
                        (dict(head=torch.zeros(4, 4)), "scores already"), ([(True, 0)], "expected .layer, head."), ([(0, 1.5)], "from_scores"), (dict(nodes=whole, cfg=[1]), None)):
        if says is None: read_scores(given, sites)
        else:
            with pytest.raises(InputError, match=says): read_scores(given, sites)
    for twice in (heads | {"a1.h02": 3.}, {name: value for name, value in heads.items() if name != "a3.h3"} | {"a01.h2": 3.}):
        with pytest.raises(InputError, match="'a1.h2' and .* are the same: expected one score"): read_scores(twice, sites)
    text = json.dumps(dict(nodes=whole)).replace('"a0.h1"', '"a0.h0"')
    (tmp_path / "scores.json").write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match="scores.json' cannot be read as JSON: a name stands twice"): read_scores(tmp_path / "scores.json", sites)


# --- sizes

@pytest.mark.parametrize("scores, keep, neurons, says", [
    (dict(head=torch.arange(16.).view(4, 4)), .1, 2080, "2,048 others have no score"), (dict(head=torch.arange(16.).view(4, 4)), .85, 2464, "has 2,464 of 2,560"),
    (dict(mlp=torch.arange(4.)), .3, 512 + 512, "512 others have no score"),
    (dict(head=torch.arange(16.).view(4, 4), mlp=torch.full((4,), 7.5)), .2, 256, "have one score and do not fit, keep="),
    (dict(head=torch.arange(16.).view(4, 4), mlp=torch.full((4,), 3.5)), .15, 384, None), (dict(head=torch.arange(16.).view(4, 4), mlp=torch.full((4,), 3.5)), .16, 384, None),
    (dict(attention_neuron=torch.zeros(4, 4, 32), mlp_neuron=torch.arange(2048.).view(4, 512)), .9, 2047, "have one score"),
    (dict(attention_neuron=torch.zeros(4, 4, 32), mlp_neuron=torch.arange(2048.).view(4, 512)), 1., 2560, None)])
def test_a_size_that_whole_nodes_do_not_give_is_said(model, scores, keep, neurons, says):
    sites = find_sites(model)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        found = from_scores(scores, sites, cut_by_size(scores, sites, keep)).n_neurons()
    assert found == neurons and len(seen) == (says is not None) and all(says in str(w.message) for w in seen)


def test_scores_that_rank_no_neurons_give_no_size(model):
    sites = find_sites(model)
    with pytest.raises(InputError, match="rank no neurons"): cut_by_size(dict(mlp_output=torch.zeros(level_shapes(sites, ("mlp_output",))["mlp_output"])), sites, .1)


def test_the_models_own_answers_are_not_asked_for_again(model, monkeypatch):
    task = tasks.ioi(model, n=(64, 64, 32))
    circuit, ran = some_circuit(find_sites(model)), []
    alone = [under_ablations(circuit, model, task, (name,), draws=20).iloc[0] for name in ("corrupt", "zero", "mean")]
    answer = streams.answer_logits
    monkeypatch.setattr(streams, "answer_logits", lambda *given: ran.append(1) or answer(*given))
    together = under_ablations(circuit, model, task, ("corrupt", "zero", "mean"), draws=20)
    assert len(ran) == 1 and all(row[k] == together.iloc[i][k] for i, row in enumerate(alone) for k in ("kl", "faithfulness", "closed_kl"))


# --- necessity

def test_complement_is_one_minus_the_masks(model, examples):
    circuit, examples = some_circuit(examples.sites), examples[:8]
    masks, others = circuit.masks(), complement(circuit).masks()
    assert all(torch.equal(1 - mask, other) for mask, other in zip(masks[:2], others[:2]))
    found = necessity(circuit, model, examples, draws=0, steps=0)
    c = examples.logits(SiteMasks(1 - masks.attention, 1 - masks.mlp))
    def mean_difference(x): return np.mean([(row[a] - row[w]).item() for row, a, w in zip(x, examples.batch.answer[:, 0], examples.batch.wrong[:, 0])])
    slow, (m, e) = mean_difference(c), map(mean_difference, (examples.full, examples.closed))
    assert np.isclose(found.faithfulness, (slow - e) / (m - e), atol=1e-4)
    assert found.interval[0] <= found.faithfulness <= found.interval[1]


def test_gaps_and_additions_equal_masks_by_hand(model, examples):
    circuit, some = some_circuit(examples.sites, share=.5), examples[:6]
    found = necessity(circuit, model, some, draws=4, steps=2, tries=50)

    def mean_difference(masks, nodes):
        width, (attention, mlp, _) = examples.sites.head_width, (m if m is None else m.clone() for m in masks)
        for level, (layer, *head) in nodes:
            if level == "mlp": mlp[layer] = 0
            else: attention[layer, head[0] * width:(head[0] + 1) * width] = 0
        x = some.logits(SiteMasks(attention, mlp))
        return np.mean([(row[a] - row[w]).item() for row, a, w in zip(x, some.batch.answer[:, 0], some.batch.wrong[:, 0])])

    whole, nodes = SiteMasks(*(torch.ones_like(m) for m in circuit.masks()[:2])), nodes_of(circuit)
    for _, row in found.completeness.iterrows():
        names = row["nodes"].split(", ") if row["nodes"] else []
        taken = [("mlp", (int(n.split()[1]),)) if n.startswith("MLP") else ("head", tuple(map(int, n.split()[1].split(".")))) for n in names]
        c, m = (mean_difference(of, taken) for of in (circuit.masks(), whole))
        assert np.allclose([row["circuit"], row["model"], row["gap"]], [c, m, abs(c - m)], atol=1e-4), row["kind"]
    first = [abs(mean_difference(circuit.masks(), [n]) - mean_difference(whole, [n])) for n in nodes]
    assert np.isclose(found.completeness.query("kind == 'greedy'")["gap"].iloc[0], max(first), atol=1e-4)
    adds = [mean_difference(circuit.masks(), []) - mean_difference(circuit.masks(), [n]) for n in nodes]
    assert np.allclose(found.minimality["adds"], adds, atol=1e-4) and without(circuit, nodes).n_neurons() == 0


def test_intervals_go_by_the_grouping_that_is_least_sure(model):
    task = tasks.greater_than(model, n=(48, 8, 96))
    circuit = some_circuit(find_sites(model))
    found = worth(circuit, model, task)
    slots = {"template": None, "answer": None} | {name: None for name in task.test[0].slots}
    errors = {None: worth(circuit, model, task, clusters=None, draws=2).row("kl")["error"]}
    for name in slots:
        values = [pair.answer[0] if name == "answer" else pair.slots[name] for pair in task.test]
        if 6 <= len({*values}) < len(values): errors[name] = worth(circuit, model, task, clusters=name, draws=2).row("kl")["error"]
    assert len(errors) > 3 and np.isclose(found.row("kl")["error"], max(errors.values())) and errors[found.clusters] == max(errors.values())


# --- progress

@pytest.mark.parametrize("name, options", [("necessity", dict(draws=3, steps=2, tries=3)), ("hypotheses", dict(draws=2, shuffles=9)), ("controls", dict(draws=2, shares=(.3, .6)))])
def test_bars_come_to_their_end(model, task, monkeypatch, name, options):
    module, bars = importlib.import_module(f"mgprune.{name}"), []
    class Bar(module.tqdm):
        def close(self): bars.append(self); super().close()
    monkeypatch.setattr(module, "tqdm", lambda **given: Bar(**given | dict(disable=False, file=io.StringIO())))
    for circuit in (some_circuit(find_sites(model)), full_circuit(find_sites(model))):
        bars.clear()
        getattr(module, name)(circuit, model, task, most=2, **options)
        assert bars[0].n == bars[0].total or name == "controls" and circuit == full_circuit(circuit.sites)  # with nothing to open


# --- hypotheses

def chance(n, p): return [math.comb(n, k) * p ** k * (1 - p) ** (n - k) for k in range(n + 1)]


@pytest.mark.parametrize("n, k", [(100, 50), (100, 60), (100, 65), (100, 31), (10, 8), (10, 0), (7, 3), (1, 1)])
def test_equivalence_adds_both_tails_at_the_edge(n, k):
    off = abs(k - n / 2)
    slow = [sum(c for j, c in enumerate(chance(n, p)) if abs(j - n / 2) >= off) for p in (.4, .45, .5, .55, .6)]
    assert np.isclose(p_equivalent(k, n, .1), min(1, max(slow)))


def test_wins_are_counted_in_one_tail():
    assert np.isclose(p_at_least(97, 100, .9), sum(chance(100, .9)[97:]))
    assert np.isclose(p_at_most(70, 100, .9), sum(chance(100, .9)[:71]))


def test_holm_rejects_step_by_step():
    rng = np.random.default_rng(0)
    for _ in range(20):
        p = rng.random(6) ** 3
        rejected, order = set(), np.argsort(p)
        for step, i in enumerate(order):
            if p[i] * (6 - step) >= .05: break
            rejected.add(i)
        assert rejected == {*np.flatnonzero(holm(p) < .05)}


def test_independence_is_right_as_often_as_it_says():
    rng, small = np.random.default_rng(0), 0
    for i in range(100): small += p_independent(rng.normal(size=20), rng.normal(size=20), 39, i)[1] <= .1
    assert 2 <= small <= 20
    x, y = rng.normal(size=12), rng.normal(size=12)
    k, l, h = gaussian(x), gaussian(y), np.eye(12) - 1 / 12
    assert np.isclose(p_independent(x, y, 1, 0)[0], np.trace(k @ h @ l @ h) / 12 ** 2)


def test_random_circuits_are_compared_one_by_one(model, examples):
    circuit, some = some_circuit(examples.sites, share=.5), examples[:6]
    found = hypotheses(circuit, model, some, draws=6, shuffles=9)
    rng = np.random.default_rng(0)
    def apart(of):
        measures = evaluate(of, model, some)
        return abs(measures["logit_difference"] - measures["full_logit_difference"])
    others = [matched(circuit, rng) for _ in range(6)]
    wins = sum(apart(circuit) < apart(other) for other in others)
    needed = sum(apart(complement(circuit)) > apart(complement(other)) for other in others)
    assert found.table.set_index("question")["value"][["sufficiency", "partial necessity"]].tolist() == [wins / 6, needed / 6]
    for other in others: assert other.counts() == circuit.counts() and other != circuit


@pytest.mark.parametrize("kind", ["mixtral", "qwen2_moe", "deepseek_v3"])
def test_random_circuits_have_as_many_experts(kind):
    sites, noise = find_sites(tiny(kind)), torch.Generator().manual_seed(0)
    shapes = level_shapes(sites)
    circuit = from_kept({level: torch.rand(shapes[level], generator=noise) < share for level, share in
                         dict(head=.6, expert=.5, attention_neuron=.6, mlp_neuron=.4).items()}, sites)
    sizes = [set(), set()]
    for seed in range(8):
        other = matched(circuit, np.random.default_rng(seed))
        assert other.counts() == circuit.counts() and other != circuit
        for level, kept in circuit.kept.items():
            if kept.dim() > 1: assert torch.equal(kept.flatten(1).sum(-1), other.kept[level].flatten(1).sum(-1)), level
        for found, c in zip(sizes, (circuit, other)): found.add(tuple(c.experts()))
    assert len(sizes[0]) == 1 < len(sizes[1])


def of_levels(sites, kept):
    "The circuit that keeps these, as zeros and ones"
    shape = level_shapes(sites, [*kept])
    return from_kept({l: torch.tensor(v, dtype=torch.bool).expand(shape[l]) for l, v in kept.items()}, sites)


@pytest.mark.parametrize("how, kept", [
    ("over all layers", dict(mlp=[1, 0, 1, 0])), ("over all layers", dict(attention=[0, 1, 1, 0])), ("in each layer", dict(mlp_output=[1] * 32 + [0] * 96)),
    ("in each layer", dict(head=[[1, 1, 1, 1], [1, 1, 0, 1], [0] * 4, [0] * 4])), (NO_OTHER, dict(block=[0, 0, 0, 0])), (NO_OTHER, dict(attention=[0, 0, 0, 0])),
    (NO_OTHER, dict(mlp=[0, 0, 0, 0]))], ids=lambda v: "-".join(v) if isinstance(v, dict) else v.replace(" ", "_"))
def test_a_random_circuit_is_never_the_circuit_itself(model, how, kept):
    circuit = of_levels(find_sites(model), kept)
    said, others = drawn_like(circuit, 12, np.random.default_rng(0))
    others = [*others]
    assert said == how and len(others) == (0 if how == NO_OTHER else 12)
    for other in others:
        assert other != circuit
        for level in ("head", "mlp", "attention_neuron", "mlp_neuron"): assert other.counts()[level] == circuit.counts()[level], level


@pytest.mark.parametrize("how, kept", [("over all layers", dict(mlp=[1, 0, 1, 0])), (NO_OTHER, dict(mlp=[0, 0, 0, 0]))])
def test_tests_and_controls_say_how_random_circuits_were_matched(model, examples, how, kept):
    circuit, given = of_levels(examples.sites, kept), dict(draws=4, most=4, progress=False)
    tests = hypotheses(circuit, model, examples, shuffles=9, **given).table.set_index("question")
    marks = controls(circuit, model, examples, examples, shares=(1.,), **given)
    for question in ("sufficiency", "partial necessity"): assert how in tests["statistic"][question]
    if how == NO_OTHER:
        assert marks.not_measured == {"random circuits": NO_OTHER} and NO_OTHER in repr(marks)
        assert "not tested" in tests["said"]["sufficiency"] and np.isnan(tests["p"]["sufficiency"])
    else: assert marks.others.set_index("control")["matched"]["random circuits"] == how
    assert len(marks.others) == (3 if how == NO_OTHER else 4)


def test_experts_that_are_all_open_or_closed_change_layers():
    sites = find_sites(tiny("mixtral"))
    expert = torch.zeros(level_shapes(sites)["expert"], dtype=torch.bool)
    expert[0] = True
    circuit = from_kept(dict(expert=expert), sites)
    how, others = drawn_like(circuit, 3, np.random.default_rng(0))
    assert how == "over all layers"
    for other in others: assert other != circuit and other.counts() == circuit.counts()


# --- controls

def test_controls_are_what_evaluate_says(model, task, examples):
    circuit = some_circuit(examples.sites, share=.5)
    other = tasks.gendered_pronoun(model, n=(8, 8, 8))
    found = controls(circuit, model, task, other, shares=(.3, 1.), draws=1, most=12)
    by, some = found.others.set_index("control"), examples[:12]
    assert np.isclose(by["kl"]["the circuit"], evaluate(circuit, model, some)["kl"], atol=1e-5)
    assert np.isclose(by["closed_kl"]["the circuit"], evaluate(circuit, model, some)["closed_kl"], atol=1e-5)
    assert np.isclose(by["kl"]["another task"], evaluate(circuit, model, other)["kl"], atol=1e-5)
    assert np.isclose(by["kl"]["random circuits"], evaluate(matched(circuit, np.random.default_rng(0)), model, some)["kl"], atol=1e-5)
    whole = found.reopened[found.reopened["share"] == 1]
    assert np.allclose(whole["kl"], 0, atol=1e-5) and not whole["rises"].any()
    opened = found.reopened.query("share == .3")
    assert np.allclose(opened["rise"], opened["kl"] - by["kl"]["the circuit"], atol=1e-6)


# --- the report

def test_report_says_what_its_parts_say(tmp_path, model):
    task = tasks.ioi(model, n=(16, 8, 12))
    sites = find_sites(model)
    heads, neurons = torch.zeros(4, 4, dtype=torch.bool), torch.zeros(4, sites.mlp_width, dtype=torch.bool)
    heads[:2, 0] = neurons[0, :9] = True
    circuit = from_kept(dict(head=heads, mlp_neuron=neurons), sites)
    found = report(circuit, model, task, by=("template",), draws=2, most=4, ablations=("corrupt", "zero"))
    data = json.loads(found.write(tmp_path / "report.json").read_text(encoding="utf-8"))
    alone = worth(circuit, model, task)
    f = alone.row("faithfulness")
    assert f"{f['low']:.3f} to {f['high']:.3f}" in data["first"][0] and f"{f['value']:.3f}" in data["first"][0]
    prompts = [*alone.worst(5)["prompt"]]
    screen = repr(found) + found.markdown() + found.html()
    assert all(screen.count(prompt) >= 3 for prompt in prompts) and [*found.worst()["prompt"]] == prompts
    alike = necessity(circuit, model, task, draws=1, most=4)
    assert np.isclose(data["complement"]["faithfulness"], alike.faithfulness, atol=1e-6)
    under = {row["ablation"]: row["verdict"] for row in data["tables"]["Under every ablation"]}
    assert {*under} == {"corrupt", "zero"} and all(f"under {a}: {v}" in data["first"] for a, v in under.items())
    assert all(row["not_shown"] for row in data["verdicts"])


def test_report_says_how_to_ask_for_what_the_circuit_lacks(model):
    task, sites = tasks.gendered_pronoun(model, n=(16, 8, 12)), find_sites(model)
    circuit = from_kept(dict(head=torch.eye(4, dtype=torch.bool), mlp=torch.zeros(4, dtype=torch.bool)), sites)
    found = report(circuit, model, task, draws=2, most=4, ablations=("corrupt",), clusters="template", bound=.8)
    lacks = found.worth.row("faithfulness")["high"] < .8
    asked = "discover(..., faithfulness=0.2) asks for it"
    assert lacks and asked in found.verdicts["verdict"][0] and any(asked in line for line in found.first())
    templates = len({pair.slots["template"] for pair in task.test})
    assert found.groups == templates and f"in {templates} groups by template" in found.first()[0]
    assert report(circuit, model, task, draws=2, most=4, ablations=("corrupt",), clusters=None).groups is None


def test_report_on_a_mixture_of_experts(model):
    config = AutoConfig.for_model("mixtral", **SPECIAL | TINY["mixtral"] | dict(vocab_size=len(model.tokenizer)))
    torch.manual_seed(0)
    mixture = randomise(AutoModelForCausalLM.from_config(config).eval())
    mixture.tokenizer = model.tokenizer
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a random model is right on few pairs
        task = tasks.ioi(mixture, n=(8, 4, 8))
        circuit = from_scores(attribute(mixture, task, steps=1), find_sites(mixture), .002)
        found = report(circuit, mixture, task, draws=2, most=4, ablations=("corrupt", "mean", "optimal"))
    assert 0 < len(circuit.experts()) < 8 and not found.controls.not_measured
    assert {*found.controls.others["control"]} >= {"random circuits", "another task", "shuffled weights"}
    assert found.hypotheses.table["p"].notna().sum() >= 4 and np.isfinite(found.worth.row("kl")["value"]) and found.markdown()


def test_a_verdict_needs_the_whole_interval():
    assert faithful(.9, 1, .9).startswith("faithful") and faithful(.85, .95, .9).startswith("not settled")
    assert faithful(.5, .8999, .9).startswith("not faithful") and "too few" in faithful(math.nan, math.nan, .9)


def test_bounds_count_words_where_pairs_share_them():
    "By the standard error by clusters, written out"
    draw = torch.Generator().manual_seed(0)
    words = torch.arange(512) // 20
    each = (torch.randn(26, generator=draw)[words] + .1 * torch.randn(512, generator=draw)).double()
    mean = each.mean()
    by_hand = sum((each[words == w] - mean).sum() ** 2 for w in words.unique()).sqrt() / len(each)
    own = by_word(each, words)
    assert own.mean().item() == pytest.approx(mean.item()) and own.std(correction=0) / len(own) ** .5 == pytest.approx(by_hand.item())
    assert bound(each, .95, words[:, None]) > bound(each, .95) and bound(each, None, words[:, None]) == mean
    shuffled = words[torch.randperm(512, generator=draw)]  # words that say nothing
    assert bound(each, .95, torch.stack([words, shuffled], 1)) == bound(each, .95, words[:, None])
    assert bound(each, .95, torch.zeros(512, 1, dtype=torch.long)) == bound(each, .95)  # of one word nothing is known about others


def test_pairs_of_a_task_know_which_words_are_theirs(model):
    for name, slots in (("gendered_pronoun", 2), ("ioi", 3)):
        batch = tasks.load(model, name).batch("valid")
        assert batch.words.shape == (len(batch), slots) and batch[:7].words.shape == (7, slots)
    same = tasks.load(model, "ioi", hold_out="clean prompts").batch("valid")
    assert same.words is None
# --- circuits of single prompts

@pytest.mark.parametrize("kind", ["gpt2", "mixtral"])
def test_a_prompt_needs_the_beginning_of_its_own_ranking(kind):
    model = tiny(kind)
    examples = prepare(model, pairs())
    sites, scores = examples.sites, own_scores(examples, 5)
    for i in range(len(examples)):
        for level, s in attribute(model, examples[i], signed=True).items():
            assert torch.allclose(in_levels(scores[i], sites)[level], s, atol=1e-5), level
    kept = beginnings(examples, scores, "20%")
    for i, some in enumerate(kept):
        order, n = scores[i].argsort(descending=True, stable=True), int(some.sum())
        assert some[order[:n]].all() and 0 < n <= len(order)
        def kl_of(size):
            first = torch.zeros_like(some)
            first[order[:size]] = True
            return evaluate(from_kept(in_levels(first, sites), sites), model, examples[i])
        at, before = kl_of(n), kl_of(n - 1)
        assert at["kl"] <= .2 * at["closed_kl"] < before["kl"] + 1e-6


def test_kinds_are_what_their_prompts_need(model, task):
    pronoun = tasks.gendered_pronoun(model, n=(8, 8, 8))
    found = by_prompt(model, [*task.test[:8], *pronoun.test], kl=.2)
    assert [*found.prompts["neurons"]] == [c.n_neurons() for c in found.each] and (found.prompts["kl"] <= .2).all()
    kinds = found.prompts["kind"].to_numpy()
    assert len({*kinds[:8]}) == len({*kinds[8:]}) == 1 and kinds[0] != kinds[8]
    assert np.isclose(silhouette(found.distances, kinds), max(found.silhouettes.values()))
    for row in found.kinds.itertuples():
        own = [pair for pair, kind in zip([*task.test[:8], *pronoun.test], kinds) if kind == row.kind]
        assert np.isclose(evaluate(found.circuits[row.kind], model, own)["kl"], row.kl, atol=1e-5) and row.kl <= .2
    alone = by_prompt(model, task.test[:1])
    assert len(alone.circuits) == 1 and not alone.silhouettes and alone.figure()
    with pytest.raises(InputError, match="kinds=9: "): by_prompt(model, task.test[:2], kinds=9)
