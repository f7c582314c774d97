"""KNNMemory against plain Python lists, in files and out of them, and what it refuses."""
import gc
import os
import subprocess
import sys
import textwrap

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from memformers import KNNMemory, KNNMemoryList
from memformers.files import load_memory, save_memory
from memformers.knn import KNNStore, _two_stage_topk, nearest
from memformers.memory import carry, clone, nbytes, put, reset, select, shuffle


def numbered(first, n, rows=1, dim=3):
    """Memories that know their number: (rows, n, 2, dim)."""
    i = torch.arange(first, first + n, dtype=torch.float32)
    return i.view(1, n, 1, 1).expand(rows, n, 2, dim).contiguous()


def held(memory, row=0):
    """The numbers that a search of everything finds in a row of scope, ascending."""
    q = torch.ones(len(memory.rows), memory.dim, device=memory.device)
    kv, mask = memory.search(q, memory.max_memories)
    assert not kv[~mask].any(), "what is not found is zero"
    assert torch.equal(kv[..., 0, :], kv[..., 1, :]), "a key brings its own value"
    return sorted(kv[row, mask[row], 0, 0].int().tolist())


# the oldest leave first

@settings(max_examples=60, deadline=None)
@given(st.integers(1, 12), st.integers(1, 9), st.lists(st.tuples(
    st.sampled_from(["add", "add", "add", "masked", "one row", "clear"]), st.integers(0, 30)),
    max_size=12))
def test_a_memory_is_a_list_that_forgets_its_oldest(capacity, topk, actions):
    memory, lists, number = KNNMemory(3, capacity, 2), [[], []], 0
    for action, n in actions:
        new = numbered(number + 1, n, 2)
        if action == "add":
            memory.add(new)
            for row in lists: row.extend(range(number + 1, number + n + 1))
        elif action == "masked":
            mask = torch.rand(2, n, generator=torch.Generator().manual_seed(n)) < .5
            memory.add(new, mask)
            for row, m in zip(lists, mask):
                row.extend(number + 1 + i for i in range(n) if m[i])
        elif action == "one row":
            with memory.at_batch_indices([1]): memory.add(new[1:])
            lists[1].extend(range(number + 1, number + n + 1))
        else:
            memory.clear([n % 2])
            lists[n % 2] = []
        number += n
        for r in range(2):
            assert memory.fill[r] == min(capacity, len(lists[r]))
            assert held(memory, r) == lists[r][-capacity:]
    topk = min(topk, capacity)
    kv, mask = memory.search(torch.ones(2, 3), topk)
    for r in range(2):   # the largest numbers have the largest products
        best = sorted(lists[r][-capacity:], reverse=True)[:topk]
        assert kv[r, mask[r], 0, 0].int().tolist() == best


def test_after_a_million_writes():
    memory, gen = KNNMemory(8, 1000, 1), torch.Generator().manual_seed(0)
    for _ in range(100): memory.add(torch.randn(1, 10_007, 2, 8, generator=gen))
    last = torch.randn(1, 700, 2, 8, generator=gen)
    memory.add(last)
    q = last[:, :50, 0]
    kv, mask = memory.search(q * 100, 1)
    assert mask.all() and memory.fill.tolist() == [1000]
    products = q[0] @ memory.kv[0, :, 0].T
    torch.testing.assert_close((kv[0, :, 0, 0] * q[0]).sum(-1), products.amax(1))


@pytest.mark.parametrize("capacity, n", [(64, 32), (64, 64), (64, 100), (10, 7), (1, 3)])
def test_a_full_store_is_not_emptied_and_does_not_outgrow_its_capacity(capacity, n):
    memory = KNNMemory(3, capacity)
    for i in range(20):
        memory.add(numbered(i * n, n))
        assert held(memory) == list(range(max(0, (i + 1) * n - capacity), (i + 1) * n))
        assert memory.capacity <= capacity


def test_a_key_keeps_its_value_and_its_mask_after_the_store_overflowed():
    memory, gen = KNNMemory(16, 64), torch.Generator().manual_seed(0)
    for _ in range(40):
        new = torch.randn(1, 24, 2, 16, generator=gen)
        new[:, :, 0] /= new[:, :, 0].norm(dim=-1, keepdim=True)
        memory.add(new)
        kv, mask = memory.search(new[:, :, 0], 1)
        assert mask.all() and torch.equal(kv[:, :, 0], new)


