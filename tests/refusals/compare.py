"""The comparison: suites, runs, results and tables that mean nothing."""
import json
from dataclasses import asdict, replace
from functools import partial

from memformers import TransformerXL
from memformers.compare import (Reading, Results, Run, Trial, differences, estimate, load_results,
                                missing, plan, recall_lesson, run_suite, score_figure, sized, suite,
                                table, train_run, trained, work)
from memformers.tasks import associative_recall_task
from refusals.common import Refusal, refusals

NAN, INF = float("nan"), float("inf")
COUNT = (0, -1, 1.5, "8", True, None)
RUN = suite("toy")[-1]
RECORD = dict(format="memformers.run.1", run=asdict(RUN))
SHAPE = dict(num_tokens=32, dim=64, depth=2, heads=4, seq_len=16, mem_len=16)
ASKED = "1 pairs, 1"
SCORES = dict(lr=1e-3, failed=None, parameters=100, memory_bytes=8192,
              scores={ASKED: dict(sums=[1, 2], counts=[2, 2])})
RESULTS = Results([dict(row="No memory", result=SCORES, task=dict(columns={ASKED: ""}),
                        run=dict(seed=0, task="toy", kib=0),
                        measured=dict(trained_per_second=1., generated_per_second=1.))])

TASK = associative_recall_task(1, 1, vocab=16)
trial = lambda **o: Trial(**(dict(lessons=(TASK,), columns={"a": TASK}) | o))
reading = lambda **o: Reading(**(dict(corpus="stdlib", documents=1, max_tokens=9) | o))
a_run = partial(replace, RUN)
size = lambda **o: sized(**(dict(cls=TransformerXL, options=SHAPE, parameters=130_000) | o))
score = lambda **o: estimate(**(
    dict(results=RESULTS, task="toy", row="No memory", column=ASKED) | o))
compared = lambda **o: differences(**(
    dict(results=RESULTS, task="toy", column=ASKED, minus="No memory") | o))
drawn = lambda **o: score_figure(**(
    dict(results=RESULTS, task="toy", columns=[ASKED]) | o))
NO_TASK, NO_RESULTS = ("tyo", "", None, 3), (None, "evidence/cpu", [], {"toy": 1})

