"""Probes: recall, cost and lookup of models whose answers are known."""
import time

import numpy as np
import pytest
import torch
from known import Parrot, Pending, Said, SpendingParrot, corpus, own_memories, xl
from mechanisms import each

from memformers.attention import distances, record
from memformers.data import ByteTokenizer
from memformers.model import Step
from memformers.probe import Recall, cost, lookup, recall, refused, seconds, wilson
from memformers.tasks import TaskStream, copy_task


# Recall


class Knows(Parrot):
    """Says the first token of the text, always; without a memory, that of the segment."""
    slots = 1

    def step(self, tokens, memory=None, mask=None):
        first = torch.where(memory.fill > 0, memory.mem[:, 0, 0].long(), tokens[:, 0])
        logits = torch.eye(self.num_tokens)[first][:, None].expand(*tokens.shape, -1)
        memory = Said(first[:, None, None].double(), torch.ones_like(memory.fill))
        return Step(logits, memory, self.no_aux_loss())


class Guesses(Parrot):
    """Says "a", always."""
    def step(self, tokens, memory=None, mask=None):
        out = super().step(tokens, memory, mask)
        return out._replace(logits=torch.eye(128)[97].expand(*tokens.shape, -1))


@pytest.mark.parametrize("batch_size", [1, 5, 16, 100])
def test_recall_of_models_that_always_and_never_know(batch_size):
    task, distances = copy_task(1), [1, 5, 6, 33]
    always = recall(Knows(), task, distances, episodes=33, batch_size=batch_size)
    assert (always.accuracy == 1).all() and (always.exact == 1).all()
    off = recall(Knows(), task, distances, episodes=33, batch_size=batch_size, memory=False)
    assert off.accuracy[0] == 1 and (off.accuracy[1:] == 0).all()
    guess = recall(Guesses(), task, distances, episodes=33, batch_size=batch_size)
    low, high = guess.interval()
    assert (low < task.chance).all() and (task.chance < high).all() and guess.chance == 1 / 16


@pytest.mark.parametrize("batch_size", [2, 64])
def test_recall_counts_tokens_and_whole_answers(batch_size):
    task = copy_task(3, alphabet="ab")
    found = recall(Knows(), task, [7, 20], episodes=40, batch_size=batch_size, seed=3)
    for i, distance in enumerate([7, 20]):
        stream = TaskStream(task.at(distance), 40, seq_len=100, seed=3, episodes=1)
        segment = next(stream)
        answers = segment.labels[segment.loss_mask].view(40, 3)
        right = (answers == segment.tokens[:, :1]).double()
        assert found.accuracy[i] == pytest.approx(right.mean().item())
        assert found.exact[i] == pytest.approx(right.prod(1).mean().item())
    assert 0 < found.exact[0] < found.accuracy[0] < 1


def test_recall_results(tmp_path):
    found = recall(Knows(), copy_task(1), (d for d in (1, 40)), episodes=8, memory=False)
    table = found.table()
    assert "| 1 | 100.0% [67.6%, 100.0%] | 100.0%" in table and "memory off" in table
    assert "| 40 | 0.0% [0.0%, 32.4%]" in table and "6.2%" in repr(found)
    found.to_json(tmp_path / "r.json")
    again = Recall.from_json(tmp_path / "r.json")
    assert again.table() == found.table() and again.settings == found.settings


def test_wilson():
    low, high = wilson(np.array([0, 0.5, 1]), 10)
    np.testing.assert_allclose(low, [0, 0.2366, 0.7225], atol=1e-4)
    np.testing.assert_allclose(high, [0.2775, 0.7634, 1], atol=1e-4)


# Cost


def test_cost():
    found = cost(xl(), [0, 3, 12], batch_size=2, repeats=1, mem_len=4)
    assert found.memory_bytes.tolist() == [3 * 4 * 12 * 8 + 8] * 3 and found.tokens == 10
    assert (found.seconds > 0).all()
    np.testing.assert_allclose(found.tokens_per_second * found.ms_per_token, 1e3)
    assert found.table().count("\n| ") == 3 and "12:" in repr(found)


def test_cost_counts_from_the_context_asked_for():
    lengths = []
    class Counts(SpendingParrot):
        def step(self, tokens, memory=None, mask=None):
            lengths.append((int(memory.fill[0]), tokens.shape[1]))
            return super().step(tokens, memory, mask)
    Counts.slots = 100
    cost(Counts(), [3, 9], repeats=2)
    assert lengths == [(0, 3)] + [(3, 4)] * 3 + [(3, 4), (7, 2)] + [(9, 4)] * 3


def test_cost_leaves_the_model_alone():
    model = xl(ff_dropout=0.5).train()
    random = torch.get_rng_state()
    cost(model, [3], repeats=1)
    assert model.training and torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), random)


def test_cost_of_reading_everything_again():
    lengths = []
    class Counts(Parrot):
        def step(self, tokens, memory=None, mask=None):
            lengths.append((int(memory.fill[0]), tokens.shape[1]))
            return super().step(tokens, memory, mask)
    found = cost(Counts(seq_len=20), [0, 3, 16], repeats=1, seq_len=4, reread=True)
    assert lengths == [(0, 4)] * 2 + [(0, 7)] * 2 + [(0, 20)] * 2
    assert found.tokens == 4 and found.memory_bytes.tolist() == [0, 0, 0]


def test_cost_counts_the_time_of_the_carry(monkeypatch):
    commit = Pending.on_carry
    def slow(memory, grad):
        time.sleep(0.05)
        return commit(memory, grad)
    monkeypatch.setattr(Pending, "on_carry", slow)
    assert cost(SpendingParrot(), [0], repeats=1).seconds[0] >= 0.05