def test_writing_to_one_row_moves_no_other_row():
    memory = KNNMemory(3, 20, 2)
    with memory.at_batch_indices([0]): memory.add(numbered(1, 16))
    assert memory.fill.tolist() == [16, 0]
    memory.add(numbered(100, 4, 2))
    assert held(memory, 0) == [*range(1, 17), *range(100, 104)]
    assert held(memory, 1) == list(range(100, 104))


def test_rows_in_scope_end_with_the_block_also_after_an_error():
    memory = KNNMemory(3, 20, 3)
    with pytest.raises(RuntimeError), memory.at_batch_indices([2]): raise RuntimeError
    assert memory.rows == [0, 1, 2]
    memory.add(numbered(1, 4, 3))
    with memory.at_batch_indices((2, 0)):
        with memory.at_batch_indices([1]): memory.clear()
        assert memory.rows == [2, 0] and memory.fill.tolist() == [4, 0]
        with pytest.raises(ValueError, match="from 0 to 1"): memory.clear(2)
    assert memory.fill.tolist() == [0, 4, 4]


@pytest.mark.parametrize("rows", [1, [1], (1,), {1}, torch.tensor([1]), range(1, 2)])
def test_clear_takes_any_collection_of_rows(rows):
    memory = KNNMemory(3, 20, 2)
    memory.add(numbered(1, 4, 2))
    memory.clear(rows)
    assert memory.fill.tolist() == [4, 0] and held(memory, 1) == []
    memory.clear()
    assert memory.fill.tolist() == [0, 0]


# the search

@pytest.mark.parametrize("m, k", [(1, 1), (5, 5), (33, 5), (100, 1), (2048, 32), (5001, 17)])
def test_two_stages_find_the_largest(m, k):
    values = torch.randn(7, m, dtype=torch.float64, generator=torch.Generator().manual_seed(m))
    found, columns = _two_stage_topk(values, k)
    want = values.topk(k)
    assert torch.equal(found.sort(1, descending=True).values, want.values)
    assert torch.equal(values.gather(1, columns), found)
    same = values.new_zeros(3, m)   # all equal: k different columns
    assert all(len(set(c)) == k for c in _two_stage_topk(same, k)[1].tolist())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_search_is_exact_over_several_chunks(dtype, monkeypatch):
    import memformers.knn as knn
    monkeypatch.setattr(knn, "_CHUNK", 100)
    monkeypatch.setattr(knn, "_BUFFER", 700)
    gen = torch.Generator().manual_seed(0)
    keys = torch.randn(3, 260, 16, generator=gen, dtype=torch.float64).to(dtype)
    q, fill = torch.randn(3, 11, 16, generator=gen).to(dtype), torch.tensor([260, 3, 0])
    scores, slots, found = nearest(keys, fill, q, 9)
    assert found.sum(-1).unique_consecutive(dim=1).tolist() == [[9], [3], [0]]
    for r, m in enumerate(fill.tolist()):
        if not m: continue
        want = (q[r].double() @ keys[r, :m].double().T).topk(min(9, m))
        got = scores[r][found[r]].view(11, -1).sort(1, descending=True).values
        torch.testing.assert_close(got.double(), want.values, rtol=1e-5, atol=1e-5)
        exact = (q[r].double() @ keys[r].double().T).gather(1, slots[r])
        torch.testing.assert_close(scores[r].double(), exact * found[r], rtol=1e-5, atol=1e-5)


