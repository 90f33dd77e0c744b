"""What ablated nodes hold: each ablation against plain PyTorch hooks, on a GPT-2, a Llama with grouped keys and two mixtures of experts."""
import json
import sys
from dataclasses import replace

import pytest
import torch

import mgprune
from families import LENGTHS, VOCABULARY, Pairs, pairs, tiny
from mgprune import Circuit, discover, evaluate, load_model, sweep, tasks
from mgprune.ablations import ABLATIONS
from mgprune.circuit import from_kept, from_scores, intersection, readable, union
from mgprune.evaluation import measured
from mgprune.models import InputError, fingerprint
from mgprune.objective import kl_divergence
from mgprune.pairs import Batch, Pair
from mgprune.passes import record
from mgprune.recipe import Recipe
from mgprune.sites import find_sites
from mgprune.streams import prepare
from mgprune.tree import LEVELS, SiteMasks, close, level_shapes, site_masks

KINDS = ("embedded", "llama", "qwen2_moe", "gpt_oss")
QUICK = Recipe(steps=20, confidence=None)
kinds = pytest.mark.parametrize("kind", KINDS)
ablations = pytest.mark.parametrize("ablation", ABLATIONS)


def model_of(kind, dtype=torch.float32): return load_model(dtype=dtype) if kind == "embedded" else tiny(kind, dtype)


def others(copies=3):
    "Reference pairs of token ids: of the lengths of `pairs`, and other prompts"
    draw, lengths = torch.Generator().manual_seed(5), LENGTHS * copies
    clean, corrupt = torch.randint(1, VOCABULARY, (2, len(lengths), max(lengths)), generator=draw)
    mask = torch.stack([torch.arange(max(lengths)) >= max(lengths) - n for n in lengths]).long()
    corrupt[:, -1] = clean[:, -1]
    return Batch(clean * mask, corrupt * mask, mask, torch.full((len(lengths), 1), 1), torch.full((len(lengths), 1), 2))


def given_pairs(model, kind):
    "Pairs to measure and reference pairs"
    if kind != "embedded": return pairs(), others()
    task = tasks.ioi(model, n=(48, 6, 6))
    return task.batch("test"), task.batch("train")


@pytest.fixture(scope="module", params=KINDS)
def case(request):
    model = model_of(request.param)
    return model, *given_pairs(model, request.param)


def gates_of(sites, levels=LEVELS, value=None, seed=2):
    "Gates of these levels: one value, or zeros and ones"
    draw = torch.Generator().manual_seed(seed)
    def fill(shape): return torch.full(shape, value) if value is not None else (torch.rand(shape, generator=draw) > .3).float()
    return {l: fill(s) for l, s in level_shapes(sites, levels).items()}


# --- the same by hand: nothing of the library from here to the next line

def places(model):
    "Each layer's attention projection, and its MLP's projection, or its MLP where it has experts"
    if hasattr(model, "transformer"): return [(l.attn.c_proj, l.mlp.c_proj) for l in model.transformer.h]
    return [(l.self_attn.o_proj, getattr(l.mlp, "down_proj", l.mlp)) for l in model.model.layers]


def is_output(model, module): return module in [mlp for _, mlp in places(model)] and hasattr(module, "experts")


def run(model, ids, mask, change):
    "Answer logits, with a function of module and value at each place"
    def before(module, args): return (change(module, args[0]), *args[1:])
    def after(module, args, result):
        return (change(module, result[0]), *result[1:]) if isinstance(result, tuple) else change(module, result)
    handles = [m.register_forward_hook(after) if is_output(model, m) else m.register_forward_pre_hook(before)
               for both in places(model) for m in both]
    try:
        with torch.no_grad(): return model(input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0),
                                          logits_to_keep=torch.tensor([ids.shape[1] - 1])).logits[:, -1]
    finally:
        for handle in handles: handle.remove()


def seen(model, ids, mask):
    "What stands at each place: module -> [prompts, positions, width]"
    found = {}
    def keep(module, x):
        found[module] = x.detach().clone()
        return x
    run(model, ids, mask, keep)
    return found


def mean_of(x, mask): return (x * mask[..., None]).sum((0, 1)) / mask.sum()


