"""The comparison: equal budgets, one result for each run, the same numbers each time, whatever is killed."""
import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from filelock import FileLock

from memformers.compare import (MECHANISMS, Results, Run, _Alone, _chosen, _command, _do, _path,
                                _resampled, _trial, differences, estimate, load_results, missing, plan,
                                run_suite, suite, table, train_run, trained, work)
from memformers.zoo import MODELS, budget

TOY = suite("toy")
QUIET = dict(tell=lambda line: None)


def command(folder, *words):
    """The command as a process of its own."""
    line = [sys.executable, "-m", "memformers", "compare", "toy", f"--folder={folder}", *words]
    return subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            env=os.environ | dict(OMP_NUM_THREADS="1"))


def results(folder):
    return {path.name: json.loads(path.read_text())["result"] for path in folder.glob("*.json")}


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A folder with all results of the toy suite, which nobody changes."""
    folder = tmp_path_factory.mktemp("toy")
    work(folder, TOY, **QUIET)
    return folder


@pytest.mark.parametrize("name", ["cpu", "gpu"])
def test_budgets_are_equal(name):
    """On each task parameters within 3 % of each other, bytes within 2 % of the stated level."""
    parameters = {}
    for run in {(run.task, run.row): run for run in suite(name)}.values():
        with torch.device("meta"): size = budget(MODELS[run.model](**run.options))
        parameters.setdefault(run.task, []).append(size["parameters"])
        if run.kib: assert abs(size["memory_bytes"] / (run.kib * 1024) - 1) < .02, (run.row, size)
        else: assert size["memory_bytes"] <= 8   # a control has the count of slots in use alone
    for found in parameters.values():
        assert len(found) >= 13 and max(found) / min(found) < 1.03, parameters


@pytest.mark.parametrize("row", ["Whole context", "Compressive, 256 KiB",
                                 "Gated delta net, 1024 KiB"])
def test_large_runs_in_small(row):
    """The suite for one GPU, one update of one episode on the CPU."""
    run = next(run for run in suite("gpu") if run.row == row and run.lr)
    found = train_run(replace(run, device="cpu", steps=1, batch_size=1), run.lr)["result"]
    assert not found["failed"] and 2 < found["loss"] < 12


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is an accelerator")
def test_without_an_accelerator_the_large_suite_is_refused(tmp_path):
    with pytest.raises(ValueError, match="gpu needs an accelerator"): run_suite("gpu", tmp_path)
    assert not [*tmp_path.iterdir()]


def test_every_mechanism_has_its_row_in_the_suite():
    runs = suite("cpu")
    assert len({run.id for run in runs}) == len({run.name for run in runs}) == len(runs)
    assert {run.model for run in runs} == set(MODELS)
    for run in runs:   # rates are chosen on another seed
        assert (run.seed in range(3)) == (run.lr is None)


def test_the_same_tokens_for_all():
    """All rows read as many tokens, from the same lessons."""
    for task in {run.task for run in suite("cpu")}:
        rows = [run for run in suite("cpu") if run.task == task]
        assert len({run.steps * run.batch_size * run.seq_len * run.segments for run in rows}) == 1
    part = lambda n: next(_trial("recall").stream(4, n, seed=3)).tokens
    stream = _trial("recall").stream(4, 16, seed=3)
    assert torch.equal(part(64), torch.cat([next(stream).tokens for _ in range(4)], 1))


def test_a_lesson_asks_what_it_has_told():
    for lesson in _trial("recall").lessons:
        text, answers = lesson.episode(np.random.default_rng(5))
        assert len(text) == 65 and 0 not in text[answers]
        told = dict(text[:text.tolist().index(0) // 2 * 2].reshape(-1, 2).tolist())
        for place in np.flatnonzero(answers): assert told[text[place - 1]] == text[place]


def test_alone_resets_the_memory_before_each_segment():
    stream = lambda: _trial("recall").stream(2, 16, 0)
    alone, joined = _Alone(stream()), stream()
    segments = [(next(alone), next(joined)) for _ in range(3)]
    assert not segments[1][1].start.any(), "an episode has more than one segment"
    for one, other in segments:
        assert one.start.all() and torch.equal(one.tokens, other.tokens)


def test_a_run_is_known_by_all_that_it_means():
    run = TOY[-1]
    for change in (dict(seed=7), dict(steps=5), dict(rates=(1e-3,)), dict(task="recall"),
                   dict(options=run.options | dict(heads=2)), dict(memory=False)):
        assert replace(run, **change).id != run.id
    assert replace(run).id == run.id
    assert Run(**json.loads(json.dumps(run.__dict__))).id == run.id   # as it comes from a file


def test_again_it_is_the_same_to_the_bit(done):
    for run in (TOY[2], TOY[-1]):
        record = json.loads(_path(done, run).read_text())
        assert train_run(run, record["result"]["lr"])["result"] == record["result"]


def test_the_model_of_a_run_has_its_scores(done):
    for run in (TOY[2], TOY[-1]):
        result = results(done)[_path(done, run).name]
        model, losses, failed = trained(run, result["lr"])
        assert failed is None and len(losses) == run.steps
        assert _trial(run.task).score(model) == result["scores"]


def test_a_result_says_everything(done):
    for path in done.glob("*.json"):
        record = json.loads(path.read_text())
        assert path.stat().st_size < 20_000
        assert record["run"]["options"] and record["versions"]["torch"] == torch.__version__
        assert record["machine"]["processor"] and record["command"] and record["finished"]
        assert str(done) not in path.read_text()   # where it was made does not matter
        assert record["result"]["parameters"] and record["measured"]["trained_per_second"] > 0
        assert ("scores" in record["result"]) == (record["run"]["lr"] is None)


@pytest.mark.parametrize("words", [
    ["--folder", "/a/b", "--jobs", "1"], ["--folder=/a/b", "--jobs", "1"],
    ["--folder", "/a b/c", "--jobs", "1"], ["--jobs", "1", "--folder", "/a"], ["--jobs", "1"]])
def test_the_command_is_told_without_its_folder(words):
    assert _command(["compare", "toy", *words]) == "memformers compare toy --jobs 1"


def test_the_rate_with_the_lowest_held_out_loss_is_taken(done):
    for run in TOY:
        if run.lr is not None: continue
        losses = {s.lr: json.loads(_path(done, s).read_text())["result"]["loss"]
                  for s in run.searches()}
        assert _chosen(done, run) == min(losses, key=losses.get)
        assert json.loads(_path(done, run).read_text())["result"]["lr"] == _chosen(done, run)


def test_a_run_waits_for_its_searches(tmp_path):
    assert _do(tmp_path, TOY[2]) is None and not results(tmp_path)


def test_a_failed_training_is_a_result(tmp_path):
    """It stays in the table, and a rate that fails is not chosen."""
    bad = replace(TOY[0], lr=1e6, steps=30)
    found = train_run(bad, 1e6)["result"]
    if not found["failed"]: pytest.skip("this machine's rounding survives the rate")
    run = replace(bad, lr=None, rates=(1e6, 1e-3))
    work(tmp_path, [*run.searches(), run], **QUIET)
    assert _chosen(tmp_path, run) == 1e-3


def test_finished_runs_are_skipped(done):
    before = {path: path.stat().st_mtime_ns for path in done.glob("*.json")}
    work(done, TOY, tell=lambda line: pytest.fail(line))
    assert run_suite("toy", done) == []
    assert before == {path: path.stat().st_mtime_ns for path in done.glob("*.json")}


def test_a_damaged_result_is_told_by_name(done, tmp_path):
    path = tmp_path / "x.json"
    path.write_text("{")
    with pytest.raises(ValueError, match="x.json is not the result of a run"):
        load_results(tmp_path)


def test_a_claimed_run_is_left_to_its_owner(tmp_path):
    (tmp_path / ".locks").mkdir()
    with FileLock(tmp_path / ".locks" / TOY[0].id):
        assert _do(tmp_path, TOY[0]) is None
    assert not results(tmp_path)
    assert _do(tmp_path, TOY[0]) is True and _do(tmp_path, TOY[0]) is False


def test_killed_and_resumed_it_ends_with_the_same_numbers(done, tmp_path):
    """A kill -9 at any moment: whole results only, and the same ones in the end."""
    for finished in (1, 4):
        process = command(tmp_path)
        while len(results(tmp_path)) < finished and process.poll() is None: time.sleep(.02)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        assert finished <= len(results(tmp_path)) < len(TOY)
    assert command(tmp_path).wait() == 0
    assert results(tmp_path) == results(done)


def test_two_processes_share_the_work(done, tmp_path):
    both = [command(tmp_path) for _ in range(2)]
    said = [process.communicate()[0].splitlines() for process in both]
    assert [process.returncode for process in both] == [0, 0]
    runs = [line.split()[1] for lines in said for line in lines if "rate" in line]
    assert sorted(runs) == sorted(run.name for run in TOY)   # each once
    assert results(tmp_path) == results(done)


def test_jobs_and_a_choice(done, tmp_path):
    out, error = command(tmp_path, "--jobs=2", "--only=infini").communicate()
    assert "All runs are done." in out, error
    assert results(tmp_path) == {name: value for name, value in results(done).items()
                                 if "infini" in name}


def test_a_plan_counts_what_is_left(done, tmp_path, capsys):
    assert "0 of 12 runs have no result yet" in plan(TOY, done)
    left = run_suite("toy", tmp_path, dry_run=True)
    assert left == TOY and "12 of 12 runs" in capsys.readouterr().out and not results(tmp_path)


def test_a_plan_expects_what_the_same_model_has_taken(tmp_path):
    for run in TOY[:3]: assert _do(tmp_path, run)
    for path in tmp_path.glob("*.json"):
        record = json.loads(path.read_text())
        record["measured"]["seconds"] = 120.0
        path.write_text(json.dumps(record))
    assert "| toy | No memory | 1 | 2.0 |" in plan(TOY, tmp_path)


def fake(seed, row, right, of=2, task="toy"):
    """The record of a run, as far as a table needs it."""
    scores = {"1 pairs, 1": dict(sums=right, counts=[of] * len(right))}
    result = dict(lr=1e-3, failed=None, parameters=100, memory_bytes=8192, scores=scores)
    return dict(row=row, result=result, task=dict(columns={"1 pairs, 1": ""}),
                run=dict(seed=seed, task=task, kib=8),
                measured=dict(trained_per_second=10., generated_per_second=10.))


def test_an_estimate_is_the_mean_and_covers_it():
    rng = np.random.default_rng(0)
    records = [fake(s, "A", rng.binomial(2, .7, 64).tolist()) for s in range(3)]
    found = estimate(Results(records), "toy", "A", "1 pairs, 1")
    right = [x for r in records for x in r["result"]["scores"]["1 pairs, 1"]["sums"]]
    assert found.value == pytest.approx(np.mean(right) / 2)
    width = 1.96 * (.7 * .3 / 2 / 192) ** .5   # of independent answers
    assert .6 * width < (found.high - found.low) / 2 < 2 * width and found.low < .7 < found.high


def test_a_resample_draws_seeds_and_episodes():
    """Seeds that differ, with equal episodes, and the other way round: both make it uncertain."""
    ones = np.ones((3, 8))
    assert np.ptp(_resampled(ones, ones)) == 0
    assert np.ptp(_resampled(ones * [[0], [1], [1]], ones)) == pytest.approx(1)
    by_episode = np.tile([0, 1], (3, 4))
    drawn = _resampled(by_episode.astype(float), ones)
    assert .1 < drawn.std() < .25   # sqrt(.25 / 8) = .18


def test_a_difference_is_paired():
    """Hard episodes are hard for both: what is common to them cancels."""
    rng = np.random.default_rng(1)
    hard = rng.integers(0, 2, 64)
    records = [fake(s, row, (hard + more).tolist()) for s in range(3)
               for row, more in (("A", 1), ("B", 0))]
    found = estimate(Results(records), "toy", "A", "1 pairs, 1", minus="B")
    assert found == pytest.approx((.5, .5, .5))
    single = estimate(Results(records), "toy", "A", "1 pairs, 1")
    assert single.high - single.low > .1
    assert "| A | +0.500 [+0.500, +0.500] | yes |" in differences(Results(records), "toy",
                                                                  "1 pairs, 1", "B")


def test_many_comparisons_ask_for_more():
    """A difference that just holds alone does not hold among twenty."""
    rng = np.random.default_rng(0)
    base = rng.binomial(2, .5, 100)
    more = np.clip(base + rng.choice([-1, 0, 1], 100, p=[.16, .5, .34]), 0, 2)
    records = [fake(0, "B", base.tolist())] + [fake(0, f"A{i}", more.tolist()) for i in range(20)]
    results_ = Results(records)
    low = estimate(results_, "toy", "A0", "1 pairs, 1", "B").low
    strict = estimate(results_, "toy", "A0", "1 pairs, 1", "B", share=1 - .05 / 20).low
    assert strict < low
    assert "20 comparisons" in differences(results_, "toy", "1 pairs, 1", "B")


def test_a_report_copes_with_missing_runs(tmp_path):
    assert missing("toy", tmp_path).startswith("12 of 12 runs")
    assert load_results(tmp_path).records == []
    for run in TOY[:3] + TOY[4:6]: assert _do(tmp_path, run)
    found = load_results(tmp_path)
    assert found.rows("toy") == ["No memory"]
    assert "| No memory | – |" in table(found, "toy") and "| 1 |" in table(found, "toy")
    said = missing("toy", tmp_path)
    assert "7 of 12" in said and "toy: No memory, seed 1" in said and "Infini" in said
    assert _do(tmp_path, TOY[6])
    text = differences(load_results(tmp_path), "toy", "2 pairs, 8", "No memory")
    assert "Transformer-XL, 8 KiB" in text and "1 comparison" in text


def test_a_model_without_scores_is_not_zero():
    records = [fake(0, "A", [1, 2]), fake(0, "B", [1, 1])]
    del records[1]["result"]["scores"]
    records[1]["result"]["failed"] = "in update 3 the loss is nan"
    found = Results(records)
    assert math.isnan(estimate(found, "toy", "B", "1 pairs, 1").value)
    line = next(line for line in table(found, "toy").splitlines() if line.startswith("| B"))
    assert "1, 1 failed" in line and line.endswith("| – [–, –] |")


def test_refusals(tmp_path):
    with pytest.raises(ValueError, match="suite: expected one of cpu, .*got 'large'"):
        run_suite("large", tmp_path)
    with pytest.raises(ValueError, match="only: no run has one of"):
        run_suite("toy", tmp_path, only="nothing")
    with pytest.raises(ValueError, match="jobs"): run_suite("toy", tmp_path, jobs=0)
