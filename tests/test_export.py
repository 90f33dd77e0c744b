"""What leaves the library: smaller checkpoints that compute what the circuit does, pages, graphs, tables, and the hub."""
import base64
import json
import re
import xml.etree.ElementTree as xml
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM, SmolLM3Config, SmolLM3ForCausalLM

from families import TINY, pairs, tiny
from mgprune import export, planted, plots, tasks
from mgprune.ablations import ABLATIONS, each_pair, mean, zero
from mgprune.arguments import InputError
from mgprune.circuit import Circuit, edge_counts, from_kept, from_scores, full_circuit
from mgprune.evaluation import evaluate
from mgprune.export import to_folder
from mgprune.hooks import host_of
from mgprune.models import load_model
from mgprune.objective import kl_divergence
from mgprune.pairs import Batch
from mgprune.passes import Recording, answer_logits, circuit_logits, interpolated
from mgprune.plots import plot_scores
from mgprune.recipe import Recipe
from mgprune.sites import FAMILIES, find_sites
from mgprune.streams import prepare
from mgprune.training import discover
from mgprune.tree import FINEST, LEVELS, NEURONS, TREE, level_shapes

SHAPE = dict(vocab_size=60, hidden_size=64, intermediate_size=48, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=2,
             bos_token_id=0, eos_token_id=0, pad_token_id=0)
MODELS = dict(
    gpt2=lambda: GPT2LMHeadModel(GPT2Config(vocab_size=60, n_embd=64, n_inner=48, n_layer=4, n_head=8, n_positions=32, bos_token_id=0, eos_token_id=0)),
    llama=lambda: LlamaForCausalLM(LlamaConfig(**SHAPE)),
    llama_tied_and_biased=lambda: LlamaForCausalLM(LlamaConfig(**SHAPE, attention_bias=True, mlp_bias=True, tie_word_embeddings=True)),
    mistral=lambda: MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=4)),
    qwen2=lambda: Qwen2ForCausalLM(Qwen2Config(**SHAPE)),
    qwen3=lambda: Qwen3ForCausalLM(Qwen3Config(**SHAPE, head_dim=16)),
    smollm3=lambda: SmolLM3ForCausalLM(SmolLM3Config(**SHAPE)))
architectures = pytest.mark.parametrize("name", MODELS)


def random_model(name):
    "A model whose weights and biases are all random, so that a bias that is lost shows"
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    with torch.no_grad():
        for p in model.parameters(): p.copy_(torch.randn_like(p) * (0.3 if p.dim() > 1 else 0.5) + (p.dim() == 1))
    return model


def random_circuit(model, share, seed=0, levels=("block", "head", "mlp", "attention_neuron", "mlp_neuron")):
    torch.manual_seed(seed)
    return from_kept({l: torch.rand(s) < (share if l in FINEST.values() else .6) for l, s in level_shapes(find_sites(model), levels).items()}, find_sites(model))


