"""Kills searches that are saved at random moments, again and again, until each is at its end: run it as a script for a table of counts.

    python tests/resumed.py [--runs 100] [--seed 0]

Children are forked from a process that has the model and the pairs already, so that nearly all of their time is the search.
"""
import argparse
import os
import random
import signal
import tempfile
import time
from collections import Counter
from pathlib import Path
from unittest.mock import patch

import torch

from mgprune import Circuit, discover, load_model, resume, tasks
from mgprune.files import STATE, read_state
from mgprune.models import InputError
from mgprune.recipe import Recipe

RECIPE = Recipe(steps=40, pairs=32, confidence=None)


def forked(act, seconds):
    "Run it in a child process, killed after some time; its exit code, negative for a signal"
    child = os.fork()
    if child == 0:
        code = 1
        try: code = act()
        finally: os._exit(code)
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended: return os.waitstatus_to_exitcode(status)
        time.sleep(.001)
    os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def table(runs, seed=0):
    "What became of the searches: words -> how often"
    draw, counts, model = random.Random(seed), Counter(), load_model()
    rows = [dict(clean=p.clean, corrupt=p.corrupt, answer=p.answer, wrong=p.wrong) for p in tasks.ioi(model, n=(32, 4, 4)).train]
    task = tasks.from_pairs(model, rows)
    def search(folder=None): return discover(model, task, keep=.2, recipe=RECIPE, progress=False, save=folder)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # threads do not survive a fork
    try:
        search()
        began = time.monotonic()
        whole = search()
        seconds = time.monotonic() - began
        def child(folder):
            with patch.object(resume, "BETWEEN", 0):  # written at every step
                search(folder)
            return 0
        for _ in range(runs):
            with tempfile.TemporaryDirectory() as place:
                counts.update(one(Path(place) / "run", child, whole, lambda: draw.uniform(0, .6 * seconds)))
    finally: torch.set_num_threads(threads)
    return counts


def one(folder, child, whole, moment):
    "Kill one search until it is at its end"
    while True:
        code = forked(lambda: child(folder), moment())
        yield {0: "ended", -signal.SIGKILL: "killed"}.get(code, f"exit code {code}")
        try: state = read_state(folder)
        except InputError: yield "unreadable state"
        else:
            if state and code: yield "killed with a state"
        if code not in (-signal.SIGKILL, 0): return
        if not code: break
    found = Circuit.load(folder / "circuit.json")
    same = found == whole and all(torch.equal(s, whole.scores[level]) for level, s in found.scores.items()) and all(
        found.provenance[name] == whole.provenance[name] for name in ("history", "metrics")) and \
        found.provenance["settings"]["threshold"] == whole.provenance["settings"]["threshold"]
    yield "the same bits" if same else "other bits"
    left = {path.name for path in folder.iterdir()} - {STATE, "search.lock", "circuit.json"}
    if left: yield "left behind"


if __name__ == "__main__":
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("runs", 100), ("seed", 0)): options.add_argument(f"--{name}", type=int, default=default)
    for what, n in table(**vars(options.parse_args())).items(): print(f"{n:>5}  {what}")
