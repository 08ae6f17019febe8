"""train-pregate, eval, trace and serve by pre-gates on every family's fixture, none of which has a tokenizer: with dense layers between,
shared experts, packed experts, one expert a token, one MoE layer, none. What they write is read here by the formats' rules, and recall
is counted once more from the traces."""
import json
import os
import random
import shutil
import subprocess
import tempfile

from formats import GATE, HINT, PRE_GATE, read_safetensors, read_trace, write_safetensors
from harness import BIN, ROOT, Cluster, check, main

CHECKPOINTS = os.path.join(ROOT, "tests", "data", "checkpoints")
DUMMY = ("--load-format", "dummy")
VOCAB, TEXTS, TOKENS = 320, 40, 24


def moesaic(*args):
    return subprocess.run([os.path.join(BIN, "moesaic"), *args], capture_output=True, text=True, timeout=300)


def succeed(*args):
    run = moesaic(*args)
    check(run.returncode == 0, f"{args} ended with {run.returncode}: {run.stderr[-2000:]}")
    return run.stdout


def write_data(folder):
    """Token ids with some order in them: each text walks through a few ids of its own."""
    rng, path = random.Random(1), os.path.join(folder, "data.jsonl")
    with open(path, "w", encoding="utf-8") as f:
        for _ in range(TEXTS):
            ids = [rng.randrange(3, VOCAB) for _ in range(8)]
            f.write(json.dumps({"token_ids": [rng.choice(ids) for _ in range(TOKENS)]}) + "\n")
    return path


def rows_of(table):
    rows = {}
    for line in table.splitlines():
        try:
            rows[line[:12].strip()] = [float(word) for word in line[12:].split()]
        except ValueError:
            continue
    return rows


def trace(model, data, out, moe_layers, *more):
    """Records and replays; what must hold of any trace. Returns what was read."""
    succeed("trace", model, "--data", data, "-o", out, *more)
    (layers, experts, top_k), texts = read_trace(out)
    check(layers == moe_layers and len(texts) == TEXTS and all(len(t[GATE]) == TOKENS for t in texts), f"{out}: {layers} layers, {len(texts)} texts")
    for planes in texts:
        for plane in planes:
            for token in plane:
                check(all(tuple(sorted(set(e))) == e and len(e) == top_k and e[-1] < experts for e in token), f"{out}: {token}")
        check([t[0] for t in planes[HINT]] == [t[0] for t in planes[GATE]], f"{out}: the hint for layer 0 is its gate's choice")
        if len(planes) > PRE_GATE:  # layer 1 is decided by what layer 0 is given, and that is the same
            check([t[:2] for t in planes[PRE_GATE]] == [t[:2] for t in planes[HINT]], f"{out}: pre-gates decide otherwise than they foretell")
    check(f"{TEXTS * TOKENS} tokens, 1 at once; {layers} layers of {experts} experts, top {top_k}" in succeed("trace", "replay", out), out)
    return texts


def recall_of(texts, layer):
    found = chosen = 0
    for planes in texts:
        for gate, hint in zip(planes[GATE], planes[HINT]):
            found += len(set(gate[layer]) & set(hint[layer]))
            chosen += len(gate[layer])
    return found / chosen


def loss(model, data, *more):
    return json.loads(succeed("eval", model, "--data", data, "--gating", "pre-gate", *more))["loss"]


def served(model, pre_gates, workers, more):
    with Cluster("--skip-tokenizer-init", "--gating", "pre-gate", "--pre-gates", pre_gates, *more, model=model, workers=workers) as cluster:
        return cluster.complete([5, 80, 11, 300, 42, 7, 9, 200], 12, ignore_eos=True)


def whole(model, moe_layers, folder, more):
    """moe_layers: their numbers among all layers. Returns the pre-gates' file."""
    data, out = write_data(folder), os.path.join(folder, "pre_gates.safetensors")
    table = succeed("train-pregate", model, "--data", data, "--valid", data, "--epochs", "6", "-o", out, *more)
    rows, config = rows_of(table), json.load(open(os.path.join(model, "config.json"), encoding="utf-8"))
    experts, hidden = config.get("num_experts") or config["num_local_experts"], config["hidden_size"]
    tensors = read_safetensors(out)
    check(list(tensors) == [f"model.layers.{n}.mlp.pre_gate.weight" for n in moe_layers[:-1]], f"{model}: {list(tensors)}")
    check(all((t[0], t[1]) == ("F32", [experts, hidden]) for t in tensors.values()), f"{model}: shapes")
    fits = [line.split() for line in table.splitlines() if "held-out KL" in line]
    before, after = ([float(fit[i].rstrip(",")) for fit in fits] for i in (6, 4))
    check(len(fits) == len(moe_layers) - 1 and all(a <= b for a, b in zip(after, before)) and sum(after) < sum(before), f"{model}: nothing learnt: {table}")

    untrained = trace(model, data, os.path.join(folder, "untrained.trace"), len(moe_layers), *more)
    for layer in range(1, len(moe_layers)):
        check(abs(recall_of(untrained, layer) - rows[f"layer {layer}"][0]) < 3e-3, f"{model}, layer {layer}: recall {recall_of(untrained, layer)} in the trace: {table}")
    trained = trace(model, data, os.path.join(folder, "trained.trace"), len(moe_layers), "--pre-gates", out, *more)
    for layer in range(1, len(moe_layers)):
        check(abs(recall_of(trained, layer) - rows[f"layer {layer}"][2]) < 3e-3, f"{model}, layer {layer}: recall {recall_of(trained, layer)} in the trace: {table}")

    check(abs(loss(model, data, "--pre-gates", "next-gate", *more) - rows["loss"][1]) < 1e-4, f"{model}: eval by next-gate: {table}")
    here = loss(model, data, "--pre-gates", out, "--backend", "cpu-ref", *more)
    check(abs(here / rows["loss"][2] - 1) < 1e-3, f"{model}: eval by what was written, cpu-ref: {here}: {table}")
    check(served(model, out, 2, more) == served(model, out, 0, more), f"{model}: other tokens with the experts in workers")
    return out


