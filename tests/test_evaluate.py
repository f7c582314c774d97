"""Evaluation: equal to one document at a time by hand; intervals, recall, files, refusals."""
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from mechanisms import SIZES, each
from torch import Tensor

from memformers import MemorizingTransformer, TransformerXL, carry, clone, select
from memformers.data import ByteTokenizer, Corpus
from memformers.evaluate import (Estimate, Evaluation, Recall, TokenBits, cost, evaluate, lookup,
                                 recall, resampled_sums, token_bits, token_bits_by_mode, wilson)
from memformers.memory import filled, memory_state, push, shuffle, slots
from memformers.model import MemoryLM, Step, in_line
from memformers.tasks import TaskStream, copy_task

LENGTHS = [2, 23, 6, 7, 12, 11, 13]
PARTNER = {0: 2, 2: 0, 3: 5, 5: 3, 4: 6, 6: 1, 1: 4}  # by length: two, two, and the last three


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


# Models of which every answer is known.


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

    def read(self, tokens, memory, mask):
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

    def read(self, tokens, memory, mask):
        out = super().read(tokens, Said(memory.mem, memory.fill), mask)
        mask = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask
        new = tokens[..., None].double()
        return out._replace(memory=Pending(memory.mem, memory.fill, new, mask))


def nats_of(model, text, memories, size):
    """Nats of a document whose k-th segment is read with `memories[k]`, or the last there is."""
    text, nats = torch.from_numpy(np.array(text, dtype=np.int64)), []
    for k, start in enumerate(range(0, len(text) - 1, size)):
        part = text[start:start + size + 1]
        logits = model.step(part[None, :-1], memories[min(k, len(memories) - 1)]).logits[0]
        nats += (-logits.log_softmax(-1)[range(len(part) - 1), part[1:]]).tolist()
    return nats


@torch.no_grad()
def own_memories(model, text, size):
    """What a document's own memory is before each of its segments, and at its end."""
    memories, inputs = [model.init_memory(1)], torch.from_numpy(np.array(text, dtype=np.int64))[:-1]
    for part in inputs.split(size):
        memories.append(carry(model.step(part[None], clone(memories[-1])).memory))
    return memories


@torch.no_grad()
def by_hand(model, texts, partner, size):
    """Nats of each document, one at a time: a list for each mode."""
    own = [own_memories(model, text, size) for text in texts]
    read = lambda i, memories: nats_of(model, texts[i], memories, size)
    return {"on": [read(i, own[i]) for i in range(len(texts))],
            "off": [read(i, own[i][:1]) for i in range(len(texts))],
            "foreign": [read(i, own[partner[i]]) for i in range(len(texts))]}


@each
@pytest.mark.parametrize("batch_size", [1, 3, 4, 100])
def test_scores_are_those_of_one_document_at_a_time(mechanism, batch_size):
    model, text = mechanism.make(), corpus()
    found = evaluate(model, text, batch_size=batch_size)
    for mode, nats in by_hand(model, text.documents, PARTNER, model.seq_len).items():
        np.testing.assert_allclose(found.nats[mode].sum(1), [sum(n) for n in nats], rtol=1e-9)
        total = sum(map(sum, nats)) / sum(map(len, nats)) / math.log(2)
        assert found.bits(mode) == pytest.approx(total, rel=1e-9)
    assert found.tokens.sum(1).tolist() == [n - 1 for n in LENGTHS]


def test_segments_may_be_shorter_than_the_models():
    model, text = xl(), corpus()
    found = evaluate(model, text, seq_len=3)
    for mode, nats in by_hand(model, text.documents, PARTNER, 3).items():
        np.testing.assert_allclose(found.nats[mode].sum(1), [sum(n) for n in nats], rtol=1e-9)


def test_each_range_of_positions_has_its_own_tokens():
    model, text, edges = xl(), corpus(), [0, 3, 10, 16]
    found = evaluate(model, text, edges=edges)
    assert found.edges.tolist() == [0, 3, 10, 16, 22]
    for mode, nats in by_hand(model, text.documents, PARTNER, model.seq_len).items():
        for k, (a, b) in enumerate(zip(found.edges, found.edges[1:])):
            expected = [sum(n[a:b]) for n in nats]
            np.testing.assert_allclose(found.nats[mode][:, k], expected, rtol=1e-9)
            assert found.tokens[:, k].tolist() == [len(n[a:b]) for n in nats]


