"""The site that _quarto.yml describes, made with pandoc: for machines without Quarto.

    python tools/make_site.py _docs
"""
import html
import json
import os
import posixpath
import re
import shutil
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from html.parser import HTMLParser
from pathlib import Path
from string import Template

import yaml
from pages import ASSETS, Page, SiteError, pandoc, save_to, to_markdown

ROOT = Path(__file__).resolve().parent.parent


def is_external(target):
    "Does a link leave the site?"
    return re.match(r"[a-z][a-z0-9+.-]*:|//", target) is not None


def is_hidden(path):
    "Does a file, or a folder that it is in, begin with a dot or an underscore?"
    return any(part.startswith((".", "_")) for part in path.parts)


class Outline(HTMLParser):
    "What a page refers to, what can be referred to in it, and its text by section."

    def __init__(self, body):
        super().__init__()
        self.targets, self.ids, self.twice, self.sections = [], set(), set(), []
        self.heading, self.skip = None, 0
        self.begin("", 1)
        self.feed(body)

    def begin(self, anchor, level):
        self.sections.append({"anchor": anchor, "level": level, "title": "", "text": ""})

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        if "id" in attributes:
            (self.twice if attributes["id"] in self.ids else self.ids).add(attributes["id"])
        self.targets += [attributes[key] for key in ("href", "src") if attributes.get(key)]
        if re.fullmatch("h[1-6]", tag) and "id" in attributes:
            self.heading = tag
            self.begin(attributes["id"], int(tag[1]))
        self.skip += tag == "annotation"  # the TeX source inside MathML

    def handle_endtag(self, tag):
        self.skip -= tag == "annotation"
        if tag == self.heading: self.heading = None

    def handle_data(self, text):
        if not self.skip: self.sections[-1]["title" if self.heading else "text"] += text

    def contents(self, depth):
        "The table of contents."
        items = [f'<li class="level{s["level"]}"><a href="#{s["anchor"]}">'
                 f'{html.escape(s["title"])}</a></li>'
                 for s in self.sections[1:] if s["level"] <= depth]
        return "<ul>" + "".join(items) + "</ul>" if items else ""


FRAME_IDS = {"page-text", "sidebar"}  # of page.html
GUIDES = ("Tutorials", "How to")  # sections of the sidebar whose pages a search shows first


def reading_order(entries):
    "The notebooks of the sidebar, one after the other."
    for entry in entries:
        if isinstance(entry, str): yield entry
        elif "section" in entry: yield from reading_order(entry["contents"])
        else: yield entry["href"]


