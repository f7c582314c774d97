"""Small corpora, and models of which every answer is known."""
import numpy as np
import torch
from mechanisms import SIZES
from torch import Tensor

from memformers import TransformerXL, carry, clone
from memformers.data import Corpus
from memformers.memory import filled, memory_state, push, slots
from memformers.model import MemoryLM, Step

LENGTHS = [2, 23, 6, 7, 12, 11, 13]


def corpus(lengths=LENGTHS, num_tokens=SIZES["num_tokens"], seed=0):
    rng = np.random.default_rng(seed)
    texts = [rng.integers(num_tokens, size=n).astype(np.uint8) for n in lengths]
    return Corpus("tiny", list(map(str, range(len(lengths)))), texts)


def words(*texts): return Corpus("words", list(map(str, range(len(texts)))), texts)


def xl(**options):
    torch.manual_seed(0)
    model = TransformerXL(**(SIZES | dict(mem_len=7) | options)).double().eval()
    for p in model.parameters(): torch.nn.init.normal_(p, std=0.4)
    return model


@memory_state
class Said:
    mem: Tensor = slots(1)  # (b, m, 1) token ids, newest last
    fill: Tensor = None     # (b,)


class Parrot(MemoryLM):
    """Gives the last token of the segment before 1 / 2, and shares the rest among all tokens."""
    slots = 6

    def __init__(self, num_tokens=128, seq_len=4): super().__init__(num_tokens, 2, seq_len)

    def init_memory(self, batch_size, *, device=None, dtype=None):
        return Said(torch.zeros(batch_size, self.slots, 1, dtype=torch.float64, device=device),
                    torch.zeros(batch_size, dtype=torch.long, device=device))

    def probabilities(self, memory):
        last = memory.mem[:, -1, 0].long()
        known = (torch.eye(self.num_tokens)[last].double() + 1 / self.num_tokens) / 2
        there = filled(memory.fill, self.slots)[:, -1:]
        return known.where(there, torch.tensor(1 / self.num_tokens, dtype=torch.float64))

    def begin(self, memory, capacity=None): return memory
    def extend(self, memory, tokens, mask=None): return self.step(tokens, memory).logits, memory

    def step(self, tokens, memory=None, mask=None):
        if memory is None: memory = self.init_memory(len(tokens))
        logits = self.probabilities(memory).log()[:, None].expand(*tokens.shape, -1)
        mem, fill = push(memory.mem, memory.fill, tokens[..., None], mask)
        return Step(logits, Said(mem, fill), self.no_aux_loss())


@memory_state
class Pending:
    """Like `Said`, but `carry` writes into the store that it was given."""
    mem: Tensor = slots(1)
    fill: Tensor = None
    new: Tensor = None       # (b, n, 1)
    new_mask: Tensor = None  # (b, n)

    def on_carry(self, grad):
        mem, fill = push(self.mem, self.fill, self.new, self.new_mask)
        self.mem.copy_(mem), self.fill.copy_(fill)
        return Pending(self.mem, self.fill, self.new[:, :0], self.new_mask[:, :0])


class SpendingParrot(Parrot):
    def init_memory(self, batch_size, *, device=None, dtype=None):
        mem, fill = super().init_memory(batch_size, device=device)
        return Pending(mem, fill, mem[:, :0], mem[:, :0, 0].bool())

    def step(self, tokens, memory=None, mask=None):
        out = super().step(tokens, Said(memory.mem, memory.fill), mask)
        mask = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask
        new = tokens[..., None].double()
        return out._replace(memory=Pending(memory.mem, memory.fill, new, mask))


@torch.no_grad()
def own_memories(model, text, size):
    """What a document's own memory is before each of its segments, and at its end."""
    memories, inputs = [model.init_memory(1)], torch.from_numpy(np.array(text, dtype=np.int64))[:-1]
    for part in inputs.split(size):
        memories.append(carry(model.step(part[None], clone(memories[-1])).memory))
    return memories
