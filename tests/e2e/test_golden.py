"""Greedy tokens of the demo model equal those of transformers, for both gatings, in every shape of cluster."""
import concurrent.futures
import itertools

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
for number, (gating, (workers, replicas)) in enumerate(itertools.product(("gate", "pre-gate"), ((1, 1), (2, 1), (2, 2), (3, 1), (3, 2)))):
    placement = ("balanced", f"random:{number}")[number % 2]
    combine = ("exact", "partial")[number // 2 % 2]
    SHAPES.append(shape("--gating", gating, "--replicas", str(replicas), "--placement", placement, "--combine", combine,
                        "--micro-batches", str(1 + number % 2), workers=workers))

main(SHAPES)
