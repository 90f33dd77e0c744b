"""What the built site gets after either builder: formulas and letters that need no network, notebooks to take away,
tables that fit a phone, and answers to what people search for."""
import hashlib
import html
import io
import json
import re
import shutil
import subprocess
import tarfile
import tempfile
from base64 import b64decode
from pathlib import Path

NUMBERED = re.compile(r"\b\d+[a-zA-Z0-9]*_([\w-]+\.)(ipynb|html)\b")  # nbdev's rule: 02_gates.ipynb is page gates.html
TABLE = re.compile(r'(?s)<table class="caption-top table".*?</table>')
COLAB = "https://colab.research.google.com/github/mgprune/mgprune/blob/main"
LOOKED_FOR = {  # what people type -> where it is answered
    "own data": "tutorials/your_own_task.html", "own task": "tutorials/your_own_task.html", "dataset": "tutorials/your_own_task.html",
    "CSV": "tutorials/your_own_task.html#from-a-file", "JSONL": "tutorials/your_own_task.html#from-a-file",
    "own model": "tutorials/larger_models.html", "llama": "supported_models.html", "pythia": "supported_models.html",
    "gpt2": "benchmarks/gpt2.html", "GPT-2": "benchmarks/gpt2.html", "memory": "tutorials/larger_models.html#memory",
    "out of memory": "tutorials/larger_models.html#out-of-memory", "CUDA": "tutorials/larger_models.html#loading",
    "GPU": "tutorials/larger_models.html#loading", "time": "tutorials/larger_models.html#time", "how long": "tutorials/larger_models.html#time",
    "slow": "tutorials/larger_models.html#time", "EAP-IG": "benchmarks/frontier.html", "EAP": "attribution.html", "MIB": "curves.html",
    "TransformerLens": "compared.html", "nnsight": "compared.html", "ACDC": "compared.html", "circuit-tracer": "compared.html",
    "Edge Pruning": "compared.html", "auto-circuit": "compared.html", "cite": "citing.html", "citation": "citing.html", "paper": "citing.html",
    "BibTeX": "citing.html", "score": "glossary.html#words", "scores": "glossary.html#words", "faithfulness": "glossary.html#measures",
    "KL": "glossary.html#measures", "exact match": "glossary.html#measures", "install": "index.html#install", "edges": "edge_search.html",
    "ablation": "ablations.html", "mean ablation": "ablations.html", "seed": "benchmarks/reliability.html", "explorer": "widgets.html",
    "hub": "export.html#push_to_hub", "command line": "cli.html"}
VERSION = "0.16.22"
DIGEST = "XCHRdUw4lf3SKBaJe4EvgqIuWwkPSo9XoeO8GjQW94Bp7TWv9hNhzZjZ+OH9yf1UmLygb7DIT5GSFQiyt16zYg=="  # sha512, as npm lists it
NEEDED = re.compile(r"package/(LICENSE|dist/(katex\.min\.(css|js)|contrib/auto-render\.min\.js|fonts/\w+-\w+\.woff2))")
FONTS = re.compile(r"@import\s*(?:url\()?[\"']?https://fonts\.googleapis\.com[^)\"']*[\"']?\)?;")
ASKED = re.compile(r"https://cdn\.jsdelivr\.net/npm/katex@[\d.]+/dist")


def renderer():
    "KaTeX as name -> bytes, as npm brings it"
    if not shutil.which("npm"): raise OSError("npm is not installed")
    with tempfile.TemporaryDirectory() as folder:
        asked = subprocess.run(["npm", "pack", "--silent", f"katex@{VERSION}"], cwd=folder, capture_output=True, text=True, timeout=120)
        if asked.returncode: raise OSError(f"npm says: {asked.stderr.strip()[-200:]}")
        packed = next(Path(folder).glob("*.tgz")).read_bytes()
    if hashlib.sha512(packed).digest() != b64decode(DIGEST): raise OSError(f"KaTeX {VERSION} has another digest than the one known")
    with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
        return {name.removeprefix("package/").removeprefix("dist/"): archive.extractfile(name).read() for name in archive.getnames() if NEEDED.fullmatch(name)}


