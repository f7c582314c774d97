"""Transformer-XL beside a plain PyTorch decoder of the same size, and beside the naive loop."""
import math
from unittest.mock import patch

import torch
from common import SIZE, Plain, cached_generation, interleaved, save, table, train

from memformers import Reader, TransformerXL, carry

ROWS, N, M = 4, 256, 256


def loop_attention(q, k, v, bias, *_):
    """Attention as the equations say it: one query at a time."""
    return torch.stack([((q[:, :, i:i + 1] @ k.mT / math.sqrt(q.shape[-1])
                          + bias[:, :, i:i + 1]).softmax(-1) @ v)[:, :, 0]
                        for i in range(q.shape[2])], dim=2)


def looped(run):
    """The same call with the naive attention loop."""
    return patch("memformers.transformer_xl.attend", loop_attention)(run)


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

    def read(memory=None):
        reader = Reader(xl, 1, memory)
        reader.read(tokens[:, :prompt])
        for i in range(prompt, prompt + length): reader.read(tokens[:, i:i + 1])

    def read_again(memory):
        for i in range(prompt, prompt + length): xl.step(tokens[:, :i + 1], memory)

    ms = interleaved({
        "plain decoder with a key/value cache": cached_generation(plain, tokens, prompt),
        "Transformer-XL, empty memory": read,
        "Transformer-XL, full memory": lambda: read(memory),
        "Transformer-XL, the segment read again for each token": lambda: read_again(memory),
    }, rounds=3)
    rate = {name: length / (t / 1e3) for name, t in ms.items()}
    return table(f"generation, 1 row, prompt {prompt}, {length} tokens", rate,
                 "plain decoder with a key/value cache", "tokens per second")


def main(): save("transformer_xl", [training(), generation()])


if __name__ == "__main__": main()
