"""Break the package on purpose, one fault at a time, and see whether the tests notice.

Each `NAME.fault` beside this file says what goes wrong, which file is changed, which tests should
notice, and the lines before and after. Faults are applied to a copy; the tree is left alone.

    python tests/faults/run.py            all faults
    python tests/faults/run.py NAME …     some
"""
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

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


def passes(copy: Path, tests: list[str]) -> bool:
    """Do the tests pass on the package of the copy?"""
    env = os.environ | {"PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1",
                        "PYTHONDONTWRITEBYTECODE": "1"}
    where = subprocess.run([sys.executable, "-c", "import memformers; print(memformers.__file__)"],
                           cwd=copy, env=env, capture_output=True, text=True)
    broken = where.returncode != 0   # the fault is so bad that the package does not import
    if not broken and not where.stdout.startswith(str(copy)):
        raise SystemExit(f"the copy in {copy} is not what is imported, but {where.stdout.strip()}")
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
    done = subprocess.run(command, cwd=copy, env=env, capture_output=True, text=True)
    if done.returncode not in (0, 1) and not broken:
        raise SystemExit(f"pytest could not run {tests}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.returncode == 0


def main(names: list[str]) -> int:
    faults = [read(path) for path in sorted(HERE.glob("*.fault"))]
    unknown = set(names) - {f.name for f in faults}
    if unknown: raise SystemExit(f"no such fault: {', '.join(sorted(unknown))}")
    faults = [f for f in faults if not names or f.name in names]
    bad, began = 0, time.time()
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder).resolve() / "copy"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(
            ".*", "_docs", "_proc", "*.egg-info", "__pycache__", "runs", "build", "dist"))
        tests = sorted({t for f in faults for t in f.tests})
        print(f"{len(faults)} faults. First the tests without any: ", end="", flush=True)
        if not passes(copy, tests): raise SystemExit("they fail, so they prove nothing.")
        print(f"they pass ({time.time() - began:.0f} s).")
        for fault in faults:
            target = copy / fault.file
            whole = target.read_text(encoding="utf-8")
            if whole.count(fault.was) != 1:
                verdict = f"STALE: its lines stand {whole.count(fault.was)} times in {fault.file}"
            else:
                target.write_text(whole.replace(fault.was, fault.becomes), encoding="utf-8")
                verdict = "SURVIVED" if passes(copy, fault.tests) else "caught"
                target.write_text(whole, encoding="utf-8")
            bad += verdict != "caught"
            print(f"  {verdict:9} {fault.name}: {fault.what}", flush=True)
    print(f"{len(faults) - bad} caught, {bad} not, {time.time() - began:.0f} s.")
    return 1 if bad else 0


if __name__ == "__main__": sys.exit(main(sys.argv[1:]))
