"""Visit every page of the built site in a browser: python tests/browser/site.py [FOLDER]

Builds _docs with the plain builder if it is not there. Every page is opened at desktop and phone width, in light
and dark. Fails on an error in the console, a page that asks another host, a broken link, a figure that is not visible
or has no alternative text, formulas left as they were written, a table of text with a column cut off, a page wider
than the phone, or text with less contrast than WCAG asks for at level AA. Then the search is asked what people
look for, and has to answer with the right page. Screenshots go to FOLDER. Needs the extra `browser` and a Chromium.
"""
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote, urldefrag, urljoin, urlparse

from shared import browser, free_port, server

ROOT = Path(__file__).resolve().parents[2]
ANSWERS = {  # what people type -> the page that has to come first
    "own data": "tutorials/your_own_task.html", "own model": "tutorials/larger_models.html", "memory": "tutorials/larger_models.html",
    "time": "tutorials/larger_models.html", "out of memory": "tutorials/larger_models.html", "EAP-IG": "benchmarks/frontier.html",
    "MIB": "curves.html", "TransformerLens": "compared.html", "cite": "citing.html", "score": "glossary.html", "llama": "supported_models.html",
    "gpt2": "benchmarks/gpt2.html"}
WIDTHS, SCHEMES = dict(desktop=1280, phone=390), ("light", "dark")

FIGURES = """() => [...document.querySelectorAll('main img, main svg.figure-img')].map(figure => {
    const box = figure.getBoundingClientRect()
    return {name: figure.alt || figure.src.slice(0, 60), natural: figure.naturalWidth ?? box.width, width: box.width, height: box.height,
            right: box.right, seen: figure.checkVisibility({opacityProperty: true, visibilityProperty: true})}
})"""
WIDER = """() => {
    const width = document.documentElement.clientWidth
    const inside = e => { for (let p = e.parentElement; p; p = p.parentElement) if (getComputedStyle(p).overflowX != 'visible') return true; return false }
    const wide = [...document.querySelectorAll('body *')].filter(e => e.getBoundingClientRect().right > width + 1 && !inside(e))
    return {page: document.documentElement.scrollWidth - width, by: wide.slice(0, 3).map(e => e.tagName + '.' + e.className)}
}"""
DIM = """() => {
    const numbers = c => c.match(/[\\d.]+/g).map(Number)
    const over = (top, below) => { const [r, g, b, a = 1] = top; return [r, g, b].map((v, i) => v * a + below[i] * (1 - a)) }
    const light = c => { const [r, g, b] = c.map(v => v / 255).map(v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4); return .2126 * r + .7152 * g + .0722 * b }
    const ground = e => { const layers = []; for (let p = e; p; p = p.parentElement) layers.push(numbers(getComputedStyle(p).backgroundColor)); return layers.reverse().reduce((below, top) => over(top, below), [255, 255, 255]) }
    const faded = e => { let a = 1; for (let p = e; p; p = p.parentElement) a *= getComputedStyle(p).opacity; return a }
    const own = e => [...e.childNodes].some(n => n.nodeType == 3 && n.textContent.trim())
    const found = {}
    for (const e of document.querySelectorAll('body *')) {
        if (!own(e) || e.closest('svg, .katex, script, style') || !e.checkVisibility({opacityProperty: true, visibilityProperty: true})) continue
        const style = getComputedStyle(e), size = parseFloat(style.fontSize), below = ground(e), [r, g, b, a = 1] = numbers(style.color)
        const [x, y] = [light(over([r, g, b, a * faded(e)], below)), light(below)].sort((x, y) => y - x)
        const enough = size >= 24 || size >= 18.66 && style.fontWeight >= 600 ? 3 : 4.5, ratio = (x + .05) / (y + .05)
        if (ratio < enough) found[`${e.tagName.toLowerCase()}.${e.className} ${style.color} on ${below.map(Math.round)} has ${ratio.toFixed(2)}`] ??= e.textContent.trim().slice(0, 40)
    }
    return Object.entries(found).slice(0, 6).map(([what, text]) => `${what}: ${text}`)
}"""
WORDLESS = "() => [...document.querySelectorAll('img')].filter(img => !img.alt.trim()).map(img => img.src.slice(0, 80))"
RAW = "() => document.querySelectorAll('.math').length && !document.querySelector('.katex')"
CUT = "() => [...document.querySelectorAll('table.caption-top td')].filter(td => td.getBoundingClientRect().right > document.documentElement.clientWidth + 1).map(td => td.innerText.slice(0, 40))"


