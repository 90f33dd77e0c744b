"""The explorer without a browser: every control does to the circuit, and to the answers, what the slow way says."""
import html
import random
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from transformers import MixtralConfig, MixtralForCausalLM

from mgprune import Circuit, evaluate, load_model, tasks
from mgprune.ablations import ABLATIONS, what_it_holds
from mgprune.arguments import InputError
from mgprune.circuit import from_kept, from_scores, full_circuit
from mgprune.models import fingerprint
from mgprune.pairs import encode
from mgprune.passes import answer_logits
from mgprune.plots import attention_patterns
from mgprune.sites import find_sites
from mgprune.tree import LEVELS, at_level, close, level_shapes, lowest
from mgprune.widgets import Choice, answer, chosen, clickable, explore, frozen_html, is_kept, limits, node_rows, toggled

MODEL = load_model()
SITES = find_sites(MODEL)
TASK = tasks.ioi(MODEL, n=(4, 4, 6))
ORIGIN = dict(model="embedded", fingerprint=fingerprint(MODEL), task="ioi", metrics=dict(kl=1.), history=dict(step=[1]))


def made(levels=("block", "head", "mlp", "attention_neuron", "mlp_neuron"), seed=0):
    "A circuit of random scores, about half of it open"
    noise = torch.Generator().manual_seed(seed)
    return from_scores({l: torch.randn(s, generator=noise) + 2 for l, s in level_shapes(SITES, levels).items()}, SITES, 1., dict(ORIGIN))


CIRCUIT = made()
NODES = [("block", l) for l in range(4)] + [("mlp", l) for l in range(4)] + [("head", l, h) for l in range(4) for h in range(4)]


def applied_probability(circuit, pair, ablation=None, reference=TASK):
    "Probability of the right answer when the circuit is applied, as the view writes it"
    batch = encode([pair], MODEL)
    with torch.no_grad(), circuit.applied(MODEL, batch, ablation, reference): logits = answer_logits(MODEL, batch.clean, batch.attention_mask)
    return f"{logits[0].softmax(-1)[batch.answer[0, 0]].item():.2%}"


def shown_probabilities(view):
    "The same, read from the view: the numbers in the row of the right answer"
    row = view.answers.value.split(">correct<")[1].split("</tr>")[0]
    return [part.split("<")[0] for part in row.split('%)">')[1:]]


def shown_probability(view): return shown_probabilities(view)[1]


@pytest.fixture
def view(): return explore(CIRCUIT, MODEL, TASK)


def test_opened_as_it_is(view):
    assert view.circuit is CIRCUIT and view.choice == Choice()
    assert {n for n, b in view.nodes.items() if b.value} == {n for n in NODES if is_kept(CIRCUIT, n)}
    assert set(view.nodes) == set(NODES) and shown_probability(view) == applied_probability(CIRCUIT, TASK.test[0])


@pytest.mark.parametrize("kinds", [("node", "node", "threshold", "most", "prompt"), ("node", "threshold", "ablation", "prompt", "ablation")])
def test_every_control_shows_what_applied_computes(view, kinds):
    rng, seen = random.Random(0), set()
    for _ in range(12):
        kind = rng.choice(kinds)
        if kind == "node":
            button = view.nodes[rng.choice(NODES)]
            button.value = not button.value
        elif kind == "threshold": view.threshold.index = rng.randrange(len(view.threshold.options))
        elif kind == "most": view.most["mlp_neuron"].value = rng.choice((100, 800, 2048))
        elif kind == "prompt": view.prompt.value = rng.randrange(6)
        else: view.ablation.value = rng.choice(("corrupt", "mean", "zero"))
        assert view.circuit == chosen(CIRCUIT, view.choice)
        applied = applied_probability(view.circuit, TASK.test[view.prompt.value], view.ablation.value)
        assert abs(float(shown_probability(view)[:-1]) - float(applied[:-1])) < .011  # both are rounded
        assert {n for n, b in view.nodes.items() if b.value} == {n for n in NODES if is_kept(view.circuit, n)}
        seen.add(shown_probability(view))
    assert len(seen) > 4