def random_batch(model, n=4, length=9):
    clean, corrupt = torch.randint(1, model.config.vocab_size, (2, n, length), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(clean)
    mask[0, :3] = 0
    none = torch.full((n, 1), -1)
    return Batch(clean, corrupt, mask, none, none)


def run(model, batch):
    with torch.no_grad(): return answer_logits(model, batch.clean, batch.attention_mask)


def under(model, circuit, batch, held):
    "Logits of the circuit with ablated nodes at constants, by hooks"
    with interpolated(host_of(model), circuit.masks(), held): return run(model, batch)


def constants(model, ablation="zero", reference=None):
    "What ablated nodes of an exported circuit are held at, MLP outputs as well"
    return export.constants(host_of(model), ablation, reference, True)


def exported(circuit, model, path, **options):
    about = circuit.export(model, path, **options)
    small = AutoModelForCausalLM.from_pretrained(path).eval()
    assert sum(p.numel() for p in small.parameters()) == about["parameters"][1] and export.parameters(model) == about["parameters"][0]
    return small, about


# --- smaller checkpoints

@architectures
@pytest.mark.parametrize("share", (.1, .7))
def test_the_smaller_model_computes_the_circuit(name, share, tmp_path):
    model = random_model(name)
    batch = random_batch(model)
    for seed in range(4):
        circuit = random_circuit(model, share, seed)
        small, about = exported(circuit, model, tmp_path / str(seed))
        wanted = under(model, circuit, batch, constants(model))
        assert (wanted - run(model, batch)).abs().max() > .1  # the circuit does something else than the model
        torch.testing.assert_close(run(small, batch), wanted, atol=1e-4, rtol=1e-4)
        assert about["parameters"][1] < about["parameters"][0]
        assert about["neurons_per_mlp"][1] == max(1, circuit.kept["mlp_neuron"].sum(-1).max())


@pytest.mark.parametrize("name", ("gpt2", "llama", "llama_tied_and_biased", "smollm3"))
def test_means_go_into_the_biases(name, tmp_path):
    model = random_model(name)
    batch = random_batch(model)
    for seed in range(4):
        circuit = random_circuit(model, .3, seed)
        small, _ = exported(circuit, model, tmp_path / str(seed), ablation="mean", reference=batch)
        wanted = under(model, circuit, batch, constants(model, "mean", batch))
        assert (wanted - under(model, circuit, batch, constants(model))).abs().max() > .1  # means are not zeros
        torch.testing.assert_close(run(small, batch), wanted, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ("mistral", "qwen2", "qwen3"))
def test_means_without_a_bias_to_hold_them_are_refused(name, tmp_path):
    model = random_model(name)
    with pytest.raises(InputError, match="no bias that could hold the means"):
        random_circuit(model, .3).export(model, tmp_path / "x", "mean", random_batch(model))
    assert not (tmp_path / "x").exists()


def test_the_mean_is_over_tokens_and_not_over_padding():
    model = random_model("gpt2")
    batch = random_batch(model)
    seen = []
    handle = model.get_submodule(find_sites(model).mlp[1]).register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad(): answer_logits(model, batch.corrupt, batch.attention_mask)
    handle.remove()
    by_hand = torch.cat([row[mask.bool()] for row, mask in zip(seen[0], batch.attention_mask)]).mean(0)
    torch.testing.assert_close(constants(model, "mean", batch).mlp[1].flatten(), by_hand)


def test_means_of_a_large_batch_are_those_of_the_whole():
    model = random_model("gpt2")
    batch = random_batch(model, n=70)
    whole, *parts = (constants(model, "mean", batch[rows]) for rows in (torch.arange(70), *torch.arange(70).split(7)))
    weights = torch.tensor([batch[rows].attention_mask.sum() for rows in torch.arange(70).split(7)]) / batch.attention_mask.sum()
    torch.testing.assert_close(whole.attention[2], sum(w * p.attention[2] for w, p in zip(weights, parts)))


@pytest.mark.parametrize("architecture", planted.ARCHITECTURES)
@pytest.mark.parametrize("task", ("ioi", "greater_than", "gendered_pronoun"))
def test_planted_circuits(architecture, task, tmp_path):
    model, nodes = planted.build(3, .01, architecture)
    circuit, batch = from_kept(nodes[task], find_sites(model)), tasks.load(model, task).batch("test")[:64]
    small, about = exported(circuit, model, tmp_path / "small")
    torch.testing.assert_close(run(small, batch), under(model, circuit, batch, constants(model)), atol=1e-4, rtol=1e-4)
    assert about["neurons_per_mlp"][1] == nodes[task]["mlp_neuron"].sum(-1).max()
    assert about["heads_per_layer"][1] < 8 or architecture == "gpt2"


def test_the_embedded_model(tmp_path):
    model = load_model()
    batch = tasks.ioi(model).batch("test")[:64]
    circuit = random_circuit(model, .5)
    small, about = exported(circuit, model, tmp_path / "small")
    torch.testing.assert_close(run(small, batch), under(model, circuit, batch, constants(model)), atol=1e-4, rtol=1e-4)
    again = load_model(tmp_path / "small")
    assert again.tokenizer.get_vocab() == model.tokenizer.get_vocab() and Circuit.from_hub(tmp_path / "small", model) == circuit


@architectures
def test_closed_layers_go_and_leave_their_constant(name, tmp_path):
    model = random_model(name)
    batch = random_batch(model)
    for closed in ([1, 2], [0, 3], [0, 1, 2, 3]):
        kept = torch.ones(4, dtype=torch.bool)
        kept[closed] = False
        circuit = from_kept({"block": kept}, find_sites(model))
        small, about = exported(circuit, model, tmp_path / str(len(closed) + closed[0] / 10))
        torch.testing.assert_close(run(small, batch), under(model, circuit, batch, constants(model)), atol=1e-4, rtol=1e-4)
        assert about["layers"][1] < 4


@pytest.mark.parametrize("name", ("gpt2", "llama"))
def test_every_level_is_exported(name, tmp_path):
    model = random_model(name)
    batch = random_batch(model)
    circuit = random_circuit(model, .5, levels=LEVELS)
    for ablation in ("zero", "mean"):
        small, _ = exported(circuit, model, tmp_path / ablation, ablation=ablation, reference=batch)
        torch.testing.assert_close(run(small, batch), under(model, circuit, batch, constants(model, ablation, batch)), atol=2e-4, rtol=1e-4)


@architectures
def test_at_zero_it_is_the_same_to_close_an_mlp_by_its_neurons_or_by_its_outputs(name, tmp_path):
    model = random_model(name)
    batch, sites, answers = random_batch(model), find_sites(model), []
    for level in ("mlp_neuron", "mlp_output"):
        kept = torch.ones(level_shapes(sites, level)[level], dtype=torch.bool)
        kept[1] = False
        circuit = from_kept({level: kept}, sites)
        small, _ = exported(circuit, model, tmp_path / level)
        answers.append(run(small, batch))
        torch.testing.assert_close(answers[-1], under(model, circuit, batch, constants(model)), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(*answers, atol=1e-4, rtol=1e-4)
    for layer, added in enumerate(constants(model).output):  # what is left of an MLP is the bias of its projection
        bias = model.get_submodule(sites.mlp[layer]).bias
        assert torch.equal(added.flatten(), torch.zeros(sites.width) if bias is None else bias.detach())


# --- what ablated nodes hold

@pytest.mark.parametrize("levels", (("block", "head", "mlp", "attention_neuron", "mlp_neuron"), LEVELS), ids=("default", "all"))
@pytest.mark.parametrize("ablation", ("zero", "mean"))
def test_the_exported_model_answers_as_the_circuit_is_measured(ablation, levels, tmp_path):
    model = load_model()
    task, circuit = tasks.ioi(model, n=(96, 32, 48)), random_circuit(model, .7, levels=levels)
    examples = prepare(model, task, ablation=ablation, output="mlp_output" in circuit.kept)
    circuit.export(model, tmp_path / "x", ablation, task)
    given, wanted = run(load_model(tmp_path / "x"), examples.batch), examples.logits(circuit.masks()).detach()
    torch.testing.assert_close(given, wanted, atol=1e-4, rtol=1e-4)
    assert (wanted - prepare(model, task).logits(circuit.masks()).detach()).abs().max() > .1  # the other ablations are others
    assert kl_divergence(examples.full, given).mean().item() == pytest.approx(evaluate(circuit, model, task, ablation)["kl"], rel=1e-3)


def each_corrupt(host, pairs, reference, output): return ABLATIONS["corrupt"](host, pairs, reference, output)
def each_position(host, pairs, reference, output): return each_corrupt(host, pairs[:1], reference, output)
def two_rows(host, pairs, reference, output): return zero(host, pairs, reference, output).map(lambda t: torch.cat([t, t]))
def no_recording(host, pairs, reference, output): return 0.
def no_outputs(host, pairs, reference, output): return zero(host, pairs, reference, False)
@each_pair
def said_to_be(host, pairs, reference, output): return zero(host, pairs, reference, output)


@pytest.mark.parametrize("ablation, why", (
    ("corrupt", "other values for each pair"), ("resample", "other values for each pair"), ("mean_by_position", "or at each position"),
    (each_corrupt, "2 rows of 6 positions"), (each_position, "1 rows of 6 positions"), (two_rows, "2 rows of 1 positions"),
    (no_recording, "returned a float"), (no_outputs, "none for MLP outputs"), (said_to_be, "other values for each pair")))
def test_what_is_no_constant_is_refused(ablation, why, tmp_path):
    model = random_model("gpt2")
    circuit = random_circuit(model, .7, levels=LEVELS)
    with pytest.raises(InputError, match=why) as error: circuit.export(model, tmp_path / "x", ablation, random_batch(model))
    name = ablation if isinstance(ablation, str) else ablation.__name__
    assert f"ablation={name!r}" in str(error.value) and "Export with ablation='zero' or 'mean'" in str(error.value)
    assert "one value for all prompts and positions" in str(error.value) and [*tmp_path.iterdir()] == []


def test_an_ablation_of_ones_own_that_returns_constants_is_exported(tmp_path):
    model = random_model("gpt2")
    batch, circuit = random_batch(model), random_circuit(model, .5, levels=LEVELS)
    def half_the_mean(host, pairs, reference, output): return mean(host, pairs, reference, output).map(lambda t: t / 2)
    small, _ = exported(circuit, model, tmp_path / "x", ablation=half_the_mean, reference=batch)
    held = constants(model, "mean", batch).map(lambda t: t / 2)
    wanted = under(model, circuit, batch, held)
    assert (wanted - under(model, circuit, batch, constants(model, "mean", batch))).abs().max() > .1
    torch.testing.assert_close(run(small, batch), wanted, atol=2e-4, rtol=1e-4)


def test_an_unknown_ablation_and_a_mean_of_nothing_are_refused(tmp_path):
    model = random_model("gpt2")
    circuit = random_circuit(model, .7)
    for ablation in ("median", 3, None):
        with pytest.raises(InputError, match="expected one of corrupt, resample, mean"): circuit.export(model, tmp_path / "x", ablation)
    with pytest.raises(InputError, match="needs reference pairs.*give a Task"): circuit.export(model, tmp_path / "x", "mean")
    assert [*tmp_path.iterdir()] == []


def test_the_whole_model_stays_what_it_is(tmp_path):
    model = random_model("llama")
    small, about = exported(full_circuit(find_sites(model)), model, tmp_path / "x")
    assert all(old == new for name, (old, new) in about.items() if name != "silent_neurons") and about["silent_neurons"] == (0, 0)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), small.parameters()))


