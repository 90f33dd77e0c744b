"Models with a planted circuit: what is planted is there, is enough, and is needed"
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GPT2LMHeadModel, LlamaForCausalLM

from mgprune import planted, tasks
from mgprune.circuit import from_kept, full_circuit
from mgprune.evaluation import auroc, measured, overlap, score
from mgprune.models import InputError, load_model
from mgprune.planted import MECHANISMS, build, enough, hard, plant
from mgprune.sites import find_sites
from mgprune.streams import prepare

TASKS = ("ioi", "greater_than", "gendered_pronoun")
by_task = pytest.mark.parametrize("task", TASKS)


@pytest.fixture(scope="module", params=planted.ARCHITECTURES)
def p(request): return plant(seed=3, architecture=request.param)


def architecture(p): return p.model.config.model_type


@pytest.fixture(scope="module")
def given_pairs(p): return {task: prepare(p.model, tasks.load(p.model, task, hold_out="clean prompts"), most=128) for task in TASKS}  # of all words


def kl_of(kept, examples): return measured(from_kept(kept, examples.sites), examples)["kl"]


def test_it_is_a_stock_model_and_survives_the_disk(p, tmp_path):
    assert type(p.model) in (GPT2LMHeadModel, LlamaForCausalLM) and not p.model.training
    p.model.save_pretrained(tmp_path)
    p.model.tokenizer.save_pretrained(tmp_path)
    again = load_model(tmp_path)
    assert again.state_dict().keys() == p.model.state_dict().keys()
    assert all(torch.equal(t, again.state_dict()[name]) for name, t in p.model.state_dict().items())
    assert again.tokenizer.get_vocab() == p.model.tokenizer.get_vocab()
    assert tasks.ioi(again, n=(4, 4, 4)) == tasks.ioi(p.model, n=(4, 4, 4))


def test_the_same_seed_builds_the_same_and_another_seed_another(p):
    model, nodes = build(3, .01, architecture(p))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), p.model.parameters()))
    assert all(torch.equal(kept, p.nodes[task][level]) for task in TASKS for level, kept in nodes[task].items())
    heads = {tuple(map(tuple, build(seed, .01, architecture(p))[1]["ioi"]["head"].nonzero().tolist())) for seed in range(4)}
    assert len(heads) == 4


