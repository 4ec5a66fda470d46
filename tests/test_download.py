"""Downloads from a server on this machine: right, wrong, missing, interrupted, and manifests that can't be right."""

from __future__ import annotations

import hashlib
import http.server
import threading
from pathlib import Path

import numpy as np
import pytest

from cxrkit.data.download import Entry, entries, fetch, get
from cxrkit.data.sources import SOURCES
from cxrkit.errors import DataError, ParameterError

CONTENT = np.random.default_rng(0).bytes(300_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()
MD5 = hashlib.md5(CONTENT).hexdigest()


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves CONTENT under every name but /missing; /broken hangs up halfway, once."""

    def do_GET(self):
        server = self.server
        server.asked.append(self.path)
        if self.path == "/missing":
            return self.send_error(404)
        self.send_response(200)
        self.send_header("Content-Length", str(len(CONTENT)))
        self.end_headers()
        if self.path == "/broken" and not server.broken:
            server.broken = True
            self.wfile.write(CONTENT[: len(CONTENT) // 2])
            self.wfile.flush()
            self.connection.close()
            return None
        self.wfile.write(CONTENT)
        return None

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    running = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    running.asked, running.broken = [], False
    running.url = f"http://127.0.0.1:{running.server_port}"
    running.handle_error = lambda *_: None
    thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield running
    running.shutdown()
    running.server_close()
    thread.join()


def entry(url, **changes):
    given = {"path": "set.zip", "url": url, "bytes": len(CONTENT)} | (changes or {"sha256": SHA256})
    return Entry(**given)


@pytest.mark.parametrize(("algorithm", "checksum"), [("sha256", SHA256), ("md5", MD5)])
def test_success(server, tmp_path, algorithm, checksum):
    wanted = entry(f"{server.url}/a", path="below/set.zip", **{algorithm: checksum})
    path = fetch(wanted, tmp_path, progress=False)
    assert path == tmp_path / "below" / "set.zip"
    assert path.read_bytes() == CONTENT
    assert [file.name for file in path.parent.iterdir()] == ["set.zip"]
    # What is there with the right checksum is not asked for again.
    fetch(wanted, tmp_path, progress=False)
    assert len(server.asked) == 1


def test_wrong_checksum(server, tmp_path):
    with pytest.raises(DataError, match=r"/a: the file that came differs from the published sha256; nothing was kept"):
        fetch(entry(f"{server.url}/a", sha256="0" * 64), tmp_path, progress=False)
    assert not list(tmp_path.iterdir())


def test_another_file_of_that_name_is_kept(server, tmp_path):
    (tmp_path / "set.zip").write_text("mine")
    with pytest.raises(DataError, match=r"set\.zip: is there, but its sha256 differs"):
        fetch(entry(f"{server.url}/a"), tmp_path, progress=False)
    assert (tmp_path / "set.zip").read_text() == "mine"
    assert not server.asked


def test_interrupted(server, tmp_path):
    wanted = entry(f"{server.url}/broken")
    with pytest.raises(DataError, match="the connection broke"):
        fetch(wanted, tmp_path, progress=False)
    assert not list(tmp_path.iterdir())
    assert fetch(wanted, tmp_path, progress=False).read_bytes() == CONTENT


def test_what_is_not_there(server, tmp_path):
    with pytest.raises(DataError, match="/missing: the server answers 404 Not Found"):
        fetch(entry(f"{server.url}/missing"), tmp_path, progress=False)
    assert not list(tmp_path.iterdir())


def test_no_network(server, tmp_path):
    url = server.url
    server.shutdown()
    server.server_close()
    with pytest.raises(DataError, match="can't be reached"):
        fetch(entry(f"{url}/a"), tmp_path, progress=False)
    assert not list(tmp_path.iterdir())


def test_folder_that_cannot_be_written(server, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pooch.retrieve", full)
    with pytest.raises(DataError, match=r"set\.zip: can't be written \(No space left"):
        fetch(entry(f"{server.url}/a"), tmp_path, progress=False)


def test_get(server, tmp_path, monkeypatch):
    files = [
        {"path": "set.zip", "url": f"{server.url}/a", "sha256": SHA256.upper(), "bytes": len(CONTENT)},
        {"path": "images/*.png", "what": "the images"},
    ]
    monkeypatch.setattr("cxrkit.data.download.sources", lambda: {"folder": {"files": files}})
    assert get("folder", tmp_path, progress=False) == [tmp_path / "set.zip"]
    monkeypatch.undo()
    assert get("folder", tmp_path) == []
    with pytest.raises(ParameterError, match="'fodler' is unknown"):
        get("fodler", tmp_path)


# Manifests


def test_entries():
    assert entries("x", {}) == []
    assert entries("x", {"files": [{"path": "a", "what": "labels"}]}) == [Entry(path="a", what="labels")]
    assert Entry(path="images/*.png").covers(Path("set/images/1.png"))
    assert Entry(path="**/*.mat").covers(Path("set/1.mat"))
    assert not Entry(path="images/*.png").covers(Path("masks/1.png"))


@pytest.mark.parametrize(
    ("item", "words"),
    [
        ({"what": "no path"}, "path Field required"),
        ({"path": "../a"}, "leaves the folder"),
        ({"path": "/a"}, "leaves the folder"),
        ({"path": "a", "url": "http://x/a"}, "with sha256 or md5"),
        ({"path": "a*", "url": "http://x/a", "md5": MD5}, "must be one file"),
        ({"path": "a", "url": "ftp://x/a", "md5": MD5}, "url String should match"),
        ({"path": "a", "md5": "123"}, "md5 String should match"),
        ({"path": "a", "sha256": MD5}, "sha256 String should match"),
        ({"path": "a", "bytes": 0}, "bytes Input should be greater than 0"),
        ({"path": "a", "bytes": "7"}, "bytes Input should be a valid integer"),
        (7, "should be a valid dictionary"),
    ],
)
def test_entries_that_cannot_be_right(item, words):
    with pytest.raises(DataError, match=f"manifest of x, files, .*{words}"):
        entries("x", {"files": [item]})


@pytest.mark.parametrize("name", list(SOURCES))
def test_manifests_as_they_are(name):
    from cxrkit.data import sources

    card = sources()[name]
    entries(name, card)
    counts = card.get("counts") or {}
    assert isinstance(counts, dict)
    for key in ("images", "patients", "boxes", "boxed_images"):
        assert isinstance(counts.get(key, 0), int)