def test_without_removing_the_shape_stays(tmp_path):
    model = random_model("llama")
    circuit, batch = random_circuit(model, .3), random_batch(model)
    small, about = exported(circuit, model, tmp_path / "x", smaller=False)
    assert about["parameters"][0] == about["parameters"][1] and about["silent_neurons"][1] > 0
    torch.testing.assert_close(run(small, batch), under(model, circuit, batch, constants(model)), atol=1e-4, rtol=1e-4)


def test_a_model_that_export_does_not_understand_is_not_written(tmp_path):
    model = GPT2LMHeadModel(GPT2Config(vocab_size=60, n_embd=64, n_layer=3, n_head=8, n_positions=32, bos_token_id=0, eos_token_id=0,
                                       scale_attn_by_inverse_layer_idx=True, initializer_range=.5)).eval()
    circuit = from_kept({"block": torch.tensor([True, False, True])}, find_sites(model))  # the last layer would count as the second
    with pytest.raises(InputError, match="Export with smaller=False"): circuit.export(model, tmp_path / "x")
    assert [*tmp_path.iterdir()] == []
    circuit.export(model, tmp_path / "x", smaller=False)


def test_the_model_is_left_as_it_was_and_others_are_refused(tmp_path):
    model = load_model()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    circuit = Circuit(random_circuit(model, .5).kept, find_sites(model), provenance=dict(model="embedded", fingerprint="0" * 16))
    with pytest.raises(InputError, match="fingerprint"): circuit.export(model, tmp_path / "x")
    random_circuit(model, .5).export(model, tmp_path / "x", "mean", tasks.ioi(model))
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items()) and model.tokenizer


