"""Models that are not plain: adapters, packed weights, wrappers, checkpointing, sharded folders. Each is exact or refused in words."""
import warnings

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from families import holds, pairs, short_search, tiny
from mgprune import Circuit, discover, evaluate, load_model, tasks
from mgprune.circuit import from_kept, full_circuit
from mgprune.models import InputError, fingerprint
from mgprune.recipe import Recipe
from mgprune.sites import find_sites
from mgprune.passes import answer_logits
from mgprune.streams import prepare

QUICK = Recipe(steps=20, confidence=None)


def lora(**options):
    peft = pytest.importorskip("peft")
    return peft.LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM", **options)


def wrapped(**options):
    import peft
    return peft.get_peft_model(load_model(), lora(**options))


def trained(model):
    "The model after its adapters were given weights, as training does"
    torch.manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name: p.normal_(0, .1)
    return model


@pytest.fixture(scope="module")
def task():
    return tasks.ioi(load_model(), n=(48, 16, 32))


def logits(model, task):
    batch = task.batch("test")
    with torch.no_grad(): return answer_logits(model, batch.clean, batch.attention_mask)


# --- adapters

def test_a_fresh_adapter_changes_nothing(task, capsys):
    plain, model = load_model(), load_model(wrapped(), tokenizer=load_model().tokenizer)
    assert torch.equal(logits(model, task), logits(plain, task))
    here, there = (discover(m, task, keep=.2, recipe=QUICK, progress=False) for m in (model, plain))
    assert here == there and here.provenance["metrics"] == pytest.approx(there.provenance["metrics"], abs=1e-5)


def test_a_wrapped_adapter_is_the_added_one(task):
    added = load_model()
    added.add_adapter(lora())
    model = load_model(wrapped(), tokenizer=added.tokenizer)
    trained(added), trained(model)
    assert torch.equal(logits(added, task), logits(model, task)) and not torch.equal(logits(added, task), logits(load_model(), task))
    circuits = [from_kept({"head": torch.eye(4, dtype=torch.bool)}, find_sites(m)) for m in (added, model)]
    first, second = (evaluate(c, m, task) for m, c in zip((added, model), circuits))
    assert first == second


def test_a_merged_adapter_answers_as_before(task):
    model = trained(wrapped())
    before = logits(model, task)
    merged = load_model(model.merge_and_unload(), tokenizer=load_model().tokenizer)
    assert torch.allclose(logits(merged, task), before, atol=1e-3)
    assert evaluate(full_circuit(find_sites(merged)), merged, task)["kl"] == 0


def test_the_fingerprint_knows_which_adapter_is_on():
    model = load_model()
    for name in "ab": model.add_adapter(lora(), name)
    trained(model)
    found = []
    for name in "ab":
        model.set_adapter(name)
        found.append(fingerprint(model))
    model.disable_adapters()
    assert len({*found, fingerprint(model)}) == 3


def test_the_fingerprint_knows_scale_and_weights_of_an_adapter():
    model = trained(wrapped())
    found = [fingerprint(model)]
    layer = model.base_model.model.transformer.h[0].attn.c_attn
    layer.scaling["default"] *= 2
    found.append(fingerprint(model))
    with torch.no_grad(): layer.lora_B["default"].weight[0, 0] += 1
    found.append(fingerprint(model))
    model.merge_adapter()
    assert len({*found, fingerprint(model)}) == 4


def test_a_circuit_of_one_adapter_is_refused_under_another(task, tmp_path):
    model = load_model()
    for name in "ab": model.add_adapter(lora(), name)
    trained(model).set_adapter("a")
    circuit = discover(model, task, keep=.5, recipe=QUICK, progress=False)
    path = circuit.save(tmp_path / "a.json")
    assert Circuit.load(path, model) == circuit
    model.set_adapter("b")
    for use in (lambda: Circuit.load(path, model), lambda: evaluate(circuit, model, task), lambda: circuit.applied(model, task).__enter__()):
        with pytest.raises(InputError, match="fingerprint"): use()