def test_positions_add_up_to_the_score():
    found = evaluate(xl(), corpus())
    assert found.edges.tolist() == [0, 5, 10, 20, 40]
    for mode in found.modes:
        edges, mean, low, high = found.by_position(mode)
        weights = found.tokens.sum(0) / found.tokens.sum()
        assert (mean * weights).sum() == pytest.approx(found.bits(mode))
        assert (low[:3] <= mean[:3]).all() and (mean[:3] <= high[:3]).all()
        assert np.isnan([low[3], high[3]]).all()  # one document is as long as that


def test_ranges_without_a_token_have_no_score():
    edges, mean, low, high = evaluate(xl(), corpus(), edges=[0, 5, 50, 90]).by_position()
    assert edges.tolist() == [0, 5, 50, 90] and np.isnan([mean[2], low[2], high[2]]).all()


def test_without_slots_all_modes_are_the_same():
    found = evaluate(xl(mem_len=0), corpus())
    for mode in ("off", "foreign", "shuffled"):
        np.testing.assert_array_equal(found.nats[mode], found.nats["on"])
        assert found.difference(mode) == (0, 0, 0)
    assert "does not use its memory" in found.table()
    assert not evaluate(xl(), corpus(), mem_len=0).difference("off").value


HIT, MISS, EVEN = -math.log((1 + 1 / 128) / 2), -math.log(1 / 256), math.log(128)


@pytest.mark.parametrize("model", [Parrot, SpendingParrot])
@pytest.mark.parametrize("batch_size", [2, 8])
def test_memories_are_whose_they_should_be(model, batch_size):
    # Segments of 4. The second has ended when the first still reads: its last memory, b, stays.
    found = evaluate(model(), words(b"a" * 4 + b"a" * 4 + b"b" * 4 + b"b", b"a" * 5 + b"b" * 4),
                     batch_size=batch_size)
    sums = {mode: nats.sum(1) for mode, nats in found.nats.items()}
    np.testing.assert_allclose(sums["off"], [12 * EVEN, 8 * EVEN])
    np.testing.assert_allclose(sums["on"], [4 * EVEN + 3 * HIT + 5 * MISS, 4 * EVEN + 4 * MISS])
    # The long one is read behind nothing, a and b; the short one behind nothing and a.
    np.testing.assert_allclose(sums["foreign"], [4 * EVEN + 3 * HIT + MISS + 4 * HIT,
                                                 4 * EVEN + 4 * MISS])


def test_shuffled_is_a_permutation_of_the_own_memory():
    text, model = corpus([30, 30], 3), Parrot()
    found = evaluate(model, text, seed=5)
    tokens, generator = torch.tensor(np.stack(text.documents)).long(), torch.Generator()
    memory, expected = model.init_memory(2), torch.zeros(2, dtype=torch.float64)
    generator.manual_seed(5)
    for part, labels in zip(tokens[:, :-1].split(4, 1), tokens[:, 1:].split(4, 1)):
        logits = model.step(part, shuffle(memory, generator)).logits
        expected -= logits.gather(-1, labels[..., None]).sum((1, 2))
        memory = carry(model.step(part, memory).memory)
    np.testing.assert_allclose(found.nats["shuffled"].sum(1), expected)
    assert found.bits("shuffled") != found.bits("on")


def test_a_carry_that_writes_into_its_argument_changes_no_score():
    text = corpus(num_tokens=4)
    pure, spending = evaluate(Parrot(), text), evaluate(SpendingParrot(), text)
    for mode in pure.modes: np.testing.assert_array_equal(pure.nats[mode], spending.nats[mode])