ROWS = [
    *refusals("Trial", trial, "lessons", (), None, TASK, ("recall",)),
    *refusals("Trial", trial, "columns", {}, None, [TASK], {"a": "recall"}),
    *refusals("Trial", trial, "episodes", *COUNT),
    *refusals("Trial", trial, "num_tokens", *COUNT),
    *refusals("Trial", trial, "corpus", None, 3),
    *refusals("recall_lesson", recall_lesson, "pairs", *COUNT, 16),
    *refusals("recall_lesson", partial(recall_lesson, 2), "length", *COUNT, 7),
    *refusals("recall_lesson", partial(recall_lesson, 1), "vocab", *COUNT, 3, 257),
    *refusals("Reading", reading, "corpus", "", None, 3),
    *refusals("Reading", reading, "documents", *COUNT),
    *refusals("Reading", reading, "max_tokens", *COUNT, 1),
    *(row for name in ("task", "mechanism", "model", "device")
      for row in refusals("Run", a_run, name, None, 3)),
    *(row for name in ("kib", "seed") for row in refusals("Run", a_run, name, *COUNT[1:])),
    *(row for name in ("steps", "batch_size", "seq_len", "segments")
      for row in refusals("Run", a_run, name, *COUNT)),
    *refusals("Run", a_run, "options", None, [], "dim=64"),
    *refusals("Run", a_run, "memory", None, 0, "no"),
    *refusals("Run", a_run, "rates", (), None, 1e-3, (0,), (-1.,), (NAN,), ("fast",), (True,)),
    *refusals("Run", a_run, "lr", 0, -1, NAN, INF, "fast", True),
    *(row for call in (trained, train_run) for row in (
        *refusals(call.__name__, partial(call, lr=1e-3), "run", None, "toy", RECORD["run"],
                  replace(RUN, model="Transformer")),
        *refusals(call.__name__, partial(call, RUN), "lr", 0, -1, NAN, INF, "fast", None, True),
        Refusal(f"{call.__name__}, an unknown task",
                partial(call, replace(RUN, task="tyo"), 1e-3), ValueError, "task"))),
    *refusals("sized", size, "cls", None, "TransformerXL", dict, TransformerXL(**SHAPE)),
    *refusals("sized", size, "options", None, [], SHAPE | dict(ff_mult=2)),
    *refusals("sized", size, "parameters", *COUNT, 100),
    *refusals("suite", suite, "name", "large", "", None, 3, ["cpu"], match="suite"),
    *refusals("missing", partial(missing, folder="."), "name", "large", None, match="suite"),
    *refusals("run_suite", partial(run_suite, dry_run=True), "name", "large", None, ["cpu"],
              match="suite"),
    *refusals("run_suite", partial(run_suite, "toy", dry_run=True), "jobs", *COUNT),
    *refusals("run_suite", partial(run_suite, "toy", dry_run=True), "only", "nothing", None, ["xl"]),
    *refusals("run_suite", partial(run_suite, "toy", dry_run=True), "folder", 3),
    *refusals("plan", partial(plan, folder="."), "runs", None, "toy", [None], [RECORD["run"]]),
    *(row for name, call in dict(plan=partial(plan, [RUN]), work=partial(work, runs=[RUN]),
                                 missing=partial(missing, "toy"), load_results=load_results).items()
      for row in refusals(name, call, "folder", None, 3, "")),
    *refusals("load_results", load_results, "folder", "/no/where", error=OSError),
    *refusals("estimate", score, "results", *NO_RESULTS),
    *refusals("estimate", score, "task", *NO_TASK),
    *refusals("estimate", score, "row", "Nothing", "", None, 3),
    *refusals("estimate", score, "minus", "Nothing", "", 3),
    *refusals("estimate", score, "column", "far", "", None, 3),
    *refusals("estimate", score, "share", 0, 1, -1, NAN, "half", None),
    *refusals("table", partial(table, task="toy"), "results", *NO_RESULTS),
    *refusals("table", partial(table, RESULTS), "task", *NO_TASK),
    *refusals("table", partial(table, RESULTS, "toy"), "columns", ASKED, ["far"], [None], 3),
    *refusals("differences", compared, "results", *NO_RESULTS),
    *refusals("differences", compared, "task", *NO_TASK),
    *refusals("differences", compared, "column", "far", None, [ASKED]),
    *refusals("differences", compared, "minus", "Nothing", "", None, 3),
    *refusals("score_figure", drawn, "results", *NO_RESULTS),
    *refusals("score_figure", drawn, "task", *NO_TASK, "recall"),
    *refusals("score_figure", drawn, "columns", [], ASKED, ["far"], None),
    *refusals("score_figure", drawn, "rows", ["Nothing"], "No memory", 3),
]


def in_folder(**changes):
    "A folder with one result in which something is changed is read."
    def read(folder):
        (folder / "run.json").write_text(json.dumps(RECORD | changes))
        load_results(folder)
    return read


def for_file(call):
    "A file is given in the place of a folder."
    def give(folder):
        (folder / "file").touch()
        call(folder / "file")
    return give


def run_as(**changes): return in_folder(run=RECORD["run"] | changes)


ROWS += [
    *(Refusal(f"{name}, a file for a folder", for_file(call), OSError, "folder: .*is a file")
      for name, call in {"work": partial(work, runs=[RUN]), "plan": partial(plan, [RUN]),
                         "missing": partial(missing, "toy"), "load_results": load_results,
                         "run_suite": partial(run_suite, "toy"),
                         "run_suite, in a file": lambda f: run_suite("toy", f / "in")}.items()),
    *refusals("work", partial(work, "."), "runs", None, "toy", [None], [RECORD["run"]]),
    *refusals("work", partial(work, ".", []), "tell", None, "print"),
    *refusals("work", partial(work, ".", []), "wait", -1, NAN, INF, "long", None),
    *(Refusal(f"load_results, {name}", call, ValueError, f"run.json.*{match}") for name, call, match in (
        ("another format", in_folder(format="memformers.run.0"), "format"),
        ("no run", in_folder(run=None), "not the result"),
        ("a run of other fields", run_as(depth=3), "depth"),
        ("a run without steps", run_as(steps=0), "steps"),
        ("an unknown task", run_as(task="tyo"), "task 'tyo'"),
        ("an unknown mechanism", run_as(mechanism="Magic"), "mechanism 'Magic'"))),
]
