"A memory in models of transformers: the laws through the adapter, generation, training, files."
import copy
import math

import pytest
import torch
import torch.nn.functional as F

from memformers import clone, load_memory, nbytes, reset, save_memory, select
from memformers.pretrained import (MemoryCache, MemoryModel, add_memory, from_pretrained,
                                   memory_off, rotate, unrotate)

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
from transformers import AutoModelForCausalLM, DynamicCache  # noqa: E402

SIZES = dict(vocab_size=53, hidden_size=24, num_hidden_layers=3, num_attention_heads=4,
             intermediate_size=20, max_position_embeddings=32, bos_token_id=None,
             eos_token_id=None, pad_token_id=None)
FAMILIES = {
    "llama": lambda: transformers.LlamaConfig(**SIZES, num_key_value_heads=2),
    "qwen3": lambda: transformers.Qwen3Config(**SIZES, num_key_value_heads=1, head_dim=10),
    "gpt2": lambda: transformers.GPT2Config(vocab_size=53, n_embd=24, n_layer=3, n_head=4,
                                            n_positions=32, bos_token_id=None, eos_token_id=None),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(
        **SIZES, rope_parameters=dict(rope_type="default", rope_theta=1e4,
                                      partial_rotary_factor=0.7))}
SEGMENT, KNN = 7, dict(layers=(2, 3), max_memories=1000, topk=4)
TOKENS = dict(num_memory_tokens=3)
EVERY = [*FAMILIES, "llama/infini", "qwen3/infini/segment", "gpt2/infini/token",
         *(f"{family}/recurrent" for family in FAMILIES)]
each = pytest.mark.parametrize("family", EVERY)
each_store = pytest.mark.parametrize("family", FAMILIES)


def base_model(family, dtype=torch.float64, **options):
    "Random weights, large enough that attention is far from uniform."
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(FAMILIES[family](), **options).to(dtype).eval()
    for p in model.parameters():
        if p.ndim > 1: p.data.mul_(4)
    return model.requires_grad_(False)


def make(family, segment=SEGMENT, **options):
    "A model with a memory: FAMILY, FAMILY/infini/DELTA or FAMILY/recurrent."
    family, _, kind = family.partition("/")
    memory = dict(knn=KNN | options)
    if kind: memory = dict(infini=dict(layers=(2, 3), delta=kind.partition("/")[2] or None))
    if kind == "recurrent": memory = dict(recurrent=TOKENS | options)
    model = add_memory(base_model(family), segment=segment, **memory)
    torch.manual_seed(1)
    for p in model.memory_parameters().values(): p.data.normal_()
    return model


def count(family, memory):
    "How much was read into each row of a memory."
    if family.endswith("recurrent"): return memory.fill
    return memory.tokens if "/" in family else memory.written[:, 0]


def text(rows=2, n=25, seed=0):
    return torch.randint(53, (rows, n), generator=torch.Generator().manual_seed(seed))


def close(a, b): torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def differ(a, b): assert (a - b).abs().max() > 1e-3


# what the memory holds, and what is read from it

def test_rotation_is_undone():
    x, angle = torch.randn(2, 3, 5, 10), torch.rand(2, 5, 3).repeat(1, 1, 2)
    for scale in (1.0, 1.3):
        cos, sin = scale * angle.cos(), scale * angle.sin()
        torch.testing.assert_close(unrotate(rotate(x, cos, sin), cos, sin), x)


def plain_keys(model, family, x):
    "Keys of layer 2 before rotation, from the projections, (b, g, n, d)."
    found = {}
    layer = dict(model.get_decoder().named_modules())[
        {"gpt2": "h.1.attn", "gpt_neox": "layers.1.attention"}.get(family, "layers.1.self_attn")]
    name = {"llama": "k_proj", "qwen3": "k_norm", "gpt2": "c_attn"}.get(family, "query_key_value")
    handle = getattr(layer, name).register_forward_hook(lambda m, a, out: found.update(k=out))
    with memory_off(model): model(x)
    handle.remove()
    k = found["k"]
    if family == "gpt2": k = k.split(24, -1)[1]
    if family == "gpt_neox": k = k.unflatten(-1, (4, 3, -1))[:, :, :, 1].flatten(2)
    return (k if k.ndim == 4 else k.unflatten(-1, (-1, 6))).transpose(1, 2)


