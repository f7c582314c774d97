"Memories in models of transformers: models that can't have one, settings that mean nothing."
from functools import cache

import torch

from memformers.pretrained import add_memory, from_pretrained
from refusals.common import Refusal, refusals

SIZE = (0, -1, 1.5, "8", None, True, 10 ** 30)


def config(**changed):
    "A tiny Llama."
    from transformers import LlamaConfig
    return LlamaConfig(**dict(vocab_size=9, hidden_size=8, num_hidden_layers=2, pad_token_id=None,
                              num_attention_heads=2, intermediate_size=8, bos_token_id=None,
                              eos_token_id=None, max_position_embeddings=16) | changed)


def llama(**changed):
    from transformers import LlamaForCausalLM
    return LlamaForCausalLM(config(**changed))


def qwen3(**changed):
    from transformers import Qwen3Config, Qwen3ForCausalLM
    return Qwen3ForCausalLM(Qwen3Config(**config().to_diff_dict() | changed))


def opt():
    from transformers import OPTConfig, OPTForCausalLM
    return OPTForCausalLM(OPTConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, ffn_dim=8,
                                    num_attention_heads=2, max_position_embeddings=16,
                                    word_embed_proj_dim=8))


def bloom():
    from transformers import BloomConfig, BloomForCausalLM
    return BloomForCausalLM(BloomConfig(vocab_size=9, hidden_size=8, n_layer=1, n_head=2))


def t5():
    from transformers import T5Config, T5ForConditionalGeneration
    return T5ForConditionalGeneration(T5Config(vocab_size=9, d_model=8, d_kv=4, d_ff=8, num_layers=1,
                                               num_heads=2))


def recurrent(**changed): return add_memory(llama(), recurrent=dict(num_memory_tokens=2) | changed,
                                            segment=4)


def knn(**changed): return add_memory(llama(), knn=dict(layers=(1,)) | changed, segment=4)


@cache
def model(): return knn()


def twice():
    made = knn()
    add_memory(made, knn=dict(layers=(1,)), segment=4)


def trained():
    made = knn().train()
    made.activation_checkpointing_enable()
    made(text(2, 5))


def text(rows, n): return torch.zeros(rows, n, dtype=torch.long)


def another(folder):
    knn().save_pretrained(folder, base=False)
    from_pretrained(folder, add_memory_free())


def add_memory_free(): return llama(num_hidden_layers=2, num_attention_heads=4)


def other_layers(folder):
    knn(layers=(2,)).save_pretrained(folder, base=False)
    (folder / "memory.json").write_text(
        (folder / "memory.json").read_text().replace("2\n", "1\n"))
    from_pretrained(folder, llama())


