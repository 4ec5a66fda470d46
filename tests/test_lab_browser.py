"""A real JupyterLab, started here, with the live viewer in it: maps, an image dropped in, files written."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from urllib.parse import urlsplit

import nbformat
import numpy as np
import pytest
from PIL import Image
from pydicom.data import get_testdata_file

PROJECT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.browser

CELLS = (
    """
import cxrkit
from cxrkit.view import lab, widget

labels = ("Mass", "<img src=x onerror=document.title='owned'>")
model = cxrkit.models.create("resnet18", labels=labels).eval()
explorer = widget.Explorer({"net": model}, None, ["layercam", "saliency"])
explorer.add_image(cxrkit.data.load("phantom", size=64, images=20)[0].image, "<b>first</b>")
explorer
""",
    "lab.drop_in(explorer, 64)",
    'lab.exports(explorer, "exports")',
)


def free_port() -> int:
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        return place.getsockname()[1]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """Folder and address of a JupyterLab that serves a notebook with the live viewer."""
    folder, home = tmp_path_factory.mktemp("lab"), tmp_path_factory.mktemp("home")
    # Where an installation puts it: in a folder of that name.
    (home / "jupyter_server_config.d").mkdir()
    shutil.copy(PROJECT / "jupyter" / "cxrkit.json", home / "jupyter_server_config.d")
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source.strip()) for source in CELLS])
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(notebook, folder / "live.ipynb")
    port = free_port()
    options = (
        f"--no-browser --ServerApp.port={port} --ServerApp.port_retries=0 --ServerApp.ip=127.0.0.1 "
        f"--IdentityProvider.token= --ServerApp.root_dir={folder} --ServerApp.allow_root=True --LabApp.news_url=None "
        "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate"
    )
    places = {name: str(home / name) for name in ("JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR")}
    places |= {"JUPYTER_CONFIG_DIR": str(home)}
    places |= {"JUPYTERLAB_SETTINGS_DIR": str(home / "s"), "JUPYTERLAB_WORKSPACES_DIR": str(home / "w")}
    log = (home / "log").open("w")
    process = subprocess.Popen(
        [sys.executable, "-m", "jupyterlab", *options.split()], env=os.environ | places, stdout=log, stderr=log
    )
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            if process.poll() is not None:
                pytest.fail("JupyterLab ended: " + (home / "log").read_text()[-2000:])
            try:
                urllib.request.urlopen(f"{address}/api", timeout=2)
                break
            except OSError:
                time.sleep(0.2)
        yield folder, address
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()


def test_the_live_viewer_in_jupyterlab(browser, server):
    folder, address = server
    context = browser.new_context(viewport={"width": 1280, "height": 1400})
    page = context.new_page()
    page.set_default_timeout(90_000)
    hosts, complaints = set(), []
    page.on("request", lambda request: hosts.add(urlsplit(request.url).hostname))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto(f"{address}/lab/tree/live.ipynb?reset")
    page.locator(".jp-Notebook .jp-CodeCell").nth(2).wait_for()
    page.get_by_text("| Idle").wait_for()  # cells that are run before there is a kernel are not run at all
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
    ready = "canvas[aria-label*='Radiograph {} with the {} map']"
    page.locator(ready.format("<b>first</b>", "layercam")).wait_for()
    page.locator(ready.format("<b>first</b>", "saliency")).wait_for()

    # Dropped in: one file that is read, one that can't be.
    with page.expect_file_chooser() as chooser:
        page.get_by_role("button", name=re.compile("Own images")).click()
    hostile = folder / "<img src=x>.png"
    hostile.write_bytes(b"no picture")
    large = folder / "large.png"  # more than a server takes in one message unless it is told otherwise
    noise = np.random.default_rng(0).integers(0, 65535, (2400, 2600), dtype=np.uint16)
    Image.fromarray(noise).save(large, compress_level=0)
    assert large.stat().st_size > 11 * 2**20
    chooser.value.set_files([get_testdata_file("RG1_UNCR.dcm", download=False), hostile, large])
    page.get_by_text("RG1_UNCR.dcm: shown, 64 x 64 pixels.").wait_for()
    page.get_by_text("<img src=x>.png: ").wait_for()
    page.get_by_text("large.png: shown, 64 x 64 pixels.").wait_for()
    page.locator(ready.format("large.png", "saliency")).wait_for()

    # Labels are text, and a map of another label is computed.
    page.get_by_role("combobox", name="Label").select_option("1")
    page.locator("canvas[aria-label*='for <img src=x']").first.wait_for()
    for name in ("PNG", "SVG", "PDF", "maps"):
        page.get_by_role("button", name=f"Save {name}").click()
        page.get_by_text(re.compile(r"Written: .*\.(png|svg|pdf|npz)")).wait_for()
    wanted = {".png", ".svg", ".pdf", ".npz"}
    for _ in range(300):
        if {path.suffix for path in (folder / "exports").glob("*.*")} >= wanted:
            break
        time.sleep(0.1)
    (maps,) = (folder / "exports").glob("*.npz")
    with np.load(maps, allow_pickle=False) as held:
        assert held["maps"].shape == (2, 64, 64)
        assert held["names"].tolist() == ["net: layercam", "net: saliency"]
    assert page.locator("img[src='x']").count() == 0
    assert page.title() != "owned"
    context.close()
    assert hosts <= {"127.0.0.1", None, ""}
    assert complaints == []
    assert {path.suffix for path in Path(folder, "exports").iterdir()} == wanted
