"""Rolling restarts under load, as an upgrade does them: every worker, one after another, then every router but one, each told to stop by
SIGTERM and started again under its name once it has ended. Short form: 10^3 requests; MOESAIC_TEST_FULL=1: 10^4, in as many rounds as
they take; `test_rolling.py 100000` is the soak, of some 20 minutes. A request that a router has not begun to answer goes on to another
one, as a front does; nothing fails, every answer is right, and streams that have begun end where they began."""
import os
import signal
import sys
import time

from harness import FULL, Cluster, check, main
from load import Load, Router

REQUESTS = int(sys.argv[1]) if len(sys.argv) > 1 else 10000 if FULL else 1000
WORKERS = 3
CLIENTS = 6
MAX_TOKENS = 8
OPTIONS = ["--replicas", "2"]
WHOLE_TIMEOUT_S = 60
MOST_S = max(600, REQUESTS // 20)


def whole(cluster):
    """Every worker is up with experts, and every expert has its replicas."""
    status = cluster.status()
    up = [w for w in status["workers"] if w["state"] == "up" and w["experts"] > 0]
    return status["ready"] and len(up) == WORKERS and all(layer["min_replicas"] >= 2 for layer in status["layers"])


def replace_workers(cluster, load):
    """serve starts each again when it has handed its experts over and ended."""
    took = []
    for worker in cluster.status()["workers"]:
        began = time.monotonic()
        os.kill(worker["pid"], signal.SIGTERM)
        cluster.wait_for(lambda: all(w["pid"] != worker["pid"] for w in cluster.status()["workers"]) and whole(cluster),
                         f"worker {worker['id']} with experts again", WHOLE_TIMEOUT_S)
        took.append(time.monotonic() - began)
        load.check()
    return took


def replace_routers(cluster, routers, load):
    for i, router in enumerate(routers):
        router.stop()
        check(router.process.returncode == 0, f"router {router.name} ended with {router.process.returncode}")
        routers[i] = Router(cluster, router.name, *OPTIONS, port=router.port)
        cluster.wait_for(routers[i].ready, f"router {router.name}")
        load.check()


def everything_is_replaced():
    with Cluster(*OPTIONS, workers=WORKERS) as cluster:
        routers, took, rounds = [Router(cluster, name, *OPTIONS) for name in ("r1", "r2")], [], 0
        try:
            cluster.wait_for(lambda: whole(cluster) and all(r.ready() for r in routers), "three routers")
            with Load([cluster.port, *(r.port for r in routers)], CLIENTS, MAX_TOKENS) as load:
                began = time.monotonic()
                while rounds == 0 or (load.finished < REQUESTS and time.monotonic() - began < MOST_S):
                    took += replace_workers(cluster, load)
                    replace_routers(cluster, routers, load)
                    rounds += 1
                seconds = time.monotonic() - began
            load.check()
            check(load.finished >= REQUESTS, f"only {load.finished} requests in {seconds:.0f} s")
            check(load.passed_on > 0, "no router was ever away: the restarts proved nothing")
            print(f"figure: {rounds} rolling restarts of {WORKERS} workers and 2 of 3 routers in {seconds:.0f} s: {load.finished} requests, 0 failed, "
                  f"{load.passed_on} taken by another router; a worker was replaced in {sum(took) / len(took):.1f} s on average, {max(took):.1f} s at most")
        finally:
            for router in routers:
                router.stop()


if __name__ == "__main__":
    main([everything_is_replaced])
