"The package as others get it: an sdist, a wheel made from it, installed and imported elsewhere."
import ast
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import zipfile
from configparser import ConfigParser
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
HEAVY = ["accelerate", "datasets", "faiss", "ipykernel", "IPython", "jupyter_core", "matplotlib",
         "nbdev", "pandas", "peft", "tensorboard", "transformers"]


def run(*command, **options):
    "What a command printed; its errors are shown where it fails."
    command = [str(part) for part in command]
    done = subprocess.run(command, capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="module")
def settings():
    parser = ConfigParser(delimiters=["="])
    parser.read(ROOT / "settings.ini", encoding="utf-8")
    return parser["DEFAULT"]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    "The folder with the sdist, and the wheel that is built from nothing but the sdist."
    folder = tmp_path_factory.mktemp("build")
    skip = shutil.ignore_patterns(".*", "build", "dist", "runs", "_docs", "_proc", "*.egg-info")
    shutil.copytree(ROOT, folder / "tree", ignore=skip)
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder / "dist",
        folder / "tree")
    return folder / "dist"


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory):
    "A folder that holds the installed wheel and nothing else; what it needs is found beside it."
    folder = tmp_path_factory.mktemp("installed")
    run(sys.executable, "-m", "pip", "install", "--no-index", "--no-deps", "--target", folder,
        *built.glob("*.whl"))
    return folder


def python(installed, code, tmp_path):
    "Run `code` in a fresh interpreter that finds the installed wheel first, from another folder."
    return run(sys.executable, "-c", code, cwd=tmp_path,
               env={**os.environ, "PYTHONPATH": str(installed)})


def imported(path):
    "The packages of others that a module imports: with the module itself, and later in functions."
    found = {True: set(), False: set()}
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import): names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level: names = [node.module]
        else: continue
        found[node in tree.body] |= {name.partition(".")[0] for name in names}
    own = {*sys.stdlib_module_names, "memformers"}
    return found[True] - own, found[False] - own


def test_what_is_imported_is_required(settings):
    """Also what the development environment has anyway, which a plain install has not."""
    def packages(*keys): return {re.match(r"[\w-]+", word)[0].partition("-")[0]
                                 for key in keys for word in shlex.split(settings[key])}
    required = packages("requirements")
    extras = ("cpu_requirements", "hub_requirements", "hf_requirements",
              "tensorboard_requirements", "fla_requirements", "tokenizers_requirements")
    optional = required | packages(*extras)
    for path in (ROOT / "memformers").glob("*.py"):
        at_once, later = imported(path)
        assert at_once <= required, f"{path.name} needs {sorted(at_once - required)}"
        assert later <= optional | {"IPython"}, f"{path.name} may need {sorted(later - optional)}"


def test_names_of_what_is_built(built, settings):
    version = settings["version"]
    assert sorted(path.name for path in built.iterdir()) == [
        f"torch_memformers-{version}-py3-none-any.whl", f"torch_memformers-{version}.tar.gz"]


def test_wheel_holds_every_module_and_nothing_else(built):
    with zipfile.ZipFile(next(built.glob("*.whl"))) as wheel:
        names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    modules = {f"memformers/{path.name}" for path in (ROOT / "memformers").glob("*.py")}
    assert names == modules | {"memformers/py.typed"} | trained()


def trained():
    files = [path for path in (ROOT / "memformers" / "trained").rglob("*") if path.is_file()]
    assert files
    return {path.relative_to(ROOT).as_posix() for path in files}


def test_what_is_built_stays_small(built):
    sizes = {path.name: path.stat().st_size for path in built.iterdir()}
    assert max(sizes.values()) < 7_000_000, sizes


def test_sdist_holds_what_a_reader_looks_for(built):
    with tarfile.open(next(built.glob("*.tar.gz"))) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    assert {"settings.ini", "setup.py", "README.md", "LICENSE", "CHANGELOG.md", "constraints.txt",
            "CITATION.cff", "memformers/__init__.py", "memformers/py.typed"} | trained() <= names


def test_the_same_facts_everywhere(built, settings):
    "The version and the addresses of the citation; the Pythons that are said to work are tested."
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\nversion: {settings['version']}\n" in citation
    assert f"\nrepository-code: {settings['git_url']}\n" in citation
    assert f"\nurl: {settings['doc_host']}{settings['doc_baseurl']}\n" in citation
    with zipfile.ZipFile(next(built.glob("*.whl"))) as wheel:
        name = next(name for name in wheel.namelist() if name.endswith("/METADATA"))
        metadata = wheel.read(name).decode()
    said = re.findall(r"^Classifier: Programming Language :: Python :: (3\.\d+)$", metadata, re.M)
    assert said == settings["pythons"].split() and said[0] == settings["min_python"]
    tests = (ROOT / ".github" / "workflows" / "test.yml").read_text(encoding="utf-8")
    assert "python: [" + ", ".join(f'"{version}"' for version in said) + "]" in tests


def test_wheel_imports_from_another_folder(installed, settings, tmp_path):
    code = "import memformers; print(memformers.__file__, memformers.__version__)"
    file, version = python(installed, code, tmp_path).split()
    assert Path(file).is_relative_to(installed) and version == settings["version"]


def test_distribution_and_command(installed, settings, tmp_path):
    code = """
from importlib.metadata import distribution
found = distribution("torch-memformers")
(command,) = found.entry_points.select(group="console_scripts")
print(found.version, command.name, callable(command.load()))"""
    assert python(installed, code, tmp_path) == f"{settings['version']} memformers True"
    usage = run(sys.executable, installed / "bin" / "memformers", "--help", cwd=tmp_path,
                env={**os.environ, "PYTHONPATH": str(installed)})
    assert "demo" in usage


def test_trained_models_load_without_a_network(installed, tmp_path):
    code = """
import socket
def refuse(*_): raise OSError("no network")
socket.socket.connect = socket.getaddrinfo = refuse
from memformers import generate
from memformers.zoo import TRAINED, load_model
for name in TRAINED: assert len(generate(load_model(name), "KING.", 8, temperature=0)) >= 8
print(*TRAINED)"""
    names = {path.parent.name for path in (ROOT / "memformers" / "trained").glob("*/config.json")}
    assert set(python(installed, code, tmp_path).split()) == names


def test_every_module_imports(installed, tmp_path):
    names = [path.stem for path in sorted((ROOT / "memformers").glob("[a-z]*.py"))]
    python(installed, "; ".join(f"import memformers.{name}" for name in names), tmp_path)


def test_import_is_light(installed, tmp_path):
    code = f"import sys, memformers; print([name for name in {HEAVY} if name in sys.modules])"
    assert python(installed, code, tmp_path) == "[]"


def test_module_runs_as_the_command(installed, settings, tmp_path):
    said = run(sys.executable, "-m", "memformers", "--version", cwd=tmp_path,
               env={**os.environ, "PYTHONPATH": str(installed)})
    assert said == f"memformers {settings['version']}"
