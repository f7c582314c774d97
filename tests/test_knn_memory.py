"""KNNMemory and the disk: whose files, which process, how large; copies, and calls of the original."""
import copy
import errno
import gc
import io
import json
import os
import pickle
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from memformers import (KNNMemory, KNNMemoryList, MemorizingTransformer, carry, generate, reset,
                        select)
from memformers.knn import KNNStore

FORK = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")


def numbered(first, n, rows=1, dim=3):
    """Memories that know their number: (rows, n, 2, dim)."""
    i = torch.arange(first, first + n, dtype=torch.float32)
    return i.view(1, n, 1, 1).expand(rows, n, 2, dim).contiguous()


def found(memory):
    """The numbers of all memories of the first row in scope, the largest first."""
    kv, mask = memory.search(torch.ones(len(memory.rows), memory.dim), memory.max_memories)
    return kv[0, mask[0], 0, 0].int().tolist()


# a closed memory is not an empty one

@pytest.mark.parametrize("use", [
    lambda m: m.search(torch.ones(1, 3), 1), lambda m: m.nearest(torch.ones(1, 1, 3), 1),
    lambda m: m.add(numbered(1, 1)), lambda m: m.clear(), lambda m: m.fill, lambda m: m.kv,
    lambda m: m.store, lambda m: m.capacity, lambda m: m.ages(torch.zeros(1, 1).long()),
    lambda m: m.clone(), lambda m: m.resize(4), lambda m: m.merge(KNNMemory(3, 10)),
    lambda m: KNNMemory(3, 10).merge(m), lambda m: m.flush(), lambda m: m.save("never")])
@pytest.mark.parametrize("on_disk", [False, True])
def test_a_closed_memory_refuses_every_use(use, on_disk, tmp_path):
    memory = KNNMemory(3, 10, path=tmp_path / "m" if on_disk else None)
    memory.add(numbered(1, 4))
    memory.close()
    memory.close()
    assert "closed" in repr(memory)
    with pytest.raises(ValueError, match="this memory is closed"): use(memory)


def test_a_model_does_not_read_a_closed_memory_as_an_empty_one():
    model = MemorizingTransformer(17, 8, 2, heads=2, dim_head=4, seq_len=4, max_knn_memories=8)
    memories = model.create_knn_memories(batch_size=1)
    memories.cleanup()
    with pytest.raises(ValueError, match="closed"):
        model(torch.zeros(1, 4).long(), knn_memories=memories, add_knn_memory=False)


def test_a_memory_without_memories_can_be_asked():
    memory = KNNMemory(3, 10, 2)
    assert memory.kv.shape == (2, 0, 2, 3) and memory.store.written.tolist() == [0, 0]
    assert not memory.nearest(torch.ones(2, 4, 3), 5)[2].any()
    with memory.at_batch_indices([1]): assert memory.kv.shape == (1, 0, 2, 3)


def test_save_after_close_leaves_the_good_file(tmp_path):
    memory = KNNMemory(3, 10)
    memory.add(numbered(1, 4))
    memory.save(tmp_path / "m.safetensors")
    memory.close()
    with pytest.raises(ValueError, match="closed"): memory.save(tmp_path / "m.safetensors")
    assert found(KNNMemory.load(tmp_path / "m.safetensors")) == [4, 3, 2, 1]


# files that are not trusted

GOOD = dict(format="memformers.knn.1", dim="3", max_memories="10", num_indices="1",
            backend="torch", index="flat", effort="64")


@pytest.mark.parametrize("extra", [dict(path="{}", temporary="1"), dict(temporary="True"),
                                   dict(path="{}"), dict(device="meta"), dict(dtype="float32")])
def test_the_header_of_a_file_cannot_delete_a_folder(tmp_path, extra):
    victim = tmp_path / "documents"
    victim.mkdir()
    (victim / "letter.txt").write_text("dear reader")
    extra = {k: v.format(victim) for k, v in extra.items()}
    save_file(dict(row0=numbered(1, 4)[0]), tmp_path / "m.safetensors", GOOD | extra)
    with pytest.raises(ValueError, match="the header of .* must hold"):
        KNNMemory.load(tmp_path / "m.safetensors")
    gc.collect()
    assert os.listdir(victim) == ["letter.txt"]


