"""Search among a million memories: recall and time of exact and approximate indexes."""
import time

import torch
import torch.nn.functional as F
from common import markdown, save

from memformers import KNNMemory

WIDTH, TOPK, QUERIES = 64, 32, 128
MILLION, QUARTER = 1_000_000, 262_144


def unit(*shape): return F.normalize(torch.randn(*shape), dim=-1)


def clustered(m):
    """Keys around 2,000 centres, as those of text lie: the cosine to its centre is about 0.7."""
    return F.normalize(unit(2000, WIDTH)[torch.randint(2000, (m,))] + unit(m, WIDTH), dim=-1)


def seconds(call, rounds=3):
    """The shortest of several calls."""
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


@torch.no_grad()
def measure(kind, m, indexes):
    """One row of m memories; queries lie near to keys. The first search builds the index."""
    torch.manual_seed(0)
    keys = unit(m, WIDTH) if kind == "random" else clustered(m)
    queries = F.normalize(keys[torch.randint(m, (QUERIES,))] + unit(QUERIES, WIDTH), dim=-1)[None]
    numbers = torch.arange(m).float()[:, None].expand(m, WIDTH)
    exact, rows = None, {}
    for name, options, efforts in indexes:
        memory = KNNMemory(WIDTH, m, **options)
        memory.add(torch.stack([keys, numbers], 1)[None])
        build = seconds(lambda: memory.search(queries[:, :1], 1), rounds=1)
        for memory.effort in efforts:
            found = memory.search(queries, TOPK)[0][0, ..., 1, 0]   # a value is its key's number
            exact = found if exact is None else exact
            share = (exact[:, :, None] == found[:, None]).any(-1).float().mean().item()
            ms = seconds(lambda: memory.search(queries, TOPK)) / QUERIES * 1e3
            label = name + (f", effort {memory.effort}" if len(efforts) > 1 else "")
            rows[label] = {"ms per query": round(ms, 3), "recall@32": round(share, 3)}
            if len(efforts) > 1: rows[label]["build, s"] = round(build, 1)
    first = next(iter(rows.values()))["ms per query"]
    rows = {k: r | {"ratio": round(r["ms per query"] / first, 3)} for k, r in rows.items()}
    title = f"{m:,} {kind} keys of width {WIDTH}, top-{TOPK}"
    made = {"title": title, "reference": next(iter(rows)), "rows": rows}
    print("\n" + markdown(made))
    return made


def main():
    faiss = lambda index: dict(backend="faiss", index=index)
    plain = [("torch, exact", {}, (64,)), ("faiss flat, exact", faiss("flat"), (64,))]
    ivf, hnsw = ("ivf", faiss("ivf"), (8, 32, 128, 512)), ("hnsw", faiss("hnsw"), (32, 128, 512))
    save("knn", [measure(kind, m, plain + indexes) for m, indexes in
                 ((MILLION, [ivf]), (QUARTER, [ivf, hnsw])) for kind in ("random", "clustered")])


if __name__ == "__main__": main()