def family(name):
    def test():
        with tempfile.TemporaryDirectory(prefix="moesaic-e2e-") as folder:
            whole(os.path.join(CHECKPOINTS, name), [0, 1, 2], folder, ())
    test.__name__ = f"family_{name}"
    return test


def variant(folder, name, **changes):
    """A configuration alone, for generated weights."""
    with open(os.path.join(CHECKPOINTS, name, "config.json"), encoding="utf-8") as f:
        config = json.load(f)
    model = os.path.join(folder, "model")
    os.mkdir(model)
    config.pop("layer_types", None)
    with open(os.path.join(model, "config.json"), "w", encoding="utf-8") as f:
        json.dump({**config, "initializer_range": 0.15, **changes}, f)
    return model


def dense_layers_between():
    with tempfile.TemporaryDirectory(prefix="moesaic-e2e-") as folder:
        whole(variant(folder, "qwen3_moe", num_hidden_layers=6, mlp_only_layers=[0, 2, 3]), [1, 4, 5], folder, DUMMY)


def shared_experts_and_top_1():
    with tempfile.TemporaryDirectory(prefix="moesaic-e2e-") as folder:
        whole(variant(folder, "qwen2_moe", num_hidden_layers=4, decoder_sparse_step=2, num_experts_per_tok=1), [1, 3], folder, DUMMY)


def packed_experts():
    """The same weights, packed: the same pre-gates, to the byte."""
    source = os.path.join(CHECKPOINTS, "qwen2_moe")
    with tempfile.TemporaryDirectory(prefix="moesaic-e2e-") as folder:
        model, data = os.path.join(folder, "packed"), write_data(folder)
        os.mkdir(model)
        shutil.copy(os.path.join(source, "config.json"), model)
        tensors = read_safetensors(os.path.join(source, "model.safetensors"))
        for layer in range(3):
            prefix, parts = f"model.layers.{layer}.mlp.experts.", []
            take = lambda e, kind: tensors.pop(f"{prefix}{e}.{kind}_proj.weight")
            for e in range(8):
                parts.append((take(e, "gate"), take(e, "up"), take(e, "down")))
            (dtype, (width, hidden), _), _, _ = parts[0]
            tensors[prefix + "gate_up_proj"] = (dtype, [8, 2 * width, hidden], b"".join(g[2] + u[2] for g, u, _ in parts))
            tensors[prefix + "down_proj"] = (dtype, [8, hidden, width], b"".join(d[2] for _, _, d in parts))
        write_safetensors(os.path.join(model, "model.safetensors"), tensors)
        written = []
        for at, what in ((source, "plain"), (model, "packed")):
            out = os.path.join(folder, what + ".safetensors")
            succeed("train-pregate", at, "--data", data, "--epochs", "2", "-o", out)
            written.append(read_safetensors(out))
        check(written[0] == written[1], "other pre-gates where the experts are packed")


def too_few_moe_layers():
    with tempfile.TemporaryDirectory(prefix="moesaic-e2e-") as folder:
        one, data, out = variant(folder, "qwen3_moe", num_hidden_layers=2, mlp_only_layers=[0]), write_data(folder), os.path.join(folder, "out")
        texts = trace(one, data, out, 1, *DUMMY)
        check(len(texts[0]) == 2, "a trace of one MoE layer has no pre-gates")
        os.remove(out)
        for args, what in ((("train-pregate", one, "--data", data, "-o", out, *DUMMY), "two MoE layers at least; this model has 1"),
                           (("train-pregate", os.path.join(CHECKPOINTS, "llama_dense"), "--data", data, "-o", out), "two MoE layers at least; this model has 0"),
                           (("trace", os.path.join(CHECKPOINTS, "llama_dense"), "--data", data, "-o", out), "has no experts"),
                           (("eval", one, "--data", data, "--gating", "pre-gate", "--pre-gates", "next-gate", *DUMMY), "two MoE layers at least"),
                           (("eval", one, "--data", data, "--gating", "pre-gate", *DUMMY), "train-pregate")):
            run = moesaic(*args)
            check(run.returncode == 1 and what in run.stderr, f"{args}: {run.returncode}, {run.stderr}")
        check(sorted(os.listdir(folder)) == ["data.jsonl", "model"], f"left behind: {os.listdir(folder)}")


def data_that_cannot_be_used():
    model = os.path.join(CHECKPOINTS, "olmoe")
    with tempfile.TemporaryDirectory(prefix="moesaic-e2e-") as folder:
        data = os.path.join(folder, "data.jsonl")
        for line, what in (('{"text": "a text"}', "token_ids"), ('{"token_ids": [1, "2"]}', "text 1"), ('{"token_ids": [1, -2]}', "text 1"),
                           ('{"text": "a", "token_ids": [1]}', "text 1"), ("{}", "text 1"), (json.dumps({"token_ids": [VOCAB] * 9}), "vocabulary")):
            with open(data, "w", encoding="utf-8") as f:
                f.write(line + "\n")
            run = moesaic("eval", model, "--data", data)
            check(run.returncode == 1 and what in run.stderr, f"{line}: {run.returncode}, {run.stderr}")


main([*map(family, ("qwen3_moe", "qwen2_moe", "mixtral", "olmoe")), dense_layers_between, shared_experts_and_top_1, packed_experts,
      too_few_moe_layers, data_that_cannot_be_used])
