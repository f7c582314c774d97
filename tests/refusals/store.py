"""The kNN store, its object and its files: what cannot be stored, searched, opened or loaded."""
import copy
import pickle
from functools import partial

import numpy as np
import torch
from safetensors.torch import save_file

from memformers import KNNMemory, KNNMemoryList, carry
from memformers.knn import KNNStore, nearest
from refusals.common import Refusal, refusals

SIZE = (0, -1, 1.5, "8", None, float("nan"), True, 10 ** 30)
HEADER = dict(format="memformers.knn.1", dim="3", max_memories="10", num_indices="1",
              backend="torch", index="flat", effort="64")


def memory(rows=2, **options):
    "A memory with four memories in each row."
    made = KNNMemory(3, 10, rows, **options)
    made.add(torch.ones(rows, 4, 2, 3))
    return made


def closed():
    made = memory()
    made.close()
    return made


def store(**changed):
    "A store of two rows and five slots."
    tensors = dict(kv=torch.zeros(2, 5, 2, 3), written=torch.zeros(2, dtype=torch.long)) | changed
    return KNNStore(**tensors)


def load(folder, rows=None, options=None, **header):
    "Load a file with this header."
    rows = dict(row0=torch.ones(4, 2, 3)) if rows is None else rows
    file = folder / "m.safetensors"
    save_file(rows, file, {k: v for k, v in (HEADER | header).items() if v is not None})
    return KNNMemory.load(file, **options or {})


def written(folder, name, data):
    "A file with these bytes."
    (folder / name).write_bytes(data)
    return folder / name


def reopened(folder, name, data):
    "A folder that holds a memory, with one of its files replaced."
    with memory(path=folder / "m"): pass
    written(folder / "m", name, data)
    return KNNMemory(3, 10, 2, path=folder / "m")


KNN = partial(KNNMemory, **dict(dim=3, max_memories=10))
LIST = partial(KNNMemoryList.create_memories, **dict(batch_size=1, num_memory_layers=1, dim=3))
ROWS = [row for argument in ("dim", "max_memories", "num_indices", "effort")
        for row in refusals("KNNMemory", KNN, argument, *SIZE)]
ROWS += refusals("KNNMemory", KNN, "backend", "annoy", None, 3)
ROWS += refusals("KNNMemory", KNN, "index", "tree", "hnsw", None)
ROWS += refusals("KNNMemory", KNN, "path", "", 3, b"", False)
ROWS += refusals("KNNMemory", KNN, "temporary", "yes", 1, None)
ROWS += refusals("KNNMemory", KNN, "dtype", torch.int64, torch.complex64, "float32", torch.bool)
ROWS += refusals("KNNMemory", KNN, "device", "moon", "cpu:x", 1.5)
ROWS += refusals("create_memories", LIST, "num_memory_layers", -1, 1.5, "2", None)
ROWS += refusals("create_memories", LIST, "batch_size", 0, 1.5, None)
ROWS += refusals("create_memories", LIST, "memories_directory", "", 3)

FLOATS, INPUT = torch.ones(2, 4, 2, 3), torch.ones(2, 4, 3)
for name, new in (("width", FLOATS[..., :2]), ("rows", FLOATS[:1]), ("axes", FLOATS[0]),
                  ("integers", FLOATS.long()), ("NaN", FLOATS * torch.nan), ("a list", [1.0]),
                  ("numpy", FLOATS.numpy()), ("None", None), ("another device", FLOATS.to("meta")),
                  ("keys alone", FLOATS[:, :, :1]), ("complex", FLOATS.to(torch.complex64))):
    ROWS.append(Refusal(f"add, {name}", lambda v=new: memory().add(v), (ValueError, TypeError),
                        r"\bmemories\b"))
for name, mask in (("length", torch.ones(2, 3).bool()), ("floats", torch.ones(2, 4)),
                   ("integers", torch.ones(2, 4).long()), ("a list", [[True] * 4] * 2),
                   ("axes", torch.ones(4).bool())):
    ROWS.append(Refusal(f"add, mask, {name}", lambda v=mask: memory().add(FLOATS, v), ValueError,
                        r"\bmask\b"))