@pytest.mark.parametrize("header, rows, message", [
    (dict(num_indices="1000000000"), {}, "row0 to row999999999"),
    (dict(num_indices="1000000000"), dict(row0=4), "row0 to row999999999"),
    (dict(num_indices="2"), dict(row0=4), "row0 to row1; it holds 1"),
    (dict(num_indices="2"), dict(row0=4, row7=4), "row0 to row1"),
    (dict(dim="1000000000000"), dict(row0=4), r"must be \(n, 2, 1000000000000\)"),
    (dict(max_memories="3"), dict(row0=4), "at most 3 memories"),
    (dict(max_memories="-3"), dict(row0=4), "max_memories"), (dict(dim="0"), dict(row0=4), "dim"),
    (dict(dim="9" * 40), dict(row0=4), "dim"), (dict(dim="²"), dict(row0=4), "dim"),
    (dict(effort="0"), dict(row0=4), "effort"), (dict(index="tree"), dict(row0=4), "index"),
    (dict(backend="evil"), dict(row0=4), "backend"), (dict(format="other"), dict(row0=4), "KNNMemory")])
def test_sizes_in_a_header_are_compared_with_the_file(tmp_path, header, rows, message):
    rows = {name: numbered(1, n)[0].contiguous() for name, n in rows.items()}
    save_file(rows, tmp_path / "m.safetensors", GOOD | header)
    with pytest.raises(ValueError, match=message): KNNMemory.load(tmp_path / "m.safetensors")


def folder_of(tmp_path, memories=4, rows=1):
    """A closed store in a folder."""
    with KNNMemory(3, 10, rows, path=tmp_path / "m") as memory:
        memory.add(numbered(1, memories, rows))
    return tmp_path / "m"


@pytest.mark.parametrize("change, message", [
    (dict(dim=10 ** 12), "dim is 1000000000000 there, 3 here"), (dict(num_indices=True), "damaged"),
    (dict(max_memories=-3), "damaged"), (dict(dtype="int64"), "damaged"), (dict(dim="3"), "damaged"),
    (dict(dtype=["float32"]), "damaged"), (dict(path="/"), "damaged"), (dict(dim=None), "damaged"),
    (dict(dtype="float64"), "kv.bin has 240 bytes, expected 480")])
def test_the_header_of_a_folder_is_checked(tmp_path, change, message):
    folder = folder_of(tmp_path)
    header = json.loads((folder / "memory.json").read_text()) | change
    (folder / "memory.json").write_text(json.dumps(header))
    before = {f.name: f.read_bytes() for f in folder.iterdir()}
    with pytest.raises(ValueError, match=message): KNNMemory(3, 10, path=folder)
    assert {f.name: f.read_bytes() for f in folder.iterdir()} == before


@pytest.mark.parametrize("text", ["[" * 3000, "{}", "null", "\xff", "", " " * 100_000])
def test_a_header_that_is_no_header(tmp_path, text):
    folder = folder_of(tmp_path)
    (folder / "memory.json").write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match="path: .*memory.json is"): KNNMemory(3, 10, path=folder)


@pytest.mark.parametrize("count", [-3, 2 ** 62])
def test_counts_that_are_no_counts(tmp_path, count):
    folder = folder_of(tmp_path)
    (folder / "numbers.bin").write_bytes(torch.tensor([count, count]).numpy().tobytes())
    with pytest.raises(ValueError, match="numbers.bin is damaged"): KNNMemory(3, 10, path=folder)


def test_what_is_no_file_is_not_read(tmp_path):
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe")
        with pytest.raises(OSError, match="is not a file"): KNNMemory.load(tmp_path / "pipe")
        folder = folder_of(tmp_path)
        (folder / "memory.json").unlink()
        os.mkfifo(folder / "memory.json")
        with pytest.raises(ValueError, match="memory.json is not the header"):
            KNNMemory(3, 10, path=folder)


