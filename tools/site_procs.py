"""What the site does to a notebook after nbdev, for Quarto and for pandoc: settings.ini names it.

nbdev finds this file where PYTHONPATH names the folder tools, as `make docs` does.
"""
import ast
import importlib.util
import re
from pathlib import Path

from nbdev.processors import Processor

IMPORTS = (ast.Import, ast.ImportFrom)


def options(source):
    "The `#| key: value` lines on top of a cell."
    return re.findall(r"^#\| *([\w-]+):", source, flags=re.MULTILINE)


def floor(nb):
    "The first digit of a notebook that documents a module, which is its floor; '' for other pages."
    path = Path(nb.path_)
    return path.name[0] if path.parent.name == "nbs" and path.name[0].isdigit() else ""


def only_imports(source):
    "Is a cell nothing but imports?"
    try: body = ast.parse(source).body
    except SyntaxError: return False
    return bool(body) and all(isinstance(node, IMPORTS) for node in body)


def public_names(source):
    "The public names that an exported cell defines, methods patched in among them."
    nodes = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    named = [node.name for node in ast.parse(source).body if isinstance(node, nodes)]
    return [name for name in named if not name.startswith("_")]


class fold_code(Processor):
    """Fold the exported source that the page does not discuss, and the imports of lessons.

    A cell is discussed where text stands right before it. On the pages of parts and mechanisms,
    whose code is the lesson, every cell with a public name is.
    """
    def begin(self):
        "Decide for every cell."
        level, text = floor(self.nb), False
        for cell in self.nb.cells:
            if getattr(cell, "has_sd", False): continue  # documentation, made of the cell after it
            if cell.cell_type == "markdown":
                text = True
                continue
            if "exports" in cell.directives_:
                shown = text or level in ("1", "2", "3") and public_names(cell.source)
                self.fold(cell, "show" if shown else "true", "Exported source")
            elif level and only_imports(cell.source):
                self.fold(cell, "true", "Imports")
            text = False

    def fold(self, cell, how, summary):
        "Fold a cell, unless it says by itself how it is folded or is not shown at all."
        if {"code-fold", "echo"} & set(options(cell.source)): return
        cell.source = f'#| code-fold: {how}\n#| code-summary: "{summary}"\n{cell.source}'


def unlink_code(cell):
    "Take nbdev's links out of the signatures that it shows: code would show their markup."
    for output in cell.get("outputs", []):
        lines = output.get("data", {}).get("text/markdown")
        if lines is None: continue
        text, plain = "".join(lines), r"\[(`[^`]+`)\]\(https?:[^)]*\)"
        output.data["text/markdown"] = re.sub(
            r"^```.*?^```", lambda code: re.sub(plain, r"\1", code[0]), text,
            flags=re.DOTALL | re.MULTILINE)


def first_line(node):
    "The first line of what a definition says about itself."
    return (ast.get_docstring(node) or "").partition("\n")[0].replace("|", r"\|")


class Module:
    "A module of the package as its page shows it."

    def __init__(self, path, symbols):
        "`symbols` are the module's part of nbdev's index."
        source = path.read_text(encoding="utf-8")
        tree = ast.parse(source)
        self.name, self.symbols = f"memformers.{path.stem}", symbols
        self.notebook = re.search(r"File to edit: \.\./nbs/(\S+\.ipynb)", source)[1]
        self.told = {node.name: first_line(node) for node in tree.body if hasattr(node, "name")}
        self.names = next(ast.literal_eval(node.value) for node in tree.body
                          if isinstance(node, ast.Assign) and node.targets[0].id == "__all__")

    def row(self, name):
        "A row of the index; what is neither a function nor a class has no heading of its own."
        page = next(iter(self.symbols.values()))[0].partition("#")[0]
        href = self.symbols.get(f"{self.name}.{name}", [page])[0]
        return f"| [`{name}`]({href}) | {self.told.get(name, '')} |"


def name_index():
    "Markdown: every public name, first what `import memformers` has, then by module."
    package = Path(importlib.util.find_spec("memformers").origin).parent
    index = ast.parse((package / "_modidx.py").read_text(encoding="utf-8")).body[-1].value
    modules = {module: Module(package.parent / f"{module.replace('.', '/')}.py", symbols)
               for module, symbols in ast.literal_eval(index)["syms"].items() if symbols}
    top = {name.name: modules[f"memformers.{node.module}"]
           for node in ast.parse((package / "__init__.py").read_text(encoding="utf-8")).body
           if isinstance(node, ast.ImportFrom) for name in node.names}
    head = ["", "| name | what it is |", "|---|---|"]
    parts = ["## memformers", *head, *(top[name].row(name) for name in sorted(top, key=str.lower))]
    for module in sorted(modules.values(), key=lambda module: module.notebook):
        name = module.name.partition(".")[2]
        where = f"`{module.name}`, [explained here]({module.notebook})."
        names = sorted(module.names, key=str.lower)
        parts += ["", f"## {name}", "", where, *head, *map(module.row, names)]
    return "\n".join(parts)


def fill_index(cell):
    "Put the index of all names where a page says `<!-- index of names -->`."
    if cell.cell_type == "markdown" and "<!-- index of names -->" in cell.source:
        cell.source = cell.source.replace("<!-- index of names -->", name_index())
