"Models that run a compiled program: the program is run exactly, and its circuit is enough and needed"
from copy import deepcopy

import pytest
import torch
from transformers import GPT2LMHeadModel

from mgprune import compiled
from mgprune.circuit import from_kept
from mgprune.compiled import PROGRAMS, build, compiled_program, program_task, program_tokenizer, read_program
from mgprune.evaluation import measured
from mgprune.models import InputError, load_model
from mgprune.planted import AT, basis
from mgprune.streams import prepare


@pytest.fixture(scope="module", params=PROGRAMS)
def c(request): return compiled_program(request.param, seed=3)


@pytest.fixture(scope="module")
def examples(c): return prepare(c.model, c.task)


def kl_of(kept, examples): return measured(from_kept(kept, examples.sites), examples)["kl"]


def written(model, program, seed, coordinates=None):
    "What the model has in the coordinates of the program's answer, or in others, after the last layer"
    ids = program.examples[0]
    with torch.no_grad(): states = model.transformer(ids, attention_mask=torch.ones_like(ids)).last_hidden_state
    directions = basis(torch.Generator().manual_seed(seed))[list(program.output) if coordinates is None else coordinates]
    return states @ directions.T.to(states.dtype)


def answer(name, words):
    "What the program should say, written down again without a transformer"
    last = words[-1]
    if name == "induction": return words[words.index(last) + 1]
    if name == "fraction": return f"{words.count('x')}/{len(words)}"
    if name == "count": return str(words.count(last))
    depth = 0
    for word in words:
        depth += 1 if word == "(" else -1
        if depth < 0: return "no"
    return "yes"


def test_it_writes_what_the_compilers_own_model_writes(c):
    expected = c.program.examples[1]
    assert (written(c.model, c.program, 3) - expected).abs().max() <= 2e-4
    assert (written(deepcopy(c.model).double(), c.program, 3) - expected).abs().max() <= 1e-5
    assert expected.abs().max() > .9 and expected.std() > .1


def test_junk_is_busy_and_stays_out_of_the_program(c):
    states = written(c.model, c.program, 3, slice(None))
    assert states[..., AT["junk"]].std() > .1
    assert states[..., len(c.program.labels):AT["junk"].start].abs().max() < 1e-4


@pytest.mark.parametrize("seed", range(4))
def test_every_seed_runs_the_program(c, seed):
    model, nodes, _ = build(c.program, seed)
    assert (written(model.double(), c.program, seed) - c.program.examples[1]).abs().max() <= 1e-5
    assert {level: int(k.sum()) for level, k in nodes.items()} == {level: int(k.sum()) for level, k in c.nodes.items()}


def test_the_places_depend_on_the_seed():
    program = read_program("induction")
    heads = {str(build(program, seed)[1]["head"].nonzero().tolist()) for seed in range(4)}
    assert len(heads) == 4 and heads == {str(build(program, seed)[1]["head"].nonzero().tolist()) for seed in range(4)}


def test_tasks_ask_what_the_programs_compute(c):
    for split in ("train", "valid", "test"):
        for pair in getattr(c.task, split):
            clean, corrupt = pair.clean.split(), pair.corrupt.split()
            assert pair.answer == (f" {answer(c.task.name, clean)}",) and pair.wrong == (f" {answer(c.task.name, corrupt)}",)
            assert len(clean) == len(corrupt) and clean[-1] == corrupt[-1]
    assert program_task(c.model, c.task.name) == c.task != program_task(c.model, c.task.name, seed=1)


def test_the_model_does_the_task_and_the_truth_is_enough(c, examples):
    m = measured(from_kept(c.truth, examples.sites), examples)
    assert m["full_accuracy"] == m["accuracy"] == 1 and m["kl"] < 1e-3
    assert m["closed_accuracy"] < .05 and m["closed_kl"] > 5


def test_prompts_of_other_lengths_are_padded(c):
    if c.task.name in ("induction", "fraction"): return  # their answers stand for prompts of one length
    texts = ["( ) (", "( ) ) ( (", "("] if c.task.name == "brackets" else ["a b a", "c", "b b b a b"]
    batch = c.model.tokenizer(texts, return_tensors="pt", padding=True, padding_side="left")
    places = (batch.attention_mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad(): said = c.model(**batch, position_ids=places).logits[:, -1].argmax(-1)
    assert c.model.tokenizer.convert_ids_to_tokens(said) == [answer(c.task.name, text.split()) for text in texts]


def test_each_true_head_is_needed(c, examples):
    assert c.truth["head"].any()
    for place in map(tuple, c.truth["head"].nonzero().tolist()):
        kept = torch.ones_like(c.truth["head"])
        kept[place] = False
        assert kl_of({"head": kept}, examples) > .5
    assert kl_of({"head": c.truth["head"]}, examples) < 1e-3


def test_leaving_out_a_true_neuron_hurts(c):
    examples = prepare(c.model, c.task, "train", most=128)
    for level in ("attention_neuron", "mlp_neuron"):
        for place in c.truth[level].nonzero()[::4].tolist():
            kept = c.truth[level].clone()
            kept[tuple(place)] = False
            assert kl_of({**c.truth, level: kept}, examples) > 1e-3
    assert all((c.nodes[level] | ~kept).all() for level, kept in c.truth.items())


def test_edges_lead_from_the_embedding_to_the_answer(c):
    heads = {f"layer {layer} head {head}" for layer, head in c.nodes["head"].nonzero().tolist()}
    layers = {f"layer {layer} MLP" for layer in c.nodes["mlp_neuron"].nonzero()[:, 0].tolist()}
    writers, readers = {writer for writer, _ in c.edges}, {reader for _, reader in c.edges}
    assert writers == {"embedding", *heads, *layers}
    assert readers == {"answer", *layers, *(f"{head} {how}" for head in heads for how in ("query", "key", "value"))}
    first = [c.nodes["head"].nonzero()[i].tolist() for i in range(len(heads))]
    if c.task.name == "induction":
        before, follows = ("layer {} head {}".format(*place) for place in first)
        assert {edge for edge in c.edges if edge[0] == before} == {(before, f"{follows} key")}
        assert (follows, "answer") in c.edges


def test_it_is_a_stock_model_and_survives_the_disk(c, tmp_path):
    assert type(c.model) is GPT2LMHeadModel and not c.model.training
    c.model.save_pretrained(tmp_path)
    c.model.tokenizer.save_pretrained(tmp_path)
    again = load_model(tmp_path)
    assert all(torch.equal(t, again.state_dict()[name]) for name, t in c.model.state_dict().items())
    assert program_task(again, c.task.name) == c.task
    ids = c.task.batch("test").clean
    with torch.no_grad(): assert torch.equal(again(ids).logits, c.model(ids).logits)


def test_what_cannot_be_done_is_refused(c, monkeypatch):
    expected = "unknown program 'sort': expected one of induction, fraction, count, brackets"
    with pytest.raises(InputError, match=expected): compiled_program("sort")
    with pytest.raises(InputError, match=expected): program_task(c.model, "sort")
    monkeypatch.setitem(compiled.DRAW, "brackets", lambda rng: rng.choice(((["("], "yes"), ([")"], "no"))))
    with pytest.raises(InputError, match="too few different prompts .* ask for fewer pairs"):
        program_task(program_tokenizer(read_program("brackets")), "brackets", n=(4, 1, 1))
    monkeypatch.setitem(compiled.AT, "junk", slice(4, 255))
    with pytest.raises(InputError, match="coordinates; this model has room for 4"): build(c.program, 0)
