"""Functions on memories, and the files of memories and models: corners that no mechanism shows."""
import copy
import json
import os
import resource
import stat
import struct
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from memformers import CompressiveTransformer, TransformerXL, carry, cast, clone, nbytes
from memformers.files import atomic_write, load_memory, read_config, save_memory
from memformers.memory import (fields, full_precision, is_memory, memory_state, put, replace, reset,
                               select, shared, slots)


@memory_state
class Toy:
    mem: Tensor = slots(1)
    fill: Tensor = None


@memory_state
class Other:
    mem: Tensor = slots(1)
    fill: Tensor = None


@memory_state
class Nested:
    toy: Toy
    total: Tensor = full_precision()
    limit: int = shared()


def toy(b=3, cls=Toy):
    return cls(torch.arange(b * 4.).view(b, 2, 2), torch.arange(b) % 3)


def small(**options):
    return TransformerXL(17, 8, 2, **(dict(heads=2, seq_len=4, mem_len=3) | options))


# rows

def test_rows_may_be_anything_that_holds_integers():
    memory, expected = toy(), select(toy(), torch.tensor([2, 0]))
    for rows in ([2, 0], (2, 0), range(2, -1, -2), np.array([2, 0]), [np.int64(2), np.int32(0)],
                 torch.tensor([2, 0], dtype=torch.uint8), [-1, 0], np.array([-1, -3])):
        got = select(memory, rows)
        assert torch.equal(got.mem, expected.mem) and torch.equal(got.fill, expected.fill)
        back = put(toy(), rows, got)
        assert torch.equal(back.mem, memory.mem)
    assert len(select(memory, []).mem) == 0


def test_a_negative_index_counts_from_the_end():
    assert torch.equal(select(toy(), [-1]).mem, toy().mem[2:])
    back = put(toy(), [-1], select(toy(), [0]))
    assert torch.equal(back.mem[2], toy().mem[0]) and torch.equal(back.mem[:2], toy().mem[:2])


def test_flags_may_be_anything_that_holds_bools():
    for rows in ([False, True, False], np.array([False, True, False])):
        assert torch.equal(reset(toy(), rows).mem[1], torch.zeros(2, 2))


# the dataclass that does not show itself

def test_a_memory_is_no_dataclass_to_others():
    import dataclasses
    memory = toy()
    assert is_memory(memory) and not dataclasses.is_dataclass(memory)
    assert [f.name for f in fields(memory)] == [f.name for f in fields(Toy)] == ["mem", "fill"]
    changed = replace(memory, fill=torch.zeros(3))
    assert changed.mem is memory.mem and not changed.fill.any() and memory.fill.any()
    with pytest.raises(AttributeError): memory.mem = None
    if hasattr(copy, "replace"): assert copy.replace(memory, mem=None).mem is None


def test_cast_leaves_counts_and_full_precision():
    memory = cast(Nested(toy(), torch.ones(3, 2), 7), dtype=torch.bfloat16)
    assert (memory.toy.mem.dtype, memory.toy.fill.dtype) == (torch.bfloat16, torch.int64)
    assert memory.total.dtype == torch.float32 and memory.limit == 7
    assert cast(memory, device="meta").toy.mem.is_meta
    assert nbytes(memory) == 3 * 4 * 2 + 3 * 8 + 6 * 4


def test_a_memory_on_another_device_is_refused_and_can_be_cast():
    model = TransformerXL(16, 8, 2, heads=2, seq_len=4)
    tokens, memory = torch.zeros(2, 4, dtype=torch.long), model.init_memory(2)
    away = cast(memory, device="meta")
    with pytest.raises(ValueError, match=r"memory.mem must be on cpu.*meta.*cast\(memory, device='cpu'\)"):
        model.step(tokens, away)
    with pytest.raises(ValueError, match=r"memory.mem must be on meta"):
        model.to("meta").step(tokens.to("meta"), memory)
    model.step(tokens.to("meta"), away)