def test_an_adapter_is_not_exported_but_refused(task, tmp_path):
    model = load_model()
    model.add_adapter(lora())
    circuit = discover(trained(model), task, keep=.6, recipe=QUICK, progress=False)
    with pytest.raises(InputError, match="merge"): circuit.export(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_adapter_on_the_projections_themselves(task):
    import peft
    config = peft.LoraConfig(r=4, target_modules=["c_proj"], fan_in_fan_out=True, task_type="CAUSAL_LM")
    model = trained(load_model(peft.get_peft_model(load_model(), config), tokenizer=load_model().tokenizer))
    sites = find_sites(model)
    everything, nothing = full_circuit(sites), from_kept({"block": torch.zeros(4, dtype=torch.bool)}, sites)
    assert evaluate(everything, model, task)["kl"] == 0
    empty = evaluate(nothing, model, task)
    assert empty["kl"] == empty["closed_kl"]


def test_prompt_tuning_is_refused(task):
    peft = pytest.importorskip("peft")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    model = load_model(peft.get_peft_model(load_model(), config), tokenizer=load_model().tokenizer)
    with pytest.raises(InputError, match="prompt tuning"): discover(model, task, recipe=QUICK, progress=False)


# --- wrappers

class LosesPositions(torch.nn.Module):
    "A wrapper that passes on what it names only"
    def __init__(self, model):
        super().__init__()
        self.inside, self.config, self.tokenizer, self.dtype, self.device = model, model.config, model.tokenizer, model.dtype, model.device

    def get_submodule(self, name): return self.inside.get_submodule(name) if name and not name.startswith("inside") else super().get_submodule(name)
    def forward(self, input_ids, attention_mask): return self.inside(input_ids=input_ids, attention_mask=attention_mask)


class PassesOn(LosesPositions):
    "A wrapper that passes everything on"
    def forward(self, *args, **named): return self.inside(*args, **named)


def test_a_wrapper_that_loses_the_positions_is_refused(task):
    with pytest.raises(InputError, match="cannot be used in batches"): discover(LosesPositions(load_model()), task, recipe=QUICK, progress=False)


def test_a_wrapper_that_passes_everything_on_is_exact(task):
    model = PassesOn(load_model())
    assert torch.equal(logits(model, task), logits(load_model(), task))
    assert evaluate(full_circuit(find_sites(model)), model, task)["kl"] == 0


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_prepared_model_is_exact(precision, task):
    accelerate = pytest.importorskip("accelerate")
    plain = load_model()
    accelerate.state.AcceleratorState._reset_state(True)
    model = accelerate.Accelerator(cpu=True, mixed_precision=precision).prepare(load_model())
    model.tokenizer = plain.tokenizer
    everything, nothing = full_circuit(find_sites(model)), from_kept({"block": torch.zeros(4, dtype=torch.bool)}, find_sites(model))
    assert evaluate(everything, model, task)["kl"] == 0
    empty = evaluate(nothing, model, task)
    assert empty["kl"] == empty["closed_kl"]
    assert torch.allclose(logits(model, task), logits(plain, task), atol=1e-4 if precision == "no" else .5)


def test_a_compiled_model_is_refused(task):
    with pytest.raises(InputError, match="compiled"): discover(torch.compile(load_model()), task, recipe=QUICK, progress=False)
    model = load_model()
    model.compile()
    with pytest.raises(InputError, match="compiled in place"): discover(model, task, recipe=QUICK, progress=False)


def test_a_data_parallel_model_is_refused(task):
    with pytest.raises(InputError, match="give the model itself|the Hugging Face model inside it"): discover(torch.nn.DataParallel(load_model()), task, recipe=QUICK, progress=False)


def test_gradient_checkpointing_changes_nothing(task):
    model = load_model()
    model.gradient_checkpointing_enable()
    model.train()
    assert discover(model, task, keep=.2, recipe=QUICK, progress=False) == discover(load_model(), task, keep=.2, recipe=QUICK, progress=False)
    assert model.training and model.is_gradient_checkpointing


def test_a_sharded_folder_is_the_model(tmp_path, task):
    plain = load_model()
    plain.save_pretrained(tmp_path, max_shard_size="300KB")
    plain.tokenizer.save_pretrained(tmp_path)
    assert len([*tmp_path.glob("model-*.safetensors")]) > 3
    assert fingerprint(load_model(tmp_path)) == fingerprint(plain)
    next(tmp_path.glob("model-00002*")).unlink()
    with pytest.raises(InputError): load_model(tmp_path)


# --- packed weights

def test_dynamic_quantisation_is_refused():
    model = tiny("llama")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try: packed = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)
        except (RuntimeError, AttributeError) as e: pytest.skip(f"not on this machine: {e}")
    with pytest.raises(InputError, match="dynamic quantisation"): prepare(packed, pairs())


@pytest.mark.parametrize("bits", [8, 4])
def test_packed_weights_are_known_by_their_scales(bits, tmp_path):
    pytest.importorskip("bitsandbytes")
    tiny("llama").save_pretrained(tmp_path)
    packing = BitsAndBytesConfig(load_in_8bit=bits == 8, load_in_4bit=bits == 4, bnb_4bit_compute_dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=packing, device_map="cpu")
    holds(model)
    found = fingerprint(model)
    layer = model.model.layers[0].mlp.down_proj
    (layer.state.SCB if bits == 8 else layer.weight.quant_state.absmax).mul_(2)
    assert fingerprint(model) != found
    circuit = short_search(model)
    with pytest.raises(InputError, match="export|quantised|packed|merge"): circuit.export(model, tmp_path / "out")


def test_quanto_is_exact_or_refused():
    quanto = pytest.importorskip("optimum.quanto")
    model = tiny("llama")
    quanto.quantize(model, weights=quanto.qint8)
    quanto.freeze(model)
    holds(model)
    found = fingerprint(model)
    model.model.layers[0].mlp.down_proj.weight._scale.mul_(2)
    assert fingerprint(model) != found
    short_search(model)
