"""Training: equal to the loop by hand, to the joined batch, and to itself after any interruption.

Run as a script, this file is the child of some of its own tests: `test_train.py NAME FOLDER`.
"""
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import threading
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch.utils._pytree import tree_flatten

import memformers.train
from memformers import MemorizingTransformer, TransformerXL, carry, load_memory, reset, select
from memformers.data import Corpus, DocumentStream
from memformers.memory import replace
from memformers.tasks import TaskStream, copy_task
from memformers.train import (NonFiniteLoss, Trainer, TrainOptions, _Unroll, latest_checkpoint,
                              learn, learning_rate, parameter_groups, read_metrics, segments_at,
                              train)
from memformers.zoo import create

FAST = dict(cpu=True, progress=False, batch_size=4, save_every=5, log_every=3, warmup=3)


def letters(seed=0, documents=40):
    """Random documents of 2 to 60 letters: many begin and end within a few segments."""
    random = np.random.default_rng(seed)
    texts = [random.integers(97, 107, random.integers(2, 60)).astype(np.uint8)
             for _ in range(documents)]
    return Corpus("letters", tuple(map(str, range(documents))), texts)


def small(dropout=0.0, cls=TransformerXL, **options):
    torch.manual_seed(0)
    return cls(**dict(num_tokens=128, dim=8, depth=2, heads=2, seq_len=6, mem_len=7,
                      ff_dropout=dropout, emb_dropout=dropout) | options)


def trainer(folder, model=None, corpus=None, resume=True, **options):
    options = TrainOptions(**(FAST | options))
    model = model or small()
    return Trainer(model, lambda rows: DocumentStream(corpus or letters(), options.batch_size,
                                                      model.seq_len, rows=rows),
                   folder, options, resume)


def before_update(trainer, number, act):
    """Call `act` when the update after `number` updates begins."""
    update = trainer.learner.update
    def wrapped(segments, step, asked=()):
        if step == number: act()
        return update(segments, step, asked)
    trainer.learner.update = wrapped
    return trainer


def interrupt():
    raise InterruptedError


def leaves(memory): return tree_flatten(memory)[0]


def same_memory(a, b):
    return all(torch.equal(x, y) for x, y in zip(leaves(a), leaves(b), strict=True))


def metrics(folder):
    """The lines of a run but for the speed."""
    return [{k: v for k, v in line.items() if k != "tokens_per_second"}
            for line in read_metrics(folder)]


def same_runs(a, b):
    """Everything that a run is, bit for bit."""
    for x, y in zip(a.model.parameters(), b.model.parameters(), strict=True):
        assert torch.equal(x, y)
        states = [t.learner.optimizer.state[p] for t, p in ((a, x), (b, y))]
        assert states[0].keys() == states[1].keys() >= {"step", "exp_avg", "exp_avg_sq"}
        assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])
    assert all(map(same_memory, a.learner.memories, b.learner.memories))
    assert torch.equal(a.learner.random["cpu"], b.learner.random["cpu"])
    assert a.stream.state_dict() == b.stream.state_dict()
    assert (a.step, a.tokens) == (b.step, b.tokens) and metrics(a.folder) == metrics(b.folder)
    return True


# The learning rate and the groups of weights

def test_learning_rate_is_warm_up_and_half_a_cosine():
    options = TrainOptions(steps=30, warmup=10, lr=2.0, min_lr=0.25)
    rates = [learning_rate(step, options) for step in range(31)]
    assert rates[:3] == [0.2, 0.4, pytest.approx(0.6)] and rates[9] == rates[10] == 2
    assert rates[20] == pytest.approx(2 * (0.25 + 0.75 / 2)) and rates[30] == pytest.approx(0.5)
    assert all(a > b for a, b in zip(rates[10:], rates[11:]))
    assert learning_rate(99, options) == pytest.approx(0.5)
    assert learning_rate(0, TrainOptions(steps=1, warmup=0)) == 1e-3


def test_only_matrices_that_are_no_embeddings_decay():
    model = small(tie_embeddings=True, positions="t5")
    model.norm.weight.requires_grad_(False)
    decay, rest = parameter_groups(model, 0.3)
    name = {id(p): n for n, p in model.named_parameters()}
    decaying, resting = ({name[id(p)] for p in group["params"]} for group in (decay, rest))
    assert (decay["weight_decay"], rest["weight_decay"]) == (0.3, 0)
    assert decaying | resting | {"norm.weight"} == set(name.values())
    assert "embedding.weight" in resting and "norm.bias" in resting
    assert all("norm" not in n and "bias" not in n for n in decaying)
    assert "layers.0.feed_forward.net.0.weight" in decaying or len(decaying) >= 8


# One update against the loop by hand

def by_hand(model, segments, grad):
    """Mean loss of one update, straight from the contract; the memory it ends with."""
    memory, nll, labels = None, 0, 0
    for segment in segments:
        memory = model.init_memory(len(segment.start)) if memory is None else memory
        out = model.step(segment.tokens, reset(memory, segment.start), segment.mask)
        losses = F.cross_entropy(out.logits.flatten(0, 1), segment.labels.flatten(),
                                 reduction="none").view_as(segment.labels)
        nll, labels = nll + losses[segment.loss_mask].sum(), labels + segment.loss_mask.sum()
        memory = carry(out.memory, grad=grad)
    return nll / labels, memory


