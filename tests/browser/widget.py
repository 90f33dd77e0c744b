"""Drive the explorer in a real JupyterLab: python tests/browser/widget.py [FOLDER]

Opens a small notebook, moves the threshold, closes a head, chooses another ablation, and compares the probability
on the page with what the circuit computes in another process. Looks at a node, writes a note on it, chooses a preset
and undoes it; then saves the edited circuit and loads it. A second notebook, on a
dark page, opens a model of thirty layers. Screenshots go to FOLDER.
Needs the extra `browser` and a Chromium.
"""
import os
import re
import sys
import tempfile
import time
from pathlib import Path

import nbformat
import torch
from shared import browser, free_port, server

from mgprune import Circuit, load_model, tasks
from mgprune.attribution import attribute
from mgprune.circuit import from_kept, from_scores
from mgprune.evaluation import cut_by_size
from mgprune.models import fingerprint
from mgprune.pairs import encode
from mgprune.passes import answer_logits
from mgprune.sites import find_sites
from mgprune.widgets import Choice, chosen, thresholds

OPEN = """from mgprune import Circuit, load_model, tasks
model = load_model()
view = Circuit.load("found.json", model).explore(model, tasks.ioi(model, n=(64, 16, 16)))
view"""

LARGE = """import torch
from transformers import LlamaConfig, LlamaForCausalLM
from mgprune import load_model, tasks
from mgprune.circuit import from_scores
from mgprune.tree import level_shapes
from mgprune.sites import find_sites
tokenizer = load_model().tokenizer
torch.manual_seed(0)
model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), hidden_size=72, intermediate_size=96, num_hidden_layers=30,
                                     num_attention_heads=9, num_key_value_heads=3, max_position_embeddings=64))
model, sites = load_model(model, tokenizer=tokenizer), find_sites(model)
circuit = from_scores({l: torch.randn(s) + 1 for l, s in level_shapes(sites).items()}, sites)
view = circuit.explore(model, tasks.ioi(tokenizer, n=(4, 4, 4)))
view"""


def prepared(folder):
    "A circuit of the embedded model and a notebook that opens it, in `folder`; returns the model, the task and the circuit"
    model = load_model()
    task = tasks.ioi(model, n=(64, 16, 16))
    scores, sites = attribute(model, task, signed=True), find_sites(model)
    circuit = from_scores(scores, sites, cut_by_size(scores, sites, .2), dict(model="embedded", fingerprint=fingerprint(model), task=task.name))
    circuit.save(folder / "found.json")
    for name, cell in (("small", OPEN), ("large", LARGE)):
        notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell)],
                                            metadata=dict(kernelspec=dict(name="python3", display_name="Python 3", language="python")))
        nbformat.write(notebook, folder / f"{name}.ipynb")
    lab = folder / "settings/@jupyterlab/apputils-extension"
    lab.mkdir(parents=True)
    (lab / "notification.jupyterlab-settings").write_text('{"fetchNews": "false", "checkForUpdates": false, "doNotDisturbMode": true}')
    (lab / "themes.jupyterlab-settings").write_text('{"adaptive-theme": true}')  # light or dark, as the browser asks
    return model, task, circuit


def computed(model, circuit, pair, ablation=None, reference=None):
    "Probability of the right answer in the circuit, as the page should show it"
    batch = encode([pair], model)
    with torch.no_grad(), circuit.applied(model, batch, ablation, reference): logits = answer_logits(model, batch.clean, batch.attention_mask)
    return f"{logits[0].softmax(-1)[batch.answer[0, 0]].item():.2%}"


