"Markers, one thread for torch, and no settings of Accelerate handed on between test files."
import os
import sys

import pytest

# Two spinning threads on a busy machine are slower than one.
os.environ.setdefault("OMP_NUM_THREADS", "1")

MARKERS = {"slow": "takes minutes", "gpu": "needs an accelerator"}


def pytest_configure(config):
    for name, why in MARKERS.items():
        config.addinivalue_line("markers", f"{name}: {why}; runs only with -m {name}")
    if not config.option.markexpr: config.option.markexpr = "not slow and not gpu"


@pytest.fixture(scope="module", autouse=True)
def forget_accelerator():
    "Accelerate keeps one state per process and refuses another precision while it lasts."
    yield
    if "accelerate" in sys.modules:
        from accelerate.state import AcceleratorState
        AcceleratorState._reset_state(reset_partial_state=True)