# only what the object created is removed

def test_a_temporary_memory_refuses_a_folder_with_files(tmp_path):
    (tmp_path / "letter.txt").write_text("dear reader")
    with pytest.raises(ValueError, match="temporary=True needs a new or an empty folder"):
        KNNMemory(3, 10, path=tmp_path, temporary=True)
    assert os.listdir(tmp_path) == ["letter.txt"]


@pytest.mark.parametrize("existing", [True, False])
def test_a_temporary_memory_removes_what_it_created_and_nothing_else(tmp_path, existing):
    folder = tmp_path / "m"
    if existing: folder.mkdir()
    memory = KNNMemory(3, 10, path=folder, temporary=True)
    memory.add(numbered(1, 4))
    (folder / "letter.txt").write_text("dear reader")
    memory.close()
    assert os.listdir(folder) == ["letter.txt"]
    (folder / "letter.txt").unlink()
    memory = KNNMemory(3, 10, path=folder, temporary=True)
    memory.add(numbered(1, 4))
    del memory
    gc.collect()
    assert folder.exists() and not os.listdir(folder), "the folder was there before"


def test_the_current_directory_is_not_meant_by_an_empty_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for temporary in (False, True):
        with pytest.raises(ValueError, match="path must not be empty"):
            KNNMemory(3, 10, path="", temporary=temporary)
    assert not os.listdir(tmp_path)


def test_a_refused_path_is_left_as_it_was(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file"): KNNMemory(3, 10, path=tmp_path / "file")
    folder = tmp_path / "m"
    folder.mkdir()
    (folder / "kv.bin").write_bytes(b"mine")
    with pytest.raises(ValueError, match="without memory.json"): KNNMemory(3, 10, path=folder)
    assert os.listdir(folder) == ["kv.bin"]


# the disk

def test_a_full_disk_is_an_error_and_not_a_signal(tmp_path):
    """A limit on the size of files stands for the full disk."""
    code = textwrap.dedent(f"""
        import os, resource, torch
        from memformers import KNNMemory
        memory = KNNMemory(64, 100_000, path={str(tmp_path / "m")!r})
        resource.setrlimit(resource.RLIMIT_FSIZE, (2 ** 20, 2 ** 20))
        for _ in range(2):
            try: memory.add(torch.ones(1, 4, 2, 64))
            except OSError as error: print(error)
        print(sorted(os.listdir({str(tmp_path / "m")!r})))
    """)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("path: cannot reserve 51,200,000 bytes") == 2
    assert "Free disk space" in done.stdout and "['lock']" in done.stdout


def test_the_space_of_a_memory_is_reserved_when_it_is_made(tmp_path):
    if not hasattr(os, "posix_fallocate"): pytest.skip("space is reserved by writing zeros")
    with KNNMemory(64, 10_000, path=tmp_path) as memory:
        memory.add(torch.ones(1, 1, 2, 64))
        file = os.stat(tmp_path / "kv.bin")
        assert file.st_size == 5_120_000 <= 512 * file.st_blocks


@pytest.mark.parametrize("first", [0, 1])   # already for keys and values, or only for the counts
def test_a_disk_that_is_full_says_so(tmp_path, monkeypatch, first):
    calls = []
    def full(fd, offset, length):
        calls.append(length)
        if len(calls) > first: raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    monkeypatch.setattr(torch, "from_file", lambda *args, **kwargs: torch.zeros(60))
    memory = KNNMemory(3, 10, path=tmp_path / "m")
    with pytest.raises(OSError, match="No space left.*max_memories") as caught:
        memory.add(numbered(1, 1))
    assert caught.value.errno == errno.ENOSPC and os.listdir(tmp_path / "m") == ["lock"]
    monkeypatch.undo()
    memory.add(numbered(1, 1))
    assert found(memory) == [1]


def test_files_have_the_modes_that_the_umask_gives(tmp_path):
    before = os.umask(0o022)
    try:
        folder = folder_of(tmp_path)
        memory = KNNMemory(3, 10)
        memory.add(numbered(1, 1))
        memory.save(tmp_path / "m.safetensors")
    finally: os.umask(before)
    for file in (*folder.iterdir(), tmp_path / "m.safetensors"):
        if file.name != "lock": assert file.stat().st_mode & 0o777 == 0o644, file


@pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="open files are read in /proc")
def test_flush_waits_for_keys_values_and_counts(tmp_path, monkeypatch):
    synced, fsync = [], os.fsync
    def note(fd):
        synced.append(Path(os.readlink(f"/proc/self/fd/{fd}")).name)
        fsync(fd)
    memory = KNNMemory(3, 10, path=tmp_path)
    memory.add(numbered(1, 4))
    monkeypatch.setattr(os, "fsync", note)
    memory.flush()
    assert sorted(synced) == ["kv.bin", "numbers.bin"]