def gradients(model): return [p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("stream", [DocumentStream(letters(), 4, 6),
                                    TaskStream(copy_task(length=3, delay=7), 4, 6)])
def test_gradients_flow_through_the_memory_of_all_segments(tmp_path, stream):
    """And equal those of the loop by hand; without the memory's graph they are others."""
    run = trainer(tmp_path, small().double(), segments=3, clip=None)
    segments = list(islice(stream, 3))
    run.learner.update(segments, 0)
    found = gradients(run.model)
    model = small().double()
    loss, memory = by_hand(model, segments, grad=True)
    loss.backward()
    torch.testing.assert_close(found, gradients(model), rtol=1e-12, atol=1e-15)
    assert all(torch.allclose(x, y, atol=1e-14)
               for x, y in zip(leaves(memory), leaves(run.learner.memories[0])))
    model.zero_grad()
    by_hand(model, segments, grad=False)[0].backward()
    assert not torch.allclose(found[0], gradients(model)[0], rtol=1e-3)


def test_gradients_end_where_the_update_begins(tmp_path):
    """The memory of the update before is read, but nothing flows back into it."""
    run = trainer(tmp_path, small().double(), segments=1, clip=None, lr=1e-30, weight_decay=0.0)
    segments = list(islice(DocumentStream(letters(), 4, 6), 2))
    for step, segment in enumerate(segments): run.learner.update([segment], step)
    assert all(not x.requires_grad for x in leaves(run.learner.memories[0]))
    model = small().double()
    memory = by_hand(model, segments[:1], grad=False)[1]
    out = model.step(segments[1].tokens, reset(memory, segments[1].start), segments[1].mask)
    counts = segments[1].loss_mask
    F.cross_entropy(out.logits[counts], segments[1].labels[counts]).backward()
    torch.testing.assert_close(gradients(run.model), gradients(model), rtol=1e-12, atol=1e-15)


def test_rows_are_reset_where_a_document_begins():
    """At any time the memory of a row is that of its document alone."""
    model, corpus = small().double().eval(), letters()
    stream, unroll, memory = DocumentStream(corpus, 3, 6), _Unroll(model), model.init_memory(3)
    begun = 0
    for segment in islice(stream, 40):
        memory = unroll([segment], memory)[2]
        begun += int(segment.start.sum())
        for row, (item, offset) in enumerate(stream.reading):
            alone, text = None, torch.from_numpy(corpus[item][:-1].astype(np.int64))[None]
            for piece in text[:, :offset + 6].split(6, dim=1):
                alone = carry(model.step(piece, alone).memory)
            for x, y in zip(leaves(select(memory, [row])), leaves(alone)):
                torch.testing.assert_close(x, y)
    assert begun > 10


def test_padding_is_not_counted(tmp_path):
    """The first line of the metrics is the mean over the real labels, each row read alone."""
    run = trainer(tmp_path, small().double(), steps=1, segments=4).run()
    model, nll, labels = small().double(), 0, 0
    for segment in islice(DocumentStream(letters(), 4, 6), 4): labels += int(segment.mask.sum())
    stream, memories = DocumentStream(letters(), 4, 6), [None] * 4
    for segment in islice(stream, 4):
        for row in range(4):
            n = int(segment.mask[row].sum())
            memory = None if segment.start[row] else memories[row]
            out = model.step(segment.tokens[row:row + 1, :n], memory)
            memories[row] = carry(out.memory)
            nll += F.cross_entropy(out.logits[0], segment.labels[row, :n], reduction="sum").item()
    line, = read_metrics(run.folder)
    assert labels < 4 * 4 * 6 and line["tokens"] == labels
    assert line["bits"] == pytest.approx(nll / labels / math.log(2), rel=1e-12)


def test_labels_may_be_rare(tmp_path):
    """Where only answers count, many a segment has nothing to learn from."""
    run = train(small(), copy_task(length=2, delay=20), tmp_path,
                TrainOptions(**(FAST | dict(steps=8, log_every=1))))
    bits = [line["bits"] for line in read_metrics(tmp_path)]
    assert None in bits and any(bits) and all(p.isfinite().all() for p in run.model.parameters())


def test_accumulation_equals_the_joined_batch(tmp_path):
    """Several updates, with padding spread unevenly over the parts."""
    runs = [trainer(tmp_path / str(parts), small().double(), steps=8, segments=2, accumulate=parts,
                    batch_size=8, aux_weight=2.0).run() for parts in (1, 4)]
    for x, y in zip(*(run.model.parameters() for run in runs)):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-11)
    joined, = runs[0].learner.memories
    for i, part in enumerate(runs[1].learner.memories):
        for x, y in zip(leaves(select(joined, [2 * i, 2 * i + 1])), leaves(part)):
            torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-9)


def test_the_auxiliary_loss_is_a_mean_with_a_weight(tmp_path):
    class Auxiliary(TransformerXL):
        def no_aux_loss(self): return self.norm.bias.sum() * 3
    run = trainer(tmp_path, small(cls=Auxiliary).double(), segments=2, accumulate=2, clip=None,
                  aux_weight=0.5)
    run.learner.update(list(islice(run.stream, 2)), 0)
    plain = trainer(tmp_path / "plain", small().double(), segments=2, accumulate=2, clip=None)
    plain.learner.update(list(islice(plain.stream, 2)), 0)
    torch.testing.assert_close(run.model.norm.bias.grad, plain.model.norm.bias.grad + 0.5 * 3)


