"Sharded by FSDP2 over two processes, a model learns and remembers what it does in one process."
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from mechanisms import MECHANISMS, N
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (MixedPrecisionPolicy, fully_shard,
                                    register_fsdp_forward_method)

from memformers import carry
from memformers.attention import FeedForward
from memformers.memory import fields, is_memory

# One of every class that keeps float32 states, Transformer-XL, and a store.
NAMES = ["xl", "knn_xl", "infini", "gated_delta", "associative", "block_recurrent", "neural_gate"]
CHOSEN = [m for m in MECHANISMS if m.name in NAMES]
BF16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
WHOLE = StateDictOptions(full_state_dict=True)


def numbers(rows, length, vocabulary, seed=0):
    return torch.randint(vocabulary, (rows, length), generator=torch.Generator().manual_seed(seed))


def states(memory, name=""):
    "Name, tensor, and whether the state is to stay float32."
    for f in fields(memory):
        value = getattr(memory, f.name)
        if is_memory(value): yield from states(value, f"{name}{f.name}.")
        elif isinstance(value, torch.Tensor):
            yield name + f.name, value, "full_precision" in f.metadata


EXACT = dict(rtol=1e-9, atol=1e-11)     # everything is computed in float64
TRANSFORMERS = dict(rtol=1e-5, atol=1e-6)   # their norms, rotations and losses are float32


def close(one, other, what, **options):
    torch.testing.assert_close(one, other, **options, msg=lambda text: f"{what}: {text}")


# --- what a user writes -------------------------------------------------------------------------

def shard(model, policy=MixedPrecisionPolicy(), mesh=None):
    for module in list(model.modules()):
        if isinstance(module, FeedForward): fully_shard(module, mp_policy=policy, mesh=mesh)
    fully_shard(model, mp_policy=policy, mesh=mesh)
    register_fsdp_forward_method(model, "step")
    return model


def shard_pretrained(model, policy=MixedPrecisionPolicy()):
    for layer in model.model.layers: fully_shard(layer, mp_policy=policy)
    return fully_shard(model, mp_policy=policy)


# --- one update ---------------------------------------------------------------------------------

def nll(logits, text):
    logits = logits[:, :-1].to(torch.promote_types(logits.dtype, torch.float32))
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), text[:, 1:].flatten())


def update(model, optimizer, memory, text):
    "Two segments, with a graph between them."
    loss = 0
    for i, segment in enumerate(text.split(N, 1)):
        out = model.step(segment, memory)
        memory = carry(out.memory, grad=i == 0)
        loss = loss + nll(out.logits, segment) + out.aux_loss
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.detach(), memory


def update_by_call(model, optimizer, memory, text):
    "The model as transformers calls it: a text of any length."
    out = model(input_ids=text, labels=text, memory=memory)
    optimizer.zero_grad()
    out.loss.backward()
    optimizer.step()
    return out.loss.detach(), out.memory


def update_pretrained(model, optimizer, cache, text):
    out = model(input_ids=text, labels=text, cache=cache)
    optimizer.zero_grad()
    out.loss.backward()
    optimizer.step()
    out.cache.carry()
    return out.loss.detach(), out.cache


# --- what the processes do ----------------------------------------------------------------------

def equal_to_one_process(rank, make, sharded, update, vocabulary, name, tolerance=EXACT):
    "Losses, gradients, weights and memory of two updates, in float64."
    mine, single = sharded(make()), make()
    assert any(isinstance(p, torch.distributed.tensor.DTensor) for p in mine.parameters())
    kept, rows = [None, None], slice(2 * rank, 2 * rank + 2)
    optimizers = [torch.optim.SGD(model.parameters(), 0.05) for model in (mine, single)]
    for i in range(2):
        text = numbers(4, 2 * N, vocabulary, seed=i)
        one, kept[0] = update(mine, optimizers[0], kept[0], text[rows])
        whole, kept[1] = update(single, optimizers[1], kept[1], text)
        dist.all_reduce(one)
        close(one / 2, whole, f"{name}, loss of update {i}", **tolerance)
    for (key, p), q in zip(mine.named_parameters(), single.parameters(), strict=True):
        close(p.full_tensor().detach(), q.detach(), f"{name}, {key}", **tolerance)
        if q.grad is None: continue
        close(p.grad.full_tensor(), q.grad, f"{name}, gradient of {key}", **tolerance)
    mine_memory, all_memory = (getattr(x, "memory", x) for x in kept)
    for (key, x, _), (_, y, _) in zip(states(mine_memory), states(all_memory), strict=True):
        close(x, y[rows], f"{name}, memory.{key}", **tolerance)
    return mine, single, mine_memory


