"""The block-recurrent transformer: the documented call, and what makes its states useful."""
import pytest
import torch

from memformers import BlockRecurrentTransformer, carry, reset

close = torch.testing.assert_close


def small(**options):
    torch.manual_seed(0)
    return BlockRecurrentTransformer(**(dict(num_tokens=64, dim=32, depth=2, heads=2, seq_len=16,
                                             num_states=4) | options))


def text(b, n, seed=0):
    return torch.randint(64, (b, n), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("gate", ["bias", "lstm"])
def test_the_documented_call(gate):
    model = small(gate=gate)
    logits, memories = model(text(2, 16))
    logits, memories = model(text(2, 16, 1), memories=memories)
    assert logits.shape == (2, 16, 64) and not memories.states.requires_grad
    assert memories.states.shape == (2, 4, 32) and memories.mem.shape == (2, 2, 16, 32)
    assert memories.tokens.tolist() == [32, 32] and memories.fill.tolist() == [16, 16]
    logits, memories = model(text(2, 16, 2), memories=memories, grad=True)
    assert memories.states.requires_grad


@pytest.mark.parametrize("depth, layer", [(1, 1), (2, 2), (4, 3), (12, 9)])
def test_the_recurrent_layer_is_at_three_quarters(depth, layer):
    assert small(depth=depth).recurrent_layer == layer


@pytest.mark.parametrize("gate", ["bias", "lstm"])
def test_states_differ_by_their_positions_alone(gate):
    """States that start equal would stay equal forever, if nothing told them apart."""
    model = small(gate=gate)
    layer = model.layers[model.recurrent_layer - 1]
    with torch.no_grad(): layer.initial.copy_(layer.initial[:1].expand_as(layer.initial).clone())
    memory = carry(model.step(text(2, 16)).memory)
    a, b = memory.states[:, :1], memory.states[:, 1:]
    assert ((a - b).norm(dim=-1) > 1e-4 * a.norm(dim=-1)).all()


@pytest.mark.parametrize("gate", ["bias", "lstm"])
def test_the_gate_is_open(gate):
    """What a block writes is in the states by the block after it, and so is what was there before."""
    model = small(gate=gate)
    first = carry(model.step(text(4, 16)).memory)
    old, states = model.states(model.init_memory(4)), first.states
    assert ((states - old).norm(dim=(1, 2)) > .05 * old.norm(dim=(1, 2))).all()
    near = torch.nn.functional.cosine_similarity(states.flatten(1), old.flatten(1))
    assert (near > .5).all(), "half of a state is kept, at least"


def test_a_fresh_row_reads_the_learned_states():
    model = small()
    assert not model.init_memory(2).states.any()
    with torch.no_grad(): model.layers[1].initial.mul_(-3)
    other = model.step(text(2, 16)).logits
    memory = carry(model.step(text(2, 16, 1)).memory)
    close(model.step(text(2, 16), reset(memory, torch.tensor([True, True]))).logits, other)
    with torch.no_grad(): model.layers[1].initial.mul_(2)
    assert not torch.allclose(model.step(text(2, 16)).logits, other, atol=1e-6)


def test_the_gradient_reaches_the_first_of_three_blocks():
    """With `carry(grad=True)` alone: `carry` cuts it."""
    def gradient(grad):
        model, hidden = small(mem_len=0), []
        handle = model.embedding.register_forward_hook(lambda m, args, out: hidden.append(out))
        memory = None
        for i in range(3):
            out = model.step(text(2, 16, i), memory)
            memory = carry(out.memory, grad=grad)
        handle.remove()
        return torch.autograd.grad(out.logits.square().sum(), hidden[0], allow_unused=True)[0]

    assert gradient(False) is None and gradient(True).abs().min(-1).values.max() > 0


def test_states_stay_float32_in_a_bfloat16_model():
    model = small().bfloat16().eval()
    memory = model.init_memory(2)
    with torch.no_grad():
        for i in range(3): memory = carry(model.step(text(2, 16, i), memory).memory)
    assert memory.states.dtype == torch.float32 and memory.mem.dtype == torch.bfloat16
    rounded = memory.states.bfloat16().float()
    assert (memory.states != rounded).float().mean() > .5, "the states were not rounded on the way"


@pytest.mark.parametrize("options, message", [
    (dict(gate="gru"), "gate"), (dict(num_states=0), "num_states"), (dict(heads=5), "heads"),
    (dict(recurrent_layer=3), "recurrent_layer"), (dict(mem_len=-1), "mem_len")])
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message): small(**options)


def test_the_lstm_gate_begins_with_small_weights():
    """A tenth of the usual deviation (Hutchins et al. 2022), so that states change little at first."""
    model = BlockRecurrentTransformer(num_tokens=8, dim=64, depth=1, heads=2, seq_len=4,
                                      num_states=2, gate="lstm")
    std = model.layers[0].gate.to_new.weight.std()
    assert abs(std / (.1 * 128 ** -.5) - 1) < .05
