"""What one training step costs, as a ratio to a plain Hugging Face forward and backward pass: python tests/benchmark.py

GPT-2 small's shape with random weights, 8 pairs of 16 tokens, one thread, CPU seconds. The plain pass has frozen weights,
a gradient to its inputs, and logits at all positions. A step draws gates for every pair, runs the masked model, and moves
the gates; "cached" has the corrupted stream recorded beforehand, "recorded anew" runs it within the step.
"""
import statistics
import time
from functools import partial

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from mgprune.tree import DEFAULT_LEVELS
from mgprune.models import frozen
from mgprune.pairs import Batch
from mgprune.streams import prepare
from mgprune.training import Goal, Recipe, Search, step

PAIRS, TOKENS, REPEATS = 8, 16, 9


def main():
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config()).eval()
    clean, corrupt = torch.randint(0, model.config.vocab_size, (2, PAIRS, TOKENS))
    answer = clean[:, :1]
    batch = Batch(clean, corrupt, torch.ones_like(clean), answer, answer[:, :0])

    def plain():
        inputs = model.transformer.wte(clean).detach().requires_grad_()
        model(inputs_embeds=inputs, use_cache=False).logits.logsumexp(-1).mean().backward()

    with frozen(model):
        recipe = Recipe(batch_size=PAIRS)
        steps = {name: partial(step, Search(prepare(model, batch, memory=memory), Goal(kl=.1), DEFAULT_LEVELS, recipe))
                 for name, memory in (("cached", 1 << 30), ("recorded anew", 0))}
        seconds = {name: [] for name in ("plain", *steps)}
        for repeat in range(REPEATS + 1):
            for name, run in (("plain", plain), *steps.items()):
                began = time.process_time()
                run()
                if repeat: seconds[name].append(time.process_time() - began)
    floor = statistics.median(seconds["plain"])
    for name, each in seconds.items():
        ratios = [s / p for s, p in zip(each, seconds["plain"])]
        print(f"{name:<14} {statistics.median(each):.3f} s, {statistics.median(each) / floor:.2f} x plain (single repeats {min(ratios):.2f} to {max(ratios):.2f})")


if __name__ == "__main__": main()
