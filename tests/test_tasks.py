"""Tasks with known answers: each answer is worked out again from the text alone, in another way."""
import pickle
import re
from itertools import permutations

import numpy as np
import pytest

from memformers.data import ByteTokenizer, Corpus, stdlib
from memformers.probe import recall
from memformers.tasks import (CorpusFill, RecallTask, TaskStream, associative_recall_task, copy_task,
                              facts_task, parity_task, passkey_task, permutation_task, program_task)
from memformers.train import TrainOptions, learn, train
from memformers.transformer_xl import TransformerXL

RNG = np.random.default_rng
# Words at random, with digits, names, letters that are not ASCII, and the passkey's own question.
WORDS = "é the sea key is lost, 1234 Mary went home — and = saw\nthe gate: 77\n\tnone came".split(" ")
CORPUS = Corpus("made up", ("a", "b", "c"), [
    " ".join(RNG(i).choice(WORDS, 3000)).encode() + b" the key is lost " for i in range(3)])
FILL = CorpusFill(CORPUS)
FACTS = [facts_task(n, distance=90, fill=fill) for n in (1, 2, 3)
         for fill in (FILL, facts_task().fill)]
RECALL = [associative_recall_task(), associative_recall_task(64, 200, 256, queries=20),
          associative_recall_task(1, 1, 4), associative_recall_task(5, 9, 15)]
MOVES = [permutation_task(things, moves, every) for things in (2, 3, 4, 5)
         for moves, every in ((1, None), (17, None), (17, 1), (17, 5), (16, 16))]
PARITY = [parity_task(), parity_task(23, 4), parity_task(9, 1)]
HIDDEN = [passkey_task(fill=FILL), passkey_task(12, digits=3, lead=0, fill=FILL),
          passkey_task(2000, fill=FILL), copy_task(9, 300, fill=FILL, lead=100, mark="\n#: "),
          copy_task(9, 3, "01", FILL, 0, "#: ")]
TASKS = RECALL + MOVES + PARITY + HIDDEN + FACTS
each = pytest.mark.parametrize("task", TASKS, ids=str)


def texts(task, number=60):
    "Episodes as (tokens, text, which tokens are answers)."
    for seed in range(number):
        tokens, answer = task.episode(RNG(seed))
        yield tokens, tokens.tobytes().decode("latin-1"), answer


@each
def test_episodes_are_drawn_from_the_seed_and_of_one_length(task):
    for seed, (tokens, _, answer) in enumerate(texts(task)):
        assert tokens.dtype == np.uint8 and answer.dtype == bool
        assert tokens.shape == answer.shape == (task.length,) and answer[-1]
        assert all(map(np.array_equal, (tokens, answer), task.episode(RNG(seed))))
    assert any(not np.array_equal(tokens, task.episode(RNG(0))[0]) for tokens, *_ in texts(task, 9))


@each
def test_another_distance_moves_the_answer_alone(task):
    far = task.at(task.distance + 37)
    assert (far.name, far.chance, far.length) == (task.name, task.chance, task.length + 37)
    assert far != task and far.at(task.distance) == task == pickle.loads(pickle.dumps(task))


@pytest.mark.parametrize("task", RECALL + MOVES + PARITY + HIDDEN[:1] + FACTS[::2], ids=str)
def test_guessing_gets_what_it_says(task):
    answers = np.concatenate([tokens[answer] for tokens, _, answer in texts(task, 2500)])
    deviation = (task.chance * (1 - task.chance) / len(answers)) ** .5
    assert abs(np.bincount(answers).max() / len(answers) - task.chance) < 4.5 * deviation


@each
def test_streams_read_what_is_drawn(task):
    stream = TaskStream(task, 2, 17, seed=5, episodes=1)
    labels = [[], []]
    for segment in stream:
        for row in range(2): labels[row] += segment.labels[row, segment.loss_mask[row]].tolist()
    for row in range(2):
        tokens, answer = task.episode(stream._draw(row, 0)[1])
        assert labels[row] == tokens[answer].tolist()


# ------------------------------------------------------------------------- the answers, again

