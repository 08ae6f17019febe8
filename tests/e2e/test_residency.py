"""A quarter of the experts on the device: the tokens of all of them, under each gating, with the experts in the router's process and
in workers, with host memory for a part of them, cold experts copied or computed by the host; settings that cannot work are refused."""
import concurrent.futures
import os
import subprocess

from harness import BIN, DEMO, Cluster, check, free_port, golden, main

KEYS = {"gate": "greedy", "pre-gate": "pre_gate_greedy", "hint": "greedy"}


def expect_golden(cluster, gating):
    cases = golden()
    with concurrent.futures.ThreadPoolExecutor(len(cases)) as pool:
        replies = list(pool.map(lambda c: cluster.complete(c["ids"], len(c[KEYS[gating]])), cases))
    for case, reply in zip(cases, replies):
        check(reply == case[KEYS[gating]], f"{gating}: {case['prompt']!r}: got {reply}, expected {case[KEYS[gating]]}")
    alone = cases[0]
    check(cluster.complete(alone["ids"], len(alone[KEYS[gating]])) == alone[KEYS[gating]], "the same prompt alone gives other tokens")


def expect_counts(cluster, gating, workers, args):
    """Experts were copied; hints were of use. Every expert of every call counts once, as hit, late hit or miss."""
    value = {}
    for line in cluster.get("/metrics")[1].decode().splitlines():
        if line and not line.startswith("#"):
            value[line.rsplit(" ", 1)[0]] = float(line.rsplit(" ", 1)[1])
    hits, late, misses = (value['moesaic_expert_residency_total{outcome="%s"}' % o] for o in ("hit", "late_hit", "miss"))
    check(misses > 0 and value["moesaic_expert_copied_bytes_total"] > 0, f"nothing was ever missing: {hits} {late} {misses}")
    check(value["moesaic_expert_wasted_bytes_total"] <= value["moesaic_expert_copied_bytes_total"], "more wasted than copied")
    status = cluster.status()
    on_host = value["moesaic_expert_host_total"]
    check((on_host > 0) == ("host" in args or "auto" in args) and value["moesaic_expert_host_rows_total"] >= on_host, f"{args}: {on_host} experts on the host")
    check(status["residency"]["host_experts"] >= on_host, f"status: {status['residency']}")
    check(status["residency"]["misses"] >= misses and status["residency"]["copied_bytes"] > 0, f"status: {status['residency']}")
    recalls = [layer["hint_recall"] for layer in status["layers"] if "hint_recall" in layer]
    check(len(recalls) == (len(status["layers"]) - 1 if gating == "hint" else 0), f"recall by layer: {recalls}")
    check(all(0.5 < recall <= 1 for recall in recalls), f"the checkpoint's pre-gates predict better: {recalls}")
    if gating == "pre-gate" and "--host-memory" not in args:  # what must be packed first is often late
        check(misses < hits + late, f"pre-gates know what comes, and yet: {hits} hits, {late} late, {misses} misses")
    if gating == "pre-gate" and workers == 0 and "--micro-batches" not in args:  # what is announced is late at worst
        first = value["moesaic_expert_first_layer_misses_total"]
        check(misses == first, f"{misses} misses, {first} of the first layer")
    if workers == 3 and gating != "gate":
        check(value["moesaic_prefetches_total"] > 0, "no hint went to a worker without tokens")


def shape(gating, workers, *args):
    def test():
        with Cluster("--gating", gating, *args, workers=workers) as cluster:
            expect_golden(cluster, gating)
            expect_counts(cluster, gating, workers, args)
    test.__name__ = "_".join(["residency", gating, f"w{workers}", *(a.strip("-") for a in args)])
    return test


QUARTER = ("--device-memory", "25%")
SHAPES = [shape(gating, workers, *QUARTER) for gating in KEYS for workers in (0, 2)]
SHAPES += [shape(gating, 0, *QUARTER, "--local-steps", "off") for gating in ("gate", "pre-gate")]
SHAPES += [
    shape("pre-gate", 0, *QUARTER, "--micro-batches", "2"),
    shape("pre-gate", 2, *QUARTER, "--host-memory", "10%", "--combine", "partial"),
    shape("gate", 0, "--device-memory", "4%", "--host-memory", "5%", "--eviction", "lru"),
    shape("pre-gate", 3, *QUARTER),
    shape("hint", 1, "--device-memory", "60%", "--eviction", "lfu-decay", "--micro-batches", "2"),
    shape("gate", 2, *QUARTER, "--cold-experts", "host", "--combine", "partial"),
    shape("gate", 0, *QUARTER, "--cold-experts", "host", "--host-memory", "40%"),
    shape("pre-gate", 0, *QUARTER, "--cold-experts", "host"),
    shape("hint", 2, *QUARTER, "--cold-experts", "auto"),
]


