"""Traffic of one domain makes some experts hot; the hot ones change with the domain. With the controller on, the cost of placement
(DESIGN: alpha per distinct expert, beta per row) is even over four workers once it has settled, with a bounded number of moves;
traffic that alternates moves hardly anything. Short form; MOESAIC_TEST_FULL=1 runs longer."""
import json
import os
import threading
import time

from harness import FULL, ROOT, Cluster, check, main

CLIENTS = 4
DOMAINS = ("dict", "man")
SETTLE_S = 40 if FULL else 16
ALTERNATE_S = 120 if FULL else 40
OPTIONS = ["--load-half-life", "4s", "--rebalance-interval", "1s", "--rebalance-dwell", "4s"]


def texts(domain):
    with open(os.path.join(ROOT, "tests", "data", "valid.jsonl"), encoding="utf-8") as f:
        return [t["text"][:600] for t in map(json.loads, f) if t["domain"] == domain]


class Traffic:
    """Clients that complete texts of the domain that is set, as fast as they are answered."""

    def __init__(self, cluster):
        self.cluster, self.stopped, self.errors, self.done = cluster, threading.Event(), [], 0
        self.texts, self.threads = [], [threading.Thread(target=self.run, args=(i,), daemon=True) for i in range(CLIENTS)]

    def run(self, index):
        try:
            i = index
            while not self.stopped.is_set():
                status, _, reply = self.cluster.post("/v1/completions", {"prompt": self.texts[i % len(self.texts)], "max_tokens": 4, "temperature": 0})
                check(status == 200, f"HTTP {status}: {reply}")
                self.done += 1
                i += CLIENTS
        except Exception as error:
            self.errors.append(error)

    def __enter__(self):
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self.stopped.set()
        for thread in self.threads:
            thread.join(30)


def imbalance(cluster):
    """(max - mean) / mean of the cost by worker, and of the rows, on average over the layers."""
    layers = cluster.status()["layers"]
    return [sum(layer[key] - 1 for layer in layers) / len(layers) for key in ("cost_max_over_mean", "max_over_mean")]


def settle(cluster, traffic, domain):
    """Moves, imbalance after it has settled (mean of several looks), requests a second."""
    moves = cluster.status()["moves"]
    traffic.texts = texts(domain)
    if not traffic.threads[0].is_alive():
        traffic.__enter__()
    time.sleep(SETTLE_S - 4)
    done, began, looks = traffic.done, time.monotonic(), []
    for _ in range(8):
        time.sleep(0.5)
        looks.append(imbalance(cluster))
    rate = (traffic.done - done) / (time.monotonic() - began)
    check(not traffic.errors, f"a client saw: {traffic.errors}")
    return cluster.status()["moves"] - moves, [sum(look[k] for look in looks) / len(looks) for k in (0, 1)], rate


def one_run(on):
    results = {}
    with Cluster(*OPTIONS, *([] if on else ["--no-auto-placement"]), workers=4) as cluster:
        traffic = Traffic(cluster)
        try:
            for domain in DOMAINS:
                results[domain] = settle(cluster, traffic, domain)
        finally:
            traffic.__exit__()
        check(not traffic.errors, f"a client saw: {traffic.errors}")
    return results


def hot_experts_are_spread():
    off, on = one_run(False), one_run(True)
    for domain in off:
        print(f"figure: {domain}: cost (max-mean)/mean {100 * off[domain][1][0]:.0f} % off, {100 * on[domain][1][0]:.0f} % on "
              f"(rows {100 * off[domain][1][1]:.0f} %, {100 * on[domain][1][1]:.0f} %); {on[domain][0]} moves; "
              f"throughput on/off {on[domain][2] / off[domain][2]:.2f}")
        check(on[domain][1][0] <= 0.15 * (1 if FULL else 1.5), f"{domain}: {on[domain][1]} after it settled")
        check(on[domain][0] <= 6 * 16, f"{on[domain][0]} moves")
        check(off[domain][0] == 0, f"{off[domain][0]} moves with the controller off")


def alternating_traffic_does_not_thrash():
    with Cluster(workers=4) as cluster:
        traffic, both, counts = Traffic(cluster), [texts(d) for d in DOMAINS], []
        traffic.texts = both[0]
        with traffic:
            for turn in range(ALTERNATE_S // 5):
                traffic.texts = both[turn % 2]
                time.sleep(5)
                counts.append(cluster.status()["moves"])
        check(not traffic.errors, f"a client saw: {traffic.errors}")
        late = counts[-1] - counts[len(counts) // 2]
        print(f"figure: traffic alternating every 5 s for {ALTERNATE_S} s: {counts[-1]} moves, {late} of them in the second half")
        check(counts[-1] <= 6 * 16 and late <= 12, counts)


if __name__ == "__main__":
    main([hot_experts_are_spread, alternating_traffic_does_not_thrash])