def test_the_columns_are_full_circuit_and_corrupt(view):
    batch = encode([TASK.test[0]], MODEL)
    with torch.no_grad(): full, corrupt = (answer_logits(MODEL, ids, batch.attention_mask)[0].softmax(-1)[batch.answer[0, 0]].item()
                                           for ids in (batch.clean, batch.corrupt))
    numbers = shown_probabilities(view)
    assert numbers[0] == f"{full:.2%}" and numbers[2] == f"{corrupt:.2%}" and ">corrupt prompt<" in view.answers.value


# --- the ablation

LONG = tasks.ioi(MODEL, n=(64, 8, 8))  # with pairs of every length to take other prompts from


@pytest.mark.parametrize("ablation", ABLATIONS)
def test_the_last_column_is_a_circuit_without_nodes(ablation):
    view = explore(CIRCUIT, MODEL, LONG, ablation=ablation)
    full, circuit, last = shown_probabilities(view)
    nothing = from_kept({"block": torch.zeros(4, dtype=torch.bool)}, SITES)
    for shown, applied in ((full, full_circuit(SITES)), (circuit, CIRCUIT), (last, nothing)):
        assert shown == applied_probability(applied, LONG.test[0], ablation, LONG)
    assert (">corrupt prompt<" in view.answers.value) == (ablation == "corrupt") == (">all ablated<" not in view.answers.value)
    said = html.unescape(view.held.value)
    assert (LONG.test[0].corrupt in said) == (ablation == "corrupt") == (what_it_holds(ABLATIONS[ablation]) not in said)


def test_the_ablations_that_are_offered_are_those_that_are_possible():
    assert view_options(TASK) == [*ABLATIONS]
    for pairs in (TASK.test[0], TASK.test, list(TASK.valid)): assert view_options(pairs) == ["corrupt", "zero"]
    for wrong in ("mean", "resample", "mean_by_position"):
        with pytest.raises(InputError, match="needs reference pairs"): explore(CIRCUIT, MODEL, TASK.test, ablation=wrong)
    with pytest.raises(InputError, match="expected one of corrupt"): explore(CIRCUIT, MODEL, TASK, ablation="noise")


def view_options(pairs): return list(explore(CIRCUIT, MODEL, pairs).ablation.options)


def test_it_starts_with_the_ablation_that_the_circuit_was_found_with():
    found = from_scores(CIRCUIT.scores, SITES, 1., ORIGIN | dict(ablation="mean"))
    view = explore(found, MODEL, TASK)
    assert view.ablation.value == "mean" and view.choice == Choice() and view.circuit is found
    assert shown_probability(view) == applied_probability(CIRCUIT, TASK.test[0], "mean") != applied_probability(CIRCUIT, TASK.test[0], "corrupt")
    other = found.explore(MODEL, TASK, ablation="zero")
    assert other.ablation.value == "zero" and other.choice == Choice(ablation="zero")
    other.ablation.value = "corrupt"
    other.reset_button.click()
    assert other.ablation.value == "zero" and shown_probability(other) == applied_probability(CIRCUIT, TASK.test[0], "zero")


def test_an_ablation_of_your_own():
    def half(host, pairs, reference, output): return ABLATIONS["corrupt"](host, pairs, reference, output).map(lambda t: t / 2)
    view = explore(CIRCUIT, MODEL, TASK.test, ablation=half)
    assert list(view.ablation.options) == ["corrupt", "zero", "half"] and view.ablation.value == "half" and "what half returns" in view.held.value
    assert shown_probability(view) == applied_probability(CIRCUIT, TASK.test[0], half)
    assert view.circuit.provenance.ablation == "half"


def test_a_mean_is_computed_once(monkeypatch):
    asked, mean = [], ABLATIONS["mean"]
    def counted(*of): asked.append(of); return mean(*of)
    monkeypatch.setattr("mgprune.widgets.mean", counted)
    monkeypatch.setitem(ABLATIONS, "mean", counted)
    view = explore(CIRCUIT, MODEL, TASK)
    view.ablation.value = "counted" if "counted" in view.ablation.options else "mean"
    for i in range(1, 4):
        view.prompt.value = i
        assert shown_probability(view) == applied_probability(CIRCUIT, TASK.test[i], mean)
    assert len(asked) == 1


