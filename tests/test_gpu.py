"""What holds on the CPU holds on a GPU. Off by default: `pytest -m gpu`."""
import pytest
import torch
from mechanisms import SIZES, each
from torch.utils._pytree import tree_map

from memformers import Reader, carry, load_memory, reset, save_memory, select
from memformers.memory import batch_size

pytestmark = [pytest.mark.gpu,
              pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")]
close = torch.testing.assert_close
N = SIZES["seq_len"]


def text(rows=3, length=N, seed=1):
    return torch.randint(SIZES["num_tokens"], (rows, length),
                         generator=torch.Generator().manual_seed(seed))


def host(memory):
    """On the host, in as few slots as it needs: a store grows earlier where nobody looks."""
    memory = tree_map(lambda t: t.cpu(), memory)
    return select(memory, range(batch_size(memory)))


@each
def test_the_same_numbers(mechanism):
    """Ragged rows, three segments, a reset: outputs, memories and gradients."""
    there, here = mechanism.make().cuda(), mechanism.make()
    a = b = None
    mask = torch.tensor([[True] * N, [True, False, True, False, True], [False] * N])
    for i in range(3):
        if i == 2: a, b = (reset(m, torch.tensor([True, False, False])) for m in (a, b))
        x, y = (m.step(text(seed=i).to(d), s, mask.to(d))
                for m, s, d in ((there, a, "cuda"), (here, b, "cpu")))
        close(x.logits.cpu()[mask], y.logits[mask])
        a, b = carry(x.memory, grad=True), carry(y.memory, grad=True)
        tree_map(close, host(a), host(b))
    for out in (x, y): out.logits[mask.to(out.logits.device)].square().sum().backward()
    for p, q in zip(there.parameters(), here.parameters()):
        if q.grad is not None: close(p.grad.cpu(), q.grad)


@each
def test_memories_move_between_devices(mechanism, tmp_path):
    model = mechanism.make().cuda()
    memory = carry(model.step(text().cuda()).memory)
    save_memory(memory, tmp_path / "memory.safetensors")
    tree_map(lambda s, t: close(s, t), memory,
             load_memory(tmp_path / "memory.safetensors", like=model.init_memory(3)))
    assert all(t.is_cuda for t in torch.utils._pytree.tree_flatten(select(memory, [2, 0]))[0])


@each
def test_one_token_at_a_time(mechanism):
    there, here = mechanism.make().cuda(), mechanism.make()
    tokens = text(2, 2 * N + 2)
    with torch.no_grad():
        a, b = (torch.stack([r.read(t.to(d)).cpu() for t in tokens.split(1, 1)], 1)
                for r, d in ((Reader(there, 2), "cuda"), (Reader(here, 2), "cpu")))
    close(a, b)