def is_local(url, root):
    return urlparse(url).netloc == urlparse(root).netloc


def visit(page, url, root, label):
    "Open one page as it is set up; returns the problems and the links"
    problems, errors = [], []
    def heard(message):
        asked = message.location.get("url", "")
        if message.type == "error" and not asked.endswith("/favicon.ico"): errors.append(f"{message.text} {asked}")
    def raised(error): errors.append(str(error))
    page.on("console", heard)
    page.on("pageerror", raised)
    page.goto(url, wait_until="load")
    page.wait_for_timeout(200)
    page.remove_listener("console", heard)
    page.remove_listener("pageerror", raised)
    problems += [f"console: {text}" for text in errors]
    for figure in page.evaluate(FIGURES):
        if not (figure["natural"] and figure["width"] > 1 and figure["height"] > 1 and figure["seen"]): problems.append(f"figure {figure['name']!r} is not visible")
    wider = page.evaluate(WIDER)
    if wider["page"] > 0: problems.append(f"wider than the window by {wider['page']} px: {', '.join(wider['by'])}")
    problems += [f"picture without alternative text: {text}" for text in page.evaluate(WORDLESS)]
    problems += [f"a cell is cut off: {text}" for text in page.evaluate(CUT)[:3]]
    if page.evaluate(RAW): problems.append("formulas are not rendered")
    problems += [f"hard to read against what is behind it: {text}" for text in page.evaluate(DIM)]
    links = page.eval_on_selector_all("a[href]", "links => links.map(link => link.href)")
    return [f"{label}: {problem}" for problem in problems], [link for link in links if is_local(link, root)]


def broken(folder, root, links, page):
    "The links of one page that lead to no file, or to no place in it"
    for link in sorted({*links}):
        address, place = urldefrag(link)
        path = folder / unquote(urlparse(address).path).lstrip("/")
        if path.is_dir(): path /= "index.html"
        if not path.is_file(): yield f"{page}: the link to {address.removeprefix(root)} is broken"
        elif place and path.suffix == ".html" and f'id="{unquote(place)}"' not in path.read_text(encoding="utf-8"):
            yield f"{page}: {path.name} has no place {place!r}"


def unanswered(page, root):
    "Searches of the plain site whose first answer is another page than the one in `ANSWERS`, and results that are hard to read"
    page.goto(root, wait_until="load")
    box = page.locator(".smalldocs-search input").first
    for words, expected in ANSWERS.items():
        box.fill("")
        box.fill(words)
        first = page.locator(".search-result").first
        page.wait_for_timeout(500)  # it looks a little after the last letter
        if first.get_attribute("href").split("#")[0].removeprefix("./") != expected: yield f"a search for {words!r} leads to {first.get_attribute('href')}"
    yield from (f"search: hard to read against what is behind it: {text}" for text in page.evaluate(DIM))


def main():
    shots = Path(sys.argv[1] if len(sys.argv) > 1 else "_browser").resolve()
    shots.mkdir(parents=True, exist_ok=True)
    docs = ROOT / "_docs"
    if not docs.is_dir(): subprocess.run([sys.executable, "-W", "ignore", ".ci/docs.py", "--plain"], cwd=ROOT, check=True)
    pages, problems, port = sorted(p.relative_to(docs).as_posix() for p in docs.rglob("*.html") if "site_libs" not in p.parts), [], free_port()
    command = [sys.executable, "-m", "http.server", str(port), "--bind", "127.0.0.1", "--directory", str(docs)]
    with server(command, f"http://127.0.0.1:{port}/", shots / "site.log") as root, browser() as chromium:
        for scheme in SCHEMES:
            for width in WIDTHS:
                page = chromium.new_page(viewport=dict(width=WIDTHS[width], height=900), color_scheme=scheme)
                for name in pages:
                    found, links = visit(page, urljoin(root, name), root, f"{name}, {width}, {scheme}")
                    problems += found
                    if width == "desktop" and scheme == "light": problems += broken(docs, root, links, name)
                    page.screenshot(path=shots / f"{name.removesuffix('.html').replace('/', '-')}-{width}-{scheme}.png", full_page=True)
                if width == "desktop" and (docs / "site_libs" / "smalldocs.js").is_file(): problems += unanswered(page, root)
                page.close()
    print(f"{len(pages)} pages, each at {len(WIDTHS)} widths in {len(SCHEMES)} schemes; screenshots in {shots.name}/")
    sys.exit("\n".join(problems) or None)


if __name__ == "__main__": main()
