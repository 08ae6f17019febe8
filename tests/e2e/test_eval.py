"""`moesaic eval` on the whole of valid.jsonl: losses within 0.1 % of transformers' (models/demo/eval.json), for both gatings."""
import json
import os
import subprocess
import time

from harness import BIN, DEMO, ROOT, check, main


def evaluate(gating):
    with open(os.path.join(DEMO, "eval.json"), encoding="utf-8") as f:
        expected = json.load(f)[gating]
    began = time.monotonic()
    run = subprocess.run([os.path.join(BIN, "moesaic"), "eval", DEMO, "--data", os.path.join(ROOT, "tests/data/valid.jsonl"),
                          "--gating", gating], capture_output=True, text=True, timeout=1200)
    check(run.returncode == 0, f"eval ended with {run.returncode}: {run.stderr[-2000:]}")
    result = json.loads(run.stdout)
    print(f"figure: eval {gating}: loss {result['loss']:.5f} (transformers {expected['loss']:.5f}) over {result['tokens']} tokens in {time.monotonic() - began:.0f} s")
    check(result["tokens"] == expected["tokens"], f"{result['tokens']} tokens, expected {expected['tokens']}")
    check(abs(result["loss"] / expected["loss"] - 1) < 1e-3, f"loss {result['loss']}, expected {expected['loss']}")
    check(set(result["by_domain"]) == set(expected["by_domain"]), f"domains {sorted(result['by_domain'])}")
    for domain, part in expected["by_domain"].items():
        got = result["by_domain"][domain]
        check(got["tokens"] == part["tokens"], f"{domain}: {got['tokens']} tokens, expected {part['tokens']}")
        check(abs(got["loss"] - part["loss"]) < 2e-3 * part["loss"], f"{domain}: loss {got['loss']}, expected {part['loss']}")


def eval_gate():
    evaluate("gate")


def eval_pre_gate():
    evaluate("pre-gate")


main([eval_gate, eval_pre_gate])
