"""kill -9 of workers while streams decode, with two replicas: no failed request, no wrong token; the pause that it costs is measured.

Each kill comes once every expert has two READY replicas again. The pause: the longest gap between two tokens of any stream from the
kill until then, less that stream's median gap. Short form: 20 kills; with MOESAIC_TEST_FULL=1: 200. Other numbers as an argument. A quarter of them again with layers in chunks."""
import random
import sys
import time

from harness import FULL, check, main
from nodes import Nodes, Streams, percentile, wait_for

KILLS = int(sys.argv[1]) if len(sys.argv) > 1 else 200 if FULL else 20
WORKERS = 3
CLIENTS = 4
LOOSE = 1 if FULL else 3  # the machines that run the short form are shared
MAX_P50_S, MAX_P99_S = 0.05 * LOOSE, 0.3 * LOOSE


def kill_workers(kills=KILLS, *router_args):
    rng = random.Random(20261122)
    with Nodes(WORKERS, router_args=router_args) as nodes:
        wait_for(nodes.healed, "two replicas of every expert")
        windows = []
        with Streams(nodes.routers, CLIENTS) as streams:
            wait_for(lambda: streams.done >= 2 * CLIENTS, "load")
            for _ in range(kills):
                time.sleep(rng.uniform(0.0, 0.4))
                victim = rng.choice(nodes.workers)
                old = victim.pid
                began = time.monotonic()
                victim.kill()
                victim.start()
                wait_for(lambda: nodes.healed() and all(w["pid"] != old for w in nodes.routers[0].status()["workers"]),
                         f"the successor of {victim.name}")
                windows.append((began, time.monotonic()))
                streams.check()
        streams.check()
        check(streams.done >= 5 * kills, f"only {streams.done} generations ended")
        pauses = [streams.pause(*window) for window in windows]
        heals = [ended - began for began, ended in windows]
        p50, p99 = percentile(pauses, 50), percentile(pauses, 99)
        print(f"figure: {kills} kills{''.join(f' {a}' for a in router_args)}, {streams.done} generations, 0 failed; pause p50 {1000 * p50:.0f} ms, p99 {1000 * p99:.0f} ms, worst "
              f"{1000 * max(pauses):.0f} ms; two replicas again after {percentile(heals, 50):.1f} s (median)")
        check(p50 <= MAX_P50_S and p99 <= MAX_P99_S, f"pauses {sorted(pauses)}")


def kill_workers_between_chunks():
    """Every layer in several messages to each worker, of which some are answered when it dies, some are under way, and some not sent."""
    kill_workers(KILLS // 4, "--pipeline-degree", "3")


main([kill_workers, kill_workers_between_chunks])
