"""One private JupyterLab server and one headless Chromium, for tests and for the gallery script."""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
# nothing may be fetched, and no dialogue may cover the notebook
SETTINGS = {
    "@jupyterlab/apputils-extension/notification.jupyterlab-settings": {
        "fetchNews": "false",
        "checkForUpdates": False,
        "doNotDisturbMode": True,
    },
    "@jupyterlab/extensionmanager-extension/plugin.jupyterlab-settings": {"enabled": False},
    # the whole of a long output is to be in the page, not in a box that scrolls
    "@jupyterlab/notebook-extension/tracker.jupyterlab-settings": {"windowingMode": "none"},
}


def chromium() -> str | None:
    """Path of an installed Chromium, or None."""
    return next((p for p in map(shutil.which, ("chromium", "chromium-browser", "google-chrome")) if p), None)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def server(folder: Path) -> Iterator[str]:
    """A JupyterLab server on `folder`, with settings of its own; yields its address with the token."""
    private = folder / ".jupyter-private"
    for name, value in SETTINGS.items():
        path = private / "settings" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(value))
    port, token = _free_port(), secrets.token_hex(16)
    environment = {
        **os.environ,
        "JUPYTER_CONFIG_DIR": str(private / "config"),
        "JUPYTER_DATA_DIR": str(private / "data"),
        "JUPYTER_RUNTIME_DIR": str(private / "runtime"),
        "IPYTHONDIR": str(private / "ipython"),
        "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
        "JUPYTER_PLATFORM_DIRS": "1",
    }
    command = [
        *(sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root"),
        *(f"--ServerApp.port={port}", "--ServerApp.port_retries=0", "--ServerApp.ip=127.0.0.1"),
        *(f"--IdentityProvider.token={token}", f"--ServerApp.root_dir={folder}"),
        *(f"--LabApp.user_settings_dir={private / 'settings'}", f"--LabApp.workspaces_dir={private / 'workspaces'}"),
        *("--LabApp.expose_app_in_browser=True", "--LabApp.news_url=", "--LabApp.extension_manager=readonly"),
    ]
    with (private / "server.log").open("wb") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT, cwd=folder)
        try:
            _wait_for(f"http://127.0.0.1:{port}/api?token={token}", process, private / "server.log")
            yield f"http://127.0.0.1:{port}/lab?token={token}"
        finally:
            process.terminate()  # the server ends its kernels on SIGTERM
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait_for(url: str, process: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"JupyterLab ended with {process.returncode}:\n{log.read_text()[-3000:]}")
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(0.1)  # polling another process, which offers nothing to wait on
    raise RuntimeError(f"JupyterLab did not answer within 60 s:\n{log.read_text()[-3000:]}")


class Lab:
    """One notebook open in JupyterLab, driven through the application object that the page exposes."""

    def __init__(self, page: Any):
        self.page = page
        self.requests: list[str] = []
        self.errors: list[str] = []
        page.on("request", lambda request: self.requests.append(request.url))
        page.on("console", lambda line: self.errors.append(line.text) if line.type == "error" else None)
        page.on("pageerror", lambda error: self.errors.append(str(error)))

    def open(self, address: str, notebook: str) -> None:
        """Load JupyterLab, open `notebook`, and wait for its kernel."""
        self.page.goto(address)
        self.page.wait_for_function("() => window.jupyterapp?.started !== undefined", timeout=60_000)
        self.page.evaluate(
            """async (path) => {
                const app = window.jupyterapp;
                await app.restored;
                const panel = await app.commands.execute('docmanager:open', {path, factory: 'Notebook'});
                await panel.context.ready;
                await panel.sessionContext.ready;
                await panel.sessionContext.session.kernel.info;
                app.shell.collapseLeft();
                window.panel = panel;
            }""",
            notebook,
        )

    def run(self, index: int) -> None:
        """Run the cell at `index` and wait until it has ended; a Python error in it is raised here."""
        error = self.page.evaluate(
            """async (index) => {
                const panel = window.panel;
                panel.content.activeCellIndex = index;
                await window.jupyterapp.commands.execute('notebook:run-cell');
                const outputs = panel.content.widgets[index].outputArea?.model.toJSON() ?? [];
                const error = outputs.find((o) => o.output_type === 'error');
                return error ? `${error.ename}: ${error.evalue}\\n${error.traceback.join('\\n')}` : null;
            }""",
            index,
        )
        if error:
            raise RuntimeError(re.sub(r"\x1b\[[0-9;]*m", "", error))

    def python(self, code: str) -> str:
        """Run code in the notebook's kernel, outside any cell, and return what it printed."""
        return self.page.evaluate(
            """async (code) => {
                const future = window.panel.sessionContext.session.kernel.requestExecute({code, silent: false});
                let text = '';
                future.onIOPub = (m) => {
                    if (m.header.msg_type === 'stream') text += m.content.text;
                    if (m.header.msg_type === 'error') text += m.content.traceback.join('\\n');
                };
                await future.done;
                return text;
            }""",
            code,
        )

    def theme(self, name: str) -> None:
        """Change to ``JupyterLab Light`` or ``JupyterLab Dark`` and wait until the page has it."""
        self.page.evaluate("(theme) => window.jupyterapp.commands.execute('apputils:change-theme', {theme})", name)
        light = "true" if "Light" in name else "false"
        self.page.wait_for_function("(light) => document.body.dataset.jpThemeLight === light", arg=light)

    def save(self) -> None:
        """Save the notebook."""
        self.page.evaluate("() => window.panel.context.save()")


def notebook(cells: list[str]) -> dict[str, Any]:
    """A notebook of code cells as nbformat's JSON."""
    return {
        "nbformat": 4,
        "nbformat_minor": 5,
        "metadata": {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}},
        "cells": [
            {"cell_type": "code", "id": f"c{i}", "metadata": {}, "source": s, "outputs": [], "execution_count": None}
            for i, s in enumerate(cells)
        ],
    }


@contextmanager
def lab(folder: Path, cells: list[str], width: int = 1400, height: int = 1000) -> Iterator[Lab]:
    """A running JupyterLab with a notebook of `cells` open; server and browser end with the block, whatever happens."""
    from playwright.sync_api import sync_playwright

    (folder / "test.ipynb").write_text(json.dumps(notebook(cells)))
    with server(folder) as address, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), args=list(FLAGS))
        try:
            page = browser.new_page(viewport={"width": width, "height": height})
            opened = Lab(page)
            opened.open(address, "test.ipynb")
            yield opened
        finally:
            browser.close()
