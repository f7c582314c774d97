"The site: built once by pandoc, its links followed, its pages looked at in a browser."
import ast
import functools
import html
import http.server
import os
import posixpath
import re
import shutil
import subprocess
import sys
import threading
from configparser import ConfigParser
from pathlib import Path

import nbformat
import pytest
import yaml
from nbdev.process import NBProcessor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))
import make_readme  # noqa: E402
import make_site  # noqa: E402
import site_procs  # noqa: E402

SAMPLE = ["""# Everything `at once`

> A page of `all` that it can hold.""",
"""See @fig-line, [home](../index.ipynb#second), and $x_{t+1} = \\sigma(W x_t)$.

## Maths

$$ p(x) = \\prod_t p(x_t \\mid x_{<t}), \\qquad m_{t+1} = f(m_t, x_t) \\qquad (1) $$""",
"""::: {.callout-note}
## A title with `code`
Outer text.

::: {.callout-warning title="Nested *warning*"}
Inner text.
:::
:::

::: {.callout-tip collapse="true"}
## Folded
Hidden text.
:::""",
"""::: {.panel-tabset}
## By hand
Loops.

## At once
One product.
:::"""]
FIGURE = '''#| label: fig-line
#| fig-cap: "Bits: a line"
#| fig-alt: "A \\"rising\\" line"
plt.plot([1, 2])'''
PIXEL = ("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNkYPhfDwAChwGA60e6kgAAAABJRU5E"
         "rkJggg==")


# --- fixtures ----------------------------------------------------------------------------------

