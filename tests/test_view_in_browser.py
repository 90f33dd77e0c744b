"""The page that Circuit.view writes, clicked through in Chromium with the network off; skipped where there is no playwright or Chromium.

With VIEW_SHOTS=FOLDER it leaves screenshots there.
"""
import os
import shutil
from pathlib import Path

import pytest
import torch

from mgprune.circuit import Circuit, from_kept, from_scores
from mgprune.graph import Graph, by_head
from mgprune.models import load_model
from mgprune.sites import Sites, find_sites
from mgprune.tree import FINEST, LEVELS, NEURONS, TREE, level_shapes, lowest
from mgprune.wiring import Wiring, edges_among

playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="no Chromium")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
SHOTS = os.environ.get("VIEW_SHOTS")


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


def circuit_of(sites, levels, threshold=.3):
    torch.manual_seed(0)
    scores = {l: 2 * torch.randn(s) + (-1 if l in FINEST.values() else 1) for l, s in level_shapes(sites, levels).items()}
    metrics = dict(kl=.093, accuracy=.98, full_accuracy=1.)
    return from_scores(scores, sites, threshold, dict(model="embedded", task="ioi", metrics=metrics))


@pytest.fixture
def opened(browser, tmp_path):
    "Opens a circuit's page from the disk with the network off; fails on errors and on any request but the file itself"
    troubles, contexts = [], []
    def open_page(circuit, width=1280, scheme="light"):
        path = circuit.write(tmp_path / f"{len(contexts)}.html")
        context = browser.new_context(viewport=dict(width=width, height=900), color_scheme=scheme, offline=True, has_touch=width < 500)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: troubles.append(message.text) if message.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: troubles.append(str(error)))
        page.on("request", lambda request: None if request.url == path.as_uri() else troubles.append(request.url))
        page.goto(path.as_uri())
        return page
    yield open_page
    for context in contexts: context.close()
    assert not troubles, troubles


def counts(page):
    "The table of counts, level -> (kept, total), each level with its name in words"
    rows = page.locator("#counts tr").evaluate_all("rows => rows.map(r => [r.dataset.level, ...[...r.cells].map(c => c.textContent)])")
    assert all(spoken == TREE[level].spoken for level, spoken, *_ in rows)
    return {level: (int(kept.replace(",", "")), int(total.replace(",", ""))) for level, _, kept, total, _ in rows}


def slide(page, value):
    page.locator("#size").evaluate("(slider, value) => { slider.value = value; slider.dispatchEvent(new Event('input')); }", value)


@pytest.mark.parametrize("levels", (("block", "head", "mlp", "attention_neuron", "mlp_neuron"), ("head", "mlp"), ("mlp_neuron",), LEVELS))
def test_the_slider_applies_the_rules_of_closure(opened, levels):
    sites = find_sites(load_model())
    circuit = circuit_of(sites, levels)
    page = opened(circuit)
    assert counts(page) == circuit.counts()
    ranked = torch.cat([s.flatten() for l, s in lowest(circuit.scores, sites).items() if l in NEURONS]).sort(descending=True).values
    for value in (0, 150, 400, 600, 850, 1000):
        slide(page, value)
        n = round(float(torch.exp(torch.tensor(value / 1000, dtype=torch.double) * torch.log(torch.tensor(len(ranked) + 1., dtype=torch.double))))) - 1
        wanted = from_scores(circuit.scores, sites, ranked[n].item() if n < len(ranked) else -torch.inf).counts()
        assert counts(page) == {l: wanted[l] for l in circuit.kept}
    page.get_by_role("button", name="as found").click()
    assert counts(page) == circuit.counts()


@pytest.mark.parametrize("scheme", ("light", "dark"))
def test_measures_hold_only_where_the_slider_was_when_the_circuit_was_saved(opened, scheme):
    page = opened(circuit_of(find_sites(load_model()), ("block", "head", "mlp", "attention_neuron", "mlp_neuron")), scheme=scheme)
    facts, said, slider = page.locator("#facts"), page.locator("#stale"), page.get_by_label("neurons to keep")
    own = int(slider.input_value())
    assert facts.inner_text().startswith("KL 0.093") and said.is_hidden() and "stale" not in facts.get_attribute("class")
    slider.press("ArrowLeft")
    assert int(slider.input_value()) == own - 1 and said.is_visible() and "as it was saved" in said.inner_text()
    assert "stale" in facts.get_attribute("class") and float(facts.evaluate("p => getComputedStyle(p).opacity")) <= .5
    if SHOTS: page.screenshot(path=Path(SHOTS) / f"view_moved_{scheme}.png", full_page=True)
    slider.press("ArrowRight")
    assert said.is_hidden() and "stale" not in facts.get_attribute("class")
    slide(page, 1000)
    assert said.is_visible()
    page.get_by_role("button", name="as found").click()
    assert said.is_hidden() and int(slider.input_value()) == own


def test_a_circuit_without_measures_says_nothing_of_them(opened):
    circuit = circuit_of(find_sites(load_model()), ("head", "mlp"))
    page = opened(Circuit(circuit.kept, circuit.sites, circuit.scores))
    slide(page, 10)
    assert page.locator("#stale").is_hidden()