def held_by_hand(model, ablation, batch, reference):
    "What ablated nodes hold for a batch: module -> something that broadcasts to [prompts, positions, width]"
    if ablation == "corrupt": return seen(model, batch.corrupt, batch.attention_mask)
    values = seen(model, reference.corrupt, reference.attention_mask)
    if ablation == "zero": return {m: torch.zeros_like(x[:1, :1]) for m, x in values.items()}
    if ablation == "mean": return {m: mean_of(x, reference.attention_mask) for m, x in values.items()}
    found, length = {m: torch.zeros(*batch.clean.shape, x.shape[-1]) for m, x in values.items()}, reference.attention_mask.sum(1)
    for row, n in enumerate(batch.attention_mask.sum(1).tolist()):
        for m, x in values.items(): found[m][row, -n:] = x[length == n][:, -n:].mean(0)
    return found


def closed_by_hand(model, batch, held): return run(model, batch.clean, batch.attention_mask, lambda m, x: held[m].expand(x.shape).clone())


def close_to(a, b): return torch.allclose(a, b, atol=2e-5, rtol=1e-5)


# --- both ends

@ablations
def test_all_open_is_the_model_bit_for_bit(case, ablation):
    model, batch, reference = case
    plain = run(model, batch.clean, batch.attention_mask, lambda m, x: x)
    for output in (False, True):
        examples = prepare(model, batch, ablation=ablation, reference=reference, output=output)
        masks = site_masks(gates_of(examples.sites, LEVELS if output else LEVELS[:-1], 1.), examples.sites)
        assert (masks.output is not None) == output
        assert torch.equal(examples.logits(masks), plain)


@pytest.mark.parametrize("ablation", [a for a in ABLATIONS if a != "resample"])
def test_all_closed_is_a_run_on_what_closed_nodes_hold(case, ablation):
    model, batch, reference = case
    by_hand = closed_by_hand(model, batch, held_by_hand(model, ablation, batch, reference))
    for output in (False, True):
        examples = prepare(model, batch, ablation=ablation, reference=reference, output=output)
        closed = examples.logits(site_masks(gates_of(examples.sites, LEVELS if output else LEVELS[:-1], 0.), examples.sites))
        assert close_to(closed, by_hand) and close_to(examples.closed, by_hand.log_softmax(-1))
    assert not torch.allclose(by_hand, run(model, batch.clean, batch.attention_mask, lambda m, x: x), atol=.1)


def test_resampling_takes_one_other_pair_of_the_same_length(case):
    model, batch, reference = case
    examples = prepare(model, batch, ablation="resample", reference=reference)
    closed, again = examples.closed, prepare(model, batch, ablation="resample", reference=reference).closed
    assert torch.equal(closed, again)
    chosen = []
    for i in range(len(batch)):
        n, fits = int(batch.attention_mask[i].sum()), []
        one = batch[[i]].map(lambda t: t[:, -n:] if t.shape == batch[[i]].clean.shape else t)
        for j, other in enumerate(reference.corrupt):
            if reference.attention_mask[j].sum() != n or torch.equal(other[-n:], one.corrupt[0]): continue
            held = seen(model, other[None, -n:], torch.ones(1, n).long())
            if torch.allclose(closed_by_hand(model, one, held).log_softmax(-1), closed[[i]], atol=1e-4): fits.append(j)
        assert len({tuple(reference.corrupt[j].tolist()) for j in fits}) >= 1
        chosen += fits[:1]
    assert len({*chosen}) > 1


def test_corrupt_prompts_that_end_in_another_token_leave_the_clean_token_in():
    model, batch = tiny("llama"), pairs()
    batch = replace(batch, corrupt=torch.cat([batch.corrupt[:, :-1], (batch.clean[:, -1:] + 7) % VOCABULARY], 1))
    examples, held = prepare(model, batch), held_by_hand(model, "corrupt", batch, batch)
    corrupt = run(model, batch.corrupt, batch.attention_mask, lambda m, x: x).log_softmax(-1)
    assert close_to(examples.closed, closed_by_hand(model, batch, held).log_softmax(-1))
    assert not torch.allclose(examples.closed, corrupt, atol=.1)
    everything = from_kept({"block": torch.zeros(2, dtype=torch.bool)}, examples.sites)
    assert close_to(examples.logits(everything.masks()).log_softmax(-1), examples.closed)


