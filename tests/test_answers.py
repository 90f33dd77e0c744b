"""The divergence over right answers, wrong ones and anything else: against plain sums, and wherever it can be asked for."""
import json
from types import SimpleNamespace

import pytest
import torch

from mgprune import cli, discover, evaluate, plan, sweep, tasks
from mgprune.arguments import InputError
from mgprune.circuit import from_scores
from mgprune.evaluation import cut_by_kl, excess, neurons_at
from mgprune.many import arguments_of, job_of
from mgprune.objective import answer_classes, divergence, kl_divergence
from mgprune.recipe import Goal, Recipe
from mgprune.search import Search, to_gates
from mgprune.streams import prepare
from mgprune.trimming import closing, trimmed

QUICK = Recipe(steps=8, confidence=None)
ROWS = ([[0], [1]], [[0, 2], [1, 4]], [[3, -1], [0, 5]], [[3, 1], [-1, -1]], [[5], []], [[0, 1, 2], [3, 4, 5]])


@pytest.fixture(scope="module")
def task(model): return tasks.ioi(model, n=(32, 24, 24))


@pytest.fixture(scope="module")
def ranked(model, task):
    found = discover(model, task, keep=.3, over="answers", recipe=QUICK, progress=False)
    return found, prepare(model, task, "valid", most=12)


def batch_of(answer, wrong, rows):
    return SimpleNamespace(answer=torch.tensor([answer] * rows), wrong=torch.tensor([wrong] * rows, dtype=torch.long))


def classes_of(answer, wrong):
    "Token ids by class, those that are there"
    named = [[i for i in ids if i >= 0] for ids in (answer, wrong)]
    return [ids for ids in (*named, [i for i in range(6) if i not in sum(named, [])]) if ids]


def by_hand(full, logits, answer, wrong):
    "The divergence of summed probabilities in double precision, one class after another"
    p, q = full.double().exp(), logits.double().softmax(-1)
    pairs = [(p[:, ids].sum(-1), q[:, ids].sum(-1)) for ids in classes_of(answer, wrong)]
    return sum(torch.special.xlogy(a, a / b) for a, b in pairs)


@pytest.mark.parametrize("answer, wrong", ROWS)
@pytest.mark.parametrize("scale", [1., 10., 40.])
def test_against_plain_sums(answer, wrong, scale):
    draw = torch.Generator().manual_seed(0)
    full = (scale * torch.randn(64, 6, generator=draw)).log_softmax(-1)
    logits = (scale * torch.randn(64, 6, generator=draw)).requires_grad_()
    batch, there = batch_of(answer, wrong, 64), classes_of(answer, wrong)
    classes = answer_classes(full, batch)
    assert classes.dtype == torch.float32 and classes.isfinite().all() and (classes.exp().sum(-1) - 1).abs().max() < 1e-6
    assert int((classes.exp().sum(0) > 0).sum()) == len(there)
    found, whole = (divergence(full, logits, batch, over) for over in ("answers", "vocabulary"))
    assert torch.allclose(found.double(), by_hand(full, logits, answer, wrong), rtol=1e-5, atol=1e-5)
    assert (found <= whole + 1e-5).all() and (found >= -1e-5).all() and torch.equal(whole, kl_divergence(full, logits))
    slope, = torch.autograd.grad(found.sum(), logits)
    q, by_class = logits.detach().double().softmax(-1), torch.zeros(64, 6, dtype=torch.double)
    for ids in there: by_class[:, ids] = (full.double().exp()[:, ids].sum(-1) / q[:, ids].sum(-1))[:, None]
    assert slope.isfinite().all() and torch.allclose(slope.double(), q - q * by_class, atol=1e-5)


@pytest.mark.parametrize("answer, wrong", ROWS)
def test_probabilities_near_0_and_1(answer, wrong):
    batch, rows = batch_of(answer, wrong, 36), 300 * torch.eye(6)
    full, logits = rows.repeat_interleave(6, 0).log_softmax(-1), rows.repeat(6, 1).requires_grad_()
    found = divergence(full, logits, batch, "answers")
    assert found.isfinite().all() and torch.autograd.grad(found.sum(), logits)[0].isfinite().all()
    assert torch.allclose(found.double(), by_hand(full, logits, answer, wrong), rtol=1e-5, atol=1e-4)
    assert not divergence(full, full, batch, "answers").any()


def test_answers_of_another_model_are_refused():
    with pytest.raises(InputError, match="prepared on another model"):
        divergence(torch.zeros(2, 6), torch.zeros(2, 7), batch_of([0], [1], 2), "answers")


