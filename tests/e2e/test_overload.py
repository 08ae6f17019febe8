"""Overload, open loop, at 2, 5 and 10 times the capacity: what is not served is refused at once with 429 or 503, what is accepted comes
right and loses next to no throughput, and 5 s afterwards all is as before. The load is http_load's, so that clients leave the two cores
to the cluster."""
import json
import os
import subprocess
import time

from harness import BIN, FULL, Cluster, check, golden, main

FACTORS = (2, 5, 10) if FULL else (2, 10)
SECONDS = 15 if FULL else 4
CLIENTS = 4
MAX_WAITING = 4
MAX_REFUSAL_MS = 1000 if FULL else 3000  # of the 99th percentile
MIN_GOODPUT = 0.9 if FULL else 0.7
RECOVERY_S = 5


def write_requests(path):
    with open(path, "w", encoding="utf-8") as f:
        for case in golden():
            body = {"prompt": case["ids"], "max_tokens": len(case["greedy"]), "temperature": 0, "return_token_ids": True}
            expected = '"token_ids":' + json.dumps(case["greedy"], separators=(",", ":"))
            f.write(f"{json.dumps(body)}\t{expected}\n")


def load(cluster, rate, seconds, path):
    """http_load's counts; rate below 0: so many clients in closed loop."""
    run = subprocess.run([os.path.join(BIN, "..", "tests", "http_load"), str(cluster.port), str(rate), str(seconds), path],
                         capture_output=True, text=True, timeout=seconds + 90)
    check(run.returncode == 0, f"http_load: {run.stderr}")
    got = json.loads(run.stdout)
    check(got["other"] == 0 and got["wrong"] == 0 and got["without_retry_after"] == 0, f"answers: {got}")
    return got


def capacity(cluster, seconds, path):
    """Requests a second that clients get who wait for each answer; none is refused."""
    got = load(cluster, -CLIENTS, seconds, path)
    check(got["refused"] == 0, f"refused below the capacity: {got}")
    return got["served"] / got["seconds"]


def overload():
    with Cluster("--replicas", "2", "--max-num-seqs", str(CLIENTS), "--max-waiting", str(MAX_WAITING), workers=2) as cluster:
        path = os.path.join(cluster.dir, "requests")
        write_requests(path)
        capacity(cluster, 2, path)  # warms up
        for factor in FACTORS:
            peak = capacity(cluster, SECONDS, path)
            got = load(cluster, factor * peak, SECONDS, path)
            time.sleep(RECOVERY_S)
            after = capacity(cluster, SECONDS, path)
            goodput = got["served"] / got["seconds"] / peak
            print(f"figure: {factor} x {peak:.1f} requests/s: {100 * goodput:.0f} % of that served, {got['refused']} of {got['sent']} refused, half of "
                  f"them within {got['refused_p50_ms']:.1f} ms, 99 % within {got['refused_p99_ms']:.0f} ms; {RECOVERY_S} s later {100 * after / peak:.0f} %")
            check(got["refused"] > 0, f"nothing was refused at {factor} times the capacity")
            check(got["refused_p99_ms"] <= MAX_REFUSAL_MS, f"refusals took long: {got}")
            check(goodput >= MIN_GOODPUT, f"goodput {100 * goodput:.0f} % of the peak")
            check(after >= MIN_GOODPUT * peak, f"{after:.1f} requests/s {RECOVERY_S} s later, {peak:.1f} before")


if __name__ == "__main__":
    main([overload])
