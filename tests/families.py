"""A tiny model with random weights of every family of architectures, the pairs to try it on, and what must hold for it."""
import warnings

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from mgprune import discover
from mgprune.recipe import Recipe
from mgprune.tree import level_shapes, site_masks
from mgprune.models import frozen
from mgprune.pairs import Batch
from mgprune.passes import answer_logits
from mgprune.sites import find_sites
from mgprune.streams import prepare
from mgprune.tasks import Task

VOCABULARY, LENGTHS = 61, (6, 4, 5)
PLAIN = dict(num_hidden_layers=2, hidden_size=32, intermediate_size=40, num_attention_heads=4)
GROUPED = PLAIN | dict(num_key_value_heads=2)
WIDE = GROUPED | dict(head_dim=12)  # heads × head width is not the width of the residual stream
MIXTURE = WIDE | dict(num_experts_per_tok=2, moe_intermediate_size=16)

# by `config.model_type`: what makes the tiny model a fair example of its family
TINY = {
    "gpt2": dict(n_layer=2, n_embd=32, n_head=4, n_positions=16),
    "gpt_neo": dict(num_layers=2, hidden_size=32, num_heads=4, max_position_embeddings=16, attention_types=[[["global", "local"], 1]], window_size=4),
    "gptj": dict(n_layer=2, n_embd=32, n_head=4, rotary_dim=4, n_positions=16),
    "gpt_neox": PLAIN,
    "opt": dict(num_hidden_layers=2, hidden_size=32, ffn_dim=40, num_attention_heads=4, max_position_embeddings=16, word_embed_proj_dim=32),
    "bloom": dict(n_layer=2, hidden_size=32, n_head=4),
    "falcon": dict(num_hidden_layers=2, hidden_size=32, num_attention_heads=4, num_kv_heads=2, new_decoder_architecture=True),
    "phi": PLAIN,
    "phi3": GROUPED,
    "stablelm": GROUPED,
    "starcoder2": GROUPED,
    "gpt_bigcode": dict(n_layer=2, n_embd=32, n_head=4, n_positions=16),
    "llama": WIDE, "mistral": WIDE, "smollm3": WIDE, "qwen2": GROUPED, "qwen3": WIDE,
    "gemma2": WIDE | dict(query_pre_attn_scalar=12, sliding_window=4), "gemma3_text": WIDE | dict(query_pre_attn_scalar=12, sliding_window=4),
    "olmo2": GROUPED,
    "mixtral": WIDE | dict(num_local_experts=4, num_experts_per_tok=2),
    "qwen2_moe": MIXTURE | dict(num_experts=4, shared_expert_intermediate_size=20),
    "qwen3_moe": MIXTURE | dict(num_experts=4),
    "olmoe": GROUPED | dict(num_experts=4, num_experts_per_tok=2),
    "deepseek_v3": PLAIN | dict(num_key_value_heads=4, moe_intermediate_size=16, n_routed_experts=4, n_shared_experts=2, num_experts_per_tok=2,
                                n_group=2, topk_group=1, first_k_dense_replace=1, q_lora_rank=8, kv_lora_rank=8, v_head_dim=12,
                                qk_rope_head_dim=4, qk_nope_head_dim=8),
    "gpt_oss": WIDE | dict(num_local_experts=4, num_experts_per_tok=2, sliding_window=4),
}
SPECIAL = dict(vocab_size=VOCABULARY, bos_token_id=0, eos_token_id=0, pad_token_id=0)


def tiny(kind, dtype=torch.float32):
    "A model of that type with random weights, biases and norms included"
    config = AutoConfig.for_model(kind, **SPECIAL | TINY[kind])
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    if dtype == torch.double and find_sites(model).experts: model.set_experts_implementation("eager")  # the grouped kernel has no double precision
    return randomise(model)


def randomise(model):
    "The model with random numbers added to all weights, biases and norms included"
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            scale = .4 / max(1, p.shape[-1] / 32) ** .5 if p.dim() > 1 else .1
            p += torch.randn(p.shape, generator=draw, dtype=torch.float64).to(p) * scale
    return model


def pairs():
    "Prompts of three lengths, padded on the left, with corrupted twins; all end in the same token"
    draw = torch.Generator().manual_seed(1)
    clean, corrupt = (torch.randint(1, VOCABULARY, (len(LENGTHS), max(LENGTHS)), generator=draw) for _ in range(2))
    mask = torch.stack([torch.arange(max(LENGTHS)) >= max(LENGTHS) - n for n in LENGTHS]).long()
    corrupt[:, -1] = clean[:, -1]
    answers = torch.arange(len(LENGTHS))[:, None]
    return Batch(clean * mask, corrupt * mask, mask, answers + 1, answers + 11)


class Pairs(Task):
    "A task of token ids, which needs no tokenizer"
    name, corruption, seed, tokenizer = "pairs", "random tokens", 0, None
    train = valid = test = (None,) * 6
    def __init__(self): pass
    def batch(self, split): return pairs()[[0, 1, 2, 0, 1, 2]]


def short_search(model):
    "A circuit after three steps"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a random model is right on few pairs
        return discover(model, Pairs(), keep=.3, recipe=Recipe(steps=3, batch_size=3), progress=False)


def holds(model):
    "Assert that open masks give the untouched model and closed ones the corrupted prompt, bit for bit; returns the model's sites"
    batch, sites = pairs().to(model.device), find_sites(model)
    with torch.no_grad(), frozen(model):
        clean, corrupt = (answer_logits(model, ids, batch.attention_mask) for ids in (batch.clean, batch.corrupt))
    examples = prepare(model, batch)
    for value, wanted in ((1., clean), (0., corrupt)):
        gates = {l: torch.full(s, value) for l, s in level_shapes(sites).items()}
        assert torch.equal(examples.logits(site_masks(gates, sites).to(model.device)), wanted)
    return sites
