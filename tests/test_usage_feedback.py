"""Feedback Transformer: the documented calls, each defect of the original, the solver's promises,
and what is refused."""
import warnings

import pytest
import torch
import torch.nn.functional as F

from memformers.feedback import FeedbackMemory, FeedbackTransformer
from memformers.memory import carry, nbytes
from memformers.generate import Reader, generate

close = torch.testing.assert_close


def make(dtype=torch.float64, std=0.3, **options):
    torch.manual_seed(0)
    sizes = dict(num_tokens=17, dim=12, depth=2, heads=2, dim_head=4, mem_len=8, seq_len=1)
    model = FeedbackTransformer(**(sizes | options)).to(dtype).eval()
    if std: [torch.nn.init.normal_(p, std=std) for p in model.parameters()]
    return model


def text(rows=2, n=12, seed=1):
    return torch.randint(17, (rows, n), generator=torch.Generator().manual_seed(seed))


def gradients(model, loss):
    grads = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g).flatten()
                      for p, g in zip(model.parameters(), grads)])


# the documented calls, at the sizes that users write

def test_documented_model():
    model = FeedbackTransformer(num_tokens=20000, dim=512, depth=6, seq_len=2, mem_len=256,
                                dim_head=64, heads=8, attn_dropout=0.1, ff_dropout=0.1)
    x = torch.randint(0, 20000, (2, 64))
    with torch.no_grad(): assert model(x).shape == (2, 64, 20000)


def test_documented_memory():
    model = FeedbackTransformer(num_tokens=20000, dim=512, depth=6, seq_len=32, mem_len=256)
    x1, x2, x3 = torch.randint(0, 20000, (3, 2, 32))
    with torch.no_grad():
        out1, mem1 = model(x1, return_memory=True)
        out2, mem2 = model(x2, memory=mem1, return_memory=True)
        out3, mem3 = model(x3, memory=mem2, return_memory=True)
    assert out3.shape == (2, 32, 20000) and mem3.fill.tolist() == [96, 96]
    assert nbytes(mem3) == nbytes(model.init_memory(2))


def test_a_text_longer_than_a_segment():
    model = make(segment_len=5, tol=0)
    whole, memory = model(text(), return_memory=True)
    again, same = make(tol=0)(text(), return_memory=True)
    close(whole, again)
    close(memory.mem, same.mem)
    with pytest.raises(ValueError, match="1 to seq_len = 5 tokens"): model.step(text())


def test_generation_is_teacher_forcing():
    for seq_len in (1, 3):
        model = make(seq_len=seq_len, mem_len=5, tol=0)
        prompt = text(2, 70)
        new = generate(model, prompt, 80, temperature=0)
        logits = model(torch.cat([prompt, new], 1))
        assert torch.equal(logits[:, 69:-1].argmax(-1), new)


def test_rows_of_different_lengths_generate_alone():
    model = make(seq_len=2, tol=0, positions="learned")
    prompt, mask = text(3, 9), torch.arange(9) < torch.tensor([[9], [1], [4]])
    new = generate(model, prompt, 12, mask=mask, temperature=0)
    for r, n in enumerate((9, 1, 4)):
        assert torch.equal(new[r], generate(model, prompt[r, :n], 12, temperature=0))


def test_a_row_that_can_read_nothing_yet():
    """Window of one token: some rows are fresh, others have a memory."""
    model, reader = make(tol=0), None
    reader = Reader(model, 2)
    with torch.no_grad():
        reader.read(text(2, 4), torch.tensor([[True] * 4, [False] * 4]))
        after = reader.read(text(2, 1, seed=3))
    close(after[1], model(text(2, 1, seed=3))[1, -1])
    close(after[0], model(torch.cat([text(2, 4), text(2, 1, seed=3)], 1))[0, -1])


def test_a_longer_memory_at_evaluation():
    model = make(mem_len=4, tol=0)
    longer = make(mem_len=10, tol=0)
    memory = model.init_memory(2, mem_len=10)
    close(model.step(text(), memory).logits, longer.step(text()).logits)


# the defects of the original

@pytest.mark.parametrize("seq_len", [1, 2])
@pytest.mark.parametrize("positions", ["t5", "learned"])
def test_moving_a_fact_in_the_memory_changes_the_output(seq_len, positions):
    """All memories in front of the window had the same position."""
    model = make(seq_len=seq_len, positions=positions, mem_len=64)
    memory = carry(model.step(text(1, 64)).memory)
    order = torch.randperm(memory.mem.shape[1], generator=torch.Generator().manual_seed(0))
    moved = FeedbackMemory(memory.mem[:, order], memory.window, memory.fill, memory.open)
    x = text(1, 1, seed=5)
    a, b = model.step(x, memory).logits, model.step(x, moved).logits
    assert (a - b).abs().max() > 1e-3 * a.std()