def test_an_ablation_or_a_prompt_that_is_refused_is_told_and_the_control_goes_back():
    def length(pair): return len(MODEL.tokenizer(pair.clean).input_ids)
    one = length(LONG.test[0])
    few = replace(LONG, train=tuple(pair for pair in LONG.train if length(pair) == one))
    fitting = [length(pair) == one for pair in LONG.test]
    view = explore(CIRCUIT, MODEL, few)
    view.prompt.value = fitting.index(False)
    before = view.answers.value
    view.ablation.value = "mean_by_position"
    assert view.ablation.value == "corrupt" and "needs a reference pair of" in view.message.value and view.answers.value == before
    assert view.circuit is CIRCUIT and view.choice == Choice()
    view.ablation.value = "mean"
    assert view.message.value == "<div></div>" and view.answers.value != before
    view.prompt.value, view.ablation.value = fitting.index(True), "mean_by_position"
    view.prompt.value = fitting.index(False)
    assert view.prompt.value == fitting.index(True) and "needs a reference pair of" in view.message.value
    assert shown_probability(view) == applied_probability(CIRCUIT, few.test[fitting.index(True)], "mean_by_position", few)


# --- the choice

@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(NODES), st.booleans()), max_size=6), st.sampled_from([None, 0., 1.5, 9.]))
def test_clicks(clicks, threshold):
    choice = Choice(threshold=threshold)
    for node, opened in clicks:
        choice = toggled(CIRCUIT, choice, node, opened)
        circuit = chosen(CIRCUIT, choice)
        assert is_kept(circuit, node) == opened
        assert all(torch.equal(k, circuit.kept[l]) for l, k in close(circuit.kept, SITES).items())


def test_closing_and_opening_again_is_nothing():
    for node in [n for n in NODES if is_kept(CIRCUIT, n)]:
        assert toggled(CIRCUIT, toggled(CIRCUIT, Choice(), node, False), node, True) == Choice()


def test_closing_one_node_is_what_the_masks_say():
    for node in [n for n in NODES if is_kept(CIRCUIT, n)]:
        kept = {l: k.clone() for l, k in CIRCUIT.kept.items()}
        kept[node[0]][node[1:]] = False
        assert chosen(CIRCUIT, Choice(edits={node: False})) == from_kept(kept, SITES)


