"""A tiny model of every type of causal language model in transformers, and what mgprune makes of it.

    python tests/architectures.py [type ...]

Whether the masks of an accepted model are exact is measured here by plain PyTorch hooks on whole sub-layers, which know nothing
of the library's own check at first use.
"""
import inspect
import logging
import re
import signal
import sys
import warnings
from contextlib import contextmanager

import torch
import transformers
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from families import LENGTHS, SPECIAL, TINY, VOCABULARY, pairs, randomise, tiny
from mgprune.checks import trusted
from mgprune.hooks import hooks, host_of
from mgprune.models import InputError
from mgprune.passes import answer_logits, circuit_logits, interpolated, record
from mgprune.tree import SiteMasks

MOST_PARAMETERS, SECONDS, N_LAYERS = 20_000_000, 30, 4


def all_called(value, names):
    return dict.fromkeys(names.split(), value)


# every name under which some configuration asks for a size; of these each type is given those that it knows
OTHER = dict(max_position_embeddings=64, n_positions=64, is_decoder=True, rotary_dim=4, vocab_size_per_layer_input=VOCABULARY)
GENERAL = SPECIAL | OTHER | {
    **all_called(N_LAYERS, "num_hidden_layers num_layers n_layer n_layers decoder_layers encoder_layers num_blocks"),
    **all_called(32, "hidden_size n_embd d_model dim_model embedding_size word_embed_proj_dim emb_dim embedding_dim"),
    **all_called(40, "intermediate_size intermediate_size_mlp ffn_dim decoder_ffn_dim encoder_ffn_dim dim_ff dff d_inner"),
    **all_called(4, "num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads"),
    **all_called(4, "num_experts num_local_experts n_routed_experts moe_num_experts"),
    **all_called(2, "num_experts_per_tok moe_k moe_topk"),
    **all_called(16, "moe_intermediate_size moe_shared_expert_intermediate_size"),
    **all_called(16, "shared_expert_intermediate_size shared_intermediate_size"),
    **all_called(1, "n_shared_experts moe_num_shared_experts num_shared_experts num_shared_expert n_group topk_group"),
    **all_called(0, "first_k_dense_replace num_dense_layers"),
}
GROUPED = all_called(2, "num_key_value_heads num_kv_heads")
NARROW = GROUPED | dict(head_dim=8)
LATENT = dict(q_lora_rank=8, kv_lora_rank=8, v_head_dim=8, qk_rope_head_dim=4, qk_nope_head_dim=4, num_key_value_heads=4)
RECURRENT = dict(mamba_n_heads=4, mamba_d_head=16, mamba_d_state=8, mamba_n_groups=1, mamba_num_heads=4, mamba_head_dim=16,
                 lru_width=32, state_size=8, attention_hidden_size=32, linear_num_key_heads=2, linear_key_head_dim=8,
                 linear_value_head_dim=8, linear_num_value_heads=4)
TRIED = [NARROW | LATENT | RECURRENT, NARROW | RECURRENT, GROUPED | RECURRENT, RECURRENT | dict(head_dim=8), RECURRENT,
         NARROW | dict(layer_types=["full_attention"] * N_LAYERS), NARROW | RECURRENT | dict(num_experts_per_tok=1),
         GROUPED | all_called(3, "num_hidden_layers"), {}]  # one after another, until a model can be built and run


# --- building

class TooLong(BaseException):
    "A model took longer than the time it was given; no error of its own, which would be a verdict"


@contextmanager
def time_limit(seconds):
    "Raise TooLong when the time is over, where the system can interrupt"
    if not hasattr(signal, "SIGALRM"):
        yield
        return
    def stop(signal_number, frame): raise TooLong(f"takes over {seconds} s")
    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try: yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def known(config_class, sizes):
    "Of the sizes, those that a configuration knows"
    names = {*inspect.signature(config_class).parameters, *getattr(config_class, "attribute_map", {})}
    return {name: size for name, size in sizes.items() if name in names}


