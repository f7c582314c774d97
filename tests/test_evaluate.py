"""Evaluation: equal to one document at a time by hand; intervals, files, refusals."""
import json
import math
import time

import numpy as np
import pytest
import torch
from known import LENGTHS, Parrot, Pending, SpendingParrot, corpus, own_memories, words, xl
from mechanisms import SIZES, each

from memformers import MemorizingTransformer, TransformerXL, carry, clone, nbytes, select
from memformers.data import ByteTokenizer, Corpus, load_corpus
from memformers.evaluate import (Estimate, Evaluation, TokenBits, _side_by_side, evaluate,
                                 resampled_sums, token_bits, token_bits_by_mode)
from memformers.memory import replace, shuffle
from memformers.probe import lookup, recall
from memformers.tasks import copy_task

PARTNER = {0: 2, 2: 0, 3: 5, 5: 3, 4: 6, 6: 1, 1: 4}  # by length: two, two, and the last three


def nats_of(model, text, memories, size):
    """Nats of a document whose k-th segment is read with `memories[k]`, or the last there is."""
    text, nats = torch.from_numpy(np.array(text, dtype=np.int64)), []
    for k, start in enumerate(range(0, len(text) - 1, size)):
        part = text[start:start + size + 1]
        logits = model.step(part[None, :-1], memories[min(k, len(memories) - 1)]).logits[0]
        nats += (-logits.log_softmax(-1)[range(len(part) - 1), part[1:]]).tolist()
    return nats


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
    token_bits(model, corpus()[1])
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


def knn():
    return MemorizingTransformer(num_tokens=32, dim=16, depth=2, heads=2, dim_head=4, seq_len=4,
                                 memorizing_layers=[2], max_knn_memories=5000)


def test_the_budget_is_that_of_a_full_memory():
    """A store that grows is counted as it will be, not as it is after a short text."""
    model = knn()
    found = evaluate(model, corpus([9, 9], 32))
    memory = model.init_memory(1)
    assert nbytes(memory) < found.memory_bytes == nbytes(memory, full=True)


def test_the_time_of_carry_is_counted(monkeypatch):
    commit = Pending.on_carry
    def slow(memory, grad):
        time.sleep(0.02)
        return commit(memory, grad)
    monkeypatch.setattr(Pending, "on_carry", slow)
    seconds = evaluate(SpendingParrot(), corpus([13, 13], 4)).seconds  # three segments
    assert seconds["on"] >= 0.06 and seconds["on"] - seconds["off"] > 0.04


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_model_with_spoiled_weights_has_no_scores(value):
    model, text = xl(), corpus()
    model.norm.weight.data[0] = value
    for call in (lambda: evaluate(model, text), lambda: token_bits(model, text[1]),
                 lambda: token_bits_by_mode(model, text[1]),
                 lambda: recall(model, copy_task(1), [4]), lambda: lookup(model, text[1], 3)):
        with pytest.raises(ValueError, match="model has weights that are not finite: .*norm"): call()


def test_a_loss_that_is_not_a_number_is_refused():
    class Spoiled(Parrot):
        def step(self, tokens, memory=None, mask=None):
            out = super().step(tokens, memory, mask)
            return out._replace(logits=out.logits.masked_fill((tokens == 3)[..., None], math.nan))
    with pytest.raises(ValueError, match="not a number in the document '1', mode 'on'"):
        evaluate(Spoiled(), words(b"abcd", b"ab\x03d"))


def test_a_mode_without_another_document_is_left_out_with_a_note():
    found = evaluate(xl(), corpus([9]))
    assert found.modes == ("on", "off", "shuffled")
    assert "Left out: foreign, as there is no other document; corpus.cut" in found.table()
    assert "Left out" not in evaluate(xl(), corpus()).table()
    for mode, model in {"foreign": xl(), "knn.foreign": knn()}.items():
        with pytest.raises(ValueError, match=f"2 documents.*corpus.cut.*got .*'{mode}'"):
            evaluate(model, corpus([9]), modes=[mode])


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


def test_ids_are_scored_by_the_token(tmp_path):
    "Nothing says how many bytes of text they stand for."
    ids = [np.arange(40) * 7 % 300, np.arange(30) * 11 % 300]
    net = xl(num_tokens=300)
    found = evaluate(net, ids)
    assert found.unit == "token" and "| bits per token [95 %] |" in found.table()
    assert "bits per token" in repr(found)
    mine = np.concatenate([token_bits(net, text) for text in ids])
    assert found.bits() == pytest.approx(mine.mean(), rel=1e-5)
    found.to_json(tmp_path / "e.json")
    assert Evaluation.from_json(tmp_path / "e.json").table() == found.table()
    text = evaluate(net, words(b"some text", b"other text"))
    assert text.unit == "byte" and (text.num_bytes == text.tokens).all()


