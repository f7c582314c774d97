"""What `data` and `tasks` promise: nothing dropped, nothing leaked, nothing half-written read."""
import errno
import hashlib
import http.server
import io
import json
import os
import pickle
import sys
import threading
import time
import types
import warnings
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from memformers import data, tasks
from memformers.data import (ByteTokenizer, Corpus, DocumentStream, Segment, dataset_rows, enwik8,
                             hugging_face, load_corpus, stdlib, text_files, token_ids)
from memformers.tasks import (RecallTask, TaskStream, copy_task, dots, key_value_task, passkey_task,
                              program_task, sentences)

quick = settings(max_examples=60, deadline=None, database=None, derandomize=True,
                 suppress_health_check=[HealthCheck.function_scoped_fixture])

# ---------------------------------------------------------------------------------------- helpers

def make_corpus(lengths, seed=0):
    "A corpus of random bytes with documents of these lengths."
    rng = np.random.default_rng(seed)
    return Corpus("made up", tuple(f"d{i}" for i in range(len(lengths))),
                  [rng.integers(0, 256, n, dtype=np.uint8) for n in lengths])

def quiet_stream(*args, **kwargs):
    "A DocumentStream without the warning about few documents."
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return DocumentStream(*args, **kwargs)

def fields(segment): return [segment.tokens, segment.labels, segment.start, segment.mask,
                             segment.loss_mask]

def same(a, b): return all(x.dtype == y.dtype and torch.equal(x, y)
                           for x, y in zip(fields(a), fields(b), strict=True))

def read_back(segments, batch_size):
    "The documents that the rows read, each as bytes, put together from inputs and labels alone."
    documents = []
    for row in range(batch_size):
        for segment in segments:
            mask = segment.mask[row]
            if segment.start[row]: documents.append([int(segment.tokens[row, 0])])
            if mask.any(): documents[-1] += segment.labels[row, mask].tolist()
    return [bytes(document) for document in documents]

lengths = st.lists(st.integers(2, 40), min_size=1, max_size=12)
shapes = dict(lengths=lengths, batch_size=st.integers(1, 5), seq_len=st.integers(1, 17),
              seed=st.none() | st.integers(0, 3))

# -------------------------------------------------------------------------------------- tokenizer

@given(st.text())
@quick
def test_tokenizer_gives_text_back(text):
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode(text)
    assert ids.dtype == torch.int64 and ids.shape == (len(text.encode()),)
    assert tokenizer.decode(ids) == text == tokenizer.decode(ids.tolist())

def test_tokenizer_takes_bytes_and_arrays_and_replaces_what_is_no_text():
    tokenizer = ByteTokenizer()
    assert tokenizer.encode(b"\xff\x00").tolist() == [255, 0]
    assert tokenizer.decode(np.frombuffer(b"a\xff", np.uint8)) == "a\ufffd"
    assert tokenizer.num_tokens == 256

@pytest.mark.parametrize("ids", [[256], [-1], [[1, 2]], [[1], [2, 3]], [1.5], ["a"], 65, "text"])
def test_tokenizer_refuses_what_is_no_token(ids):
    with pytest.raises((ValueError, TypeError), match="ids: expected"): ByteTokenizer().decode(ids)

@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_bytes_come_as_any_integers(dtype):
    ids = torch.tensor([99, 97, 116], dtype=dtype)
    for given in (ids, ids.numpy(), ids.tolist(), tuple(ids.tolist()), bytearray(b"cat"), b"cat"):
        assert ByteTokenizer().decode(given) == "cat"
        assert bytes(Corpus("c", ("x",), [given])[0]) == b"cat"
    assert bytes(Corpus("c", ("x",), [range(250, 256)])[0]) == bytes(range(250, 256))
    assert ByteTokenizer().decode([]) == ""
    assert ByteTokenizer().encode("\udcff").tolist()   # what a shell may hand over

def test_tokenizer_refuses_what_is_no_text():
    with pytest.raises(TypeError, match="text: expected str"): ByteTokenizer().encode(5)

# ---------------------------------------------------------------------------------------- corpora

@given(lengths=lengths, most=st.integers(2, 50))
@quick
def test_cut_drops_nothing_and_leaves_no_piece_without_a_label(lengths, most):
    corpus = make_corpus(lengths)
    cut = corpus.cut(most)
    assert all(2 <= len(piece) <= most + 1 for piece in cut)
    assert b"".join(map(bytes, cut)) == b"".join(map(bytes, corpus))
    assert cut.num_bytes == corpus.num_bytes
    for name, document in zip(corpus.names, corpus.documents):
        whole = [piece for title, piece in zip(cut.names, cut.documents)
                 if title.split("[")[0] == name]
        assert bytes(document) == b"".join(map(bytes, whole))

def test_cut_names_pieces_and_leaves_short_documents_alone():
    corpus = Corpus("c", ("long", "short", "tail"), [b"abcdefgh", b"abc", b"abcd"]).cut(3)
    assert corpus.names == ("long[0]", "long[1]", "long[2]", "short", "tail")
    assert [bytes(d) for d in corpus] == [b"abc", b"def", b"gh", b"abc", b"abcd"]

def test_corpus_is_found_by_position_and_name_and_shows_itself():
    corpus = Corpus("c", ("x", "y"), [b"abc", b"defg"], skipped=(("z", "empty"),))
    assert bytes(corpus[1]) == bytes(corpus["y"]) == b"defg" and len(corpus) == 2
    assert corpus.take(1).names == ("x",) and corpus.take(9).names == ("x", "y")
    for word in ("c:", "2 documents", "1 skipped"): assert word in repr(corpus)
    with pytest.raises(KeyError, match="no document is called 'z'"): corpus["z"]
    with pytest.raises(IndexError): corpus[2]

def test_manifest_tells_contents_names_and_order_apart():
    documents = [b"abc", b"abd"]
    base = Corpus("c", ("x", "y"), documents)
    others = [Corpus("c", ("x", "z"), documents), Corpus("c", ("x", "y"), [b"abc", b"abe"]),
              Corpus("c", ("y", "x"), documents), Corpus("c", ("x", "y"), documents[::-1])]
    prints = [corpus.manifest()["sha256"] for corpus in (base, *others)]
    assert len(set(prints)) == len(prints)
    assert Corpus("other name", ("x", "y"), documents).fingerprint == base.fingerprint
    manifest = json.loads(json.dumps(base.manifest()))
    assert manifest["files"][0] == ["x", 3, hashlib.sha256(b"abc").hexdigest()[:16]]
    assert (manifest["documents"], manifest["bytes"]) == (2, 6)

@pytest.mark.parametrize("names, documents, error", [
    (("a",), [b"x"], ValueError), ((), [], ValueError), (("a", "a"), [b"xy", b"zw"], ValueError),
    (("a",), [b"xy", b"zw"], ValueError), (("a",), [np.zeros((2, 2), np.uint8)], TypeError),
    (("a",), [np.array([1, 256])], ValueError), (("a",), [[-1, 3]], ValueError),
    (("a",), [np.zeros(4)], TypeError), (("a",), [np.ones(4, bool)], TypeError),
    (("a",), ["text"], TypeError), (("a",), b"xy", TypeError), (("a",), None, TypeError)])