@pytest.mark.parametrize("cls", [TransformerXL, CompressiveTransformer])
def test_a_step_can_be_exported(cls):
    """torch.export flattens the memory by its fields' names; what it gives is exact."""
    torch.manual_seed(0)

    class Stepper(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model
        def forward(self, tokens, memory):
            out = self.model.step(tokens, memory)
            return out.logits, carry(out.memory)

    model = cls(num_tokens=17, dim=8, depth=2, heads=2, seq_len=4, mem_len=4).eval()
    tokens = torch.randint(17, (3, 2, 4))
    memory = carry(model.step(tokens[0]).memory)
    exported = torch.export.export(Stepper(model), (tokens[1], memory)).module()
    for _ in range(2):
        expected = model.step(tokens[2], memory)
        logits, memory = exported(tokens[2], memory)
        torch.testing.assert_close(logits, expected.logits)
        for x, y in zip(memory, carry(expected.memory), strict=True):
            torch.testing.assert_close(x, y)


# writing

def test_a_file_is_on_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    happened, fsync, move = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (happened.append("fsync"), fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda *a: (happened.append("replace"), move(*a)))
    save_memory(toy(), tmp_path / "memory.safetensors")
    assert happened == ["fsync", "replace"]


@pytest.mark.skipif(os.name == "nt", reason="modes are those of POSIX")
@pytest.mark.parametrize("mask", [0o022, 0o002, 0o077])
def test_modes_follow_the_umask(tmp_path, mask):
    before = os.umask(mask)
    try:
        save_memory(toy(), tmp_path / "memory.safetensors")
        small().save_pretrained(tmp_path / "model")
    finally: os.umask(before)
    for path in ("memory.safetensors", "model/model.safetensors", "model/config.json"):
        assert stat.S_IMODE((tmp_path / path).stat().st_mode) == 0o666 & ~mask, path


def test_a_full_disk_is_one_error_that_says_what_to_do(tmp_path):
    """A limit on the size of files stands for the full disk; it would hold for this process too."""
    path = tmp_path / "memory.safetensors"
    save_memory(toy(), path)
    code = f"""
import resource, torch
from memformers import TransformerXL, save_memory
model = TransformerXL(17, 8, 2, heads=2, seq_len=4, mem_len=3)
resource.setrlimit(resource.RLIMIT_FSIZE, (500, 500))
for save in (lambda: save_memory(model.init_memory(9), {str(path)!r}),
             lambda: model.save_pretrained({str(tmp_path)!r})):
    try: save()
    except OSError as error: print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    said = done.stdout.splitlines()
    assert len(said) == 2 and all("cannot write" in s and "Free space" in s for s in said), said
    assert torch.equal(load_memory(path, like=toy()).mem, toy().mem)
    assert [p.name for p in tmp_path.iterdir()] == ["memory.safetensors"]


def test_a_draft_never_stays(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        with atomic_write(tmp_path / "a") as draft:
            draft.write_text("half")
            raise KeyboardInterrupt
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="cannot write .*file.a"):
        save_memory(toy(), tmp_path / "file" / "a")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


# files of memories

def test_a_file_of_another_class_is_refused(tmp_path):
    save_memory(toy(cls=Other), tmp_path / "memory")
    with pytest.raises(ValueError, match="holds a Other, but `like` is a Toy"):
        load_memory(tmp_path / "memory", like=toy())


def header(path, tensors, metadata=None, data=b""):
    """A safetensors file with a header of one's own."""
    text = json.dumps({"__metadata__": metadata or {}} | tensors).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


HEAD = {"format": "memformers.memory.1", "class": "Toy"}
MEM = {"dtype": "F32", "shape": [3, 2, 2], "data_offsets": [0, 48]}
FILL = {"dtype": "I64", "shape": [3], "data_offsets": [48, 72]}


@pytest.mark.parametrize("tensors, data", [
    ({"mem": MEM | {"shape": [10**9, 2, 2], "data_offsets": [0, 16 * 10**9]}}, 48),
    ({"mem": MEM | {"shape": [-3, 2, 2]}, "fill": FILL}, 72),
    ({"mem": MEM | {"shape": [0, 10**18, 10**18], "data_offsets": [0, 0]}}, 0),
    ({"mem": MEM | {"dtype": "F16", "data_offsets": [0, 24]}}, 24),
    ({"mem": MEM | {"shape": []}}, 48),
    ({"mem": MEM | {"shape": [12]}}, 48),
    ({"mem": MEM}, 48),
    ({"mem": MEM, "fill": FILL, "more": FILL | {"data_offsets": [72, 96]}}, 96),
])
def test_a_header_that_lies_is_refused(tmp_path, tensors, data):
    with pytest.raises(ValueError, match="memory.bin"):
        load_memory(header(tmp_path / "memory.bin", tensors, HEAD, bytes(data)), like=toy())
    header(tmp_path / "memory.bin", {"mem": MEM, "fill": FILL}, {"format": HEAD["format"]}, bytes(72))
    with pytest.raises(ValueError, match="holds a None"):
        load_memory(tmp_path / "memory.bin", like=toy())


def test_nothing_is_loaded_before_it_fits(tmp_path, monkeypatch):
    """A file of the wrong size is refused by its header alone."""
    save_memory(toy(5), tmp_path / "memory")
    monkeypatch.setattr(Tensor, "to", lambda *_: pytest.fail("a tensor was loaded"))
    with pytest.raises(ValueError, match="mem is 5×2×2 float32 in the file, expected 3×2×2"):
        load_memory(tmp_path / "memory", like=toy())


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes are those of POSIX")
def test_a_pipe_is_not_waited_for(tmp_path):
    small().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    os.mkfifo(tmp_path / "model.safetensors")
    for call in (lambda: load_memory(tmp_path / "model.safetensors", like=toy()),
                 lambda: TransformerXL.from_pretrained(tmp_path),
                 lambda: load_memory("/dev/zero", like=toy())):
        said = []

        def run():
            try: call()
            except ValueError as error: said.append(str(error))

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        thread.join(20)
        assert said and "is not a regular file" in said[0]


# files of models

HOSTILE = {
    "ten million layers": dict(depth=10**7), "a width of 10⁹": dict(dim=10**9),
    "a number of 10¹²": dict(mem_len=10**12), "minus three": dict(depth=-3),
    "no number": dict(depth="two"), "not finite": dict(attn_dropout=float("inf")),
    "another width": dict(dim=12), "a class that is none": dict(model_class=3),
    "another class": dict(model_class="CompressiveTransformer"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_config_that_lies_is_refused_at_once(tmp_path, name):
    small().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | HOSTILE[name]
    (tmp_path / "config.json").write_text(json.dumps(config))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError): TransformerXL.from_pretrained(tmp_path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000   # kB


@pytest.mark.parametrize("text", ["[" * 100_000, "{", "[]", "9" * 5000, "{}" + " " * (1 << 20)])
def test_a_config_that_is_none_is_refused(tmp_path, text):
    small().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(text)
    for call in (lambda: read_config(tmp_path / "config.json"),
                 lambda: TransformerXL.from_pretrained(tmp_path)):
        with pytest.raises(ValueError, match="config.json"): call()


def test_weights_are_floats_of_one_type(tmp_path):
    model = small().bfloat16()
    model.save_pretrained(tmp_path)
    assert next(TransformerXL.from_pretrained(tmp_path).parameters()).dtype == torch.bfloat16
    save_file({k: t.int() for k, t in model.state_dict().items()}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="weights of one floating type"):
        TransformerXL.from_pretrained(tmp_path)


def test_a_memory_of_an_original_answers_as_its_tuple():
    memory = CompressiveTransformer(num_tokens=11, dim=8, depth=1, heads=2, seq_len=4).init_memory(2)
    mem, cmem = memory
    assert len(memory) == 2 and memory[0] is mem and memory[-1] is cmem and memory[:1] == (mem,)
    ones = memory._replace(mem=torch.ones_like(mem))
    assert ones.mem.all() and ones.cmem is cmem and not mem.any()


def test_a_clone_shares_nothing():
    memory = toy()
    clone(memory).mem.zero_()
    assert memory.mem.any()
