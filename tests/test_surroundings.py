"""What surrounds a search: switches of torch, threads, interrupts, circuits that are applied, pairs that tell nothing."""
import copy
import threading
import warnings
from dataclasses import replace

import pytest
import torch

from mgprune import Circuit, discover, edges, evaluate, load_model, tasks
from mgprune.applied import recorded_prompts
from mgprune.attribution import attribute
from mgprune.circuit import from_kept
from mgprune.gates import HardConcrete
from mgprune.hooks import host_of
from mgprune.models import InputError
from mgprune.passes import answer_logits, circuit_logits, record
from mgprune.recipe import Recipe
from mgprune.sites import find_sites
from mgprune.streams import logits_of, prepare
from mgprune.training import instead

QUICK = Recipe(steps=20, confidence=None)


@pytest.fixture(scope="module")
def task(model):
    return tasks.ioi(model, n=(48, 16, 32))


@pytest.fixture(scope="module")
def circuit(model):
    return from_kept({"head": torch.eye(4, dtype=torch.bool)}, find_sites(model))


@pytest.fixture(scope="module")
def logits(model, task, circuit):
    "What the circuit answers to the test prompts"
    batch = task.batch("test")
    with torch.no_grad():
        return circuit_logits(host_of(model), batch, circuit.masks(), record(host_of(model), batch.corrupt, batch.attention_mask))


def tokens(model, prompts, side):
    return model.tokenizer(prompts, return_tensors="pt", padding=True, padding_side=side)


def last(model, rows):
    "Logits at each row's last token"
    where = rows["attention_mask"].shape[1] - 1 - rows["attention_mask"].flip(1).argmax(1)
    return model(**rows).logits[torch.arange(len(where)), where]


# --- applied

@pytest.mark.parametrize("side", ["left", "right"])
def test_applied_knows_its_prompts_in_any_order_and_padding(model, task, circuit, logits, side):
    order = torch.randperm(32, generator=torch.Generator().manual_seed(0))[:20].tolist()
    with torch.no_grad(), circuit.applied(model, task):
        assert torch.allclose(last(model, tokens(model, [task.test[i].clean for i in order], side)), logits[order], atol=1e-4)
        for i in (3, 17): assert torch.allclose(last(model, tokens(model, [task.test[i].clean], side))[0], logits[i], atol=1e-4)
        assert torch.equal(answer_logits(model, task.batch("test").clean, task.batch("test").attention_mask), logits)


def test_applied_to_generate_one_token(model, task, circuit, logits):
    with torch.no_grad(), circuit.applied(model, task):
        rows = tokens(model, [task.test[5].clean], "left")
        assert model.generate(**rows, max_new_tokens=1, do_sample=False)[0, -1] == logits[5].argmax()
        with pytest.raises(InputError, match="goes on is another prompt"): model.generate(**rows, max_new_tokens=2)


def test_applied_refuses_what_was_not_recorded(model, task, circuit):
    rows = tokens(model, [task.test[5].clean, task.test[6].clean], "left")
    ids, mask = rows["input_ids"], rows["attention_mask"]
    longer = torch.cat([ids, ids[:, -1:]], 1)
    wrong = [dict(input_ids=task.batch("test").corrupt), dict(input_ids=longer), dict(inputs_embeds=model.transformer.wte(ids)),
             dict(input_ids=ids, position_ids=torch.zeros_like(ids)), dict(input_ids=ids, attention_mask=mask[:, 1:]),
             dict(input_ids=ids, attention_mask=torch.cat([mask[:, :-1], 0 * mask[:, :1]], 1))]
    with torch.no_grad(), circuit.applied(model, task):
        for call in wrong:
            with pytest.raises(InputError): model(**call)
        with pytest.raises(InputError, match="only a part"): model.transformer(ids)


