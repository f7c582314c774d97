"The tree as it is committed: small files, and text but for a few pictures."
import re
import runpy
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 2_000_000             # bytes of a file
BINARY = ["nbs/images/*.png", "nbs/assets/*.png", "nbs/assets/*.woff2",
          "memformers/trained/*/model.safetensors"]  # that may be committed


@pytest.fixture(scope="module")
def tracked():
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode: pytest.skip("this is not a git checkout")
    return [ROOT / name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


def test_no_large_file(tracked):
    large = {str(path.relative_to(ROOT)): path.stat().st_size for path in tracked
             if path.stat().st_size > LIMIT}
    assert not large


def test_binary_files_are_those_that_are_meant(tracked):
    meant = {path for pattern in BINARY for path in ROOT.glob(pattern)}
    binary = [str(path.relative_to(ROOT)) for path in tracked
              if path not in meant and b"\0" in path.read_bytes()]
    assert not binary


def test_benchmarks_leave_nothing_in_the_tree(tracked):
    """Peers write where they run, so `bench.py` gives them a folder of their own."""
    left = [path for path in tracked if {".tmp", "runs"} & set(path.relative_to(ROOT).parts)]
    assert not left


def test_results_name_no_folder_of_the_machine_they_come_from(tracked):
    results = [path for path in tracked if path.suffix == ".json"
               and {"evidence", "results"} & set(path.relative_to(ROOT).parts)]
    assert results
    found = [path.name for path in results if re.search(r'[\s"=\'](/|~/|[A-Z]:\\\\)\w', path.read_text())]
    assert not found


def test_faults_fit_the_code():
    """The lines that a fault changes stand once in its file: where code moves, it has to follow."""
    faults = runpy.run_path(str(ROOT / "tests" / "faults" / "run.py"))
    read = [faults["read"](path) for path in sorted((ROOT / "tests" / "faults").glob("*.fault"))]
    assert len(read) > 300
    found = {fault.name: (ROOT / fault.file).read_text().count(fault.was) for fault in read}
    assert not {name: times for name, times in found.items() if times != 1}