def small_config(kind, sizes):
    "A configuration of that type, its text part too, with those sizes"
    config_class = CONFIG_MAPPING[kind]
    text = (getattr(config_class, "sub_configs", None) or {}).get("text_config")
    inner = {"text_config": known(text, sizes)} if inspect.isclass(text) and text is not transformers.AutoConfig else {}
    return config_class(**known(config_class, sizes), **inner)


def built(config):
    "A model with random weights that has answered once"
    with torch.device("meta"): n = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    if n > MOST_PARAMETERS: raise ValueError(f"{n / 1e6:.0f} million parameters at the smallest")
    torch.manual_seed(0)
    model, batch = randomise(AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()), pairs()
    with torch.no_grad(): model(input_ids=batch.clean, attention_mask=batch.attention_mask, use_cache=False)
    return model


def build(kind):
    "A tiny model of that type, or None, and why there is none"
    if kind in TINY: return tiny(kind), ""
    why = ""
    for sizes in TRIED:
        try:
            with time_limit(SECONDS): return built(small_config(kind, GENERAL | sizes)), ""
        except TooLong as e: return None, str(e)
        except Exception as e: why = why or f"{type(e).__name__}: {first_words(e)}"  # whatever keeps it from being built
    return None, why


def first_words(error, most=110):
    "The first line of a message that says something, cut short"
    lines = [line.strip() for line in str(error).splitlines()]
    return next((line for line in reversed(lines) if "Error: " in line), next(filter(None, lines), ""))[:most]


# --- the same by hand

def child_of(layer, name):
    "Name of the layer's own child that holds a module"
    return name.removeprefix(layer + ".").partition(".")[0]


def sub_layers(model, sites, i):
    "The children of a layer that hold its attention, and all others that hold a matrix, as modules: two lists"
    layer = sites.attention[i]
    while not isinstance(model.get_submodule(layer.rpartition(".")[0]), torch.nn.ModuleList): layer = layer.rpartition(".")[0]
    attention = child_of(layer, sites.attention[i])
    matrices = {name: m for name, m in model.get_submodule(layer).named_children() if any(p.dim() > 1 for p in m.parameters())}
    return [matrices[attention]], [m for name, m in matrices.items() if name != attention]


def added(module, args, kwargs, result):
    "What a sub-layer writes, and the residual that it adds to itself, as BLOOM's do, or 0"
    given = inspect.signature(module.forward).bind(*args, **kwargs).arguments
    first = result if torch.is_tensor(result) else result[0]
    return first - given.get("residual", 0), given.get("residual", 0)


def closed_by_hand(model, batch, modules):
    "Logits at all positions on the clean prompts where these modules write what they write on the corrupted ones"
    seen = {}
    def keep(module, args, kwargs, result): seen.setdefault(module, []).append(added(module, args, kwargs, result)[0].clone())
    def put(module, args, kwargs, result):
        new = added(module, args, kwargs, result)[1] + seen[module].pop(0)
        return new if torch.is_tensor(result) else type(result)([new, *result[1:]])
    def at_each(f): return hooks(*(m.register_forward_hook(f, with_kwargs=True) for m in modules))
    with at_each(keep): logits_at_all(model, batch.corrupt, batch)
    with at_each(put): return logits_at_all(model, batch.clean, batch)


def logits_at_all(model, ids, batch):
    "Logits at all positions that hold a token, one after another"
    takes, positions = inspect.signature(model.forward).parameters, (batch.attention_mask.cumsum(-1) - 1).clamp(min=0)
    more = {"position_ids": positions} if "position_ids" in takes else {}
    return model(input_ids=ids, attention_mask=batch.attention_mask, use_cache=False, **more).logits[batch.attention_mask > 0]


