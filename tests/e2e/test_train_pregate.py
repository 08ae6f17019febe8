"""`moesaic train-pregate` on the demo model, its given pre-gates ignored, then eval and refusals with the file that it wrote. The short
form trains on 400 texts of valid.jsonl and measures on others; MOESAIC_PREGATE_DATA names a larger file for the full bounds."""
import json
import os
import subprocess
import tempfile

from harness import BIN, DEMO, ROOT, check, main

VALID = os.path.join(ROOT, "tests/data/valid.jsonl")
DATA = os.environ.get("MOESAIC_PREGATE_DATA")
# mean recall at 2 and at 4, recall at 4 of layer 1, loss over that of the given pre-gates
AT_LEAST = (0.86, 0.97, 0.92, 1.005) if DATA else (0.85, 0.965, 0.92, 1.01)


def moesaic(*args, timeout=900):
    return subprocess.run([os.path.join(BIN, "moesaic"), *args], capture_output=True, text=True, timeout=timeout)


def table(text):
    """Rows of numbers by name; columns: gate where it has a value, then next-gate, given, trained."""
    rows = {}
    for line in text.splitlines():
        name = line[:12].strip()
        try:
            rows[name] = [float(word) for word in line[12:].split()]
        except ValueError:
            continue
    return rows


def train_and_use():
    with tempfile.TemporaryDirectory(prefix="moesaic-e2e-") as folder:
        out = os.path.join(folder, "pre_gates.safetensors")
        data, valid = DATA or os.path.join(folder, "train.jsonl"), VALID
        if not DATA:
            with open(VALID, encoding="utf-8") as f:
                texts = f.readlines()
            valid = os.path.join(folder, "valid.jsonl")
            with open(data, "w", encoding="utf-8") as f:
                f.writelines(texts[:400])
            with open(valid, "w", encoding="utf-8") as f:
                f.writelines(texts[-80:])
        run = moesaic("train-pregate", DEMO, "--data", data, "--valid", valid, "-o", out)
        check(run.returncode == 0, f"train-pregate ended with {run.returncode}: {run.stderr[-2000:]}")
        print(run.stdout)
        rows = table(run.stdout)
        untrained, given, trained = (rows["mean"][i:i + 2] for i in (0, 2, 4))
        print(f"figure: train-pregate: recall at 2 and 4: {trained}, given {given}, untrained {untrained}; loss {rows['loss'][3]}, given {rows['loss'][2]}")
        check(trained[0] >= AT_LEAST[0] and trained[1] >= AT_LEAST[1], f"mean recall {trained}")
        check(rows["layer 1"][5] >= AT_LEAST[2], f"layer 1: {rows['layer 1']}")
        check(trained[0] > untrained[0] + 0.02, f"not much better than untrained: {rows}")
        check(rows["loss"][3] < rows["loss"][2] * AT_LEAST[3], f"loss {rows['loss']}")
        check(rows["loss"][3] < rows["loss"][1], f"no better than untrained: {rows['loss']}")
        check(sorted(os.listdir(folder)) == sorted({"pre_gates.safetensors"} | (set() if DATA else {"train.jsonl", "valid.jsonl"})),
              f"left behind: {os.listdir(folder)}")
        run = moesaic("eval", DEMO, "--data", valid, "--gating", "pre-gate", "--pre-gates", out)
        check(run.returncode == 0, f"eval ended with {run.returncode}: {run.stderr[-2000:]}")
        check(abs(json.loads(run.stdout)["loss"] - rows["loss"][3]) < 1e-4, f"eval: {run.stdout[:200]}, table: {rows['loss']}")


def refusals():
    with tempfile.TemporaryDirectory(prefix="moesaic-e2e-") as folder:
        out = os.path.join(folder, "x.safetensors")
        for args, code, what in (
                (("train-pregate", DEMO, "--data", VALID), 2, "-o FILE"),
                (("train-pregate", DEMO, "--data", VALID, "--limit", "19", "-o", out), 1, "20 texts"),
                (("train-pregate", DEMO, "--data", VALID, "--sample-memory", "1KiB", "-o", out), 1, "one token takes"),
                (("eval", DEMO, "--data", VALID, "--pre-gates", os.path.join(DEMO, "model-00001-of-00003.safetensors")), 1, "--pre-gates"),
                (("eval", DEMO, "--data", VALID, "--pre-gates", out), 1, "No such file")):
            run = moesaic(*args, timeout=60)
            check(run.returncode == code and what in run.stderr, f"{args}: {run.returncode}, {run.stderr}")
        check(os.listdir(folder) == [], f"left behind: {os.listdir(folder)}")


main([refusals, train_and_use])