def test_a_failed_export_leaves_no_folder(tmp_path, monkeypatch):
    model = random_model("gpt2")
    def fail(*args, **options): raise OSError("disk full")
    monkeypatch.setattr(GPT2LMHeadModel, "save_pretrained", fail)
    with pytest.raises(InputError, match="disk full"): random_circuit(model, .5).export(model, tmp_path / "x")
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize("smaller", (True, False))
def test_adapters_are_refused_and_merged_ones_are_exported(smaller, tmp_path):
    peft = pytest.importorskip("peft")
    def lora(): return peft.LoraConfig(r=4, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True, task_type="CAUSAL_LM", init_lora_weights=False)
    added, wrapped = random_model("gpt2"), peft.get_peft_model(random_model("gpt2"), lora())
    circuit = random_circuit(added, .7)
    added.add_adapter(lora())
    for model in (added, wrapped):
        with pytest.raises(InputError, match="merge the adapter first"): circuit.export(model, tmp_path / "x", smaller=smaller)
        assert [*tmp_path.iterdir()] == []
    merged = wrapped.merge_and_unload()
    small, _ = exported(circuit, merged, tmp_path / "x", smaller=smaller)
    torch.testing.assert_close(run(small, random_batch(merged)), under(merged, circuit, random_batch(merged), constants(merged)), atol=1e-4, rtol=1e-4)