@pytest.fixture(scope="session")
def site(tmp_path_factory):
    "The project's own site."
    out = tmp_path_factory.mktemp("site") / "docs"
    done = subprocess.run([sys.executable, ROOT / "tools" / "make_site.py", out],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return out


def notebook(path, markdown, code=()):
    "Write a notebook of markdown cells and code cells; `code` holds (source, outputs)."
    v4 = nbformat.v4
    cells = [v4.new_markdown_cell(text) for text in markdown]
    cells += [v4.new_code_cell(source, outputs=outputs) for source, outputs in code]
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(v4.new_notebook(cells=cells), path)


@pytest.fixture
def small(tmp_path, monkeypatch):
    "A project of two pages of its own; returns a function that builds it."
    nbs = tmp_path / "nbs"
    shutil.copytree(ROOT / "nbs/assets", nbs / "assets")
    config = yaml.safe_load((ROOT / "_quarto.yml").read_text(encoding="utf-8"))
    config["website"]["navbar"] = {"left": [{"text": "Home", "href": "index.ipynb"}]}
    config["website"]["sidebar"]["contents"] = [
        "index.ipynb", {"section": "How to", "contents": ["howto/05_sample.ipynb"]}]
    (tmp_path / "_quarto.yml").write_text(yaml.safe_dump(config), encoding="utf-8")
    notebook(nbs / "index.ipynb", ["# Home\n\n> Start.", "## First\n\nText.\n\n## Second\n\nText."])
    figure = nbformat.v4.new_output("display_data", {"image/png": PIXEL, "text/plain": "<Figure>"})
    shown = nbformat.v4.new_output("execute_result", {"text/plain": "[[`'```'`]]"})
    notebook(nbs / "howto" / "05_sample.ipynb", SAMPLE,
             [(FIGURE, [figure]), ("#| echo: false\nsecret = 1", []), ("ticks", [shown])])
    monkeypatch.chdir(ROOT)
    def build():
        make_site.write_site(tmp_path, tmp_path / "docs")
        return tmp_path / "docs"
    return build


# --- what is built -----------------------------------------------------------------------------

def test_every_internal_link_leads_somewhere(site):
    pages = {path.relative_to(site).as_posix(): path.read_text(encoding="utf-8")
             for path in site.rglob("*.html")}
    assert "index.html" in pages and "memory.html" in pages
    broken = []
    for name, text in pages.items():
        for target in re.findall(r'(?:href|src)="([^"]*)"', text):
            if re.match(r"[a-z]+:", target): continue
            path, _, anchor = target.partition("#")
            path = posixpath.join(posixpath.dirname(name), path) if path else name
            path = posixpath.normpath(path)
            if not (site / path).is_file(): broken.append((name, target))
            elif anchor and f'id="{anchor}"' not in pages[path]: broken.append((name, target))
    assert not broken


def test_no_page_shows_markup_instead_of_what_it_means(site):
    for path in site.rglob("*.html"):
        text = re.sub(r"<(pre|code|annotation)\b.*?</\1>|<[^>]*>", "",
                      path.read_text(encoding="utf-8"), flags=re.DOTALL)
        assert not re.search(r":::|\]\(|#\||@fig-|\{[#.]|\$\$", text), path.name


def test_every_public_name_is_in_the_index(site):
    page = (site / "api.html").read_text(encoding="utf-8")
    found = re.findall(r'<td><a href="([^"]*)"><code>(\w+)</code></a></td>', page)
    links = {(name, href.partition("#")[0]) for href, name in found}
    modules = [path for path in (ROOT / "memformers").glob("*.py") if not path.stem.startswith("_")]
    assert len(modules) > 30
    for path in modules:
        text = path.read_text(encoding="utf-8")
        names = re.search(r"^__all__ = (\[.*?\])", text, flags=re.DOTALL | re.MULTILINE)
        lost = {(name, f"{path.stem}.html") for name in ast.literal_eval(names[1])} - links
        assert not lost, path.stem
    memformers = ast.parse((ROOT / "memformers/__init__.py").read_text(encoding="utf-8"))
    top = [(name.name, f"{node.module}.html") for node in memformers.body
           if isinstance(node, ast.ImportFrom) for name in node.names]
    assert top and set(top) <= links


def test_source_is_folded_where_the_page_does_not_discuss_it(tmp_path):
    exported = "#| export{}\ndef {}(): pass".format
    cells = [("markdown", "# Title"), ("code", "#| default_exp at_all"), ("markdown", "Told."),
             ("code", exported("s", "told")), ("code", exported("s", "untold")),
             ("code", exported("s", "_private")), ("code", "import os"), ("code", "os.name")]
    def folds(name):
        nb = nbformat.v4.new_notebook(cells=[
            nbformat.v4.new_markdown_cell(text) if kind == "markdown"
            else nbformat.v4.new_code_cell(text) for kind, text in cells])
        path = tmp_path / "nbs" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(nb, path)
        made = NBProcessor(path, procs=[site_procs.fold_code])
        made.process()
        found = [re.search(r"code-fold: (\w+)", cell.source) for cell in made.nb.cells[3:]]
        return [fold and fold[1] for fold in found]
    assert folds("02_ground.ipynb") == ["show", "true", "true", "true", None]
    assert folds("20_mechanism.ipynb") == ["show", "show", "true", "true", None]
    assert folds("howto/page.ipynb") == ["show", "true", "true", None, None]


def test_tutorials_and_mechanisms_open_in_colab(site):
    "By a link without a picture, so that the site asks nobody; what installs there is not shown."
    button = 'href="https://colab.research.google.com/github/memformers/memformers/blob/main/nbs/'
    pages = {path.relative_to(site).as_posix(): path.read_text(encoding="utf-8")
             for path in site.rglob("*.html")}
    found = {name for name, text in pages.items() if f'<a {button}' in text}
    assert {"transformer_xl.html", "tutorials/first_memory.html"} <= found and len(found) >= 15
    assert {name for name in pages if name.startswith("tutorials/")} <= found
    assert not [name for name, text in pages.items() if "get_ipython" in text]


def test_signatures_show_no_links(site):
    for path in site.rglob("*.html"):
        code = re.findall(r"<pre class=\"sourceCode python\">.*?</pre>",
                          path.read_text(encoding="utf-8"), flags=re.DOTALL)
        assert not [block for block in code if "`](http" in re.sub("<[^>]*>", "", block)], path.name


def test_each_page_says_what_a_preview_shows(site):
    from matplotlib.image import imread
    pages, descriptions = list(site.rglob("*.html")), set()
    config = yaml.safe_load((ROOT / "_quarto.yml").read_text(encoding="utf-8"))
    address = config["website"]["site-url"]
    for path in pages:
        text = path.read_text(encoding="utf-8")
        head = dict(re.findall(r'<meta (?:name|property)="([^"]*)" content="([^"]*)">', text))
        descriptions.add(head["description"])
        assert head["description"] == head["og:description"] and head["og:title"], path
        assert head["og:url"] in (f"{address}/{path.relative_to(site).as_posix()}", f"{address}/")
        assert (site / head["og:image"].removeprefix(address + "/")).is_file()
        icon = re.search(r'<link rel="icon" href="([^"]*)">', text)[1]
        assert (path.parent / icon).is_file()
    assert len(descriptions) == len(pages)
    assert imread(site / config["website"]["image"]).shape[:2] == (630, 1200)


def test_what_quarto_is_told_to_use_is_there():
    config = yaml.safe_load((ROOT / "_quarto.yml").read_text(encoding="utf-8"))
    web, style = config["website"], config["format"]["html"]
    files = [web["favicon"], web["image"], *style["css"]]
    for mode in ("light", "dark"): files += [f for f in style["theme"][mode] if f != "default"]
    assert len(files) == 5 and not [f for f in files if not (ROOT / "nbs" / f).is_file()]


def test_quarto_and_settings_agree():
    "nbdev takes the address and the title from settings.ini, Quarto from _quarto.yml."
    settings = ConfigParser(delimiters=["="])
    settings.read(ROOT / "settings.ini", encoding="utf-8")
    settings = settings["DEFAULT"]
    config = yaml.safe_load((ROOT / "_quarto.yml").read_text(encoding="utf-8"))
    web = config["website"]
    assert web["site-url"] == settings["doc_host"] + settings["doc_baseurl"]
    assert web["repo-url"] == settings["git_url"]
    assert (web["title"], web["description"]) == (settings["title"], settings["description"])
    assert config["project"]["output-dir"] == settings["doc_path"]


def test_readme_is_in_step_with_index(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    make_readme.readme(tmp_path)
    made = {path.relative_to(tmp_path): path.read_bytes()
            for path in tmp_path.rglob("*") if path.is_file()}
    for path, content in made.items():
        assert (ROOT / path).read_bytes() == content, f"{path} is old: run `make export`"


def test_readme_links_lead_to_the_site(site):
    "A package index shows README.md too, so no link or picture in it is relative."
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    web = yaml.safe_load((ROOT / "_quarto.yml").read_text(encoding="utf-8"))["website"]
    targets, home = re.findall(r"\]\(([^)\s]+)\)", text), web["site-url"] + "/"
    pages = [target.removeprefix(home) for target in targets if target.startswith(home)]
    others = [target for target in targets if not target.startswith((home, web["repo-url"]))]
    assert len(pages) > 20 and any(page.startswith("images/") for page in pages) and not others
    for page in pages:
        path, _, anchor = page.partition("#")
        assert (site / path).is_file(), page
        assert not anchor or f'id="{anchor}"' in (site / path).read_text(encoding="utf-8"), page


def test_the_example_of_readme_runs(tmp_path, monkeypatch, capsys):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    code = next(c for c in re.findall(r"``` python\n(.*?)```", text, re.DOTALL) if "my_texts" in c)
    assert len(code.splitlines()) <= 16 and "steps=1000" in code and ", 200)" in code
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_texts").mkdir()
    for i in range(40): (tmp_path / f"my_texts/{i}.txt").write_text(f"Text {i} says {i}. " * 60)
    exec(code.replace("steps=1000", "steps=2, log_every=1").replace(", 200)", ", 5)"), names := {})
    assert "memory" in capsys.readouterr().out.lower()
    assert (tmp_path / "my_model/model.safetensors").is_file()
    assert (tmp_path / "runs/mine/model").is_dir()
    assert type(names["model"]).__name__ == "GatedDeltaNet"


def test_sample_page_renders_all_that_a_page_can_hold(small):
    page = (small() / "howto" / "sample.html").read_text(encoding="utf-8")
    assert "<title>Everything at once – memformers</title>" in page
    assert '<p class="description">A page of <code>all</code> that it can hold.</p>' in page
    assert '<a href="../index.html#second">home</a>' in page
    assert '<a href="#fig-line">Figure 1</a>' in page and "Figure 1: Bits: a line" in page
    assert 'alt="A &quot;rising&quot; line"' in page
    assert page.count("<math") == 2 and 'display="block"' in page
    note = page[page.index('class="callout note"'):page.index('class="callout tip"')]
    assert 'class="callout warning"' in note and "Nested <em>warning</em>" in note
    assert "A title with <code>code</code>" in note and "Inner text." in note
    assert '<details class="callout tip">' in page
    assert page.count('<div class="tab">') == 2
    assert "secret" not in page and "[[`'```'`]]" in html.unescape(page) and "#|" not in page


@pytest.mark.parametrize("text, message", [
    ("[x](../nothing.ipynb)", "05_sample.ipynb: ../nothing.ipynb"),
    ("[x](../index.ipynb#nowhere)", "05_sample.ipynb: ../index.html#nowhere"),
    ("![x](nothing.png)", "05_sample.ipynb: nothing.png"),
    ("see @fig-nothing", "@fig-nothing refers to no figure"),
    ("$$ \\nosuchmacro{x} $$", "nosuchmacro"),
    ("::: {.callout-note}\nnever closed", "unclosed"),
    ("[`carry`](../index.ipynb)", "nbdev links `carry` by itself"),
    ("$$ x \\tag{1} $$", "write \\qquad (1)"),
    ("[]{#a} []{#b}\n\n<i id=a></i>", "two things have the id a"),
    ("## A {#sidebar}", "two things have the id sidebar"),
])
def test_what_is_broken_fails_the_build_by_name(small, tmp_path, text, message):
    notebook(tmp_path / "nbs" / "howto" / "05_sample.ipynb", ["# Sample\n\n> Broken.", text])
    with pytest.raises(make_site.SiteError) as error: small()
    assert message in str(error.value) and "05_sample.ipynb" in str(error.value)


def test_a_page_outside_the_sidebar_fails_the_build(small, tmp_path):
    notebook(tmp_path / "nbs" / "06_lost.ipynb", ["# Lost\n\n> Nobody finds it."])
    with pytest.raises(make_site.SiteError, match="differ in 06_lost.ipynb"): small()


def test_a_failed_build_leaves_the_old_site_and_foreign_folders_alone(tmp_path, monkeypatch):
    docs = tmp_path / "docs"
    docs.mkdir()
    (docs / "mine.txt").touch()
    with pytest.raises(make_site.SiteError, match="not empty"): make_site.write_site(tmp_path, docs)
    (docs / "search-index.js").touch()
    def fail(site): raise make_site.SiteError("broken")
    monkeypatch.setattr(make_site.Site, "__init__", lambda site, root, out: None)
    monkeypatch.setattr(make_site.Site, "build", fail)
    with pytest.raises(make_site.SiteError, match="broken"): make_site.write_site(tmp_path, docs)
    left = sorted(path.name for path in tmp_path.rglob("*"))
    assert left == ["docs", "mine.txt", "search-index.js"]


# --- in a browser ------------------------------------------------------------------------------

class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args): pass


def serve(folder):
    "A server of `folder` on a free port of this machine."
    handler = functools.partial(Quiet, directory=str(folder))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server, f"http://127.0.0.1:{server.server_port}/"


@pytest.fixture(scope="module")
def browser():
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    path = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, names)), None)
    if path is None: pytest.skip("no Chromium found: `make browser` installs it")
    from playwright.sync_api import sync_playwright
    quiet = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
             "--disable-background-networking", "--disable-component-update", "--disable-sync"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=quiet)
        yield browser
        browser.close()