def slice_by_hand(model, sites, batch, i, part):
    "Logits on the clean prompts with a part of a layer's attention neurons written over by the corrupted prompts'"
    module, seen = model.get_submodule(sites.attention[i]), []
    def write(module, args):
        x = args[0].clone(); x[..., part] = seen[0][..., part]
        return (x, *args[1:])
    def keep(module, args): seen.append(args[0].clone())
    with hooks(module.register_forward_pre_hook(keep)): logits_at_all(model, batch.corrupt, batch)
    with hooks(module.register_forward_pre_hook(write)): return logits_at_all(model, batch.clean, batch)


@torch.no_grad()
def measured(model):
    "What masks do against the same by hand, as shares of the largest logit; `open` and `closed` have to be 0"
    host, batch, n = host_of(model), pairs(), max(LENGTHS)
    sites, corrupt = host.sites, record(host, batch.corrupt, batch.attention_mask)
    widths = sites.n_heads * sites.head_width, sites.mlp_width
    def masks(which=None, i=None, part=slice(None), value=1.):
        both = [torch.full((sites.n_layers, width), value) for width in widths]
        if which is not None: both[which][i, part] = 0
        return SiteMasks(*both)
    def masked(*where):
        with interpolated(host, masks(*where), corrupt): return logits_at_all(model, batch.clean, batch)
    full, other = (answer_logits(model, ids, batch.attention_mask) for ids in (batch.clean, batch.corrupt))
    def off(a, b): return ((a - b).abs().max() / full.abs().max()).item()
    alone = [model(input_ids=ids[None, n - m:], attention_mask=torch.ones(1, m).long(), use_cache=False).logits[0, -1]
             for ids, m in zip(batch.clean, LENGTHS)]
    found = dict(padded=off(full, torch.stack(alone)), open=off(circuit_logits(host, batch, masks(), corrupt), full),
                 closed=off(circuit_logits(host, batch, masks(value=0.), corrupt), other))
    head = slice(sites.head_width, 2 * sites.head_width)
    for i in range(sites.n_layers):
        attention, rest = sub_layers(model, sites, i)
        for name, here in (("attention", off(masked(0, i), closed_by_hand(model, batch, attention))),
                           ("MLP", off(masked(1, i), closed_by_hand(model, batch, rest))),
                           ("head", off(masked(0, i, head), slice_by_hand(model, sites, batch, i, head)))):
            found[name] = max(found.get(name, 0), here)
    return found


# --- the survey

def verdict(kind):
    "What became of a tiny model of that type: a verdict, why, and the largest difference by hand of an accepted one"
    model, why = build(kind)
    if model is None: return dict(type=kind, verdict="not built", why=why)
    try:
        with time_limit(2 * SECONDS): trusted(model)
    except TooLong as e: return dict(type=kind, verdict="not built", why=str(e))
    except InputError as e: return dict(type=kind, verdict="refused", why=first_words(e, 1000))
    except Exception as e: return dict(type=kind, verdict="crashed", why=f"{type(e).__name__}: {first_words(e)}")
    found = measured(model)
    worst = max(found, key=found.get)
    exact = found["open"] == found["closed"] == 0 and found[worst] < 1e-4
    return dict(type=kind, verdict="exact" if exact else "not exact", why="" if exact else f"{worst} is off", off=found[worst])


def survey(kinds=tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)):
    "The verdicts on models of these types"
    before = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for kind in kinds: yield verdict(kind)
    finally: transformers.utils.logging.set_verbosity(before)


def in_short(row):
    "Why, without what every refusal says"
    off = re.findall(r"(\w+) is off by", row["why"])
    if off and row["verdict"] == "refused": return "measured: " + ", ".join(off)
    patterns = r"do not show them: (.+?)\. If ", r"tried before its first use: (.+?)\. It has", r"^(.+?): this model cannot"
    found = re.search("|".join(patterns), row["why"])
    return next(filter(None, found.groups())) if found else row["why"]


if __name__ == "__main__":
    for row in survey(sys.argv[1:] or tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)):
        print(f"{row['type']:<24} {row['verdict']:<10} {in_short(row)}", f"{row['off']:.1e}" if "off" in row else "", flush=True)