@pytest.mark.parametrize("seq_len", [1, 2, 5])
def test_a_single_token_at_the_start(seq_len):
    model = make(seq_len=seq_len)
    assert model(text(2, 1)).isfinite().all()
    with pytest.raises(ValueError, match="tokens must have at least one"): model(text(2, 1)[:, :0])


@pytest.mark.parametrize("seq_len", [2, 5])
def test_odd_tails_attend_to_themselves(seq_len):
    """The result does not depend on how a sequence is cut, down to single tokens."""
    model = make(seq_len=seq_len, tol=0)
    whole = model(text(2, 11))
    for size in (1, 2, 3, 7):
        memory, pieces = None, []
        for piece in text(2, 11).split(size, 1):
            logits, memory = model(piece, memory=memory, return_memory=True)
            pieces.append(logits)
        close(torch.cat(pieces, 1), whole)


def test_memory_and_window_keys_have_one_scale():
    """Entries are normalised before the projection that they share with normalised states."""
    model = make(seq_len=3, std=None)
    memory = carry(model.step(text(2, 12)).memory)
    large = FeedbackMemory(memory.mem * 50, memory.window, memory.fill, memory.open)
    entries = torch.randn(2, 9, 12, dtype=torch.float64) * 10
    k, _ = model.keys_values(entries)
    own, _ = model.split(model.layers[0].norm_attention(entries)).chunk(2, 1)
    assert 0.5 < k.std() / own.std() < 2
    # The floor of a norm is felt where entries are tiny, as those of a model that is just made.
    close(model.step(text(2, 3), large).logits, model.step(text(2, 3), memory).logits, rtol=.1,
          atol=.02)


def test_no_memory_means_none():
    """mem_len=0 kept everything."""
    model = make(mem_len=0, seq_len=1)
    a, b = text(1, 6), text(1, 6, seed=2)
    b[:, -1] = a[:, -1]
    assert torch.equal(model(a)[:, -1], model(b)[:, -1])
    assert nbytes(model.init_memory(1)) == 16  # two counters
    model = make(mem_len=0, seq_len=2)
    assert not torch.equal(model(a)[:, 1], model(b)[:, 1])  # the window is read
    assert torch.equal(model(a)[:, -2:], model(torch.cat([b[:, :4], a[:, 4:]], 1))[:, -2:])


@pytest.mark.parametrize("keep", [False, True])
def test_every_weight_is_trained(keep):
    model = make(keep_last_hidden=keep, seq_len=2)
    assert gradients(model, model(text(2, 9)).square().mean()).isfinite().all()
    model(text(2, 9)).square().mean().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


