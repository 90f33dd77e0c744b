"""What the browser scripts share: a Chromium that never asks the network for itself, a page that reports, and local servers."""
import os
import shutil
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from urllib.request import urlopen

from playwright.sync_api import sync_playwright

FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]


def chromium_path():
    "The installed Chromium: the variable CHROMIUM, or one on the path"
    found = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not found: sys.exit("no Chromium found: install it, or set CHROMIUM to the path of one")
    return found


@contextmanager
def browser():
    "A headless Chromium"
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=chromium_path(), args=FLAGS)
        try: yield chromium
        finally: chromium.close()


def free_port():
    "A port of this machine that nothing listens on"
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@contextmanager
def server(command, url, log, patience=120, **options):
    "A server process that answers at `url` within `patience` seconds, ended at the end; its output goes to the file `log`"
    with open(log, "wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, **options)
        try:
            for _ in range(2 * patience):
                if process.poll() is not None: sys.exit(f"{command[0]} ended with {process.returncode}; see {log}")
                try: urlopen(url, timeout=5).close()
                except OSError: time.sleep(.5)
                else: break
            else: sys.exit(f"{url} did not answer in {patience} s; see {log}")
            yield url
        finally:
            process.terminate()
            try: process.wait(20)
            except subprocess.TimeoutExpired: process.kill()
