"Recurrent memory tokens in models of transformers: an oracle, gradients, padding, snapshots, training."
import copy

import pytest
import torch
import torch.nn.functional as F

from memformers import clone, reset
from memformers.memory import replace
from memformers.pretrained import add_memory, memory_off

transformers = pytest.importorskip("transformers")
from test_pretrained import (EVERY, FAMILIES, SEGMENT, SIZES, TOKENS, base_model, close,  # noqa: E402
                             differ, make, text)

MORE = {
    "mistral": lambda: transformers.MistralConfig(**SIZES, num_key_value_heads=2,
                                                  sliding_window=None),
    "gemma": lambda: transformers.GemmaConfig(**SIZES, num_key_value_heads=1, head_dim=6),
    "opt": lambda: transformers.OPTConfig(vocab_size=53, hidden_size=24, num_hidden_layers=2,
                                          num_attention_heads=4, ffn_dim=20, word_embed_proj_dim=24,
                                          max_position_embeddings=32)}
ALL = [*FAMILIES, *MORE]
each = pytest.mark.parametrize("family", ALL)


def tokens(family, **options):
    if family in FAMILIES: return make(f"{family}/recurrent", **options)
    FAMILIES[family] = MORE[family]
    try: return make(f"{family}/recurrent", **options)
    finally: del FAMILIES[family]


def by_hand(model, embedded, memory=None):
    "Logits of one row (n, vocabulary) and the memory (R, dim): each segment as one sequence."
    w, logits = model.reader, []
    with memory_off(model):
        for x in embedded.split(SEGMENT):
            m = w.initial if memory is None else memory
            front = m[:0] if memory is None else m
            sequence = torch.cat([front, x, m])[None]
            logits.append(model(inputs_embeds=sequence).logits[0, len(front):len(front) + len(x)])
            out = model.get_decoder()(inputs_embeds=sequence).last_hidden_state[0, -len(m):]
            size = out.square().mean(-1, keepdim=True).sqrt()
            memory = w.initial + w.size * (out / size) @ w.project.weight.T
    return torch.cat(logits), memory


@each
def test_it_equals_whole_segments_by_hand(family):
    "Logits, memory and gradients of the words and of the new weights."
    model, x = tokens(family), text(n=3 * SEGMENT)
    for p in model.memory_parameters().values(): p.requires_grad_(True)
    words = model.get_input_embeddings()(x).detach()
    found = []
    for hand in (True, False):
        e = words.clone().requires_grad_(True)
        if hand:
            rows = [by_hand(model, row) for row in e]
            logits, mem = (torch.stack(parts) for parts in zip(*rows))
        else:
            cache = model.init_cache(2)
            logits = model(inputs_embeds=e, cache=cache).logits
            cache.carry()
            mem = cache.memory.mem
        loss = F.cross_entropy(logits[:, -4:].flatten(0, 1), x[:, -4:].flatten())
        grads = torch.autograd.grad(loss, [e, *model.memory_parameters().values()])
        found.append([logits, mem, *grads])
    for want, got in zip(*found): torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7)
    assert (found[0][2][:, :SEGMENT].abs().amax((1, 2)) > 1e-7).all()   # through two memories


@pytest.mark.parametrize("every, reached", [(None, [0, 1, 2, 3]), (1, [3]), (2, [2, 3]), (3, [3]),
                                            (4, [0, 1, 2, 3])])
def test_truncation(every, reached):
    "Which segments the loss of the fourth reaches: those of its group."
    model, x = tokens("llama", grad_segments=every), text(n=4 * SEGMENT)
    e = model.get_input_embeddings()(x).detach().requires_grad_(True)
    model(inputs_embeds=e).logits[:, -1].square().sum().backward()
    strength = [part.abs().max().item() for part in e.grad.split(SEGMENT, 1)]
    assert [i for i, s in enumerate(strength) if s > 0] == reached
    close(model(x).logits, tokens("llama")(x).logits)   # the outputs are the same


def test_pieces_of_a_group_can_be_trained_one_after_the_other():
    model, x = tokens("llama", grad_segments=2), text(n=4 * SEGMENT)
    for p in model.memory_parameters().values(): p.requires_grad_(True)
    def grads(pieces):
        model.zero_grad()
        cache = model.init_cache(2)
        for piece in x.split(pieces, 1):
            model(piece, cache=cache).logits.square().mean().mul(piece.shape[1]).backward()
        return [p.grad.clone() for p in model.memory_parameters().values()]
    for a, b in zip(grads(2 * SEGMENT), grads(4 * SEGMENT)): close(a, b)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_first_segment_is_that_of_the_base_model(family, attention):
    base = base_model(family, torch.float32, attn_implementation=attention)
    model, x = add_memory(copy.deepcopy(base), recurrent=TOKENS, segment=SEGMENT), text()
    first = x[:, :SEGMENT]
    mask = torch.ones_like(first)
    mask[0, :3] = 0
    for options in ({}, dict(attention_mask=mask)):
        assert torch.equal(model(first, **options).logits, base(first, **options).logits)
    with memory_off(model):
        assert torch.equal(model(x, labels=x).loss, base(x, labels=x).loss)
        assert torch.equal(model.generate(x, max_new_tokens=5, do_sample=False),
                           base.generate(x, max_new_tokens=5, do_sample=False))
    differ(model(x).logits, base(x).logits)


