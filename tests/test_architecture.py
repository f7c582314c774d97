"""The number of a notebook is its floor: who may import whom, read from the modules themselves."""
import ast
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
GROUND = {"memory": set(), "files": {"memory"}, "data": set(), "tasks": {"data"},
          "plots": set(), "packages": {"data"}}
PARTS = {"attention": {"memory"}, "positions": {"attention"},
         "gates": {"attention"}, "fixed_point": set(), "delta_rule": {"memory"}, "knn": {"memory"},
         "model": {"memory", "files", "data", "attention"},
         "generate": {"memory", "attention", "model"},
         "train": {"memory", "files", "data", "model", "tasks"},
         "evaluate": {"memory", "files", "data", "model"}}
MECHANISM = {"memory", "model", "attention", "positions", "gates"}
# A mechanism that stands on a part of its own.
ALSO = {"memorizing": {"knn"}, "feedback": {"fixed_point"}, "infini": {"delta_rule"},
        "gated_delta": {"delta_rule"}}
ASSEMBLY = ("zoo", "wrapper", "knn_memory", "pretrained", "probe", "compare", "cli", "sharded_knn",
            "pretrained_recurrent")
# Inside a documented call that makes such an object.
LAZY = {"memorizing": {"knn_memory"}, "pretrained": {"pretrained_recurrent"}}


def notebooks():
    """Module → floor, from the exporting notebooks."""
    found = {}
    for path in sorted((ROOT / "nbs").rglob("*.ipynb")):
        source = "\n".join("".join(cell["source"]) for cell in json.loads(path.read_text())["cells"])
        exported = re.search(r"^#\| *default_exp +(\w+)", source, re.M)
        if exported: found[exported[1]] = path
    return found


NOTEBOOKS = notebooks()
FLOOR = {module: int(path.name[:2]) for module, path in NOTEBOOKS.items()}


def imports(module, lazy=True):
    """The package's modules that a module imports, with or without those inside functions."""
    tree = ast.parse((ROOT / "memformers" / f"{module}.py").read_text())
    found = set()
    inside = {id(node) for function in ast.walk(tree) if isinstance(function, ast.FunctionDef)
              for node in ast.walk(function)}
    for node in ast.walk(tree):
        if not lazy and id(node) in inside: continue
        if isinstance(node, ast.ImportFrom):
            name = node.module or ""
            if node.level or name.split(".")[0] == "memformers":
                assert all(alias.name != "*" for alias in node.names), f"{module} imports *"
                if [alias.name for alias in node.names] != ["__version__"]:
                    found.add(name.removeprefix("memformers").strip(".") or "__init__")
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "memformers":
                    found.add(alias.name.removeprefix("memformers").strip(".") or "__init__")
    return found


def allowed(module):
    """Who may be imported, by the house's table."""
    if module in GROUND: return GROUND[module]
    if module in PARTS: return PARTS[module]
    if 20 <= FLOOR[module] < 40: return MECHANISM | ALSO.get(module, set())
    assert module in ASSEMBLY, f"{module} has no place in the house"
    return {m for m, floor in FLOOR.items() if floor < FLOOR[module]}


@pytest.mark.parametrize("module", FLOOR)
def test_imports_only_from_below(module):
    late = LAZY.get(module, set())
    assert not late & imports(module, lazy=False), f"{module} must import {late} inside a function"
    found = imports(module) - late
    assert found <= allowed(module), f"{module} must not import {sorted(found - allowed(module))}"
    assert all(FLOOR[other] < FLOOR[module] for other in found)


def test_every_module_has_a_notebook():
    modules = {path.stem for path in (ROOT / "memformers").glob("*.py")} - {"__init__", "__main__", "_modidx"}
    assert modules == set(NOTEBOOKS)


def test_no_module_level_state():
    """A memory lives in no module: no class of a mechanism registers a buffer."""
    for module in FLOOR:
        text = (ROOT / "memformers" / f"{module}.py").read_text()
        assert "register_buffer" not in text, f"{module} keeps something in a buffer"


@pytest.mark.parametrize("module", FLOOR)
def test_lines_are_short(module):
    for number, line in enumerate((ROOT / "memformers" / f"{module}.py").read_text().splitlines(), 1):
        if line.startswith(("__all__", "           '", '"""')): continue   # written by nbdev
        assert len(line) <= 100, f"memformers/{module}.py:{number} has {len(line)} columns"


@pytest.mark.parametrize("path", sorted((ROOT / "nbs").rglob("*.ipynb")),
                         ids=lambda path: str(path.relative_to(ROOT / "nbs")))
def test_import_cells_hold_imports_only(path):
    """The site's build runs import cells alone, so nothing else may stand in them."""
    for cell in json.loads(path.read_text())["cells"]:
        if cell["cell_type"] != "code": continue
        body = ast.parse(re.sub(r"^[%!].*$", "", "".join(cell["source"]), flags=re.M)).body
        first = [isinstance(node, (ast.Import, ast.ImportFrom)) for node in body]
        assert not any(first) or all(first), "".join(cell["source"])[:200]


def test_the_project_speaks_of_itself_alone():
    """No path of a machine and no draft's marker in what a newcomer clones."""
    todo = re.compile(r"\b(TODO|FIXME|XXX)\b")
    for folder in ("memformers", "nbs", "tests", "tools", "bench"):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix not in (".py", ".ipynb", ".fault", ".css", ".js") or path == Path(__file__):
                continue
            text = path.read_text(encoding="utf-8")
            if path.suffix == ".ipynb":   # what was written, not the pictures
                text = "\n".join("".join(cell["source"]) for cell in json.loads(text)["cells"])
            assert not todo.search(text), f"{path} has a TODO"
            assert str(ROOT.parent) + "/" not in text, f"{path} names a folder of this machine"