def test_shapes_of_queries_and_fewer_memories_than_asked_for():
    memory = KNNMemory(dim=64, max_memories=64000, num_indices=2)
    q = torch.randn(2, 8, 5, 64)
    assert [x.shape for x in memory.search(q, 32)] == [(2, 8, 5, 32, 2, 64), (2, 8, 5, 32)]
    memory.add(torch.randn(2, 5, 2, 64))
    kv, mask = memory.search(q, 32)
    assert kv.shape == (2, 8, 5, 32, 2, 64) and mask[..., :5].all() and not mask[..., 5:].any()
    assert not kv[~mask].any()
    assert memory.search(q[:, 0, 0], 2)[0].shape == (2, 2, 2, 64)
    with memory.at_batch_indices([1]):
        assert memory.search(q[1:], 2)[0].shape == (1, 8, 5, 2, 2, 64)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_numbers_stay_in_the_precision_in_which_they_came(dtype):
    memory = KNNMemory(8, 100)
    new = torch.randn(1, 60, 2, 8).to(dtype)
    memory.add(new.requires_grad_())
    kv, mask = memory.search(torch.randn(1, 4, 8).to(dtype), 60)
    assert kv.dtype == dtype and mask.all() and not kv.requires_grad
    assert torch.equal(kv[0, 0].sort(0).values, new[0].detach().sort(0).values)
    assert memory.nbytes == memory.kv.nbytes + 8


def test_a_search_works_in_blocks():
    """Whatever the number of queries, working memory is bounded."""
    class Largest(TorchDispatchMode):
        bytes = 0
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **kwargs or {})
            if isinstance(out, torch.Tensor): self.bytes = max(self.bytes, out.nbytes)
            return out

    keys, q = torch.randn(1, 70_000, 8), torch.randn(1, 4000, 8)
    with Largest() as largest: nearest(keys, torch.tensor([70_000]), q, 4)
    assert largest.bytes < 2 ** 26   # all products together are 1.1 GB


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="peak memory is read in /proc")
@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_a_search_takes_less_than_half_a_gigabyte(dtype):
    """What the process really takes at its peak, beside keys and queries; all products: 1.1 GB."""
    code = textwrap.dedent(f"""
        import torch
        from memformers.knn import nearest
        def kilobytes(name):
            lines = open("/proc/self/status").read().splitlines()
            return int(next(line.split()[1] for line in lines if line.startswith(name + ":")))
        kv = torch.randn(1, 70_000, 2, 64).to(torch.{dtype})
        q, fill = torch.randn(1, 4096, 64).to(torch.{dtype}), torch.tensor([70_000])
        nearest(kv[:, :10, 0], torch.tensor([10]), q[:, :10], 3)
        before = kilobytes("VmRSS")
        nearest(kv[:, :, 0], fill, q, 32)
        print(kilobytes("VmHWM") - before)
    """)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                          env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)})
    assert 2 ** 14 < int(done.stdout) < 2 ** 19   # and it is the search that was measured


@pytest.mark.parametrize("m", [40, 96, 97, 2047, 2048, 2049, 5000, 70_001])
def test_the_last_tile_may_be_short(m):
    """All products are negative: a column that belongs to no key would win."""
    gen = torch.Generator().manual_seed(m)
    keys, q = torch.rand(1, m, 4, generator=gen), -torch.rand(1, 300, 4, generator=gen)
    want = (q[0] @ keys[0].T).topk(3)
    for some in (q, q[:, :5]):
        scores, slots, found = nearest(keys, torch.tensor([m]), some, 3)
        assert found.all() and slots.max() < m
        scores, slots = scores[0].sort(1, descending=True).values, slots[0]
        torch.testing.assert_close(scores, want.values[:len(slots)])
        again = (q[0, :len(slots)] @ keys[0].T).gather(1, slots).sort(1, descending=True).values
        torch.testing.assert_close(scores, again)


def test_the_search_of_an_accelerator_is_the_same(monkeypatch):
    """There nobody looks how many memories there are: all slots are compared, and masked."""
    gen = torch.Generator().manual_seed(0)
    keys, q = torch.randn(3, 5000, 8, generator=gen), torch.randn(3, 20, 8, generator=gen)
    fill = torch.tensor([5000, 7, 0])
    def in_order():
        scores, slots, found = nearest(keys, fill, q, 9)
        order = scores.masked_fill(~found, -torch.inf).argsort(2, descending=True)
        return [x.gather(2, order) for x in (scores, slots, found)]

    here = in_order()
    monkeypatch.setattr("memformers.knn._on_host", lambda t: False)
    with Looks() as looks: there = in_order()
    assert looks.count == 0 and torch.equal(here[2], there[2])
    for a, b in zip(here[:2], there[:2]): torch.testing.assert_close(a, b)


# faiss