def hooked(model): model.model.layers[1].mlp.register_forward_hook(lambda module, args, out: 1.05 * out)
def patched(model):
    forward = model.model.layers[0].mlp.forward
    model.model.layers[0].mlp.forward = lambda x: forward(x) * 1.05
def swapped(model):
    for layer in model.model.layers: layer.mlp.act_fn = torch.nn.ReLU()
def untied(model): model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight))
def more(model): model.steering = torch.nn.Parameter(torch.ones(3))
def normed(model): torch.nn.utils.parametrizations.weight_norm(model.model.layers[0].mlp.up_proj)
def narrower(model): model.config.intermediate_size = 40


@pytest.mark.parametrize("change", (hooked, patched, swapped, untied, more, normed, narrower), ids=lambda f: f.__name__)
@pytest.mark.parametrize("ablation", ("zero", "mean"))
def test_what_a_checkpoint_cannot_hold_is_not_lost_in_silence(change, ablation, tmp_path):
    model = random_model("llama_tied_and_biased")
    circuit, batch = random_circuit(model, .7), random_batch(model)
    change(model)
    with pytest.raises(InputError, match="would not compute|would be lost|do not fit"): circuit.export(model, tmp_path / "x", ablation, batch)
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float64))
def test_other_precisions_are_exported(dtype, tmp_path):
    model = random_model("llama").to(dtype)
    circuit, batch = random_circuit(model, .7), random_batch(model)
    circuit.export(model, tmp_path / "x", "mean", batch)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "x", dtype=dtype).eval()
    wanted = under(model, circuit, batch, constants(model, "mean", batch))
    assert (run(again, batch) - wanted).abs().max() <= 2 * torch.finfo(dtype).eps ** .75 * wanted.abs().max() + 1e-4


def test_a_model_whose_weights_are_brought_when_needed_is_exported(tmp_path):
    accelerate = pytest.importorskip("accelerate")
    model = random_model("llama")
    circuit, batch = random_circuit(model, .7), random_batch(model)
    wanted = under(model, circuit, batch, constants(model))
    accelerate.cpu_offload(model, execution_device="cpu")
    small, _ = exported(circuit, model, tmp_path / "x")
    torch.testing.assert_close(run(small, batch), wanted, atol=1e-4, rtol=1e-4)


def test_arguments_of_other_kinds_are_refused(tmp_path):
    model = random_model("gpt2")
    circuit, other = random_circuit(model, .7), load_model()
    for wrong in (lambda: circuit.export(None, tmp_path / "x"), lambda: circuit.export(model, 5), lambda: circuit.export(model, tmp_path / "x", reference=3),
                  lambda: circuit.export(model, tmp_path / "x", smaller="no"), lambda: circuit.write(5), lambda: circuit.mib("yes"),
                  lambda: to_folder(circuit, tmp_path / "x", 5), lambda: circuit.push_to_hub(5), lambda: Circuit.from_hub(5), lambda: Circuit.from_hub(""),
                  lambda: Circuit.from_hub("a\0b"), lambda: plots.plot_circuit(circuit.kept), lambda: plots.plot_scores(circuit),
                  lambda: plots.plot_heads(circuit, scores=True), lambda: plots.plot_training(circuit), lambda: plots.plot_frontier([circuit]),
                  lambda: plots.plot_frontier([]), lambda: plots.plot_comparison(circuit, None), lambda: plots.plot_comparison(circuit, circuit, "ab"),
                  lambda: plots.plot_attention(other, "", [(0, 0)]), lambda: plots.plot_attention(other, "a b", circuit),
                  lambda: plots.plot_attention(other, "a b", [(0, -1)]), lambda: plots.plot_attention(other, "a b", [(0, 0)], 0),
                  lambda: plots.plot_writes(circuit, other), lambda: plots.written_logits(other, "mlp_neuron", [(0, 9999)]),
                  lambda: plots.written_logits(other, "mlp_output", [(0, 0)]), lambda: plots.plot_writes(random_circuit(other, .7), other, "head"),
                  lambda: plots.save_figures(circuit, "a\0b")):
        with pytest.raises(InputError): wrong()
    assert [*tmp_path.iterdir()] == []