def test_corpus_refuses_what_no_stream_can_read(names, documents, error):
    with pytest.raises(error, match="documents: expected"): Corpus("c", names, documents)

@pytest.mark.parametrize("call", [lambda c: c.cut(1), lambda c: c.cut(2.5), lambda c: c.take(0)])
def test_corpus_refuses_sizes_that_make_no_sense(call):
    with pytest.raises((ValueError, TypeError), match="expected"): call(make_corpus([5]))

def test_stdlib_is_split_by_name_without_overlap_and_leaves_tests_out():
    corpora = {split: stdlib(split) for split in ("train", "valid", "test")}
    names = [name for corpus in corpora.values() for name in corpus.names]
    assert len(names) == len(set(names)) > 200
    assert len(corpora["train"]) > 8 * len(corpora["valid"]) and len(corpora["test"]) >= 5
    assert all(list(corpus.names) == sorted(corpus.names) for corpus in corpora.values())
    folders = {part for name in names for part in name.split("/")[:-1]}
    assert not folders & {"test", "tests", "idlelib", "lib2to3", "encodings", "site-packages"}
    assert all(data._split_of(name) == split for split, corpus in corpora.items()
               for name in corpus.names)
    assert sys.version.split()[0] in corpora["train"].manifest()["source"]
    assert stdlib("valid").manifest() == corpora["valid"].manifest()
    assert set(stdlib(None).names) == set(names) and stdlib(None).name == "stdlib"
    assert len(stdlib("valid", valid=.3)) > 4 * len(corpora["valid"])

def test_split_of_a_name_never_changes():
    splits = [data._split_of(f"{i}.py") for i in (0, 8, 13, 14)]
    assert splits == ["train", "test", "valid", "valid"]

@pytest.mark.parametrize("load", [stdlib, enwik8, lambda split: text_files(".", split)])
def test_unknown_split_is_refused(load):
    with pytest.raises(ValueError, match="split: expected one of"): load("dev")

def test_stdlib_without_source_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setattr(data.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(FileNotFoundError, match="text_files"): stdlib()

# -------------------------------------------------------------------------------------- token ids

@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.int64, np.uint64])
def test_ids_of_any_vocabulary_stay_as_they_are(dtype):
    ids = np.array([70, 299, 0], dtype)
    corpus = Corpus("c", ("a",), [ids], num_tokens=300)
    assert corpus[0] is ids and corpus.num_bytes is None and "3 tokens of 300" in repr(corpus)
    assert corpus.fingerprint == Corpus("c", ("a",), [[70, 299, 0]], num_tokens=300).fingerprint
    assert corpus.fingerprint != Corpus("c", ("a",), [[70, 298, 0]], num_tokens=300).fingerprint
    segment = next(quiet_stream(corpus, 1, 4))
    assert segment.tokens.tolist() == [[70, 299, 0, 0]] or segment.tokens[0, :2].tolist() == [70, 299]
    assert segment.labels[0, :2].tolist() == [299, 0] and int(segment.mask.sum()) == 2
    manifest = json.loads(json.dumps(corpus.manifest()))
    assert (manifest["tokens"], manifest["num_tokens"], manifest["bytes"]) == (3, 300, None)

def test_every_other_byte_of_an_array_is_a_document_too():
    text = np.frombuffer(b"a-b-c-", np.uint8)[::2]
    assert Corpus("c", ("a",), [text]).fingerprint == Corpus("c", ("a",), [b"abc"]).fingerprint

def test_a_long_document_is_hashed_in_parts_as_in_one():
    ids = np.arange((1 << 20) + 5) % 1000
    assert data._digest(ids, 1000) == hashlib.sha256(ids.astype("<i8").tobytes()).hexdigest()

@given(sizes=st.lists(st.integers(2, 300), min_size=1, max_size=5), top=st.integers(1, 70_000))
@quick
def test_ids_are_held_out_without_loss(sizes, top):
    rng = np.random.default_rng(0)
    ids = [rng.integers(0, top, size) for size in sizes]
    parts = {}
    for split in data._SPLITS:
        try: parts[split] = token_ids(ids, split, .2, .2, num_tokens=70_000)
        except ValueError as error: assert "too few" in str(error)
    if {data._split_of(str(i), .2, .2) for i in range(len(ids))} == set(data._SPLITS):
        return   # whole documents
    joined = [np.concatenate([p[n] for p in parts.values() for n in p.names if n.split("[")[0] == str(i)]
                             or [[]]) for i in range(len(ids))]
    for whole, found in zip(ids, joined):
        assert found.tolist() == whole.tolist() or len(whole) < 10
    if min(sizes) >= 10: assert set(parts) == set(data._SPLITS)

def test_ids_come_as_one_document_or_several_and_know_their_vocabulary():
    for one in ([5, 6, 700], np.array([5, 6, 700]), torch.tensor([5, 6, 700])):
        corpus = token_ids(one)
        assert (len(corpus), corpus.num_tokens, corpus.names) == (1, 701, ("0",))
    for two in ([[5, 6], [7, 8]], np.array([[5, 6], [7, 8]]), (torch.tensor([5, 6]), [7, 8])):
        assert [document.tolist() for document in token_ids(two)] == [[5, 6], [7, 8]]
    assert token_ids([1, 2]).num_tokens == 256 and token_ids([1, 2], num_tokens=10).num_tokens == 10

def test_files_of_ids_are_mapped(tmp_path):
    for name in "ab": np.save(tmp_path / f"{name}.npy", np.arange(400, dtype=np.uint16))
    (tmp_path / "c.txt").write_text("no ids")
    corpus = load_corpus(tmp_path / "*.npy", None)
    assert corpus.names == ("a.npy", "b.npy") and corpus.num_tokens == 400
    assert isinstance(corpus[0].base, np.memmap) and corpus[0].dtype == np.uint16
    one = [load_corpus(str(tmp_path / "a.npy"), split, num_tokens=500) for split in data._SPLITS]
    assert np.concatenate([part[0] for part in one]).tolist() == list(range(400))
    assert {part.num_tokens for part in one} == {500}
    assert len(token_ids(tmp_path)) == 2   # the text is no array

class Loaded(dict):
    "What a datasets.Dataset has, as far as it is used."
    @property
    def features(self): return dict(self)
    @property
    def column_names(self): return list(self)

def test_rows_of_a_dataset_are_documents():
    rows = Loaded(text=["déjà", "", None, "vu, vu"], ids=[[1, 2], [300, 4, 5], [6], (7, 8)])
    corpus = load_corpus(rows, None)
    assert [bytes(d).decode() for d in corpus] == ["déjà", "vu, vu"] and corpus.num_tokens == 256
    assert [name for name, _ in corpus.skipped] == ["dataset[1]", "dataset[2]"]
    ids = dataset_rows(rows, column="ids")
    assert [d.tolist() for d in ids] == [[1, 2], [300, 4, 5], [7, 8]] and ids.num_tokens == 301
    assert dataset_rows(Loaded(input_ids=[[1, 2]])).names == ("dataset[0]",)
    many = Loaded(text=[f"this is row number {i}" for i in range(300)])
    parts = [load_corpus(many, split, valid=.2) for split in data._SPLITS]
    assert sum(map(len, parts)) == 300 and 30 < len(parts[1]) < 90
    assert not set(parts[0].names) & set(parts[1].names)