def test_padding_is_not_counted():
    class Loud(Parrot):
        """Costs much wherever there is padding."""
        def step(self, tokens, memory=None, mask=None):
            out = super().step(tokens, memory, mask)
            return out if mask is None else out._replace(
                logits=out.logits.masked_fill(~mask[..., None], math.nan))
    text = corpus(num_tokens=128)
    np.testing.assert_array_equal(evaluate(Loud(), text).nats["on"],
                                  evaluate(Parrot(), text).nats["on"])


def test_only_the_first_tokens_are_read_where_asked():
    text = corpus()
    cut = Corpus("cut", text.names, [document[:9] for document in text])
    model = xl()
    part, whole = evaluate(model, text, max_tokens=9), evaluate(model, cut)
    np.testing.assert_array_equal(part.nats["foreign"], whole.nats["foreign"])
    assert "first 9 of each" in part.table()


def test_on_is_always_scored_and_the_others_if_asked():
    assert evaluate(xl(), corpus(), modes=["off"]).modes == ("on", "off")
    assert evaluate(xl(), corpus([9]), modes=()).modes == ("on",)


@torch.no_grad()
def test_a_part_of_the_memory_is_changed_alone():
    torch.manual_seed(0)
    model = MemorizingTransformer(num_tokens=32, dim=16, depth=2, heads=2, dim_head=4, seq_len=4,
                                  memorizing_layers=[2], xl_max_memories=3, max_knn_memories=20)
    model, text = model.double().eval(), corpus([21, 21], 32)
    modes = ("knn.foreign", "knn.off", "off", "xl.off")
    found = evaluate(model, text, modes)
    assert found.modes == ("on", "off", "xl.off", "knn.off", "knn.foreign")
    tokens = torch.from_numpy(np.stack(text.documents).astype(np.int64))
    memory, fresh, nats = model.init_memory(2), model.init_memory(2), {mode: 0 for mode in modes}
    for part, labels in zip(tokens[:, :-1].split(4, 1), tokens[:, 1:].split(4, 1)):
        read = {"off": fresh, "knn.off": replace(memory, knn=fresh.knn),
                "knn.foreign": replace(memory, knn=select(memory, [1, 0]).knn),
                "xl.off": replace(memory, xl=fresh.xl)}
        for mode in modes:
            logits = model.step(part, read[mode]).logits
            nats[mode] += torch.nn.functional.cross_entropy(logits.mT, labels, reduction="none")
        memory = carry(model.step(part, memory).memory)
    for mode in modes:
        np.testing.assert_allclose(found.nats[mode].sum(1), nats[mode].sum(1), rtol=1e-9)
    assert "| knn.off |" in found.table()
    bits = token_bits_by_mode(model, *text.documents, ["knn.foreign"]).bits["knn.foreign"]
    np.testing.assert_allclose(bits.sum() * math.log(2), nats["knn.foreign"][0].sum())


def test_the_caller_keeps_modes_random_numbers_and_gradients():
    model = xl(ff_dropout=0.5).train()
    model.layers[0].eval()
    modes, random = [m.training for m in model.modules()], torch.get_rng_state()
    found = evaluate(model, corpus())
    token_bits(model, corpus()[1]), cost(model, [3])
    assert [m.training for m in model.modules()] == modes and torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), random)
    assert all(p.grad is None for p in model.parameters())
    np.testing.assert_array_equal(found.nats["on"], evaluate(model, corpus()).nats["on"])


def test_budget():
    model = xl()
    found = evaluate(model, corpus(), mem_len=4)
    assert found.memory_bytes == 3 * 4 * 12 * 8 + 8
    assert found.settings["memory_options"] == {"mem_len": 4}
    assert found.parameters == sum(p.numel() for p in model.parameters())
    assert all(found.tokens_per_second(mode) > 0 for mode in found.modes)
    tied = TransformerXL(**SIZES, tie_embeddings=True)
    assert evaluate(tied, corpus()).parameters == sum(p.numel() for p in tied.parameters())


