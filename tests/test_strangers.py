"""Circuit files that somebody else wrote, with a digest that fits: the circuit that they say, or refused."""
import json

import pytest
import torch
from safetensors.torch import save

from mgprune import Circuit
from mgprune.circuit import FORMAT, as_text, digest, readable
from mgprune.models import InputError
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
