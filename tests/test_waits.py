"""Within a step nothing waits for the accelerator: on a CPU it shows in the operations that read a value or depend on one."""
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from families import pairs, tiny
from mgprune.checks import trusted
from mgprune.models import frozen
from mgprune.passes import answer_logits
from mgprune.recipe import Goal, Recipe
from mgprune.search import Search, step
from mgprune.streams import prepare
from mgprune.tree import DEFAULT_LEVELS

WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "unique_consecutive", "_unique2", "repeat_interleave.Tensor", "item", "is_nonzero"}


class Waits(TorchDispatchMode):
    "Counts the operations that an accelerator has to be waited for"
    def __init__(self, free=()):
        super().__init__()
        self.seen, self.free = [], [*free]  # tensors that stay in the host's memory

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        name = f.overloadpacket.__name__
        by_mask = name.startswith("index") and any(torch.is_tensor(i) and i.dtype == torch.bool for i in (args[1] if isinstance(args[1], (list, tuple)) else ()))
        if args and any(args[0] is t for t in self.free): return f(*args, **kwargs or {})
        if name in WAITING or str(f).removeprefix("aten.") in WAITING or by_mask: self.seen.append(name)
        return f(*args, **kwargs or {})


@pytest.mark.parametrize("goal", [Goal(kl=.1), Goal(keep=.2)], ids=["kl", "keep"])
@pytest.mark.parametrize("kind", ["gpt2", "llama", "gpt_neox"])
def test_a_step_waits_no_more_often_than_the_model_does(kind, goal):
    model = tiny(kind)
    examples = prepare(model, pairs(), closed=False)
    search = Search(examples, goal, DEFAULT_LEVELS, Recipe(batch_size=2, steps=50))
    search.period = 10  # as on an accelerator
    with frozen(model), torch.enable_grad():
        step(search)  # looks for the open nodes
        counts = [state["step"] for state in search.optimizer.state.values()]  # which Adam keeps there
        with Waits(counts) as own:
            for _ in range(9): step(search)
        with Waits() as plain: answer_logits(model, examples.batch.clean[:2], examples.batch.attention_mask[:2])
        with Waits() as looking: step(search)
    assert len(own.seen) <= 9 * len(plain.seen), own.seen
    assert len(looking.seen) > len(own.seen) / 9


def test_looking_seldom_finds_nearly_the_same_scores():
    model = tiny("llama")
    trusted(model)
    def searched(period):
        search = Search(prepare(model, pairs(), closed=False), Goal(keep=.3), DEFAULT_LEVELS, Recipe(batch_size=2, steps=60))
        search.period = period
        with frozen(model), torch.enable_grad():
            for _ in range(60): step(search)
        return search.average
    once, seldom = searched(1), searched(10)
    assert torch.corrcoef(torch.stack([once, seldom]))[0, 1] > .9