@pytest.mark.parametrize("model", [xl(), SpendingParrot(17)], ids=["xl", "spending"])
def test_token_bits(model):
    text = corpus()[1]
    own = own_memories(model, text, model.seq_len)
    for carry_memory, memories in ((True, own), (False, own[:1])):
        expected = np.array(nats_of(model, text, memories, model.seq_len)) / math.log(2)
        np.testing.assert_allclose(token_bits(model, text, carry_memory=carry_memory), expected)
    given, before, spare = own[2], clone(own[2]), clone(own[2])
    on = token_bits(model, torch.tensor(text), memory=given)
    np.testing.assert_array_equal(token_bits(model, text.tolist(), memory=spare), on)
    assert torch.equal(given.mem, before.mem) and torch.equal(given.fill, before.fill)
    assert (on[:5] != token_bits(model, text)[:5]).any()


def test_bfloat16_models_are_scored():
    model, text = xl().float(), corpus()
    rough = evaluate(model.bfloat16(), text).bits()
    assert rough == pytest.approx(evaluate(xl(), text).bits(), rel=0.1)


# Intervals


def test_resampled_sums_are_sums_of_whole_documents():
    values = np.array([[1, 10], [100, 1000], [0, 0]])
    drawn = resampled_sums(values, 500)
    assert drawn.shape == (500, 2) and (drawn[:, 1] == 10 * drawn[:, 0]).all()
    ones, hundreds = drawn[:, 0] % 100, drawn[:, 0] // 100
    assert ones.max() == 3 and hundreds.max() == 3 and (ones + hundreds <= 3).all()
    np.testing.assert_array_equal(drawn, resampled_sums(values, 500))
    assert (drawn != resampled_sums(values, 500, seed=1)).any()


def test_many_documents_are_resampled_in_parts():
    drawn = resampled_sums(np.ones((2**15, 1)), 300)
    assert drawn.shape == (300, 1) and (drawn == 2**15).all()


def made_up(on, off, tokens, seed=0):
    """An evaluation of given sums, (D,) each."""
    column = lambda x: np.asarray(x)[:, None]
    settings = {"seed": seed, "seq_len": 1, "max_tokens": None}
    return Evaluation({"model_class": "None"}, "made up", "", tuple(map(str, range(len(on)))),
                      np.array([0, 1000]), column(tokens), {"on": column(on), "off": column(off)},
                      {"on": 1.0, "off": 1.0}, 1, 1, settings)


def test_intervals_hold_the_truth_about_as_often_as_they_say():
    rng, hits = np.random.default_rng(0), []
    for seed in range(150):
        tokens = rng.integers(50, 150, 60)
        hard = rng.normal(3, 1, 60)  # documents differ much, the modes little
        on = (hard + rng.normal(0, 0.1, 60)) * tokens * math.log(2)
        off = (hard + rng.normal(0.1, 0.1, 60)) * tokens * math.log(2)
        e = made_up(on, off, tokens, seed)
        low, high = e.interval()
        value, less, more = e.difference("off", "on")
        hits.append([low < 3 < high, less < 0.1 < more, high - low > 5 * (more - less)])
    coverage = np.mean(hits, 0)
    assert 0.88 <= coverage[0] <= 0.99 and 0.88 <= coverage[1] <= 0.99 and coverage[2] > 0.95


def test_an_interval_is_as_wide_as_theory_says():
    bits = np.random.default_rng(0).normal(3, 1, 400)
    low, high = made_up(bits * 10 * math.log(2), bits, np.full(400, 10)).interval()
    assert high - low == pytest.approx(2 * 1.96 * bits.std() / 20, rel=0.08)
    assert (low + high) / 2 == pytest.approx(bits.mean(), abs=0.01)


def test_the_difference_has_a_sign():
    e = made_up([1.0, 2.0, 3.0], [2.0, 3.0, 4.5], [10, 10, 10])
    assert e.difference("off") == tuple(-np.array(e.difference("on", "off"))[[0, 2, 1]])
    assert e.difference("off").low > 0


def test_a_single_document_has_no_interval():
    found = evaluate(xl(), corpus([9]), modes=["off"])
    assert np.isnan(found.interval()).all() and "[–, –]" in found.table()
    assert found.difference("off").value == found.bits("off") - found.bits("on")


def test_wilson():
    low, high = wilson(np.array([0, 0.5, 1]), 10)
    np.testing.assert_allclose(low, [0, 0.2366, 0.7225], atol=1e-4)
    np.testing.assert_allclose(high, [0.2775, 0.7634, 1], atol=1e-4)