def test_dollars_in_names_are_no_formulas(tmp_path):
    model = random_model("gpt2")
    circuit, row = random_circuit(model, .7), dict(neurons=1, kl=.1, accuracy=.5, full_accuracy=1.)
    plots.plot_comparison(circuit, circuit, ("$\\frac$", "a$b$c")).savefig(tmp_path / "a.png")
    plots.plot_frontier({"$\\nothing$": [row]}).savefig(tmp_path / "b.png")


# --- graphs, tables and the page

@pytest.fixture(scope="module")
def scored():
    "A circuit of the embedded model by random scores at all levels"
    sites = find_sites(load_model())
    torch.manual_seed(0)
    return from_scores({l: torch.randn(s) + 1 for l, s in level_shapes(sites).items()}, sites, .3)


def test_circuits_without_scores_have_all_but_scores(scored, tmp_path):
    bare = Circuit(scored.kept, scored.sites)
    assert bare.table().score.isna().all() and scored.table().score.notna().all()
    assert all("score" not in node for node in bare.mib()["nodes"].values())
    for ending in export.WRITERS: assert bare.write(tmp_path / f"bare{ending}").stat().st_size > 100
    assert json.loads((tmp_path / "bare.mib.json").read_text()) == bare.mib()


def test_mib_edges_are_the_graphs_own(scored):
    graph = scored.mib(edges=True)
    assert (sum(e["in_graph"] for e in graph["edges"].values()), len(graph["edges"])) == edge_counts(scored)["ACDC"]
    assert {*graph} == {"cfg", "nodes", "edges"} and {*graph["cfg"]} == {"n_layers", "n_heads", "d_model", "parallel_attn_mlp"}
    assert all(re.fullmatch(r"input|logits|a\d+\.h\d+|m\d+", name) for name in graph["nodes"])
    assert {end.split("<")[0] for name in graph["edges"] for end in name.split("->")} == {*graph["nodes"]}
    assert all(("<" in name) == bool(re.search(r"->a\d+\.h\d+<[qkv]>$", name)) for name in graph["edges"])


def test_where_blocks_are_parallel_the_mlp_reads_no_head_of_its_layer(scored):
    circuit = Circuit(scored.kept, replace(scored.sites, parallel=True))
    graph = circuit.mib(edges=True)
    assert graph["cfg"]["parallel_attn_mlp"] and not scored.mib()["cfg"]["parallel_attn_mlp"]
    assert "a0.h1->m0" not in graph["edges"] and "a0.h1->m1" in graph["edges"] and "m0->a1.h0<q>" in graph["edges"]
    assert len(scored.mib(edges=True)["edges"]) - len(graph["edges"]) == 4 * 4


def test_dot_links_every_box_to_the_stream(scored):
    text = scored.dot()
    boxes = {*re.findall(r'^  ([am]\d\w*) \[label="(?:head|MLP)', text, re.M)}
    assert boxes == {f"a{l}_h{h}" for l, h in scored.heads()} | {f"m{l}" for l in scored.mlps()}
    links = re.findall(r"^  (\w+) -> (\w+)", text, re.M)
    assert all(sum(a == box for a, _ in links) == 1 == sum(b == box for _, b in links) for box in boxes)
    assert links[-1][1] == "answer" and links[0][0] == "stream"


def test_svg_is_whole_and_repeats(scored):
    assert xml.fromstring(scored.svg()).tag == "{http://www.w3.org/2000/svg}svg" and scored.svg() == scored.svg()


def test_the_page_holds_the_circuit_and_asks_for_nothing(scored):
    page = scored.view()
    data = json.loads(re.search(r'id="data">(.*?)</script>', page, re.S)[1])
    for level, kept in scored.kept.items():
        bits = np.unpackbits(np.frombuffer(base64.b64decode(data["kept"][level]), np.uint8))[:kept.numel()]
        assert torch.equal(torch.from_numpy(bits).bool(), kept.flatten())
    assert not re.search(r"(src|href)=|url\(|@import|fetch\(", page) and "default-src 'none'" in page