def states_stay_float32(rank, make, sharded, update, vocabulary, name):
    "Under bfloat16: the types of the states, and their numbers after a first update."
    model, same = sharded(make().float(), BF16), make().bfloat16()
    optimizer, kept = torch.optim.AdamW(model.parameters(), 1e-3), None
    for i in range(2):
        text = numbers(4, 2 * N, vocabulary, seed=i)[2 * rank:2 * rank + 2]
        loss, kept = update(model, optimizer, kept, text)
        assert loss.isfinite()
        memory = getattr(kept, "memory", kept)
        for key, x, exact in states(memory):
            if not x.is_floating_point(): continue
            assert x.dtype == (torch.float32 if exact else torch.bfloat16), f"{name}, {key}"
            # It was never rounded on its way through FSDP.
            if exact: assert not x.equal(x.bfloat16().float()), f"{name}, {key}"
        if i == 0:   # nothing but the weights has been rounded
            expected = update(same, torch.optim.SGD(same.parameters(), 0.), None, text)[1]
            for (key, x, _), (_, y, _) in zip(states(memory), states(getattr(expected, "memory",
                                              expected)), strict=True):
                close(x, y, f"{name}, {key}", rtol=0, atol=0)
    for key, p in model.named_parameters():
        assert p.dtype == torch.float32 and p.full_tensor().isfinite().all(), f"{name}, {key}"


def ours(rank, folder):
    for mechanism in CHOSEN:
        make = lambda: mechanism.make().train()
        case = make, shard, update, 17, mechanism.name
        mine, single, memory = equal_to_one_process(rank, *case)
        states_stay_float32(rank, *case)
        if mechanism.name == "infini":
            states_stay_float32(rank, make, shard, update_by_call, 17, mechanism.name)
        # Afterwards: the weights of all processes, for a model in one.
        weights = get_model_state_dict(mine, options=WHOLE)
        for key, value in single.state_dict().items(): close(weights[key], value, key, **EXACT)


def pretrained(rank, folder):
    from transformers import LlamaConfig, LlamaForCausalLM

    from memformers.pretrained import add_memory, from_pretrained
    config = dict(vocab_size=31, hidden_size=16, intermediate_size=24, num_hidden_layers=3,
                  num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
                  bos_token_id=None, eos_token_id=None)
    for kind in ("knn", "infini"):
        def make():
            torch.manual_seed(0)
            model = LlamaForCausalLM(LlamaConfig(**config))
            return add_memory(model, segment=4, **{kind: dict(layers=(2, 3), gate=0.)}).double()
        case = make, shard_pretrained, update_pretrained, 31, kind
        mine, single, _ = equal_to_one_process(rank, *case, TRANSFORMERS)
        assert mine.model.layers[1].self_attn.reader.gate.grad.full_tensor().abs().min() > 0
        states_stay_float32(rank, *case)
        weights = get_model_state_dict(mine, options=WHOLE)
        if rank == 0: mine.save_pretrained(folder / kind, state_dict=weights)
        dist.barrier()
        loaded = from_pretrained(folder / kind, dtype=torch.float64)
        for key, value in single.state_dict().items():
            close(loaded.state_dict()[key], value, f"{kind}, {key}", **TRANSFORMERS)


def start(rank, folder, work):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    work(rank, folder)
    dist.destroy_process_group()


@pytest.mark.parametrize("work", [ours, pretrained])
def test_two_processes_learn_and_remember_what_one_does(work, tmp_path):
    mp.spawn(start, (tmp_path, work), nprocs=2)


# --- what is refused ----------------------------------------------------------------------------

@pytest.fixture
def mesh():
    if dist.is_initialized(): pytest.skip("another test has a process group")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize("name", NAMES)
def test_a_step_of_weights_in_shards_is_refused(name, mesh):
    mechanism = next(m for m in CHOSEN if m.name == name)
    text = numbers(2, N, 17)
    model = fully_shard(mechanism.make(), mesh=mesh)
    with pytest.raises(ValueError, match=r"register_fsdp_forward_method\(model, 'step'\)"):
        model.step(text)
    model(text)   # which it knows
    model = mechanism.make()
    for layer in model.layers: fully_shard(layer, mesh=mesh)
    with pytest.raises(ValueError, match="layers must not be sharded one by one.*FeedForward"):
        fully_shard(model, mesh=mesh)(text)


def test_a_memory_of_another_type_is_refused(mesh):
    "Outside, the weights are float32; a memory made there says how to become what is needed."
    model = shard(CHOSEN[0].make().float(), BF16, mesh)
    with pytest.raises(ValueError, match=r"cast\(memory, dtype=torch.bfloat16\)"):
        model.step(numbers(2, N, 17), model.init_memory(2))


def test_train_refuses_an_accelerate_that_shards(tmp_path, monkeypatch):
    import accelerate

    from memformers.data import Corpus
    from memformers.train import TrainOptions, train

    class Sharding(accelerate.Accelerator):
        ready = False
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.ready = True
        @property
        def distributed_type(self):
            return accelerate.DistributedType.FSDP if self.ready else super().distributed_type

    monkeypatch.setattr(accelerate, "Accelerator", Sharding)
    corpus = Corpus("a", ["b"], [b"text " * 9])
    with pytest.raises(ValueError, match="must not be configured to shard.*as FSDP does"):
        train(CHOSEN[0].cls(256, 8, 1, heads=2, seq_len=4), corpus, tmp_path,
              TrainOptions(steps=1, batch_size=1, cpu=True))
