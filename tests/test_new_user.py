"""What a new user does, in an environment that has the wheel and the newest of all it asks for.

The other tests run with the versions of constraints.txt; a user has others. Every block of the
README and of the how-to pages is executed here as it is written, outside of the checkout. A block
that can't be is named in `SKIPPED` with the reason; `SHORTER` says what is cut short. Both are
complete: a block that is new is run or fails.
"""
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import nbformat
import pytest
from filelock import FileLock

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "nbs" / "howto").glob("*.ipynb"))]

# First words of a block → why it isn't run here.
SKIPPED = {
    "make demo": "for a clone; the demo is run below, and `make test` runs this",
    "pip install torch --index-url": "asks a git server; this environment has the wheel instead",
    "pip install .": "this environment was installed so, and the extras take minutes or CUDA",
    "pip install 'torch-memformers[tokenizers]'": "this environment was installed so",
    "import datasets": "asks the Hugging Face hub; test_data.py gives the same calls a dataset",
    "from transformers import AutoTokenizer": "asks the Hugging Face hub; test_tokenizer.py",
    "from transformers import Trainer": "transformers is an extra; test_bridges.py trains with it",
    "import lightning": "lightning is not among the extras",
    "torchrun --nproc-per-node 4 -m": "four accelerators; the next block is the same on a CPU",
    "torchrun --nproc-per-node 4 my_loop.py": "the reader's own file; the page runs its code",
    "accelerate launch --multi_gpu": "several accelerators",
    "model.push_to_hub": "writes to the Hugging Face hub",
    "memformers generate user/my-model": "asks the Hugging Face hub",
    "from huggingface_hub import hf_hub_download": "writes to the Hugging Face hub",
}
# Pages whose Python imports an extra that this environment has not: only their commands are run.
EXTRAS = {"several_processes.ipynb": "transformers"}   # test_notebooks.py runs the cells
# What would take minutes → the same in seconds.
SHORTER = {
    "TrainOptions(steps=1000)": "TrainOptions(steps=2)",
    "--steps 1000": "--steps 2",
    "--steps 2000": "--steps 3",
    "--steps 60": "--steps 3",
    "--steps 20": "--steps 2",
    "--tokenizer tokenizer.json\n": "--tokenizer tokenizer.json --steps 2\n",
    "--folder runs/ids`": "--folder runs/ids --steps 2`",
    "--folder runs/other`": "--folder runs/other --steps 2`",
}
# Each command with an option of two words, which the parser of another version may not know.
COMMANDS = """
memformers --version
python -m memformers --version
memformers models
memformers data
memformers train memorizing_tiny --corpus texts --folder run --batch-size 2 --steps 2 \
    --save_every 2 --valid-share 0.2 --cut 300 --cpu
memformers evaluate run --corpus texts --batch_size 2 --max-tokens 100 --split all \
    --valid-share 0.2 --modes "on off knn.off" --cpu
memformers generate run --prompt al --top-k 4 --min_p 0.1 --length 4 --cpu
memformers demo --model transformer_xl_tiny --folder demo --steps 2 --episodes 2 \
    --documents 2 --max-tokens 200 --cpu
memformers compare toy --folder evidence --dry-run
"""
OFFLINE = re.compile("NewConnectionError|ConnectTimeout|name resolution|ProxyError|Max retries|"
                     "Connection (refused|reset|aborted)|Network is unreachable|Read timed out")


def blocks(page):
    "Kind and source of a page's blocks, in order: cells, fenced blocks, commands in the text."
    if page.suffix == ".md": cells = [("markdown", page.read_text(encoding="utf-8"))]
    else: cells = [(c.cell_type, c.source) for c in nbformat.read(page, as_version=4).cells]
    found = []
    for kind, source in cells:
        if kind == "code": found.append(("python", source + "\n"))
        else: found += [(fence or "sh", fenced or inline) for fence, fenced, inline in re.findall(
            r"^``` ?(\w+)\n(.*?)^```|"
            r"`((?:memformers (?:train|evaluate|generate)|pip|accelerate|torchrun) [^`]+`)",
            source, re.M | re.S)]
    return found


def why_skipped(source):
    return next((why for words, why in SKIPPED.items() if source.startswith(words)), None)


def shorter(source):
    for long, short in SHORTER.items(): source = source.replace(long, short)
    return source.removesuffix("`")


def program(page):
    "A page as one program: its Python as it stands, and its commands through a shell."
    lines = ["import subprocess"]
    for kind, source in blocks(page):
        if why_skipped(source) or kind == "python" and page.name in EXTRAS: continue
        source = shorter(source)
        assert not source.startswith("pip "), f"{page.name}: {source} would install elsewhere"
        if kind == "sh":
            lines.append(f"subprocess.run({'set -e' + chr(10) + source!r}, shell=True, check=True)")
        else:
            assert kind == "python", f"{page.name}: a block of {kind}; say how it is run"
            lines.append(source)
    return "\n".join(lines) + "\n"


def run(*command, **options):
    "What a command printed; its errors are shown where it fails."
    command = [str(part) for part in command]
    done = subprocess.run(command, capture_output=True, text=True, **options)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}{done.stderr}"
    return done.stdout