def test_the_documented_loop_trains():
    """The memory kept the graph: the second `backward` raised."""
    model, memory = make(dtype=torch.float32, std=None), None
    optimizer, losses = torch.optim.Adam(model.parameters(), lr=1e-2), []
    for i in range(20):
        x = text(2, 9, seed=i % 2)
        logits, memory = model(x[:, :-1], memory=memory, return_memory=True)
        loss = F.cross_entropy(logits.flatten(0, 1), x[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5


# what the solver promises

@pytest.mark.parametrize("seq_len", [1, 2, 5])
def test_parallel_is_sequential_within_the_tolerance(seq_len):
    x = text(2, 48)
    sequential = make(torch.float32, seq_len=seq_len, mem_len=32, solver="sequential")
    want = sequential(x)
    for tol in (1e-2, 1e-5):
        model = make(torch.float32, seq_len=seq_len, mem_len=32, tol=tol)
        got = model(x)
        assert (got - want).norm() < 20 * tol * want.norm()
        assert model.report.change <= tol and not model.report.sequential


@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize("std", [None, 0.1, 0.3])
def test_the_error_is_what_was_promised(std, graph):
    """The tolerance is one of the error, which is estimated, and not of the last change."""
    x = text(3, 96)
    with torch.no_grad():
        right = make(std=std, mem_len=96, solver="sequential").step(x).memory.mem
    for tol in (1e-1, 1e-2, 1e-3, 1e-5):
        model = make(std=std, mem_len=96, tol=tol)
        with torch.set_grad_enabled(graph): got = model.step(x).memory.mem
        error = ((got - right).norm(dim=-1) / right.norm(dim=-1)).max()
        assert error < 2 * tol, f"{error:.1e} at tol = {tol}"


def test_a_gradient_may_be_asked_for_twice():
    """The graph of the last pass is freed by the first backward, and made again by the second."""
    for half in (False, True):
        model = make(torch.float32 if half else torch.float64, block_len=4, tol=0)
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            loss = model(text()).square().mean()
        once, again = (torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
                       for _ in range(2))
        for a, b in zip(once, again): close(a, b)


def test_no_more_passes_than_windows():
    """As many passes as windows are always enough, whatever the tolerance."""
    for seq_len, most in ((1, 12), (2, 6), (5, 3)):
        model = make(seq_len=seq_len, tol=0)
        model(text(2, 12))
        assert model.report.passes <= most


def large(seed, dtype=torch.float64, **options):
    """A model whose weights are three times as large as those that one begins with."""
    torch.manual_seed(seed)
    model = FeedbackTransformer(num_tokens=50, dim=32, depth=3, heads=4, dim_head=8, seq_len=1,
                                mem_len=20, **options).to(dtype)
    with torch.no_grad(): [p.mul_(3) for p in model.parameters()]
    return model


@pytest.mark.parametrize("seed", [10, 6, 1])
def test_the_gradient_of_large_weights(seed):
    """The adjoint trusted how fast the passes had converged, and was left after its first term."""
    tokens = torch.randint(50, (2, 41), generator=torch.Generator().manual_seed(seed))
    def gradient(**options):
        model = large(seed, **options)
        first = model.step(tokens[:, :17])
        second = model.step(tokens[:, 17:], carry(first.memory, grad=True))
        logits = torch.cat([first.logits, second.logits], 1)
        return gradients(model, logits.log_softmax(-1)[..., 3].mean())
    want = gradient(solver="sequential", gradient="unrolled")
    for solver in ("parallel", "sequential"):
        for tol, most in ((1e-8, 1e-6), (1e-4, 3e-3)):
            error = (gradient(solver=solver, tol=tol) - want).norm() / want.norm()
            assert error < most, f"{solver}, tol {tol}: {error:.1e}"


def test_memories_of_another_window_length():
    with pytest.raises(ValueError, match="window of 1 token.* got one of 3"):
        make(seq_len=1)(text(), memory=make(seq_len=3).init_memory(2))


@pytest.mark.parametrize("graph", [True, False])
@pytest.mark.parametrize("tol", [1e-1, 1e-2, 1e-3])
def test_a_loose_tolerance_breaks_no_law(tol, graph):
    """Each row decides alone when it has settled, and each token from its past alone."""
    model = make(tol=tol, block_len=16, gradient="implicit" if graph else "unrolled")
    a = text(6, 16)
    b = a.clone()
    b[:, 12] = (b[:, 12] + 1) % 17
    x, y = model(a), model(b)
    close(x[:, :12], y[:, :12], rtol=0, atol=1e-12)
    for r in range(6): close(model(a[r:r + 1])[0], x[r], rtol=0, atol=1e-12)
    assert (x - make(solver="sequential")(a)).abs().max() > 1e-3 * tol  # the tolerance was used


def test_what_does_not_settle_is_read_in_sequence_and_said():
    model = make(max_passes=3, tol=0, block_len=12)
    with pytest.warns(UserWarning, match=r"9 of 12 tokens did not converge .* max_passes = 3"):
        got = model(text())
    assert model.report.sequential == 9
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        want = make(solver="sequential")(text())
    close(got, want)


@pytest.mark.parametrize("gradient", ["unrolled", "implicit"])
@pytest.mark.parametrize("seq_len", [1, 3])
def test_dropout_is_the_same_in_every_pass(seq_len, gradient):
    """Else there is no fixed point. Both solvers then agree, and so do their gradients."""
    results = []
    for solver in ("sequential", "parallel"):
        model = make(seq_len=seq_len, solver=solver, gradient=gradient, tol=0, attn_dropout=0.3,
                     ff_dropout=0.3).train()
        torch.manual_seed(7)
        logits = model(text())
        results.append((logits, gradients(model, logits.square().mean())))
    for a, b in zip(*results): close(a, b)
    assert not torch.allclose(model.eval()(text()), logits)


def test_the_implicit_gradient_is_close_at_the_default_tolerance():
    x, grads = text(2, 64), []
    for options in (dict(solver="sequential", gradient="unrolled"), dict()):
        model = make(std=None, mem_len=64, **options)
        grads.append(gradients(model, model(x).log_softmax(-1)[..., 3].mean()))
    assert (grads[0] - grads[1]).norm() < 1e-3 * grads[0].norm()


def test_the_implicit_graph_does_not_grow_with_the_passes():
    """What the graph holds is counted; through the passes it grows, implicitly it does not."""
    def held(**options):
        size = 0
        def count(t):
            nonlocal size
            size += t.nbytes
            return t
        model = make(mem_len=32, std=0.2, **options)
        with torch.autograd.graph.saved_tensors_hooks(count, lambda t: t): model(text(2, 32))
        return size, model.report.passes
    loose, tight = held(tol=0.5), held(tol=0)
    assert tight[1] > loose[1] and tight[0] == loose[0]
    assert held(tol=0, gradient="unrolled")[0] > 4 * tight[0]


# bad input

@pytest.mark.parametrize("option,value,message", [
    ("depth", 0, "depth must be 1 or more"), ("seq_len", 0, "seq_len must be 1 or more"),
    ("mem_len", -1, "mem_len must be 0 or more"), ("block_len", 0, "block_len must be 1"),
    ("max_passes", 0, "max_passes must be 1"), ("tol", -1e-3, "tol must be a finite number of 0"),
    ("tol", float("nan"), "tol must be a finite"), ("tol", float("inf"), "tol must be a finite"),
    ("segment_len", 0, "segment_len must be 1"), ("heads", 0, "heads must be 1"),
    ("solver", "newton", "solver must be one of 'parallel', 'sequential'; got 'newton'"),
    ("gradient", "exact", "gradient must be 'implicit' or 'unrolled'"),
    ("positions", "xl", "positions must be one of 't5', 'learned'"),
    ("ff_dropout", 1.0, "ff_dropout must be at least 0 and less than 1"),
])
def test_options_that_mean_nothing(option, value, message):
    with pytest.raises(ValueError, match=message): make(**{option: value})


def test_memories_that_do_not_fit():
    model = make(seq_len=2)
    with pytest.raises(TypeError, match="memory must be a FeedbackMemory"):
        model(text(), memory=torch.zeros(2))
    with pytest.raises(ValueError, match="memory must have one row"):
        model(text(), memory=model.init_memory(3))
    with pytest.raises(ValueError, match="memory.mem must be"):
        model(text(), memory=make(dim=10, seq_len=2).init_memory(2))
    with pytest.raises(ValueError, match="integer ids"): model(text().double())
    with pytest.raises(ValueError, match="between 0 and"): model(text() + 10)


def test_a_full_segment_takes_no_more():
    model = make(segment_len=4)
    segment = model.begin(model.init_memory(2))
    _, segment = model.extend(segment, text(2, 3))
    with pytest.raises(ValueError, match="segment of 4 tokens"): model.extend(segment, text(2, 2))


# files, devices, and numbers that are none

@pytest.mark.parametrize("positions", ["t5", "learned"])
def test_a_checkpoint_of_the_first_version_loads(positions):
    """Its layers were a module of their own; learned positions were rows, nearest first."""
    model, again = make(positions=positions), make(positions=positions, std=0.1)
    state, inside = model.state_dict(), ("layers", "positions", "norm_memory", "to_kv", "mixture")
    if positions == "learned":
        vectors = state.pop("positions.vectors")
        state["positions.vectors.weight"] = vectors.permute(2, 0, 1).flip(0).flatten(1)
    old = {"stack." * k.startswith(inside) + k: t for k, t in state.items()}
    again.load_state_dict(old)
    assert torch.equal(again(text()), model(text()))


@pytest.mark.parametrize("seq_len", [1, 3])
def test_on_the_meta_device(seq_len):
    model = make(seq_len=seq_len).to("meta")
    out = model.step(text().to("meta"), model.init_memory(2))
    assert out.logits.shape == (2, 12, 17) and out.memory.mem.is_meta


def test_nan_in_an_empty_window_is_not_read():
    model = make(seq_len=3)
    memory = carry(model.step(text(2, 4)).memory)   # one token of the second window
    assert memory.open.tolist() == [1, 1]
    window = memory.window.clone()
    window[:, :, 0] = float("nan")
    bad = FeedbackMemory(memory.mem, window, memory.fill, memory.open)
    a, b = (model.step(text(2, 7, seed=4), m) for m in (memory, bad))
    close(a.logits, b.logits)
    close(a.memory.window, b.memory.window)