def test_a_prompt_with_two_corrupt_twins_is_told_by_its_place(model, task, circuit):
    batch = task.batch("test")
    twins = replace(batch[[0, 0]], corrupt=batch.corrupt[[0, 1]])
    if (batch.attention_mask[0] != batch.attention_mask[1]).any(): twins = replace(batch[[0, 0]], corrupt=torch.stack([batch.corrupt[0], batch.clean[0]]))
    expected = circuit_logits(host_of(model), twins, circuit.masks(), record(host_of(model), twins.corrupt, twins.attention_mask))
    with torch.no_grad(), circuit.applied(model, twins):
        assert torch.allclose(answer_logits(model, twins.clean, twins.attention_mask), expected, atol=1e-4)
        with pytest.raises(InputError, match="recorded with 2 corrupt prompts"): answer_logits(model, twins.clean[:1], twins.attention_mask[:1])


def test_nothing_is_measured_while_a_circuit_is_applied(model, task, circuit):
    with circuit.applied(model, task):
        for use in (lambda: evaluate(circuit, model, task), lambda: prepare(model, task.batch("test")), lambda: attribute(model, task, "gradient"),
                    lambda: circuit.applied(model, task).__enter__(), lambda: discover(model, task, recipe=QUICK, progress=False)):
            with pytest.raises(InputError, match="a circuit is applied to this model"): use()
    assert evaluate(circuit, model, task)["kl"] > 0


def test_another_threads_prompts_are_refused(model, task, circuit):
    said = []
    def other():
        for use in (lambda: model(task.batch("test").clean), lambda: evaluate(circuit, model, task)):
            try: said.append(use())
            except InputError as e: said.append(str(e))
    with circuit.applied(model, task):
        thread = threading.Thread(target=other)
        thread.start(); thread.join()
    assert all("another thread" in s or "is applied" in s for s in said) and len(said) == 2


def test_applied_is_in_evaluation_mode(task, circuit, logits):
    noisy = load_model()
    for module in noisy.modules():
        if isinstance(module, torch.nn.Dropout): module.p = .5
    noisy.train()
    batch = task.batch("test")
    with torch.no_grad(), circuit.applied(noisy, task): assert torch.equal(answer_logits(noisy, batch.clean, batch.attention_mask), logits)
    assert noisy.training


def test_applied_takes_a_mask_of_any_kind_and_refuses_what_alters_the_stream(model, task, circuit, logits):
    batch = task.batch("test")
    with torch.no_grad(), circuit.applied(model, task):
        for mask in (batch.attention_mask * 2, batch.attention_mask.bool(), batch.attention_mask.float()):
            assert torch.equal(model(batch.clean, attention_mask=mask).logits[:, -1], logits)
        with pytest.raises(InputError, match="without token_type_ids"): model(batch.clean, attention_mask=batch.attention_mask, token_type_ids=torch.zeros_like(batch.clean))


def test_a_copy_made_while_a_circuit_is_applied_is_the_plain_model(model, task, circuit):
    batch = task.batch("test")
    with torch.no_grad():
        plain = answer_logits(model, batch.clean, batch.attention_mask)
        with circuit.applied(model, task): twin = copy.deepcopy(model)
        assert torch.equal(answer_logits(twin, batch.clean, batch.attention_mask), plain)


def test_a_context_may_be_left_in_another_thread(model, task, circuit):
    context = circuit.applied(model, task)
    thread = threading.Thread(target=context.__enter__)
    thread.start(); thread.join()
    context.__exit__(None, None, None)
    said = []
    for _ in range(2):
        thread = threading.Thread(target=lambda: said.append(evaluate(circuit, model, task)))
        thread.start(); thread.join()
    assert said[0] == said[1] == evaluate(circuit, model, task)


def test_a_hook_that_runs_the_model_is_refused(task, circuit):
    model, running = load_model(), []
    def again(module, args, result):
        if not running:
            running.append(1)
            try: model(task.batch("test").corrupt[:2])
            finally: running.clear()
    handle = model.transformer.h[2].register_forward_hook(again)
    with pytest.raises(InputError, match="take the hook off"): evaluate(circuit, model, task)
    handle.remove()
    assert evaluate(circuit, model, task)["kl"] > 0


# --- pairs and examples

def test_pairs_without_wrong_answers(model, task):
    pairs = [dict(clean=p.clean, corrupt=p.corrupt, answer=p.answer) for p in task.train]
    circuit = discover(model, tasks.from_pairs(model, pairs), keep=.3, recipe=QUICK, progress=False)
    assert circuit.provenance["metrics"]["full_accuracy"] == 1


