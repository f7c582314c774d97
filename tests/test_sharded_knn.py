"A memory over several processes is one memory: it finds, forgets and keeps what a single store does."
import json
import os
from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from memformers import KNNMemory, MemorizingTransformer, sharded_knn
from memformers.sharded_knn import ShardedKNNMemory

SIZES = dict(dim=4, max_memories=23, num_indices=3)


def numbers(seed, *shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def found(memory, topk, dtype=torch.float32):
    "All that a search says, slots of what was not found left out."
    kv, mask = memory.search(numbers(9, 3, 5, 4, dtype=dtype), topk)
    scores, slots, real = memory.nearest(numbers(9, 3, 5, 4, dtype=dtype), topk)
    order = scores.masked_fill(~real, -torch.inf).argsort(-1, descending=True)
    return [kv, mask, *(t.gather(-1, order) for t in (scores, slots, real, memory.ages(slots) * real))]


def same(memory, single, dtype=torch.float32):
    assert memory.fill.equal(single.fill.cpu())
    for topk in (1, 4, 23):
        for one, other in zip(found(memory, topk, dtype), found(single, topk, dtype)):
            assert one.dtype == other.dtype
            # Products of fewer keys at a time round in another way; what is found does not differ.
            if one.is_floating_point() and one.ndim == 3: torch.testing.assert_close(one, other)
            else: assert one.equal(other)


def start(rank, world, folder, work, *args):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    work(rank, folder, *args)
    dist.destroy_process_group()


def in_processes(world, folder, work, *args):
    (folder / "meet").unlink(missing_ok=True)
    mp.spawn(start, (world, folder, work, *args), nprocs=world)


# --- what the processes do ---------------------------------------------------------------------

CHUNKS = (5, 1, 9, 40, 3)


def filled(cls, dtype=torch.float32, chunks=CHUNKS, **options):
    "Chunks of all lengths, with padding; a row is emptied in between."
    memory = cls(**SIZES, **options)
    for i, n in enumerate(chunks):
        mask = None if i % 2 else numbers(50 + i, 3, n) > -1
        memory.add(numbers(i, 3, n, 2, 4, dtype=dtype), mask)
        if i == 2: memory.clear([1])
    return memory


def compare(group, folder):
    single, parts = KNNMemory(**SIZES), []
    same(ShardedKNNMemory(**SIZES, group=group), single)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        for end in range(1, len(CHUNKS) + 1):
            single = filled(KNNMemory, dtype, CHUNKS[:end])
            memory = filled(ShardedKNNMemory, dtype, CHUNKS[:end], group=group)
            same(memory, single, dtype)
            parts.append(memory._share.capacity)
    assert max(parts) == -(-23 // dist.get_world_size(group)), "a share holds its share"


def save(group, folder): filled(ShardedKNNMemory, group=group).save(folder)


def load(group, folder):
    memory, single = ShardedKNNMemory.load(folder, group), filled(KNNMemory)
    for more in (0, 6):   # it also goes on as one would
        for each in (memory, single): each.add(numbers(7, 3, more, 2, 4))
        assert memory.fill.equal(single.fill)
        for one, other in zip(*(each.search(numbers(9, 3, 5, 4), 23) for each in (memory, single))):
            assert one.equal(other)


def fail_to_save(group, folder):
    memory = filled(ShardedKNNMemory, group=group)
    memory.save(folder)
    memory.add(numbers(8, 3, 5, 2, 4))
    def full(rows, path): raise OSError(28, "No space left on device")
    with pytest.MonkeyPatch.context() as patch:
        if dist.get_rank(group) == 1: patch.setattr(sharded_knn, "save_file", full)
        with pytest.raises(OSError, match="cannot write .*share1"): memory.save(folder)
    load(group, folder)


def model(group, folder):
    torch.manual_seed(0)
    net = MemorizingTransformer(11, 8, 2, seq_len=6, heads=2, dim_head=4, memorizing_layers=(1, 2),
                                num_retrieved_memories=3, kv_heads=2).double()
    text = torch.randint(11, (3, 6), generator=torch.Generator().manual_seed(1))
    said = []
    for make in (partial(KNNMemory, **SIZES), partial(ShardedKNNMemory, **SIZES, group=group)):
        memories = [make() for _ in range(4)]
        for _ in range(5): out = net(text, knn_memories=memories)
        net.zero_grad()
        out.sum().backward()
        said.append([out.detach(), *(p.grad for p in net.parameters())])
    for one, other in zip(*said): torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def in_groups(rank, folder):
    "All that groups of 1 to 4 processes do; what one size has saved, another loads."
    groups = {n: dist.new_group(range(n)) for n in range(1, 5)}
    def together(n, work, path="memory"):
        if rank < n: work(groups[n], folder / path)
        dist.barrier()
    for n in groups: together(n, compare)
    for n in groups: together(n, save, f"memory{n}")
    for before in groups:
        for after in groups: together(after, load, f"memory{before}")
    together(2, fail_to_save)
    together(3, model)


def die_while_saving(rank, folder):
    memory = filled(ShardedKNNMemory)
    memory.save(folder / "memory")
    memory.add(numbers(8, 3, 5, 2, 4))
    write = sharded_knn.save_file
    def half(rows, path):
        write(rows, path)
        os.truncate(path, os.path.getsize(path) // 2)
        os._exit(3)
    if rank == 1: sharded_knn.save_file = half
    memory.save(folder / "memory")


# --- tests -------------------------------------------------------------------------------------

def test_it_is_one_memory_in_groups_of_any_size_and_across_save_and_load(tmp_path):
    in_processes(4, tmp_path, in_groups)


def test_one_process_needs_no_group(tmp_path):
    same(filled(ShardedKNNMemory), filled(KNNMemory))
    save(None, tmp_path)
    load(None, tmp_path)


def test_a_process_killed_while_it_saves_costs_nothing_that_was_saved(tmp_path):
    with pytest.raises(mp.ProcessExitedException): in_processes(2, tmp_path, die_while_saving)
    load(None, tmp_path / "memory")


def test_a_save_replaces_the_one_before(tmp_path):
    memory = filled(ShardedKNNMemory)
    for _ in range(3): memory.save(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["memory.json",
                                                               "save3-share0.safetensors"]


def test_a_model_says_what_another_memory_lacks():
    net = MemorizingTransformer(11, 8, 1, seq_len=6, heads=2, dim_head=4, memorizing_layers=(1,))
    with pytest.raises(TypeError, match="knn_memories must be KNNMemory objects.*a list has no rows"):
        net(torch.zeros(1, 2, dtype=torch.long), knn_memories=[[]])


@pytest.mark.parametrize("change, message", [
    (dict(format="x"), "not of a ShardedKNNMemory"), (dict(dim=0), "path: dim in .* must be"),
    (dict(num_indices=2), "must count the memories written to each of 2 rows"),
    (dict(written=[1, 2, -3]), "must count"), (dict(written=[1, 2, True]), "must count"),
    (dict(world_size=2 ** 60), "path: world_size in"), (dict(save=2), "is missing, or no complete"),
    (dict(dim=5), "does not hold what memory.json says"), (dict(max_memories=3), "does not hold"),
    (dict(written=[99, 99, 3]), "does not hold")])
def test_a_damaged_folder_is_refused(change, message, tmp_path):
    filled(ShardedKNNMemory).save(tmp_path)
    file = tmp_path / "memory.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ValueError, match=message): ShardedKNNMemory.load(tmp_path)


@pytest.mark.parametrize("call, error, message", [
    (lambda: ShardedKNNMemory(4, True), ValueError, "max_memories must be a whole number"),
    (lambda: ShardedKNNMemory(4, 0), ValueError, "max_memories must be"),
    (lambda: ShardedKNNMemory(0), ValueError, "dim must be"),
    (lambda: ShardedKNNMemory(4).add(torch.zeros(1, 2, 2, 5)), ValueError, "memories must be"),
    (lambda: ShardedKNNMemory(4).add(torch.full((1, 2, 2, 4), torch.nan)), ValueError, "NaN"),
    (lambda: ShardedKNNMemory(4).search(torch.zeros(1, 5), 1), ValueError, "queries must be"),
    (lambda: ShardedKNNMemory(4, 9).search(torch.zeros(1, 4), 10), ValueError, "topk must be"),
    (lambda: ShardedKNNMemory(4).clear([1]), ValueError, "rows must be"),
    (lambda: ShardedKNNMemory(4).save(""), ValueError, "path must not be empty"),
    (lambda: ShardedKNNMemory.load(3), TypeError, "path must be a path")])
def test_what_is_refused(call, error, message):
    with pytest.raises(error, match=message): call()
