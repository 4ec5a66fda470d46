"""nbval runs these notebooks; what it leaves out is checked by `tests/notebook_outputs.py`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from notebook_outputs import (  # noqa: F401
    pytest_addoption,
    pytest_make_collect_report,
    pytest_runtest_call,
)