def test_a_folder_of_the_first_version_opens(tmp_path):
    """Written as it was: sparse, with private files, and a count that has passed the capacity."""
    (tmp_path / "memory.json").write_text('{"dim": 3, "max_memories": 10, "num_indices": 2, '
                                          '"dtype": "float32"}')
    kv = torch.zeros(2, 10, 2, 3)
    for number in range(1, 14): kv[0, (number - 1) % 10] = number
    (tmp_path / "kv.bin").write_bytes(kv.numpy().tobytes())
    (tmp_path / "numbers.bin").write_bytes(torch.tensor([13, 0, 13, 0]).numpy().tobytes())
    for file in tmp_path.iterdir(): file.chmod(0o600)
    with KNNMemory(3, 10, 2, path=tmp_path) as memory:
        assert found(memory) == list(range(13, 3, -1)) and memory.fill.tolist() == [10, 0]


def test_a_file_of_the_first_version_loads(tmp_path):
    save_file(dict(row0=numbered(1, 4)[0]), tmp_path / "m.safetensors", GOOD)
    assert found(KNNMemory.load(tmp_path / "m.safetensors")) == [4, 3, 2, 1]
    save_file({}, tmp_path / "e.safetensors", GOOD | dict(num_indices="2"))   # an empty memory
    assert KNNMemory.load(tmp_path / "e.safetensors").fill.tolist() == [0, 0]


def test_a_file_is_not_loaded_into_a_folder_that_holds_a_memory(tmp_path):
    folder = folder_of(tmp_path)
    save_file(dict(row0=numbered(1, 4)[0]), tmp_path / "m.safetensors", GOOD)
    with pytest.raises(ValueError, match="holds a memory already"):
        KNNMemory.load(tmp_path / "m.safetensors", path=folder)
    with KNNMemory(3, 10, path=folder) as memory: assert found(memory) == [4, 3, 2, 1]


# other processes

@FORK
@pytest.mark.parametrize("temporary", [False, True])
def test_a_forked_child_reads_and_writes_nothing_of_the_parents(tmp_path, temporary):
    code = textwrap.dedent(f"""
        import gc, os, sys, torch
        from memformers import KNNMemory
        memory = KNNMemory(3, 10, path={str(tmp_path / "m")!r}, temporary={temporary})
        new = torch.ones(1, 4, 2, 3)
        memory.add(new)
        pid = os.fork()
        if not pid:
            for use in (lambda: memory.add(2 * new), memory.clear, memory.flush):
                try: use()
                except ValueError as error: print("refused:", error)
            print("found", memory.search(torch.ones(1, 3), 10)[1].sum().item(), flush=True)
            memory.close()
            del memory
            gc.collect()
            sys.exit()
        os.waitpid(pid, 0)
        assert sorted(os.listdir(memory._folder.path)) == ["kv.bin", "lock", "memory.json",
                                                           "numbers.bin"]
        try: KNNMemory(3, 10, path=memory._folder.path)
        except ValueError as error: print("locked:", "open already" in str(error))
        memory.add(new)
        assert memory.fill.tolist() == [8] and (memory.kv[0, :8] == 1).all()
        memory.close()
    """)
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("refused: this memory was opened by process") == 3, done.stdout
    assert "found 4" in done.stdout and "locked: True" in done.stdout
    assert (tmp_path / "m").exists() != temporary