class Site:
    "All pages of the notebooks in `root`/nbs, rendered into the empty folder `out`."

    def __init__(self, root, out):
        self.nbs, self.out, self.errors = root / "nbs", out, []
        config = yaml.safe_load((root / "_quarto.yml").read_text(encoding="utf-8"))
        self.web, self.style = config["website"], config["format"]["html"]
        self.entries = self.web["sidebar"]["contents"]
        self.order = list(reading_order(self.entries))
        self.guides = {source for entry in self.entries if not isinstance(entry, str)
                       and entry.get("section") in GUIDES
                       for source in reading_order(entry["contents"])}
        found = (path.relative_to(self.nbs) for path in self.nbs.rglob("*.ipynb"))
        sources = {path.as_posix() for path in found if not is_hidden(path)}
        if sources != set(self.order):
            raise SiteError("The sidebar of _quarto.yml and nbs/ differ in "
                            + ", ".join(sorted(sources ^ set(self.order))))
        self.pages = {source: Page(self.nbs, source) for source in self.order}

    def build(self):
        "Write the site."
        self.copy_assets()
        with ThreadPoolExecutor() as pool: bodies = list(pool.map(self.render, self.pages.values()))
        self.ids = {page.href: Outline(body).ids for page, body in zip(self.pages.values(), bodies)}
        self.outlines = {}
        for page, body in zip(self.pages.values(), bodies):
            body = self.relink(page, body)
            self.outlines[page] = Outline(body)
            self.write_page(page, body)
        self.write_search()
        # A page that failed has no anchors: what leads there is not to blame.
        self.errors = self.errors or [
            *(f"{place} leads nowhere" for place in self.broken_links()),
            *(f"{page.source}: two things have the id {id}"
              for page, outline in self.outlines.items()
              for id in outline.twice | outline.ids & FRAME_IDS)]
        if self.errors: raise SiteError("\n".join(self.errors))

    def copy_assets(self):
        "The style, the script, and whatever stands in nbs/ beside the notebooks."
        for name in ("site.css", "site.js"): shutil.copy(ASSETS / name, self.out)
        for path in self.nbs.rglob("*"):
            relative = path.relative_to(self.nbs)
            if not path.is_file() or is_hidden(relative): continue
            if path.suffix in (".ipynb", ".yml", ".scss"): continue
            (self.out / relative).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, self.out / relative)

    def render(self, page):
        "The text of a page as HTML; its pictures are written beside it."
        save = save_to(self.out / page.folder, f"{Path(page.href).stem}_files/figure")
        try:
            return pandoc(to_markdown(page, save), "--from=markdown", "--to=html", "--mathml")
        except SiteError as error:
            self.errors.append(f"{page.source}: {error}")
            return ""

    def relink(self, page, body):
        "Point links at notebooks, and links at the published site, to the pages of this one."
        def new(match):
            target, hash, anchor = html.unescape(match[1]).partition("#")
            if target.startswith(self.web["site-url"]):
                # nbdev links every name of the package, whether the page shows it or not.
                path = target[len(self.web["site-url"]):].lstrip("/") or "index.html"
                known = self.ids.get(path, ())
                anchor = next((a for a in (anchor, anchor.split(".")[0]) if a in known), "")
                target, hash = page.top + path, "#" if anchor else ""
            elif target.endswith(".ipynb") and not is_external(target):
                source = posixpath.normpath(posixpath.join(page.folder, target))
                if source in self.pages: target = page.top + self.pages[source].href
            return f'href="{html.escape(target + hash + anchor)}"'
        return re.sub(r'href="([^"]*)"', new, body)

    def link(self, page, entry, classes=""):
        "A link from `page` to what an entry of _quarto.yml names."
        if isinstance(entry, str): entry = {"href": entry}
        href, there = entry["href"], self.pages.get(entry["href"])
        if not there and not is_external(href):
            raise SiteError(f"_quarto.yml names {href}, which is not in nbs/")
        text = html.escape(entry.get("text") or there.title)
        here = ' aria-current="page"' if href == page.source else ""
        href = page.top + there.href if there else href
        return f'<a href="{href}" class="{classes}"{here}>{text}</a>'

    def sidebar(self, page, entries):
        "The list of pages, section by section."
        items = []
        for entry in entries:
            if "section" in entry and not isinstance(entry, str):
                title = f'<span class="section">{html.escape(entry["section"])}</span>'
                items.append(title + self.sidebar(page, entry["contents"]))
            else:
                items.append(self.link(page, entry))
        return "<ul>" + "".join(f"<li>{item}</li>" for item in items) + "</ul>"

    def neighbours(self, page):
        "Links to the page before and the page after."
        place = self.order.index(page.source)
        before, after = self.order[:place][-1:], self.order[place + 1:][:1]
        return "".join([self.link(page, source, "previous") for source in before]
                       + [self.link(page, source, "next") for source in after])

    def write_page(self, page, body):
        "Put the text into its frame."
        bar = {side: "".join(self.link(page, entry) for entry in self.web["navbar"].get(side, []))
               for side in ("left", "right")}
        frame = Template((ASSETS / "page.html").read_text(encoding="utf-8"))
        site, title, address = self.web["title"], page.title, self.web["site-url"]
        styles = [f'<link rel="stylesheet" href="{page.top}{path}">' for path in self.style["css"]]
        text = frame.substitute(
            bar, site=html.escape(site), title=html.escape(title), top=page.top,
            heading=html.escape(title if title == site else f"{title} – {site}"),
            url=f"{address}/{page.href.removesuffix('index.html')}",
            image=f'{address}/{self.web["image"]}', favicon=self.web["favicon"],
            styles="\n".join(styles),
            description=html.escape(page.description or self.web["description"]),
            subtitle=page.subtitle,
            sidebar=self.sidebar(page, self.entries),
            contents=self.outlines[page].contents(self.style["toc-depth"]),
            source=f'{self.web["repo-url"]}/blob/main/{self.web["repo-subdir"]}/{page.source}',
            body=body, neighbours=self.neighbours(page))
        (self.out / page.folder).mkdir(parents=True, exist_ok=True)
        (self.out / page.href).write_text(text, encoding="utf-8")

    def write_search(self):
        "The text of the site by section, as a script: so that search works from a folder too."
        index = [[page.href + "#" * bool(s["anchor"]) + s["anchor"], page.title, s["title"],
                  " ".join(s["text"].split()), int(page.source in self.guides)]
                 for page, outline in self.outlines.items() for s in outline.sections]
        text = json.dumps(index, ensure_ascii=False, separators=(",", ":"))
        path = self.out / "search-index.js"
        path.write_text(f"window.searchIndex = {text};\n", encoding="utf-8")

    def broken_links(self):
        "Every link that leads nowhere, as 'notebook: target'."
        for page, outline in self.outlines.items():
            for target in outline.targets:
                if is_external(target): continue
                path, _, anchor = target.partition("#")
                path = posixpath.normpath(posixpath.join(page.folder, path)) if path else page.href
                lost = anchor and anchor not in self.ids.get(path, ())
                if lost or not (self.out / path).is_file(): yield f"{page.source}: {target}"


def write_site(root, out):
    "Build beside `out` and take its place once the site is whole."
    if out.exists() and any(out.iterdir()) and not (out / "search-index.js").exists():
        raise SiteError(f"{out} is not empty and holds no site of mine: name another folder")
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".site-") as folder:
        new = Path(folder) / "new"
        new.mkdir()
        Site(root, new).build()
        shutil.rmtree(out, ignore_errors=True)
        new.rename(out)


if __name__ == "__main__":
    if len(sys.argv) != 2: sys.exit(__doc__)
    out = Path(sys.argv[1]).resolve()
    os.chdir(ROOT)  # where nbdev finds settings.ini
    sys.path.insert(0, str(ROOT))
    try: write_site(ROOT, out)
    except SiteError as error: sys.exit(f"The site was not built. {error}")