@pytest.fixture
def look(browser):
    "look(folder, width) serves a site and gives a page, its address, and a list of its complaints."
    servers = []
    def open_site(folder, width=1280, **options):
        server, address = serve(folder)
        servers.append(server)
        complaints = []
        page = browser.new_page(viewport={"width": width, "height": 800}, **options)
        page.set_default_timeout(10_000)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", lambda m: m.type == "error" and complaints.append(m.text))
        page.on("requestfailed", lambda request: request.failure != "net::ERR_ABORTED"  # by a click
                and complaints.append(f"failed: {request.url}"))
        page.on("response", lambda r: r.status >= 400 and complaints.append(f"{r.status}: {r.url}"))
        page.on("request", lambda r: r.url.startswith((address, "data:"))
                or complaints.append(f"leaves the site: {r.url}"))
        return page, address, complaints
    yield open_site
    for server in servers: server.shutdown()


LOOK = """() => {
  const all = (selector) => [...document.querySelectorAll(selector)];
  const ids = all("[id]").map((e) => e.id);
  return {
    hidden: all("img").filter((image) => !image.naturalWidth).length,
    small: all("main figure img").filter((image) =>
      image.clientWidth < 0.8 * Math.min(image.naturalWidth, 640)).length,
    wide: document.documentElement.scrollWidth - window.innerWidth,
    clipped: all("pre").filter((e) => e.scrollWidth > e.clientWidth + 1).length,
    twice: ids.filter((id, i) => ids.indexOf(id) < i),
    stuck: all("main p, main table").filter((e) => e.scrollWidth > e.clientWidth + 1
      && getComputedStyle(e).overflowX !== "auto").length,
    maths: all("math").length, code: all("pre").length,
  };
}"""