def test_a_memory_is_closed_by_another_thread_than_it_was_opened_in(tmp_path):
    memory = KNNMemory(3, 10, path=tmp_path)
    thread = threading.Thread(target=memory.close)
    thread.start()
    thread.join()
    KNNMemory(3, 10, path=tmp_path).close()


# copies

def test_a_store_is_copied_pickled_and_saved_by_torch(tmp_path):
    store = KNNStore(torch.zeros(1, 0, 2, 3), torch.zeros(1, dtype=torch.long), 5)
    store = store.write(numbered(1, 7))
    torch.save(store, tmp_path / "s.pt")
    for again in (copy.deepcopy(store), pickle.loads(pickle.dumps(store)),
                  torch.load(tmp_path / "s.pt", weights_only=False)):
        assert torch.equal(again.kv, store.kv) and again.written.tolist() == [7]
        assert again.max_memories == 5
        again.write(numbered(8, 1))
        store.kv
    model = MemorizingTransformer(17, 8, 2, heads=2, dim_head=4, seq_len=4, max_knn_memories=8)
    memory = carry(model.step(torch.zeros(1, 4).long()).memory)
    again = copy.deepcopy(memory)
    memory = carry(model.step(torch.zeros(1, 4).long(), memory).memory)
    assert again.knn.written.tolist() == [[4]] and memory.knn.written.tolist() == [[8]]


def test_a_memory_in_ram_is_copied_and_pickled():
    pytest.importorskip("faiss")
    for options in ({}, dict(backend="faiss", index="hnsw")):
        memory = KNNMemory(3, 3000, **options)
        memory.add(numbered(1, 2000))
        memory.search(torch.ones(1, 3), 1)
        for again in (copy.deepcopy(memory), pickle.loads(pickle.dumps(memory))):
            again.add(numbered(2001, 1))
            assert again.fill.tolist() == [2001] and memory.fill.tolist() == [2000]
            assert again.search(torch.ones(1, 3), 1)[1].all()


def test_a_memory_in_a_folder_is_not_copied_by_python(tmp_path):
    with KNNMemory(3, 10, path=tmp_path) as memory:
        memory.add(numbered(1, 4))
        for use in (copy.deepcopy, copy.copy, pickle.dumps,
                    lambda m: torch.save(m, io.BytesIO())):
            with pytest.raises(TypeError, match="in a folder .* `clone"): use(memory)
        assert found(memory.clone()) == [4, 3, 2, 1]


# an object is not a value

@pytest.mark.parametrize("use", [
    carry, torch.clone, lambda m: m.on_select([0]), lambda m: m.on_reset(torch.tensor([True])),
    lambda m: torch.add(m, 1)])
def test_an_object_that_changes_in_place_is_no_memory_value(use, tmp_path):
    for memory in (KNNMemory(3, 10), KNNMemory(3, 10, path=tmp_path),
                   KNNMemoryList([KNNMemory(3, 10)])):
        with pytest.raises(TypeError, match="is an object that changes in place.*init_memory"):
            use(memory)


def test_step_and_generate_refuse_a_memory_object():
    model = MemorizingTransformer(17, 8, 2, heads=2, dim_head=4, seq_len=4, max_knn_memories=8)
    tokens, memories = torch.zeros(1, 4).long(), model.create_knn_memories(batch_size=1)
    for memory in (memories, memories[0]):
        with pytest.raises(TypeError, match="memory must be|in place"): model.step(tokens, memory)
        with pytest.raises(TypeError, match="memory must be|in place"):
            generate(model, tokens, 3, memory=memory)


# NaN