def budget(workers, budget, name, *args):
    """Every reply, metrics and status say that tokens had a part of the experts alone, and what that was."""
    def test():
        with Cluster("--expert-budget", budget, *args, workers=workers) as cluster:
            cases = golden()[:3]
            for case in cases:
                _, _, reply = cluster.post("/v1/completions", {"prompt": case["ids"], "max_tokens": 40, "temperature": 0, "ignore_eos": True})
                check(reply["system_fingerprint"].endswith("-budget" + name), f"fingerprint: {reply['system_fingerprint']}")
                check(reply["usage"]["completion_tokens"] == 40, f"usage: {reply['usage']}")
            told, layers = cluster.status()["expert_budget"], cluster.status()["layers"]
            check(told["budget"] == name and told["experts"] == sum(layer["virtual_experts"] for layer in layers), f"status: {told}, {layers}")
            check(all(layer["virtual_experts"] >= 2 for layer in layers), f"a layer has less than a token needs: {layers}")
            check(0 < told["choices_held"] < 1 and 0 < told["weight_held"] < 1 and told["swaps"] > 0, f"status: {told}")
            metrics = cluster.get("/metrics")[1].decode()
            check(f"\nmoesaic_virtual_experts {told['experts']}\n" in metrics, "no moesaic_virtual_experts")
            check(cluster.status()["residency"]["hits"] > 0, "without --device-memory the budget gives the workers theirs")
    test.__name__ = f"budget_{name}_w{workers}"
    return test


def whole_budget():
    """A budget of all experts changes no token, and is said all the same."""
    with Cluster("--expert-budget", "100%", "--gating", "pre-gate", workers=2) as cluster:
        expect_golden(cluster, "pre-gate")
        shown = subprocess.run([os.path.join(BIN, "moesaic"), "status", "--url", f"http://127.0.0.1:{cluster.port}"], capture_output=True,
                               text=True, timeout=60).stdout
        check("expert budget 100: tokens are routed among 96 of 96 experts" in shown, f"status in text: {shown}")


def budgets_refused():
    for budget, says in (("12%", "at least 12.5%, or 2"), ("1", "at least 12.5%, or 2"), ("0", "--expert-budget"), ("0%", "--expert-budget"),
                         ("101%", "at most 100%"), ("17", "16 experts"), ("some", "percentage")):
        for workers in ("0", "1"):
            serve = [os.path.join(BIN, "moesaic"), "serve", DEMO, "--workers", workers, "--port", str(free_port())]
            shown = subprocess.run([*serve, "--expert-budget", budget], capture_output=True, text=True, timeout=60)
            check(shown.returncode != 0, f"{workers} workers, {budget}: accepted")
            check(says in shown.stdout + shown.stderr, f"{workers} workers, {budget}: {shown.stdout + shown.stderr}")


def refused():
    """At once, with the least that works."""
    for workers in ("0", "1"):
        serve = [os.path.join(BIN, "moesaic"), "serve", DEMO, "--workers", workers, "--port", str(free_port())]
        for args, says in ((("--device-memory", "1%"), "at least"), (("--device-memory", "1KiB"), "--device-memory"),
                           (("--device-memory", "50%", "--host-memory", "1KiB"), "--host-memory"),
                           (("--host-memory", "50%"), "--device-memory"), (("--device-memory", "many"), "percentage"),
                           (("--device-memory", "50%", "--eviction", "belady"), "belady"),
                           (("--cold-experts", "host"), "--device-memory")):
            shown = subprocess.run([*serve, *args], capture_output=True, text=True, timeout=60)
            said = shown.stdout + shown.stderr
            check(shown.returncode != 0, f"{workers} workers, {args}: accepted")
            check(says in said, f"{workers} workers, {args}: {said}")


main(SHAPES + [budget(0, "25%", "25"), budget(2, "6", "6-per-layer", "--gating", "hint"), whole_budget, budgets_refused, refused])
