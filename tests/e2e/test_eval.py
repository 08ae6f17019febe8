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


def eval_bfloat16():
    """Loss of the bfloat16 profile within 0.3 % of float32's, on a sample."""
    losses = {}
    for dtype in ("float32", "bfloat16"):
        run = subprocess.run([os.path.join(BIN, "moesaic"), "eval", DEMO, "--data", os.path.join(ROOT, "tests/data/valid.jsonl"),
                              "--limit", "40", "--dtype", dtype], capture_output=True, text=True, timeout=600)
        check(run.returncode == 0, f"eval --dtype {dtype} ended with {run.returncode}: {run.stderr[-2000:]}")
        losses[dtype] = json.loads(run.stdout)["loss"]
    print(f"figure: eval, 40 texts: loss {losses['float32']:.5f} in float32, {losses['bfloat16']:.5f} in bfloat16")
    check(losses["bfloat16"] != losses["float32"], "both profiles give the same loss")
    check(abs(losses["bfloat16"] / losses["float32"] - 1) < 3e-3, f"losses {losses}")


def eval_budgets():
    """Under a budget the loss rises as the memory falls; a budget of all experts changes nothing."""
    results = {}
    for budget in (None, "100%", "50%", "4"):
        run = subprocess.run([os.path.join(BIN, "moesaic"), "eval", DEMO, "--data", os.path.join(ROOT, "tests/data/valid.jsonl"),
                              "--limit", "24", *(["--expert-budget", budget] if budget else [])], capture_output=True, text=True, timeout=600)
        check(run.returncode == 0, f"eval --expert-budget {budget} ended with {run.returncode}: {run.stderr[-2000:]}")
        results[budget] = json.loads(run.stdout)
    whole = results[None]
    check(results["100%"]["loss"] == whole["loss"] and results["100%"]["by_domain"] == whole["by_domain"], "100% of the experts differ from all")
    check("expert_budget" not in whole and whole["experts"]["device_bytes"] == whole["experts"]["bytes"], f"without a budget: {whole}")
    each = whole["experts"]["bytes"] / 96
    for budget, name, allowed in (("100%", "100", 96), ("50%", "50", 48), ("4", "4-per-layer", 24)):
        told, memory = results[budget]["expert_budget"], results[budget]["experts"]
        check(told["budget"] == name and told["experts"] == allowed and told["of"] == 96, f"{budget}: {told}")
        check(memory["bytes"] == whole["experts"]["bytes"] and memory["device_bytes"] <= (allowed + 1) * each * 1.01, f"{budget}: {memory}")
        check((told["swaps"] > 0) == (allowed < 96), f"{budget}: {told}")
        check(allowed / 96 * 0.8 < told["choices_held"] <= 1 and (told["weight_held"] == 1) == (allowed == 96), f"{budget}: {told}")
    check(whole["loss"] < results["50%"]["loss"] < results["4"]["loss"], "less memory and no more loss")


main([eval_budgets, eval_bfloat16, eval_gate, eval_pre_gate])
