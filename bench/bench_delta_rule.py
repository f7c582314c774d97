"""The chunkwise delta rule, forward and backward, against its token loop and causal attention."""
import torch
import torch.nn.functional as F
from common import interleaved, save, table

from memformers.delta_rule import _token, delta_rule

TOKENS = 1024


def loop(q, k, v, beta, g=None):
    """The definition, token after token."""
    state, out = q.new_zeros(*q.shape[:2], q.shape[3], v.shape[3]), []
    for t in range(q.shape[2]):
        gate = None if g is None else g[:, :, t, None]
        o, state = _token(q[:, :, t], k[:, :, t], v[:, :, t], beta[:, :, t, None], gate, state)
        out.append(o)
    return torch.stack(out, 2), state


def measure(b, h, d, device):
    torch.manual_seed(0)
    make = lambda *size: torch.randn(*size, device=device)
    q, k, v = (make(b, h, TOKENS, d).requires_grad_() for _ in range(3))
    beta, g = make(b, h, TOKENS).sigmoid().requires_grad_(), (-make(b, h, TOKENS).exp() / 20)
    inputs = (q, k, v, beta, g.requires_grad_())

    def both(call, count):
        used = inputs[:count]
        return lambda: torch.autograd.grad(call(q, F.normalize(k, dim=-1), *used[2:]).sum(), used)

    attention = lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True)
    chunks, slow = (lambda *x: delta_rule(*x)[0]), (lambda *x: loop(*x)[0])
    cases = {"causal attention": both(attention, 3), "chunks": both(chunks, 4),
             "chunks, gates": both(chunks, 5), "loop": both(slow, 4), "loop, gates": both(slow, 5)}
    ms = interleaved(cases, rounds=3)
    title = f"forward and backward, {b} × {h} heads of width {d}, {TOKENS:,} tokens, {device}"
    made = table(title, ms, "causal attention")
    for name, gates in (("chunks", ""), ("chunks, gates", ", gates")):
        made["rows"][name]["loop / chunks"] = round(ms["loop" + gates] / ms[name], 1)
    return made


def main():
    sizes = [(1, 1, 32), (1, 1, 64), (1, 4, 32), (1, 4, 64)]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    save("delta_rule", [measure(*size, device) for size in sizes])


if __name__ == "__main__": main()