# --- between the ends

@ablations
def test_closure_keeps_the_function(case, ablation):
    model, batch, reference = case
    examples = prepare(model, batch, ablation=ablation, reference=reference, output=True)
    for levels in (LEVELS[:-1], LEVELS):
        g = gates_of(examples.sites, levels)
        closed = close({l: x > .5 for l, x in g.items()}, examples.sites)
        assert any((closed[l] != (g[l] > .5)).any() for l in g)
        both = [examples.logits(site_masks({l: x.float() for l, x in gates.items()}, examples.sites)) for gates in (g, closed)]
        assert torch.allclose(*both, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("ablation", ["mean", "zero"])
@kinds
def test_mask_gradient_is_a_finite_difference(kind, ablation):
    model = model_of(kind, torch.double)
    batch, reference = given_pairs(model, kind)
    examples, draw = prepare(model, batch[:1], ablation=ablation, reference=reference[:6], output=True), torch.Generator().manual_seed(2)
    shapes = level_shapes(examples.sites, ("attention_neuron", "mlp_neuron", "mlp_output"))
    point = site_masks({l: torch.rand(s, generator=draw, dtype=torch.double) for l, s in shapes.items()}, examples.sites)
    point = [m.requires_grad_() for m in point]
    def f(masks): return examples.logits(SiteMasks(*masks))[:, 3].sum()
    size, allowed = (1e-5, 1e-6) if kind == "embedded" else (1e-2, 2e-3)  # the others keep norms or scores in single precision
    for i, g in enumerate(torch.autograd.grad(f(point), point)):
        where = divmod(g.abs().flatten().argmax().item(), g.shape[1])
        step = torch.zeros_like(g)
        step[where] = size
        with torch.no_grad(): up, down = (f([p + d * step if j == i else p for j, p in enumerate(point)]) for d in (1, -1))
        assert torch.isclose(g[where], (up - down) / (2 * size), rtol=allowed, atol=0)


@pytest.mark.parametrize("kind", ["embedded", "llama"])
def test_mean_of_one_head_by_hand(kind):
    model = model_of(kind)
    batch, reference = given_pairs(model, kind)
    sites, means = find_sites(model), held_by_hand(model, "mean", batch, reference)
    plain = run(model, batch.clean, batch.attention_mask, lambda m, x: x).log_softmax(-1)
    for layer, head in ((0, 1), (1, 3)):
        module, part = places(model)[layer][0], slice(head * sites.head_width, (head + 1) * sites.head_width)
        def change(m, x):
            if m is not module: return x
            x = x.clone()
            x[..., part] = means[m][part]
            return x
        by_hand = run(model, batch.clean, batch.attention_mask, change)
        kept = torch.ones(sites.n_layers, sites.n_heads, dtype=torch.bool)
        kept[layer, head] = False
        circuit = from_kept({"head": kept}, sites)
        examples = prepare(model, batch, ablation="mean", reference=reference)
        assert close_to(examples.logits(circuit.masks()), by_hand)
        found = evaluate(circuit, model, batch, ablation="mean", reference=reference)
        assert found["kl"] == pytest.approx(kl_divergence(plain, by_hand).mean().item(), abs=1e-5) and found["kl"] > 1e-4


# --- what they are made of

@pytest.fixture(scope="module")
def task(model): return tasks.ioi(model, n=(48, 16, 16))


@pytest.fixture(scope="module")
def of_mean(model, task): return discover(model, task, keep=.3, ablation="mean", recipe=QUICK, progress=False)


def tensors(held):
    found = []
    replace(held.recording, logits=None).map(found.append)
    return found


@pytest.mark.parametrize("ablation", ["mean", "mean_by_position"])
def test_means_never_use_the_measured_pairs(model, task, ablation):
    other = replace(task, test=[replace(p, corrupt=p.corrupt.replace(" drink", " garden").replace(" to", " and")) for p in task.test])
    first, second = (prepare(model, t, ablation=ablation, output=True) for t in (task, other))
    assert not torch.equal(first.batch.corrupt, second.batch.corrupt)
    assert all(torch.equal(a, b) for a, b in zip(tensors(first.held), tensors(second.held), strict=True)) and tensors(first.held)
    assert torch.equal(first.closed, second.closed)
    moved = replace(task, train=[replace(p, corrupt=p.clean) for p in task.train])
    assert not torch.equal(tensors(first.held)[0], tensors(prepare(model, moved, ablation=ablation).held)[0])


@pytest.mark.parametrize("ablation", ["mean", "mean_by_position", "resample"])
def test_without_reference_pairs_they_are_refused(model, task, ablation):
    with pytest.raises(InputError, match=f"{ablation}.* needs reference pairs"): prepare(model, task.batch("test"), ablation=ablation)


def test_a_length_without_reference_pairs_is_refused():
    with pytest.raises(InputError, match="a reference pair of 6 tokens"):
        prepare(tiny("llama"), pairs(), ablation="mean_by_position", reference=others()[[1, 2, 4, 5]])


def test_an_ablation_of_ones_own(model, task):
    calls = []
    def unmoved(host, pairs, reference, output):
        calls.append((len(pairs), len(reference), output))
        return record(host, pairs.clean, pairs.attention_mask, output)
    examples = prepare(model, task, ablation=unmoved)
    assert torch.allclose(examples.closed, examples.full, atol=1e-5) and calls == [(16, 48, False)]
    nothing = from_kept({"block": torch.zeros(4, dtype=torch.bool)}, examples.sites)
    assert evaluate(nothing, model, task, ablation=unmoved)["kl"] == pytest.approx(0, abs=1e-6)

    def twice_the_mean(host, pairs, reference, output): return ABLATIONS["mean"](host, pairs, reference, output).map(lambda t: 2 * t)
    circuit = discover(model, task, keep=.3, ablation=twice_the_mean, recipe=QUICK, progress=False)
    assert circuit.provenance.ablation == "twice_the_mean"
    found = evaluate(circuit, model, task, ablation=twice_the_mean)
    assert found["kl"] == pytest.approx(circuit.provenance.metrics["kl"], abs=1e-6) and "ablation" not in found
    with pytest.raises(InputError, match="twice_the_mean.*none of corrupt, resample, mean"): evaluate(circuit, model, task)
    assert evaluate(circuit, model, task, ablation="zero")["found_with"] == "twice_the_mean"


@pytest.mark.parametrize("returned, says", [
    (lambda host, pairs, reference, output: None, "expected a Recording"),
    (lambda host, pairs, reference, output: record(host, pairs.clean, pairs.attention_mask, output)[:2], "2 rows for 16 pairs")])
def test_what_an_ablation_may_not_return_is_refused(model, task, returned, says):
    with pytest.raises(InputError, match=says): prepare(model, task, ablation=returned)


@pytest.mark.parametrize("wrong", ["means", "", 3, ["mean"]])
def test_an_unknown_ablation_is_refused(model, task, wrong):
    for use in (lambda: prepare(model, task, ablation=wrong), lambda: discover(model, task, ablation=wrong, progress=False)):
        with pytest.raises(InputError, match="expected one of corrupt, resample, mean, mean_by_position, zero, or a function"): use()


# --- a circuit says what it was found with

def test_a_circuit_keeps_its_ablation(model, task, of_mean, tmp_path):
    assert of_mean.provenance.ablation == of_mean.provenance["ablation"] == "mean"
    again = Circuit.load(of_mean.save(tmp_path / "mean"), model)
    assert again == of_mean and readable(again) == readable(of_mean) and again.provenance.ablation == "mean"
    for circuit in (of_mean, again):
        found = evaluate(circuit, model, task)
        assert found == pytest.approx(of_mean.provenance.metrics) and not {"ablation", "found_with"} & {*found}
        assert evaluate(circuit, model, task, ablation="mean") == found
        other = evaluate(circuit, model, task, ablation="zero")
        assert other["ablation"] == "zero" and other["found_with"] == "mean" and other["kl"] != found["kl"]
    assert evaluate(of_mean, model, task, ablation="corrupt")["ablation"] == "corrupt"


def test_an_applied_circuit_holds_what_it_was_found_with(model, task, of_mean):
    examples = prepare(model, task, ablation="mean")
    with torch.no_grad(), of_mean.applied(model, task):
        b = examples.batch
        said = model(b.clean, attention_mask=b.attention_mask).logits[:, -1]
    assert close_to(said, examples.logits(of_mean.masks()))


def test_sweeps_say_it_too(model, task):
    for circuit in sweep(model, task, keep=(.3, .1), ablation="zero", recipe=QUICK, progress=False):
        assert circuit.provenance.ablation == "zero"
        assert evaluate(circuit, model, task)["kl"] == pytest.approx(circuit.provenance.metrics["kl"], abs=1e-6)
        assert measured(circuit, prepare(model, task, ablation="zero")) == pytest.approx(circuit.provenance.metrics, abs=1e-5)


def test_the_circuit_comes_first(model, task, of_mean):
    with pytest.raises(InputError, match="the circuit comes first, then its model"): evaluate(model, of_mean, task)


# --- what may be given for a task

def alike(a, b):
    assert a == b and all(torch.equal(s, b.scores[l]) for l, s in a.scores.items())
    assert a.provenance.metrics == b.provenance.metrics and a.provenance.pairs == b.provenance.pairs


def test_a_tasks_name_is_the_task(model):
    found = [discover(model, t, keep=.3, recipe=QUICK, progress=False) for t in ("ioi", tasks.ioi(model))]
    alike(*found)
    assert found[0].provenance.task == "ioi" and found[0].provenance.pairs_file is None


def test_a_list_and_a_file_are_the_task(model, task, tmp_path):
    rows = [dict(clean=p.clean, corrupt=p.corrupt, answer=p.answer[0], wrong=p.wrong[0]) for p in task.train + task.valid]
    path = tmp_path / "gifts.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    as_pairs = [Pair(**row) for row in rows]
    made, of_rows, of_pairs, of_file = (discover(model, t, keep=.3, recipe=QUICK, progress=False)
                                        for t in (tasks.from_pairs(model, rows), rows, as_pairs, path))
    for found in (of_rows, of_pairs, of_file): alike(made, found)
    assert of_file.provenance.task == "gifts" and of_file.provenance.pairs_file["path"] == str(path)
    alike(of_file, discover(model, str(path), keep=.3, recipe=QUICK, progress=False))
    assert measured(made, prepare(model, path)) == pytest.approx(made.provenance.metrics)


# --- each thing once

@pytest.fixture
def counted(monkeypatch):
    "How often each of two functions is called, wherever it was imported to"
    calls = {}
    for original in (find_sites, fingerprint):
        def counting(*args, _f=original, **named):
            calls[_f.__name__] += 1
            return _f(*args, **named)
        calls[original.__name__] = 0
        modules = [m for name, m in sys.modules.items() if name.split(".")[0] == "mgprune" and getattr(m, original.__name__, None) is original]
        assert len(modules) > 1 and mgprune.training in sys.modules.values()
        for module in modules: monkeypatch.setattr(module, original.__name__, counting)
    return calls


@pytest.mark.parametrize("search", [
    lambda model, task: discover(model, task, recipe=QUICK, progress=False),
    lambda model, task: discover(model, task, keep=.2, ablation="mean", recipe=QUICK, progress=False),
    lambda model, task: sweep(model, task, keep=(.3, .1), recipe=QUICK, progress=False)], ids=["kl", "mean", "sweep"])
def test_a_search_finds_the_sites_and_the_fingerprint_once(model, task, counted, search):
    for _ in range(2):
        counted.update(find_sites=0, fingerprint=0)
        search(model, task)
        assert counted == dict(find_sites=1, fingerprint=1)
    fresh = load_model()  # whose masks are tried first
    counted.update(find_sites=0, fingerprint=0)
    search(fresh, task)
    assert counted == dict(find_sites=1, fingerprint=1)


def test_evaluating_finds_them_once(model, task, of_mean, counted):
    evaluate(of_mean, model, task)
    assert counted == dict(find_sites=1, fingerprint=1)


# --- groups of heads

def is_consistent(circuit):
    sites, head, group = circuit.sites, circuit.kept["head"], circuit.kept["group"]
    of_heads = head.view(sites.n_layers, sites.n_groups, -1)
    return torch.equal(of_heads.any(-1), group) and torch.equal(circuit.kept["attention_neuron"].any(-1), head)


@pytest.mark.parametrize("levels", [("group", "head"), ("group", "head", "mlp"), ("group", "head", "attention_neuron", "mlp_neuron"),
                                    ("block", "attention", "group", "mlp_neuron"), LEVELS])
def test_searches_for_groups_of_heads(levels, tmp_path):
    model = tiny("llama")
    with pytest.warns(UserWarning): circuit = discover(model, Pairs(), penalties=dict.fromkeys(levels, .05), levels=levels, progress=False,
                                                       recipe=Recipe(steps=30, rate=.5, batch_size=3, confidence=None))
    assert circuit.sites.n_groups == 2 and circuit.counts()["group"][1] == 4 and "group" in circuit.scores
    assert is_consistent(circuit)
    again = Circuit.load(circuit.save(tmp_path / "groups"), model)
    assert again == circuit and torch.equal(again.kept["group"], circuit.kept["group"])
    assert torch.equal(again.scores["group"], circuit.scores["group"]) and again.counts() == circuit.counts()


def test_circuits_with_groups_are_whole():
    sites, draw = find_sites(tiny("llama")), torch.Generator().manual_seed(0)
    levels, partly = ("group", "head", "attention_neuron", "mlp_neuron"), 0
    for _ in range(50):
        scores = {l: torch.randn(s, generator=draw) for l, s in level_shapes(sites, levels).items()}
        circuit = from_scores(scores, sites, torch.randn(1, generator=draw).item() / 2)
        assert is_consistent(circuit)
        partly += 0 < circuit.counts()["group"][0] < 4
        closed = from_kept({"group": torch.randn(2, 2, generator=draw) > 0}, sites)
        assert is_consistent(closed) and torch.equal(closed.kept["head"], closed.kept["group"].repeat_interleave(2, -1))
    assert partly > 10


def test_another_pair_never_answers_for_a_pair(model):
    "Where a pair's corrupt prompt is another pair's clean one, as with countries"
    capital = tasks.capital(model, hold_out="clean prompts")
    assert not ({p.clean for p in capital.test} & {p.corrupt for p in capital.train}) == set()
    examples = prepare(model, capital, ablation="resample")
    assert ((examples.closed - examples.full).abs().amax(1) > 1e-3).all()


def test_an_ablation_called_like_another_is_not_taken_for_it(model, task):
    def mean(host, pairs, reference, output): return ABLATIONS["zero"](host, pairs, reference, output)
    circuit = discover(model, task, keep=.3, ablation=mean, recipe=QUICK, progress=False)
    assert circuit.provenance.ablation == "own mean"
    with pytest.raises(InputError, match="own mean.*none of corrupt"): evaluate(circuit, model, task)
    assert evaluate(circuit, model, task, "mean")["found_with"] == "own mean"


def test_circuits_of_two_ablations_together_do_not_say_which_to_use(model, task):
    kept, sites = {"head": torch.ones(4, 4, dtype=torch.bool)}, prepare(model, task).sites
    a, b = (from_kept(kept, sites, provenance=dict(ablation=name)) for name in ("mean", "zero"))
    for both in (union(a, b), intersection(a, b)):
        with pytest.raises(InputError, match="mean and zero"): evaluate(both, model, task)
        assert evaluate(both, model, task, "mean")["kl"] >= 0
    assert union(a, a).provenance.ablation == "mean"


@pytest.mark.parametrize("spoil", [
    lambda r: replace(r, attention=r.attention[:2]), lambda r: replace(r, mlp=tuple(t[..., :1] for t in r.mlp)),
    lambda r: replace(r, attention=tuple(t * torch.nan for t in r.attention)), lambda r: replace(r, mlp=tuple(t[:1] for t in r.mlp)),
    lambda r: replace(r, mlp=tuple(t[:, :3] for t in r.mlp)), lambda r: replace(r, mlp=None)],
    ids=["layers", "width", "nan", "rows", "positions", "none"])
def test_values_that_do_not_fit_are_refused(model, task, spoil):
    def spoiled(host, pairs, reference, output): return spoil(record(host, pairs.corrupt, pairs.attention_mask, output))
    with pytest.raises(InputError, match="the ablation 'spoiled' returned"): prepare(model, task, ablation=spoiled)


def test_the_first_line_says_what_was_closed(model, task, capsys):
    discover(model, task, keep=.3, ablation="mean", recipe=QUICK)
    assert "with every node ablated (ablation mean) it is correct on" in capsys.readouterr().out
