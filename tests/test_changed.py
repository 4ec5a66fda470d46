"""Which tests `make check` runs after a change."""

from __future__ import annotations

import changed


def test_a_change_concerns_the_tests_that_use_the_module():
    found = changed.concerned({"cxrkit/metrics/pointing.py", "tests/test_splits.py", "README.md"})
    assert {"tests/test_metrics.py", "tests/test_splits.py"} <= set(found)
    assert "tests/test_grid_run.py" not in found


def test_a_module_that_is_loaded_by_name_concerns_the_tests_of_its_package():
    assert "tests/test_attribution_cam.py" in changed.concerned({"cxrkit/attribution/cam.py"})
    assert changed.concerned({"book/index.md"}) == []
