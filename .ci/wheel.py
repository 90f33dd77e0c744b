"""Use an installed wheel with every development tool blocked, as somebody who only wants the library would:
python .ci/wheel.py FOLDER, where FOLDER is what `pip install --target` filled
"""
import importlib
import pkgutil
import sys
from pathlib import Path

folder = Path(sys.argv[1]).resolve()
sys.path.insert(0, str(folder))
for tool in "nbdev execnb fastcore ghapi fastgit nbclient smalldocs pytest hypothesis".split():
    sys.modules[tool] = None  # importing it now raises ImportError

import mgprune

assert Path(mgprune.__file__).is_relative_to(folder), f"imported {mgprune.__file__}"
assert (folder / "mgprune" / "py.typed").is_file()
for module in pkgutil.iter_modules(mgprune.__path__): importlib.import_module(f"mgprune.{module.name}")
mgprune.load_model()  # the embedded model is in the wheel

from mgprune.cli import main

sys.argv = ["mgprune", "--help"]
try: main()
except SystemExit as end: assert not end.code, f"mgprune --help ended with {end.code}"