def test_estimates_are_written_with_any_number_format():
    assert f"{Estimate(.5, .25, .75):.0%}" == "50% [25%, 75%]"
    assert f"{Estimate(1, math.nan, 2)}" == "1.000 [–, 2.000]"


# The table and the file


def test_table():
    found = evaluate(xl(), corpus())
    lines = found.table().splitlines()
    assert len(lines) == 2 + 4 + 2 and len({line.count("|") for line in lines[:6]}) == 1
    for line, mode in zip(lines[2:], found.modes):
        assert line.startswith(f"| {mode} | {found.bits(mode):.3f} "
                               f"[{found.interval(mode)[0]:.3f}, {found.interval(mode)[1]:.3f}] |")
        assert f"{found.parameters:,}" in line
    assert f"{found.difference('off'):+.3f}" in lines[3] and lines[3].endswith("| 0 |")
    assert "7 documents, 67 predictions" in lines[-1] and "too narrow" in lines[-1]
    assert found._repr_markdown_() == found.table() and "on tiny: on " in repr(found)


@pytest.mark.parametrize("text, says", [((b"aaaaaaaaa", b"bbbbbbbbb"), False),
                                        ((b"aaaaaaaaa", b"aaaaaaaaa"), True)])
def test_the_table_says_when_the_memory_is_not_used(text, says):
    table = evaluate(Parrot(), words(*text)).table()
    assert ("does not use its memory" in table) == says


def test_the_table_says_when_the_memory_does_not_help():
    # After each segment the own memory is wrong; the other one is wrong more often.
    found = evaluate(Parrot(), words(b"aaaabccccda", b"xxxxyzzzzux"), modes=["off"])
    assert found.difference("off").value < 0 and "does not help" in found.table()


def test_a_file_holds_everything(tmp_path):
    found = evaluate(xl(), corpus())
    found.to_json(tmp_path / "e.json")
    again = Evaluation.from_json(tmp_path / "e.json")
    assert again.table() == found.table() and repr(again) == repr(found)
    for mode in found.modes: np.testing.assert_array_equal(again.nats[mode], found.nats[mode])
    assert again.names == found.names and again.tokens.dtype == found.tokens.dtype
    record = json.loads((tmp_path / "e.json").read_text())
    assert record["summary"]["off"]["bits"] == found.bits("off")
    assert again.model == found.model and again.fingerprint == corpus().fingerprint


def test_files_are_strict_json(tmp_path):
    evaluate(xl(), corpus([9]), modes=["off"], dtype=torch.float64).to_json(tmp_path / "e.json")
    def refuse(constant): raise AssertionError(constant)
    json.loads((tmp_path / "e.json").read_text(), parse_constant=refuse)


@pytest.mark.parametrize("spoil", [
    lambda path: path.write_text(path.read_text()[:-30]), lambda path: path.write_text("[]"),
    lambda path: path.write_bytes(b"\xff\x00"), lambda path: path.write_text('{"format": "x"}'),
    lambda path: path.write_text('{"format": "memformers.evaluation.1"}'),
    lambda path: recall(xl(num_tokens=128), copy_task(1), [9], 1).to_json(path)])
def test_other_files_are_refused(tmp_path, spoil):
    path = tmp_path / "e.json"
    evaluate(xl(), corpus()).to_json(path)
    spoil(path)
    with pytest.raises(ValueError, match="e.json is not a whole file of the format "
                                         "'memformers.evaluation.1'"):
        Evaluation.from_json(path)


# Recall


class Knows(Parrot):
    """Says the first token of the text, always; without a memory, that of the segment."""
    slots = 1

    def read(self, tokens, memory, mask):
        first = torch.where(memory.fill > 0, memory.mem[:, 0, 0].long(), tokens[:, 0])
        logits = torch.eye(self.num_tokens)[first][:, None].expand(*tokens.shape, -1)
        memory = Said(first[:, None, None].double(), torch.ones_like(memory.fill))
        return Step(logits, memory, self.no_aux_loss())


