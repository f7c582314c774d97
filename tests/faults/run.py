"""Break the package on purpose, one fault at a time, and see whether the tests notice.

Each `NAME.fault` beside this file says what goes wrong, which file is changed, which tests should
notice, and the lines before and after. Faults are applied to a copy; the tree is left alone.

    python tests/faults/run.py            all faults
    python tests/faults/run.py NAME …     some
    python tests/faults/run.py --jobs 4   at most four at a time; default: one for each core
"""
import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import Queue

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent


@dataclass(frozen=True)
class Fault:
    name: str
    what: str
    file: str
    tests: list[str]
    was: str
    becomes: str


def read(path: Path) -> Fault:
    """A fault file: a line that says what goes wrong, `file:`, `tests:`, then the two texts."""
    head, _, rest = path.read_text(encoding="utf-8").partition("--- was\n")
    was, found, becomes = rest.partition("--- becomes\n")
    lines = head.strip().splitlines()
    fields = dict(line.split(": ", 1) for line in lines[1:])
    if not found or not was.strip() or {"file", "tests"} - fields.keys():
        raise SystemExit(f"{path} is not a fault: see {Path(__file__).name}")
    return Fault(path.stem, lines[0], fields["file"], fields["tests"].split(),
                 was.rstrip("\n"), becomes.rstrip("\n"))


def run(copy: Path, *command: str) -> subprocess.CompletedProcess:
    """Run Python on the package of the copy."""
    env = os.environ | {"PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1",
                        "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run([sys.executable, *command], cwd=copy, env=env, capture_output=True,
                          text=True)


def imported(copy: Path) -> str:
    """Where the package is imported from; empty if it can't be imported."""
    return run(copy, "-c", "import memformers; print(memformers.__file__)").stdout.strip()


def failing(copy: Path, tests: list[str]) -> str | None:
    """The first test that fails on the package of the copy; empty if all pass, None if none ran."""
    done = run(copy, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests)
    # With another code pytest could not run, perhaps because the package can't be imported.
    if done.returncode not in (0, 1):
        if not imported(copy): return "import memformers"
        said = done.stdout[-2000:] + done.stderr[-2000:]
        raise SystemExit(f"pytest could not run {tests}:\n{said}")
    if done.returncode == 0: return "" if " passed" in done.stdout else None
    return next((line.split(" - ")[0].split()[-1] for line in done.stdout.splitlines()
                 if line.startswith(("FAILED", "ERROR "))), "a test")


def verdict(fault: Fault, copy: Path) -> tuple[str, str]:
    """What the tests say of the copy with the fault in it, and which; it is mended afterwards."""
    began = time.time()
    target = copy / fault.file
    whole = target.read_text(encoding="utf-8")
    if whole.count(fault.was) != 1:
        return "STALE", f"its lines are found {whole.count(fault.was)} times in {fault.file}"
    target.write_text(whole.replace(fault.was, fault.becomes), encoding="utf-8")
    try:
        test = failing(copy, fault.tests)
        if test is None: return "skipped", f"as are all of {fault.tests}, here"
        seconds = round(time.time() - began)
        return ("caught", f"{test}, {seconds} s") if test else ("SURVIVED", f"all of {fault.tests}")
    finally: target.write_text(whole, encoding="utf-8")


def main(names: list[str], jobs: int) -> int:
    faults = [read(path) for path in sorted(HERE.glob("*.fault"))]
    unknown = set(names) - {f.name for f in faults}
    if unknown: raise SystemExit(f"no such fault: {', '.join(sorted(unknown))}")
    faults = [f for f in faults if not names or f.name in names]
    counts, began, copies = {}, time.time(), Queue()
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(jobs) as pool:
        for i in range(jobs):
            copy = Path(folder).resolve() / f"copy{i}"
            shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(
                ".*", "_docs", "_proc", "*.egg-info", "__pycache__", "runs", "build", "dist"))
            copies.put(copy)
        if not imported(copy).startswith(str(copy)):
            raise SystemExit(f"the copy is not what is imported, but {imported(copy)}")

        def on_a_copy(work):
            copy = copies.get()
            try: return work(copy)
            finally: copies.put(copy)

        print(f"{len(faults)} faults. First the tests without any: ", end="", flush=True)
        files = {}   # the tests without a fault, file by file
        for test in sorted({t for f in faults for t in f.tests}):
            files.setdefault(test.split("::")[0], []).append(test)
        found = pool.map(lambda tests: on_a_copy(lambda copy: failing(copy, tests)), files.values())
        if found := [test for test in found if test]:
            raise SystemExit(f"{', '.join(found)} fails, so they prove nothing.")
        print(f"they pass ({time.time() - began:.0f} s).", flush=True)
        verdicts = pool.map(lambda f: on_a_copy(lambda copy: verdict(f, copy)), faults)
        for fault, (said, why) in zip(faults, verdicts):
            counts[said] = counts.get(said, 0) + 1
            print(f"  {said:9} {fault.name}: {fault.what} ({why})", flush=True)
    bad = len(faults) - counts.get("caught", 0) - counts.get("skipped", 0)
    skipped = f", {counts['skipped']} skipped" if "skipped" in counts else ""
    print(f"{counts.get('caught', 0)} caught, {bad} not{skipped}, {time.time() - began:.0f} s.")
    return 1 if bad else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="of the faults; default: all")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="copies tested at a time")
    given = parser.parse_args()
    sys.exit(main(given.names, given.jobs))
