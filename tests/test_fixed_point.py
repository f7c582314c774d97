"""The solver of causal fixed points: entries, gradients, and when it stops; on recurrences of its own."""
import pytest
import torch

from memformers.fixed_point import _converged_after, solve

close = torch.testing.assert_close


def recurrence(rows=3, n=9, d=4, gain=2.0, window=1, seed=0):
    """A nonlinear recurrence: x and W, the function of all entries, and the loop that defines it."""
    torch.manual_seed(seed)
    x = torch.randn(rows, n, d, dtype=torch.float64, requires_grad=True)
    weight = (torch.randn(d, d, dtype=torch.float64) * gain / d ** .5).requires_grad_()
    begin = [t - t % window for t in range(n)]           # a token reads the entries before its window
    def entry(t, before):
        return (x[:, t] + before.sum(1) / max(1, before.shape[1]) @ weight).tanh()
    def loop():
        entries = x[:, :0]
        for t in range(n): entries = torch.cat([entries, entry(t, entries[:, :begin[t]])[:, None]], 1)
        return entries
    def f(entries):
        new = torch.stack([entry(t, entries[:, :begin[t]] if begin[t] else x[:, :0])
                           for t in range(n)], 1)
        return new, new.sin()
    return x, weight, f, loop, torch.tensor(begin)[None]


def gradients(entries, inputs):
    return torch.autograd.grad(entries.square().sum(), inputs, retain_graph=True)


@pytest.mark.parametrize("gradient", ["implicit", "unrolled"])
@pytest.mark.parametrize("sequential", [False, True])
@pytest.mark.parametrize("window", [1, 3])
def test_the_solution_is_that_of_the_loop(window, sequential, gradient):
    x, weight, f, loop, start = recurrence(window=window)
    way = dict(max_passes=0, sequential=lambda: (loop(), loop().sin())) if sequential else {}
    (entries, other), report = solve(f, torch.zeros_like(x), tol=0, start=start, gradient=gradient,
                                     **way)
    close(entries, loop())
    close(other, loop().sin())
    for a, b in zip(gradients(entries, (x, weight)), gradients(loop(), (x, weight))): close(a, b)
    got, want = (gradients(t, (x, weight)) for t in (other, loop().sin()))
    for a, b in zip(got, want): close(a, b)
    assert report.passes == 0 if sequential else report.passes <= -(-9 // window)


def test_gradients_against_differences():
    x, weight, f, _, _ = recurrence(rows=1, n=4, d=2)
    entry = lambda x, w: lambda e: ((x + torch.tril(torch.ones(4, 4).double(), -1) @ e @ w).tanh(),)
    solution = lambda x, w: solve(entry(x, w), torch.zeros_like(x), tol=0)[0][0]
    assert torch.autograd.gradcheck(solution, (x, weight))


@pytest.mark.parametrize("tol", [1e-2, 1e-4, 1e-6])
@pytest.mark.parametrize("gain", [0.5, 2.0, 4.0])
def test_errors_follow_the_tolerance(tol, gain):
    for seed in range(4):
        x, weight, f, loop, _ = recurrence(n=24, gain=gain, seed=seed)
        (entries, _), report = solve(f, torch.zeros_like(x), tol=tol)
        error = ((entries - loop()).norm(dim=-1) / loop().norm(dim=-1)).max()
        got, want = (torch.cat([g.flatten() for g in gradients(e, (x, weight))])
                     for e in (entries, loop()))
        assert error < tol and report.change <= tol
        assert (got - want).norm() < 3 * tol * want.norm()


@pytest.mark.parametrize("swings", [1, 3])
def test_no_tolerance_is_exact_for_every_chain(swings):
    """Gains from 1e-6 to 1e6: changes and terms of the adjoint fall and rise again."""
    gains = torch.tensor(([1e-6] * 3 + [1e6] * 3) * swings + [1.0], dtype=torch.float64)
    x = torch.ones(1, len(gains), 1, dtype=torch.float64, requires_grad=True)
    def f(e): return (x + gains[:, None] * torch.cat([torch.zeros_like(x[:, :1]), e[:, :-1]], 1),)
    (entries,), _ = solve(f, torch.zeros_like(x), tol=0)
    want = [x[:, 0]]
    for t in range(1, len(gains)): want.append(x[:, t] + gains[t] * want[-1])
    close(entries, torch.stack(want, 1))
    got, = torch.autograd.grad(entries[0, -1].sum(), x)
    close(got, torch.autograd.grad(want[-1].sum(), x)[0], rtol=1e-6, atol=1e-9)


def test_a_row_stops_only_when_its_own_gradient_is_there():
    """The loss of the second row is 1e-9 times that of the first."""
    x, weight, f, loop, _ = recurrence(rows=2, n=16)
    scale = torch.tensor([1.0, 1e-9], dtype=torch.float64)[:, None, None]
    x.data[0, 1:] = 9        # flat: the adjoint of the first row is found at once
    (entries, _), _ = solve(f, torch.zeros_like(x), tol=1e-6)
    got, want = (torch.autograd.grad((e.square() * scale).sum(), x)[0][1] for e in (entries, loop()))
    assert (got - want).norm() < 1e-4 * want.norm()


def test_a_function_that_looks_ahead_is_refused():
    x = torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True)
    (entries,), _ = solve(lambda e: (0.9 * e.flip(1) + x,), torch.zeros_like(x))
    with pytest.raises(ValueError, match="f must be causal"): entries.sum().backward()


