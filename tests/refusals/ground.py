"""Functions on memories, and files of memories and models."""
import json

import numpy as np
import torch
from torch import Tensor

from memformers import (TransformerXL, carry, cast, clone, load_memory, nbytes, reset, save_memory,
                        select)
from memformers.files import atomic_write, read_config
from memformers.memory import (batch_size, check_memory, fields, memory_state, put, replace, shuffle,
                               slots)
from refusals.common import REFUSED, Refusal, refusals


@memory_state
class Toy:
    mem: Tensor = slots(1)
    fill: Tensor = None


def toy(b=3, d=2): return Toy(torch.ones(b, 2, d), torch.ones(b, dtype=torch.long))


# Flags and indices.
FLAGS = (torch.tensor([0]), [0, 2], True, None, "all", [True], [True] * 4, [[True] * 3],
         np.array([1, 0, 1]), torch.ones(3), torch.ones(3, dtype=torch.uint8), 1, object)
INDICES = (3, -1, "0", None, [3], [-4], [0.5], [[0]], [True, False, True], np.array([3]),
           torch.tensor([0.]), torch.tensor(0), torch.tensor([True] * 3), [1j], [10**12], [10**30],
           ["a"], {0}, object)
ROWS = refusals("reset", lambda rows: reset(toy(), rows), "rows", *FLAGS)
ROWS += refusals("select", lambda rows: select(toy(), rows), "rows", *INDICES)
ROWS += refusals("put", lambda rows: put(toy(), rows, toy(1)), "rows", *INDICES)
ROWS += [Refusal("put, the same row twice", lambda: put(toy(), [0, -3], toy(2)), ValueError, "rows")]

# Parts of another kind.
PARTS = {"of two rows": toy(2), "wider": toy(1, d=3), "of doubles": cast(toy(1), dtype=torch.double),
         "a tuple": tuple(toy(1)), "None": None}
ROWS += [Refusal(f"put, part {what}", lambda p=part: put(toy(), [0], p), REFUSED, "part")
         for what, part in PARTS.items()]

# What is no memory at all.
NOT_A_MEMORY = {"a number": 3, "a string": "memory", "a dict of numbers": {"mem": 1}, "an array":
                np.zeros(3), "a list of lists": [[1.0]]}
CALLS = dict(carry=carry, clone=clone, nbytes=nbytes, cast=lambda m: cast(m, dtype=torch.double),
             reset=lambda m: reset(m, [True]), select=lambda m: select(m, [0]), shuffle=shuffle,
             batch_size=batch_size, fields=fields, replace=replace,
             put=lambda m: put(m, [0], toy(1)))
ROWS += [Refusal(f"{name} of {what}", lambda c=call, v=value: c(v), TypeError, "memory")
         for name, call in CALLS.items() for what, value in NOT_A_MEMORY.items()]
ROWS += [Refusal(f"{name} of None", lambda c=call: c(None), TypeError, "memory")
         for name, call in CALLS.items() if name not in ("carry", "clone", "nbytes")]
ROWS += [Refusal(f"save_memory of {what}", lambda folder, v=value: save_memory(v, folder / "m"),
                 TypeError, "memory") for what, value in NOT_A_MEMORY.items()]
ROWS += [Refusal("replace, an unknown field", lambda: replace(toy(), slots=1), TypeError, "slots")]
ROWS += refusals("cast", lambda dtype: cast(toy(), dtype=dtype), "dtype", torch.int64, "float32",
                 np.float32, 16)

# Memories that do not fit.
MISFITS = {"of doubles": cast(toy(), dtype=torch.double), "of int32 counts": replace(
           toy(), fill=torch.ones(3, dtype=torch.int32)), "wider": toy(d=3), "of two rows": toy(2),
           "a tuple": tuple(toy()), "None": None,
           "without a tensor": replace(toy(), mem="mem"), "flat": replace(toy(), mem=torch.ones(3))}
ROWS += [Refusal(f"check_memory {what}", lambda m=memory: check_memory(m, toy(1), 3), REFUSED,
                 "memory") for what, memory in MISFITS.items()]

# Paths.
PATHS = {"a number": 3, "None": None, "empty": "", "the root": "/", "a null byte": "a\0b"}
ROWS += [Refusal(f"{name}, path {what}", lambda c=call, p=path: c(p), REFUSED, "path")
         for what, path in PATHS.items() for name, call in dict(
             save_memory=lambda p: save_memory(toy(), p), load_memory=lambda p: load_memory(p, toy()),
             atomic_write=lambda p: atomic_write(p).__enter__(), read_config=read_config,
             from_pretrained=TransformerXL.from_pretrained).items()]


def written(folder, data):
    path = folder / "file"
    path.write_bytes(data) if isinstance(data, bytes) else path.write_text(data)
    return path


CONTENTS = {"empty": b"", "text": b"not a memory at all", "half a header": b"\x10\0\0\0\0\0\0\0{",
            "a header of 2⁶³ bytes": b"\0\0\0\0\0\0\0\x80", "no tensors": b"\x02\0\0\0\0\0\0\0{}"}
ROWS += [Refusal(f"load_memory of a file, {what}",
                 lambda folder, d=data: load_memory(written(folder, d), toy()), ValueError, "file")
         for what, data in CONTENTS.items()]
ROWS += [
    Refusal("load_memory of nothing", lambda folder: load_memory(folder / "none", toy()),
            FileNotFoundError, "none"),
    Refusal("load_memory of a folder", lambda folder: load_memory(folder, toy()), ValueError,
            "not a regular file"),
    Refusal("load_memory of a device", lambda: load_memory("/dev/zero", toy()), ValueError,
            "/dev/zero"),
    Refusal("save_memory to a folder", lambda folder: save_memory(toy(), folder), OSError,
            "cannot write"),
    Refusal("read_config of nothing", lambda folder: read_config(folder / "config.json"),
            FileNotFoundError, "config.json"),
]
ROWS += refusals("load_memory", lambda like: load_memory("memory", like), "like", None, 3, "like",
                 {"mem": 1})

CONFIGS = {"a list": [], "no class": {"dim": 8}, "a class of 3": {"model_class": 3},
           "a count of 10¹²": {"model_class": "TransformerXL", "depth": 10**12}}
ROWS += [Refusal(f"read_config, {what}",
                 lambda folder, c=config: read_config(written(folder, json.dumps(c))), ValueError,
                 "file") for what, config in CONFIGS.items()]
ROWS += [Refusal(f"read_config, {what}", lambda folder, t=text: read_config(written(folder, t)),
                 ValueError, "file")
         for what, text in {"no JSON": "{", "brackets": "[" * 100_000, "digits": "9" * 9999,
                            "a megabyte": " " * (1 << 21), "no text": b"\xff\xfe"}.items()]