def test_the_gradient_is_no_longer_than_clip(tmp_path):
    run = trainer(tmp_path, small().double(), clip=0.05)
    seen = run.learner.update(list(islice(run.stream, 1)), 0)
    length = torch.cat([g.flatten() for g in gradients(run.model)]).norm()
    assert length == pytest.approx(0.05, rel=1e-4) and seen["grad_norm"] > 0.1


def test_the_optimizer_takes_its_betas_from_the_options(tmp_path):
    run = trainer(tmp_path, small().double(), betas=(0.7, 0.8), clip=None)
    run.learner.update(list(islice(run.stream, 1)), 0)
    p, = (p for n, p in run.model.named_parameters() if n == "norm.weight")
    state = run.learner.optimizer.state[p]
    torch.testing.assert_close(state["exp_avg"], (1 - 0.7) * p.grad)
    torch.testing.assert_close(state["exp_avg_sq"], (1 - 0.8) * p.grad ** 2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_loss_is_summed_in_single_precision(dtype):
    """8,192 labels at about 10 nats are more than half precision can count."""
    class Some: labels, loss_mask = torch.zeros(8, 1024).long(), torch.ones(8, 1024).bool()
    logits = torch.zeros(8, 1024, 16, dtype=dtype)
    logits[..., 0] = -10
    exact = F.cross_entropy(logits.double().flatten(0, 1), Some.labels.flatten(), reduction="sum")
    assert float(memformers.train._sum_nll(logits, Some)) == pytest.approx(float(exact), rel=1e-4)


# How many segments, and weights that do not learn

class Writer(TransformerXL):
    """A weight that only a later segment can train: it changes what is remembered."""
    train_segments = 2
    def step(self, tokens, memory=None, mask=None):
        out = super().step(tokens, memory, mask)
        return out._replace(memory=replace(out.memory, mem=out.memory.mem * self.written))


def writer():
    model = small(cls=Writer)
    model.written = torch.nn.Parameter(torch.ones(8))
    return model


def test_a_model_says_how_many_segments_its_writer_needs(tmp_path):
    run = trainer(tmp_path / "a", writer(), steps=2)
    assert run.options.segments == 2 and trainer(tmp_path / "b", small()).options.segments == 1
    run.run()
    assert run.model.written.grad.any()
    assert trainer(tmp_path / "c", writer(), segments=1).options.segments == 1
    model = writer()
    learn(model, DocumentStream(letters(), 4, 6), steps=2)
    assert model.written.grad.any()


def test_the_writer_of_a_memory_transformer_xl_learns_by_default(recwarn):
    for name in ("memory_transformer_xl_tiny", "memory_transformer_xl_small"):
        model = create(name, dim=8, heads=1, seq_len=6, mem_len=6, lmem_len=3)
        learn(model, DocumentStream(letters(), 2, 6), steps=2)
        assert all(p.grad is not None for p in model.parameters())
    assert not [w for w in recwarn if "no gradient" in str(w.message)]


def test_weights_that_get_no_gradient_are_named_once(tmp_path, recwarn):
    trainer(tmp_path / "one", writer(), steps=30, segments=1).run()
    said = [str(w.message) for w in recwarn if "no gradient" in str(w.message)]
    assert len(said) == 1 and "1 weights have had no gradient in 20 updates" in said[0]
    assert "written" in said[0] and "segments=2" in said[0]
    recwarn.clear()
    trainer(tmp_path / "two", writer(), steps=30).run()
    assert not [w for w in recwarn if "no gradient" in str(w.message)]
    with pytest.warns(UserWarning, match="no gradient in 3 updates.*written"):
        learn(writer(), DocumentStream(letters(), 4, 6), steps=3, segments=1)


# Segments that grow

def test_segments_grow_in_stages_of_equal_length():
    plan = TrainOptions(segments=3, curriculum=9)
    assert [segments_at(step, plan) for step in range(11)] == [1] * 3 + [2] * 3 + [3] * 5
    assert segments_at(0, TrainOptions(segments=3)) == 3
    assert [segments_at(i, TrainOptions(segments=5, curriculum=2)) for i in range(3)] == [1, 3, 5]
    assert {segments_at(i, TrainOptions(segments=1, curriculum=7)) for i in range(9)} == {1}


def test_each_update_reads_as_many_segments_as_the_plan_says(tmp_path):
    run, seen = trainer(tmp_path, steps=8, segments=3, curriculum=6), []
    update = run.learner.update
    run.learner.update = lambda segments, step, asked: (
        seen.append(len(segments)), update(segments, step, asked))[1]
    run.run()
    assert seen == [1, 1, 2, 2, 3, 3, 3, 3]
    drawn = []
    class Counted(DocumentStream):
        def __next__(self):
            drawn.append(1)
            return super().__next__()
    learn(small(), Counted(letters(), 4, 6), steps=8, segments=3, curriculum=6)
    assert len(drawn) == sum(seen)


@pytest.mark.parametrize("at", [2, 5, 8])
def test_a_run_with_a_curriculum_resumes_exactly(tmp_path, at):
    """Stopped within a stage, at the end of one, and when all are over."""
    plan = dict(steps=10, segments=3, curriculum=7, model=small(dropout=0.2))
    whole = trainer(tmp_path / "whole", **plan).run()
    plan["model"] = small(dropout=0.2)
    stopped = before_update(trainer(tmp_path / "a", **plan), at, lambda: signal.raise_signal(signal.SIGINT))
    assert stopped.run().interrupted and stopped.step == at + 1
    assert same_runs(trainer(tmp_path / "a", **plan | dict(model=small(dropout=0.2))).run(), whole)


def test_a_writer_is_not_named_while_its_segments_still_grow(tmp_path, recwarn):
    trainer(tmp_path, writer(), steps=60, segments=2, curriculum=50).run()
    learn(writer(), DocumentStream(letters(), 4, 6), steps=60, segments=2, curriculum=50)
    assert not [w for w in recwarn if "no gradient" in str(w.message)]


# The loop of a lesson

def test_learn_is_the_loop_by_hand():
    """Schedule, clipped gradients over two segments, and decay of matrices alone."""
    stream = lambda: DocumentStream(letters(), 4, 6)
    model, mine = small().double(), small().double()
    losses = learn(model, stream(), steps=5, lr=1e-2, segments=2, warmup=2, clip=0.5)
    options = TrainOptions(steps=5, lr=1e-2, warmup=2)
    optimizer, memory = torch.optim.AdamW(parameter_groups(mine, 0.01), betas=(0.9, 0.98)), None
    segments = stream()
    for step in range(5):
        nll, labels = 0, 0
        for number in range(2):
            segment = next(segments)
            memory = mine.init_memory(4) if memory is None else memory
            out = mine.step(segment.tokens, reset(memory, segment.start), segment.mask)
            memory = carry(out.memory, grad=number == 0)
            count = segment.loss_mask
            nll = nll + F.cross_entropy(out.logits[count], segment.labels[count], reduction="sum")
            labels += int(count.sum())
        for group in optimizer.param_groups: group["lr"] = learning_rate(step, options)
        optimizer.zero_grad()
        (nll / labels).backward()
        torch.nn.utils.clip_grad_norm_(mine.parameters(), 0.5)
        optimizer.step()
        assert losses[step] == pytest.approx(nll.item() / labels)
    for x, y in zip(model.parameters(), mine.parameters()): torch.testing.assert_close(x, y)


def test_learn_leaves_the_weights_alone_where_no_label_counts():
    model = small().eval()
    before = model.embedding.weight.clone()
    losses = learn(model, TaskStream(copy_task(length=1, delay=12), 4, 6), steps=2)
    assert math.isnan(losses[0]) and math.isnan(losses[1]) and not model.training
    assert torch.equal(model.embedding.weight, before)


def test_learn_refuses():
    stream = DocumentStream(letters(documents=4), 4, 6, epochs=1)
    with pytest.raises(ValueError, match="the stream ended in update [0-9]+ of 1000"):
        learn(small(), stream, steps=1000)
    with pytest.raises(ValueError, match="segments must be a whole number from 1, or None; got 0"):
        learn(small(), stream, steps=1, segments=0)
    model = small()
    model.norm.weight.data[0] = torch.inf
    with pytest.raises(NonFiniteLoss, match="in update 1 the loss is .*smaller lr"):
        learn(model, DocumentStream(letters(), 4, 6), steps=2)
    assert model.training


# Stopping and going on

def test_resumed_equals_uninterrupted(tmp_path):
    """Bit for bit, dropout included, when the run dies between two checkpoints."""
    options = dict(steps=18, segments=2, accumulate=2)
    whole = trainer(tmp_path / "whole", small(0.2), **options).run()
    cut = trainer(tmp_path / "cut", small(0.2), **options)
    with pytest.raises(InterruptedError): before_update(cut, 13, interrupt).run()
    assert read_metrics(cut.folder)[-1]["step"] == 12 and not (cut.folder / "model").exists()
    torch.manual_seed(99), torch.rand(7)  # what else the program does is not the run's business
    again = trainer(tmp_path / "cut", small(0.2), **options)
    assert again.step == 10 and read_metrics(cut.folder)[-1]["step"] == 9
    assert same_runs(again.run(), whole)
    files = [sorted(p.relative_to(r.folder) for p in r.folder.rglob("*")) for r in (whole, again)]
    assert files[0] == files[1]


def test_a_run_leaves_the_random_numbers_of_the_program_alone(tmp_path):
    model = small(0.2)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    run = trainer(tmp_path, model, steps=3).run()
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("training", [True, False])
def test_a_run_leaves_the_mode_of_the_model_alone(tmp_path, training):
    model = small().train(training)
    assert trainer(tmp_path, model, steps=2).run().model.training == training
    model.norm.weight.data[0] = torch.inf
    with pytest.raises(NonFiniteLoss): trainer(tmp_path / "other", model, steps=2).run()
    assert model.training == training


def test_steps_may_be_raised(tmp_path):
    trainer(tmp_path, steps=4).run()
    longer = trainer(tmp_path, steps=9)
    assert longer.step == 4 and longer.run().step == 9
    assert trainer(tmp_path, steps=9).run().step == 9  # nothing is left to do


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_finishes_the_update_and_saves(tmp_path, capsys, number):
    whole = trainer(tmp_path / "whole", small(0.2), steps=12).run()
    before = signal.getsignal(number)
    run = trainer(tmp_path / "cut", small(0.2), steps=12)
    before_update(run, 6, lambda: os.kill(os.getpid(), number)).run()
    assert run.interrupted and run.step == 7 and signal.getsignal(number) is before
    assert latest_checkpoint(run.folder).name == "step_00000007"
    assert "Stopped after update 7" in capsys.readouterr().err
    again = trainer(tmp_path / "cut", small(0.2), steps=12).run()
    assert not again.interrupted and same_runs(again, whole)


def test_the_second_signal_interrupts_at_once(tmp_path):
    run, before = trainer(tmp_path, steps=12), signal.getsignal(signal.SIGINT)
    def twice():
        for _ in range(2): os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(KeyboardInterrupt): before_update(run, 6, twice).run()
    assert latest_checkpoint(tmp_path).name == "step_00000005"
    assert signal.getsignal(signal.SIGINT) is before


def test_an_interrupted_trainer_may_run_on(tmp_path):
    whole = trainer(tmp_path / "whole", small(0.2), steps=12).run()
    run = trainer(tmp_path / "cut", small(0.2), steps=12)
    before_update(run, 6, lambda: os.kill(os.getpid(), signal.SIGINT)).run()
    assert run.interrupted and same_runs(run.run(), whole)


def test_training_works_outside_of_the_main_thread(tmp_path):
    thread = threading.Thread(target=lambda: trainer(tmp_path, steps=2).run())
    thread.start(), thread.join()
    assert latest_checkpoint(tmp_path).name == "step_00000002"


def child(name, folder, timeout=120):
    """Run a function of this file in a fresh process."""
    done = subprocess.run([sys.executable, __file__, name, str(folder)], capture_output=True,
                          text=True, timeout=timeout, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def forked(function):
    """Run a function in a forked process; its exit status, negative for a signal."""
    process = os.fork()
    if process == 0:
        status = 1
        try: function(), (status := 0)
        finally: os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def kills(folder):
    """Kill a run before its first write to the disk, then before its second, and so on."""
    import accelerate, tqdm  # noqa: F401, E401
    torch.optim.AdamW([torch.zeros(1)])  # what takes long to import is imported once, here
    def run(last=None):
        left = [last]
        def count(act):
            def counted(*args, **kwargs):
                if left[0] == 0: os.kill(os.getpid(), signal.SIGKILL)
                if left[0]: left[0] -= 1
                return act(*args, **kwargs)
            return counted
        os.replace, os.fsync = count(os.replace), count(os.fsync)
        memformers.train.shutil.rmtree = count(memformers.train.shutil.rmtree)
        trainer(folder / "killed", small(0.2), steps=30, save_every=1, segments=2).run()
    killed = 0
    while (status := forked(lambda: run(killed))) == -signal.SIGKILL: killed += 1
    whole = forked(lambda: trainer(folder / "whole", small(0.2), steps=30, segments=2).run())
    print(json.dumps(dict(killed=killed, status=status, whole=whole)))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_kill_at_any_moment_leaves_a_whole_checkpoint(tmp_path):
    """Each start resumes from what the kill before has left; the end is as if nothing happened."""
    told = json.loads(child("kills", tmp_path).splitlines()[-1])
    assert told["status"] == told["whole"] == 0 and told["killed"] > 25, told
    a, b = (load_file(tmp_path / name / "model/model.safetensors") for name in ("killed", "whole"))
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert metrics(tmp_path / "killed") == metrics(tmp_path / "whole")
    assert not list((tmp_path / "killed").rglob(".*")), "drafts are cleared away"


# Checkpoints that do not fit

def broken(path, how):
    if how == "missing": path.unlink()
    elif how == "truncated": path.write_bytes(path.read_bytes()[:-9])
    elif how == "foreign": path.write_bytes(b"[1, 2]")


FILES = ["state.json", "model.safetensors", "optimizer.safetensors", "process_0/stream.json",
         "process_0/random.safetensors", "process_0/memory_0.safetensors"]


@pytest.mark.parametrize("how, message", [
    ("missing", "is incomplete.*Delete that"), ("truncated", "is damaged.*Delete that"),
    ("foreign", "is damaged.*Delete that|holds something else.*Move it away")])
@pytest.mark.parametrize("file", FILES)
def test_a_broken_checkpoint_is_refused(tmp_path, file, how, message):
    trainer(tmp_path, steps=7).run()
    broken(latest_checkpoint(tmp_path) / file, how)
    model = small()
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(ValueError, match=f"step_00000007 ({message})"):
        trainer(tmp_path, model, steps=7)
    assert all(map(torch.equal, before, model.parameters())), "nothing is half loaded"
    memformers.train.shutil.rmtree(latest_checkpoint(tmp_path))
    assert trainer(tmp_path, steps=7).step == 5


@pytest.mark.parametrize("key, value", [
    ("format", "memformers.checkpoint.9"), ("step", -5), ("step", 6), ("step", "7"), ("step", None),
    ("tokens", -1), ("tokens", 1.5), ("tally", []), ("tally", {"nll": "x"}), ("must_stay", 3),
    ("options", None), ("scaler", "x")])
def test_wrong_fields_of_a_checkpoint_are_named(tmp_path, key, value):
    trainer(tmp_path, steps=7).run()
    path = latest_checkpoint(tmp_path) / "state.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(ValueError, match=f"{key} in state.json must be .*Move it away"):
        trainer(tmp_path, steps=7)


@pytest.mark.parametrize("file, change", [
    ("optimizer.safetensors", lambda t: {k: x.flatten() for k, x in t.items()}),
    ("optimizer.safetensors", lambda t: {f"other.{k}": x for k, x in t.items()}),
    ("model.safetensors", lambda t: {k: x[:1] for k, x in t.items()}),
    ("process_0/random.safetensors", lambda t: {"cpu": t["cpu"][:9]}),
    ("process_0/random.safetensors", lambda t: {"gpu": t["cpu"]})])
def test_tensors_of_another_model_are_refused(tmp_path, file, change):
    trainer(tmp_path, steps=7).run()
    path = latest_checkpoint(tmp_path) / file
    save_file({k: x.contiguous() for k, x in change(load_file(path)).items()}, path)
    with pytest.raises(ValueError, match=f"holds something else.*{Path(file).name}.*Move it away"):
        trainer(tmp_path, steps=7)


def other_user():
    """What may not be read by others may not be read any more, also in a container of root."""
    if os.geteuid() == 0: os.seteuid(65534)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("file", FILES)
def test_a_checkpoint_that_may_not_be_read_is_not_to_be_deleted(file):
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        trainer(folder, steps=2).run()
        for path in Path(folder).rglob("*"): os.chmod(path, 0o755 if path.is_dir() else 0o644)
        os.chmod(latest_checkpoint(folder) / file, 0)
        def read():
            other_user()
            with pytest.raises(OSError, match="cannot be read.*Permission.*do not delete it"):
                with memformers.train._reading(latest_checkpoint(folder)): raise FileNotFoundError
        assert forked(read) == 0


def test_lines_of_others_in_the_metrics_are_left_out(tmp_path):
    trainer(tmp_path, steps=6).run()
    good = read_metrics(tmp_path)
    with open(tmp_path / "metrics.jsonl", "ab") as file:
        file.write(b'[1]\n"text"\n3\n{"bits": 2}\n{"step": "6"}\n{"step": -5}\n{"step": true}\n'
                   b'\xff\xfe\n\n{"step": 6')
    assert read_metrics(tmp_path) == good
    assert trainer(tmp_path, steps=9).run().step == 9
    assert [line["step"] for line in read_metrics(tmp_path)] == [3, 6, 9]


def test_other_folders_are_no_checkpoints(tmp_path):
    trainer(tmp_path, steps=2).run()
    for name in ("step_-0000005", "step_later", "step_", "copy of step_00000009"):
        (tmp_path / "checkpoints" / name).mkdir()
    assert latest_checkpoint(tmp_path).name == "step_00000002"
    assert trainer(tmp_path, steps=4).run().step == 4


# One run in a folder

def test_a_folder_in_use_is_refused(tmp_path):
    run, said = trainer(tmp_path, steps=6), []
    def second():
        try: trainer(tmp_path, steps=6)
        except BlockingIOError as error: said.append(str(error))
    before_update(run, 4, second).run()
    assert len(said) == 1 and str(tmp_path) in said[0] and f"process {os.getpid()} on" in said[0]
    assert not (tmp_path / "run.lock.json").exists()
    assert trainer(tmp_path, steps=7).run().step == 7
    assert [line["step"] for line in read_metrics(tmp_path)] == [3, 6, 7]


def test_another_process_is_refused_and_a_killed_one_holds_no_lock(tmp_path):
    """Both processes train into the folder; the second ends at once, and the first is not hurt."""
    if not hasattr(os, "fork"): pytest.skip("needs fork")
    told = json.loads(child("second_trainer", tmp_path).splitlines()[-1])
    assert told == dict(second=0, killed=-signal.SIGKILL)
    assert trainer(tmp_path, steps=12).run().step == 12
    assert [line["step"] for line in read_metrics(tmp_path)] == [3, 6, 9, 12]


def second_trainer(folder):
    import accelerate, tqdm  # noqa: F401, E401
    torch.optim.AdamW([torch.zeros(1)])
    def second():
        with pytest.raises(BlockingIOError, match="is in use by process"): trainer(folder, steps=9)
    def first():
        run = trainer(folder, steps=12)
        def act():
            status = forked(second)
            (folder / "second").write_text(str(status))
            os.kill(os.getpid(), signal.SIGKILL)
        before_update(run, 7, act).run()
    killed = forked(first)
    print(json.dumps(dict(second=int((folder / "second").read_text()), killed=killed)))


def test_a_run_that_another_has_overtaken_is_refused(tmp_path):
    first = trainer(tmp_path, steps=9)
    assert trainer(tmp_path, steps=6).run().step == 6
    with pytest.raises(ValueError, match="trained further by another run, up to step_00000006"):
        first.run()
    first.resume()
    assert first.run().step == 9
    assert [line["step"] for line in read_metrics(tmp_path)] == [3, 6, 9]


# A disk that is full

@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_full_disk_stops_the_run_with_a_way_out(tmp_path):
    """No file may grow beyond a few bytes, as on a full disk; then there is space again."""
    trainer(tmp_path, steps=5).run()
    def full():
        import resource
        run = trainer(tmp_path, steps=12)
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4000, resource.RLIM_INFINITY))
        with pytest.raises(OSError, match="step_00000010 could not be written.*free space.*"
                                          "go on from step_00000005"): run.run()
    assert forked(full) == 0
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step_00000005"]
    assert trainer(tmp_path, steps=12).run().step == 12
    assert [line["step"] for line in read_metrics(tmp_path)] == [3, 5, 6, 9, 12]