@pytest.mark.parametrize("task", RECALL, ids=str)
def test_associations_are_those_of_the_list(task):
    numbers = dict(re.findall(r"(\w+)=(\d+)", task.name))
    pairs, vocab, queries = (int(numbers[k]) for k in ("pairs", "vocab", "queries"))
    for tokens, _, answer in texts(task):
        keys, values = tokens[:2 * pairs:2].tolist(), tokens[1:2 * pairs:2].tolist()
        gap, asked = np.split(tokens[2 * pairs:], [task.distance - 1])
        assert not gap.any() and len(asked) == 2 * queries
        assert all(0 < k < vocab // 2 for k in keys) and len(set(keys)) == pairs
        assert all(vocab // 2 <= v < vocab for v in values)
        assert len(set(asked[::2].tolist())) == queries
        assert [values[keys.index(k)] for k in asked[::2]] == asked[1::2].tolist()
        assert answer.nonzero()[0].tolist() == [*range(2 * pairs + task.distance, len(tokens), 2)]


def test_associations_are_asked_in_any_order_and_some_of_them():
    asked = [tuple(t[-4::2]) for t, *_ in texts(associative_recall_task(3, 5, 8, queries=2), 200)]
    assert len(set(asked)) == 6


def arranged(moves, things):
    "Where each thing is after moves, by permutation matrices."
    matrices = [np.eye(things, dtype=int)[list(p)] for p in permutations(range(things))]
    state = np.arange(things)
    for move in moves: state = matrices[move] @ state
    return [np.array_equal(m @ np.arange(things), state) for m in matrices].index(True)


@pytest.mark.parametrize("task", MOVES + PARITY, ids=str)
def test_states_are_those_that_the_moves_lead_to(task):
    parity = task.name.startswith("parity")
    things, every = 2 if parity else int(task.name[20]), re.search(r"every=(\d+)", task.name)
    for tokens, text, answer in texts(task, 20):
        first = ord("0" if parity else "A")
        # A "?" may be the name of no move; so states are what comes right after one.
        places = [i + 1 for i, c in enumerate(text) if c == "?"]
        assert places == answer.nonzero()[0].tolist() and places[-1] == task.distance
        rest = set(range(len(tokens))) - {p - 1 for p in places} - set(places)
        for place in places:
            moves = [int(tokens[i]) - first for i in sorted(rest) if i < place]
            right = sum(moves) % 2 if parity else arranged(moves, things)
            assert tokens[place] - first == right
        if every: assert set(np.diff(places)) <= {int(every[1]) + 2}
        else: assert len(places) == 1


@pytest.mark.parametrize("distance", range(2, 40))
def test_states_are_asked_at_any_distance(distance):
    tokens, answer = parity_task(9, every=3).at(distance).episode(RNG(0))
    assert len(tokens) == distance + 1 and answer[-1] and answer.sum() == max(1, (distance + 1) // 5)


@pytest.mark.parametrize("task", HIDDEN, ids=str)
def test_what_is_hidden_in_text_stands_there_once(task):
    question = " the key is " if task.name.startswith("passkey") else re.search(
        r"mark='(.*?)'", task.name)[1].replace("\\n", "\n")
    for tokens, text, answer in texts(task):
        size = int(answer.sum())
        fact, gap, key = text[:-size - task.distance], text[-size - task.distance:-size], text[-size:]
        assert gap.endswith(question) and fact.removesuffix(".").endswith(key)
        before, gap = fact.removesuffix(".").removesuffix(key), gap.removesuffix(question)
        assert before.removesuffix(question) != before or not before
        for filler in (gap, before.removesuffix(question)):
            assert key not in filler and question.strip() not in filler and filler.isascii()


def test_a_key_is_asked_for_as_often_as_wanted():
    task = passkey_task(50, lead=9, fill=FILL, times=3)
    assert task != passkey_task(50, lead=9, fill=FILL) and task.at(60).length == task.length + 30
    for tokens, text, answer in texts(task):
        said = list(re.finditer(r" the key is (\d{5})", text))
        assert len({match[1] for match in said}) == 1 and len(said) == 4
        starts = [match.start(1) for match in said]
        assert np.diff(starts).tolist() == [5 + 1 + 50, 55, 55] and text.endswith(said[-1][1])
        wanted = [i for start in starts[1:] for i in range(start, start + 5)]
        assert answer.nonzero()[0].tolist() == wanted


@pytest.mark.parametrize("task", FACTS, ids=str)
def test_stories_say_where_things_are(task):
    supporting, places_asked = int(task.name[17]), set()
    did = re.compile(r"(Mary|John|Anna|Paul) (went to|picked up|laid down) the (\w{5,7})\.")
    for tokens, text, answer in texts(task, 150):
        person, held, rooms = {}, {}, {}  # who is where, who has what, and what was where
        events = did.findall(text)
        assert len(events) == 8 and did.search(text, len(text) - task.distance - 1) is None
        for who, act, what in events:
            if act == "went to":
                assert person.get(who) != what
                person[who] = what
            elif act == "picked up":
                assert what not in held and rooms.get(what, [person[who]])[-1] == person[who]
                held[what] = who
            else: assert held.pop(what) == who
            for thing, owner in held.items():
                if rooms.setdefault(thing, [person[owner]])[-1] != person[owner]:
                    rooms[thing].append(person[owner])
        asked = re.search(r" Where (is|was) (?:the )?(\w+)( before)?\? .$", text)
        assert (asked[1] == "was") == bool(asked[3]) == (supporting == 3)
        right = person[asked[2]] if supporting == 1 else rooms[asked[2]][-1 if supporting == 2 else -2]
        assert text[-1] == right[0] and answer.sum() == 1
        places_asked.add(right)
    assert len(places_asked) == 6


def test_a_story_takes_as_many_facts_as_its_question():
    for supporting in (1, 2, 3):
        task = facts_task(supporting, 40, facts=supporting, spread=0)
        assert len({text for _, text, _ in texts(task, 40)}) > 20


# ------------------------------------------------------------------------------------- filler

def test_filler_is_ascii_from_the_beginning_of_a_line():
    whole = "".join(c for text in CORPUS for c in ByteTokenizer().decode(text) + "\n" if c.isascii())
    for seed in range(50):
        text = FILL(40, RNG(seed)).decode()
        assert len(text) == 40 and text in whole and "\n" + text in "\n" + whole
    assert "\t" in FILL(5000, RNG(0)).decode() and FILL(0, RNG(0)) == b""


def test_filler_may_take_all_of_a_text_and_no_more():
    fill = CorpusFill(Corpus("short", ("a",), [b"0123456789"]))
    assert fill(11, RNG(0)) == b"0123456789\n"
    with pytest.raises(ValueError, match="fill: short .* has 11 ASCII characters"): fill(12, RNG(0))


def test_tasks_with_other_text_have_other_names():
    other = CorpusFill(Corpus("made up", ("a",), [b"some other text\n" * 99]))
    assert passkey_task(fill=FILL) == passkey_task(fill=CorpusFill(CORPUS)) != passkey_task(fill=other)
    assert passkey_task() != passkey_task(fill=FILL) and passkey_task().name == \
        "passkey(digits=5, lead=48)" and copy_task(2).name == \
        "copy(length=2, alphabet='abcdefghijklmnop')"


def test_the_standard_library_hides_a_key():
    task = passkey_task(600, fill=CorpusFill(stdlib("valid")))
    text = next(texts(task, 1))[1]
    assert text.count(" the key is ") == 2 and len(set(text)) > 30


def test_a_fill_of_the_wrong_length_is_refused():
    with pytest.raises(ValueError, match="fill: expected 3 characters, got 2"):
        RecallTask("mine", lambda rng: ("a", "?", "b"), 4, .5, lambda n, rng: "x" * (n - 1)).episode(0)


# -------------------------------------------------------------------------------- users of tasks

def small(seq_len=32): return TransformerXL(256, dim=16, depth=1, heads=1, seq_len=seq_len, mem_len=32)


@pytest.mark.parametrize("task", [RECALL[0], MOVES[8], PARITY[1], HIDDEN[0], FACTS[5]], ids=str)
def test_tasks_are_asked_and_learned_from(task, tmp_path):
    found = recall(small(), task, [task.distance, task.distance + 5], episodes=8)
    assert found.chance == task.chance and (found.accuracy <= 1).all()
    learn(small(), TaskStream([task, task.at(task.distance + 9)], 4, 32), steps=3)
    run = train(small(), task, tmp_path / "run", TrainOptions(
        steps=3, batch_size=4, warmup=1, cpu=True, progress=False))
    assert run.step == 3


def test_parity_is_learned_where_it_is_asked_at_every_step():
    import torch
    torch.manual_seed(0)
    task, model = parity_task(8, every=1), TransformerXL(64, dim=32, depth=2, heads=2, seq_len=32)
    learn(model, TaskStream(task, 32, 32), steps=150)
    assert recall(model, task, [task.distance]).accuracy[0] > .9
