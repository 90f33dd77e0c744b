"""Ends programs while they write, and looks at what they leave: run it as a script for a table of counts.

    python tests/kills.py [--saves 300] [--kills 40] [--interrupts 10] [--light]

Children are forked from a process that has the circuits already, so that nearly all of their time is writing.
"""
import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

from mgprune import cli, discover, plots, tasks
from mgprune.circuit import Circuit, from_scores
from mgprune.models import InputError, load_model
from mgprune.recipe import Recipe


def two_circuits():
    "A circuit of a short search, and one that is cut from the same scores and says that it has another seed"
    model = load_model()
    first = discover(model, tasks.ioi(model, n=(64, 32, 32)), keep=.2, recipe=Recipe(steps=40), progress=False)
    second = from_scores(first.scores, first.sites, first.provenance["settings"].get("threshold", 0) + .1)
    return first, replace(second, provenance=replace(first.provenance, seed=1))


def ended(act, seconds, how):
    "Run `act` in a child process and send it a signal after some time; the child's exit code, negative for a signal"
    ready, tell = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
                os.write(tell, b".")
                code = act() or 0
        except KeyboardInterrupt: code = 130
        finally: os._exit(code)
    os.read(ready, 1)
    os.close(ready), os.close(tell)
    time.sleep(seconds)
    os.kill(child, how)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def names(folder): return {path.name for path in folder.iterdir()}


def of_saves(circuits, times, draw):
    "Kill a loop of saves again and again: what became of the file -> how often"
    counts = Counter()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ioi.json"
        circuits[0].save(path)
        whole = names(Path(folder))
        def save_for_ever():
            while True:
                for circuit in circuits: circuit.save(path)
        for _ in range(times):
            ended(save_for_ever, draw.uniform(0, .05), signal.SIGKILL)
            try: counts["whole" if Circuit.load(path) in circuits else "another circuit"] += 1
            except InputError: counts["broken"] += 1
            counts["hidden file, for the next save to remove"] += names(Path(folder)) != whole
            circuits[0].save(path)
            counts["left behind after the next save"] += names(Path(folder)) != whole
    return counts


def written(path):
    "The content of a folder or file, by name; None if it is not there"
    if not path.exists(): return None
    return {p.relative_to(path).as_posix(): p.read_bytes() for p in (path.rglob("*") if path.is_dir() else [path]) if p.is_file()}


class Runs:
    "`mgprune discover` with the search left out: it finds a circuit that is there already, and writes it"

    def __init__(self, circuits, folder):
        self.circuits, self.folder = circuits, folder
        self.out, self.json = folder / "out", folder / "ioi.json"
        self.wanted, self.seconds = [], 0
        for number in range(len(circuits)):
            began = time.perf_counter()
            assert self.run(number) == 0
            self.seconds = time.perf_counter() - began
            self.wanted.append((written(self.out), written(self.json)))

    def run(self, number):
        with patch.object(cli, "discover", lambda *of, **options: self.circuits[number]), patch.object(cli, "open_model", lambda *of, **more: None), \
                patch.object(cli, "load_task", lambda *of, **options: None), open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
            return cli.main(["discover", "ioi", "--steps", "40", "--out", str(self.out), "--json", str(self.json), "--force"])

    def clear(self):
        for path in self.folder.iterdir(): shutil.rmtree(path) if path.is_dir() else path.unlink()

    def found(self):
        "Which run the folder is of, and which the file; None for neither"
        def which(part, place): return next((n for n, wanted in enumerate(self.wanted) if wanted[part] == written(place)), None)
        return which(0, self.out), which(1, self.json)


def of_runs(circuits, times, how, draw):
    "End runs that replace an earlier one, at moments drawn from all the time that one takes: what became of it -> how often"
    counts = Counter()
    with tempfile.TemporaryDirectory() as folder:
        runs, now = Runs(circuits, Path(folder)), 1
        for _ in range(times):
            code = ended(lambda: runs.run(1 - now), draw.uniform(0, 2 * runs.seconds), how)
            state, hidden = runs.found(), len(names(Path(folder))) > 2
            counts["folder of two runs, or half-written"] += state[0] is None
            counts["report broken"] += state[1] is None
            counts["new folder beside the old report"] += None not in state and state[0] != state[1]
            counts["both old"] += state == (now, now)
            counts["both new"] += state == (1 - now, 1 - now)
            counts["hidden files, for the next run to remove"] += hidden
            if how == signal.SIGINT: counts["exit code neither 130 nor 0"] += code not in (0, 130)
            if state[0] is None or state[0] != state[1]: runs.clear()
            now = 1 - now if state[0] is None else state[0]
            assert runs.run(1 - now) == 0  # over what is there
            now = 1 - now
            counts["left behind after the next run"] += runs.found() != (now, now) or names(Path(folder)) != {"out", "ioi.json"}
            if len(names(Path(folder))) > 2: runs.clear(), runs.run(now)
    return counts


def spots(circuit, folder):
    "Small files in place of the figures, so that more of the time is the last steps"
    for name in ("circuit", "heads", "neurons", "training"): (Path(folder) / f"{name}.png").write_bytes(f"{circuit.n_neurons()}".encode() * 10_000)
    return []


def table(saves, kills, interrupts, light=False, seed=0):
    "Counts of all three: title -> counts"
    draw, circuits = random.Random(seed), two_circuits()
    with patch.object(plots, "save_figures", spots if light else plots.save_figures):
        return {f"{saves} kills of a loop of saves": of_saves(circuits, saves, draw),
                f"{kills} kills of discover": of_runs(circuits, kills, signal.SIGKILL, draw),
                f"{interrupts} interruptions of discover": of_runs(circuits, interrupts, signal.SIGINT, draw)}


if __name__ == "__main__":
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, times in (("saves", 300), ("kills", 40), ("interrupts", 10)): options.add_argument(f"--{name}", type=int, default=times)
    options.add_argument("--light", action="store_true", help="small files in place of the figures")
    for title, counts in table(**vars(options.parse_args())).items():
        print(title)
        for what, n in counts.items(): print(f"  {n:>4}  {what}")
        sys.stdout.flush()