ROWS = [
    Refusal("add_memory to no model", lambda: add_memory(torch.nn.Linear(2, 2), knn={}), ValueError,
            "model must be a causal language model.*Linear"),
    Refusal("add_memory to None", lambda: add_memory(None, knn={}), ValueError, "model.*NoneType"),
    Refusal("add_memory to another family", lambda: add_memory(opt(), knn=dict(layers=(1,))),
            ValueError, "families llama.*OPTForCausalLM.*attention modules"),
    Refusal("add_memory to a decoder without a head", lambda: add_memory(llama().model, knn={}),
            ValueError, "causal language model.*LlamaModel"),
    Refusal("add_memory twice", twice, ValueError, "model has a memory already"),
    Refusal("add_memory to flex attention", lambda: add_memory(
        llama(attn_implementation="flex_attention"), knn=dict(layers=(1,)), segment=4),
        ValueError, "attn_implementation"),
    Refusal("add_memory to sliding windows", lambda: add_memory(
        qwen3(use_sliding_window=True, sliding_window=4, max_window_layers=0),
        knn=dict(layers=(1,)), segment=4), ValueError, "full attention"),
    Refusal("add_memory, a segment longer than the positions", lambda: add_memory(
        llama(), knn=dict(layers=(1,)), segment=17), ValueError, "segment.*16"),
    Refusal("add_memory, an unknown setting", lambda: knn(k=3), TypeError, "no setting 'k'.*topk"),
    *refusals("add_memory", lambda **a: add_memory(llama(), **dict(knn=dict(layers=(1,))) | a),
              "segment", *SIZE),
    *refusals("add_memory", lambda knn: add_memory(llama(), knn=knn, segment=4), "knn", 3,
              [1], "layers"),
    *refusals("add_memory knn", knn, "layers", 1, (0,), (3,), (1, 1), "1", (1.5,)),
    *refusals("add_memory knn", knn, "max_memories", *SIZE),
    *refusals("add_memory knn", knn, "topk", *SIZE),
    *refusals("add_memory knn", knn, "distance", 0, -1, 1.5, "8", True),
    *refusals("add_memory knn", knn, "gate", "0", None, float("nan"), float("inf")),
    Refusal("add_memory, no memory", lambda: add_memory(llama(), segment=4), ValueError,
            "knn, infini or recurrent must be given"),
    Refusal("add_memory, two memories", lambda: add_memory(llama(), knn={}, infini={}, segment=4),
            ValueError, "knn, infini or recurrent must be given"),
    *refusals("add_memory infini", lambda **a: add_memory(llama(), infini=a, segment=4), "delta",
              "row", 1, True),
    *refusals("add_memory infini", lambda **a: add_memory(llama(), infini=a, segment=4), "gate",
              "0", None, float("nan")),
    *refusals("add_memory infini", lambda **a: add_memory(llama(), infini=a, segment=4), "layers",
              1, (0,), (3,)),
    Refusal("add_memory infini, a setting of knn", lambda: add_memory(
        llama(), infini=dict(topk=3), segment=4), TypeError, "infini has no setting 'topk'"),
    Refusal("add_memory, two memories with tokens", lambda: add_memory(
        llama(), infini={}, recurrent={}, segment=4), ValueError, "one of them only"),
    *refusals("add_memory", lambda recurrent: add_memory(llama(), recurrent=recurrent, segment=4),
              "recurrent", 3, [1], "num_memory_tokens"),
    Refusal("add_memory recurrent, an unknown setting", lambda: recurrent(layers=(1,)), TypeError,
            "recurrent has no setting 'layers'; it has num_memory_tokens"),
    *refusals("add_memory recurrent", recurrent, "num_memory_tokens", *SIZE),
    *refusals("add_memory recurrent", recurrent, "grad_segments", 0, -1, 1.5, "8", True),
    *refusals("add_memory recurrent", lambda segment: add_memory(llama(), recurrent=dict(
        num_memory_tokens=2), segment=segment), "segment", *SIZE, 13),
    Refusal("add_memory recurrent to no model", lambda: add_memory(torch.nn.Linear(2, 2), recurrent={}),
            ValueError, "model must be a causal language model.*Linear"),
    Refusal("add_memory recurrent to None", lambda: add_memory(None, recurrent={}), ValueError,
            "model.*NoneType"),
    Refusal("add_memory recurrent to a decoder without a head", lambda: add_memory(
        llama().model, recurrent={}), ValueError, "causal language model.*LlamaModel"),
    Refusal("add_memory recurrent twice", lambda: add_memory(recurrent(), recurrent={}), ValueError,
            "model has a memory already"),
    Refusal("add_memory recurrent without positions", lambda: add_memory(bloom(), recurrent={}),
            ValueError, "model must take position_ids.*BloomForCausalLM"),
    Refusal("add_memory recurrent to an encoder", lambda: add_memory(t5(), recurrent={}), ValueError,
            "causal language model.*T5"),
    Refusal("add_memory recurrent to sliding windows", lambda: add_memory(
        qwen3(use_sliding_window=True, sliding_window=4, max_window_layers=0), recurrent={}),
        ValueError, "full attention"),
    *refusals("init_memory of pretrained", lambda batch_size: model().init_memory(batch_size),
              "batch_size", *SIZE),
    Refusal("init_cache of pretrained, rows", lambda: model().init_cache(2, model().init_memory(3)),
            ValueError, "memory must have one row"),
    Refusal("init_cache of pretrained, no memory", lambda: model().init_cache(2, 3), TypeError,
            "memory must be"),
    Refusal("pretrained, rows of the cache", lambda: model()(text(3, 2), cache=model().init_cache(2)),
            ValueError, "cache must have a row"),
    Refusal("pretrained, mask of the new tokens", lambda: [
        model()(text(2, 3), cache=(cache := model().init_cache(2))),
        model()(text(2, 3), cache=cache, attention_mask=text(2, 3))], ValueError,
        r"attention_mask must be \(2, 6\)"),
    Refusal("pretrained, logits_to_keep", lambda: model()(text(2, 3), logits_to_keep=text(1, 2)[0]),
            TypeError, "logits_to_keep"),
    Refusal("pretrained, gradient checkpointing", trained, ValueError, "gradient_checkpointing"),
    Refusal("pretrained, a folder without a memory", lambda folder: from_pretrained(folder), OSError,
            "memory.json"),
    Refusal("pretrained, weights of other layers", other_layers, ValueError, "base must be"),
    Refusal("pretrained, weights of another width", another, ValueError, "base must be"),
]
