"""Transformer-XL beside a plain PyTorch decoder of the same size, and beside the naive loop."""
import math

import torch
import torch.nn.functional as F
from common import interleaved, save, table
from torch import nn

from memformers import Reader, TransformerXL, carry

SIZE = dict(num_tokens=256, dim=256, depth=4, heads=8)
ROWS, N, M = 4, 256, 256


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


def loop_attention(q, k, v, attn_mask, dropout_p=0.0):
    """Attention as the equations say it: one query at a time."""
    return torch.stack([((q[:, :, i:i + 1] @ k.mT / math.sqrt(q.shape[-1])
                          + attn_mask[:, :, i:i + 1]).softmax(-1) @ v)[:, :, 0]
                        for i in range(q.shape[2])], dim=2)


def looped(run):
    """The same call with the naive attention loop."""
    def call():
        kernel, F.scaled_dot_product_attention = F.scaled_dot_product_attention, loop_attention
        try: run()
        finally: F.scaled_dot_product_attention = kernel
    return call


def training():
    torch.manual_seed(0)
    tokens = torch.randint(256, (ROWS, N))
    plain = Plain(**SIZE)
    xl = TransformerXL(**SIZE, seq_len=N, mem_len=M)
    t5 = TransformerXL(**SIZE, seq_len=N, mem_len=M, positions="t5")
    none = TransformerXL(**SIZE, seq_len=N, mem_len=0)
    empty, full = xl.init_memory(ROWS), carry(xl.step(tokens).memory)
    full_t5 = carry(t5.step(tokens).memory)
    step = lambda model, memory: train(model, tokens, lambda: model.step(tokens, memory).logits)
    with_memory = step(xl, full)
    return table(
        f"training step, {ROWS} × {N} tokens, width 256, 4 layers, {M} slots", interleaved({
            "plain decoder": train(plain, tokens, lambda: plain(tokens)),
            "Transformer-XL built without memory": step(none, None),
            "Transformer-XL, empty memory": step(xl, empty),
            "Transformer-XL, full memory": with_memory,
            "Transformer-XL, full memory, T5 positions": step(t5, full_t5),
            "Transformer-XL, full memory, naive attention loop": looped(with_memory),
        }), "plain decoder")


@torch.no_grad()
def generation(prompt=64, length=128):
    torch.manual_seed(0)
    plain, xl = Plain(**SIZE).eval(), TransformerXL(**SIZE, seq_len=N, mem_len=M).eval()
    tokens = torch.randint(256, (1, prompt + length))
    memory = carry(xl.step(torch.randint(256, (1, N))).memory)

    def cached():
        room = lambda: torch.zeros(1, 8, prompt + length, 32)
        cache = [(room(), room()) for _ in plain.layers]
        plain(tokens[:, :prompt], cache)
        for i in range(prompt, prompt + length): plain(tokens[:, i:i + 1], cache, i)

    def read(memory=None):
        reader = Reader(xl, 1, memory)
        reader.read(tokens[:, :prompt])
        for i in range(prompt, prompt + length): reader.read(tokens[:, i:i + 1])

    def read_again(memory):
        for i in range(prompt, prompt + length): xl.step(tokens[:, :i + 1], memory)

    ms = interleaved({
        "plain decoder with a key/value cache": cached,
        "Transformer-XL, empty memory": read,
        "Transformer-XL, full memory": lambda: read(memory),
        "Transformer-XL, the segment read again for each token": lambda: read_again(memory),
    }, rounds=3)
    rate = {name: length / (t / 1e3) for name, t in ms.items()}
    return table(f"generation, 1 row, prompt {prompt}, {length} tokens", rate,
                 "plain decoder with a key/value cache", "tokens per second")


def main(): save("transformer_xl", [training(), generation()])


if __name__ == "__main__": main()
