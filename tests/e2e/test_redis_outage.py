"""Redis hung, dead and back empty, and rolled back, each with a worker killed in between, under load with two replicas: no failed
request, no wrong token, and the map is published again when Redis returns. Short form: 15 s outages; MOESAIC_TEST_FULL=1: 120 s."""
import json
import os
import signal
import subprocess
import threading
import time

from harness import FULL, Cluster, check, golden, main

OUTAGE_S = 120 if FULL else 15
TURNS = 4
CLIENTS = 3


class Load:
    """Clients that stream golden prompts until told to stop; any failure or wrong token is kept."""

    def __init__(self, cluster):
        self.cluster, self.cases, self.stop, self.errors, self.done = cluster, golden(), threading.Event(), [], 0
        self.threads = [threading.Thread(target=self.run, args=(i,), daemon=True) for i in range(CLIENTS)]

    def __enter__(self):
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *ignored):
        self.stop.set()
        for thread in self.threads:
            thread.join(60)

    def run(self, first):
        i = first
        while not self.stop.is_set():
            case = self.cases[i % len(self.cases)]
            i += 1
            try:
                got = self.cluster.stream_tokens(case["ids"], len(case["greedy"]))
                check(got == case["greedy"], f"{case['prompt']!r}: got {got}")
                self.done += 1
            except Exception as error:
                self.errors.append(error)
                return

    def rate(self, seconds):
        before = self.done
        time.sleep(seconds)
        return (self.done - before) / seconds

    def check(self):
        check(not self.errors, f"a client saw: {self.errors[:3]}")


def redis(cluster, *command):
    out = subprocess.run(["redis-cli", "-s", os.path.join(cluster.run_dir, "redis.sock"), *command], capture_output=True, text=True, timeout=10)
    return out.stdout.strip()


def meta(cluster):
    keys = [key for key in redis(cluster, "KEYS", "moe:*:meta").splitlines() if key]
    text = redis(cluster, "GET", keys[0]) if keys else ""
    return (keys[0], json.loads(text)) if text.startswith("{") else (None, {"epoch": 0})


def published(cluster, least=1):
    """Redis has a map of at least that epoch, and it is the one in use."""
    key, now = meta(cluster)
    return key and now["epoch"] >= least and redis(cluster, "EXISTS", key.replace(":meta", f":map:{now['epoch']}")) == "1" and \
        cluster.status()["epoch"] == now["epoch"]


def healed(cluster):
    status = cluster.status()
    return status["ready"] and status["redis"]["up"] and all(layer["min_replicas"] >= 2 for layer in status["layers"])


def kill_a_worker(cluster, index):
    os.kill(cluster.status()["workers"][index]["pid"], signal.SIGKILL)


def redis_hung():
    with Cluster("--replicas", "2", workers=3) as cluster:
        cluster.wait_for(lambda: healed(cluster) and published(cluster), "two replicas of every expert")
        with Load(cluster) as load:
            before = load.rate(3)
            pid = cluster.status()["redis"]["pid"]
            os.kill(pid, signal.SIGSTOP)
            try:
                during = load.rate(OUTAGE_S / 3)
                kill_a_worker(cluster, 1)
                after = load.rate(2 * OUTAGE_S / 3)
            finally:
                os.kill(pid, signal.SIGCONT)
            cluster.wait_for(lambda: healed(cluster) and published(cluster), "the cluster as before")
            load.check()
        load.check()
        print(f"figure: Redis hung for {OUTAGE_S} s: {before:.1f} requests/s before, {during:.1f} during, {after:.1f} after a worker's death; 0 failed")


def rate_while(cluster, load, seconds, redis_dies):
    """Requests a second, while Redis is killed again as soon as `serve` has started it, or, with the same looks at the cluster, is not;
    and how often it was killed."""
    before, until, kills = load.done, time.monotonic() + seconds, 0
    while time.monotonic() < until:
        pid = cluster.status()["redis"].get("pid")
        try:
            if pid and redis_dies:
                os.kill(pid, signal.SIGKILL)
                kills += 1
        except ProcessLookupError:
            pass
        time.sleep(0.05)
        load.check()
    return (load.done - before) / seconds, kills


def redis_dead_and_back_empty():
    with Cluster("--replicas", "2", workers=3) as cluster:
        cluster.wait_for(lambda: healed(cluster) and published(cluster), "two replicas of every expert")
        with Load(cluster) as load:
            epoch = cluster.status()["epoch"]
            rate_while(cluster, load, 2, False)  # warms up
            before, during, kills = 0.0, 0.0, 0
            for _ in range(TURNS):  # in turns, since the machine's own speed changes meanwhile
                before += rate_while(cluster, load, OUTAGE_S / 3 / TURNS, False)[0] / TURNS
                rate, killed = rate_while(cluster, load, OUTAGE_S / 3 / TURNS, True)
                during += rate / TURNS
                kills += killed
            kill_a_worker(cluster, 0)
            after, more = rate_while(cluster, load, 2 * OUTAGE_S / 3, True)
            cluster.wait_for(lambda: healed(cluster) and published(cluster, epoch), "the map in the empty Redis")
            load.check()
        load.check()
        print(f"figure: Redis killed {kills + more} times in {OUTAGE_S} s, back empty: {before:.1f} requests/s before, {during:.1f} without it "
              f"(ratio {during / before:.3f}), {after:.1f} after a worker's death; {load.done} requests, 0 failed")
        check(kills >= 2 and more >= 1, f"{kills} and {more} kills of Redis")
        check(during >= (0.99 if FULL else 0.7) * before, f"{during:.1f} requests/s without Redis, {before:.1f} with it")


def redis_rolled_back():
    with Cluster("--replicas", "2", workers=3) as cluster:
        cluster.wait_for(lambda: healed(cluster) and published(cluster), "two replicas of every expert")
        with Load(cluster) as load:
            key, old = meta(cluster)
            text = redis(cluster, "GET", key)
            kill_a_worker(cluster, 2)
            cluster.wait_for(lambda: published(cluster, old["epoch"] + 1) and healed(cluster), "a newer map")
            newer = meta(cluster)[1]["epoch"]
            redis(cluster, "SET", key, text)  # as after a failover to a replica that had not heard of it
            redis(cluster, "DEL", key.replace(":meta", f":map:{newer}"))
            cluster.wait_for(lambda: published(cluster, newer + 1), "a map above all that was known")
            load.check()
        load.check()


if __name__ == "__main__":
    main([redis_hung, redis_dead_and_back_empty, redis_rolled_back])