@pytest.mark.parametrize("index", ["flat", "ivf", "hnsw"])
def test_faiss_finds_the_living_and_nothing_else(index):
    pytest.importorskip("faiss")
    gen = torch.Generator().manual_seed(0)
    make = lambda **options: KNNMemory(16, 3000, 2, **options)
    exact, other = make(), make(backend="faiss", index=index, effort=200)
    for i in range(13):
        new = torch.randn(2, 700, 2, 16, generator=gen)
        for memory in (exact, other): memory.add(new)
        if i == 9:
            for memory in (exact, other): memory.clear([1])
        if i % 3: continue
        q = torch.randn(2, 9, 16, generator=gen)
        (a, am), (b, bm) = exact.search(q, 10), other.search(q, 10)
        assert torch.equal(am, bm)
        found = (a[..., :, None, 0, :] == b[..., None, :, 0, :]).all(-1).any(-1)[am]
        assert found.float().mean() >= (1 if index == "flat" else .9)
        living = exact.store.chronological()[0]
        for r in range(2):   # whatever is found is a memory of that row, with its own value
            for kv in b[r, 0][bm[r, 0]]: assert (living[r] == kv).all((1, 2)).any()


def test_missing_faiss_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ImportError, match=r"torch-memformers\[cpu\]"):
        KNNMemory(4, 10, backend="faiss")
    KNNMemory(4, 10).add(numbered(0, 3, dim=4))


# a store as a value

def filled_store(rows=2, capacity=5, n=8):
    store = KNNStore(torch.zeros(rows, capacity, 2, 3), torch.zeros(rows, dtype=torch.long))
    return store.write(numbered(1, n, rows))


def test_a_spent_store_says_so_and_shows_the_way_out():
    store = filled_store()
    copy, other = clone(store), select(store, [0, 1])
    emptied = reset(store, torch.tensor([True, False]))
    store.kv, emptied.kv   # a reset writes nothing: both are good
    after = store.write(numbered(9, 1, 2))
    for spent in (store, emptied):
        with pytest.raises(ValueError, match="spent.*clone"): spent.write(numbered(9, 1, 2))
        with pytest.raises(ValueError, match="spent.*clone"): clone(spent)
    for whole in (after, copy, other, carry(copy)): assert whole.fill.tolist() == [5, 5]


@pytest.mark.parametrize("n", [1, 3])   # in place, and into a larger tensor
def test_a_write_may_copy(n):
    store = growing(2, 6).write(numbered(1, 3, 2))
    before = store.kv.clone()
    after = store.write(numbered(9, n, 2), copy=True)
    assert torch.equal(store.kv, before) and not torch.equal(after.kv[:, :4], before)
    after.kv, store.write(numbered(9, n, 2)).kv


def growing(rows, most, dtype=torch.float32):
    return KNNStore(torch.zeros(rows, 0, 2, 3, dtype=dtype), torch.zeros(rows, dtype=torch.long),
                    most)


def test_a_store_begins_with_nothing_and_doubles():
    store, sizes = growing(2, 1000), []
    assert nbytes(store) == 2 * 8 and nbytes(store, full=True) == 2 * 1000 * 2 * 3 * 4 + 2 * 8
    for i in range(250):
        store = store.write(numbered(7 * i, 7, 2))
        sizes.append(store.capacity)
    assert list(dict.fromkeys(sizes)) == [8, 16, 32, 64, 128, 256, 512, 1000]
    assert nbytes(store) == nbytes(store, full=True)
    assert store.chronological()[0][1, :, 0, 0].tolist() == list(range(750, 1750))
    with pytest.raises(ValueError, match="at most max_memories = 4"):
        KNNStore(torch.zeros(1, 5, 2, 3), torch.zeros(1), 4)


def test_a_store_that_moved_to_a_larger_tensor_is_spent_all_the_same():
    for first in (0, 3):
        store = growing(2, 100).write(numbered(1, first, 2))
        kept, emptied = clone(store), reset(store, torch.tensor([True, False]))
        after = store.write(numbered(4, 20, 2))
        assert after.capacity == 32 > store.written.max()
        for spent in (store, emptied):
            for use in (lambda s: s.kv, clone, lambda s: s.write(numbered(9, 1, 2))):
                with pytest.raises(ValueError, match="spent.*clone"): use(spent)
        after.kv, kept.kv


