"""Seconds and bytes of a run, with nothing but torch: the benchmark and its peers measure by the same rules."""
import statistics
import time
import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def seconds(run, device, times=1):
    "What one of several runs takes: CPU seconds here, or those of the GPU's own clock"
    if device.type == "cuda":
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        began.record()
        for _ in range(times): run()
        ended.record()
        torch.cuda.synchronize(device)
        return began.elapsed_time(ended) / 1000 / times
    began = time.process_time()
    for _ in range(times): run()
    return (time.process_time() - began) / times


def timed(runs, repeats, device, times=1, first=1):
    "Name -> seconds of that run in each round; all of them run in turn, and the first rounds do not count"
    rounds = [{name: seconds(run, device, times) for name, run in runs.items()} for _ in range(first + repeats)]
    return {name: [each[name] for each in rounds[first:]] for name in runs}


def against(found, name, base):
    "Median ratio of a run to another one of the same round, with the smallest and the largest"
    ratios = [a / b for a, b in zip(found[name], found[base])]
    return statistics.median(ratios), min(ratios), max(ratios)


class Alive(TorchDispatchMode):
    "Counts the bytes of the tensors that come to be within the context, and the most that there were at one time"
    def __init__(self):
        super().__init__()
        self.now = self.most = 0

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if torch.is_tensor(t)}
        result = f(*args, **kwargs or {})
        made = {id(s): s for s in (t.untyped_storage() for t in tree_leaves(result) if torch.is_tensor(t))}
        for storage in made.values():
            if storage.data_ptr() in given or not storage.nbytes(): continue
            self.add(storage.nbytes())
            weakref.finalize(storage, self.add, -storage.nbytes())
        return result

    def add(self, n):
        "Count so many bytes more, or less"
        self.now += n
        self.most = max(self.most, self.now)


def peak_bytes(run, device):
    "The most that a run needs at one time, beyond what was there before"
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    with Alive() as alive: run()
    return alive.most


def saved_bytes(run, there):
    "Bytes that a run saves for its backward pass, beside tensors that were there before"
    known, seen = {t.untyped_storage().data_ptr() for t in there}, {}
    def keep(t):
        storage = t.untyped_storage()  # held, so that no address comes twice
        if storage.data_ptr() not in known: seen[storage.data_ptr()] = (storage.nbytes(), storage)
        return t
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t): run()
    return sum(n for n, _ in seen.values())


def plain(model, ids, last=False, backward=True):
    "A pass of an untouched Hugging Face model with frozen weights, with the logits of all positions or of the last"
    options = dict(logits_to_keep=1) if last else {}
    def run():
        inputs = model.get_input_embeddings()(ids).detach().requires_grad_(backward)
        with torch.set_grad_enabled(backward):
            loss = model(inputs_embeds=inputs, use_cache=False, **options).logits.logsumexp(-1).mean()
            if backward: loss.backward()
    return run
