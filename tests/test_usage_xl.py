"""Transformer-XL as its users call it, at their sizes, and what it refuses."""
import pytest
import torch

import memformers
from memformers import TransformerXL, carry, generate, stream


def small(**options):
    torch.manual_seed(0)
    return TransformerXL(**(dict(num_tokens=32, dim=16, depth=2, heads=2, seq_len=8, mem_len=8)
                            | options)).eval()


def test_the_documented_call():
    model = TransformerXL(num_tokens=20000, dim=512, depth=4, heads=8, seq_len=128, mem_len=256,
                          memory_layers=[3, 4])
    x1, x2 = (torch.randint(0, 20000, (1, 128)) for _ in range(2))
    with torch.no_grad():
        logits1, memories = model(x1)
        logits2, memories = model(x2, memories=memories)
    assert logits1.shape == logits2.shape == (1, 128, 20000)
    assert memories.mem.shape == (1, 2, 256, 512) and memories.fill.tolist() == [256]
    mem, fill = memories
    assert mem is memories.mem


def test_the_documented_training_loop():
    model, memories = small().train(), None
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        x = torch.arange(9).repeat(2, 1)
        logits, memories = model(x[:, :-1], memories=memories)
        loss = torch.nn.functional.cross_entropy(logits.mT, x[:, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 3


def test_top_level_names():
    for name in ("TransformerXL", "carry", "reset", "select", "clone", "nbytes", "save_memory",
                 "load_memory", "MemoryLM", "Step", "Reader", "generate", "stream",
                 "load_corpus", "ByteTokenizer"):
        assert hasattr(memformers, name), name


def test_every_option_works():
    for options in (dict(positions="t5"), dict(enhanced_recurrence=True), dict(same_length=True),
                    dict(clamp_len=4), dict(post_norm=True), dict(ff_glu=True, ff_mult=2),
                    dict(attn_dropout=.1, ff_dropout=.1, emb_dropout=.1, attn_layer_dropout=.1),
                    dict(tie_embeddings=True, emb_dim=8), dict(dim_head=6), dict(mem_len=0),
                    dict(memory_layers=[])):
        model = small(**options).train()
        logits, memories = model(torch.randint(32, (2, 8)))
        logits, memories = model(torch.randint(32, (2, 8)), memories)
        logits.sum().backward()
        assert logits.isfinite().all()
        assert all(p.grad is not None for p in model.head.parameters())


def test_dropout_is_off_in_evaluation():
    model = small(attn_dropout=.5, ff_dropout=.5, emb_dropout=.5, attn_layer_dropout=.5)
    x = torch.randint(32, (2, 8))
    assert torch.equal(model(x)[0], model(x)[0])
    model.train()
    assert not torch.equal(model(x)[0], model(x)[0])


def test_compiles_once():
    """Constant shapes: a compiled step is compiled once, whatever the memory holds."""
    model, graphs = small(), []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    step = torch.compile(lambda tokens, memory: model._segment(tokens, memory, None, model.finish),
                         backend=backend,
                         fullgraph=True)
    memory = model.init_memory(2)
    with torch.no_grad():
        for i in range(4):
            tokens = torch.randint(32, (2, 8))
            out = step(tokens, memory)
            torch.testing.assert_close(out.logits, model.step(tokens, memory).logits)
            memory = carry(out.memory)
    assert len(graphs) == 1


# generation

def test_generation_continues_the_memory():
    """A prompt read in front of generation is the same as a memory handed to it."""
    model, text = small(), torch.randint(32, (1, 24))
    memory = None
    for cut in text[:, :16].split(8, 1): memory = carry(model.step(cut, memory).memory)
    a = generate(model, text, 12, temperature=0)
    assert torch.equal(a, generate(model, text[:, 16:], 12, memory=memory, temperature=0))
    assert torch.equal(a[0], generate(model, text[0], 12, temperature=0))


def test_generated_tokens_are_the_likeliest_of_teacher_forcing():
    model, text = small(), torch.randint(32, (3, 5))
    new = generate(model, text, 20, temperature=0)
    whole, memory, logits = torch.cat([text, new], 1), None, []
    with torch.no_grad():
        for cut in whole.split(8, 1):
            out = model.step(cut, memory)
            memory = carry(out.memory)
            logits.append(out.logits)
    assert torch.equal(torch.cat(logits, 1)[:, 4:-1].argmax(-1), new)


def test_ragged_prompts_equal_each_alone():
    model, text = small(), torch.randint(32, (3, 21))
    mask = torch.arange(21) < torch.tensor([21, 3, 10])[:, None]
    together = generate(model, text, 15, mask=mask, temperature=0)
    for r in range(3):
        alone = generate(model, text[r:r + 1, :int(mask[r].sum())], 15, temperature=0)
        assert torch.equal(together[r:r + 1], alone)
    flipped = generate(model, text.flip(1), 15, mask=mask.flip(1), temperature=0)
    assert flipped.shape == (3, 15)


def test_generation_leaves_the_model_and_the_memory_alone():
    model = small(attn_dropout=.5).train()
    model.layers[0].eval()
    memory = carry(model.step(torch.randint(32, (1, 8))).memory)
    before = memory.mem.clone()
    tokens = stream(model, torch.tensor([1, 2]), 5, memory=memory)
    next(tokens)
    assert model.training and not model.layers[0].training and torch.is_grad_enabled()
    list(tokens)
    assert model.training and not model.layers[0].training
    assert torch.equal(memory.mem, before)


def test_the_stop_token_ends_each_row_by_itself():
    model = small()
    torch.nn.init.zeros_(model.head.weight)      # every token is equally likely
    out = generate(model, torch.zeros(4, 1).long(), 200, stop_token=3, pad=31,
                   generator=torch.Generator().manual_seed(0))
    for row in out.tolist():
        assert 3 in row and all(t == 31 for t in row[row.index(3) + 1:])
    assert 3 in out[:, -1].tolist() and out.shape[1] < 200


def test_filters():
    model = small()
    prompt = torch.zeros(64, 1).long()
    logits = model.step(prompt).logits[:, -1] * 5
    best = logits.argmax(-1)
    from memformers.generate import sample
    for options in (dict(temperature=0), dict(top_k=1), dict(top_p=0.0), dict(min_p=1.0),
                    dict(temperature=1e-4)):
        assert torch.equal(sample(logits, **options), best)
    few = torch.stack([sample(logits, top_k=2) for _ in range(50)])
    assert all(len(few[:, r].unique()) <= 2 for r in range(64))
    assert sample(logits[:, :5], top_k=10).shape == (64,)   # a vocabulary smaller than k


def test_filters_keep_what_they_say():
    from memformers.generate import filter_min_p, filter_top_k, filter_top_p
    logits = torch.tensor([[.1, .4, .05, .25, .2]]).log()
    kept = lambda x: x.isfinite()[0].nonzero()[:, 0].tolist()
    assert kept(filter_top_k(logits, 2)) == [1, 3]
    assert kept(filter_top_p(logits, .9)) == [0, 1, 3, 4] and kept(filter_top_p(logits, .5)) == [1, 3]
    assert kept(filter_top_p(logits, 1)) == [0, 1, 2, 3, 4] and kept(filter_top_p(logits, 0)) == [1]
    assert kept(filter_min_p(logits, .45)) == [1, 3, 4]


def test_generation_of_nothing():
    assert generate(small(), torch.tensor([[1, 2]]), 0).shape == (1, 0)


# what is refused

@pytest.mark.parametrize("options, message", [
    (dict(num_tokens=0), "num_tokens must be 1 or more"), (dict(depth=0), "depth must be"),
    (dict(heads=3), "multiple of heads"), (dict(mem_len=-1), "mem_len must be 0 or more"),
    (dict(memory_layers=[3]), "depth = 2"), (dict(memory_layers=[0]), "memory_layers"),
    (dict(memory_layers=[1, 1]), "different"), (dict(positions="alibi"), "'xl', 't5'"),
    (dict(positions="t5", clamp_len=4), "clamp_len"), (dict(dim=15, dim_head=4), "even"),
])
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message): small(**options)


@pytest.mark.parametrize("call, message", [
    (lambda m: m.step(torch.zeros(2, 9).long()), "seq_len = 8"),
    (lambda m: m.step(torch.zeros(2, 0).long()), "at least one token"),
    (lambda m: m.step(torch.zeros(8).long()), "shape \\(b, n\\)"),
    (lambda m: m.step(torch.zeros(2, 8)), "integer ids"),
    (lambda m: m.step(torch.full((2, 8), 32)), "num_tokens - 1 = 31"),
    (lambda m: m.step(torch.full((2, 8), -1)), "between 0"),
    (lambda m: m.step(torch.zeros(2, 8).long(), m.init_memory(3)), "one row for each"),
    (lambda m: m.step(torch.zeros(2, 8).long(), mask=torch.ones(2, 8)), "mask must be bool"),
    (lambda m: m.step(torch.zeros(2, 8).long(), small(dim=8).init_memory(2)), "another model"),
    (lambda m: generate(m, torch.zeros(1, 0).long(), 4), "at least one token"),
    (lambda m: generate(m, torch.zeros(1, 2).long(), 4, temperature=-1), "temperature"),
    (lambda m: generate(m, torch.zeros(1, 2).long(), 4, top_p=2), "top_p"),
    (lambda m: generate(m, torch.zeros(1, 2).long(), 4, top_k=0), "top_k"),
    (lambda m: generate(m, torch.zeros(2, 2).long(), 4,
                        mask=torch.tensor([[True, True], [False, False]])), "rows \\[1\\]"),
])
def test_bad_calls(call, message):
    with pytest.raises(ValueError, match=message): call(small())


def test_a_tuple_is_no_memory():
    with pytest.raises(TypeError, match="XLMemory"):
        small().step(torch.zeros(2, 8).long(), tuple(small().init_memory(2)))


def test_a_model_from_a_folder_is_ready_to_evaluate(tmp_path):
    model = TransformerXL(num_tokens=16, dim=8, depth=1, heads=2, seq_len=4, attn_dropout=0.5)
    assert model.training
    model.save_pretrained(tmp_path)
    assert not any(module.training for module in TransformerXL.from_pretrained(tmp_path).modules())