@settings(max_examples=100, deadline=None)
@given(st.booleans(), st.sampled_from([1, 5, 100]), st.lists(st.tuples(st.sampled_from(
    ["write", "write", "write", "write", "masked", "masked", "reset", "select", "put", "clone"]),
    st.integers(0, 12)), max_size=20))
def test_a_store_that_grows_holds_what_a_full_one_holds(host, most, actions):
    """Through every verb; on an accelerator, where nobody looks, as well."""
    small, large = growing(3, most), KNNStore(torch.zeros(3, most, 2, 3),
                                              torch.zeros(3, dtype=torch.long))
    number = 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("memformers.knn._on_host", lambda t: host)
        for action, n in actions:
            new, gen = numbered(number, n, 3), torch.Generator().manual_seed(n)
            mask = torch.rand(3, n, generator=gen) < .5 if action == "masked" else None
            number += n

            def act(store):
                if action in ("write", "masked"): return store.write(new, mask)
                if action == "reset": return reset(store, torch.arange(3) == n % 3)
                if action == "select": return select(store, [n % 3, 2, 0])
                if action == "put":
                    part = select(store, [n % 3]).write(numbered(number, n))
                    return put(store, [(n + 1) % 3], part)
                return clone(store)

            small, large = act(small), act(large)
            number += n
            assert torch.equal(small.written, large.written) and small.capacity <= most
            a, b = (s.chronological()[0] for s in (small, large))
            assert torch.equal(a, b[:, :a.shape[1]]) and not b[:, a.shape[1]:].any()


class Looks(TorchDispatchMode):
    """Counts how often the host would wait for an accelerator."""
    count = 0
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket is torch.ops.aten._local_scalar_dense
        return func(*args, **kwargs or {})


def test_growth_does_not_wait_for_an_accelerator_at_each_segment(monkeypatch):
    monkeypatch.setattr("memformers.knn._on_host", lambda t: False)
    store, fresh = growing(2, 4000), growing(2, 4000)
    with Looks() as looks:
        for i in range(500):
            # Documents of twenty segments: the bound is too high after a reset, the store is not.
            if i % 20 == 0: store = reset(store, torch.tensor([True, True]))
            store = store.write(numbered(i, 5, 2))
    assert store.capacity == 128 and looks.count < 60
    with Looks() as looks:
        for i in range(1000): fresh = fresh.write(numbered(i, 5, 2))
    assert fresh.capacity == 4000 and looks.count == 10   # 8 slots, 16, …, 4000
    memory = KNNMemory(3, 4000)
    with Looks() as looks:
        for i in range(1000): memory.add(numbered(i, 5))
    # `add` looks for NaN, since here the tensors are on the host after all.
    assert memory.capacity == 4000 and looks.count <= 10 + 1000


def test_a_store_is_loaded_whatever_its_size(tmp_path):
    for n in (0, 3, 40):
        store = growing(2, 10).write(numbered(1, n, 2)) if n else growing(2, 10)
        save_memory(store, tmp_path / "s.safetensors")
        again = load_memory(tmp_path / "s.safetensors", like=growing(2, 10))
        assert torch.equal(again.kv, store.kv) and again.max_memories == 10
        assert torch.equal(again.write(numbered(50, 9, 2)).kv, store.write(numbered(50, 9, 2)).kv)
    for like, message in ((growing(2, 11), "max_memories is 10 in the file, expected 11"),
                          (growing(3, 10), "kv is 2×…×2×3 float32 in the file, expected 3×…×2×3"),
                          (growing(2, 10, torch.float16), "expected 2×…×2×3 float16")):
        with pytest.raises(ValueError, match=message):
            load_memory(tmp_path / "s.safetensors", like=like)


def test_a_store_made_in_inference_mode_counts_its_writes():
    with torch.inference_mode():
        store = filled_store()
        store.write(numbered(9, 1, 2))
        with pytest.raises(ValueError, match="spent"): store.kv


def test_ages_and_order():
    store = filled_store()
    slots = torch.arange(5).expand(2, 5)
    assert torch.equal(8 - store.kv[..., 0, 0], store.ages(slots).float())
    assert store.chronological()[0][0, :, 0, 0].tolist() == [4, 5, 6, 7, 8]
    mixed = shuffle(store, torch.Generator().manual_seed(0))
    assert mixed.kv[0].sort(0).values.equal(store.kv[0].sort(0).values)