@pytest.mark.parametrize("change, named", [
    (dict(batch_size=8), "batch_size was 4 and is now 8"),
    (dict(accumulate=2), "accumulate was 1 and is now 2"),
    (dict(seed=1), "seed was 0 and is now 1"),
    (dict(model=small(dim=12)), "model.dim was 8 and is now 12"),
    (dict(model=small().double()), "dtype was 'torch.float32' and is now 'torch.float64'"),
    (dict(corpus=letters(seed=1)), "corpus")])
def test_what_must_stay_the_same_is_named(tmp_path, change, named):
    trainer(tmp_path, steps=2).run()
    with pytest.raises(ValueError, match=named): trainer(tmp_path, **dict(steps=4) | change)


def test_other_options_may_change_and_are_named(tmp_path):
    trainer(tmp_path, steps=2).run()
    with pytest.warns(UserWarning, match="lr was 0.001 and is now 0.0005"):
        assert trainer(tmp_path, steps=4, lr=5e-4).run().step == 4


def test_a_run_is_not_overwritten(tmp_path):
    trainer(tmp_path, steps=2).run()
    with pytest.raises(FileExistsError, match="step_00000002.*resume=True"):
        trainer(tmp_path, steps=2, resume=False)
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        trainer(tmp_path / "new", steps=2).resume()