@pytest.mark.parametrize("levels", (("head",), LEVELS))
def test_the_page_is_told_what_the_tree_says(levels):
    sites = find_sites(load_model())
    circuit = from_kept({l: torch.ones(s, dtype=torch.bool) for l, s in level_shapes(sites, levels).items()}, sites)
    page = circuit.view()
    data = json.loads(re.search(r'id="data">(.*?)</script>', page, re.S)[1])
    assert {*data["kept"]} == {*circuit.kept} and [l for l, about in data["levels"].items() if about["counted"]] == [*NEURONS]
    for level, about in data["levels"].items():
        assert about["spoken"] == TREE[level].spoken and about["after"] == TREE[level].after and (level not in circuit.kept or f"<td>{about['spoken']}</td>" in page)
        assert about["total"] == torch.Size(level_shapes(sites, level)[level]).numel()
    assert {l: about["parent"] for l, about in data["levels"].items() if l != "mlp_output"} == dict(
        block=None, attention="block", group="attention", head="group", mlp="block", attention_neuron="head", mlp_neuron="mlp")
    assert [l for l in LEVELS if f"{l}" in page.replace(re.search(r'id="data">(.*?)</script>', page, re.S)[1], "") and "_" in l] == []  # it has no names of its own


@pytest.mark.parametrize("ablation, words", ((None, "what they hold on the pair&#x27;s own corrupt prompt"), ("zero", "zero"), ("a<b", "what the ablation a&lt;b gives them"),
                                             ("mean", "their mean over the corrupt prompts of reference pairs")))
def test_page_and_card_say_what_closed_nodes_held(scored, ablation, words):
    about = dict(metrics=dict(kl=.1, accuracy=.9, full_accuracy=1.), **(dict(ablation=ablation) if ablation else {}))
    circuit = Circuit(scored.kept, scored.sites, provenance=about)
    page, text = circuit.view(), export.card(circuit, "me/ioi")
    assert f"the full model on 100.0%; ablated nodes hold {words}</p>" in page
    assert f"ablated nodes hold {words}." in text.replace("'", "&#x27;").replace("&#60;", "&lt;") and ("| ablation |" in text) == bool(ablation)
    assert "ablated nodes" not in Circuit(scored.kept, scored.sites, provenance=dict(ablation="zero")).view()  # without measures


def test_names_on_the_page_are_text_and_not_code(scored):
    page = Circuit(scored.kept, scored.sites, provenance=dict(model="</title><script>alert(1)</script>", task="$data")).view()
    assert "<script>alert" not in page and "&lt;script&gt;alert(1)" in page and page.count("$data") == 2


# --- the hub

class Recorder:
    "Stands for the hub: writes down what it is asked, and keeps the files"
    def __init__(self): self.asked, self.files = [], {}
    def create_repo(self, repo, **options): self.asked.append(("create", repo, options))
    def upload_folder(self, repo_id, folder_path, commit_message):
        self.asked.append(("upload", repo_id, commit_message))
        self.files = {path.name: path.read_bytes() for path in folder_path.iterdir()}
        return f"https://hub/{repo_id}"


def test_push_sends_what_from_hub_reads(scored, tmp_path, monkeypatch):
    hub = Recorder()
    monkeypatch.setattr(export, "HfApi", lambda: hub)
    assert scored.push_to_hub("me/ioi", private=True, message="first") == "https://hub/me/ioi"
    assert hub.asked == [("create", "me/ioi", dict(private=True, exist_ok=True)), ("upload", "me/ioi", "first")]
    assert {*hub.files} - {"circuit.safetensors"} == {"circuit.json", "view.html", "circuit.svg", "README.md"}
    for name, content in hub.files.items(): (tmp_path / name).write_bytes(content)
    asked = []
    monkeypatch.setattr(export, "snapshot_download", lambda repo, **options: asked.append((repo, options)) or str(tmp_path))
    again = Circuit.from_hub("me/ioi", revision="v1")
    assert again == scored and all(torch.equal(s, again.scores[l]) for l, s in scored.scores.items())
    assert asked == [("me/ioi", dict(revision="v1", allow_patterns=["circuit.json", "circuit.safetensors"]))]


def test_the_card_says_where_the_circuit_comes_from(scored, tmp_path):
    about = dict(model="embedded", task="ioi", fingerprint="0123", seed=7, versions=dict(torch="2"), metrics=dict(kl=.1, accuracy=.9, full_accuracy=1.))
    text = (to_folder(Circuit(scored.kept, scored.sites, provenance=about), tmp_path / "x", "me/ioi") / "README.md").read_text()
    assert text.startswith("---\nlibrary_name: mgprune\n") and "Circuit.from_hub('me/ioi', model)" in text
    assert all(part in text for part in ("# Circuit of embedded for ioi", "KL 0.1", "| seed | 7 |", "| torch version | 2 |", "load_model('embedded')"))