def own_letters(docs):
    "The themes would fetch their fonts from the web; the next ones that they name are on every machine"
    for style in docs.rglob("*.css"):
        text = style.read_text(encoding="utf-8")
        if FONTS.search(text): style.write_text(FONTS.sub("", text), encoding="utf-8")


def ship(docs):
    "Put KaTeX into the folder of the site and lead its pages there; where npm is not reached they ask the web, as before"
    pages = [page for page in docs.rglob("*.html") if ASKED.search(page.read_text(encoding="utf-8"))]
    if not pages: return
    try: files = renderer()
    except (OSError, subprocess.TimeoutExpired) as error:
        print(f"formulas will need the network: {error}")
        return
    for name, content in files.items():
        path = docs / "site_libs" / "katex" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    for page in pages:
        up = "../" * (len(page.relative_to(docs).parts) - 1)
        page.write_text(ASKED.sub(f"{up}site_libs/katex", page.read_text(encoding="utf-8")), encoding="utf-8")
    print(f"formulas: KaTeX {VERSION} in {len(pages)} pages")


def with_notebooks(docs, notebooks):
    "Give each page of the built site its notebook to take away, and each cell of a text's table the name of its column"
    for notebook in [p for p in notebooks.rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts]:
        name = notebook.relative_to(notebooks).as_posix()
        page, copy = docs / NUMBERED.sub(r"\1\2", name).replace(".ipynb", ".html"), docs / "notebooks" / name
        if not page.is_file(): continue
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(notebook, copy)
        up = "../" * (len(page.relative_to(docs).parts) - 1)
        links = (f'<p class="notebook-links"><a href="{up}notebooks/{name}" download>Download this notebook</a>'
                 f' · <a href="{COLAB}/nbs/{name}">Open in Colab</a></p>')
        text = page.read_text(encoding="utf-8")
        text = re.sub(r'(?s)(<header id="title-block-header".*?</header>)', lambda found: found[0] + links, text, count=1)
        page.write_text(TABLE.sub(labelled, text), encoding="utf-8")


def labelled(table):
    "A text's table of three columns or more, whose cells say their column, for pages too narrow for all of them"
    names = [re.sub(r"<[^>]+>", "", name).strip() for name in re.findall(r"(?s)<th\b[^>]*>(.*?)</th>", table[0])]
    if len(names) < 3: return table[0]
    def row(found):
        left = iter(names)
        return re.sub(r"<td\b", lambda cell: f'<td data-label="{html.escape(next(left, ""))}"', found[0])
    kind = "labelled many" if len(names) > 5 else "labelled"
    return re.sub(r"(?s)<tr\b.*?</tr>", row, table[0]).replace("caption-top table", f"caption-top table {kind}", 1)


def answered(docs):
    "Lead the search of the site to where the words of `LOOKED_FOR` are answered"
    index = docs / "search.json"
    entries = json.loads(index.read_text(encoding="utf-8"))
    known = {}
    for entry in entries:
        known.setdefault(entry["href"], entry)
        known.setdefault(entry["href"].split("#")[0], entry | dict(section=""))  # a page that begins with a heading
    for words, place in LOOKED_FOR.items():
        if place not in known: raise SystemExit(f"docs: the words {words!r} are to lead to {place}, which is not there")
        there = known[place]
        title = " · ".join(filter(None, (there["title"], there["section"])))
        entries.append(dict(objectID=f"{place}?{words}", href=place, title=words, section=title, text=f"{words}: see {title}"))  # short: it ranks high
    index.write_text(json.dumps(entries, ensure_ascii=False), encoding="utf-8")


def finish(docs, notebooks):
    "All of it, in the folder of the built site"
    with_notebooks(docs, notebooks)
    answered(docs)
    own_letters(docs)
    ship(docs)