def test_a_row_of_padding_keeps_its_memory():
    model, x = tokens("llama"), text(rows=2, n=2 * SEGMENT)
    mask = torch.ones_like(x)
    mask[1, SEGMENT:] = 0
    cache = model.init_cache(2)
    model(x[:, :SEGMENT], cache=cache)
    cache.carry()
    before = clone(cache.memory)
    model(x[:, SEGMENT:], cache=cache, attention_mask=mask)
    cache.carry()
    close(cache.memory.mem[1], before.mem[1])
    differ(cache.memory.mem[0], before.mem[0])
    cache = model.init_cache(2)
    model(x[:, :SEGMENT], cache=cache, attention_mask=1 - mask[:, SEGMENT:])
    cache.carry()
    assert cache.memory.fill.tolist() == [0, 3]


def test_padding_is_not_written():
    "A row with padding writes what its words alone write, whatever the padding is."
    model, x = tokens("gpt2"), text(rows=1, n=4)
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1]])
    found = []
    for seed in (1, 2):
        cache = model.init_cache(1)
        model(torch.cat([text(1, 3, seed), x], 1), attention_mask=mask, cache=cache,
              position_ids=(mask.cumsum(1) - 1).clamp(min=0))
        cache.carry()
        found.append(cache.memory.mem)
    alone = model.init_cache(1)
    model(x, cache=alone)
    alone.carry()
    for mem in found: close(mem, alone.memory.mem)


def test_what_an_empty_row_holds_is_not_read():
    model, x = tokens("llama"), text(rows=2, n=SEGMENT)
    cache = model.init_cache(2)
    model(x, cache=cache)
    cache.carry()
    half = reset(cache.memory, torch.tensor([True, False]))
    dirty = replace(half, mem=half.mem + torch.tensor([9.0, 0]).double()[:, None, None])
    want = model(x, cache=model.init_cache(2, half)).logits
    close(model(x, cache=model.init_cache(2, dirty)).logits, want)
    close(want[0], model(x[:1]).logits[0])


def test_a_new_memory_says_nothing():
    "Before training all texts have the same memory."
    model = add_memory(base_model("llama"), recurrent=TOKENS, segment=SEGMENT)
    words = model.get_input_embeddings().weight
    assert all((words == m).all(1).any() for m in model.reader.initial)
    cache = model.init_cache(2)
    model(text(), cache=cache)
    close(cache.memory.mem, model.reader.initial.expand(2, -1, -1))


# snapshots, for all kinds of memory

@pytest.mark.parametrize("family", EVERY)
@pytest.mark.parametrize("at", [SEGMENT - 2, SEGMENT, 2 * SEGMENT + 3])
@torch.no_grad()
def test_a_snapshot_is_forked_and_restored_by_row(family, at):
    model, x, futures = make(family), text(rows=2, n=at), text(rows=4, n=SEGMENT + 2, seed=1)
    rows = [0, 0, 1, 1]
    want = model(torch.cat([x[rows], futures], 1)).logits[:, at:]
    cache = model.init_cache(2)
    model(x, cache=cache)
    snapshot = copy.deepcopy(cache)
    fork = copy.deepcopy(snapshot)
    fork.batch_repeat_interleave(2)
    close(model(futures, cache=fork).logits, want)
    one = copy.deepcopy(snapshot)           # rows of the snapshot, in any order
    one.batch_select_indices(torch.tensor([1, 0, 1]))
    close(model(futures[[3, 0, 2]], cache=one).logits, want[[3, 0, 2]])
    close(model(futures[[1, 3]], cache=cache).logits, want[[1, 3]])   # the original goes on
    close(model(futures[[0, 2]], cache=snapshot).logits, want[[0, 2]])   # and so does the snapshot
    fork.batch_select_indices(torch.tensor([True, False, False, True]))   # rows are left
    more = text(rows=2, n=5, seed=2)
    whole = model(torch.cat([x, futures[[0, 3]], more], 1)).logits[:, -5:]
    close(model(more, cache=fork).logits, whole)


# training

def test_trainer_alone_resumes(tmp_path):
    from transformers import Trainer, TrainingArguments
    x = [dict(input_ids=row, labels=row) for row in text(8, 22)]
    def run(steps, **resume):
        torch.manual_seed(0)
        model = add_memory(base_model("gpt_neox", torch.float32), recurrent=TOKENS, segment=SEGMENT)
        for p in model.memory_parameters().values(): p.requires_grad_(True)
        arguments = TrainingArguments(tmp_path, max_steps=steps, learning_rate=0.01, report_to=[],
                                      per_device_train_batch_size=4, use_cpu=True, save_steps=2,
                                      disable_tqdm=True, lr_scheduler_type="constant")
        Trainer(model, arguments, train_dataset=x).train(**resume)
        return model.eval()(text()).logits
    want = run(4)
    close(run(4, resume_from_checkpoint=str(tmp_path / "checkpoint-2")), want)