# ------------------------------------------------------------------------------------- text files

@pytest.fixture
def folder(tmp_path):
    "Five texts in two levels."
    (tmp_path / "texts/deep").mkdir(parents=True)
    for name in ("b.txt", "a.md", "deep/c.txt", "deep/a.md", "d"):
        (tmp_path / "texts" / name).write_text(f"this is {name}")
    return tmp_path / "texts"

def test_folder_is_read_with_all_below_it_in_order(folder):
    corpus = text_files(folder)
    assert corpus.names == ("a.md", "b.txt", "d", "deep/a.md", "deep/c.txt")
    assert bytes(corpus["deep/c.txt"]) == b"this is deep/c.txt" and corpus.skipped == ()

def test_glob_list_and_file(folder):
    assert text_files(str(folder / "**/*.txt")).names == ("b.txt", "deep/c.txt")
    assert text_files(folder / "d").names == ("d",)
    assert text_files([folder / "d", folder / "b.txt"]).names == ("d", "b.txt")

def test_each_file_is_read_once_and_names_that_clash_are_told_apart(folder):
    assert len(text_files([folder, folder / "deep", folder / "d"])) == 5
    two = text_files([folder / "a.md", folder / "deep"])
    assert two.names == ((folder / "a.md").as_posix(), (folder / "deep/a.md").as_posix(), "c.txt")

def test_hidden_files_do_not_count(folder):
    (folder / ".git").mkdir(), (folder / ".git/x").write_text("secret"), (folder / ".y").touch()
    assert len(text_files(folder)) == 5

def test_names_decide_the_split_whatever_else_is_there(tmp_path):
    for i in range(60): (tmp_path / f"{i}.txt").write_text(f"text {i}")
    parts = {split: set(text_files(tmp_path, split, .2, .2).names)
             for split in ("train", "valid", "test")}
    assert sum(map(len, parts.values())) == len(set.union(*parts.values())) == 60
    for i in range(60, 90): (tmp_path / f"{i}.txt").write_text(f"text {i}")
    moved = tmp_path.rename(tmp_path.with_name(tmp_path.name + " elsewhere"))
    for split, names in parts.items():
        assert names <= set(text_files(moved, split, .2, .2).names)

@given(size=st.integers(60, 400))
@quick
def test_single_file_is_cut_by_bytes_without_loss(size, tmp_path):
    text = bytes(32 + i % 90 for i in range(size))
    (tmp_path / "one.txt").write_bytes(text)
    parts = [bytes(text_files(tmp_path / "one.txt", split)[0]) for split in data._SPLITS]
    assert b"".join(parts) == text
    assert len(parts[1]) == len(parts[2]) == int(size * .05)

@given(sizes=st.lists(st.integers(2, 300), min_size=1, max_size=5))
@quick
def test_few_files_hold_out_their_ends_without_loss(sizes, tmp_path):
    "A folder of one or few files trains and evaluates: each split gets a part of each file."
    where = tmp_path / "-".join(map(str, sizes))
    where.mkdir(exist_ok=True)
    names = [f"{i}.txt" for i in range(len(sizes))]
    for name, size in zip(names, sizes):
        (where / name).write_bytes(bytes(32 + i % 90 for i in range(size)))
    if {data._split_of(name) for name in names} == set(data._SPLITS): return   # whole files
    parts = {}
    for split in data._SPLITS:
        try: parts[split] = text_files(where, split)
        except ValueError as error: assert f"too few for '{split}'" in str(error)
    for name, size in zip(names, sizes):
        bounds = [[*map(int, title.split("[")[1][:-1].split(":"))] for corpus in parts.values()
                  for title in corpus.names if title.startswith(name)]
        bounds.sort()
        assert all(stop <= start for (_, stop), (start, _) in zip(bounds, bounds[1:]))
        assert sum(stop - start for start, stop in bounds) >= size - 2   # of one byte: no text
        assert not bounds or bounds[0][0] == 0
    assert sum(sizes) < 60 or {"train"} <= set(parts)
    if min(sizes) >= 60: assert set(parts) == set(data._SPLITS)
    if min(sizes) >= 60: assert all(len(corpus) == len(sizes) for corpus in parts.values())

def test_few_files_are_judged_by_those_that_are_text(tmp_path):
    "A picture in the only held-out place must not leave a split without text."
    held = next(f"{i}.py" for i in range(99) if data._split_of(f"{i}.py") == "valid")
    kept = [f"{i}.py" for i in range(99) if data._split_of(f"{i}.py") == "train"][:3]
    for name in kept: (tmp_path / name).write_text("some text that is long enough. " * 9)
    (tmp_path / held).write_bytes(b"\0\0\0")
    with pytest.warns(UserWarning, match="zero byte"): corpus = text_files(tmp_path, "valid")
    assert len(corpus) == 3 and all("[" in name for name in corpus.names)

def test_warning_points_at_the_line_that_called_the_package(tmp_path):
    "However deep in the package it arises."
    (tmp_path / "a.txt").write_text("some text"), (tmp_path / "b.txt").touch()
    corpus = make_corpus([5])
    for call in (lambda: text_files(tmp_path), lambda: load_corpus(tmp_path, None),
                 lambda: DocumentStream(corpus, 2, 4)):
        with pytest.warns(UserWarning) as caught: call()
        assert [warning.filename for warning in caught] == [__file__]

@pytest.mark.parametrize("target", ["loop", "../texts/loop"])
def test_a_link_to_itself_is_skipped(folder, target):
    (folder / "loop").symlink_to(target)
    with pytest.warns(UserWarning, match="loop"): corpus = text_files(folder)
    assert len(corpus) == 5 and "loop" in dict(corpus.skipped)

def test_devices_and_pipes_are_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in ("/dev/zero", tmp_path / "pipe"):
        with pytest.raises(ValueError, match="not a regular file"): text_files(path)
        with pytest.raises(FileNotFoundError, match="path: expected the file"): enwik8(path=path)

def test_single_file_too_short_to_split(tmp_path):
    (tmp_path / "one.txt").write_text("short")
    with pytest.raises(ValueError, match="too few for 'valid'"): text_files(tmp_path, "valid")

def test_what_is_no_text_is_skipped_by_name_with_one_warning(folder):
    (folder / "zero.bin").write_bytes(b"ab\0c"), (folder / "latin.txt").write_bytes(b"caf\xe9!")
    (folder / "cut.txt").write_bytes("né".encode()[:-1]), (folder / "one.txt").write_bytes(b"x")
    (folder / "empty.txt").touch(), (folder / "gone.txt").symlink_to(folder / "nowhere")
    (folder / "loop").symlink_to(folder, target_is_directory=True)
    os.mkfifo(folder / "pipe")
    with pytest.warns(UserWarning, match="text_files skipped") as caught:
        corpus = text_files(folder)
    assert len(caught) == 1 and len(corpus) == 5
    reasons = dict(corpus.skipped)
    assert set(reasons) == {"zero.bin", "latin.txt", "cut.txt", "one.txt", "empty.txt", "gone.txt",
                            "loop", "pipe"}
    assert "zero byte" in reasons["zero.bin"] and "UTF-8" in reasons["latin.txt"]
    assert "UTF-8" in reasons["cut.txt"] and "0 bytes" in reasons["empty.txt"]
    assert "regular" in reasons["pipe"] and "link" in reasons["loop"]