@pytest.mark.parametrize("width", [1280, 390])
def test_every_page_shows_its_pictures_and_fits_the_screen(site, look, width):
    "Code wraps, tables and formulas scroll by themselves, the letters of a figure keep their size."
    page, address, complaints = look(site, width)
    maths, code = 0, 0
    for path in sorted(site.rglob("*.html")):
        name = path.relative_to(site).as_posix()
        page.goto(address + name)
        seen = page.evaluate(LOOK)
        maths, code = maths + seen.pop("maths"), code + seen.pop("code")
        assert seen.pop("wide") <= 0, f"{name} is wider than a screen of {width} px"
        assert not any(seen.values()), (name, seen)
    assert maths > 0 and code > 1000 and not complaints


def test_code_of_100_columns_fits_without_wrapping(site, look):
    page, address, complaints = look(site, 1280 - 15)  # what a scroll bar leaves
    page.goto(address + "transformer_xl.html")
    block = page.locator("div.sourceCode:visible code").first
    one = block.evaluate("code => (code.textContent = 'm', code.getClientRects()[0].height)")
    for columns, lines in ((100, 1), (200, 2)):
        wrapped = block.evaluate("(code, n) => { code.textContent = 'm'.repeat(n); "
                                 "return code.getBoundingClientRect().height; }", columns)
        assert round(wrapped / one) == lines


