"""What every benchmark needs: interleaved timing, the machine's description, a table, a file."""
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

RESULTS = Path(__file__).parent / "results"
SIZE = dict(num_tokens=256, dim=256, depth=4, heads=8)


def machine() -> dict:
    """Where the numbers were measured."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        name = next((line.split(":")[1].strip() for line in info.read_text().splitlines()
                     if line.startswith("model name")), name)
    return {"cpu": name, "cores": os.cpu_count(), "threads": torch.get_num_threads(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            "torch": torch.__version__, "python": platform.python_version(),
            "date": time.strftime("%Y-%m-%d")}


def interleaved(cases: dict, rounds: int = 7) -> dict:
    """Least milliseconds of each case; the cases take turns, so that a busy spell hits all.

    One thread on a CPU is timed by what it computes: other processes do not count.
    """
    alone = torch.get_num_threads() == 1 and not torch.cuda.is_available()
    clock = time.process_time if alone else time.perf_counter
    times = {name: [] for name in cases}
    for call in cases.values(): call()
    for _ in range(rounds):
        for name, call in cases.items():
            start = clock()
            call()
            if torch.cuda.is_available(): torch.cuda.synchronize()
            times[name].append((clock() - start) * 1e3)
    return {name: min(t) for name, t in times.items()}


def markdown(table: dict) -> str:
    """A table as text, with every column that some row has."""
    rows = table["rows"]
    columns = list(dict.fromkeys(name for row in rows.values() for name in row))
    lines = [f"### {table['title']}", "", f"| | {' | '.join(columns)} |",
             f"|---|{'--:|' * len(columns)}"]
    cells = lambda row: " | ".join(str(row.get(name, "")) for name in columns)
    return "\n".join([*lines, *(f"| {name} | {cells(row)} |" for name, row in rows.items())])


def table(title: str, ms: dict, reference: str, unit: str = "ms") -> dict:
    """Print a markdown table with ratios to the reference; return its rows."""
    rows = {name: {unit: round(t, 3), "ratio": round(t / ms[reference], 3)}
            for name, t in ms.items()}
    made = {"title": title, "reference": reference, "rows": rows}
    print("\n" + markdown(made))
    return made


def peak_mb(script: str) -> float:
    """Peak resident memory in MB of a Python script in a process of its own."""
    # Not ru_maxrss: a child process begins with its parent's.
    code = script + ("\nprint(next(line.split()[1] for line in open('/proc/self/status')"
                     " if line.startswith('VmHWM')))\n")
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env,
                         check=True)
    return float(out.stdout.strip().splitlines()[-1]) / 1024


def save(name: str, tables: list):
    """Write the tables and the machine to `results/NAME.json`, and to `results/NAME.md` to read."""
    RESULTS.mkdir(exist_ok=True)
    where = machine()
    text = json.dumps({"machine": where, "tables": tables}, indent=2) + "\n"
    (RESULTS / f"{name}.json").write_text(text, encoding="utf-8")
    head = f"# {name}\n\n" + ", ".join(f"{k}: {v}" for k, v in where.items() if v is not None)
    text = "\n\n".join([head, *map(markdown, tables)]) + "\n"
    (RESULTS / f"{name}.md").write_text(text, encoding="utf-8")


class Plain(nn.Module):
    """A decoder as one would write it without a memory: learned places, causal attention."""
    def __init__(self, num_tokens, dim, depth, heads, longest=1024):
        super().__init__()
        self.heads = heads
        self.embedding, self.place = nn.Embedding(num_tokens, dim), nn.Embedding(longest, dim)
        self.layers = nn.ModuleList(nn.ModuleDict(dict(
            norm=nn.LayerNorm(dim), qkv=nn.Linear(dim, 3 * dim, bias=False),
            out=nn.Linear(dim, dim, bias=False), norm2=nn.LayerNorm(dim),
            expand=nn.Linear(dim, 4 * dim), contract=nn.Linear(4 * dim, dim)))
            for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, num_tokens, bias=False)

    def forward(self, tokens, cache=None, at=0):
        """`cache` is a list of (keys, values) with room, written from place `at` on."""
        b, n = tokens.shape
        x = self.embedding(tokens) + self.place.weight[at:at + n]
        for number, layer in enumerate(self.layers):
            q, k, v = layer["qkv"](layer["norm"](x)).view(b, n, 3, self.heads, -1) \
                .permute(2, 0, 3, 1, 4)
            if cache is not None:
                keys, values = cache[number]
                keys[:, :, at:at + n], values[:, :, at:at + n] = k, v
                k, v = keys[:, :, :at + n], values[:, :, :at + n]
            read = F.scaled_dot_product_attention(q, k, v, is_causal=n > 1)
            x = x + layer["out"](read.transpose(1, 2).reshape(b, n, -1))
            x = x + layer["contract"](F.gelu(layer["expand"](layer["norm2"](x))))
        return self.head(self.norm(x))


def train(model, tokens, forward):
    """One forward and backward pass."""
    def run():
        model.zero_grad()
        F.cross_entropy(forward().flatten(0, 1), tokens.flatten()).backward()
    return run


def cached_generation(plain, tokens, prompt):
    """The plain decoder reads a prompt, then token after token, with a key/value cache."""
    def run():
        shape = len(tokens), plain.heads, tokens.shape[1], plain.embedding.embedding_dim // plain.heads
        cache = [(torch.zeros(shape), torch.zeros(shape)) for _ in plain.layers]
        plain(tokens[:, :prompt], cache)
        for i in range(prompt, tokens.shape[1]): plain(tokens[:, i:i + 1], cache, i)
    return run
