#!/usr/bin/env python3
"""A tiny random checkpoint of the family switch_decoder, and what it computes, by numpy alone: transformers has Switch Transformers'
experts (SwitchTransformersSparseMLP, SwitchTransformersTop1Router) in an encoder-decoder only, so they are written out here, in a
decoder whose attention and norms are Llama's. float64 on the bfloat16 weights.
usage: make_switch_checkpoint.py OUT_DIR   (tests/data/checkpoints/switch_decoder; the same bytes each time)"""
import json
import os
import struct
import sys

import numpy as np

HIDDEN, LAYERS, HEADS, KV_HEADS, HEAD_DIM, VOCAB = 64, 4, 4, 2, 16, 160
EXPERTS, WIDTH, DENSE, STEP, EPS, THETA = 4, 64, 64, 2, 1e-6, 10000.0
CONFIG = {
    "model_type": "switch_decoder", "hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS, "head_dim": HEAD_DIM, "intermediate_size": DENSE, "moe_intermediate_size": WIDTH,
    "num_experts": EXPERTS, "num_experts_per_tok": 1, "norm_topk_prob": False, "decoder_sparse_step": STEP, "hidden_act": "relu",
    "vocab_size": VOCAB, "max_position_embeddings": 256, "rms_norm_eps": EPS, "rope_theta": THETA, "tie_word_embeddings": True,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "torch_dtype": "bfloat16",
}


def bfloat16(x):
    """The bits of x rounded to nearest even."""
    bits = np.asarray(x, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def make_weights():
    draw = np.random.RandomState(7)
    shapes = {"model.embed_tokens.weight": (VOCAB, HIDDEN), "model.norm.weight": (HIDDEN,)}
    for layer in range(LAYERS):
        name = f"model.layers.{layer}."
        shapes[name + "input_layernorm.weight"] = shapes[name + "post_attention_layernorm.weight"] = (HIDDEN,)
        for which, rows, columns in (("q", HEADS * HEAD_DIM, HIDDEN), ("k", KV_HEADS * HEAD_DIM, HIDDEN),
                                     ("v", KV_HEADS * HEAD_DIM, HIDDEN), ("o", HIDDEN, HEADS * HEAD_DIM)):
            shapes[f"{name}self_attn.{which}_proj.weight"] = (rows, columns)
        if (layer + 1) % STEP:
            shapes[name + "mlp.wi.weight"], shapes[name + "mlp.wo.weight"] = (DENSE, HIDDEN), (HIDDEN, DENSE)
            continue
        shapes[name + "mlp.router.classifier.weight"] = (EXPERTS, HIDDEN)
        for e in range(EXPERTS):
            shapes[f"{name}mlp.experts.{e}.wi.weight"] = (WIDTH, HIDDEN)
            shapes[f"{name}mlp.experts.{e}.wo.weight"] = (HIDDEN, WIDTH)
    bits = {}
    for name, shape in shapes.items():
        scale = 0.2 if len(shape) == 1 else 0.2 if "embed" in name else 1.4 / shape[1] ** 0.5 if "mlp" in name else 0.8 / shape[1] ** 0.5
        bits[name] = bfloat16(draw.standard_normal(shape) * scale + (len(shape) == 1))
    return bits


def write_safetensors(path, bits):
    header, at = {}, 0
    for name, b in bits.items():
        header[name] = {"dtype": "BF16", "shape": list(b.shape), "data_offsets": [at, at + b.nbytes]}
        at += b.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as f:
        f.write(struct.pack("<Q", len(text)) + text)
        for b in bits.values():
            f.write(b.astype("<u2").tobytes())


def rms_norm(x, weight):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + EPS) * weight


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def rotate(x):
    """x [T, heads, d]: pairs (i, i + d/2)."""
    half = HEAD_DIM // 2
    angle = np.arange(len(x))[:, None] * THETA ** (-2 * np.arange(half) / HEAD_DIM)
    cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
    a, b = x[..., :half], x[..., half:]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


def attention(w, name, x):
    split = lambda which, heads: (x @ w[f"{name}self_attn.{which}_proj.weight"].T).reshape(len(x), heads, HEAD_DIM)
    q, k, v = rotate(split("q", HEADS)), rotate(split("k", KV_HEADS)), split("v", KV_HEADS)
    k, v = (np.repeat(t, HEADS // KV_HEADS, axis=1) for t in (k, v))
    scores = np.einsum("thd,shd->hts", q, k) / HEAD_DIM ** 0.5
    scores[:, np.triu(np.ones((len(x), len(x)), bool), 1)] = -np.inf
    return np.einsum("hts,shd->thd", softmax(scores), v).reshape(len(x), -1) @ w[name + "self_attn.o_proj.weight"].T


def dense_relu_dense(w, name, x):
    return np.maximum(x @ w[name + "wi.weight"].T, 0) @ w[name + "wo.weight"].T


def sparse_mlp(w, name, x):
    """Each token by its most probable expert, times that probability; expert_capacity is never exceeded."""
    probability = softmax(x @ w[name + "router.classifier.weight"].T)
    best = probability.argmax(-1)
    return np.stack([probability[t, e] * dense_relu_dense(w, f"{name}experts.{e}.", x[t]) for t, e in enumerate(best)]), best


def logits_of(w, ids):
    x, chosen = w["model.embed_tokens.weight"][ids], []
    for layer in range(LAYERS):
        name = f"model.layers.{layer}."
        x = x + attention(w, name, rms_norm(x, w[name + "input_layernorm.weight"]))
        normed = rms_norm(x, w[name + "post_attention_layernorm.weight"])
        if (layer + 1) % STEP:
            x = x + dense_relu_dense(w, name + "mlp.", normed)
        else:
            y, best = sparse_mlp(w, name + "mlp.", normed)
            x, chosen = x + y, chosen + [best]
    return rms_norm(x, w["model.norm.weight"]) @ w["model.embed_tokens.weight"].T, chosen


def main():
    out = sys.argv[1]
    os.makedirs(out, exist_ok=True)
    bits = make_weights()
    w = {name: (b.astype(np.uint32) << 16).view(np.float32).astype(np.float64) for name, b in bits.items()}
    ids = np.random.RandomState(3).randint(3, VOCAB, 40).tolist()
    logits, chosen = logits_of(w, ids)
    all_ids = list(ids)
    for _ in range(24):
        all_ids.append(int(logits_of(w, all_ids)[0][-1].argmax()))
    rows = {str(i): [round(x, 6) for x in logits[i].tolist()] for i in (0, 7, 15, 23, 31, 39)}
    write_safetensors(f"{out}/model.safetensors", bits)
    with open(f"{out}/config.json", "w") as f:
        f.write(json.dumps(CONFIG, indent=2) + "\n")
    with open(f"{out}/expected.json", "w") as f:
        f.write(json.dumps({"family": "switch_decoder", "arithmetic": "numpy, float64 on the bfloat16 weights", "ids": ids,
                            "logits_every_8th_position": rows, "greedy": all_ids[40:]}) + "\n")
    margins = np.sort(logits, -1)[:, -1] - np.sort(logits, -1)[:, -2]
    print("logits' deviation", logits.std(), "least margin", margins.min(), "rows of experts",
          [np.bincount(c, minlength=EXPERTS).tolist() for c in chosen], "greedy", all_ids[40:])


main()