CONTRAST = """() => {
  const parts = (text) => {
    const numbers = text.match(/[\\d.]+/g).map(Number);
    return text.startsWith("color(") ? numbers.map((n, i) => (i < 3 ? 255 * n : n)) : numbers;
  };
  const light = (rgb) => [0.2126, 0.7152, 0.0722].reduce((sum, share, i) => {
    const value = rgb[i] / 255;
    return sum + share * (value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4);
  }, 0);
  const ground = (e) => {
    for (; e; e = e.parentElement) {
      const colour = parts(getComputedStyle(e).backgroundColor);
      if ((colour[3] ?? 1) > 0.99) return colour;
    }
    return [255, 255, 255];
  };
  document.querySelectorAll(".anchor, .copy").forEach((e) => { e.style.opacity = 1; });
  const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT), poor = [];
  let count = 0;
  while (texts.nextNode()) {
    const e = texts.currentNode.parentElement, text = texts.currentNode.data.trim();
    if (!text || e.closest("script, style")) continue;
    if (!e.checkVisibility({ opacityProperty: true })) continue;
    const style = getComputedStyle(e), a = light(parts(style.color)), b = light(ground(e));
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    const size = parseFloat(style.fontSize);
    const large = size >= 24 || (size >= 18.66 && style.fontWeight >= 700);
    if (ratio < (large ? 3 : 4.5)) poor.push([e.className, text.slice(0, 30), ratio]);
    count += 1;
  }
  return [count, poor];
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_letter_has_contrast(site, look, scheme):
    "At least 4.5 to 1, and 3 to 1 for large letters: WCAG 2, level AA."
    page, address, complaints = look(site, color_scheme=scheme)
    for name in ("index.html", "transformer_xl.html", "api.html", "tutorials/first_memory.html"):
        page.goto(address + name)
        count, poor = page.evaluate(CONTRAST)
        assert count > 100 and not poor, (name, poor[:5])
    assert not complaints


def ground(page):
    "How light the ground of a page is, from 0 to 255."
    color = page.evaluate("getComputedStyle(document.body).backgroundColor")
    return sum(map(int, re.findall(r"\d+", color)[:3])) / 3


def test_dark_mode_follows_the_system_and_the_button(site, look):
    for scheme, dark in (("light", False), ("dark", True)):
        page, address, complaints = look(site, color_scheme=scheme)
        page.goto(address)
        assert (ground(page) < 64) == dark
        picture = page.locator("main img").first.evaluate(
            "image => getComputedStyle(image).backgroundColor")
        assert picture == "rgb(255, 255, 255)"  # on which the figures are drawn
        page.click(".theme")
        assert (ground(page) < 64) != dark
        page.goto(address + "memory.html")
        assert (ground(page) < 64) != dark, "the choice holds for the next page"
        page.click(".theme")
        assert (ground(page) < 64) == dark and not complaints


def test_formulas_use_the_font_that_comes_with_the_site(site, look):
    page, address, complaints = look(site)
    used = set()
    for name in ("transformer_xl.html", "explanation/notation.html", "memorizing.html"):
        page.goto(address + name)
        page.evaluate("document.fonts.ready.then(() => true)")
        ask = page.context.new_cdp_session(page).send
        ask("DOM.enable"), ask("CSS.enable")
        root = ask("DOM.getDocument")["root"]["nodeId"]
        nodes = ask("DOM.querySelectorAll", {"nodeId": root, "selector": "mi, mo, mn"})["nodeIds"]
        assert nodes
        for node in nodes[:60]:
            fonts = ask("CSS.getPlatformFontsForNode", {"nodeId": node})["fonts"]
            used |= {(font["familyName"], font["isCustomFont"]) for font in fonts}
    assert used == {("Memformers Math", True)} and not complaints


def test_code_is_copied_as_it_is_written(site, look):
    page, address, complaints = look(site)
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.goto(address + "tutorials/first_memory.html")
    block = page.locator("div.sourceCode:visible").first
    block.hover()
    block.locator(".copy").click()
    page.wait_for_selector("text=Copied")
    code = block.locator("code").evaluate("code => code.textContent")
    assert page.evaluate("navigator.clipboard.readText()") == code
    assert code.count("\n") > 1 and "\n\n\n" not in code and not complaints


def test_one_finds_ones_way(site, look):
    page, address, complaints = look(site)
    page.goto(address)
    page.click(".sidebar >> text=Transformer-XL")
    assert page.url.endswith("/transformer_xl.html")
    here = page.locator(".sidebar [aria-current=page]").inner_text()
    assert here == page.locator("h1").inner_text()
    page.click(".neighbours .previous")
    page.click(".neighbours .next")
    assert page.url.endswith("/transformer_xl.html")
    page.goto(address + "explanation/notation.html")
    page.click(".bar .brand")
    assert page.url.endswith("/index.html") and not complaints


def test_search_finds_a_page(site, look):
    page, address, complaints = look(site)
    page.goto(address + "explanation/notation.html")
    page.keyboard.press("/")
    page.keyboard.type("load_memory")
    page.wait_for_selector(".results a")
    page.keyboard.press("Enter")
    page.wait_for_url("**/files.html#load_memory")
    for words, href in (("resume", "howto/resume.html"), ("tokenizer", "howto/own_tokenizer.html"),
                        ("carry", "memory.html#carry"), ("Transformer-XL", "transformer_xl.html")):
        page.fill(".search input", words)
        page.wait_for_function("text => document.querySelector('.results mark')"
                               "?.textContent.toLowerCase() === text", arg=words.lower())
        first = page.locator(".results a").first.get_attribute("href")
        assert first.removeprefix("../").startswith(href), words
    page.fill(".search input", "nosuchword")
    page.wait_for_selector("text=Nothing found.")
    assert not complaints


def test_menu_on_a_narrow_screen(site, look):
    page, address, complaints = look(site, width=390)
    page.goto(address)
    assert not page.locator(".sidebar").is_visible()
    page.click(".menu")
    page.click(".sidebar >> text=Transformer-XL")
    assert page.url.endswith("/transformer_xl.html") and not complaints


def test_tabs_and_folded_callouts_open(small, look):
    page, address, complaints = look(small())
    page.goto(address + "howto/sample.html")
    assert page.locator("text=Loops.").is_visible()
    page.click("role=tab >> text=At once")
    assert page.locator("text=One product.").is_visible()
    assert not page.locator("text=Loops.").is_visible()
    assert not page.locator("text=Hidden text.").is_visible()
    page.click("summary:has-text('Folded')")
    assert page.locator("text=Hidden text.").is_visible()
    assert page.locator("math").first.bounding_box()["height"] > 5 and not complaints
