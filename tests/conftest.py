"""What several test files share."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import pytest

import cxrkit  # noqa: F401  before anything brings in torchvision: it lets that import on a CPU-only torch

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
# Files that take long begin, so that no process is left alone with one of them at the end. The book comes first of all:
# its build runs the grid whose runs the others find.
FIRST = ("test_book.py", "test_grid_dask.py", "test_viewer_browser.py", "test_method_support.py", "test_training.py")
CHROMIUM_FLAGS = (
    "--disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
)


def pytest_configure(config):
    """Runs made by tests and by notebooks under test go to a folder of their own, not among a reader's results."""
    if "CXRKIT_RESULTS" not in os.environ:
        folder = tempfile.mkdtemp(prefix="cxrkit-")
        os.environ["CXRKIT_RESULTS"] = folder
        config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))


def pytest_collection_modifyitems(items):
    rank = {name: place for place, name in enumerate(FIRST)}
    items.sort(key=lambda item: rank.get(item.path.name, len(FIRST)))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real radiographs kept beside the project; tests that need it are skipped where it is missing."""
    if not SHARED.is_dir():
        pytest.skip("the real radiographs beside the project are not there")
    return SHARED


@pytest.fixture(scope="session")
def browser():
    """Headless Chromium as the system has it; without one the browser tests are skipped, except in CI, where they
    fail."""
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None:
        message = "there is no Chromium here; install the package 'chromium' to run the browser tests"
        (pytest.fail if os.environ.get("CI") else pytest.skip)(message)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=path, args=CHROMIUM_FLAGS.split(), chromium_sandbox=os.geteuid() != 0
        )
        yield browser
        browser.close()


@pytest.fixture(autouse=True)
def _seeded():
    import torch

    torch.manual_seed(0)