def test_the_folder_holds_everything(tmp_path):
    run = trainer(tmp_path, steps=12, keep=1).run()
    record = json.loads((tmp_path / "options.json").read_text())
    assert record["options"] == json.loads(json.dumps(run.options.__dict__))
    assert record["corpus"]["sha256"] == letters().fingerprint and record["processes"] == 1
    assert record["model"]["model_class"] == "TransformerXL"
    assert record["versions"].keys() == {"python", "torch", "accelerate", "memformers"}
    assert TrainOptions(**record["options"]) == run.options
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step_00000012"]
    for folder in (tmp_path / "model", latest_checkpoint(tmp_path)):
        model = TransformerXL.from_pretrained(folder)
        assert all(map(torch.equal, model.parameters(), run.model.parameters()))
    assert not {".pt", ".pth", ".pkl", ".bin"} & {p.suffix for p in tmp_path.rglob("*")}


def test_a_store_on_disk_is_refused(tmp_path):
    model = MemorizingTransformer(num_tokens=128, dim=8, depth=2, heads=2, dim_head=4, seq_len=6,
                                  max_knn_memories=8, knn_memories_directory=str(tmp_path / "knn"))
    with pytest.raises(ValueError, match="knn_memories_directory.*= None to train it"):
        trainer(tmp_path / "run", model)
    model.knn_memories_directory = None
    assert trainer(tmp_path / "run", model, steps=1).run().step == 1


