"""The commands `cxrkit data …` as a user runs them."""

from __future__ import annotations

import hashlib
import http.server
import sys
import threading

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from cxrkit import cli

CONTENT = b"images"


@pytest.fixture
def root(tmp_path):
    (tmp_path / "set").mkdir()
    for k in range(3):
        noise = np.random.default_rng(k).integers(0, 256, (40, 48), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / "set" / f"{k}.png")
    rows = "".join(f"i{k},{k}.png,p{k},A,48,40\n" for k in range(3))
    (tmp_path / "set" / "images.csv").write_text("image_id,file,patient_id,labels,width,height\n" + rows)
    return tmp_path / "set"


@pytest.fixture
def run(monkeypatch, capfd, tmp_path):
    """Run a command; returns its exit status and what it printed."""
    monkeypatch.setenv("CXRKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cli.console, "width", 300)

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["cxrkit", "data", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out = capfd.readouterr()
        assert "Traceback" not in out.err + out.out
        return ended.value.code or 0, out.out

    return call


def test_list(run, root):
    status, out = run("list")
    assert status == 0
    for word in ("phantom", "nothing to get", "folder", "by hand", "NIH ChestX-ray14"):
        assert word in out
    run("prepare", "folder", "--root", root, "--size", 32, "--workers", 0)
    row = next(line for line in run("list")[1].splitlines() if line.startswith("folder"))
    assert row.split()[-1] == "32"


def test_describe(run, root, monkeypatch):
    status, out = run("describe", "phantom", "--option", "images=7")
    assert status == 0
    assert "Synthetic" in out
    assert "7 images of" in out
    assert "counted" in run("describe", "folder")[1]
    from cxrkit import data

    cards = data.sources()
    cards["folder"]["counts"] = {"images": 3000}
    monkeypatch.setattr(data, "sources", lambda: cards)
    out = run("describe", "folder", "--root", root)[1]
    assert ["images", "3", "3000"] in [line.split() for line in out.splitlines()]


def test_notices_are_printed(run, root):
    (root / "boxes.csv").write_text("image_id,label,x_min,y_min,x_max,y_max\ni0,a,1,2,9,9\ni1,B,1,2,9,9\n")
    words = "notice: boxes.csv: 2 of 2 boxes make no mask, as no image carries their label: 'a' (1; images.csv has 'A')"
    status, out = run("check", "folder", "--root", root)
    assert status == 1
    assert words in out
    assert "1 problems: 1 notice" in out
    assert run("check", "folder", "--root", root, "--ignore", "notice")[0] == 0
    out = run("describe", "folder", "--root", root)[1]
    assert words in out
    assert ["boxes", "without", "mask", "2"] in [line.split() for line in out.splitlines()]
    out = run("describe", "folder", "--root", root, "--option", "labels=[A]")[1]
    assert "notice: labels= leaves 2 of 2 boxes without a mask" in out
    assert run("describe", "folder", "--root", root, "--option", "label_map={a: A, B: A}")[1].count("notice") == 0
    for option, words in (("label_map={c: A}", "occur neither"), ("hierarchy_separator=None", "write null")):
        status, out = run("check", "folder", "--root", root, "--option", option)
        assert words in out
        assert status == 2


def test_check(run, root, tmp_path):
    assert run("check", "folder", "--root", root) == (0, "no problem found\n")
    (root / "1.png").write_bytes(b"")
    Image.new("L", (4, 4)).save(root / "extra.png")
    status, out = run("check", "folder", "--root", root)
    assert status == 1
    assert "image: the file is empty (0 bytes)" in out
    assert "unexpected" in out
    assert "2 problems: 1 image, 1 unexpected" in out
    assert run("check", "folder", "--root", root, "--ignore", "unexpected", "--ignore", "image")[0] == 0
    status, out = run("check", "folder", "--root", root, "--format", "csv")
    assert out.splitlines()[0] == "kind,file,line,problem,value"
    assert run("check", "folder", "--root", root, "--format", "csv", "--to", tmp_path / "found.csv")[0] == 1
    assert pd.read_csv(tmp_path / "found.csv")["kind"].tolist() == ["image", "unexpected"]
    (root / "images.csv").write_text((root / "images.csv").read_text() + "i3,3.png,p3,A,48,40\n" * 2)
    out = run("check", "folder", "--root", root)[1]
    assert "file does not exist" in out
    assert "images.csv, line 5: '3.png'" in out


def test_prepare(run, root, tmp_path):
    status, out = run("prepare", "folder", "--root", root, "--size", 32, "--workers", 0)
    assert status == 0
    assert "3 images at 32 x 32, 8 bits" in out
    assert "3 drawn now" in out
    assert len(list((tmp_path / "cache").glob("folder-32-*[!s].npy"))) == 1
    assert "0 drawn now" in run("prepare", "folder", "--root", root, "--size", 32)[1]
    (root / "1.png").write_bytes(b"")
    status, out = run("prepare", "folder", "--root", root, "--size", 32, "--cache", tmp_path / "here", "--bits", 16)
    assert status == 1
    assert "i1: folder, image 'i1'" in out
    assert "1 images can't be read" in out
    assert len(list((tmp_path / "here").glob("*.npy"))) == 1


def test_get(run, tmp_path, monkeypatch):
    from cxrkit import data

    status, out = run("get", "folder", "--to", tmp_path / "to")
    assert status == 0
    assert "Nothing of it can be downloaded" in out
    assert "2. Write images.csv beside them" in out

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Length", str(len(CONTENT)))
            self.end_headers()
            self.wfile.write(CONTENT)

        def log_message(self, *_):
            pass

    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/a.zip"
        cards = data.sources()
        cards["folder"]["files"] = [{"path": "a.zip", "url": url, "md5": hashlib.md5(CONTENT).hexdigest()}]
        monkeypatch.setattr("cxrkit.data.download.sources", lambda: cards)
        monkeypatch.setattr(data, "sources", lambda: cards)
        status, out = run("get", "folder", "--to", tmp_path / "to")
        server.shutdown()
    assert status == 0
    assert "a.zip: here, its checksum is right" in out
    assert (tmp_path / "to" / "a.zip").read_bytes() == CONTENT
    assert "cxrkit data get" in run("list")[1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["describe", "fodler"], "source 'fodler' is unknown"),
        (["check", "fodler"], "source 'fodler' is unknown"),
        (["check", "folder"], "needs root="),
        (["check", "folder", "--ignore", "x"], "--ignore ['x']: unknown; the kinds are ['table'"),
        (["check", "folder", "--format", "xml"], "--format 'xml' is unknown"),
        (["prepare", "folder", "--root", "x", "--option", "labels"], "--option 'labels': give NAME=VALUE"),
        (["prepare", "folder", "--root", "x", "--option", "labels=["], "--option 'labels=[': not YAML"),
        (["prepare", "folder", "--root", "x", "--option", "label=[A]"], "did you mean 'labels'?"),
        (["prepare", "phantom", "--bits", "7"], "bits=7"),
        (["get", "fodler"], "'fodler' is unknown"),
    ],
)
def test_refusals(run, words, message):
    status, out = run(*words)
    assert status == 2
    assert message in out


def test_a_folder_that_is_not_there(run, tmp_path):
    status, out = run("check", "folder", "--root", tmp_path / "none")
    assert status == 1
    assert "no such folder" in out
