"""`moesaic trace` and `moesaic train-pregate` with --backend cuda beside the CPU: what layers are given and how they route comes to the
host from the GPU. Needs a GPU."""
import json
import os
import subprocess
import sys
import tempfile

from formats import GATE, HINT, read_trace
from harness import BIN, DEMO, ROOT, check, main

VALID = os.path.join(ROOT, "tests/data/valid.jsonl")


def succeed(*args):
    run = subprocess.run([os.path.join(BIN, "moesaic"), *args], capture_output=True, text=True, timeout=600)
    check(run.returncode == 0, f"{args} ended with {run.returncode}: {run.stderr[-2000:]}")
    return run.stdout


def agreement(a, b, plane):
    """The part of the experts of trace a that trace b has in the same place of its plane."""
    same = all_of_them = 0
    for text, other in zip(a, b):
        for token, twin in zip(text[plane], other[plane]):
            for experts, others in zip(token, twin):
                same += len(set(experts) & set(others))
                all_of_them += len(experts)
    return same / all_of_them


def traces():
    with tempfile.TemporaryDirectory(prefix="moesaic-e2e-") as folder:
        read = {}
        for name, options in (("cpu", ("--backend", "cpu", "--dtype", "float32")), ("float32", ("--backend", "cuda", "--dtype", "float32")),
                              ("bfloat16", ("--backend", "cuda", "--dtype", "bfloat16"))):
            out = os.path.join(folder, name)
            succeed("trace", DEMO, "--data", VALID, "--limit", "40", "-o", out, *options)
            shape, read[name] = read_trace(out)
            check(shape == (6, 16, 2) and [len(t[GATE]) for t in read[name]] == [len(t[GATE]) for t in read["cpu"]], f"{name}: {shape}")
        for name, least in (("float32", 0.999), ("bfloat16", 0.97)):
            for plane in (GATE, HINT):
                part = agreement(read["cpu"], read[name], plane)
                print(f"figure: trace, cuda {name} beside cpu float32, plane {plane}: {part:.5f} of the experts")
                check(part > least, f"{name}, plane {plane}: {part}")


def trained():
    with tempfile.TemporaryDirectory(prefix="moesaic-e2e-") as folder:
        with open(VALID, encoding="utf-8") as f:
            texts = f.readlines()
        data, valid, tables = os.path.join(folder, "train.jsonl"), os.path.join(folder, "valid.jsonl"), {}
        for path, part in ((data, texts[:400]), (valid, texts[-80:])):
            with open(path, "w", encoding="utf-8") as f:
                f.writelines(part)
        for name, options in (("cpu", ()), ("cuda", ("--backend", "cuda")), ("large", ("--backend", "cuda", "--max-num-batched-tokens", "8192"))):
            out = os.path.join(folder, name)
            table = succeed("train-pregate", DEMO, "--data", data, "--valid", valid, "-o", out, *options)
            tables[name] = {line[:12].strip(): line[12:].split() for line in table.splitlines()}
        recall = {name: [float(x) for x in rows["mean"][4:6]] for name, rows in tables.items()}
        loss = {name: float(rows["loss"][3]) for name, rows in tables.items()}
        print(f"figure: train-pregate: recall at 2 and 4 {recall}, loss {loss}")
        for name in ("cuda", "large"):
            check(all(abs(a - b) < 0.01 for a, b in zip(recall[name], recall["cpu"])), f"recall {recall}")
            check(abs(loss[name] / loss["cpu"] - 1) < 3e-3, f"loss {loss}")
        run = json.loads(succeed("eval", DEMO, "--data", valid, "--gating", "pre-gate", "--pre-gates", os.path.join(folder, "cuda"), "--backend", "cpu"))
        check(abs(run["loss"] / loss["cuda"] - 1) < 3e-3, f"eval on the CPU: {run['loss']}, on the GPU {loss['cuda']}")


if not os.path.exists("/dev/nvidiactl"):
    print("skipped: this machine has no GPU")
    sys.exit(77)
main([traces, trained])