def test_examples_of_other_weights_are_refused(task, circuit):
    model = load_model()
    examples = prepare(model, task.batch("test"))
    assert evaluate(circuit, model, examples) == evaluate(circuit, model, task)
    with torch.no_grad(): model.transformer.h[0].attn.c_proj.weight.mul_(2)
    bare = replace(circuit, provenance={})
    with pytest.raises(InputError, match="other weights"): evaluate(bare, model, examples)
    with pytest.raises(InputError, match="other weights"): attribute(model, examples, "gradient")


def test_every_use_refuses_a_task_of_another_tokenizer(model, task, circuit):
    other = load_model().tokenizer
    other.add_tokens(["another"])
    foreign = replace(task, tokenizer=other)
    for use in (lambda: evaluate(circuit, model, foreign), lambda: attribute(model, foreign, "gradient"), lambda: circuit.applied(model, foreign).__enter__()):
        with pytest.raises(InputError, match="tokenizer of another model"): use()


@pytest.mark.parametrize("change, says", [
    (lambda b: dict(answer=torch.cat([b.answer, b.answer], 1)), "names a token twice"), (lambda b: dict(wrong=b.answer), "names a token twice"),
    (lambda b: dict(answer=torch.full_like(b.answer, -7)), "filled up with -1"), (lambda b: dict(answer=torch.cat([0 * b.answer - 1, b.answer], 1)), "filled up with -1"),
    (lambda b: dict(answer=b.answer[1:]), "filled up with -1"), (lambda b: dict(clean=b.clean.float()), "whole numbers"), (lambda b: dict(clean=-1 - b.clean), "negative token"),
    (lambda b: dict(attention_mask=b.attention_mask.index_fill(1, torch.tensor([3]), 0).bool()), "padded on the left")])
def test_a_batch_made_by_hand_is_checked(model, task, change, says):
    batch = task.batch("test")[:4]
    with pytest.raises(InputError, match=says): prepare(model, replace(batch, **change(batch)))


# --- interrupts

def hooks_of(model): return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupt_at_any_registration_leaves_no_hook(task, circuit, monkeypatch, error):
    model, register, calls = load_model(), torch.nn.Module.register_forward_pre_hook, []
    right = evaluate(circuit, model, task)
    def stopping(self, *args, **named):
        handle = register(self, *args, **named)
        calls.append(1)
        if len(calls) == at: raise error
        return handle
    for at in range(1, 12):
        calls.clear()
        with monkeypatch.context() as patch, pytest.raises(error):
            patch.setattr(torch.nn.Module, "register_forward_pre_hook", stopping)
            with circuit.applied(model, task) if at % 2 else recorded_prompts(model, task.batch("test"), record(host_of(model), task.batch("test").corrupt, task.batch("test").attention_mask)): pass
            evaluate(circuit, model, task)
        assert hooks_of(model) == 0
    assert evaluate(circuit, model, task) == right


# --- switches of torch

def test_gradients_switched_off_for_the_whole_notebook(model, task):
    on = discover(model, task, keep=.2, recipe=QUICK, progress=False)
    torch.set_grad_enabled(False)
    try:
        assert discover(model, task, keep=.2, recipe=QUICK, progress=False) == on
        assert attribute(model, task, "gradient")["mlp_neuron"].any()
        assert not torch.is_grad_enabled()
    finally: torch.set_grad_enabled(True)


def test_inference_mode_is_refused(model, task):
    with torch.inference_mode(), pytest.raises(InputError, match="inference_mode is on"): discover(model, task, recipe=QUICK, progress=False)


def test_a_padding_token_beyond_the_embedding_is_no_matter(task):
    other = load_model()
    other.tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    assert other.tokenizer.pad_token_id >= other.config.vocab_size
    again = tasks.ioi(other, n=(48, 16, 32))
    assert discover(other, again, keep=.2, recipe=QUICK, progress=False) == discover(load_model(), task, keep=.2, recipe=QUICK, progress=False)


def test_a_task_of_another_tokenizer_is_refused(model, task):
    other = load_model().tokenizer
    other.add_tokens(["another"])
    with pytest.raises(InputError, match="tokenizer of another model"): discover(model, replace(task, tokenizer=other), recipe=QUICK, progress=False)


