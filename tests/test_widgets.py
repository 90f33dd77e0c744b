"""The explorer without a browser: every control does to the circuit, and to the answers, what the slow way says."""
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mgprune import Circuit, load_model, tasks
from mgprune.circuit import from_kept, from_scores
from mgprune.masks import close, level_shapes
from mgprune.models import InputError, fingerprint
from mgprune.sites import find_sites
from mgprune.streams import answer_logits
from mgprune.tasks import encode
from mgprune.widgets import Choice, chosen, explore, frozen_html, is_kept, toggled

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


def applied_probability(circuit, pair):
    "Probability of the right answer when the circuit is applied, as the view writes it"
    batch = encode([pair], MODEL)
    with torch.no_grad(), circuit.applied(MODEL, batch): logits = answer_logits(MODEL, batch.clean, batch.attention_mask)
    return f"{logits[0].softmax(-1)[batch.answer[0, 0]].item():.2%}"


def shown_probability(view):
    "The same, read from the view: the second number of the row of the right answer"
    row = view.answers.value.split(">right<")[1].split("</tr>")[0]
    return row.split('%)">')[2].split("<")[0]


@pytest.fixture
def view(): return explore(CIRCUIT, MODEL, TASK)


def test_opened_as_it_is(view):
    assert view.circuit is CIRCUIT and view.choice == Choice()
    assert {n for n, b in view.nodes.items() if b.value} == {n for n in NODES if is_kept(CIRCUIT, n)}
    assert set(view.nodes) == set(NODES) and shown_probability(view) == applied_probability(CIRCUIT, TASK.test[0])


def test_every_control_shows_what_applied_computes(view):
    rng, seen = random.Random(0), set()
    for _ in range(12):
        kind = rng.choice(("node", "node", "threshold", "most", "prompt"))
        if kind == "node":
            button = view.nodes[rng.choice(NODES)]
            button.value = not button.value
        elif kind == "threshold": view.threshold.index = rng.randrange(len(view.threshold.options))
        elif kind == "most": view.most["mlp_neuron"].value = rng.choice((100, 800, 2048))
        else: view.prompt.value = rng.randrange(6)
        assert view.circuit == chosen(CIRCUIT, view.choice)
        assert shown_probability(view) == applied_probability(view.circuit, TASK.test[view.prompt.value])
        assert {n for n, b in view.nodes.items() if b.value} == {n for n in NODES if is_kept(view.circuit, n)}
        seen.add(shown_probability(view))
    assert len(seen) > 4


def test_the_columns_are_full_circuit_and_corrupt(view):
    batch = encode([TASK.test[0]], MODEL)
    with torch.no_grad(): full, corrupt = (answer_logits(MODEL, ids, batch.attention_mask)[0].softmax(-1)[batch.answer[0, 0]].item()
                                           for ids in (batch.clean, batch.corrupt))
    row = view.answers.value.split(">right<")[1].split("</tr>")[0].split('%)">')
    numbers = [part.split("<")[0] for part in row[1:]]
    assert numbers[0] == f"{full:.2%}" and numbers[2] == f"{corrupt:.2%}"


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
    assert again == view.circuit and view.message.value.startswith("<div>saved")
    assert not {"metrics", "history"} & set(again.provenance) and again.provenance["edited"][0]["edits"][0][:2] == ["mlp", 0]
    reopened = explore(again, MODEL, TASK)  # its slider goes over the same scores
    assert reopened.circuit == view.circuit and len(reopened.threshold.options) > 10
    reopened.nodes["mlp", 1].value = not reopened.nodes["mlp", 1].value
    assert len(reopened.circuit.provenance["edited"]) == 2


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
    assert bundle["text/html"] == frozen_html(view) and view.answer() in bundle["text/html"] and TASK.test[0].clean in bundle["text/html"]
    assert "application/vnd.jupyter.widget-view+json" in bundle and bundle["text/plain"].startswith("Explorer")
    assert bundle["text/html"].count("background:#0173b2") == sum(is_kept(view.circuit, n) for n in NODES)


def test_one_pair_and_lists_of_pairs():
    assert explore(CIRCUIT, MODEL, TASK.test[1]).pairs == [TASK.test[1]]
    assert explore(CIRCUIT, MODEL, TASK.valid).pairs == list(TASK.valid)
    for bad in ([], "ioi", 3, [1]):
        with pytest.raises(InputError, match="expected a Task"): explore(CIRCUIT, MODEL, bad)


def test_the_wrong_model_is_refused():
    other = Circuit(CIRCUIT.kept, SITES, CIRCUIT.scores, dict(ORIGIN, fingerprint="0" * 16))
    with pytest.raises(InputError, match="fingerprint"): explore(other, MODEL, TASK)