class Page:
    "The view on the page, by what a reader sees"

    def __init__(self, page):
        self.page, self.view = page, page.locator(".jp-OutputArea-output .widget-vbox").first

    def answer(self):
        "Probability of the right answer in the circuit, as text"
        return self.view.locator("tr", has=self.page.locator("td", has_text=re.compile("^correct$"))).first.locator("td").nth(3).inner_text()

    def counts(self):
        "The line that says how much is kept"
        return self.view.get_by_text(re.compile(r"of \d+ heads")).first.inner_text()

    def wait(self, what, expected, patience=30):
        "Seconds until `what()` is as expected"
        began = time.perf_counter()
        while (seen := what()) != expected:
            if time.perf_counter() - began > patience: sys.exit(f"the page shows {seen!r} after {patience} s, expected {expected!r}")
            self.page.wait_for_timeout(5)
        return time.perf_counter() - began

    def button(self, circuit, layer, column):
        "The button of a head, or of the layer in column 0 and its MLP in the last one"
        row = circuit.sites.n_layers - 1 - layer
        return self.view.locator(".jupyter-widget-toggle-button, .widget-toggle-button").nth(row * (circuit.sites.n_heads + 2) + column)

    def slide(self, key, times):
        "Move the threshold by the keyboard, as a slider's handle allows"
        handle = self.view.locator(".noUi-handle").first
        handle.focus()
        for _ in range(times): handle.press(key)


def opened(page, url):
    "Open the notebook and run its cell"
    page.goto(url, timeout=180_000)  # a slow machine
    cell = page.locator(".jp-Notebook .jp-CodeCell").first
    cell.wait_for(timeout=120_000)
    shown = page.locator(".jp-OutputArea-output .widget-vbox").first
    for _ in range(60):
        if shown.is_visible(): break
        if cell.locator(".jp-InputPrompt").inner_text() == "[ ]:":  # while the kernel connects, a request to run may be dropped
            cell.locator(".cm-content").click()
            page.keyboard.press("Control+Enter")
        page.wait_for_timeout(2000)
    page.wait_for_function("document.querySelectorAll('.widget-toggle-button').length >= 24")


def drive(page, model, task, circuit, folder, shots):
    "Do what a reader would, and compare every answer"
    pair, view = task.test[0], Page(page)
    view.wait(view.answer, computed(model, circuit, pair))
    page.screenshot(path=shots / "widget-opened.png")
    view.view.screenshot(path=shots / "explorer.png")

    rests = {head: chosen(circuit, Choice(edits={("head", *head): False})) for head in circuit.heads()}
    layer, head = min(rests, key=lambda head: float(computed(model, rests[head], pair).rstrip("%")))  # the one that matters most here
    kept = {l: k.clone() for l, k in circuit.kept.items()}
    kept["head"][layer, head] = False
    without = from_kept(kept, circuit.sites)
    assert computed(model, without, pair) != computed(model, circuit, pair)
    view.button(circuit, layer, 1 + head).click()
    seconds = view.wait(view.answer, computed(model, without, pair))
    print(f"layer {layer} head {head} closed by a click: {computed(model, circuit, pair)} -> {view.answer()}, {1e3 * seconds:.0f} ms until the page showed it")
    page.screenshot(path=shots / "widget-head-closed.png")
    view.button(circuit, layer, 1 + head).click()
    view.wait(view.answer, computed(model, circuit, pair))

    means = computed(model, circuit, pair, "mean", task)
    assert means != computed(model, circuit, pair)
    ablations = view.view.locator("select", has=page.locator("option", has_text=re.compile("^mean_by_position$")))
    ablations.select_option(label="mean")
    view.wait(view.answer, means)
    assert view.view.get_by_text("all ablated", exact=True).count() == 1
    page.screenshot(path=shots / "widget-means.png")
    print(f"ablated nodes hold means: the answer has {means}")
    ablations.select_option(label="corrupt")
    view.wait(view.answer, computed(model, circuit, pair))

    before = view.counts()
    view.slide("ArrowRight", 4)
    page.wait_for_timeout(1500)
    text = view.counts().split(". Now ")[0]
    smaller = next(c for c in sizes(circuit) if f"{c.n_neurons():,} neurons" == text.split(": ")[1])
    view.wait(view.answer, computed(model, smaller, pair))
    assert view.counts() != before and smaller.n_neurons() < circuit.n_neurons()
    print(f"threshold moved, {text}: the answer has {view.answer()}")
    page.screenshot(path=shots / "widget-threshold.png")

    page.set_viewport_size(dict(width=1400, height=900))
    view.button(circuit, layer, 1 + head).click()
    view.view.get_by_text(re.compile("From the last token it looks at")).wait_for()
    assert view.view.get_by_text(re.compile(f"layer {layer}, head {head}: ")).count() >= 1
    assert view.view.get_by_text(re.compile("writes up")).count() >= 1
    view.view.locator("textarea").fill("carries the name")
    view.view.locator("textarea").blur()
    page.screenshot(path=shots / "widget-looked-at.png")
    print(f"layer {layer} head {head} looked at, with a note on it")

    closed = view.counts()
    view.view.locator("select", has=page.locator("option", has_text=re.compile(r"^heads\salone$"))).select_option(value="heads alone")
    view.wait(lambda: "0 of 4 MLPs" in view.counts(), True)
    view.view.locator("button", has_text=re.compile("^undo$")).click()
    view.wait(view.counts, closed)
    print("a preset, and back by undo")

    view.view.locator("button", has_text=re.compile("^save$")).click()
    view.view.get_by_text(re.compile("^saved")).wait_for()
    saved = Circuit.load(folder / "edited.json", model)
    assert saved.kept["head"][layer, head] != smaller.kept["head"][layer, head]
    view.wait(view.answer, computed(model, saved, pair))
    assert saved.provenance["on_nodes"] == [[["head", layer, head], "carries the name"]]
    edits = saved.provenance["edited"][-1]["edits"]
    print(f"saved with edits {edits}; loaded again: {saved.n_neurons()} neurons, the same answer")


