"""Visit every page of the built site in a browser: python tests/browser/site.py [FOLDER]

Builds _docs with the plain builder if it is not there. Every page is opened at desktop and phone width, in light
and dark. Fails on an error in the console (other than a host that is not reached), a broken link, a figure that
is not visible, text of the colour of its ground, or a page wider than the phone. Screenshots go to FOLDER. Needs the extra `browser` and a Chromium.
"""
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote, urldefrag, urljoin, urlparse

from shared import browser, free_port, server

ROOT = Path(__file__).resolve().parents[2]
WIDTHS, SCHEMES = dict(desktop=1280, phone=390), ("light", "dark")
NOT_REACHED = "net::ERR_"  # what Chromium says of a host that it could not ask

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
    const light = c => { const [r, g, b] = c.match(/[\\d.]+/g).map(v => v / 255).map(v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4); return .2126 * r + .7152 * g + .0722 * b }
    const ground = e => { for (let p = e; p; p = p.parentElement) { const c = getComputedStyle(p).backgroundColor, a = c.match(/[\\d.]+/g); if (a.length < 4 || a[3] > .5) return c } return 'rgb(255,255,255)' }
    return [...document.querySelectorAll('main p, main li, main td, main th, main h1, main h2, main h3, main code')].filter(e => e.innerText.trim()).filter(e => {
        const [a, b] = [light(getComputedStyle(e).color), light(ground(e))].sort((x, y) => y - x)
        return (a + .05) / (b + .05) < 3
    }).slice(0, 3).map(e => e.tagName + ' ' + e.innerText.trim().slice(0, 40))
}"""


def is_local(url, root):
    return urlparse(url).netloc == urlparse(root).netloc


def visit(page, url, root, label):
    "Open one page as it is set up; returns the problems and the links"
    problems, errors = [], []
    def heard(message):
        asked = message.location.get("url", "")
        excused = asked.endswith("/favicon.ico") or (NOT_REACHED in message.text and not is_local(asked, root))
        if message.type == "error" and not excused: errors.append(f"{message.text} {asked}")
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
                page.close()
    print(f"{len(pages)} pages, each at {len(WIDTHS)} widths in {len(SCHEMES)} schemes; screenshots in {shots.name}/")
    sys.exit("\n".join(problems) or None)


if __name__ == "__main__": main()