@pytest.mark.parametrize("k", [2, None])
@pytest.mark.parametrize("n", [1, 4])   # few queries gather their memories, many take them all
def test_a_reset_row_is_fresh_also_after_nan(k, n):
    torch.manual_seed(0)
    model = MemorizingTransformer(17, 8, 2, heads=2, dim_head=4, seq_len=6, max_knn_memories=40,
                                  num_retrieved_memories=k)
    memory = carry(model.step(torch.randint(17, (2, 6))).memory)
    for _ in range(3): memory = carry(model.step(torch.randint(17, (2, 6)), memory).memory)
    kv = memory.knn.kv.clone()
    kv[0] = torch.nan
    poisoned = type(memory)(memory.xl, KNNStore(kv, memory.knn.written, 40))
    tokens = torch.randint(17, (2, n))
    out = model.step(tokens, reset(poisoned, torch.tensor([True, False])))
    torch.testing.assert_close(out.logits[:1], model.step(tokens[:1]).logits)
    torch.testing.assert_close(out.logits[1:], model.step(tokens[1:], select(memory, [1])).logits)
    again = model.step(tokens, carry(out.memory))
    torch.testing.assert_close(again.logits[:1],
                               model.step(tokens[:1], carry(model.step(tokens[:1]).memory)).logits)


# calls of the original package

def test_calls_of_the_original_package():
    memory = KNNMemory(dim=3, num_indices=3)
    assert memory.max_memories == 16_000
    memory.add(numbered(1, 4, 3))
    kv, mask = memory.search(torch.ones(3, 3), topk=2, nprobe=8)
    assert kv[0, :, 0, 0].tolist() == [4, 3] and mask.all()
    memory.set_scoped_indices([2, 0])
    assert memory.rows == [2, 0]
    memory.clear()
    memory.set_scoped_indices([1])
    memory.add(numbered(5, 1))
    memory.set_scoped_indices(None)
    assert memory.fill.tolist() == [0, 5, 0]
    with pytest.raises(ValueError, match="rows must be different indices"):
        memory.set_scoped_indices([3])


def test_a_list_of_memories_is_cleared_as_in_the_original():
    memories = KNNMemoryList.create_memories(2, 3, 3)
    for memory in memories: memory.add(numbered(1, 4, 2))
    memories.clear_memory(batch_indices=[1], memory_indices=(0, 2))
    assert [m.fill.tolist() for m in memories] == [[4, 0], [4, 4], [4, 0]]
    memories.clear_memory([0])
    assert [m.fill.tolist() for m in memories] == [[0, 0], [0, 4], [0, 0]]
    memories.clear_memory()
    assert [m.fill.tolist() for m in memories] == [[0, 0]] * 3


@pytest.mark.parametrize("kind", [str, Path])
def test_a_directory_may_be_a_path(tmp_path, kind):
    memories = KNNMemoryList.create_memories(1, 2, 3, 10, memories_directory=kind(tmp_path / "d"))
    for memory in memories: memory.add(numbered(1, 4))
    assert len(os.listdir(tmp_path / "d")) == 2
    memories.cleanup()
    assert not os.listdir(tmp_path / "d")


# faiss

def test_nprobe_is_the_effort_of_one_search():
    pytest.importorskip("faiss")
    gen = torch.Generator().manual_seed(0)
    exact, ivf = KNNMemory(16, 5000), KNNMemory(16, 5000, backend="faiss", index="ivf", effort=1)
    new = torch.randn(1, 5000, 2, 16, generator=gen)
    for memory in (exact, ivf): memory.add(new)
    q = torch.randn(1, 50, 16, generator=gen)
    true = exact.search(q, 10)[0][..., :, None, 0, :]
    recall = [(true == ivf.search(q, 10, nprobe=n)[0][..., None, :, 0, :]).all(-1).any(-1)
              .float().mean() for n in (None, 1000)]
    assert recall[0] < .5 and recall[1] == 1


@pytest.mark.parametrize("index", ["ivf", "hnsw"])
def test_an_index_does_not_grow_without_end(index):
    pytest.importorskip("faiss")
    memory = KNNMemory(4, 1100, backend="faiss", index=index)
    gen = torch.Generator().manual_seed(0)
    for _ in range(20):
        memory.add(torch.randn(1, 500, 2, 4, generator=gen))
        memory.search(torch.ones(1, 4), 3)
        if memory._indexes and memory._indexes[0].index is not None:
            assert memory._indexes[0].index.ntotal <= 2 * 1100