def drive_large(page, model, task, circuit, folder, shots):
    "In a model of thirty layers every node has its button, in reach, and a click shows in time"
    view = Page(page)
    buttons = view.view.locator(".widget-toggle-button")
    view.wait(buttons.count, 30 * (1 + 9 + 1))
    grid = view.view.locator(".widget-gridbox").bounding_box()
    assert grid["width"] < 600 and grid["height"] < 460, f"the grid of 30 layers takes {grid}"
    page.screenshot(path=shots / "widget-large-dark.png")
    before = view.counts()
    buttons.last.scroll_into_view_if_needed()
    began = time.perf_counter()
    buttons.last.click()
    while view.counts() == before and time.perf_counter() - began < 30: page.wait_for_timeout(5)
    assert view.counts() != before, "a click on the last button shows nothing"
    print(f"30 layers, 9 heads: {buttons.count()} buttons, a click shows after {1e3 * (time.perf_counter() - began):.0f} ms")


def sizes(circuit):
    "The circuits that the slider can stop at"
    return [circuit if t is None else from_scores(circuit.scores, circuit.sites, t) for _, t in thresholds(circuit)]


def main():
    shots = Path(sys.argv[1] if len(sys.argv) > 1 else "_browser").resolve()
    shots.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        folder, port = Path(folder), free_port()
        model, task, circuit = prepared(folder)
        url = f"http://127.0.0.1:{port}/lab/tree/"
        command = [sys.executable, "-m", "jupyter", "lab", "--no-browser", "--allow-root", "--ip=127.0.0.1", f"--port={port}", "--ServerApp.port_retries=0",
                   "--IdentityProvider.token=", f"--ServerApp.root_dir={folder}", f"--LabApp.workspaces_dir={folder}/workspaces", f"--LabApp.user_settings_dir={folder}/settings"]
        root = str(Path(__file__).resolve().parents[2])
        environment = os.environ | dict(PYTHONPATH=root, JUPYTER_CONFIG_DIR=f"{folder}/config", JUPYTER_DATA_DIR=f"{folder}/data", HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1")
        with server(command, f"http://127.0.0.1:{port}/api", shots / "jupyter.log", cwd=folder, env=environment), browser() as chromium:
            for name, scheme, check in (("small", "light", drive), ("large", "dark", drive_large)):
                page = chromium.new_page(viewport=dict(width=1400, height=1000), color_scheme=scheme)
                try:
                    opened(page, f"{url}{name}.ipynb?reset")
                    check(page, model, task, circuit, folder, shots)
                except BaseException:
                    page.screenshot(path=shots / "widget-failed.png")
                    raise
                page.close()
    print(f"the view in JupyterLab does what its circuit computes; screenshots in {shots.name}/")


if __name__ == "__main__": main()
