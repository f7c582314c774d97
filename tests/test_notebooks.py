"The notebooks: they run, they are clean, the modules are what they export."
import os
import shutil
import subprocess
import sys
import time
import warnings
from configparser import ConfigParser
from pathlib import Path

import nbformat
import pytest
import torch
import yaml

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT / "nbs"
NOTEBOOKS = sorted(path for path in NBS.rglob("*.ipynb") if ".ipynb_checkpoints" not in path.parts)
AIM, LIMIT = 60, 120  # seconds of one core for a notebook: counted so, a busy machine is no excuse

each_notebook = pytest.mark.parametrize(
    "path", NOTEBOOKS, ids=[path.relative_to(NBS).as_posix() for path in NOTEBOOKS])


def settings():
    parser = ConfigParser(delimiters=["="])
    parser.read(ROOT / "settings.ini", encoding="utf-8")
    return parser["DEFAULT"]


def code_cells(path):
    return [c for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code"]


def directives(cell):
    lines = [line[2:] for line in cell.source.splitlines() if line.startswith("#|") and ":" in line]
    return yaml.safe_load("\n".join(line.strip() for line in lines)) or {}


def torch_state():
    return (torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_num_threads(),
            torch.are_deterministic_algorithms_enabled())


def copy_project(folder):
    "What nbdev works on, in a folder of its own."
    shutil.copy(ROOT / "settings.ini", folder)
    skip = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints")
    for name in ("nbs", "memformers"): shutil.copytree(ROOT / name, folder / name, ignore=skip)
    return folder


@each_notebook
def test_notebook_runs(path, monkeypatch):
    "In a shell of its own but in this process: it must leave torch as it found it."
    from nbdev.test import test_nb
    monkeypatch.syspath_prepend(ROOT)
    monkeypatch.setenv("IN_TEST", "1")  # nbdev sets it for good; with it, nothing is exported
    before, start = torch_state(), time.process_time()
    passed, _ = test_nb(path, skip_flags=settings()["tst_flags"].split())
    seconds = time.process_time() - start
    import matplotlib.pyplot as plt
    plt.close("all")
    assert passed, f"{path.name} raised: see above"
    assert torch_state() == before, f"{path.name} changed a global setting of torch"
    assert seconds <= LIMIT, f"{path.name} took {seconds:.0f} s of one core"
    if seconds > AIM: warnings.warn(f"{path.name} took {seconds:.0f} s of one core, over {AIM} s")


def test_tutorial_runs_in_a_real_kernel():
    from nbclient import NotebookClient
    path = NBS / "tutorials" / "01_first_memory.ipynb"
    notebook = nbformat.read(path, as_version=4)
    resources = {"metadata": {"path": str(path.parent)}}
    NotebookClient(notebook, timeout=LIMIT, kernel_name="python3", resources=resources).execute()


@each_notebook
def test_notebook_is_committed_executed_without_counts_and_errors(path):
    for cell in code_cells(path):
        assert cell.execution_count is None, cell.source
        assert not [o for o in cell.outputs if o.output_type == "error"], cell.source
        picture = any(kind.startswith("image/") for o in cell.outputs for kind in o.get("data", {}))
        described = {"fig-cap", "fig-alt"} & set(directives(cell))
        if picture: assert len(described) == 2, f"no fig-cap or no fig-alt:\n{cell.source}"
        if described: assert picture, f"described but not drawn; not executed?\n{cell.source}"


def test_notebooks_are_clean(tmp_path):
    copy = copy_project(tmp_path)
    code = "from nbdev.clean import nbdev_clean; nbdev_clean()"
    subprocess.run([sys.executable, "-c", code], cwd=copy, check=True)
    unclean = [path.name for path in NOTEBOOKS
               if path.read_bytes() != (copy / path.relative_to(ROOT)).read_bytes()]
    assert not unclean, "run `make export`"


def test_modules_are_what_the_notebooks_export(tmp_path):
    copy = copy_project(tmp_path)
    for module in (copy / "memformers").glob("*.py"):
        if module.name not in ("__init__.py", "__main__.py"): module.unlink()
    env = {**os.environ, "PYTHONPATH": str(copy)}
    code = "import nbdev; nbdev.nbdev_export()"
    subprocess.run([sys.executable, "-c", code], cwd=copy, env=env, check=True)
    made = {path.name: path.read_text() for path in (copy / "memformers").glob("*.py")}
    here = {path.name: path.read_text() for path in (ROOT / "memformers").glob("*.py")}
    assert made.keys() == here.keys()
    assert not [name for name in made if made[name] != here[name]], "run `make export`"