def test_unreadable_file_is_skipped_by_name(folder, monkeypatch):
    def read_bytes(path):
        if path.name == "d": raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return open(path, "rb").read()
    monkeypatch.setattr(data.Path, "read_bytes", read_bytes)
    with pytest.warns(UserWarning, match="Permission denied"): corpus = text_files(folder)
    assert corpus.skipped == (("d", "unreadable: Permission denied"),) and len(corpus) == 4

def test_unreadable_folder_is_skipped_by_name(folder, monkeypatch):
    scandir = os.scandir
    def locked(path):
        if not str(path).endswith("deep"): return scandir(path)
        raise PermissionError(errno.EACCES, "Permission denied", path)
    monkeypatch.setattr(os, "scandir", locked)
    with pytest.warns(UserWarning, match="deep"): corpus = text_files(folder)
    assert dict(corpus.skipped)["deep"] == "unreadable: Permission denied" and len(corpus) == 3

def test_text_of_several_chunks_is_checked_across_them_and_mapped(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "_CHUNK", 5)
    (tmp_path / "good.txt").write_text("éééééééé")
    (tmp_path / "bad.txt").write_bytes(b"a" * 12 + b"\xff")
    with pytest.warns(UserWarning, match="bad.txt"): corpus = text_files(tmp_path)
    assert corpus.names == ("good.txt",) and bytes(corpus[0]).decode() == "éééééééé"
    assert isinstance(corpus[0].base, np.memmap)

def test_refusals_of_text_files(tmp_path, folder):
    (tmp_path / "empty").mkdir(), (tmp_path / "binary").write_bytes(b"\0\0\0")
    with pytest.raises(ValueError, match="no file in .*empty"): text_files(tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match="does not exist"): text_files(tmp_path / "nothing")
    with pytest.raises(ValueError, match=r"no file in .*\*.tex"): text_files(tmp_path / "*.tex")
    with pytest.raises(ValueError, match="zero byte"): text_files(tmp_path / "binary")
    with pytest.raises(ValueError, match="expected shares"): text_files(folder, "train", .6, .6)
    with pytest.raises(ValueError, match="5 files of 69 bytes are too few for 'test'"):
        text_files(folder, "test", 0, 0)
    with pytest.raises(ValueError, match="expected shares"): text_files(folder, "train", "a", .1)
    with pytest.raises(TypeError, match="paths: expected"): text_files([3])
    with pytest.raises(TypeError, match="paths: expected"): text_files("")
    with pytest.raises(ValueError, match="no text in"): text_files([])

# ----------------------------------------------------------------------------------- the download

TEXT = bytes(32 + i % 90 for i in range(200_000))
MD5 = hashlib.md5(TEXT).hexdigest()

def zipped(text):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive: archive.writestr("enwik8", text)
    return buffer.getvalue()

class Server(http.server.ThreadingHTTPServer):
    "Serves `body`; may break off after `breaks[i]` bytes of the i-th answer, or ignore ranges."
    def __init__(self, body):
        super().__init__(("127.0.0.1", 0), Handler)
        self.body, self.breaks, self.ranges, self.asked, self.delay = body, [], True, [], 0
        self.url = f"http://127.0.0.1:{self.server_port}/enwik8.zip"

class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *args): pass

    def do_GET(self):
        server, wanted = self.server, self.headers.get("Range")
        server.asked.append(wanted)
        time.sleep(server.delay)
        start = int(wanted[6:-1]) if wanted and server.ranges else 0
        if start and start >= len(server.body): return self.send_error(416)
        body = server.body[start:]
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[:server.breaks.pop(0)] if server.breaks else body)

@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = Server(zipped(TEXT))
    thread = threading.Thread(target=server.serve_forever, args=(.01,), daemon=True)
    thread.start()
    yield server
    server.shutdown(), server.server_close(), thread.join()

def fetch(server, folder, **changes):
    return data._fetch(folder, **dict(url=server.url, size=len(TEXT), md5=MD5) | changes)

def left(folder): return {path.name for path in folder.iterdir()} - {"enwik8.lock"}

def test_download_is_unpacked_once(server, tmp_path):
    assert fetch(server, tmp_path).read_bytes() == TEXT
    assert fetch(server, tmp_path).read_bytes() == TEXT
    assert server.asked == [None] and left(tmp_path) == {"enwik8"}

def test_broken_download_is_continued_not_repeated(server, tmp_path):
    server.breaks = [1000, 50_000]
    assert fetch(server, tmp_path).read_bytes() == TEXT
    assert server.asked == [None, "bytes=1000-", "bytes=51000-"]

def test_download_that_brings_nothing_more_is_an_error_and_goes_on_next_time(server, tmp_path):
    server.breaks = [1000, 0]
    with pytest.raises(ConnectionError, match="broke off; 1,000 bytes are kept"):
        fetch(server, tmp_path)
    assert left(tmp_path) == {"enwik8.zip.part"}
    assert fetch(server, tmp_path).read_bytes() == TEXT
    assert server.asked[-1] == "bytes=1000-" and left(tmp_path) == {"enwik8"}

def test_server_that_ignores_ranges_starts_over(server, tmp_path):
    server.ranges, server.breaks = False, [1000]
    data._download(server.url, tmp_path / "enwik8.zip")
    assert (tmp_path / "enwik8.zip").read_bytes() == server.body
    assert server.asked == [None, "bytes=1000-"]

def test_part_that_is_already_whole_is_used(server, tmp_path):
    (tmp_path / "enwik8.zip.part").write_bytes(server.body)
    assert fetch(server, tmp_path).read_bytes() == TEXT and len(server.asked) == 1

def test_part_of_another_file_is_noticed_deleted_and_repeated(server, tmp_path):
    (tmp_path / "enwik8.zip.part").write_bytes(b"something else")
    with pytest.raises(ValueError, match="deleted: call again"): fetch(server, tmp_path)
    assert left(tmp_path) == set()
    assert fetch(server, tmp_path).read_bytes() == TEXT

@pytest.mark.parametrize("changes, message", [
    (dict(md5="0" * 32), "has the checksum"), (dict(size=7), "expected 7")])
def test_wrong_checksum_or_size_keeps_nothing(server, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message): fetch(server, tmp_path, **changes)
    assert left(tmp_path) == set()

def test_download_that_is_no_archive_keeps_nothing(server, tmp_path):
    server.body = b"<html>we moved</html>" * 100
    with pytest.raises(ValueError, match="cannot be unpacked"): fetch(server, tmp_path)
    assert left(tmp_path) == set()

def test_archive_with_one_flipped_byte_keeps_nothing(server, tmp_path):
    body = bytearray(server.body)
    body[100_000] ^= 1
    server.body = bytes(body)
    with pytest.raises(ValueError, match="cannot be unpacked"): fetch(server, tmp_path)
    assert left(tmp_path) == set()

def test_missing_page_and_missing_server_are_clear(server, tmp_path, monkeypatch):
    monkeypatch.setattr(Handler, "do_GET", lambda self: self.send_error(404))
    with pytest.raises(ConnectionError, match="server says 404 .* give it as path="):
        fetch(server, tmp_path)
    with pytest.raises(ConnectionError, match="give it as path="):
        fetch(server, tmp_path, url="http://127.0.0.1:9/enwik8.zip")