# in files

def test_a_memory_in_a_folder_is_there_again(tmp_path):
    with KNNMemory(3, 10, 2, path=tmp_path / "m") as memory:
        memory.add(numbered(1, 7, 2).bfloat16())
        memory.add(numbered(8, 7, 2))
        memory.clear([1])
        assert memory.kv.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="closed"): memory.add(numbered(1, 1, 2))
    with pytest.raises(ValueError, match="closed"): memory.search(torch.ones(2, 3), 1)
    with KNNMemory(3, 10, 2, path=tmp_path / "m") as again:
        assert held(again, 0) == list(range(5, 15)) and held(again, 1) == []
        assert again.nbytes == 10 * 2 * 2 * 3 * 2 + 16
    with pytest.raises(ValueError, match="dim is 3 there, 4 here"):
        KNNMemory(4, 10, 2, path=tmp_path / "m")
    KNNMemory(3, 10, 2, path=tmp_path / "m").close()   # the refusal held no lock


def test_a_folder_is_open_once(tmp_path):
    memory = KNNMemory(3, 10, path=tmp_path)
    with pytest.raises(ValueError, match="open already"): KNNMemory(3, 10, path=tmp_path)
    code = f"from memformers import KNNMemory; KNNMemory(3, 10, path={str(tmp_path)!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode and "open already" in done.stderr
    memory.close()
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_killed_process_leaves_a_whole_store_or_says_what_is_lost(tmp_path):
    """Killed between the two halves of a write: the slots that it was writing are not trusted."""
    code = textwrap.dedent(f"""
        import os, signal, torch
        from memformers import KNNMemory
        from memformers.knn import KNNStore
        memory = KNNMemory(3, 10, 2, path={str(tmp_path)!r})
        i = torch.arange(1, 15.).view(1, 14, 1, 1).expand(2, 14, 2, 3).contiguous()
        memory.add(i[:, :12])
        write = KNNStore.write
        def killed(self, new, mask=None, **kw):
            write(self, new, mask)
            os.kill(os.getpid(), signal.SIGKILL)
        KNNStore.write = killed
        with memory.at_batch_indices([1]): memory.add(i[1:, 12:])
    """)
    assert subprocess.run([sys.executable, "-c", code]).returncode < 0
    with pytest.warns(UserWarning, match="row 1: the oldest 2 of 10 memories"):
        memory = KNNMemory(3, 10, 2, path=tmp_path)
    assert held(memory, 0) == list(range(3, 13)) and held(memory, 1) == list(range(5, 13))
    memory.add(numbered(13, 2, 2))
    assert held(memory, 1) == list(range(5, 15))
    memory.close()
    KNNMemory(3, 10, 2, path=tmp_path).close()   # told once


def test_damaged_files_are_refused(tmp_path):
    with KNNMemory(3, 10, path=tmp_path) as memory: memory.add(numbered(1, 7))
    whole = (tmp_path / "kv.bin").read_bytes()
    (tmp_path / "kv.bin").write_bytes(whole[:-5])
    with pytest.raises(ValueError, match="bytes, expected 240"): KNNMemory(3, 10, path=tmp_path)
    (tmp_path / "kv.bin").write_bytes(whole)
    (tmp_path / "memory.json").write_text("{")
    with pytest.raises(ValueError, match="damaged"): KNNMemory(3, 10, path=tmp_path)


def test_two_sets_of_temporary_memories_do_not_meet_and_leave_nothing(tmp_path):
    make = lambda: KNNMemoryList.create_memories(1, 2, 3, 10, memories_directory=tmp_path)
    a, b = make(), make()
    for i, memory in enumerate([*a, *b]): memory.add(numbered(10 * i, 3))
    assert [held(m)[0] for m in [*a, *b]] == [0, 10, 20, 30]
    assert len(os.listdir(tmp_path)) == 4
    a.cleanup()
    a.cleanup()
    del b, memory
    gc.collect()
    assert os.listdir(tmp_path) == []