def test_what_a_path_names_is_read(tmp_path):
    for name in "ab": (tmp_path / name).write_text("some text, some more of it. " * 30)
    net, path = xl(num_tokens=128), str(tmp_path)
    assert evaluate(net, path).table().split("\n")[-1] == evaluate(
        net, load_corpus(path, "valid")).table().split("\n")[-1]


def test_files_are_strict_json(tmp_path):
    evaluate(xl(), corpus([9]), modes=["off"], dtype=torch.float64).to_json(tmp_path / "e.json")
    def refuse(constant): raise AssertionError(constant)
    json.loads((tmp_path / "e.json").read_text(), parse_constant=refuse)


def change(path, **fields):
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize("spoil", [
    lambda path: path.write_text(path.read_text()[:-30]), lambda path: path.write_text("[]"),
    lambda path: path.write_bytes(b"\xff\x00"), lambda path: path.write_text('{"format": "x"}'),
    lambda path: path.write_text('{"format": "memformers.evaluation.1"}'),
    lambda path: change(path, nats={"on": [[1.0]]}), lambda path: change(path, nats={"on": "x"}),
    lambda path: change(path, tokens=None), lambda path: change(path, names=3),
    lambda path: change(path, parameters="many"), lambda path: change(path, settings=[]),
    lambda path: recall(xl(num_tokens=128), copy_task(1), [9], 1).to_json(path)])
def test_other_files_are_refused(tmp_path, spoil):
    path = tmp_path / "e.json"
    evaluate(xl(), corpus()).to_json(path)
    spoil(path)
    with pytest.raises(ValueError, match="e.json is not a complete file of the format "
                                         "'memformers.evaluation.1'"):
        Evaluation.from_json(path)


# Refusals


@pytest.mark.parametrize("call, error, message", [
    (lambda: evaluate(xl(), corpus(), modes=["of"]), ValueError, "modes must be some of .*'of'"),
    (lambda: evaluate(xl(), corpus(), modes=["mem.off"]), ValueError, "modes must be some of"),
    (lambda: evaluate(xl(), [b"abc"]), TypeError, "corpus must be a Corpus, .*got a list"),
    (lambda: evaluate(xl(), words(b"abc", b"abd")), ValueError, "tokens must lie .* 16 .*got 97 to 99"),
    (lambda: evaluate(xl(), corpus(), batch_size=0), ValueError, "batch_size: expected at least 1"),
    (lambda: evaluate(xl(), corpus(), max_tokens=1), ValueError, "max_tokens: expected at least 2"),
    (lambda: evaluate(xl(), corpus(), seq_len=6), ValueError, "seq_len must be 1 to 5.*got 6"),
    (lambda: evaluate(xl(), corpus(), edges=[1, 2]), ValueError, "edges must be whole numbers"),
    (lambda: evaluate(xl(), corpus(), edges=[0, 2, 2]), ValueError, "edges must be whole numbers"),
    (lambda: evaluate(xl(), corpus(), edges=[0, 2.5]), ValueError, "edges must be whole numbers"),
    (lambda: evaluate(xl(), corpus(), edges=[]), ValueError, "edges must be whole numbers"),
    (lambda: evaluate(xl(), corpus(), menlen=4), TypeError, "menlen"),
    (lambda: evaluate(xl(), corpus(), ["off"]).bits("foreign"), ValueError, "mode must be one of"),
    (lambda: evaluate(xl(), corpus()).difference("on", "of"), ValueError, "mode must be one of"),
    (lambda: token_bits(xl(), [1]), ValueError, "tokens must be one sequence"),
    (lambda: token_bits(xl(), [[1, 2], [3, 4]]), ValueError, "got int64 of shape"),
    (lambda: token_bits(xl(), [1.0, 2.0]), ValueError, "tokens must be one sequence"),
    (lambda: token_bits(xl(), [1, 17]), ValueError, "tokens must lie between 0 and"),
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


@pytest.mark.parametrize("pairs", [[[0]], [[0, 1]], [[1, 0, 2]], [[2, 0], [1, 3, 4]]])
def test_a_foreign_memory_is_never_ones_own(pairs):
    """Of two documents each other's, of three in a ring; a single one has no partner."""
    texts = [np.arange(n) for n in (4, 5, 6, 7, 8)]
    pairs = [sorted(pair) for pair in pairs]
    for numbers, partner, *_ in _side_by_side(pairs, texts, 2):
        assert sorted(partner) == list(range(len(numbers)))
        together = {number: pair for pair in pairs for number in pair}
        for row, other in enumerate(partner):
            assert numbers[other] in together[numbers[row]]
            assert other != row or len(together[numbers[row]]) == 1
