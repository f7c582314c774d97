"Everything about the distribution is read from `settings.ini`; only its name stands here."
import shlex
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
# The name `memformers` on the package index belongs to another project.
DISTRIBUTION = "torch-memformers"
STATUS = {"1": "1 - Planning", "2": "2 - Pre-Alpha", "3": "3 - Alpha", "4": "4 - Beta",
          "5": "5 - Production/Stable"}

parser = ConfigParser(delimiters=["="])
parser.read(HERE / "settings.ini", encoding="utf-8")
cfg = parser["DEFAULT"]


def requirements(key): return shlex.split(cfg.get(key, ""))


extras = {key.removesuffix("_requirements"): requirements(key)
          for key in cfg if key.endswith("_requirements")}

setup(
    name=DISTRIBUTION,
    version=cfg["version"],
    description=cfg["description"],
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    keywords=cfg["keywords"],
    author=cfg["author"],
    author_email=cfg["author_email"],
    url=cfg["git_url"],
    project_urls={"Documentation": cfg["doc_host"] + cfg["doc_baseurl"]},
    license="MIT",
    license_files=["LICENSE"],
    classifiers=[
        "Development Status :: " + STATUS[cfg["status"]],
        "Intended Audience :: " + cfg["audience"],
        "Natural Language :: " + cfg["language"],
        "Programming Language :: Python :: 3",
        *(f"Programming Language :: Python :: {version}" for version in cfg["pythons"].split()),
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    packages=find_packages(include=["memformers", "memformers.*"]),
    include_package_data=True,
    python_requires=">=" + cfg["min_python"],
    install_requires=requirements("requirements"),
    extras_require=extras,
    entry_points={"console_scripts": cfg["console_scripts"].split(),
                  "nbdev": ["memformers=memformers._modidx:d"]},
    zip_safe=False,
)