def test_seconds_of_a_call():
    assert seconds(lambda: time.sleep(0.02), repeats=2) >= 0.02
    with pytest.raises(ValueError, match="repeats: expected at least 1, got 0"):
        seconds(time.time, repeats=0)


# Refusals


@pytest.mark.parametrize("call, error, message", [
    (lambda: recall(xl(), copy_task(1), []), ValueError, "distances must have at least one"),
    (lambda: recall(xl(), copy_task(1), [4], 0), ValueError, "episodes: expected at least 1"),
    (lambda: recall(xl(), copy_task(1), [0]), ValueError, "distances: expected at least 1"),
    (lambda: recall(xl(), copy_task(1), [4], menlen=4), TypeError, "menlen"),
    (lambda: cost(xl(), [4], menlen=4), TypeError, "menlen"),
    (lambda: cost(xl(), [8, 4]), ValueError, "contexts must increase"),
    (lambda: cost(xl(), []), ValueError, "contexts must have at least one"),
    (lambda: cost(xl(), [-1]), ValueError, "contexts: expected at least 0"),
    (lambda: cost(xl(), [1], reread=True), ValueError, r"1 \+ 5.*reads 5 at most"),
])
def test_refusals(call, error, message):
    with pytest.raises(error, match=message): call()


def test_refused_prints_the_error_and_fails_where_there_is_none(capsys):
    def fails(): raise OSError("/data/a/b is full")
    refused(fails, hide="/data/a")
    assert capsys.readouterr().out == "OSError: …/b is full\n"
    with pytest.raises(AssertionError, match="nothing was refused"): refused(lambda: None)


# What was looked up

class Looker(Parrot):
    """Two heads: the first looks at the oldest memory, the second a quarter at each of the newest
    two, and for the rest at itself."""
    def extend(self, memory, tokens, mask=None):
        (b, n), m = tokens.shape, self.slots
        weights = torch.zeros(b, 2, n, m + n, dtype=torch.float64)
        if memory.fill.any():
            weights[:, 0, :, m - int(memory.fill[0])] = 1
            weights[:, 1, :, m - 2:m] = .25
            weights[:, 1] += .5 * torch.eye(n, m + n).roll(m, 1)
        else: weights[..., m:] = torch.eye(n)
        age = distances(n, m + n)[None, None]
        record(weights, (("xl", m, 1), ("segment", n, 1)), age)
        record(weights[:, :1, :, m:], (("segment", n, 1),), age[..., m:])
        return super().extend(memory, tokens, mask)


def test_a_lookup_finds_the_tokens_and_their_ages():
    text = ByteTokenizer().encode("abcdefghijklmnopqrstuvwxyz")
    found = lookup(Looker(), text, at=17)        # "r"; its segment is "qrst", the memory "klmnop"
    assert [(read.layer, read.head, read.weight, read.age, read.start, read.stop)
            for read in found.reads] == [(1, 0, 1.0, 7, 10, 11), (1, 1, .25, 2, 15, 16),
                                         (1, 1, .25, 3, 14, 15)]
    assert "opq«r»stu" in found.text(context=3).splitlines()[0]
    assert "hij«k»lmn" in found.text(context=3).splitlines()[2]
    assert len(lookup(Looker(), text, at=17, top=1).reads) == 1
    assert {read.head for read in lookup(Looker(), text, at=17, head=0, layer=1).reads} == {0}
    assert lookup(Looker(), text, at=-9).reads == found.reads
    assert "nothing" in repr(lookup(Looker(), text, at=2))
    assert lookup(Looker(), text, at=17, layer=2).reads == []


def test_a_lookup_refuses():
    text = corpus([30]).documents[0]
    for call, words in [(lambda: lookup(xl(), text, at=30), "at must be.*30"),
                        (lambda: lookup(xl(), text, at=1, layer=4), "layer must be 1 to 3.*4"),
                        (lambda: lookup(xl(), text, at=1, head=3), "head.*3"),
                        (lambda: lookup(xl(), text, at=1, top=0), "top.*0")]:
        with pytest.raises(ValueError, match=words): call()
    with pytest.raises(ValueError, match="Parrot records no attention"):
        lookup(Parrot(), text, at=3)


@each
def test_every_mechanism_says_what_it_looked_up(mechanism):
    """The reads are the largest weights of the query, and none lies in the future."""
    if not mechanism.attends:
        with pytest.raises(ValueError, match="records no attention weights"):
            lookup(mechanism.make(), [1, 2, 3], at=2)
        return
    model, text = mechanism.make(), corpus([40]).documents[0]
    found = lookup(model, text, at=37, top=5)
    ids = torch.from_numpy(text.astype(np.int64))[None]
    start, weights = 37 - 37 % model.seq_len, []
    memory = own_memories(model, text[:start + 1], model.seq_len)[-1]
    for seen in model.attention_weights(ids[:, start:38], memory):
        memories = torch.tensor([kind not in ("", "segment") for kind in seen.kinds])
        weights.append(seen.weights[0, :, -1, memories].flatten())
    best = torch.cat(weights).sort(descending=True).values[:5]
    best = best[best > 0]
    torch.testing.assert_close(torch.tensor([read.weight for read in found.reads]).double(),
                               best.double())
    for read in found.reads:
        assert read.age >= 0 and read.stop == 37 - read.age + 1 and 0 <= read.start <= read.stop \
            or read.start == read.stop
    assert len(found.text().splitlines()) == 2 + len(found.reads)