def test_the_card_measures_on_the_pairs_that_were_held_out(model, tmp_path):
    task = tasks.greater_than(model, "decade_start", n=(64, 16, 16), seed=3)
    circuit = discover(model, task, keep=.5, recipe=Recipe(steps=5), progress=False)
    text = (to_folder(circuit, tmp_path / "shared") / "README.md").read_text()
    said = {}
    exec(text.partition("```python\n")[2].partition("```")[0], said)
    assert said["task"].test == task.test and said["circuit"] == circuit
    assert evaluate(said["circuit"], said["model"], said["task"])["kl"] == pytest.approx(circuit.provenance["metrics"]["kl"], rel=1e-4)
    for about in (dict(task="mine"), dict(task="ioi", corruption="own"), dict(task="ioi", pairs_file=dict(path="x")), dict(task=["ioi"])):
        assert export.how_to_measure(Circuit(circuit.kept, circuit.sites, provenance=about))[1].startswith("# its pairs are not in this folder")


def test_names_on_the_card_are_names(scored):
    odd = "x|y`\n# Heading\n```\n<script>\u202e"
    text = export.card(Circuit(scored.kept, scored.sites, provenance=dict(model=odd, task=odd, versions={odd: odd}, metrics=dict(kl="much"))), odd)
    words, _, code = text.partition("```python\n")
    assert "<script>" not in words and "\u202e" not in text and "\n# Heading" not in text and code.count("```") == 1
    assert all(line.count("|") == 3 for line in words.partition("| made with")[2].splitlines() if line.startswith("|"))
    assert text.count("\n---\n") == 1 and "\u202e" not in Circuit(scored.kept, scored.sites, provenance=dict(model=odd)).view()


def test_a_hub_that_refuses_is_reported(scored, monkeypatch):
    class Closed(Recorder):
        def create_repo(self, repo, **options): raise OSError("401 Client Error\nsecond line")
    monkeypatch.setattr(export, "HfApi", Closed)
    with pytest.raises(InputError, match="the hub did not take 'me/ioi': 401 Client Error. Log in"): scored.push_to_hub("me/ioi")


def test_a_folder_without_a_circuit_is_refused(tmp_path):
    with pytest.raises(InputError, match="cannot read the circuit"): Circuit.from_hub(tmp_path)
    with pytest.raises(InputError, match="no such circuit could be read"): Circuit.from_hub("me/not there!")


def test_folders_are_never_overwritten(scored, tmp_path):
    (tmp_path / "precious.txt").write_text("mine")
    with pytest.raises(InputError, match="exists already"): to_folder(scored, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["precious.txt"]


@pytest.mark.parametrize("kind", [kind for kind in TINY if not FAMILIES[kind].experts])
def test_every_dense_family_is_exported(kind, tmp_path):
    model, batch = tiny(kind), pairs()
    circuit = random_circuit(model, .7)
    circuit.export(model, tmp_path / "new")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "new").eval()
    assert torch.allclose(answer_logits(again, batch.clean, batch.attention_mask), circuit_logits(host_of(model), batch, circuit.masks(), constants(model)), atol=1e-5)


@pytest.mark.parametrize("kind", [kind for kind in TINY if FAMILIES[kind].experts])
def test_mixtures_of_experts_get_what_can_be_had(kind, tmp_path):
    model = tiny(kind)
    sites = find_sites(model)
    circuit = from_scores({l: torch.randn(s) for l, s in level_shapes(sites).items()}, sites, -.5)
    for refused in (lambda: circuit.export(model, tmp_path / "new"), circuit.view):
        with pytest.raises(InputError, match="have experts or differ in width"): refused()
    assert not any(tmp_path.iterdir())
    nodes = circuit.table()
    assert [*nodes[(nodes.level == "expert") & nodes.kept][["layer", "expert"]].itertuples(index=False, name=None)] == circuit.experts()
    assert circuit.dot() and circuit.svg()
    with pytest.raises(InputError, match="what their MLP neurons write cannot be shown"): plots.written_logits(model, "mlp_neuron", [(0, 0)])
    plot_scores(circuit)