@pytest.mark.parametrize("level", ["head", "mlp", "attention_neuron", "mlp_neuron"])
def test_a_limit_holds_and_smaller_limits_are_subsets(level):
    whole = CIRCUIT.counts()[level][0]
    last = None
    for most in (whole + 1, whole, whole // 2, 1, 0):
        circuit = chosen(CIRCUIT, Choice(most={level: most}))
        assert circuit.counts()[level][0] == min(most, whole)
        if last: assert (last.kept[level] | ~circuit.kept[level]).all()
        last = circuit


def test_a_limit_is_a_threshold():
    "The best neurons of a level are those above some threshold"
    for threshold in (1.2, 2.):
        circuit = from_scores(CIRCUIT.scores, SITES, threshold)
        most = {l: circuit.counts()[l][0] for l in ("attention_neuron", "mlp_neuron")}
        assert chosen(CIRCUIT, Choice(most=most)) == circuit


@pytest.mark.parametrize("levels", [("head", "mlp"), ("mlp_output", "head"), ("block", "attention", "head", "attention_neuron", "mlp_neuron", "mlp_output")])
def test_other_levels(levels):
    circuit = made(levels, seed=1)
    view = explore(circuit, MODEL, TASK)
    node = ("head", *circuit.heads()[0])
    view.nodes[node].value = False
    assert set(view.circuit.kept) == set(circuit.kept) and not is_kept(view.circuit, node)
    view.nodes["mlp", 2].value = not view.nodes["mlp", 2].value
    view.threshold.index = len(view.threshold.options) - 2
    assert shown_probability(view) == applied_probability(view.circuit, TASK.test[0])


def test_every_level_that_holds_others_has_buttons():
    circuit = from_kept({l: torch.rand(s, generator=torch.Generator().manual_seed(1)) > .1 for l, s in level_shapes(SITES, LEVELS).items()}, SITES)
    assert clickable(circuit) == ("block", "attention", "group", "head", "mlp")
    view = explore(circuit, MODEL, TASK)
    groups = [node for node in view.nodes if node[0] == "group"]
    assert len(groups) == SITES.n_layers * SITES.n_groups and len(view.nodes) == sum(map(len, node_rows(circuit)))
    for node in (("attention", 1), ("group", 2, 0), ("block", 3), ("head", 1, 2)):
        was = is_kept(view.circuit, node)
        view.nodes[node].value = not was
        assert is_kept(view.circuit, node) != was and shown_probability(view) == applied_probability(view.circuit, TASK.test[0])
    for node in (("attention", 0), *groups[:2]):
        kept = {l: k.clone() for l, k in circuit.kept.items()}
        kept[node[0]][node[1:]] = False
        if is_kept(circuit, node): assert chosen(circuit, Choice(edits={node: False})) == from_kept(kept, SITES)


def test_experts_can_be_limited_but_not_clicked():
    config = MixtralConfig(vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                           num_local_experts=4, num_experts_per_tok=2)
    sites = find_sites(MixtralForCausalLM(config))
    noise = torch.Generator().manual_seed(0)
    circuit = from_scores({l: torch.randn(s, generator=noise) + 2 for l, s in level_shapes(sites).items()}, sites, 1.)
    assert "expert" in circuit.kept and "expert" not in clickable(circuit) and limits(circuit)["expert"] == "experts"
    few = chosen(circuit, Choice(most=dict(expert=3)))
    assert len(few.experts()) == 3
    ranks = lowest(circuit.scores, sites)["mlp_neuron"].masked_fill(~circuit.kept["mlp_neuron"], -torch.inf)
    marks = {node: torch.zeros(sites.n_layers, sites.n_experts).index_put((torch.tensor(node[0]), torch.tensor(node[1])), torch.tensor(1.)) for node in circuit.experts()}
    best = {node: ranks[at_level(mark, "expert", "mlp_neuron", sites) > 0].max().item() for node, mark in marks.items()}
    assert {*few.experts()} == {*sorted(best, key=best.get)[-3:]}


def test_without_scores_nodes_can_still_be_closed():
    circuit = from_kept(CIRCUIT.kept, SITES, provenance=dict(ORIGIN))
    view = explore(circuit, MODEL, TASK)
    assert view.threshold.disabled and all(slider.disabled for slider in view.most.values())
    view.nodes["block", 3].value = not view.nodes["block", 3].value
    assert shown_probability(view) == applied_probability(view.circuit, TASK.test[0]) and view.circuit != circuit


@pytest.mark.parametrize("node", [("head", 0, 4), ("head", 0), ("mlp", -1), ("block", 9), ("attention", 0), "head", ()])
def test_unknown_nodes_are_refused(node):
    with pytest.raises(InputError, match="expected"): chosen(CIRCUIT, Choice(edits={node: False}))


# --- saving and showing

def test_saved_with_what_was_done_and_without_old_measures(view, tmp_path):
    view.threshold.index = 20
    view.nodes["mlp", 0].value = not view.nodes["mlp", 0].value
    view.path.value = f"{tmp_path}/new/edited.json"
    view.save_button.click()
    again = Circuit.load(tmp_path / "new/edited.json", MODEL)
    assert again == view.circuit and view.message.value.startswith("<div>saved") and again.provenance.ablation == "corrupt"
    assert not {"metrics", "history"} & set(again.provenance) and again.provenance["edited"][0]["edits"][0][:2] == ["mlp", 0]
    reopened = explore(again, MODEL, TASK)  # its slider goes over the same scores
    assert reopened.circuit == view.circuit and len(reopened.threshold.options) > 10
    reopened.nodes["mlp", 1].value = not reopened.nodes["mlp", 1].value
    assert len(reopened.circuit.provenance["edited"]) == 2


def test_the_saved_circuit_says_the_ablation_that_was_selected(view, tmp_path):
    view.ablation.value = "mean"
    view.nodes["mlp", 0].value = not view.nodes["mlp", 0].value
    view.path.value = f"{tmp_path}/edited.json"
    view.save_button.click()
    again = Circuit.load(tmp_path / "edited.json", MODEL)
    assert again.provenance.ablation == "mean" == again.provenance.notes["edited"][0]["ablation"] and again == view.circuit
    assert evaluate(again, MODEL, TASK) == {k: v for k, v in evaluate(again, MODEL, TASK, "mean").items() if k != "ablation"}
    reopened = explore(again, MODEL, TASK)  # with the same ablation
    assert reopened.ablation.value == "mean" and reopened.choice == Choice() and reopened.answers.value == view.answers.value
    assert CIRCUIT.provenance == ORIGIN  # the circuit that was opened says what it said


def test_a_path_that_cannot_be_written_is_told(view, tmp_path):
    (tmp_path / "file").write_text("")
    view.path.value = f"{tmp_path}/file/edited.json"
    view.save_button.click()
    assert "not saved: cannot write" in view.message.value


def test_as_opened_undoes_everything(view):
    view.nodes["block", 0].value = not view.nodes["block", 0].value
    view.threshold.index = 3
    view.most["head"].value = 1
    view.reset_button.click()
    assert view.circuit is CIRCUIT and view.choice == Choice()


def test_the_frozen_view_says_what_the_widget_says(view):
    view.nodes["block", 0].value = not view.nodes["block", 0].value
    bundle = view._repr_mimebundle_()
    assert bundle["text/html"] == frozen_html(view) and answer(view) in bundle["text/html"] and TASK.test[0].clean in bundle["text/html"]
    assert "application/vnd.jupyter.widget-view+json" in bundle and bundle["text/plain"].startswith("Explorer")
    assert bundle["text/html"].count("rgba(1,115,178,.4)") == sum(is_kept(view.circuit, n) for n in NODES)


def test_one_pair_and_lists_of_pairs():
    assert explore(CIRCUIT, MODEL, TASK.test[1]).pairs == [TASK.test[1]]
    assert explore(CIRCUIT, MODEL, TASK.valid).pairs == list(TASK.valid)
    for bad in ([], "ioi", 3, [1]):
        with pytest.raises(InputError, match="expected a Task"): explore(CIRCUIT, MODEL, bad)


def test_the_wrong_model_is_refused():
    other = Circuit(CIRCUIT.kept, SITES, CIRCUIT.scores, dict(ORIGIN, fingerprint="0" * 16))
    with pytest.raises(InputError, match="fingerprint"): explore(other, MODEL, TASK)
    with pytest.raises(InputError, match="the circuit comes first"): explore(MODEL, CIRCUIT, TASK)


def test_undo_goes_back_change_by_change(view):
    seen = [view.choice]
    for change in (lambda: view.nodes["head", 1, 2].set_trait("value", not view.nodes["head", 1, 2].value),
                   lambda: view.most["head"].set_trait("value", 3), lambda: view.threshold.set_trait("index", 2)):
        change()
        seen.append(view.choice)
    assert len({str(choice) for choice in seen}) == 4
    for choice in reversed(seen[:-1]):
        view.undo_button.click()
        assert view.choice == choice
    assert view.circuit is CIRCUIT and view.undo_button.disabled


def test_moves_of_one_slider_are_one_change(view):
    for index in (2, 5, 9): view.threshold.index = index
    view.undo_button.click()
    assert view.choice == Choice()


def test_presets_say_what_they_do(view):
    view.preset.value = "everything"
    assert view.circuit.n_neurons() == 2560
    view.preset.value = "heads alone"
    assert not view.circuit.mlps() and view.circuit.heads() == CIRCUIT.heads()
    view.preset.value = "half as many neurons"
    assert .35 < view.circuit.n_neurons() / CIRCUIT.n_neurons() < .65
    view.preset.value = "as opened"
    assert view.circuit is CIRCUIT


def test_notes_are_saved_with_the_circuit_and_opened_again(view, tmp_path):
    view.look.value, view.note.value = ("head", 2, 1), "moves the <name>"
    view.look.value = ("mlp", 0)
    assert view.note.value == ""
    view.path.value = str(tmp_path / "noted.json")
    view.save_button.click()
    again = explore(Circuit.load(tmp_path / "noted.json"), MODEL, TASK)
    again.look.value = ("head", 2, 1)
    assert again.note.value == "moves the <name>" and again.notes == view.notes
    again.note.value = " "
    assert not again.notes and "on_nodes" not in again.circuit.provenance.notes


def test_a_click_says_where_a_head_looks_and_what_its_neurons_write(view):
    for node in (("head", 3, 0), ("head", 3, 0)): view.nodes[node].value = not view.nodes[node].value
    patterns, tokens = attention_patterns(MODEL, TASK.test[0].clean, [(3, 0)])
    assert view.look.value == ("head", 3, 0) and repr(tokens[patterns[0, -1].argmax()]) in html.unescape(view.detail.value)
    assert f"{patterns[0, -1].max():.0%}" in view.detail.value and view.detail.value.count("neuron ") == 3
