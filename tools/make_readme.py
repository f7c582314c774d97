"""README.md from nbs/index.ipynb, with its pictures in nbs/images/."""
import os
import re
import sys
from pathlib import Path

from pages import Page, SiteError, pandoc, save_to, to_markdown

ROOT = Path(__file__).resolve().parent.parent


def plain_picture(path, options, size):
    "A figure that any markdown shows: the caption stands below."
    return f'![{options.get("fig-alt", "")}]({path})\n\n*{options.get("fig-cap", "")}*'


def readme(folder):
    "Write README.md and its pictures below `folder`."
    page = Page(ROOT / "nbs", "index.ipynb")
    for old in (folder / "nbs" / "images").glob("index-*"): old.unlink()
    markdown = to_markdown(page, save_to(folder, "nbs/images/index"), plain_picture)
    body = pandoc(markdown, "--from=markdown-smart-implicit_figures", "--to=gfm")
    body = body.replace("``` output", "```")
    body = re.sub(r"\[(`[^`]+`)\]\(https?:[^)]*\)", r"\1", body)  # nbdev's links into the site
    body = re.sub(r"\]\(([\w/-]+\.ipynb)", r"](nbs/\1", body)  # README.md stands one folder higher
    note = "<!-- Made from nbs/index.ipynb by `make export`. Edit the notebook. -->"
    text = f"{note}\n\n# {page.title}\n\n> {page.description}\n\n{body}"
    (folder / "README.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    os.chdir(ROOT)  # where nbdev finds settings.ini
    sys.path.insert(0, str(ROOT))
    try: readme(ROOT)
    except SiteError as error: sys.exit(f"README.md was not written. {error}")
