"""kill -9 of workers during generations with two replicas: no failed request, no wrong token; the pause it costs is measured.

Each kill comes once all experts have two READY replicas again. Short form: 20 kills; with MOESAIC_TEST_FULL=1: 200."""
import os
import random
import signal
import threading
import time

from harness import FULL, Cluster, check, golden, main

KILLS = 200 if FULL else 20
CLIENTS = 4
MAX_PAUSE_S = 3.0  # of any token, generous: the machines that run this are shared


class Client(threading.Thread):
    """Sends golden prompts one after another and streams them, noting the longest pause between tokens."""

    def __init__(self, cluster, cases, stop):
        super().__init__(daemon=True)
        self.cluster, self.cases, self.stop = cluster, cases, stop
        self.done, self.error, self.longest_pause = 0, None, 0.0

    def run(self):
        try:
            for i in range(100000):
                if self.stop.is_set():
                    return
                case = self.cases[i % len(self.cases)]
                began = time.monotonic()
                got = self.cluster.stream_tokens(case["ids"], len(case["greedy"]), self.note_pause)
                check(got == case["greedy"], f"{case['prompt']!r}: got {got}, expected {case['greedy']} after {time.monotonic() - began:.2f} s")
                self.done += 1
        except Exception as error:
            self.error = error

    def note_pause(self, seconds):
        self.longest_pause = max(self.longest_pause, seconds)


def healed(cluster):
    status = cluster.status()
    return status["ready"] and all(layer["min_replicas"] >= 2 for layer in status["layers"]) and \
        all(w["state"] == "up" for w in status["workers"])


def kill_workers():
    rng = random.Random(20261122)
    with Cluster("--replicas", "2", workers=3) as cluster:
        cluster.wait_for(lambda: healed(cluster), "two replicas of every expert")
        stop = threading.Event()
        clients = [Client(cluster, golden(), stop) for _ in range(CLIENTS)]
        for client in clients:
            client.start()
        pauses, heals = [], []
        for _ in range(KILLS):
            time.sleep(rng.uniform(0.0, 0.4))
            victim = rng.choice(cluster.status()["workers"])
            for client in clients:
                client.longest_pause = 0.0
            began = time.monotonic()
            os.kill(victim["pid"], signal.SIGKILL)
            cluster.wait_for(lambda: all(w["pid"] != victim["pid"] for w in cluster.status()["workers"]) and healed(cluster),
                             f"a successor of {victim['id']}")
            heals.append(time.monotonic() - began)
            pauses.append(max(client.longest_pause for client in clients))
            check(not any(client.error for client in clients), f"a client saw: {[c.error for c in clients if c.error]}")
        stop.set()
        for client in clients:
            client.join(60)
            check(client.error is None, f"a client saw: {client.error}")
        done = sum(client.done for client in clients)
        check(done >= min(200, 5 * KILLS), f"only {done} generations ended")
        pauses.sort()
        print(f"figure: {KILLS} kills, {done} generations, 0 failed; longest pause of a token after a kill: median "
              f"{1000 * pauses[len(pauses) // 2]:.0f} ms, worst {1000 * pauses[-1]:.0f} ms; two replicas again after {sorted(heals)[len(heals) // 2]:.1f} s (median)")
        check(pauses[-1] < MAX_PAUSE_S, f"a token waited {pauses[-1]:.1f} s")


main([kill_workers])
