"Markers, and one thread for torch: two spinning threads on a busy machine are slower than one."
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

MARKERS = {"slow": "takes minutes", "gpu": "needs an accelerator"}


def pytest_configure(config):
    for name, why in MARKERS.items():
        config.addinivalue_line("markers", f"{name}: {why}; runs only with -m {name}")
    if not config.option.markexpr: config.option.markexpr = "not slow and not gpu"