# What is not finite

@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_what_is_not_finite_stops_the_run(tmp_path, what):
    run = trainer(tmp_path, steps=12, save_every=4)
    def spoil():
        if what == "gradient": run.model.norm.bias.register_hook(lambda g: g * torch.inf)
        else: run.model.embedding.weight.data[97:107] = torch.nan
    before_update(run, 6, spoil)
    with pytest.raises(NonFiniteLoss, match="in update 7 the .*step_00000004"): run.run()
    good = latest_checkpoint(tmp_path)
    assert good.name == "step_00000004" and run.step == 6
    assert all(t.isfinite().all() for t in load_file(good / "model.safetensors").values())
    if what == "gradient": assert all(p.isfinite().all() for p in run.model.parameters())
    else:
        run.learner.update = type(run.learner).update.__get__(run.learner)
        run.resume()
        assert run.step == 4 and run.run().step == 12
        assert [line["step"] for line in read_metrics(tmp_path)] == [3, 6, 9, 12]


def test_without_a_checkpoint_the_error_says_so(tmp_path):
    model = small()
    model.norm.weight.data[0] = torch.inf
    with pytest.raises(NonFiniteLoss, match="no checkpoint yet"): trainer(tmp_path, model).run()


# Options, streams, extras

@pytest.mark.parametrize("wrong", [
    dict(steps=0), dict(batch_size=2.5), dict(segments=True), dict(lr=0), dict(lr="1e-3"),
    dict(lr=math.nan), dict(min_lr=1.5), dict(warmup=-1), dict(betas=(0.9,)), dict(betas=(0.9, 1)),
    dict(weight_decay=-1), dict(clip=0), dict(mixed_precision="fp8"), dict(keep=0), dict(cpu=1)])