def lend_torch(python, folder):
    "Let an environment find the torch of this one: it takes minutes to fetch."
    folder.mkdir()
    for found in importlib.metadata.distributions():
        if not re.match("torch$|triton$|nvidia-|cuda-", found.name.lower()): continue
        for top in {file.parts[0] for file in found.files}:
            if not top.startswith("..") and not (folder / top).exists():
                (folder / top).symlink_to(found.locate_file(top))
    where = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    (Path(where) / "torch.pth").write_text(f"{folder}\n")
    command = python.parent / "torchrun"
    command.write_text(f"#!{python}\nfrom torch.distributed.run import main\nmain()\n")
    command.chmod(0o755)


def install(folder, with_torch):
    "A wheel of this tree in a new environment, with the newest of what it asks for."
    skip = shutil.ignore_patterns(".*", "build", "dist", "runs", "_docs", "_proc", "*.egg-info")
    shutil.copytree(ROOT, folder / "tree", ignore=skip)
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder / "dist",
        folder / "tree")
    shutil.rmtree(folder / "tree")
    venv.create(folder / "venv")
    python = folder / "venv" / "bin" / "python"
    if not with_torch: lend_torch(python, folder / "torch")
    (wheel,) = (folder / "dist").glob("*.whl")
    pip = [sys.executable, "-m", "pip", "--python", str(python)]
    done = subprocess.run([*pip, "install", "-q", "--retries", "1", "--timeout", "30",
                           f"{wheel}[tokenizers]"], capture_output=True, text=True)
    if done.returncode and (why := OFFLINE.search(done.stderr)): return f"no index: {why[0]}"
    assert done.returncode == 0, done.stdout + done.stderr
    run(*pip, "check")
    return ""


@pytest.fixture(scope="session", params=["torch of the tests",
                                         pytest.param("newest torch", marks=pytest.mark.slow)])
def environment(request, tmp_path_factory):
    "The variables of a shell in which the environment is active; made once for all test processes."
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ: base = base.parent
    folder = base / ("new_user_" + request.param.replace(" ", "_"))
    with FileLock(f"{folder}.lock"):
        if not (done := folder / "done").exists():
            shutil.rmtree(folder, ignore_errors=True)   # of an attempt that failed
            folder.mkdir()
            done.write_text(install(folder, request.param == "newest torch"))
    if why := done.read_text(): pytest.skip(why)
    # No command of the tests' own environment may be found, such as its pip.
    own = Path(sys.executable).parent
    path = [str(folder / "venv" / "bin"),
            *(p for p in os.environ["PATH"].split(os.pathsep) if Path(p) != own)]
    bare = {name: value for name, value in os.environ.items()
            if not name.startswith(("PYTHON", "PYTEST", "MEMFORMERS"))}
    return bare | dict(PATH=os.pathsep.join(path), HF_HUB_OFFLINE="1",
                       MEMFORMERS_CACHE=str(folder / "cache"), VIRTUAL_ENV=str(folder / "venv"))


@pytest.fixture
def home(tmp_path):
    "The folder of a user, with what the pages speak of: texts, ids, a tokenizer."
    import numpy as np
    from new_user import own_tokenizer, write_texts
    for name in ("texts", "my_texts", "others"): write_texts(tmp_path / name, 10)
    own_tokenizer(tmp_path / "tokenizer.json")
    np.save(tmp_path / "ids.npy", np.arange(9000, dtype=np.uint16) * 7 % 1000)
    return tmp_path


def test_the_newest_versions_are_taken_and_nothing_of_the_checkout(environment, tmp_path):
    code = "import memformers, fastcore, sys; print(memformers.__file__, sys.prefix)"
    file, prefix = run("python", "-c", code, env=environment, cwd=tmp_path).split()
    assert prefix == environment["VIRTUAL_ENV"] and Path(file).is_relative_to(prefix)
    missing = "import importlib.util as u; print([n for n in ('nbdev', 'faiss', 'transformers', " \
              "'datasets', 'IPython') if u.find_spec(n)])"
    assert run("python", "-c", missing, env=environment, cwd=tmp_path).strip() == "[]"


@pytest.mark.parametrize("files", [1, 10, 26])
def test_a_folder_of_files(files, environment, tmp_path):
    shutil.copy(ROOT / "tests" / "new_user.py", tmp_path)
    run("python", "new_user.py", tmp_path, files, env=environment, cwd=tmp_path)


@pytest.mark.parametrize("page", PAGES, ids=[page.name for page in PAGES])
def test_a_page_runs_as_it_is_written(page, environment, home):
    file = home / f"{page.stem}.py"
    file.write_text(program(page), encoding="utf-8")
    run("python", file, env=environment, cwd=home)


def test_every_command_runs(environment, home):
    for line in COMMANDS.strip().splitlines(): run("sh", "-c", line, env=environment, cwd=home)


def test_what_is_skipped_or_cut_short_is_there():
    """A reason that no block needs any more is taken away with the block."""
    sources = [source for page in PAGES for _, source in blocks(page)]
    for words in SKIPPED:
        assert sum(source.startswith(words) for source in sources) == 1, words
    for words in SHORTER: assert any(words in source for source in sources), words
    assert sum(why_skipped(source) is None for source in sources) > 60
    for name, extra in EXTRAS.items():
        page = ROOT / "nbs" / "howto" / name
        assert any(f"from {extra} import" in s for kind, s in blocks(page) if kind == "python")
    own = [source for source in sources if 'train(model, "my_texts"' in source]
    assert len(own) == 1 and not why_skipped(own[0]), "the README's own-text block is run"