def test_cut_and_trimmed_hold_it(ranked, model):
    found, examples = ranked
    allowed = .25 * evaluate(found, model, examples)["closed_answers_kl"]
    for kl in (allowed, "25%"):
        cut = cut_by_kl(found.scores, examples, kl, over="answers")
        circuit = from_scores(found.scores, found.sites, cut)
        small = trimmed(circuit, examples, kl, over="answers")
        for c in (circuit, small):
            logits = examples.logits(c.masks())
            by_class = answer_classes(logits.log_softmax(-1), examples.batch), answer_classes(examples.full, examples.batch)
            mean = torch.nn.functional.kl_div(*by_class, log_target=True, reduction="none").sum(-1).mean().item()
            assert mean <= allowed + 1e-5 and mean == pytest.approx(evaluate(c, model, examples)["answers_kl"], abs=1e-5)
            assert excess(examples, logits, kl, None, "answers").mean().item() == pytest.approx(mean - allowed, abs=1e-4)
        assert small.n_neurons() <= circuit.n_neurons() and small.provenance.trimmed["divergence_over"] == "answers"
    assert circuit.n_neurons() == neurons_at(found.scores, examples, "25%", over="answers")


def test_its_slope_is_what_closing_a_little_costs(ranked):
    circuit, examples = ranked
    slope, masks, step = closing(circuit, examples, "answers")["mlp_neuron"], circuit.masks(), 1e-2
    node = tuple(max(circuit.nodes("mlp_neuron"), key=lambda n: slope[n].abs()))
    def kl(value):
        mlp = masks.mlp.clone(); mlp[node] = value
        return divergence(examples.full, examples.logits(masks._replace(mlp=mlp)), examples.batch, "answers").mean()
    assert slope[node].item() == pytest.approx(((kl(1 - step) - kl(1 + step)) / (2 * step)).item(), rel=.05)


def test_a_search_is_for_it(model, task):
    examples = prepare(model, task, "train")[:8]
    for over in ("vocabulary", "answers"):
        search = Search(examples, Goal(kl="10%", over=over), ("head", "mlp_neuron"), QUICK)
        closed = divergence(examples.full, examples.closed, examples.batch, over).mean().item()
        assert search.wanted == pytest.approx(.1 * closed)
        kl, slope = to_gates(search, examples, torch.zeros_like(search.scores), len(examples))
        assert kl.item() == pytest.approx(closed, rel=1e-4) and slope.isfinite().all() and slope.any()


def test_searches_say_which(model, task, tmp_path):
    asked = dict(keep=.3, recipe=QUICK, progress=False)
    plain, same, other = (discover(model, task, **asked, **more) for more in ({}, dict(over="vocabulary"), dict(over="answers")))
    assert plain == same and all(torch.equal(s, same.scores[level]) for level, s in plain.scores.items())
    assert plain.provenance.history == same.provenance.history != other.provenance.history
    assert plain.provenance.settings["over"] == "vocabulary" and other.provenance.settings["over"] == "answers"
    assert "answers_kl" in str(other).splitlines()[6]
    discover(model, task, **asked, over="answers", save=tmp_path / "run")
    with pytest.raises(InputError, match="over was 'answers' and is 'vocabulary'"): discover(model, task, **asked, save=tmp_path / "run")
    names = [job_of(arguments_of(dict(model="m", task="ioi", **more), 0), ("w", "v")).name for more in ({}, dict(over="vocabulary"), dict(over="answers"))]
    assert names[0] == names[1] != names[2]


def test_for_a_divergence_and_for_several(model, task):
    asked = dict(over="answers", recipe=QUICK)
    one = discover(model, task, kl="20%", progress=False, **asked)
    several = sweep(model, task, kl=("40%", "20%"), progress=False, **asked)
    for circuit, share in ((one, .2), *zip(several, (.4, .2))):
        measured = evaluate(circuit, model, list(task.valid))
        assert measured["answers_kl"] <= share * measured["closed_answers_kl"] + 1e-5
    assert plan(model, task, kl="20%", **asked).memory > 0


@pytest.mark.parametrize("call", [discover, sweep, plan])
def test_anything_else_is_refused(call, model, task):
    with pytest.raises(InputError, match="over='tokens': expected 'vocabulary' or 'answers'"): call(model, task, over="tokens")


def test_command_line(task, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cli, "LEAST_STEPS", 8)
    pairs, file = tmp_path / "pairs.jsonl", tmp_path / "measures.json"
    pairs.write_text("\n".join(json.dumps({name: getattr(pair, name) for name in ("clean", "corrupt", "answer", "wrong")}) for pair in task.train))
    asked = [str(pairs), "--keep", ".3", "--over", "answers", "--steps", "8", "--json", str(file)]
    assert cli.main(["sweep", *asked]) == 0 and json.loads(file.read_text())[0]["answers_kl"] > 0
    said = capsys.readouterr().out.splitlines()
    assert "KL over the answers" in said and f"{json.loads(file.read_text())[0]['answers_kl']:.4f}" in said[-2]
    assert cli.main(["discover", *asked, "--force"]) == 0 and json.loads(file.read_text())["asked"] == "keep 0.3, over the answers"
    capsys.readouterr()
    assert cli.main(["discover", "ioi", "--over", "tokens"]) == 2
    assert "vocabulary" in capsys.readouterr().err