def test_save_load_clone_resize_merge(tmp_path):
    memory = KNNMemory(3, 10, 2)
    memory.add(numbered(1, 14, 2))
    memory.clear(1)
    memory.save(tmp_path / "m.safetensors")
    for again in (KNNMemory.load(tmp_path / "m.safetensors"), memory.clone(),
                  KNNMemory.load(tmp_path / "m.safetensors", path=tmp_path / "folder")):
        assert held(again, 0) == list(range(5, 15)) and held(again, 1) == []
        again.add(numbered(15, 1, 2))
        assert held(again, 0) == list(range(6, 16)) and held(memory, 0) == list(range(5, 15))
    assert held(memory.resize(4)) == list(range(11, 15))
    assert held(memory.resize(40)) == list(range(5, 15))
    other = KNNMemory(3, 6, 2)
    other.add(numbered(50, 4, 2))
    memory.merge(other)
    assert held(memory, 0) == [*range(9, 15), *range(50, 54)]
    assert held(memory, 1) == [50, 51, 52, 53]
    (tmp_path / "half").write_bytes((tmp_path / "m.safetensors").read_bytes()[:100])
    with pytest.raises(ValueError, match="not a complete file"): KNNMemory.load(tmp_path / "half")


def test_a_list_of_memories():
    memories = KNNMemoryList.create_memories(3, 2, 4, 10)
    for memory in memories: memory.add(numbered(1, 3, 3, 4))
    with memories.at_batch_indices([1]):
        memories.clear()
        assert [m.rows for m in memories] == [[1], [1]]
    assert [m.fill.tolist() for m in memories] == [[3, 0, 3]] * 2
    assert memories.nbytes == sum(m.nbytes for m in memories)
    memories.cleanup()


# what is refused

@pytest.mark.parametrize("options, message", [
    (dict(dim=0), "dim must be a whole number"), (dict(max_memories=0), "max_memories must be a whole number"),
    (dict(num_indices=0), "num_indices"), (dict(backend="annoy"), "'torch' or 'faiss'"),
    (dict(index="hnsw"), "'flat'"), (dict(effort=0), "effort"),
])
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        KNNMemory(**(dict(dim=3, max_memories=5) | options))


@pytest.mark.parametrize("call, error, message", [
    (lambda m: m.add(torch.zeros(2, 4, 2, 5)), ValueError, "dim = 3"),
    (lambda m: m.add(torch.zeros(2, 4, 3)), ValueError, "n, 2, dim"),
    (lambda m: m.add(torch.zeros(3, 4, 2, 3)), ValueError, "2 rows"),
    (lambda m: m.add(torch.zeros(2, 4, 2, 3).long()), TypeError, "floating point"),
    (lambda m: m.add([1.]), TypeError, "list"),
    (lambda m: m.add(numbered(0, 4, 2) * torch.nan), ValueError, r"NaN; rows \[0, 1\]"),
    (lambda m: m.add(numbered(0, 4, 2), torch.ones(2, 3).bool()), ValueError, "mask"),
    (lambda m: m.add(numbered(0, 4, 2), torch.ones(2, 4)), ValueError, "bool"),
    (lambda m: m.add(numbered(0, 4, 2).to("meta")), ValueError, "device cpu"),
    (lambda m: m.search(torch.zeros(2, 3), 0), ValueError, "topk"),
    (lambda m: m.search(torch.zeros(2, 3), 11), ValueError, "max_memories = 10; got 11"),
    (lambda m: m.search(torch.zeros(1, 3), 1), ValueError, "at_batch_indices"),
    (lambda m: m.search(torch.zeros(2, 4), 1), ValueError, "dim = 3"),
    (lambda m: m.search(torch.zeros(2, 3).int(), 1), TypeError, "floating"),
    (lambda m: m.clear([2]), ValueError, "from 0 to 1"),
    (lambda m: m.clear([0, 0]), ValueError, "different"),
    (lambda m: m.at_batch_indices([-1]).__enter__(), ValueError, "from 0 to 1"),
    (lambda m: m.merge(KNNMemory(3, 10, 1)), ValueError, "2 rows of width 3"),
])
def test_bad_input(call, error, message):
    memory = KNNMemory(3, 10, 2)
    memory.add(numbered(1, 4, 2))
    with pytest.raises(error, match=message): call(memory)
    assert held(memory, 0) == held(memory, 1) == [1, 2, 3, 4]