class Guesses(Parrot):
    """Says "a", always."""
    def read(self, tokens, memory, mask):
        out = super().read(tokens, memory, mask)
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
        def read(self, tokens, memory, mask):
            lengths.append((int(memory.fill[0]), tokens.shape[1]))
            return super().read(tokens, memory, mask)
    Counts.slots = 100
    cost(Counts(), [3, 9], repeats=2)
    assert lengths == [(0, 3)] + [(3, 4)] * 3 + [(3, 4), (7, 2)] + [(9, 4)] * 3


# Refusals


@pytest.mark.parametrize("call, error, message", [
    (lambda: evaluate(xl(), corpus([9])), ValueError, "at least 2 documents.*corpus.cut"),
    (lambda: evaluate(xl(), corpus(), modes=["of"]), ValueError, "modes must be some of .*'of'"),
    (lambda: evaluate(xl(), corpus(), modes=["mem.off"]), ValueError, "modes must be some of"),
    (lambda: evaluate(xl(), [b"abc"]), TypeError, "corpus must be a Corpus; got list"),
    (lambda: evaluate(xl(), words(b"abc", b"abd")), ValueError, "tokens must lie .* 16 .*got 99"),
    (lambda: evaluate(xl(), corpus(), batch_size=0), ValueError, "batch_size must be 1 or more"),
    (lambda: evaluate(xl(), corpus(), max_tokens=1), ValueError, "max_tokens must be 2 or more"),
    (lambda: evaluate(xl(), corpus(), seq_len=6), ValueError, "seq_len must be 1 to 5.*got 6"),
    (lambda: evaluate(xl(), corpus(), edges=[1, 2]), ValueError, "edges must be whole numbers"),
    (lambda: evaluate(xl(), corpus(), edges=[0, 2, 2]), ValueError, "edges must be whole numbers"),
    (lambda: evaluate(xl(), corpus(), edges=[0, 2.5]), ValueError, "edges must be whole numbers"),
    (lambda: evaluate(xl(), corpus(), edges=[]), ValueError, "edges must be whole numbers"),
    (lambda: evaluate(xl(), corpus(), menlen=4), TypeError, "menlen"),
    (lambda: evaluate(xl(), corpus(), ["off"]).bits("foreign"), ValueError, "mode must be one of"),
    (lambda: evaluate(xl(), corpus()).difference("on", "of"), ValueError, "mode must be one of"),
    (lambda: token_bits(xl(), [1]), ValueError, "tokens must be one sequence"),
    (lambda: token_bits(xl(), [[1, 2], [3, 4]]), ValueError, "got torch.int64 of shape"),
    (lambda: token_bits(xl(), [1.0, 2.0]), ValueError, "tokens must be one sequence"),
    (lambda: token_bits(xl(), [1, 17]), ValueError, "tokens must lie between 0 and"),
    (lambda: recall(xl(), copy_task(1), []), ValueError, "distances must be 1 or more"),
    (lambda: recall(xl(), copy_task(1), [4], 0), ValueError, "episodes must be 1 or more"),
    (lambda: recall(xl(), copy_task(1), [0]), ValueError, "distance: expected at least 1"),
    (lambda: recall(xl(), copy_task(1), [4], menlen=4), TypeError, "menlen"),
    (lambda: cost(xl(), [4], menlen=4), TypeError, "menlen"),
    (lambda: cost(xl(), [8, 4]), ValueError, "contexts must increase"),
    (lambda: cost(xl(), []), ValueError, "contexts must be 1 or more"),
])
def test_refusals(call, error, message):
    with pytest.raises(error, match=message): call()


# Token by token

