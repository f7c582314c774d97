"""One row of the table of refusals: a call that cannot be right, and the error it must raise."""
from collections.abc import Callable
from dataclasses import dataclass

REFUSED = (ValueError, TypeError)


@dataclass(frozen=True)
class Refusal:
    name: str           # unique in the whole table
    call: Callable      # takes nothing, or one argument: an empty folder of its own
    error: type | tuple # ValueError, TypeError, OSError or a subclass; a tuple allows several
    match: str          # a pattern that the message must contain; it names the argument


def refusals(
    prefix: str,    # first part of the rows' names
    call: Callable, # called with the bad value under the argument's name
    argument: str,
    *bad,           # values, a row each
    error=REFUSED,
    match: str | None = None, # None: the argument's name
) -> list[Refusal]:
    "A row for each bad value of one argument."
    return [Refusal(f"{prefix}, {argument}={value!r}", lambda v=value: call(**{argument: v}), error,
                    match or rf"\b{argument}\b") for value in bad]
