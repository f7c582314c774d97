"""Memorizing Transformer and KNNMemory beside faiss, a bare product, and the original package."""
import sys
import tempfile

import torch
import torch.nn.functional as F
from common import interleaved, save, table

from memformers import KNNMemory, MemorizingTransformer, Reader, carry
from memformers.knn import nearest

SIZE = dict(num_tokens=256, dim=256, depth=4, heads=8, dim_head=32)
ROWS, N = 4, 256
ORIGINAL = "memorizing-transformers-pytorch"


def original():
    """The original package, where it is installed."""
    try:
        import memorizing_transformers_pytorch as package
        return package
    except ImportError:
        print("\nThe original is not installed, so it is left out: pip install --no-deps "
              f"{ORIGINAL} filelock joblib cloudpickle loky einops-exts")


def unit(*shape): return F.normalize(torch.randn(*shape), dim=-1)


@torch.no_grad()
def large_search(m=65_536, rows=2, heads=8, queries=512, width=64, topk=32):
    """Search for many queries over a large memory."""
    torch.manual_seed(0)
    memory = KNNMemory(width, m, rows)
    for _ in range(m // 4096): memory.add(unit(rows, 4096, 2, width))
    q, new = unit(rows, heads * queries, width), unit(rows, queries, 2, width)
    keys = memory.kv[:, :, 0].contiguous()
    buffer = torch.empty(512, m)

    def product():
        for r in range(rows):
            for block in q[r].split(512): torch.mm(block, keys[r].T, out=buffer)

    cases = {"bare float32 product": product,
             "exact search": lambda: nearest(memory.kv[:, :, 0], memory.fill, q, topk),
             "adding 512 memories": lambda: memory.add(new)}
    try:
        import faiss
        faiss.omp_set_num_threads(torch.get_num_threads())
        host = keys.numpy(), q.numpy()
        cases["faiss, exact search"] = lambda: [
            faiss.knn(host[1][r], host[0][r], topk, faiss.METRIC_INNER_PRODUCT)
            for r in range(rows)]
    except ImportError: print("\nfaiss is left out: pip install 'torch-memformers[cpu]'")
    return table(f"search: {rows} rows, {heads} heads × {queries} queries, width {width}, "
                 f"top-{topk} of {m:,}", interleaved(cases, rounds=3), "bare float32 product")


def recall(found, exact):
    """The share of the exact neighbours that was found."""
    return (exact[..., :, None, :] == found[..., None, :, :]).all(-1).any(-1).float().mean().item()


@torch.no_grad()
def against_the_original(rows=2, queries=512, width=64, topk=32):
    """Add and search, beside the original's store."""
    package, tables = original(), []
    for m in (2048, 16_384, 65_536):
        torch.manual_seed(0)
        ours = KNNMemory(width, m, rows)
        # The original is emptied when it is full: give it room for the additions that are timed.
        theirs = package and package.KNNMemory(dim=width, max_memories=m + 64 * queries,
                                               num_indices=rows, memmap_filename=tempfile.mktemp())
        for _ in range(m // 512):
            new = unit(rows, 512, 2, width)
            ours.add(new)
            if theirs: theirs.add(new)
        q, new = unit(rows, queries, width), unit(rows, 512, 2, width)
        exact = ours.search(q, topk)[0][..., 0, :]
        cases = {"ours, search": lambda: ours.search(q, topk),
                 "ours, add 512": lambda: ours.add(new)}
        shares = {"ours, search": 1.0}
        if theirs:
            shares["original, search"] = recall(theirs.search(q, topk)[0][..., 0, :], exact)
            cases |= {"original, search": lambda: theirs.search(q, topk),
                      "original, add 512": lambda: theirs.add(new)}
        done = table(f"store of {m:,}: {rows} rows × {queries} queries",
                     interleaved(cases, rounds=3), "ours, search")
        for name, share in shares.items():
            done["rows"][name]["recall@32"] = round(share, 3)
            print(f"recall@{topk} of {name}: {share:.3f}")
        tables.append(done)
    return tables


def step(forward, tokens, model):
    """One forward and backward pass."""
    def run():
        model.zero_grad()
        F.cross_entropy(forward().flatten(0, 1), tokens.flatten()).backward()
    return run


def training(m=2048):
    """A training step with the memory full."""
    torch.manual_seed(0)
    tokens, cases = torch.randint(256, (ROWS, N)), {}
    for name, layers in (("without", []), ("one layer", [3]), ("two layers", [2, 3])):
        model = MemorizingTransformer(**SIZE, seq_len=N, memorizing_layers=layers,
                                      max_knn_memories=m)
        memory = None
        for _ in range(m // N): memory = carry(model.step(tokens, memory).memory)
        cases[f"ours, {name}"] = step(lambda model=model, memory=memory:
                                      model.step(tokens, memory).logits, tokens, model)
    if package := original():
        for name, layers in (("one layer", (3,)), ("two layers", (2, 3))):
            model = package.MemorizingTransformer(
                **SIZE, memorizing_layers=layers, max_knn_memories=64 * N,
                num_retrieved_memories=32)
            memories = model.create_knn_memories(batch_size=ROWS)
            with torch.no_grad():
                for _ in range(m // N): model(tokens, knn_memories=memories)
            cases[f"original, {name}"] = step(
                lambda model=model, memories=memories: model(
                    tokens, knn_memories=memories, add_knn_memory=False), tokens, model)
    return table(f"training step, {ROWS} × {N} tokens, width 256, 4 layers, {m:,} memories",
                 interleaved(cases), "ours, without")


@torch.no_grad()
def generation(prompt=64, length=128):
    """One token at a time; the original has to read its window again for each."""
    torch.manual_seed(0)
    tokens = torch.randint(256, (1, prompt + length))
    model = MemorizingTransformer(**SIZE, seq_len=N, max_knn_memories=2048).eval()
    memory = None
    for _ in range(8): memory = carry(model.step(torch.randint(256, (1, N)), memory).memory)

    def read():
        reader = Reader(model, 1, memory)
        reader.read(tokens[:, :prompt])
        for i in range(prompt, prompt + length): reader.read(tokens[:, i:i + 1])

    cases = {"ours, 2,048 memories": read}
    if package := original():
        theirs = package.MemorizingTransformer(
            **SIZE, memorizing_layers=(2,), max_knn_memories=4 * 2048,
            num_retrieved_memories=32).eval()
        memories = theirs.create_knn_memories(batch_size=1)
        for _ in range(8): theirs(torch.randint(256, (1, N)), knn_memories=memories)

        def again():
            for i in range(prompt, prompt + length, 8):   # each eighth token, to save time
                theirs(tokens[:, :i], knn_memories=memories, add_knn_memory=False)
        cases["original, the window read again"] = again
    ms = interleaved(cases, rounds=3)
    rate = {name: length / (1 if name.startswith("ours") else 8) / (t / 1e3)
            for name, t in ms.items()}
    return table(f"generation, 1 row, prompt {prompt}, {length} tokens", rate,
                 "ours, 2,048 memories", "tokens per second")


def main():
    if torch.get_num_threads() > 1: print("threads:", torch.get_num_threads(), file=sys.stderr)
    save("memorizing", [large_search(), *against_the_original(), training(), generation()])


if __name__ == "__main__": main()
