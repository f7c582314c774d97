"""Run the benchmarks: ratios against a peer in the same run, one thread, results in `results/`.

    python bench/bench.py            all
    python bench/bench.py NAME …     some, as `transformer_xl`

Each runs in a temporary folder: some peers leave files where they run.
"""
import os
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent


def main(names: list[str]) -> int:
    found = {path.stem.removeprefix("bench_"): path for path in sorted(HERE.glob("bench_*.py"))}
    unknown = set(names) - found.keys()
    if unknown: raise SystemExit(f"no benchmark {', '.join(unknown)}; there are {', '.join(found)}")
    env = {"OMP_NUM_THREADS": "1"} | os.environ
    with tempfile.TemporaryDirectory() as folder:
        codes = [subprocess.run([sys.executable, found[name]], env=env, cwd=folder).returncode
                 for name in names or found]
    return max(codes)


if __name__ == "__main__": sys.exit(main(sys.argv[1:]))
