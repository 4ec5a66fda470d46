"""The pixel cache: the same images as without it, made once, kept whole whatever interrupts the making."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import resource
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

import cxrkit
from cxrkit.data import cache as caching
from cxrkit.data import collate, parallel
from cxrkit.data.dataset import BOX_COLUMNS, Dataset, Rendered
from cxrkit.data.sources import SOURCES, Source
from cxrkit.errors import DataError, ParameterError

SIZE = 32
FORK = multiprocessing.get_context("fork") if sys.platform == "linux" else None


def write_folder(root: Path, n: int, start: int = 0) -> Path:
    """A folder source of ``n`` images of 48 x 40 pixels with noise of their own."""
    (root / "x").mkdir(parents=True, exist_ok=True)
    for k in range(start, n):
        noise = np.random.default_rng(k).integers(0, 256, (40, 48), dtype=np.uint8)
        Image.fromarray(noise).save(root / "x" / f"{k}.png")
    rows = "".join(f"i{k},x/{k}.png,p{k},{'A' if k % 2 else ''},48,40\n" for k in range(n))
    (root / "images.csv").write_text("image_id,file,patient_id,labels,width,height\n" + rows)
    boxes = "".join(f"i{k},A,4,4,30,20\n" for k in range(1, n, 2))
    (root / "boxes.csv").write_text("image_id,label,x_min,y_min,x_max,y_max\n" + boxes)
    return root


@pytest.fixture
def root(tmp_path):
    return write_folder(tmp_path / "set", 20)


@pytest.fixture
def prepare(root, tmp_path):
    """Prepare the folder quietly, in this process unless ``workers`` is given."""

    def call(name="folder", where=root, **options):
        given = {"size": SIZE, "workers": 0, "progress": False, "cache": tmp_path / "cache"}
        return cxrkit.data.prepare(name, where, **{**given, **options})

    return call


def load(root, tmp_path, **options):
    return cxrkit.data.load("folder", root, size=SIZE, cache=tmp_path / "cache", **options)


def same(plain, kept, bits=8):
    for one, other in zip(plain, kept, strict=True):
        torch.testing.assert_close(one.image, other.image, atol=0.501 / (2**bits - 1), rtol=0)
        assert other.image.dtype == torch.float32
        assert (one.image_id, one.patient_id) == (other.image_id, other.patient_id)
        assert torch.equal(one.mask, other.mask)
        torch.testing.assert_close(one.target, other.target, equal_nan=True)
        for name in ("truth", "shortcut"):
            a, b = getattr(one, name), getattr(other, name)
            assert (a is None and b is None) or torch.equal(a, b)


# The same images


@pytest.mark.parametrize("bits", [8, 16])
def test_images_are_those_without_cache(root, tmp_path, prepare, bits):
    done = prepare(bits=bits)
    assert (done.images, done.drawn, done.problems) == (20, 20, {})
    kept = load(root, tmp_path, cache_bits=bits)
    assert isinstance(kept.renderer, caching.CachedRenderer)
    same(cxrkit.data.load("folder", root, size=SIZE), kept, bits)
    for split in ("train", "test"):
        same(
            cxrkit.data.load("folder", root, split, size=SIZE), load(root, tmp_path, split=split, cache_bits=bits), bits
        )
    assert len(list((tmp_path / "cache").glob("*-????????????????.npy"))) == 1


def test_masks_of_the_phantom_are_kept_exactly(tmp_path):
    options = {"images": 12, "marker": {"rate": 0.5}, "size": SIZE}
    plain = cxrkit.data.load("phantom", **options)
    kept = cxrkit.data.load("phantom", cache=tmp_path, **options)
    same(plain, kept)
    assert any(sample.shortcut.any() for sample in kept)
    # Other labels are other masks; fewer images are not.
    assert len(cxrkit.data.load("phantom", cache=tmp_path, **{**options, "images": 5})) == 5
    assert len(list(tmp_path.glob("*-????????????????.npy"))) == 1
    cxrkit.data.load("phantom", cache=tmp_path, view="binary", **options)
    assert len(list(tmp_path.glob("*-????????????????.npy"))) == 2


def test_loading_makes_what_is_missing(root, tmp_path):
    same(cxrkit.data.load("folder", root, size=SIZE), load(root, tmp_path))
    assert not [path for path in root.rglob("*") if path.suffix in (".npy", ".jsonl", ".lock")]
    assert {path.suffix for path in (tmp_path / "cache").iterdir()} <= {".npy", ".jsonl", ".lock"}


def test_drawn_once_and_never_again(root, tmp_path, prepare, monkeypatch):
    prepare()
    monkeypatch.setattr("cxrkit.data.files.FileRenderer.render", lambda *_: pytest.fail("drawn again"))
    assert prepare().drawn == 0
    assert len(list(load(root, tmp_path))) == 20


class Unsized:
    """Draws a grey square; only drawing tells the size of the original. Image 1 has exact masks, 2 is spoilt."""

    def render(self, row, size):
        image = torch.full((size, size), row / 10)
        if row == 2:
            image[0, 0] = 1.5
        truth = torch.ones(1, size, size, dtype=torch.bool)
        return Rendered(image, truth if row < 2 else None, frame=(100 + row, 50))


def load_unsized(*, size=224, seed=0, factor=None):
    table = pd.DataFrame({"image_id": ["ä", "b", "c"], "patient_id": ["1", "2", "3"], "path": "", "A": [0, 1, 0]})
    boxes = pd.DataFrame([("b", "A", 0, 0, 50, 50, "r")], columns=list(BOX_COLUMNS))
    return Dataset("unsized", ["A"], table, boxes, Unsized(), size, frames=np.full((3, 2), np.nan))


@pytest.fixture
def unsized(monkeypatch):
    monkeypatch.setitem(SOURCES, "unsized", Source(__name__, "load_unsized", False))


def test_sizes_that_only_drawing_tells(unsized, tmp_path, prepare):
    done = prepare("unsized", None)
    assert list(done.problems) == ["c"]
    assert "outside [0, 1]" in done.problems["c"]
    kept = cxrkit.data.load("unsized", size=SIZE, cache=tmp_path / "cache")
    assert kept[0].image_id == "ä"
    assert torch.equal(kept[1].mask, load_unsized(size=SIZE)[1].mask)
    assert kept[1].truth.all()
    # What can't be kept is drawn each time.
    assert kept[2].truth is None
    assert kept[2].image.max() == 1.5


# Which file


def test_key(root, tmp_path, prepare):
    first = prepare().path
    assert prepare(labels=["A"]).path == first
    others = [prepare(size=64), prepare(bits=16), prepare(preprocessing="bcos/rsna"), prepare(hierarchy_separator=None)]
    assert [path == first for path in (done.path for done in others)] == [False, False, False, True]
    other = write_folder(tmp_path / "other", 20)
    assert prepare(where=other).path != first
    assert caching.prepared("folder", tmp_path / "cache")[0][0] == SIZE
    assert {size for size, _ in caching.prepared("folder", tmp_path / "cache")} == {SIZE, 64}
    assert caching.prepared("nih", tmp_path / "cache") == []


def test_key_follows_the_code_that_reads(prepare, monkeypatch, tmp_path):
    first = prepare().path
    changed = tmp_path / "readers.py"
    changed.write_text(Path(cxrkit.data.readers.__file__).read_text() + "\n")
    monkeypatch.setattr(cxrkit.data.readers.__spec__, "origin", str(changed))
    assert prepare().path != first


def test_seed_counts_only_where_images_are_drawn_from_it(prepare):
    assert prepare(seed=1).path == prepare(seed=0).path
    assert prepare("phantom", None, seed=1, images=2).path != prepare("phantom", None, seed=0, images=2).path


def test_parameters_are_refused(prepare, unsized):
    with pytest.raises(ParameterError, match="bits=12"):
        prepare(bits=12)
    with pytest.raises(ParameterError, match="no lasting name"):
        prepare("unsized", None, factor=object())
    with pytest.raises(ParameterError, match="'label' is unknown"):
        prepare(label=1)


def test_folder_of_caches(monkeypatch, tmp_path):
    monkeypatch.setenv("CXRKIT_CACHE", str(tmp_path))
    assert caching.cache_folder() == tmp_path
    assert caching.cache_folder("x") == Path("x")
    monkeypatch.delenv("CXRKIT_CACHE")
    assert "cxrkit" in str(caching.cache_folder())
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="can't be made"):
        cxrkit.data.prepare("phantom", images=1, size=SIZE, cache=tmp_path / "file" / "below")


# Images that change, fail or come later


def test_a_file_that_changes_is_drawn_anew(root, tmp_path, prepare):
    prepare()
    before = (root / "x" / "3.png").stat()
    time.sleep(0.02)
    Image.new("L", (48, 40), 255).save(root / "x" / "3.png")
    os.utime(root / "x" / "3.png", ns=(before.st_atime_ns, before.st_mtime_ns))
    os.rename(root / "x" / "4.png", root / "x" / "new")
    os.rename(root / "x" / "5.png", root / "x" / "4.png")
    os.rename(root / "x" / "new", root / "x" / "5.png")
    for _ in range(2):
        assert load(root, tmp_path)[3].image.min() == 1
        same(cxrkit.data.load("folder", root, size=SIZE), load(root, tmp_path))
        assert prepare().drawn in (3, 0)
    assert prepare().drawn == 0


def test_images_that_cannot_be_drawn_are_told_and_tried_again(root, tmp_path, prepare):
    good = (root / "x" / "3.png").read_bytes()
    (root / "x" / "3.png").write_bytes(good[:60])
    done = prepare()
    assert done.drawn == 19
    assert list(done.problems) == ["i3"]
    assert "3.png" in done.problems["i3"]
    kept = load(root, tmp_path)
    assert kept[2].image.any()
    with pytest.raises(DataError, match=r"'i3'.*3\.png.*truncated or damaged"):
        kept[3]
    (root / "x" / "3.png").write_bytes(good)
    assert prepare().drawn == 1
    assert load(root, tmp_path)[3].image.any()


def test_more_images_come_later(root, tmp_path, prepare):
    prepare()
    write_folder(root, 26, start=20)
    assert prepare().drawn == 6
    same(cxrkit.data.load("folder", root, size=SIZE), load(root, tmp_path))
    write_folder(root, 8, start=8)
    assert prepare().drawn == 0
    assert len(records(prepare().path)) == 26
    same(cxrkit.data.load("folder", root, size=SIZE), load(root, tmp_path))


# Damage


def records(path: Path) -> list[dict]:
    lines = path.with_suffix(".jsonl").read_text().splitlines()[1:]
    return [json.loads(line) for line in lines if line]


def test_anyone_reads_the_pixels(root, prepare):
    path = prepare().path
    record = records(path)[0]
    assert [record[name] for name in ("image_id", "width", "height")] == ["i0", 48, 40]
    first = cxrkit.data.load("folder", root, size=SIZE)[0].image[0]
    np.testing.assert_allclose(np.load(path)[record["row"]] / 255, first, atol=0.501 / 255)


def test_a_damaged_image_is_refused_and_repaired(root, tmp_path, prepare):
    path = prepare().path
    np.load(path, mmap_mode="r+")[records(path)[5]["row"]] = 0
    kept = load(root, tmp_path)
    assert kept[4].image.any()
    with pytest.raises(DataError, match=r"'i5'.*\.npy: the cached image is damaged; cxrkit\.data\.prepare"):
        kept[5]
    assert prepare().drawn == 1
    same(cxrkit.data.load("folder", root, size=SIZE), load(root, tmp_path))


@pytest.mark.parametrize("damage", ["truncated", "zeros", "missing", "no index"])
def test_a_damaged_cache_is_made_anew(root, tmp_path, prepare, damage):
    path = prepare().path
    if damage == "truncated":
        os.truncate(path, 8192)
    elif damage == "zeros":
        path.write_bytes(path.read_bytes()[:128] + bytes(path.stat().st_size - 128))
    else:
        (path if damage == "missing" else path.with_suffix(".jsonl")).unlink()
    if damage != "zeros":
        assert caching.prepared("folder", tmp_path / "cache") == []
    assert prepare().drawn == 20
    same(cxrkit.data.load("folder", root, size=SIZE), load(root, tmp_path))


@pytest.mark.parametrize("suffix", [".npy", ".jsonl"])
def test_a_foreign_file_is_left_alone(root, tmp_path, prepare, suffix):
    foreign = prepare().path.with_suffix(suffix)
    foreign.write_bytes(b"something else")
    for call in (prepare, lambda: load(root, tmp_path)):
        with pytest.raises(DataError, match=rf"{foreign.name}: is no cache of cxrkit; move it away"):
            call()
    assert foreign.read_bytes() == b"something else"


def test_half_a_line_of_the_index_is_an_image_to_draw(tmp_path, prepare):
    index = prepare().path.with_suffix(".jsonl")
    os.truncate(index, index.stat().st_size - 9)
    assert caching.prepared("folder", tmp_path / "cache") == []
    assert prepare().drawn == 1
    assert prepare().drawn == 0
    assert len(caching.prepared("folder", tmp_path / "cache")) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="limits the length of files")
@pytest.mark.parametrize("longest", [10_000, 18_000])
def test_full_disk(root, tmp_path, prepare, longest):
    def limited(told):
        resource.setrlimit(resource.RLIMIT_FSIZE, (longest, longest))
        try:
            told.put(str(prepare()))
        except DataError as error:
            told.put(str(error))

    told = FORK.Queue()
    process = FORK.Process(target=limited, args=(told,))
    process.start()
    assert "npy: the cache can't be" in told.get(timeout=60)
    process.join()
    assert caching.prepared("folder", tmp_path / "cache") == []
    assert 0 < prepare().drawn <= 20
    same(cxrkit.data.load("folder", root, size=SIZE), load(root, tmp_path))


# Other processes


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_workers_of_a_loader_share_the_cache(root, tmp_path, prepare, context):
    prepare()
    kept = load(root, tmp_path)
    assert len(pickle.dumps(kept.renderer.held)) < 500
    options = {"batch_size": 6, "num_workers": 1, "collate_fn": collate, "multiprocessing_context": context}
    images = torch.cat([batch.images for batch in torch.utils.data.DataLoader(kept, **options)])
    assert torch.equal(images, kept.batch(range(20)).images)
    before = kept[0].image.clone()
    kept[0].image.zero_()
    assert torch.equal(kept[0].image, before)


def slowly(log, root, cache, pause, drawn):
    """Prepare with a note of every image that is begun, slowly enough to be killed halfway."""
    from cxrkit.data.files import FileRenderer

    render = FileRenderer.render

    def noted(self, row, size):
        with log.open("a") as file:
            file.write(f"{row}\n")
        time.sleep(pause)
        return render(self, row, size)

    FileRenderer.render = noted
    drawn.put(cxrkit.data.prepare("folder", root, size=SIZE, cache=cache, workers=2, progress=False).drawn)


def start(tmp_path, root, pause, drawn):
    process = FORK.Process(target=slowly, args=(tmp_path / "log", root, tmp_path / "cache", pause, drawn))
    process.start()
    return process


def lasts(read, seconds):
    before = read()
    time.sleep(seconds)
    return read() == before


def until(what, seconds=60):
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.skipif(sys.platform != "linux", reason="forks and kills by signal")
def test_killed_two_go_on_and_draw_nothing_twice(tmp_path):
    root, log, drawn = write_folder(tmp_path / "set", 60), tmp_path / "log", FORK.Queue()
    log.touch()
    process = start(tmp_path, root, 0.02, drawn)
    until(lambda: len(log.read_text().split()) >= 20)
    process.kill()
    process.join()
    path = next((tmp_path / "cache").glob("*.npy"))
    assert caching.prepared("folder", tmp_path / "cache") == []
    # The workers end with their parent: soon nothing is begun any more.
    until(lambda: lasts(log.read_text, 0.2))
    begun = Counter(log.read_text().split())
    finished = [int(record["image_id"][1:]) for record in records(path)]
    assert 10 <= len(finished) < 60
    # Two go on at once: one draws what is left, the other waits for it.
    processes = [start(tmp_path, root, 0, drawn) for _ in range(2)]
    assert sorted(drawn.get(timeout=60) for _ in processes) == [0, 60 - len(finished)]
    for process in processes:
        process.join()
    twice = Counter(log.read_text().split()) - Counter(map(str, range(60)))
    # Only what was under way when the parent was killed is begun again.
    assert len(twice) == sum(begun.values()) - len(finished) <= 6
    assert not set(twice) & set(map(str, finished))
    same(cxrkit.data.load("folder", root, size=SIZE), load(root, tmp_path))


def test_spread():
    assert dict(parallel.spread(square, range(50), 2)) == {k: k * k for k in range(50)}
    assert dict(parallel.spread(square, range(50), 0)) == {k: k * k for k in range(50)}
    assert list(parallel.spread(square, [3], 2)) == [(3, 9)]
    assert list(parallel.spread(square, [], 2)) == []
    with pytest.raises(DataError, match="at 7"):
        list(parallel.spread(stumble, range(50), 2))


def test_a_row_that_kills_its_process_is_named():
    results = dict(parallel.spread(crash, range(40), 2))
    assert sorted(results) == list(range(40))
    assert {row for row, result in results.items() if result == parallel.CRASHED} == {11, 23}
    assert results[12] == 12


def square(row):
    return row * row


def stumble(row):
    if row == 7:
        raise DataError("at 7")
    return row


def crash(row):
    if row in (11, 23):
        os._exit(9)
    return row


def test_an_image_that_kills_its_process_is_told(root, tmp_path, prepare, monkeypatch):
    from cxrkit.data.files import FileRenderer

    render, here = FileRenderer.render, os.getpid()

    def deadly(self, row, size):
        if row == 4 and os.getpid() != here:
            os._exit(9)
        return render(self, row, size)

    monkeypatch.setattr(FileRenderer, "render", deadly)
    done = prepare(workers=2)
    assert list(done.problems) == ["i4"]
    assert "process that read it died" in done.problems["i4"]
    assert done.drawn == 19
    monkeypatch.undo()
    assert prepare().drawn == 1