def test_bad_options_are_named(wrong):
    (name, value), = wrong.items()
    with pytest.raises(ValueError, match=f"^{name} must be .*; got "): TrainOptions(**wrong)


def test_the_batch_must_split_into_parts(tmp_path):
    with pytest.raises(ValueError, match="batch_size must be a multiple .* 1 × 3; got 4"):
        trainer(tmp_path, accumulate=3)


def test_a_stream_that_ends_is_named(tmp_path):
    run = Trainer(small(), lambda rows: DocumentStream(letters(), 4, 6, epochs=1, rows=rows),
                  tmp_path, TrainOptions(**FAST))
    with pytest.raises(ValueError, match="the stream ended in update [0-9]+ of 1000"): run.run()


def test_a_stream_of_other_rows_is_named(tmp_path):
    run = Trainer(small(), lambda rows: DocumentStream(letters(), 3, 6), tmp_path,
                  TrainOptions(**FAST))
    with pytest.raises(ValueError, match="stream of 4 rows.*got segments of 3 rows"): run.run()


def test_launched_without_devices_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2"), monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "false")
    if torch.cuda.is_available(): pytest.skip("there is a device")
    with pytest.raises(ValueError, match="2 processes were launched.*cpu=True"):
        trainer(tmp_path, cpu=False)