@pytest.mark.parametrize("width", (1280, 390))
@pytest.mark.parametrize("scheme", ("light", "dark"))
def test_click_through(opened, width, scheme):
    circuit = circuit_of(find_sites(load_model()), ("block", "head", "mlp", "attention_neuron", "mlp_neuron"))
    page = opened(circuit, width, scheme)
    detail = page.locator("#detail")
    for layer, head in ((0, 0), *circuit.heads()[-1:]):
        page.get_by_role("button", name=f"Layer {layer}, head {head}", exact=True).click()
        assert detail.locator("h2").inner_text() == f"Layer {layer}, head {head}"
        kept = circuit.kept["attention_neuron"][layer, head]
        assert detail.get_by_text("neurons kept").inner_text() == f"{int(kept.sum())} of 32 neurons kept"
        if kept.any(): assert detail.locator(".list").inner_text() == "Kept: " + ", ".join(map(str, kept.nonzero().flatten().tolist()))
    layer = circuit.mlps()[0]
    page.get_by_role("button", name=f"Layer {layer}, MLP", exact=True).click()
    neuron = circuit.kept["mlp_neuron"][layer].nonzero()[0].item()
    detail.locator(f"[data-neuron='{neuron}']").click()
    assert detail.locator("p.quiet").inner_text().startswith(f"neuron {neuron}: kept, score")
    if SHOTS: page.screenshot(path=Path(SHOTS) / f"view_{width}_{scheme}.png", full_page=True)
    page.get_by_role("button", name="layer 1", exact=True).focus()
    page.keyboard.press("Enter")
    assert detail.locator("h2").inner_text() == "Layer 1"
    assert f"MLP: {int(circuit.kept['mlp_neuron'][1].sum())} of 512 neurons" in detail.inner_text()
    assert page.evaluate("document.documentElement.scrollWidth") <= width  # nothing sticks out of the page
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, background[4:-1].split(","))) < 200) == (scheme == "dark")


def test_a_circuit_without_scores_has_no_slider(opened):
    sites = find_sites(load_model())
    page = opened(from_kept({"head": torch.eye(4).bool()}, sites))
    assert page.locator("#controls").is_hidden() and counts(page)["head"] == (4, 16)
    page.get_by_role("button", name="Layer 2, MLP", exact=True).click()
    page.locator("[data-neuron='7']").click()
    assert page.get_by_text("neuron 7: kept", exact=True).count()


def test_an_empty_circuit_opens_too(opened):
    sites = find_sites(load_model())
    page = opened(from_kept({"block": torch.zeros(4).bool()}, sites))
    assert counts(page)["mlp_neuron"] == (0, 2048) and page.locator("h2").inner_text() == "Layer 0"


@pytest.mark.parametrize("width", (1280, 390))
def test_a_large_circuit_answers_at_once(opened, width):
    sites = Sites(("",) * 30, ("",) * 30, n_heads=9, head_width=64, mlp_width=1536, width=576, n_groups=3)
    circuit = circuit_of(sites, ("block", "head", "mlp", "attention_neuron", "mlp_neuron"))
    page = opened(circuit, width, "dark")
    assert counts(page) == circuit.counts()
    seconds = page.evaluate("""() => { const slider = document.getElementById("size"), start = performance.now();
        for (const value of [300, 500, 700]) { slider.value = value; slider.dispatchEvent(new Event("input")); }
        return (performance.now() - start) / 3000; }""")
    page.get_by_role("button", name=f"Layer {circuit.mlps()[0]}, MLP", exact=True).click()
    playwright.expect(page.locator("#detail h2")).to_be_in_viewport()
    if SHOTS: page.screenshot(path=Path(SHOTS) / f"view_large_{width}.png", full_page=True)
    assert seconds < 2  # milliseconds on an idle machine
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_the_graph_is_shown_by_layer_and_a_click_singles_out_a_node(opened):
    sites = find_sites(load_model())
    circuit, wiring = circuit_of(sites, ("head", "mlp")), Wiring(sites)
    among = edges_among(wiring, circuit)
    graph = Graph(among, circuit, torch.rand(among.shape, generator=torch.Generator().manual_seed(0)))
    page = opened(graph)
    def seen(): return page.locator("#graph [data-from]").evaluate_all("lines => lines.filter(l => !l.classList.contains('gone')).map(l => [l.dataset.from, l.dataset.to])")
    def clear(): return page.locator("#graph [data-from]:not(.faded):not(.gone)").evaluate_all("lines => lines.map(l => [l.dataset.from, l.dataset.to])")
    wanted = sorted([writer, node] for writer, node, *_ in by_head(graph))
    assert sorted(seen()) == wanted and len(wanted) > 20
    heights = page.locator("#graph [data-node]").evaluate_all("boxes => boxes.map(b => [b.dataset.node, b.getBoundingClientRect().y])")
    assert [y for _, y in heights] == sorted((y for _, y in heights), reverse=True) and heights[0][0] == "input" and heights[-1][0] == "logits"
    name = next(name for name in graph.writers() if name.startswith("m"))
    page.locator(f'#graph [data-node="{name}"]').click()
    assert sorted(clear()) == sorted(edge for edge in wanted if name in edge)
    assert page.locator("#graph p").inner_text().startswith(f"MLP {name[1:]} reads:")
    page.locator(f'#graph [data-node="{name}"]').press("Enter")
    page.locator("#graph input").evaluate("(slider) => { slider.value = 5; slider.dispatchEvent(new Event('input')); }")
    assert seen() == [[writer, node] for writer, node, *_ in [*by_head(graph)][:5]] and "5 edges" in page.locator("#graph p").inner_text()
    slide(page, 0)
    assert not seen() or all(edge == ["input", "logits"] for edge in seen())
    if SHOTS: page.screenshot(path=Path(SHOTS) / "graph.png", full_page=True)


def test_a_page_without_a_graph_shows_none(opened):
    page = opened(circuit_of(find_sites(load_model()), ("head", "mlp")))
    assert not page.locator("#graph").is_visible()
