"""nbs/assets/preview.png: what a link to the site shows elsewhere. Needs Chromium (`make browser`).

    python tools/make_preview.py
"""
import html
import os
import shutil
from configparser import ConfigParser
from pathlib import Path

from playwright.sync_api import sync_playwright

ROOT = Path(__file__).resolve().parent.parent
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
PAGE = """<body style="margin: 0; height: 630px; background: #fff; color: #1d2329; display: flex;
flex-direction: column; justify-content: center; gap: 40px; padding: 0 60px; box-sizing: border-box;
font-family: 'DejaVu Sans', sans-serif"><div><b style="font-size: 64px">{title}</b>
<p style="font-size: 30px; line-height: 1.35; margin: 16px 0 0; color: #56606b">{text}</p></div>
<img src="{picture}" style="max-height: 330px; max-width: 1080px; object-fit: contain"></body>"""


def make(target):
    "Draw the title, the description and the first figure of the start page."
    settings = ConfigParser(delimiters=["="])
    settings.read(ROOT / "settings.ini", encoding="utf-8")
    settings = settings["DEFAULT"]
    title, description = (html.escape(settings[key]) for key in ("title", "description"))
    text = PAGE.format(title=title, text=description,
                       picture=(ROOT / "nbs/images/index-1.svg").as_uri())
    page = target.with_suffix(".html")  # a file, so that it may show another file
    page.write_text(text, encoding="utf-8")
    path = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)))
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        tab = browser.new_page(viewport={"width": 1200, "height": 630})
        tab.goto(page.as_uri())
        tab.screenshot(path=target)
    page.unlink()


if __name__ == "__main__":
    make(ROOT / "nbs/assets/preview.png")
