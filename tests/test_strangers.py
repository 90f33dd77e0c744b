"""Circuit files that somebody else wrote, with a digest that fits: the circuit that they say, or refused."""
import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save

from mgprune import Circuit, load_model
from mgprune.circuit import FORMAT, as_text, from_scores, readable
from mgprune.files import digest
from mgprune.models import EMBEDDED, InputError
from strangers import example, tally


def test_changed_files_are_the_circuit_that_they_say_or_refused():
    found, memory = tally(120, seed=1)
    assert {*found} == {"refused", "the circuit that the file says"}, found
    assert memory < 200


def test_files_of_the_older_form_still_load(tmp_path):
    circuit = example()
    arrays = save({f"{part}.{l}": t.contiguous() for part in ("kept", "scores") for l, t in getattr(circuit, part).items()})
    data = dict(format="mgprune circuit 1", arrays=digest(arrays)) | readable(circuit)
    data["sites"].pop("parallel")  # which older files do not know
    (tmp_path / "old.json").write_text(json.dumps(data | dict(digest=digest(as_text(data).encode()))))
    (tmp_path / "old.safetensors").write_bytes(arrays)
    again = Circuit.load(tmp_path / "old.json")
    assert again == circuit and again.provenance == circuit.provenance
    assert all(torch.equal(s, circuit.scores[l]) for l, s in again.scores.items())


@pytest.mark.parametrize("text", [b"\xff\xfe", b"[" * 3000, b"{" * 3000, b'{"a":' * 3000, b"", b"null", b"1" * 5000, b'{"format": "mgprune circuit 2"}',
                                  b'{"format": "mgprune circuit 1"}', json.dumps(dict(format=FORMAT, digest=digest(as_text(dict(format=FORMAT)).encode()))).encode()])
def test_what_is_no_circuit_is_refused(tmp_path, text):
    (tmp_path / "no.json").write_bytes(text)
    with pytest.raises(InputError): Circuit.load(tmp_path / "no.json")


def test_save_refuses_what_load_would(tmp_path):
    circuit = example()
    for origin in (dict(task=5), dict(seed=1.), dict(pairs=64), dict(settings=[]), dict(versions=dict(torch=2.1)), dict(seconds="12 s"), dict(task="\ud800"), {1: 2, "1": 3}):
        with pytest.raises(InputError): replace(circuit, provenance=origin).save(tmp_path / "x")
    assert "settings" not in replace(circuit, provenance=dict(settings=None)).provenance  # None is what is not known
    unclosed = replace(circuit, kept=circuit.kept | dict(head=~circuit.kept["head"]))
    with pytest.raises(InputError, match="not closed"): unclosed.save(tmp_path / "x")
    assert not [*tmp_path.iterdir()]
    circuit.provenance["metrics"]["per_pair"] = [.1, .2]
    assert Circuit.load(circuit.save(tmp_path / "x")).provenance == circuit.provenance


def test_save_replaces_only_a_circuits_file(tmp_path):
    circuit = example()
    for text in ("\n" * 300 + '{"my": "results"}', '{"of": {"format": "mgprune circuit 2"}}', "x"):
        (tmp_path / "mine.json").write_text(text)
        with pytest.raises(InputError, match="not a circuit"): circuit.save(tmp_path / "mine")
        assert (tmp_path / "mine.json").read_text() == text
    (tmp_path / "folder.json").mkdir()
    for name in ("folder", "..", "", "a\0b", "a/" * 2000 + "b"):
        with pytest.raises(InputError): circuit.save(tmp_path / name if name else name)
    path = circuit.save(tmp_path / "own")
    path.chmod(0o600)
    assert circuit.save(path).stat().st_mode & 0o777 == 0o600


def test_scores_that_share_their_memory(tmp_path):
    circuit, same = example(), torch.rand(4)
    two = from_scores({"block": same, "mlp": same}, circuit.sites, .5)
    same.zero_()
    assert two.scores["block"].any() and Circuit.load(two.save(tmp_path / "two")) == two


class Shout:
    "Unpickled, it writes a file"
    def __init__(self, path): self.path = str(path)
    def __reduce__(self): return (open, (self.path, "w"))


def test_a_checkpoints_pickle_and_code_are_not_run(tmp_path):
    folder, heard = tmp_path / "model", tmp_path / "heard"
    shutil.copytree(EMBEDDED, folder)
    (folder / "model.safetensors").unlink()
    torch.save({"transformer.wte.weight": Shout(heard)}, folder / "pytorch_model.bin")
    with pytest.raises(InputError): load_model(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | dict(model_type="its_own", auto_map=dict(AutoConfig="code.C", AutoModelForCausalLM="code.M"))))
    (folder / "code.py").write_text(f"open({str(heard)!r}, 'w')")
    with pytest.raises(InputError): load_model(folder)
    assert not heard.exists()