@pytest.mark.parametrize("key_heads", (planted.HEADS, planted.KEY_HEADS))
@pytest.mark.parametrize("seed", range(20))
def test_information_flows_upwards_and_nothing_is_shared(seed, key_heads):
    heads, neurons = planted.places(planted.random.Random(seed), key_heads)
    layer = {task: places[0][0] for task, places in neurons.items()}
    assert heads["gather"][0] < min(heads["first"][0], heads["second"][0])
    assert max(heads["first"][0], heads["second"][0]) <= layer["ioi"]
    assert heads["year"][0] <= layer["greater_than"] and heads["gender"][0] <= layer["gendered_pronoun"]
    assert len({(layer, head * key_heads // planted.HEADS) for layer, head in heads.values()}) == 5
    places = [place for group in neurons.values() for place in group]
    assert len({*places}) == len(places) == 14 + 12 + 2


@by_task
def test_the_model_does_the_task_and_the_truth_is_enough(p, given_pairs, task):
    m = measured(from_kept(p.truth[task], given_pairs[task].sites), given_pairs[task])
    assert m["full_accuracy"] >= .99 and abs(m["faithfulness"] - 1) < .02 and m["kl"] <= .01
    assert m["closed_kl"] > 5


@by_task
def test_each_true_head_is_needed(p, given_pairs, task):
    for place in p.truth[task]["head"].nonzero().tolist():
        kept = torch.ones_like(p.truth[task]["head"])
        kept[tuple(place)] = False
        assert kl_of({"head": kept}, given_pairs[task]) > 1


@by_task
def test_leaving_out_any_kind_of_true_neuron_hurts(p, given_pairs, task):
    for level in ("attention_neuron", "mlp_neuron"):
        for place in p.truth[task][level].nonzero()[::8].tolist():
            kept = p.truth[task][level].clone()
            kept[tuple(place)] = False
            assert kl_of({**p.truth[task], level: kept}, given_pairs[task][:64]) > .05


def test_the_truth_of_one_task_does_nothing_for_another(p, given_pairs):
    assert kl_of(p.truth["ioi"], given_pairs["gendered_pronoun"]) > 5


def test_too_much_leak_is_refused():
    with pytest.raises(InputError, match=r"leak=0\.15 is too large: in \w+, .*Use a smaller leak, such as 0\.01"): plant(leak=.15)
    for wrong in (-.1, math.nan, math.inf):
        with pytest.raises(InputError, match="leak=.*expected a number of at least 0"): plant(leak=wrong)
    with pytest.raises(InputError, match="unknown architecture 'bert': expected one of gpt2, llama"): plant(architecture="bert")


@given(st.lists(st.tuples(st.integers(-3, 3), st.booleans()), min_size=1, max_size=30))
@settings(deadline=None)
def test_auroc_counts_pairs(rows):
    scores, true = torch.tensor([s for s, _ in rows]), torch.tensor([t for _, t in rows])
    pairs = [(a > b) + (a == b) / 2 for a in scores[true].tolist() for b in scores[~true].tolist()]
    if pairs: assert auroc(scores, true) == pytest.approx(sum(pairs) / len(pairs))
    else: assert math.isnan(auroc(scores, true))


def test_overlap_of_nothing():
    none = torch.zeros(4, dtype=torch.bool)
    assert overlap(none, ~none) == overlap(~none, none) == overlap(none, none) == dict(precision=0, recall=0, f1=0)


def test_score_of_a_circuit_and_of_a_ranking(p):
    truth, sites = p.truth["ioi"], find_sites(p.model)
    exact = score(from_kept(truth, sites, scores={level: kept.float() for level, kept in truth.items()}), truth)
    assert all(m == dict(precision=1, recall=1, f1=1, auroc=1) for m in exact.values()) and len(exact) == 3
    only_neurons = {level: truth[level].float() for level in ("attention_neuron", "mlp_neuron")}
    assert score(only_neurons, truth) == {level: dict(auroc=1) for level in truth}
    everything = score(full_circuit(sites), truth)["head"]
    assert everything["recall"] == 1 and everything["precision"] == 3 / 32


def test_fewer_pairs_where_the_model_knows_few_names(p):
    task = tasks.ioi(p.model, hold_out="clean prompts")
    train, valid, test = (len(part) for part in (task.train, task.valid, task.test))
    assert 100 < valid == test < 512 and 4 * valid <= train < 4 * valid + 6
    with pytest.raises(InputError, match="ask for fewer"): tasks.ioi(p.model, n=(2048, 512, 512), hold_out="clean prompts")


@pytest.fixture(scope="module")
def mechanisms(): return {name: hard(name, seed=1, n=(8, 8, 200)) for name in MECHANISMS}


@pytest.mark.parametrize("name", MECHANISMS)
def test_what_counts_as_right_is_what_trying_every_set_of_parts_finds(mechanisms, name):
    for corruption, right in mechanisms[name].right.items():
        assert sorted(map(sorted, enough(mechanisms[name], corruption))) == sorted(map(sorted, right))


@pytest.mark.parametrize("name", MECHANISMS)
def test_a_mechanism_is_a_small_stock_model_that_is_right(mechanisms, name):
    h = mechanisms[name]
    config = h.model.config
    assert type(h.model) is GPT2LMHeadModel and config.n_embd <= 64 and config.n_layer <= 3
    for task in h.tasks.values():
        examples = prepare(h.model, task)
        alone = measured(from_kept(h.nodes(h.roles), examples.sites), examples)
        assert alone["full_accuracy"] == 1 and abs(alone["kl"]) < (.01 if name == "stray" else 1e-4)


def test_parts_are_apart_and_come_in_order(mechanisms):
    for h in mechanisms.values():
        every = torch.stack([torch.cat([nodes[level].flatten() for level in ("attention_neuron", "mlp_neuron")])
                             for nodes in h.roles.values()])
        assert every.any(1).all() and every.sum(0).max() == 1
    layer = {role: nodes["head"].nonzero()[0, 0].item() for role, nodes in mechanisms["backup"].roles.items()}
    assert layer["first"] == layer["first done"] < layer["second"]


def test_the_rare_word_is_as_rare_as_said_in_every_part(mechanisms):
    for name, every in (("rare", 33), ("very_rare", 200)):
        task = hard(name, n=(600, 200, 400)).tasks["flipped"]
        for split, size in (("train", 600), ("valid", 200), ("test", 400)):
            assert sum(" on " in f" {pair.clean} " for pair in getattr(task, split)) == math.ceil(size / every)


def test_a_seed_moves_the_parts_and_an_unknown_mechanism_is_refused():
    assert len({tuple(hard("negative", seed, (4, 4, 4)).nodes(["first"])["head"].flatten().tolist()) for seed in range(6)}) > 1
    with pytest.raises(InputError, match="unknown mechanism 'or': expected one of redundant, backup"): hard("or")