def test_bfloat16_leaves_weights_and_memory_in_float32(tmp_path):
    run = trainer(tmp_path, steps=6, segments=2, mixed_precision="bf16").run()
    memory, = run.learner.memories
    assert memory.mem.dtype == torch.float32 and memory.fill.dtype == torch.int64
    assert all(p.dtype == torch.float32 for p in run.model.parameters())
    # The next run of the same program may choose another precision.
    exact = trainer(tmp_path / "exact", steps=6, segments=2).run()
    for a, b in zip(metrics(run.folder), metrics(exact.folder)):
        assert a["bits"] == pytest.approx(b["bits"], rel=1e-2) and a["bits"] != b["bits"]
    assert run.model.step(torch.ones(1, 2, dtype=torch.long)).logits.dtype == torch.float32


def test_tensorboard_gets_the_same_numbers(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    trainer(tmp_path, steps=6, tensorboard=True).run()
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    found = [event.value for event in events.Scalars("bits")]
    assert found == pytest.approx([line["bits"] for line in read_metrics(tmp_path)])


def test_tensorboard_that_is_not_installed_is_named(tmp_path, monkeypatch):
    import accelerate.utils
    monkeypatch.setattr(accelerate.utils, "is_tensorboard_available", lambda: False)
    with pytest.raises(ImportError, match=r"torch-memformers\[tensorboard\]"):
        trainer(tmp_path, tensorboard=True)


def test_importing_takes_no_accelerate_with_it():
    code = "import sys, memformers.train; print('accelerate' in sys.modules, 'tqdm' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.split()[0] == "False"


# Several processes

class Late(TransformerXL):
    """A weight without a gradient until a row remembers something: not at once in all processes."""
    def step(self, tokens, memory=None, mask=None):
        out = super().step(tokens, memory, mask)
        seen = memory.fill > 6  # more than one segment
        if not seen.any(): return out
        return out._replace(logits=out.logits + self.late * seen[:, None, None])


def late():
    model = small(cls=Late)
    model.late = torch.nn.Parameter(torch.ones(model.num_tokens))
    return model.double()


TWO = dict(warmup=1, min_lr=1.0, segments=2, save_every=4)


def two_processes(folder):
    """In two processes: a whole run, one that stops after 6 of 10 updates, and its other half."""
    from accelerate import debug_launcher
    def run(name, **options):
        trainer(folder / name, late(), **TWO | options).run()
    def runs(steps, *names):
        for name in names: run(name, steps=steps)
        if steps == 10: run("parts", steps=10, accumulate=2)
        if steps == 10: signalled(folder)
    torch.optim.AdamW([torch.zeros(1)])  # what takes long to import is imported once, here
    debug_launcher(runs, (6, "cut"))
    debug_launcher(runs, (10, "cut", "whole"))


def signalled(folder):
    """One of the processes is asked to stop: all of them stop after the same update."""
    run = trainer(folder / "signalled", late(), **TWO | dict(steps=10))
    ask = lambda: run.accelerator.process_index and os.kill(os.getpid(), signal.SIGTERM)
    before_update(run, 3, ask).run()
    assert run.interrupted and run.step == 4


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_two_processes_equal_one_on_the_joined_batch(tmp_path):
    child("two_processes", tmp_path)
    one = trainer(tmp_path / "one", late(), steps=10, **TWO).run()
    memory, = one.learner.memories
    for name, parts in ("whole", 1), ("parts", 2):
        found = load_file(tmp_path / name / "model/model.safetensors")
        for key, p in one.model.state_dict().items():
            torch.testing.assert_close(found[key], p, rtol=1e-9, atol=1e-11)
        row, per_part = 0, 2 // parts
        for process in range(2):
            for part in range(parts):
                own = select(memory, range(row, row := row + per_part))
                there = load_memory(latest_checkpoint(tmp_path / name) / f"process_{process}"
                                    / f"memory_{part}.safetensors", own)
                for x, y in zip(leaves(there), leaves(own)):
                    torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-9)
        assert row == 4
    for a, b in zip(metrics(tmp_path / "whole"), metrics(one.folder), strict=True):
        assert a == pytest.approx(b, rel=1e-9)
    states = [load_file(latest_checkpoint(tmp_path / "whole") / f"process_{i}/random.safetensors")
              for i in range(2)]
    assert not torch.equal(states[0]["cpu"], states[1]["cpu"]), "each process draws its own numbers"
    # … and the resumed run equals the uninterrupted one bit for bit
    at = [latest_checkpoint(tmp_path / name) for name in ("cut", "whole")]
    for file in ("model.safetensors", "optimizer.safetensors", "process_0/memory_0.safetensors",
                 "process_1/memory_0.safetensors", "process_1/random.safetensors"):
        a, b = (load_file(path / file) for path in at)
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a), file
    with pytest.raises(ValueError, match="processes was 2 and is now 1"):
        trainer(tmp_path / "whole", late(), steps=10, **TWO)


if __name__ == "__main__": globals()[sys.argv[1]](Path(sys.argv[2]))


def test_resuming_forgets_what_came_after_the_checkpoint_and_no_more(tmp_path):
    lines = [json.dumps(dict(step=step, bits=1.0)) for step in range(1, 6)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    memformers.train._cut_metrics(tmp_path, 3)
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3]
