"""Overload, open loop, at 2 and 5 times the capacity (10 times, too, with MOESAIC_TEST_FULL=1): what is not served is refused early
with 429 or 503, what is accepted comes right, and 5 s afterwards all is as before."""
import json
import threading
import time

from harness import FULL, Cluster, check, golden, main

FACTORS = (2, 5, 10) if FULL else (2, 5)
SECONDS = 15 if FULL else 5
CLIENTS = 4
MAX_WAITING = 4
MAX_REFUSAL_S = 3.0  # of the slowest refusal; generous, the clients share the machine with the cluster
MIN_GOODPUT = 0.9 if FULL else 0.6


def post(cluster, case, results):
    began = time.monotonic()
    try:
        status, headers, text = cluster.request("POST", "/v1/completions", {"prompt": case["ids"], "max_tokens": len(case["greedy"]),
                                                                           "temperature": 0, "return_token_ids": True}, timeout_s=60)
        right = status != 200 or json.loads(text)["choices"][0]["token_ids"] == case["greedy"]
    except OSError as error:
        status, headers, right = str(error), {}, True
    results.append((status, time.monotonic() - began, right, "Retry-After" in headers))


def capacity(cluster, cases, seconds):
    """Requests a second that clients get who wait for each answer."""
    results, until = [], time.monotonic() + seconds

    def run(first):
        i = first
        while time.monotonic() < until:
            post(cluster, cases[i % len(cases)], results)
            i += 1
    threads = [threading.Thread(target=run, args=(i,)) for i in range(CLIENTS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    check(all(status == 200 and right for status, _, right, _ in results), f"below capacity: {results[:5]}")
    return len(results) / seconds


def open_loop(cluster, cases, rate, seconds):
    results, threads, began = [], [], time.monotonic()
    for i in range(int(rate * seconds)):
        time.sleep(max(0.0, began + i / rate - time.monotonic()))
        threads.append(threading.Thread(target=post, args=(cluster, cases[i % len(cases)], results)))
        threads[-1].start()
    took = time.monotonic() - began
    for thread in threads:
        thread.join()
    return results, took


def overload():
    cases = golden()
    with Cluster("--replicas", "2", "--max-num-seqs", str(CLIENTS), "--max-waiting", str(MAX_WAITING), workers=2) as cluster:
        peak = capacity(cluster, cases, 4)
        for factor in FACTORS:
            results, took = open_loop(cluster, cases, factor * peak, SECONDS)
            served = [r for r in results if r[0] == 200]
            refused = [r for r in results if r[0] in (429, 503)]
            check(len(served) + len(refused) == len(results), f"other answers: {[r for r in results if r[0] not in (200, 429, 503)][:5]}")
            check(all(r[2] for r in served), "wrong tokens under overload")
            check(refused, f"nothing was refused at {factor} times the capacity of {peak:.1f} requests/s")
            slowest = max(r[1] for r in refused)
            goodput = len(served) / took
            time.sleep(5)
            check(capacity(cluster, cases, 2) >= 0.6 * peak, "not as before 5 s later")
            print(f"figure: {factor} x {peak:.1f} requests/s: {goodput:.1f}/s served, {len(refused)} of {len(results)} refused, slowest refusal {1000 * slowest:.0f} ms")
            check(slowest <= MAX_REFUSAL_S, f"a refusal took {slowest:.1f} s")
            check(goodput >= MIN_GOODPUT * peak, f"goodput {goodput:.1f}/s of {peak:.1f}/s")


main([overload])