for name, q in (("width", INPUT[..., :2]), ("rows", INPUT[:1]), ("integers", INPUT.long()),
                ("axes", INPUT[0, 0]), ("a list", [1.0]), ("None", None),
                ("another device", INPUT.to("meta"))):
    ROWS.append(Refusal(f"search, queries, {name}", lambda v=q: memory().search(v, 1),
                        (ValueError, TypeError), r"\bqueries\b"))
ROWS += refusals("search", lambda topk: memory().search(INPUT, topk), "topk", 0, -1, 11, 1.5, "2",
                 None, True)
ROWS += refusals("search", lambda nprobe: memory().search(INPUT, 1, nprobe), "nprobe", 0, -1, 1.5)

BAD_ROWS = (2, -1, [0, 0], [2], [0.5], "01", [True], 1.5, np.array([0, 5]), torch.tensor([0.0, 1.0]))
for i, bad in enumerate(BAD_ROWS):
    for name, call in (("clear", lambda v: memory().clear(v)),
                       ("at_batch_indices", lambda v: memory().at_batch_indices(v).__enter__()),
                       ("set_scoped_indices", lambda v: memory().set_scoped_indices(v))):
        ROWS.append(Refusal(f"{name}, rows {i}", lambda c=call, v=bad: c(v), ValueError,
                            r"\brows must be different indices\b"))
ROWS += refusals("clear_memory", lambda memory_indices: KNNMemoryList([memory()]).clear_memory(
    None, memory_indices), "memory_indices", [1], [-1], "a", match="indices")
ROWS += refusals("resize", lambda max_memories: memory().resize(max_memories), "max_memories", *SIZE)
ROWS += refusals("merge", lambda other: memory().merge(other), "other", None, 3, KNNMemory(3, 10),
                 KNNMemory(4, 10, 2))
ROWS += refusals("save", lambda path: memory().save(path), "path", "", None, 3)
ROWS += refusals("load", KNNMemory.load, "file", "", None, 3)

for name, use in (("add", lambda m: m.add(FLOATS)), ("search", lambda m: m.search(INPUT, 1)),
                  ("nearest", lambda m: m.nearest(INPUT, 1)), ("kv", lambda m: m.kv),
                  ("fill", lambda m: m.fill), ("clear", lambda m: m.clear()),
                  ("save", lambda m: m.save("never")), ("clone", lambda m: m.clone())):
    ROWS.append(Refusal(f"closed, {name}", lambda u=use: u(closed()), ValueError, "closed"))
for name, use in (("carry", carry), ("torch.clone", torch.clone)):
    ROWS.append(Refusal(f"an object as a value, {name}", lambda u=use: u(memory()), TypeError,
                        "in place"))
for name, use in (("deepcopy", copy.deepcopy), ("pickle", pickle.dumps)):
    ROWS.append(Refusal(f"a folder, {name}", lambda folder, u=use: u(memory(path=folder / "m")),
                        TypeError, "folder"))

