"""The delta rule: shapes that do not go together, and what is no tensor of numbers."""
import torch

from memformers.delta_rule import delta_rule
from refusals.common import REFUSED, refusals

GOOD = dict(q=torch.zeros(2, 3, 5, 4), k=torch.zeros(2, 3, 5, 4), v=torch.zeros(2, 3, 5, 6),
            beta=torch.zeros(2, 3, 5), g=torch.zeros(2, 3, 5), state=torch.zeros(2, 3, 4, 6))
ROWS = []
for name, t in GOOD.items():
    call = lambda name=name, **bad: delta_rule(**GOOD | bad)
    bad = (t[0], t[..., None], t[:1], t.long(), t.bool(), t.tolist(), 3)
    if name not in ("g", "state"): bad += (None,)
    ROWS += [row for i, value in enumerate(bad) for row in
             refusals(f"delta_rule {i}", call, name, value, error=REFUSED, match=r"must be")]
ROWS = [type(row)(f"delta_rule, {i}", row.call, row.error, row.match) for i, row in enumerate(ROWS)]
ROWS += refusals("delta_rule", lambda chunk: delta_rule(**GOOD, chunk=chunk), "chunk", 0, -1, 1.5,
                 "64", None, True)
