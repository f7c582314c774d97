"""Every mechanism that the laws are held against. A new one adds one line to `MECHANISMS`."""
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from memformers import TransformerXL

SIZES = dict(num_tokens=17, dim=12, depth=3, heads=3, seq_len=5)


@dataclass(frozen=True)
class Mechanism:
    name: str
    cls: type
    options: dict = field(default_factory=dict)
    # May a text be cut into segments anywhere without a change in the output?
    splits: bool = False
    # Options under which it may, where it needs them (as enough memory).
    splits_with: dict | None = None

    def make(self, **overrides):
        """The model in float64, with weights large enough that nothing hides in rounding."""
        torch.manual_seed(0)
        model = self.cls(**(SIZES | self.options | overrides)).double()
        for p in model.parameters(): torch.nn.init.normal_(p, std=0.4)
        return model.eval()


MECHANISMS = [
    Mechanism("xl", TransformerXL, dict(mem_len=7), splits_with=dict(mem_len=40)),
    Mechanism("xl_t5", TransformerXL, dict(mem_len=7, positions="t5", ff_glu=True),
              splits_with=dict(mem_len=40, positions="t5")),
    Mechanism("xl_short", TransformerXL, dict(mem_len=3, memory_layers=[2], post_norm=True)),
    Mechanism("xl_enhanced", TransformerXL, dict(mem_len=6, enhanced_recurrence=True, clamp_len=4,
                                                 emb_dim=8, tie_embeddings=True)),
    Mechanism("xl_same_length", TransformerXL, dict(mem_len=6, same_length=True), splits=True),
]


def each(test: Callable) -> Callable:
    """Run a test once for every mechanism."""
    import pytest
    return pytest.mark.parametrize("mechanism", MECHANISMS, ids=lambda m: m.name)(test)