ROWS += [
    Refusal("load, missing", lambda folder: KNNMemory.load(folder / "none"), OSError, "file"),
    Refusal("load, a folder", lambda folder: KNNMemory.load(folder), OSError, "file"),
    Refusal("load, text", lambda folder: KNNMemory.load(written(folder, "m", b"text" * 9)),
            ValueError, "file"),
    Refusal("load, empty", lambda folder: KNNMemory.load(written(folder, "m", b"")), ValueError,
            "file"),
    Refusal("load, no header", lambda folder: load(folder, format=None), ValueError, "KNNMemory"),
    Refusal("load, path in the header", lambda folder: load(folder, path="/"), ValueError, "header"),
    Refusal("load, dim missing", lambda folder: load(folder, dim=None), ValueError, "header"),
    Refusal("load, 10**9 rows", lambda folder: load(folder, num_indices="1000000000"), ValueError,
            "row0"),
    Refusal("load, negative size", lambda folder: load(folder, dim="-3"), ValueError, "dim"),
    Refusal("load, another width", lambda folder: load(folder, dim="4"), ValueError, "rows"),
    Refusal("load, too many memories", lambda folder: load(folder, max_memories="3"), ValueError,
            "at most 3"),
    Refusal("load, integers", lambda folder: load(folder, dict(row0=torch.ones(4, 2, 3).long())),
            (ValueError, TypeError), "memories|type"),
    Refusal("load, NaN", lambda folder: load(folder, dict(row0=torch.ones(4, 2, 3) * torch.nan)),
            ValueError, "NaN"),
    Refusal("load, unknown option", lambda folder: load(folder, options=dict(rows=3)), TypeError,
            "options"),
    Refusal("load, another dim", lambda folder: load(folder, options=dict(dim=3)), TypeError,
            "options"),
]
for name, data in (("memory.json", b"{"), ("memory.json", b""), ("memory.json", b"[]"),
                   ("memory.json", b"[" * 4000), ("memory.json", b"\xff\xfe"),
                   ("memory.json", b'{"dim": -3}'), ("kv.bin", b""), ("kv.bin", b"12345"),
                   ("numbers.bin", b""), ("numbers.bin", b"\xff" * 31 + b"\x80"),
                   ("numbers.bin", b"\x7f" * 32)):
    ROWS.append(Refusal(f"a folder with {name} of {data[:12]!r}",
                        lambda folder, n=name, d=data: reopened(folder, n, d), ValueError, "path"))
ROWS += [
    Refusal("a folder of other sizes", lambda folder: [memory(path=folder / "m").close(),
                                                       KNNMemory(4, 10, 2, path=folder / "m")],
            ValueError, "dim is 3 there"),
    Refusal("a folder opened twice", lambda folder: [memory(path=folder / "m"),
                                                     KNNMemory(3, 10, 2, path=folder / "m")],
            ValueError, "open already"),
    Refusal("a file as path", lambda folder: KNN(path=written(folder, "f", b"")), ValueError, "path"),
    Refusal("temporary, with files", lambda folder: [
        written(folder, "f", b""), KNN(path=folder, temporary=True)], ValueError, "temporary"),
    Refusal("a folder on an accelerator", lambda folder: KNN(path=folder / "m", device="meta"),
            ValueError, "device"),
]

ROWS += [Refusal(f"KNNStore, {name}", lambda c=changed: store(**c), ValueError, r"\bkv\b")
         for name, changed in (
             ("three in place of two", dict(kv=torch.zeros(2, 5, 3, 3))),
             ("no rows", dict(kv=torch.zeros(5, 2, 3))), ("other rows", dict(written=torch.zeros(3))),
             ("too many slots", dict(max_memories=4)))]
ROWS += [Refusal(f"write, {name}", lambda v=new: store().write(*v), ValueError, r"\bnew\b")
         for name, new in (
             ("width", (FLOATS[..., :2],)), ("rows", (FLOATS[:1],)), ("axes", (FLOATS[0],)),
             ("mask", (FLOATS, torch.ones(2, 3).bool())), ("keys alone", (FLOATS[:, :, :1],)))]
KEYS, FILL = torch.ones(2, 5, 3), torch.tensor([5, 5])
ROWS += refusals("nearest", lambda topk: nearest(KEYS, FILL, INPUT, topk), "topk", 0, -1, 1.5, "2",
                 None, True)
ROWS += [Refusal(f"nearest, queries, {name}", lambda v=q: nearest(KEYS, FILL, v, 1), ValueError,
                 r"\bqueries\b")
         for name, q in (("width", INPUT[..., :2]), ("rows", INPUT[:1]), ("axes", INPUT[0]))]
ROWS.append(Refusal("a spent store", lambda: (lambda s: [s.write(FLOATS), s.kv])(store()), ValueError,
                    "spent"))
