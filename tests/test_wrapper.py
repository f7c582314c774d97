"""`AutoregressiveWrapper` over every mechanism: the users' loop, truncation, parts, lists, generation."""
import pytest
import torch
import torch.nn.functional as F
from mechanisms import SIZES, each

from memformers import AutoregressiveWrapper, TransformerXL, carry, generate
from memformers.generate import Reader, for_generation
from memformers.wrapper import top_k, top_p

close = torch.testing.assert_close
N = SIZES["seq_len"]


def text(rows=3, length=3 * N + 3, seed=1):
    return torch.randint(SIZES["num_tokens"], (rows, length),
                         generator=torch.Generator().manual_seed(seed))


def gradients(model, run):
    model.zero_grad()
    run()
    return {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}


def same_gradients(a, b):
    assert a.keys() == b.keys()
    for k in a: close(a[k], b[k], msg=lambda m, k=k: f"{k}: {m}")


def by_hand(model, x, every=1, aux=True):
    """The losses of a text, `backward` after every `every` segments."""
    memory, total = None, 0
    segments = list(zip(x[:, :-1].split(N, 1), x[:, 1:].split(N, 1)))
    for s, (tokens, labels) in enumerate(segments, 1):
        out = model.step(tokens, memory)
        total = total + F.cross_entropy(out.logits.flatten(0, 1), labels.flatten()) + out.aux_loss
        last = s % every == 0 or s == len(segments)
        memory = carry(out.memory, grad=not last)
        if last:
            total.backward()
            total = 0


@each
def test_the_documented_loop(mechanism):
    model, x = mechanism.make(), text()
    wrapper, losses = AutoregressiveWrapper(model), []

    def run():
        for loss, aux_loss in wrapper(x, return_loss=True):
            (loss + aux_loss).backward()
            losses.append(loss.item())

    found = gradients(model, run)
    assert len(losses) == 4 // model.train_segments
    if model.train_segments == 1: same_gradients(found, gradients(model, lambda: by_hand(model, x)))


