"""Greedy tokens of the demo model equal those of transformers, for both gatings, in every shape of cluster."""
import concurrent.futures
import itertools
import json
import os
import tempfile

from harness import Cluster, check, golden, main

KEYS = {"gate": ("greedy",), "pre-gate": ("pre_gate_greedy",), "hint": ("greedy",)}


def expect_golden(cluster, gating):
    """All 8 prompts at once, so that they share micro-batches."""
    cases, key = golden(), KEYS[gating][0]
    with concurrent.futures.ThreadPoolExecutor(len(cases)) as pool:
        replies = list(pool.map(lambda c: cluster.complete(c["ids"], len(c[key])), cases))
    for case, reply in zip(cases, replies):
        check(reply == case[key], f"{gating}: {case['prompt']!r}: got {reply}, expected {case[key]}")


def shape(*args, workers):
    def test():
        gating = args[args.index("--gating") + 1]
        with Cluster(*args, workers=workers) as cluster:
            expect_golden(cluster, gating)
            case = golden()[0]
            expected = case[KEYS[gating][0]]
            check(cluster.complete(case["ids"], len(expected)) == expected, "the same prompt alone gives other tokens")
            check(cluster.stream_tokens(case["ids"], len(expected)) == expected, "streamed tokens differ")
            if workers:
                check(cluster.rpc_generate(case["ids"], len(expected)) == expected, "Generate over RPC gives other tokens")
    test.__name__ = "golden_w%d_%s" % (workers, "_".join(a.strip("-") for a in args))
    return test


SHAPES = [shape("--gating", gating, workers=0) for gating in ("gate", "hint", "pre-gate")]
SHAPES += [shape("--gating", gating, "--local-steps", "off", workers=0) for gating in ("gate", "pre-gate")]
for number, (gating, (workers, replicas)) in enumerate(itertools.product(("gate", "pre-gate"), ((1, 1), (2, 1), (2, 2), (3, 1), (3, 2)))):
    placement = ("balanced", f"random:{number}")[number % 2]
    combine = ("exact", "partial")[number // 2 % 2]
    SHAPES.append(shape("--gating", gating, "--replicas", str(replicas), "--placement", placement, "--combine", combine,
                        "--micro-batches", str(1 + number % 2), "--pipeline-degree", str((0, 3, 16)[number % 3]), workers=workers))
SHAPES.append(shape("--gating", "gate", "--replicas", "2", "--transport", "zmq", workers=2))


def seeds_and_placement_files():
    """Sampled tokens depend on the seed alone, not on what else runs nor on where the experts are."""
    case = golden()[3]
    layers = [[[("w0", "w1")[(e * 7 + l) % 5 > 1]] for e in range(16)] for l in range(6)]
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump({"layers": layers}, file)
        file.flush()
        sample = {"temperature": 1.0, "top_p": 0.95, "top_k": 50}
        alone = {}
        with Cluster(workers=2) as cluster:
            for seed in range(8):
                alone[seed] = cluster.complete(case["ids"], 32, **{**sample, "seed": seed})
            check(len({tuple(t) for t in alone.values()}) > 4, "different seeds give the same tokens")
        with Cluster("--placement", file.name, workers=2) as cluster:
            shares = {w["id"]: w["experts"] for w in cluster.status()["workers"]}
            expected = sum(name == ["w0"] for layer in layers for name in layer)
            check(shares["w0"] == expected, f"the file's placement is not in use: {shares}, expected {expected} on w0")
            with concurrent.futures.ThreadPoolExecutor(8) as pool:
                together = list(pool.map(lambda seed: cluster.complete(case["ids"], 32, **{**sample, "seed": seed}), range(8)))
            check(together == list(alone.values()), "a seed gives other tokens in company")



def bfloat16_is_the_same_everywhere():
    """Within the bfloat16 profile, too, tokens do not depend on where the experts are (a GPU promises it under --deterministic alone);
    status names the profile."""
    promise = ["--deterministic"] if os.environ.get("MOESAIC_BACKEND") == "cuda" else []
    tokens = {}
    for workers in (0, 2):
        with Cluster("--dtype", "bfloat16", *promise, workers=workers) as cluster:
            tokens[workers] = [cluster.complete(case["ids"], 48) for case in golden()]
            profiles = {w["profile"].split("/")[2] for w in cluster.status()["workers"]}
            check(profiles == {"bfloat16"}, f"{workers} workers: profiles {profiles}")
    check(tokens[0] == tokens[2], "the experts' place changes tokens")


main(SHAPES + [seeds_and_placement_files, bfloat16_is_the_same_everywhere])