def test_gradients_that_are_not_finite_are_seen():
    x, weight, f, _, _ = recurrence()
    (entries, _), _ = solve(f, torch.zeros_like(x))
    assert torch.autograd.grad((entries * torch.nan).sum(), x)[0].isnan().any()
    (entries, _), _ = solve(f, torch.full_like(x, torch.nan), tol=1e-4)   # whatever the guess
    assert entries.isfinite().all()


@pytest.mark.parametrize("tol", [1e-1, 1e-3])
@pytest.mark.parametrize("graph", [False, True])
def test_rows_and_pasts_decide_alone(tol, graph):
    x, _, f, _, _ = recurrence(rows=5, n=20)
    with torch.set_grad_enabled(graph):
        whole = solve(f, torch.zeros_like(x), tol=tol)[0][0]
        x.data[:, 15:] += 1                            # the future of the others
        x.data[:4] += 1                                # and the neighbours of the last row
        other = solve(f, torch.zeros_like(x), tol=tol)[0][0]
    close(whole[4, :15], other[4, :15], rtol=0, atol=1e-14)


def test_an_entry_waits_for_its_past():
    """A change of nothing proves nothing while what is read still changes."""
    old = torch.ones(2, 4, 3)
    new = old.clone()
    new[0, 1], new[1, 0] = 2, 2
    start = torch.arange(4)[None]
    now, change = _converged_after(old, new, torch.zeros(2, 4).bool(), start, 1e-3)
    # The first token reads nothing: it is exact, however much it changed.
    assert now.tolist() == [[True, False, False, False], [True] * 4] and change == 0
    first = torch.tensor([[True, False, False, False]] * 2)
    now, *_ = _converged_after(new, new * 1.01, first, start, 1e-3)
    assert now.tolist() == [[True, True, False, False]] * 2


def test_what_does_not_converge_is_computed_in_sequence_and_said():
    x, _, f, loop, _ = recurrence(n=12)
    with pytest.warns(UserWarning, match=r"\d+ of 12 tokens did not converge .* max_passes = 2"):
        out, report = solve(f, torch.zeros_like(x), tol=0, max_passes=2,
                            sequential=lambda: f(loop()))
    close(out[0], loop())
    assert report.passes == 2 and report.sequential == 10


def test_padding_need_not_converge():
    x, _, f, _, _ = recurrence(n=8)
    mask = torch.arange(8)[None] < torch.tensor([[0], [1], [2]])
    assert solve(f, torch.zeros_like(x), tol=0, mask=mask)[1].passes <= 2


@pytest.mark.parametrize("options,name", [
    (dict(tol=-1e-3), "tol"), (dict(tol=float("nan")), "tol"), (dict(tol=float("inf")), "tol"),
    (dict(tol="small"), "tol"), (dict(tol=None), "tol"), (dict(max_passes=-1), "max_passes"),
    (dict(max_passes=1.5), "max_passes"), (dict(gradient="exact"), "gradient")])
def test_options_that_mean_nothing(options, name):
    x, _, f, _, _ = recurrence()
    with pytest.raises(ValueError, match=name): solve(f, x, **options)


def test_no_more_is_asked_than_the_type_can_tell():
    """Under autocast entries may flicker by less than a step of bfloat16; that counts as none."""
    calls = []
    def f(entries):
        calls.append(1)
        return (torch.full_like(entries, 1 + 1e-3 * (len(calls) % 2)),)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        _, report = solve(f, torch.ones(1, 9, 2), tol=1e-6)
    assert report.passes == 1 and report.change > 1e-4