@each
@pytest.mark.parametrize("other", [4, 1, None], ids=["longer", "shorter", "none"])
def test_bits_of_each_token_in_each_mode(mechanism, other):
    model, texts = mechanism.make(), corpus([17, 9, 2, 2, 40]).documents
    foreign = None if other is None else texts[other]
    found = token_bits_by_mode(model, texts[0], foreign)
    pair = [texts[0], texts[0] if foreign is None else foreign[:len(texts[0])]]
    wanted = by_hand(model, pair, {0: 1, 1: 0}, model.seq_len)
    for mode in ("on", "off", "foreign"):
        if mode == "foreign" and foreign is None: continue
        # Of equally near memories any may be found, and a gate may know their ages apart.
        np.testing.assert_allclose(found.bits[mode], np.array(wanted[mode][0]) / math.log(2),
                                   rtol=1e-5)
    assert ("foreign" in found.bits) == (foreign is not None)
    assert found.bits["shuffled"].shape == (16,)
    np.testing.assert_allclose(found.bits["on"], token_bits(model, texts[0]), rtol=1e-5)
    np.testing.assert_allclose(found.bits["off"], token_bits(model, texts[0], carry_memory=False),
                               rtol=1e-5)


def test_gains_are_those_of_the_parrot():
    """It says the last token of the segment before: what repeats it is what gains."""
    model = Parrot()
    document = ByteTokenizer().encode("abcdddddefghhzzz")
    found = token_bits_by_mode(model, document)
    saved = found.saved()
    said = document[3:-1].view(-1, 4)[:, 0]             # the last of each segment
    right = torch.zeros(15, dtype=torch.bool)
    for k in range(1, 4):
        labels = document[1:][4 * k:4 * k + 4]
        right[4 * k:4 * k + len(labels)] = labels == said[k - 1]
    assert (saved[right] > 5).all() and (saved[4:][~right[4:].numpy()] < 0).all()
    assert not saved[:4].any()
    gains = found.gains(k=int(right.sum()), context=2)
    assert {gain.position - 1 for gain in gains} == set(right.nonzero()[:, 0].tolist())
    first = min(gains, key=lambda gain: gain.position)
    assert (first.position, first.token, first.before) == (5, "d", "dd")
    assert str(first).endswith("…dd«d»")


def test_token_bits_leave_the_model_and_take_options(tmp_path):
    model, (text, other, *_) = xl().train(), corpus([30, 20]).documents
    found = token_bits_by_mode(model, text, other, modes=["foreign"], seq_len=3, mem_len=4)
    assert model.training and list(found.bits) == ["on", "foreign"]
    memory = model.init_memory(1, mem_len=4)
    np.testing.assert_allclose(found.bits["on"], token_bits(model, text, memory, seq_len=3))
    found.to_json(tmp_path / "bits.json")
    again = TokenBits.from_json(tmp_path / "bits.json")
    assert again.table() == found.table() and (again.saved("foreign") == found.saved("foreign")).all()
    assert "on" in repr(found) and "foreign" in found.table()


def test_token_bits_refuse():
    model, text = xl(), corpus([30]).documents[0]
    for call, words in [
            (lambda: token_bits_by_mode(model, text, modes=["foreign"]), "foreign.*another document"),
            (lambda: token_bits_by_mode(model, text, modes=["of"]), "modes.*of"),
            (lambda: token_bits_by_mode(model, text, foreign=[3]), "foreign must be one sequence"),
            (lambda: token_bits_by_mode(model, [99, 1]), "num_tokens"),
            (lambda: token_bits_by_mode(model, text).saved("foreign"), "without.*foreign")]:
        with pytest.raises(ValueError, match=words): call()


# What was looked up

class Looker(Parrot):
    """Two heads: the first looks at the oldest memory, the second a quarter at each of the newest
    two, and for the rest at itself."""
    def look(self, tokens, memory):
        (b, n), m = tokens.shape, self.slots
        weights = torch.zeros(b, 2, n, m + n, dtype=torch.float64)
        if memory.fill.any():
            weights[:, 0, :, m - int(memory.fill[0])] = 1
            weights[:, 1, :, m - 2:m] = .25
            weights[:, 1] += .5 * torch.eye(n, m + n).roll(m, 1)
        else: weights[..., m:] = torch.eye(n)
        return [in_line(1, weights, "xl"), in_line(2, weights[:, :1, :, m:], "xl")]


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
    with pytest.raises(NotImplementedError, match="Parrot.*look"): lookup(Parrot(), text, at=3)


@each
def test_every_mechanism_says_what_it_looked_up(mechanism):
    """The reads are the largest weights of the query, and none lies in the future."""
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