def test_damaged_text_in_the_cache_is_never_read(server, tmp_path):
    (tmp_path / "enwik8").write_bytes(TEXT[:-1] + b"!")
    (tmp_path / "enwik8.part").write_bytes(TEXT[:77])
    assert fetch(server, tmp_path).read_bytes() == TEXT and left(tmp_path) == {"enwik8"}

def full_after(size, name):
    "An `open` whose disk is full after `size` bytes of the file `name`."
    class Full(io.FileIO):
        def write(self, chunk):
            if self.tell() + len(chunk) > size:
                super().write(chunk[:size - self.tell()])
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().write(chunk)
    def open_(path, mode="r"):
        return Full(path, mode) if os.path.basename(path) == name else open(path, mode)
    return open_

def test_full_disk_while_downloading_keeps_a_part_that_goes_on(server, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "open", full_after(70_000, "enwik8.zip.part"), raising=False)
    with pytest.raises(OSError, match="disk is full .* free some space") as caught:
        fetch(server, tmp_path)
    assert caught.value.errno == errno.ENOSPC
    part = (tmp_path / "enwik8.zip.part").read_bytes()
    assert left(tmp_path) == {"enwik8.zip.part"} and server.body.startswith(part) and part
    monkeypatch.delattr(data, "open")
    assert fetch(server, tmp_path).read_bytes() == TEXT
    assert server.asked == [None, f"bytes={len(part)}-"]

def test_full_disk_while_unpacking_keeps_the_download_only(server, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "open", full_after(70_000, "enwik8.part"), raising=False)
    with pytest.raises(OSError, match="disk is full"): fetch(server, tmp_path)
    assert left(tmp_path) == {"enwik8.zip"}
    monkeypatch.delattr(data, "open")
    assert fetch(server, tmp_path).read_bytes() == TEXT and len(server.asked) == 1