@each_store
def test_keys_are_stored_as_they_were_before_rotation(family):
    model, x = make(family), text(n=SEGMENT)
    cache = model.init_cache(2)
    model(x, cache=cache)
    cache.carry()
    want = plain_keys(model, family, x)
    g = want.shape[1]
    kv = cache.memory.kv[:, :g, :SEGMENT]
    # The tables of cosines are float32 inside the model.
    torch.testing.assert_close(kv[..., 0, :], want, rtol=1e-6, atol=1e-6)
    assert cache.memory.written.tolist() == [[SEGMENT] * 2 * g] * 2


@each_store
def test_reading_equals_a_naive_loop(family, monkeypatch):
    """What a layer gives, with loops over rows, heads and tokens; nearest by sorting."""
    model, x = make(family), text(n=2 * SEGMENT + 3)
    seen, reader = [], type(model.get_submodule(next(iter(model.memory_parameters()))[:-5]))
    read = reader.read
    def record(self, out, q, k, mask, scaling, far, memory, j):
        got = read(self, out, q, k, mask, scaling, far, memory, j)
        seen.append((self, out, q, k, scaling, far, clone(memory), j, got))
        return got
    monkeypatch.setattr(reader, "read", record)
    model(x)
    assert len(seen) == 6
    for self, out, q, k, scaling, far, memory, j, got in seen:
        (b, h, n, d), g = q.shape, k.shape[1]
        want = out.clone()
        for row in range(b):
            for head in range(h):
                kv = memory.kv[row, j * g + head * g // h, :memory.written[row, 0]]
                for i in range(n):
                    if not len(kv): continue
                    s = torch.stack([far[row, head, i] @ key for key in kv[:, 0]])
                    best = s.argsort(descending=True)[:4]
                    s = s[best] * scaling * self.log_scale[head].exp()
                    local = torch.stack([q[row, head, i] @ k[row, head * g // h, t]
                                         for t in range(i + 1)]) * scaling
                    share = (s.exp().sum() * self.gate[head].exp())
                    share = share / (share + local.exp().sum())
                    value = s.softmax(0) @ kv[best, 1]
                    want[row, i, head] = (1 - share) * out[row, i, head] + share * value
        close(got, want)
    differ(seen[-1][1], seen[-1][-1])


@pytest.mark.parametrize("delta", [None, "segment", "token"])
def test_reading_a_matrix_equals_a_naive_loop(delta, monkeypatch):
    """Sums over tokens in plain loops, for each head; grouped queries read the same matrix."""
    model, x = make(f"llama/infini/{delta or ''}"), text(n=2 * SEGMENT + 3)
    seen, reader = [], type(model.get_submodule(next(iter(model.memory_parameters()))[:-5]))
    read, write = reader.read, reader.write
    def record(self, out, q, k, mask, scaling, far, memory, j):
        got = read(self, out, q, k, mask, scaling, far, memory, j)
        seen.append((self, out, far, len(held), j, got))
        return got
    held = []
    monkeypatch.setattr(reader, "read", record)
    def keep(setup, memory, pairs, valid):
        held.append(pairs)
        return write(setup, memory, pairs, valid)
    cache = model.init_cache(2)
    cache.write = lambda *args: keep(model.memory_setup["infini"], *args)
    model(x, cache=cache)
    feature = lambda t: F.elu(t) + 1
    for self, out, far, segments, j, got in seen:
        want = out.clone()
        for row in range(2):
            for head in range(4):
                matrix, norm = torch.zeros(6, 6).double(), torch.zeros(6).double()
                for pairs in held[:segments]:
                    k, v = (t[row, head // 2] for t in pairs[j])
                    before = matrix.clone(), norm.clone()
                    for key, value in zip(k, v):
                        if delta == "token":
                            key = F.normalize(key, dim=0)
                            value, f = value - key @ matrix, key
                        else: f = feature(key)
                        if delta == "segment":
                            value = value - f @ before[0] / (f @ before[1] + 1e-6)
                        matrix, norm = matrix + torch.outer(f, value), norm + f
                for i, q in enumerate(far[row, head]):
                    if not segments: continue
                    found = F.normalize(q, dim=0) @ matrix if delta == "token" else \
                        feature(q) @ matrix / (feature(q) @ norm + 1e-6)
                    g = self.gate[head].sigmoid()
                    want[row, i, head] = (1 - g) * out[row, i, head] + g * found
        torch.testing.assert_close(got, want, rtol=1e-7, atol=1e-7)
    assert len(held) == 2 and len(seen) == 6
    differ(seen[-1][1], seen[-1][-1])


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_an_empty_matrix_changes_nothing(family):
    base, x = base_model(family, torch.float32), text()
    model = add_memory(copy.deepcopy(base), infini=dict(gate=0), segment=SEGMENT)
    assert torch.equal(model(x[:, :SEGMENT]).logits, base(x[:, :SEGMENT]).logits)
    with memory_off(model): assert torch.equal(model(x).logits, base(x).logits)
    sizes = set()
    for n in (8, 20, 25): sizes.add(nbytes(model(text(n=n)).cache.memory))
    assert len(sizes) == 1


@each_store
def test_a_memory_stands_at_its_distance(family, monkeypatch):
    if family == "gpt2": pytest.skip("its keys hold their positions")
    model = add_memory(base_model(family), knn=dict(layers=(1,), topk=99, distance=5), segment=6)
    x = text(n=12)
    far, reader = [], type(model.get_submodule(next(iter(model.memory_parameters()))[:-5]))
    read = reader.read
    def record(self, out, q, k, mask, scaling, f, memory, j):
        far.append((q, f))
        return read(self, out, q, k, mask, scaling, f, memory, j)
    monkeypatch.setattr(reader, "read", record)
    model(x)
    q, f = far[1]
    # The token at position 5 is 5 away from position 0. Tables of cosines are float32.
    torch.testing.assert_close(f[:, :, 5], q[:, :, 5], rtol=1e-6, atol=1e-6)
    differ(f[:, :, 4], q[:, :, 4])


# it is still the model that it was

@each_store
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_without_memory_it_is_the_base_model(family, attention):
    base = base_model(family, torch.float32, attn_implementation=attention)
    model, x = add_memory(copy.deepcopy(base), knn=KNN, segment=SEGMENT), text()
    want = base(x, labels=x, output_hidden_states=True)
    for got in (model(x[:, :SEGMENT]), model(x[:, :SEGMENT], cache=model.init_cache(2))):
        assert torch.equal(got.logits, base(x[:, :SEGMENT]).logits)
    mask = torch.ones(2, SEGMENT, dtype=torch.long)
    mask[0, :3] = 0
    assert torch.equal(model(x[:, :SEGMENT], attention_mask=mask).logits,
                       base(x[:, :SEGMENT], attention_mask=mask).logits)
    differ(model(x).logits, want.logits)
    for got in (model(x, labels=x, output_hidden_states=True, cache=DynamicCache()),):
        assert torch.equal(got.logits, want.logits) and torch.equal(got.loss, want.loss)
        assert all(map(torch.equal, got.hidden_states, want.hidden_states))
    with memory_off(model):
        assert torch.equal(model(x).logits, want.logits)
        assert torch.equal(model.generate(x, max_new_tokens=5, do_sample=False),
                           base.generate(x, max_new_tokens=5, do_sample=False))
    short = dict(max_length=SEGMENT + 1, do_sample=False)
    assert torch.equal(model.generate(x[:, :3], **short), base.generate(x[:, :3], **short))


@each_store
def test_the_loss_is_that_of_the_logits(family):
    model, x = make(family), text()
    out = model(x, labels=x, output_hidden_states=True)
    want = F.cross_entropy(out.logits[:, :-1].flatten(0, 1), x[:, 1:].flatten())
    torch.testing.assert_close(out.loss.double(), want, rtol=1e-5, atol=1e-5)
    assert {h.shape for h in out.hidden_states} == {(2, 25, 24)}
    assert model(x, return_dict=False)[0].shape == (2, 25, 53)
    for keep in (1, 4, 11, 25):
        close(model(x, logits_to_keep=keep).logits, out.logits[:, -keep:])
    embedded = model(inputs_embeds=model.get_input_embeddings()(x))
    close(embedded.logits, out.logits)


# the laws

@each
def test_one_token_at_a_time(family):
    model, x = make(family), text()
    want = model(x)
    for sizes in ([1] * 25, [3, 4, 7, 11], [10, 15]):
        cache, got = model.init_cache(2), []
        for part in x.split(sizes, 1): got.append(model(part, cache=cache).logits)
        close(torch.cat(got, 1), want.logits)
    assert (cache.past, cache.length, cache.get_seq_length()) == (21, 4, 25)


@each
def test_causal(family):
    model, x = make(family), text()
    for at in (3, 12, 20):
        changed = x.clone()
        changed[:, at] = (changed[:, at] + 1) % 53
        a, b = model(x).logits, model(changed).logits
        close(a[:, :at], b[:, :at])
        assert ((a - b)[:, -1].abs().amax(-1) > 1e-6).all()   # and the change is remembered


@each
def test_rows_are_apart(family):
    model, x = make(family), text(rows=3)
    want = model(x).logits
    for row in range(3): close(model(x[row:row + 1]).logits, want[row:row + 1])


@each
def test_padding_on_the_left(family):
    """Rows of other lengths, segment by segment, equal each row alone; padding is not written."""
    model, rows = make(family), [text(1, n, seed=n) for n in (7, 4)]
    cache, last = model.init_cache(2), []
    for seed in range(3):
        parts = [torch.cat([text(1, 7 - n, 99), row.roll(seed, 1)], 1)
                 for n, row in zip((7, 4), rows)]
        total = cache.get_seq_length() + 7
        mask = torch.ones(2, total, dtype=torch.long)
        for s in range(total // 7): mask[1, 7 * s:7 * s + 3] = 0
        positions = (mask[:, -7:].cumsum(1) - 1).clamp(min=0)
        out = model(torch.cat(parts), attention_mask=mask, position_ids=positions, cache=cache)
        cache.carry()
        last.append(out.logits)
    want = [3, 3] if family.endswith("recurrent") else [21, 12]
    assert count(family, cache.memory).tolist() == want
    for i, n in enumerate((7, 4)):
        alone = model.init_cache(1)
        for seed in range(3):
            got = model(rows[i].roll(seed, 1), cache=alone).logits
            alone.carry()
            close(got[0], last[seed][i, 7 - n:])


@each
def test_reset_select_and_files(family, tmp_path):
    model, x, y = make(family), text(rows=3), text(rows=3, seed=1)
    cache = model.init_cache(3)
    model(x, cache=cache)
    cache.carry()
    save_memory(cache.memory, tmp_path / "m.safetensors")
    kept = clone(cache.memory)
    want = model(y, cache=cache).logits
    again = lambda memory, rows=y: model(rows, cache=model.init_cache(len(rows), memory)).logits
    loaded = load_memory(tmp_path / "m.safetensors", like=model.init_memory(3))
    close(again(loaded), want)
    close(again(select(kept, [2, 0, 2]), y[[2, 0, 2]]), want[[2, 0, 2]])
    half = reset(clone(kept), torch.tensor([False, True, False]))
    got = again(half)
    close(got[[0, 2]], want[[0, 2]])
    close(got[1:2], model(y[1:2]).logits)
    differ(got[1], want[1])


@each
def test_rows_of_an_open_segment(family):
    "What beam search does with a cache, in the middle of a segment."
    model, x, y = make(family), text(rows=2, n=17), text(rows=4, n=9, seed=1)
    def opened():
        cache = model.init_cache(2)
        mask = torch.ones(2, 17, dtype=torch.long)
        mask[1, :2] = 0
        model(x, cache=cache, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0))
        return cache, mask
    def go_on(cache, mask, tokens):
        for token in tokens.split(1, 1):
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
            out = model(token, cache=cache, attention_mask=mask,
                        position_ids=(mask.cumsum(1) - 1)[:, -1:])
        return out.logits
    alone = torch.cat([go_on(*opened(), y[[i, i + 2]]) for i in (0, 1)])   # rows 0 and 1 of x
    want = {(i, row): alone[2 * i + row] for i in (0, 1) for row in (0, 1)}
    cache, mask = opened()
    cache.batch_repeat_interleave(2)
    got = go_on(cache, mask.repeat_interleave(2, 0), y[[0, 2, 1, 3]])
    close(got[0], want[0, 0])
    close(got[3], want[1, 1])
    cache, mask = opened()
    cache.reorder_cache(torch.tensor([1, 1]))
    close(go_on(cache, mask[[1, 1]], y[[0, 2]])[1], want[0, 1])
    cache, mask = opened()
    cache.batch_select_indices(torch.tensor([False, True]))
    close(go_on(cache, mask[1:], y[[2]])[0], want[0, 1])
    cache, mask = opened()
    go_on(cache, mask, y[[0, 2]][:, :3])
    cache.crop(-3)
    close(go_on(cache, mask, y[[0, 2]]), alone[:2])
    with pytest.raises(ValueError, match="forgets no token"): cache.crop(-9)
    cache.reset()
    assert not cache.get_seq_length()
    assert not count(family, cache.memory).any()


# generation

@each
@torch.no_grad()
def test_greedy_generation_is_teacher_forcing(family):
    model, x = make(family), text(n=40)   # more than the positions of the model
    got = model.generate(x, max_new_tokens=18, do_sample=False)
    assert torch.equal(model(got[:, :-1]).logits[:, 39:].argmax(-1), got[:, 40:])
    cache = model.init_cache(2)
    model(x[:, :33], cache=cache)
    for name in ("cache", "past_key_values"):
        more = model.generate(x, max_new_tokens=18, do_sample=False, **{name: copy.deepcopy(cache)})
        assert torch.equal(more, got)
    off = model.generate(x[:, :20], max_new_tokens=12, do_sample=False, cache=DynamicCache())
    on = model.generate(x[:, :20], max_new_tokens=12, do_sample=False)
    assert not torch.equal(off, on)


@each
def test_padded_prompts(family):
    """Within a segment a padded row says what it says alone; later it is cut elsewhere."""
    model, x = make(family, segment=16), text(1, 5)
    both = torch.cat([text(1, 9, seed=1), torch.cat([text(1, 4, seed=2), x], 1)])
    mask = torch.ones_like(both)
    mask[1, :4] = 0
    got = model.generate(both, attention_mask=mask, max_new_tokens=7, do_sample=False)
    assert torch.equal(got[1:, 4:], model.generate(x, max_new_tokens=7, do_sample=False))
    assert torch.equal(got[:1], model.generate(both[:1], max_new_tokens=7, do_sample=False))
    longer = model.generate(both, attention_mask=mask, max_new_tokens=30, do_sample=False)
    assert torch.equal(longer[:1], model.generate(both[:1], max_new_tokens=30, do_sample=False))


@each
def test_beams_are_scored_as_they_read(family):
    model, x = make(family), text(n=17)
    out = model.generate(x, max_new_tokens=11, num_beams=3, do_sample=False, length_penalty=0.0,
                         return_dict_in_generate=True, output_scores=True)
    logp = model(out.sequences[:, :-1]).logits.log_softmax(-1)[:, 16:]
    want = logp.gather(2, out.sequences[:, 17:, None]).sum((1, 2))
    torch.testing.assert_close(out.sequences_scores.double(), want, rtol=1e-4, atol=1e-4)
    cache = model.init_cache(2)
    model(x[:, :10], cache=cache)          # rows that are not repeated for the beams yet
    again = model.generate(x, cache=cache, max_new_tokens=11, num_beams=3, do_sample=False,
                           length_penalty=0.0)
    assert torch.equal(again, out.sequences)


def test_sampling():
    model, x = make("llama"), text(n=17)
    torch.manual_seed(3)
    got = model.generate(x, max_new_tokens=11, do_sample=True, num_return_sequences=3)
    torch.manual_seed(3)
    assert got.shape == (6, 28) and len(got.unique(dim=0)) > 2
    assert torch.equal(got, model.generate(x, max_new_tokens=11, do_sample=True,
                                           num_return_sequences=3))


# training

@each_store
def test_gradients_reach_the_new_weights_and_nothing_else(family):
    model, x = make(family), text()
    new = model.memory_parameters()
    assert all("reader" in name for name in new) and len(new) == 4
    for p in new.values(): p.requires_grad_(True)
    model(x, labels=x).loss.backward()
    # No gradient enters the store, so what the last layer adds is all that its weights change.
    # Norms are computed in float32, so the step must not be small.
    for name, p in list(new.items())[2:]:
        def loss(shift):
            p.data += shift
            value = F.cross_entropy(model(x).logits[:, :-1].flatten(0, 1), x[:, 1:].flatten())
            p.data -= shift
            return value.item()
        with torch.no_grad(): slope = (loss(1e-2) - loss(-1e-2)) / 2e-2
        assert math.isclose(p.grad.sum(), slope, rel_tol=1e-2, abs_tol=3e-5), name
    assert all(p.grad is None for name, p in model.named_parameters() if name not in new)


@pytest.mark.parametrize("memory, news", [(dict(knn=KNN), ["gate"]), (dict(recurrent=TOKENS), [
    "reader.modules_to_save.default." + name for name in ("initial", "size", "project.weight")])],
    ids=["knn", "recurrent"])
def test_trainer_lora_and_files(memory, news, tmp_path):
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import Trainer, TrainingArguments
    def fresh():
        torch.manual_seed(0)   # memory tokens begin as words drawn at random
        return add_memory(base_model("llama", torch.float32), segment=SEGMENT, **memory)
    x = [dict(input_ids=row, labels=row) for row in text(8, 22)]
    model = get_peft_model(fresh(), LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM",
                                               modules_to_save=["reader"]))
    arguments = TrainingArguments(tmp_path, max_steps=4, learning_rate=0.1, report_to=[],
                                  per_device_train_batch_size=4, use_cpu=True, save_steps=4,
                                  disable_tqdm=True)
    before = {name: p.clone() for name, p in model.named_parameters()}
    Trainer(model, arguments, train_dataset=x).train()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert all("lora" in name or "modules_to_save" in name for name in moved)
    assert all(any(part in name for name in moved) for part in ["lora", *news])
    model.eval()
    want = model(text()).logits
    assert torch.equal(PeftModel.from_pretrained(fresh(), tmp_path / "checkpoint-4").eval()(
        text()).logits, want)
    assert model.generate(text(), max_new_tokens=9).shape == (2, 34)


def test_trainer_alone_resumes(tmp_path):
    from transformers import Trainer, TrainingArguments
    x = [dict(input_ids=row, labels=row) for row in text(8, 22)]
    def run(steps, **resume):
        model = add_memory(base_model("gpt_neox", torch.float32), knn=KNN, segment=SEGMENT)
        for p in model.memory_parameters().values(): p.requires_grad_(True)
        arguments = TrainingArguments(tmp_path, max_steps=steps, learning_rate=0.1, report_to=[],
                                      per_device_train_batch_size=4, use_cpu=True, save_steps=2,
                                      disable_tqdm=True, lr_scheduler_type="constant")
        Trainer(model, arguments, train_dataset=x).train(**resume)
        return model.eval()(text()).logits
    want = run(4)
    close(run(4, resume_from_checkpoint=str(tmp_path / "checkpoint-2")), want)


def test_gradient_checkpointing_is_refused():
    model = make("llama").train()
    model.activation_checkpointing_enable()
    with pytest.raises(ValueError, match="gradient_checkpointing"): model(text())
    model.eval()(text())


# files

@each
def test_save_and_load(family, tmp_path):
    model, x = make(family), text()
    want = model(x).logits
    model.save_pretrained(tmp_path / "all")
    same = from_pretrained(tmp_path / "all", dtype=torch.float64).eval()
    assert isinstance(same, MemoryModel) and same.memory_setup == model.memory_setup
    close(same(x).logits, want)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "all", dtype=torch.float64).eval()
    assert type(plain).__name__ == type(model).__name__ and not isinstance(plain, MemoryModel)
    with memory_off(model): close(plain(x).logits, model(x).logits)
    model.save_pretrained(tmp_path / "new", base=False)
    files = sorted(path.name for path in (tmp_path / "new").iterdir())
    assert files == ["memory.json", "memory.safetensors"]
    sizes = [path.stat().st_size for path in (tmp_path / "new").iterdir()]
    assert sum(sizes) < 1500 + 8 * sum(p.numel() for p in model.memory_parameters().values())
    close(from_pretrained(tmp_path / "new", base_model(family.partition("/")[0]))(x).logits, want)


def test_a_memory_is_of_the_models_type_and_grows():
    model = add_memory(base_model("llama", torch.bfloat16), knn=KNN | dict(max_memories=10),
                       segment=SEGMENT)
    cache = model.init_cache(1)
    out = model(text(1, 36), cache=cache)
    assert isinstance(out.cache, MemoryCache) and out.logits.dtype == torch.bfloat16
    assert cache.memory.kv.shape == (1, 4, 10, 2, 6) and cache.memory.kv.dtype == torch.bfloat16
    assert nbytes(cache.memory) == 4 * (10 * 2 * 6 * 2 + 8)


def test_a_copy_is_a_model_of_its_own():
    model = make("qwen3")
    other = copy.deepcopy(model)
    for p in other.memory_parameters().values(): p.data.zero_()
    differ(model(text()).logits, other(text()).logits)


@pytest.mark.slow
def test_a_real_model_gains_from_its_memory():
    """SmolLM2-135M, fetched by the name of a package, on a repeated piece of code."""
    import sys
    from pathlib import Path
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "bench"))
    import pretrained_smollm2 as run
    tokenizer, model = run.load()
    x = run.texts(tokenizer, "test", 1024, 1)["code/tarfile.py"]
    x = torch.cat([x[:, :512], x[:, :512]], 1)
    model = add_memory(model, knn=run.KNN, segment=512)
    on, _, _ = run.read(model, x)
    off, _, _ = run.read(model, x, window=512)
    assert torch.equal(on[:, :512], off[:, :512])
    assert run.bits(on, x)[512:].mean() < 0.7 * run.bits(off, x)[512:].mean()
