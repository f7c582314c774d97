"""A notebook as a page: nbdev's own processing, then markdown as Quarto reads it, then pandoc.

nbdev takes out what is hidden and puts in the documentation of what is exported, as it does for
Quarto. Outputs are those that the notebook was saved with.
"""
import base64
import html
import posixpath
import re
import subprocess
from pathlib import Path

import pypandoc
import yaml
from execnb.nbio import read_nb
from nbdev.processors import FilterDefaults

ASSETS = Path(__file__).resolve().parent / "site"
# What a cell shows when its output comes in several forms, as Quarto chooses.
FORMS = ["text/html", "text/markdown", "image/svg+xml", "image/png", "image/jpeg", "text/plain"]
SUFFIX = {"image/svg+xml": ".svg", "image/png": ".png", "image/jpeg": ".jpg"}


class SiteError(Exception):
    "Something in the notebooks or in _quarto.yml that has to be put right there."


class Page:
    "A notebook after nbdev's processing, and where its page stands."

    def __init__(self, nbs, source):
        "`source` is the notebook's path in the folder `nbs`, with forward slashes."
        self.source = source
        self.nb = read_nb(nbs / source)
        FilterDefaults()(self.nb)
        meta = getattr(self.nb, "frontmatter_", {})
        if "title" not in meta:
            raise SiteError(f"{source}: the first cell must begin with '# Title'")
        self.title = meta["title"].replace("`", "")
        self.description = meta.get("description", "").replace("`", "")
        escaped = html.escape(meta.get("description", ""))
        self.subtitle = re.sub("`([^`]+)`", r"<code>\1</code>", escaped)
        self.folder = posixpath.dirname(source)
        self.href = posixpath.join(self.folder, meta["output-file"])
        self.top = "../" * self.href.count("/")  # from the page to the site's first folder


def fence(text, classes):
    "A code block that no backtick inside `text` can close."
    ticks = "`" * max([2, *map(len, re.findall("`+", text))]) + "`"
    return f"{ticks} {{{classes}}}\n{text.rstrip()}\n{ticks}"


def directives(source):
    "The options in the `#| key: value` lines at the top of a cell, and the code below them."
    lines = source.splitlines()
    n = next((i for i, line in enumerate(lines) if not line.startswith("#|")), len(lines))
    options = [line[2:].strip() for line in lines[:n] if ":" in line]
    return yaml.safe_load("\n".join(options)) or {}, "\n".join(lines[n:]).strip("\n")


def picture(path, options, size):
    "A figure of the site."
    alt = str(options.get("fig-alt", "")).replace("\\", "\\\\").replace('"', '\\"')
    label = "#" + options["label"] if "label" in options else ""
    width = f"width={size['width']}px" if "width" in size else ""
    return f'![{options.get("fig-cap", "")}]({path}){{{label} fig-alt="{alt}" {width}}}'


def show_output(output, options, save, picture):
    "One output of a cell as markdown; `save(bytes, suffix)` keeps a picture and gives its path."
    asis = options.get("output") == "asis"
    if output.output_type == "error":
        raise SiteError(f"a saved output is an error: {output.ename}: {output.evalue}")
    if output.output_type == "stream":
        text = "".join(output.text)
        return text if asis else fence(text, ".output")
    form = next((f for f in FORMS if f in output.data), None)
    data = "".join(output.data.get(form, ""))
    if form is None: return ""
    if form == "text/html": return fence(data, "=html")
    if form == "text/markdown": return data
    if form == "text/plain": return data if asis else fence(data, ".output")
    content = data.encode() if form == "image/svg+xml" else base64.b64decode(data)
    return picture(save(content, SUFFIX[form]), options, output.metadata.get(form, {}))


def show_code(code, options):
    "The source of a cell as markdown, folded where `code-fold` says so."
    block = fence(code, ".python .cell-code")
    fold = options.get("code-fold", False)
    if not fold: return block
    summary = html.escape(str(options.get("code-summary", "Code")))
    start = f"<details{' open' if fold == 'show' else ''}><summary>{summary}</summary>"
    return "\n\n".join([fence(start, "=html"), block, fence("</details>", "=html")])


def check_markdown(source):
    "Refuse what looks right in Jupyter and is lost on the site, be it by Quarto or by pandoc."
    if twice := re.search(r"\[\[(`[^`]+`)\]\([^)]*\)\]\(", source):
        raise SiteError(f"nbdev links {twice[1]} by itself: write it without a link, "
                        "or the link's text without backticks")
    if tag := re.search(r"\\tag\{([^}]*)\}", source):
        raise SiteError(f"MathML drops {tag[0]}: write \\qquad ({tag[1]})")
    return source


def to_markdown(page, save, picture=picture):
    "All cells of a page in pandoc's markdown."
    parts = []
    for cell in page.nb.cells:
        if cell.cell_type == "markdown" and not cell.source.startswith("<!-- WARNING"):
            parts.append(check_markdown(cell.source))
        if cell.cell_type != "code": continue
        try:
            options, code = directives(cell.source)
            if options.get("include") is False: continue
            if options.get("echo") is not False and code: parts.append(show_code(code, options))
            if options.get("output") is False: continue
            parts += [show_output(o, options, save, picture) for o in cell.get("outputs", [])]
        except (yaml.YAMLError, SiteError) as error:
            raise SiteError(f"{error}\nin the cell\n{cell.source}") from None
    return "\n\n".join(parts)


def save_to(folder, prefix):
    "A function that saves numbered pictures in `folder` and gives their path from there."
    count = iter(range(1, 1000))
    def save(content, suffix):
        name = f"{prefix}-{next(count)}{suffix}"
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
        return name
    return save


def pandoc(markdown, *options):
    "Convert with pandoc; a warning (a broken formula, an open div) is an error."
    command = [pypandoc.get_pandoc_path(), "--fail-if-warnings", "--columns=1000",
               "--wrap=preserve", "--lua-filter", str(ASSETS / "filter.lua"), *options]
    done = subprocess.run(command, input=markdown, capture_output=True, encoding="utf-8")
    if done.returncode: raise SiteError(done.stderr.strip())
    return done.stdout