def test_several_that_ask_at_once_download_once(server, tmp_path):
    server.delay = .1
    threads = [threading.Thread(target=fetch, args=(server, tmp_path)) for _ in range(4)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    assert server.asked == [None] and (tmp_path / "enwik8").read_bytes() == TEXT

@pytest.fixture
def small_enwik8(server, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "_ENWIK8", dict(url=server.url, size=len(TEXT), md5=MD5))
    monkeypatch.setenv("MEMFORMERS_CACHE", str(tmp_path / "cache"))
    return tmp_path

def test_enwik8_splits_are_90_5_5_and_join_to_the_whole(small_enwik8, server):
    corpora = [enwik8(split, piece=7000) for split in data._SPLITS]
    assert [corpus.num_bytes for corpus in corpora] == [180_000, 10_000, 10_000]
    assert enwik8(None, piece=None).num_bytes == 200_000
    assert b"".join(bytes(piece) for corpus in corpora for piece in corpus) == TEXT
    assert len(server.asked) == 1 and len(enwik8("valid", piece=None)) == 1

def test_enwik8_takes_a_copy_packed_or_not(small_enwik8, server):
    (small_enwik8 / "enwik8").write_bytes(TEXT)
    (small_enwik8 / "mine.zip").write_bytes(server.body)
    for name in ("enwik8", "mine.zip"):
        assert enwik8("test", path=small_enwik8 / name).num_bytes == 10_000
        assert (small_enwik8 / name).exists()
    assert server.asked == []

def test_enwik8_refuses_a_wrong_copy_and_leaves_it_alone(small_enwik8, server):
    (small_enwik8 / "wrong").write_bytes(TEXT[:-1])
    (small_enwik8 / "wrong.zip").write_bytes(zipped(TEXT[:-1]))
    for name in ("wrong", "wrong.zip"):
        with pytest.raises(ValueError, match="199,999 bytes, expected 200,000"):
            enwik8(path=small_enwik8 / name)
        assert (small_enwik8 / name).exists()
    with pytest.raises(FileNotFoundError, match="path: expected the file"): enwik8(path="no/where")
    with pytest.raises(ValueError, match="piece: expected at least 2"): enwik8(piece=1)
    assert left(small_enwik8 / "cache") == set()

def test_true_enwik8_is_what_is_expected():
    assert data._ENWIK8 == dict(url="http://mattmahoney.net/dc/enwik8.zip", size=100_000_000,
                                md5="a1fa5ffddb56f4953e226637dabbb36a")
    assert data._share(100_000_000, "valid", .05, .05) == (90_000_000, 95_000_000)

def test_cache_folder_follows_the_environment(tmp_path, monkeypatch):
    monkeypatch.delenv("MEMFORMERS_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert data._cache_folder() == tmp_path / "xdg/memformers"
    monkeypatch.setenv("MEMFORMERS_CACHE", str(tmp_path / "mine"))
    assert data._cache_folder() == tmp_path / "mine" and (tmp_path / "mine").is_dir()
    assert data._cache_folder(tmp_path / "given") == tmp_path / "given"

# --------------------------------------------------------------------------- the hub, and by name

class Rows(dict):
    column_names = property(lambda self: list(self))

@pytest.fixture
def hub(monkeypatch):
    "A stand-in for the library `datasets` that records how it is asked."
    asked = []
    def load_dataset(path, **kwargs):
        asked.append((path, kwargs))
        return Rows(text=["a first text", "", None, "déjà"], other=["", ""])
    fake = types.SimpleNamespace(load_dataset=load_dataset, __version__="0")
    monkeypatch.setitem(sys.modules, "datasets", fake)
    return asked

def test_hugging_face_reads_rows_and_names_what_it_skips(hub):
    corpus = hugging_face("me/texts", split="train[:1%]", name="config", revision="x")
    assert hub == [("me/texts", dict(split="train[:1%]", name="config", revision="x"))]
    assert corpus.names == ("me/texts[0]", "me/texts[3]")
    assert bytes(corpus[1]) == "déjà".encode()
    assert [name for name, _ in corpus.skipped] == ["me/texts[1]", "me/texts[2]"]
    with pytest.raises(ValueError, match="column: expected one of"): hugging_face("x", column="y")
    with pytest.raises(ValueError, match="no text"): hugging_face("x", column="other")

def test_hugging_face_without_datasets_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"pip install 'torch-memformers\[hub\]'"):
        hugging_face("x")

def test_load_corpus_knows_names_and_paths(hub, folder, small_enwik8):
    assert load_corpus("stdlib", "valid").name == "stdlib/valid"
    assert load_corpus("enwik8", "valid").name == "enwik8/valid"
    assert load_corpus("hf:me/texts:config", "valid").name == "me/texts/validation"
    assert hub == [("me/texts", dict(split="validation", name="config"))]
    assert len(load_corpus(folder, None)) == len(load_corpus(str(folder), None)) == 5
    with pytest.raises(FileNotFoundError, match="'stdlib', 'enwik8', 'golang', .*'hf:NAME'"):
        load_corpus("enwik")

# --------------------------------------------------------------------------------------- segments

def test_segment_gives_some_of_its_rows_and_shows_shapes():
    segment = next(DocumentStream(make_corpus([9, 5, 7]), 3, 4))
    for index in ([2, 0], torch.tensor([2, 0]), np.array([2, 0])):
        assert torch.equal(segment.rows(index).tokens, segment.tokens[[2, 0]])
    assert same(segment.rows(slice(1, None)), segment.rows([1, 2]))
    assert same(segment.rows(-1), segment.rows(torch.tensor([False, False, True])))
    assert segment.rows(1).start.shape == (1,) and isinstance(segment.to("cpu"), Segment)
    assert all(tensor.device.type == "meta" for tensor in fields(segment.to("meta")))
    for word in ("3 rows", "(3, 4)", "12 real"): assert word in repr(segment)

# ---------------------------------------------------------------------------------------- streams

@given(**shapes, epochs=st.integers(1, 3))
@quick
def test_each_document_is_read_whole_once_per_epoch(lengths, batch_size, seq_len, seed, epochs):
    corpus = make_corpus(lengths)
    segments = list(DocumentStream(corpus, batch_size, seq_len, seed, epochs))
    assert sorted(read_back(segments, batch_size)) == sorted(epochs * [*map(bytes, corpus)])
    counted = sum(int(segment.loss_mask.sum()) for segment in segments)
    assert counted == epochs * (corpus.num_bytes - len(corpus))
    assert all(segment.mask.any() for segment in segments)  # it stops when nothing is left

@given(**shapes)
@quick
def test_segments_have_the_promised_form(lengths, batch_size, seq_len, seed):
    corpus = make_corpus(lengths)
    stream = quiet_stream(corpus, batch_size, seq_len, seed)
    for _, segment in zip(range(20), stream):
        assert [x.dtype for x in fields(segment)] == [torch.int64] * 2 + [torch.bool] * 3
        assert segment.tokens.shape == segment.labels.shape == segment.mask.shape
        assert segment.tokens.shape == (batch_size, seq_len)
        assert segment.start.shape == (batch_size,)
        assert torch.equal(segment.mask, segment.loss_mask)
        assert not segment.tokens[~segment.mask].any() and not segment.labels[~segment.mask].any()
        assert (segment.mask.int().diff(dim=1) <= 0).all()  # padding only behind
        for row, (item, offset) in enumerate(stream.reading):
            document, n = corpus[item], int(segment.mask[row].sum())
            assert bool(segment.start[row]) == (offset == 0) and n == min(
                seq_len, len(document) - 1 - offset)
            assert segment.tokens[row, :n].tolist() == document[offset:offset + n].tolist()
            assert segment.labels[row, :n].tolist() == document[offset + 1:offset + n + 1].tolist()

@given(**shapes)
@quick
def test_documents_never_meet_without_a_start_flag(lengths, batch_size, seq_len, seed):
    texts = [bytes([i]) * length for i, length in enumerate(lengths, 1)]
    corpus = Corpus("c", tuple(map(str, range(len(texts)))), texts)
    last = [0] * batch_size
    for segment in DocumentStream(corpus, batch_size, seq_len, seed, epochs=2):
        for row in range(batch_size):
            seen = {*segment.tokens[row, segment.mask[row]].tolist(),
                    *segment.labels[row, segment.mask[row]].tolist()}
            assert len(seen) <= 1
            if seen and not segment.start[row]: assert seen == {last[row]}
            last[row] = max(seen, default=0)

@given(**shapes, epochs=st.none() | st.integers(1, 2), steps=st.integers(0, 12))
@quick
def test_document_stream_goes_on_bit_for_bit(lengths, batch_size, seq_len, seed, epochs, steps):
    make = lambda: quiet_stream(make_corpus(lengths), batch_size, seq_len, seed, epochs)
    stream, resumed = make(), make()
    for _ in zip(range(steps), stream): pass
    state = json.loads(json.dumps(stream.state_dict()))
    for _ in zip(range(3), resumed): pass  # wherever the other one stands
    resumed.load_state_dict(state)
    assert resumed.state_dict() == state
    rest, again = ([s for _, s in zip(range(15), x)] for x in (stream, resumed))
    assert len(rest) == len(again) and all(map(same, rest, again))
    assert stream.state_dict() == resumed.state_dict() != {} and stream.reading == resumed.reading

def test_saved_position_does_not_move_with_the_stream():
    stream = DocumentStream(make_corpus([30] * 4), 2, 4)
    state = stream.state_dict()
    next(stream)
    assert state["item"] == [-1, -1] and stream.state_dict() != state
    stream.load_state_dict(state)
    next(stream)
    assert state["item"] == [-1, -1]

@given(**shapes, epochs=st.none() | st.integers(1, 2), cut=st.integers(0, 5))
@quick
def test_processes_together_read_what_one_reads(lengths, batch_size, seq_len, seed, epochs, cut):
    cut = min(cut, batch_size - 1)
    corpus = make_corpus(lengths)
    parts = [rows for rows in (slice(0, cut), range(cut, batch_size)) if rows != slice(0, 0)]
    whole = quiet_stream(corpus, batch_size, seq_len, seed, epochs)
    streams = [quiet_stream(corpus, batch_size, seq_len, seed, epochs, rows) for rows in parts]
    for _, segment in zip(range(15), whole):
        joined = [next(stream) for stream in streams]
        assert all(torch.equal(x, torch.cat(xs)) for x, xs in
                   zip(fields(segment), zip(*map(fields, joined))))
        assert all(stream.state_dict() == whole.state_dict() for stream in streams)
    if next(whole, None) is None: assert all(next(stream, None) is None for stream in streams)

@given(**shapes)
@quick
def test_who_reads_what_depends_on_lengths_alone(lengths, batch_size, seq_len, seed):
    one, two = (quiet_stream(make_corpus(lengths, seed=contents), batch_size, seq_len, seed)
                for contents in (1, 2))
    for _ in range(10):
        next(one), next(two)
        assert one.reading == two.reading

def order_of(**kwargs):
    stream = DocumentStream(make_corpus([3] * 8), 1, 4, epochs=2, **kwargs)
    return [stream.reading[0][0] for _ in stream]

def test_order_is_a_new_permutation_each_epoch_fixed_by_the_seed():
    order = order_of(seed=5)
    assert sorted(order[:8]) == sorted(order[8:]) == list(range(8)) and order[:8] != order[8:]
    assert order == order_of(seed=5) != order_of(seed=6)
    assert order_of(seed=None) == [*range(8)] * 2

def test_streams_leave_global_randomness_alone():
    np.random.seed(0), torch.manual_seed(0)
    before = np.random.get_state()[1].tolist(), torch.get_rng_state()
    next(DocumentStream(make_corpus([5] * 4), 2, 3)), next(TaskStream(passkey_task(), 2, 8))
    assert before[0] == np.random.get_state()[1].tolist()
    assert torch.equal(before[1], torch.get_rng_state())

def test_rows_without_documents_are_masked_until_all_are_done():
    segments = list(DocumentStream(make_corpus([9, 3]), 3, 4, seed=None, epochs=1))
    assert [segment.mask.sum(1).tolist() for segment in segments] == [[4, 2, 0], [4, 0, 0]]
    assert [segment.start.tolist() for segment in segments] == [[True, True, False], [False] * 3]

def test_finished_stream_stays_finished():
    stream = DocumentStream(make_corpus([3]), 1, 4, epochs=1)
    assert len(list(stream)) == 1 and list(stream) == [] and next(stream, None) is None

def test_few_documents_for_many_rows_are_said():
    with pytest.warns(UserWarning, match=r"2 documents for 3 rows.*cut\(max_tokens\)"):
        stream = DocumentStream(make_corpus([5, 6]), 3, 4)
    assert all(next(stream).mask.any(1).all() for _ in range(9))

@pytest.mark.parametrize("changes, key", [
    (dict(corpus=make_corpus([30] * 4, seed=1)), "corpus"), (dict(batch_size=3), "batch_size"),
    (dict(seq_len=5), "seq_len"), (dict(seed=1), "seed"), (dict(epochs=2), "epochs")])
def test_position_of_another_stream_is_refused(changes, key):
    settings = dict(corpus=make_corpus([30] * 4), batch_size=2, seq_len=4)
    stream = DocumentStream(**settings | changes)
    before = stream.state_dict()
    with pytest.raises(ValueError, match=f"state: saved with {key}="):
        stream.load_state_dict(DocumentStream(**settings).state_dict())
    assert stream.state_dict() == before

def test_rows_and_numbers_may_come_from_numpy():
    corpus = make_corpus([9] * 4)
    plain = DocumentStream(corpus, 4, 3, seed=1, rows=[2, 3])
    numpy = DocumentStream(corpus, np.int64(4), np.int32(3), np.uint8(1), rows=np.array([2, 3]))
    assert all(map(same, [next(plain) for _ in range(5)], [next(numpy) for _ in range(5)]))
    assert json.loads(json.dumps(numpy.state_dict())) == plain.state_dict()
    assert corpus.take(np.int64(2)).names == corpus.names[:2]
    assert bytes(corpus[np.int64(1)]) == bytes(corpus[1])

@pytest.mark.parametrize("changes", [
    dict(item=[0]), dict(item="01"), dict(offset=[0, -4]), dict(taken=[0.5, 1]), dict(item=None),
    dict(offset=[2**70, 0])])
def test_damaged_position_is_refused_and_changes_nothing(changes):
    stream = DocumentStream(make_corpus([30] * 4), 2, 4)
    before = stream.state_dict()
    with pytest.raises(ValueError, match=f"state: expected 2 integers.*{[*changes][0]}"):
        stream.load_state_dict(before | changes)
    assert stream.state_dict() == before
    with pytest.raises(TypeError, match="state: expected a dictionary"):
        stream.load_state_dict([before])

def test_position_of_another_kind_of_stream_is_refused():
    tasks = TaskStream(copy_task(), 2, 4)
    with pytest.raises(ValueError, match="stream='documents'"):
        tasks.load_state_dict(DocumentStream(make_corpus([30] * 4), 2, 4).state_dict())
    with pytest.raises(ValueError, match="saved with stream=None"): tasks.load_state_dict({})

@pytest.mark.parametrize("changes", [
    dict(batch_size=0), dict(seq_len=0), dict(epochs=0), dict(seed=-1), dict(rows=slice(4, 9)),
    dict(rows=range(3, 5)), dict(rows=[0, 0]), dict(rows=[])])
def test_streams_refuse_numbers_out_of_range(changes):
    with pytest.raises(ValueError, match=f"{[*changes][0]}: expected"):
        DocumentStream(**dict(corpus=make_corpus([9] * 4), batch_size=4, seq_len=3) | changes)
    if "epochs" in changes: changes = dict(episodes=0)
    with pytest.raises(ValueError, match=f"{[*changes][0]}: expected"):
        TaskStream(**dict(task=copy_task(), batch_size=4, seq_len=3) | changes)

@pytest.mark.parametrize("changes", [dict(corpus="stdlib"), dict(batch_size=2.), dict(seq_len=True),
                                     dict(seed="0")])
def test_streams_refuse_other_types(changes):
    with pytest.raises(TypeError, match=f"{[*changes][0]}: expected"):
        DocumentStream(**dict(corpus=make_corpus([9] * 4), batch_size=4, seq_len=3) | changes)

# ------------------------------------------------------------------------------------------ tasks

TASKS = [copy_task(), copy_task(length=3, delay=9, alphabet="xyz"), key_value_task(),
         key_value_task(pairs=1, distance=2), key_value_task(pairs=26), passkey_task(),
         passkey_task(distance=12, digits=2, lead=0), passkey_task(distance=1000)]

@pytest.mark.parametrize("task", TASKS, ids=str)
@given(seed=st.integers(0, 9999))
@settings(quick, max_examples=15)
def test_episode_holds_its_answer_at_the_distance(task, seed):
    tokens, answer = task.episode(np.random.default_rng(seed))
    assert tokens.dtype == np.uint8 and answer.dtype == bool
    assert tokens.shape == answer.shape == (task.length,)
    assert all(32 <= token < 127 for token in tokens)  # printable
    assert (np.diff(answer.astype(int)) >= 0).all() and not answer[0] and answer[-1]
    text, size = ByteTokenizer().decode(tokens), int(answer.sum())
    fact, solution = text[:-size - task.distance], text[-size:]
    if task.name.startswith("copy"): assert fact == solution
    elif task.name.startswith("key"): assert dict(pair.split("=") for pair in fact.split(","))[
        text[-3]] == solution and text[-2] == "="
    else: assert fact.endswith(f" the key is {solution}.") and text[:-size].endswith(" the key is ")
    assert all(np.array_equal(a, b) for a, b in
               zip((tokens, answer), task.episode(np.random.default_rng(seed))))

@pytest.mark.parametrize("task", TASKS, ids=str)
def test_other_distance_is_the_same_task_farther(task):
    far = task.at(task.distance + 100)
    assert far.length == task.length + 100 and far.distance == task.distance + 100
    assert (far.name, far.chance, far.num_tokens) == (task.name, task.chance, 256)
    answers = [t.episode(np.random.default_rng(1)) for t in (task, far)]
    assert len({bytes(tokens[answer]) for tokens, answer in answers}) == 1

@pytest.mark.parametrize("task", [copy_task(), copy_task(alphabet="ab"), key_value_task(),
                                  passkey_task()], ids=str)
def test_guessing_gets_what_it_says(task):
    rng = np.random.default_rng(0)
    episodes = [task.episode(rng) for _ in range(2000)]
    answers = np.concatenate([tokens[answer] for tokens, answer in episodes])
    best_guess = np.bincount(answers).max() / len(answers)
    deviation = (task.chance * (1 - task.chance) / len(answers)) ** .5
    assert abs(best_guess - task.chance) < 4 * deviation

def test_key_is_needed_to_find_the_value():
    rng, task = np.random.default_rng(0), key_value_task(pairs=4)
    places = []
    for _ in range(400):
        text = ByteTokenizer().decode(task.episode(rng)[0])
        places.append(text.index(text[-3] + "="))
    assert min(np.bincount(places, minlength=16)[::4]) > 60

@pytest.mark.parametrize("n", [0, 1, 22, 23, 24, 100, 1001])
def test_fillers_have_the_length_they_are_asked_for(n):
    assert len(dots(n, None)) == len(sentences(n, np.random.default_rng(n))) == n

def test_tasks_refuse_what_cannot_be():
    for call in (lambda: passkey_task(distance=11), lambda: copy_task(delay=0),
                 lambda: key_value_task(distance=1), lambda: copy_task().at(0)):
        with pytest.raises(ValueError, match="distance: expected at least"): call()
    for alphabet in ("a", "aab", "ab.", "ab=", "äb", "a\n"):
        with pytest.raises(ValueError, match="alphabet: expected"): copy_task(alphabet=alphabet)
    with pytest.raises(ValueError, match="pairs: expected at most 26"): key_value_task(pairs=27)
    with pytest.raises(ValueError, match="length: expected"): copy_task(length=0)
    with pytest.raises(ValueError, match="digits: expected"): passkey_task(digits=0)
    with pytest.raises(TypeError, match="distance: expected an integer"): passkey_task(distance=64.)
    for task in ("copy", [], None):
        with pytest.raises(TypeError, match="task"): TaskStream(task, 1, 4)

def test_tasks_are_values():
    task = passkey_task()
    assert task == passkey_task() == task.at(9999).at(256) != passkey_task(digits=4)
    assert task != task.at(9999) and len({task, passkey_task()}) == 1
    copy = pickle.loads(pickle.dumps(task))  # for processes that are spawned
    assert copy == task and copy.length == task.length

def test_task_of_ones_own():
    task = RecallTask("echo", lambda rng: ("yes", "?", "yes"), distance=4, chance=1.)
    assert ByteTokenizer().decode(task.episode(None)[0]) == "yes...?yes"

# --------------------------------------------------------------------------------- task streams

def tasks_at(*distances): return [key_value_task(2).at(distance) for distance in distances]

mixed = dict(distances=st.lists(st.integers(2, 30), min_size=1, max_size=3),
             batch_size=st.integers(1, 4), seq_len=st.integers(1, 17))

@given(**mixed)
@quick
def test_episodes_are_read_whole_and_only_answers_count(distances, batch_size, seq_len):
    make = lambda **kwargs: list(TaskStream(tasks_at(*distances), batch_size, seq_len, episodes=3,
                                            **kwargs))
    segments, everywhere = make(), make(loss_everywhere=True)
    texts = read_back(segments, batch_size)
    assert len(texts) == 3 * batch_size
    asked = [dict(pair.split("=") for pair in text[:7].decode().split(",")) for text in texts]
    assert all(pairs[chr(text[-3])] == chr(text[-1]) for pairs, text in zip(asked, texts))
    assert sum(int(segment.loss_mask.sum()) for segment in segments) == 3 * batch_size
    for segment, all_count in zip(segments, everywhere, strict=True):
        assert torch.equal(segment.tokens, all_count.tokens)
        assert torch.equal(all_count.loss_mask, segment.mask)
        assert (segment.mask | ~segment.loss_mask).all()
    counted = [chr(int(label)) for row in range(batch_size) for segment in segments
               for label in segment.labels[row, segment.loss_mask[row]]]
    assert counted == [chr(text[-1]) for text in texts]

@given(**mixed, steps=st.integers(0, 12), episodes=st.none() | st.integers(1, 3))
@quick
def test_task_stream_goes_on_bit_for_bit(distances, batch_size, seq_len, steps, episodes):
    make = lambda: TaskStream(tasks_at(*distances), batch_size, seq_len, 3, episodes)
    stream, resumed = make(), make()
    for _ in zip(range(steps), stream): pass
    state = json.loads(json.dumps(stream.state_dict()))
    for _ in zip(range(2), resumed): pass
    resumed.load_state_dict(state)
    rest, again = ([s for _, s in zip(range(15), x)] for x in (stream, resumed))
    assert len(rest) == len(again) and all(map(same, rest, again))

@given(**mixed, episodes=st.none() | st.integers(1, 3))
@quick
def test_processes_together_read_the_episodes_of_one(distances, batch_size, seq_len, episodes):
    make = lambda rows=None: TaskStream(tasks_at(*distances), batch_size, seq_len,
                                        episodes=episodes, rows=rows)
    whole, streams = make(), [make([row]) for row in range(batch_size)]
    for _, segment in zip(range(15), whole):
        joined = [next(stream) for stream in streams]
        assert all(torch.equal(x, torch.cat(xs)) for x, xs in
                   zip(fields(segment), zip(*map(fields, joined))))
    if next(whole, None) is None: assert all(next(stream, None) is None for stream in streams)

def test_episode_depends_on_seed_row_and_number_alone():
    read = lambda seed, batch_size, seq_len: [
        read_back([segment.rows(row) for segment in
                   TaskStream(passkey_task(20, lead=9), batch_size, seq_len, seed, 3)], 1)
        for row in range(batch_size)]
    narrow, wide, other = read(0, 2, 5), read(0, 4, 11), read(1, 2, 5)
    assert narrow == wide[:2] != other
    assert len({text for row in wide for text in row}) == 12

def test_curriculum_draws_every_distance():
    stream = TaskStream(tasks_at(4, 40), 2, 64, episodes=20)
    lengths = {len(text) for text in read_back(list(stream), 2)}
    assert lengths == {task.length for task in tasks_at(4, 40)}

def test_position_in_other_tasks_is_refused():
    state = TaskStream(tasks_at(8), 2, 4).state_dict()
    with pytest.raises(ValueError, match="state: saved with tasks="):
        TaskStream(tasks_at(9), 2, 4).load_state_dict(state)


def test_a_passkey_hides_in_prose():
    text = bytes(passkey_task(200).episode(np.random.default_rng(0))[0]).decode()
    assert text.count("the") > 4 and "." * 12 not in text


def test_programs_print_what_they_compute():
    """An interpreter of its own: `x=3;`, `x++;`, `x--;`, `y>4:` before a statement, `x?7;`."""
    task, asked, borders = program_task(3, 24), 0, 0
    for seed in range(60):
        tokens, answer = task.episode(np.random.default_rng(seed))
        text, state, holds, seen = bytes(tokens).decode(), {}, True, []
        for i in range(0, len(text), 4):
            name, kind, value = text[i], text[i + 1], text[i + 2]
            if kind == ">":
                holds, borders = state[name] > int(value), borders + (state[name] == int(value))
                continue
            if kind == "=": state[name] = int(value)
            if kind == "?": seen.append((i + 2, state[name] == int(value)))
            if kind in "+-" and holds: state[name] = (state[name] + (1 if kind == "+" else -1)) % 10
            holds = True
        assert [i for i, right in seen if right] == answer.nonzero()[0].tolist()
        asked += len(seen)
    assert asked > 100 and borders > 5


def test_pairs_hold_no_filler():
    """Token 0 is the filler; keys and values are others, and each key comes once."""
    task = tasks.associative_recall_task(pairs=3, distance=5, vocab=8)
    for seed in range(40):
        tokens, _ = task.episode(np.random.default_rng(seed))
        keys, values = tokens[:6:2], tokens[1:6:2]
        assert set(keys) == {1, 2, 3} and all(4 <= value < 8 for value in values)
        assert not tokens[6:10].any()


def test_filler_from_a_corpus_begins_with_a_line():
    lines = "".join(f"line {i:03}: some words\n" for i in range(100))
    fill = tasks.CorpusFill(Corpus("lines", ("a",), (np.frombuffer(lines.encode(), np.uint8),)))
    drawn = [fill(50, np.random.default_rng(seed)) for seed in range(40)]
    assert all(len(text) == 50 and text.startswith(b"line") for text in drawn)
    assert len(set(drawn)) > 20
