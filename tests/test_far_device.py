"""The tests of a second device run in a process of their own: PyTorch counts its devices once, before the first way back."""
import subprocess
import sys
from pathlib import Path


def test_a_second_device():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(Path(__file__).with_name("on_far_device.py"))]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout[-4000:] + ended.stderr[-1000:]
