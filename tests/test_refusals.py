"""What cannot be right is refused: by our own code, with an error that names the argument.

The rows are in `tests/refusals/`, a module for each area with a list `ROWS`.
"""
import importlib
import inspect
import re
from collections import Counter
from pathlib import Path

import pytest

import memformers

PACKAGE = Path(memformers.__file__).resolve().parent
FOLDER = Path(__file__).parent / "refusals"
AREAS = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem != "common")
ROWS = [row for area in AREAS for row in importlib.import_module(f"refusals.{area}").ROWS]


def raised_by_us(error):
    "Is the innermost frame of the traceback one of the package?"
    trace = error.__traceback__
    while trace.tb_next: trace = trace.tb_next
    return PACKAGE in Path(trace.tb_frame.f_code.co_filename).resolve().parents


def wants_folder(call):
    "Has it a parameter that must be given?"
    return any(p.default is p.empty for p in inspect.signature(call).parameters.values())


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_refused(row, tmp_path):
    allowed = row.error if isinstance(row.error, tuple) else (row.error,)
    assert all(issubclass(e, (ValueError, TypeError, OSError)) for e in allowed)
    with pytest.raises(allowed) as caught:
        row.call(tmp_path) if wants_folder(row.call) else row.call()
    assert raised_by_us(caught.value), f"not raised by memformers: {caught.value!r}"
    assert re.search(row.match, str(caught.value)), str(caught.value)


def test_the_table_is_long(): assert len(ROWS) >= 300


def test_each_row_has_a_name_of_its_own():
    twice = [name for name, count in Counter(row.name for row in ROWS).items() if count > 1]
    assert not twice