def test_a_circuit_without_a_fingerprint_says_so(model, circuit, tmp_path):
    path = circuit.save(tmp_path / "bare.json")
    with pytest.warns(UserWarning, match="does not say which weights"): assert Circuit.load(path, model) == circuit


# --- pairs that tell nothing

def searched(model, pairs, capsys):
    "What a search says and warns about these pairs"
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        discover(model, tasks.from_pairs(model, pairs), kl=1e-3, recipe=QUICK, progress=True)
    return capsys.readouterr().out, " ".join(str(w.message) for w in seen)


def rows(task): return [dict(clean=p.clean, corrupt=p.corrupt, answer=p.answer, wrong=p.wrong) for p in task.train + task.valid + task.test]


def test_good_pairs_are_not_warned_about(model, task, capsys):
    said, warned = searched(model, rows(task), capsys)
    assert "correct answers have probability" in said and "on corrupt prompts" in said
    assert not any(words in warned for words in ("probability of only", "as on the clean ones", "the two prompts are the same", "the same token twice"))


def test_answers_that_the_model_hardly_gives(model, task, capsys):
    unlikely = [row | dict(answer=" garden", wrong=(" zoo",)) for row in rows(task)]
    assert "probability of only" in searched(model, unlikely, capsys)[1]


def test_an_unlikely_answer_is_said_with_what_the_model_says_instead(model, task, capsys):
    unlikely = [row | dict(answer=" garden", wrong=(" zoo",)) for row in rows(task)]
    assert "it answers something else, most often ' " in searched(model, unlikely, capsys)[1]


@pytest.mark.parametrize("said, answer, slip", [(" 17", "17", "was the space before the answer forgotten?"), ("17", " 17", "is there a space too many?")])
def test_a_slip_of_the_space_is_named(model, task, said, answer, slip):
    own = tasks.from_pairs(model, [row | dict(answer=answer, wrong=(" zoo",)) for row in rows(task)])
    examples = prepare(model, own, "train")
    full = torch.full_like(examples.full, -30.)
    full[:, tasks.answer_id(said, model)] = 0
    found = instead(own, replace(examples, full=full))
    assert found == f": it answers {said!r} instead of {answer!r}, so in {len(examples)} of {len(examples)} pairs; {slip}"
    full[:, tasks.answer_id(answer, model)] = 1
    assert instead(own, replace(examples, full=full)) == ""


def test_a_corruption_that_leaves_the_model_right(model, task, capsys):
    kept = [row | dict(corrupt=row["clean"].replace(f" {place}", " zoo")) for row in rows(task) for place in ("store", "park", "school", "library", "garden")
            if f" {place}" in row["clean"]]
    assert len(kept) > 8 and "as on the clean ones" in searched(model, kept, capsys)[1]


def test_pairs_of_two_equal_prompts(model, task, capsys):
    half = [row | (dict(corrupt=row["clean"]) if i % 2 else {}) for i, row in enumerate(rows(task))]
    assert "48 of 96 pairs" in searched(model, half, capsys)[1]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_another_default_type_of_numbers_changes_nothing(model, task, tmp_path, dtype):
    def found():
        circuits = [discover(model, task, kl=.5, recipe=QUICK, progress=False, **more) for more in ({}, dict(gate=HardConcrete()))]
        again = Circuit.load(circuits[0].save(tmp_path / "one"), model)
        graph = edges(again, model, task, kl=3, recipe=Recipe(steps=3, confidence=None, trim=False))
        return [*circuits, again, graph], evaluate(again, model, task), attribute(model, task.train[:8])
    usual = found()
    try:
        torch.set_default_dtype(dtype)
        other = found()
    finally: torch.set_default_dtype(torch.float32)
    assert usual[:2] == other[:2] and all(torch.equal(v, other[2][k]) for k, v in usual[2].items())


def test_a_switch_that_transformers_leaves_on_gives_no_gradient_to_measures(task, circuit):
    model = load_model()
    model.gradient_checkpointing_enable()  # leaves a hook behind by which embeddings ask for a gradient
    assert not logits_of(circuit, prepare(model, task)).requires_grad