@each
@pytest.mark.parametrize("every", [2, 3, 9])
def test_truncation_accumulates(mechanism, every):
    model, x = mechanism.make(), text()
    wrapper = AutoregressiveWrapper(model)
    counts = []

    def run():
        for loss, aux_loss in wrapper(x, return_loss=True, truncate_every=every):
            (loss + aux_loss).backward()
            counts.append(1)

    found = gradients(model, run)
    assert len(counts) == -(-4 // every)
    same_gradients(found, gradients(model, lambda: by_hand(model, x, every)))


@each
def test_parts_of_a_batch_add_up(mechanism):
    model, x = mechanism.make(), text()
    wrapper, last = AutoregressiveWrapper(model), []

    def run(**options):
        for part in wrapper(x, return_loss=True, **options):
            loss, aux_loss = part
            (loss + aux_loss).backward()
            last.append(part.is_last_batch)

    whole = gradients(model, lambda: run(truncate_every=2))
    last.clear()
    parts = gradients(model, lambda: run(truncate_every=2, max_batch_size=2))
    assert last == [False, True] * 2
    same_gradients(parts, whole)


@each
def test_sequences_of_different_lengths(mechanism):
    """Each counts as it would alone: padding is neither read nor predicted."""
    model, lengths = mechanism.make(), [2 * N + 1, 3, N]
    rows = [text(1, n, seed=n)[0] for n in lengths]
    wrapper = AutoregressiveWrapper(model)
    read = lambda x: list(wrapper(x, return_loss=True, truncate_every=1))
    steps, alone = read(rows), [read(row) for row in rows]
    labels = [[len(t) for t in row[1:].split(N)] for row in rows]
    for s, (loss, _) in enumerate(steps):
        there = [(a[s].loss * n[s], n[s]) for a, n in zip(alone, labels) if s < len(a)]
        close(loss, sum(x for x, _ in there).float() / sum(n for _, n in there), check_dtype=False,
              rtol=1e-5, atol=1e-6)


def test_a_mask_may_be_as_long_as_the_text_or_as_its_inputs():
    model, x = small(), text(2, 8)
    mask = torch.arange(8) < torch.tensor([[8], [5]])
    wrapper = AutoregressiveWrapper(model)
    (long, _), = list(wrapper(x[:, :6], mask=mask[:, :6], return_loss=True))
    (alone, _), = list(wrapper(x[1:, :5], return_loss=True))
    (other, _), = list(wrapper(x[:1, :6], return_loss=True))
    close(long, (alone * 4 + other * 5) / 9)
    (trimmed, _), = list(wrapper(x[:, :6], mask=mask[:, :5], return_loss=True))
    assert trimmed != long            # the last label of row 1 is taken to be real
    with pytest.raises(ValueError, match="mask must be bool"):
        wrapper(x[:, :6], mask=mask[:, :4], return_loss=True)


def test_ignored_tokens_are_neither_read_nor_predicted():
    model, x = small(), text(1, 6)
    holes = torch.cat([x, torch.full((1, 3), -100)], 1)
    a, = list(AutoregressiveWrapper(model)(x, return_loss=True))
    losses = list(AutoregressiveWrapper(model)(holes, return_loss=True))
    close(losses[0].loss, a.loss)
    assert losses[1].loss == 0
    losses[1].loss.backward()


def small(): return TransformerXL(**SIZES, mem_len=7)


def test_without_a_loss_it_reads_the_whole_text():
    model, x = small().eval(), text()
    out = AutoregressiveWrapper(model)(x)
    logits, memory = [], None
    for cut in x.split(N, 1):
        step = model.step(cut, memory)
        memory = carry(step.memory)
        logits.append(step.logits)
    assert torch.equal(out.logits, torch.cat(logits, 1)) and torch.equal(out.memory.mem, memory.mem)
    assert not out.memory.mem.requires_grad


def test_a_memory_goes_in_and_comes_out():
    model, x = small(), text()
    wrapper = AutoregressiveWrapper(model)
    whole = [s.loss for s in wrapper(x[:, :2 * N + 1], return_loss=True)]
    first, = list(wrapper(x[:, :N + 1], return_loss=True))
    second, = list(wrapper(x[:, N:2 * N + 1], return_loss=True, memory=first.memory))
    close(torch.stack([first.loss, second.loss]), torch.stack(whole))


@each
def test_generation_is_that_of_the_library(mechanism):
    model = mechanism.make().train()
    wrapper, prompt = AutoregressiveWrapper(model), text(2, N + 2)
    for p in (prompt, prompt[0], prompt[:, :1]):
        out = wrapper.generate(p, 7, temperature=0)
        assert torch.equal(out, generate(model, p, 7, temperature=0)) and out.shape[-1] == 7
    assert model.training and all(m.training for m in model.modules())


@each
def test_the_copy_that_generates_is_the_same_model_in_another_layout(mechanism):
    model, prompt = mechanism.make().train(), text(2, N + 2)
    before = {k: (p.data_ptr(), p.stride(), p.clone()) for k, p in model.named_parameters()}
    quick = for_generation(model)
    assert model.training and not any(m.training for m in quick.modules())
    drawn = generate(model, prompt, 2 * N, temperature=0)
    model.eval()
    with torch.no_grad():
        reader, new = Reader(model, 2), prompt
        other = Reader(quick, 2)
        for i in range(2 * N):
            logits = reader.read(new)
            close(other.read(new), logits)
            new = drawn[:, i, None]
            assert torch.equal(logits.argmax(-1), new[:, 0])
    for k, p in model.named_parameters():
        assert (p.data_ptr(), p.stride()) == before[k][:2] and torch.equal(p, before[k][2]), k


def test_generation_with_filters_masks_and_an_end():
    torch.manual_seed(0)
    wrapper, prompt = AutoregressiveWrapper(small()), text(2, 6)
    mask = torch.arange(6) >= torch.tensor([[0], [3]])
    padded = wrapper.generate(prompt, 4, mask=mask, temperature=0)
    assert torch.equal(padded[1:], wrapper.generate(prompt[1:, 3:], 4, temperature=0))
    first = wrapper.generate(prompt, 1, temperature=0)
    ended = wrapper.generate(prompt[:1], 5, temperature=0, eos_token=int(first[0, 0]))
    assert ended.shape == (1, 1)
    narrow = wrapper.generate(prompt, 6, filter_logits_fn=top_k, filter_thres=0.99)
    assert torch.equal(narrow, wrapper.generate(prompt, 6, temperature=0))
    never = lambda logits, thres: logits.masked_fill(torch.arange(SIZES["num_tokens"]) != 3, -torch.inf)
    assert (wrapper.generate(prompt, 5, filter_logits_fn=never) == 3).all()
    wrapper.generate(prompt, 3, filter_logits_fn=None)


def test_the_filters():
    logits = torch.tensor([[.5, .3, .15, .05]]).log()
    assert top_p(logits, 0.9).isfinite().tolist() == [[True, True, True, False]]
    assert top_p(logits, 0.4).isfinite().tolist() == [[True, False, False, False]]
    assert top_k(logits, 0.5).isfinite().sum() == 2 and top_k(logits, 0.99).isfinite().sum() == 1


@pytest.mark.parametrize("options, words", [
    (dict(max_batch_size=0), "max_batch_size"), (dict(truncate_every=0), "truncate_every")])
def test_refuses_options_that_mean_nothing(options, words):
    with pytest.raises(ValueError, match=words):
        AutoregressiveWrapper(small())(text(), return_loss=True, **options)


def test_refuses_texts_without_a_label():
    with pytest.raises(ValueError, match="at least 2 tokens"):
        AutoregressiveWrapper(small())(text(2, 1), return_loss=True)
    with pytest.raises(ValueError, match="1-D"):
        AutoregressiveWrapper(small())([], return_loss=True)


def test_top_k_rounds_up():
    """As in the original: a tenth of 15 tokens are two of them, and one is always left."""
    logits = torch.randn(3, 15)
    for thres, left in ((.9, 2), (.95, 1), (1., 1), (.5, 8)):
        assert (top_k(logits, thres=thres) > -torch.inf).sum(1).tolist() == [left] * 3
