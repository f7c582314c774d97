"""README.md from nbs/index.ipynb, with its pictures in nbs/images/."""
import os
import re
import sys
from pathlib import Path

import yaml
from nbdev.frontmatter import _nbpath2html
from pages import Page, SiteError, pandoc, save_to, to_markdown

ROOT = Path(__file__).resolve().parent.parent


SITE = yaml.safe_load((ROOT / "_quarto.yml").read_text(encoding="utf-8"))["website"]["site-url"]


def plain_picture(path, options, size):
    "A figure that any markdown shows: the caption stands below."
    path = f"{SITE}/{path.removeprefix('nbs/')}"
    return f'![{options.get("fig-alt", "")}]({path})\n\n*{options.get("fig-cap", "")}*'


def on_site(link):
    "A link to a notebook as one to its page on the site: README.md is shown elsewhere too."
    return f"]({SITE}/{_nbpath2html(Path(link[1])).as_posix()}"


def readme(folder):
    "Write README.md and its pictures below `folder`."
    page = Page(ROOT / "nbs", "index.ipynb")
    for old in (folder / "nbs" / "images").glob("index-*"): old.unlink()
    markdown = to_markdown(page, save_to(folder, "nbs/images/index"), plain_picture)
    body = pandoc(markdown, "--from=markdown-smart-implicit_figures", "--to=gfm")
    body = body.replace("``` output", "```")
    body = re.sub(r"\[(`[^`]+`)\]\(https?:[^)]*\)", r"\1", body)  # nbdev's links into the site
    body = re.sub(r"\]\(([\w/-]+\.ipynb)", on_site, body)
    note = "<!-- Made from nbs/index.ipynb by `make export`. Edit the notebook. -->"
    text = f"{note}\n\n# {page.title}\n\n> {page.description}\n\n{body}"
    (folder / "README.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    os.chdir(ROOT)  # where nbdev finds settings.ini
    sys.path.insert(0, str(ROOT))
    try: readme(ROOT)
    except SiteError as error: sys.exit(f"README.md was not written. {error}")
