"""What a worker that goes on living but no longer answers costs the streams that decode meanwhile, with two replicas: stopped (SIGSTOP),
hung (it answers heartbeats and computes nothing), cut off (what is sent to it, what it sends, or both do not arrive). No failed request,
no wrong token, late replies dropped, and every worker gets work again.

The pause of a fault: the longest gap between two tokens of any stream, less that stream's median gap. With arguments: only those kinds."""
import os
import random
import signal
import sys
import time

from harness import FULL, check, main
from nodes import Nodes, Streams, percentile, wait_for

FAULTS = 40 if FULL else 4  # of each kind
WORKERS = 4
FAULTS_A_CLUSTER = 12  # 3 a worker: one that stalls 5 times a minute is quarantined, and would have no work to lose
CLIENTS = 4
FAULT_S = 1.0
MAX_P99_S = 0.8 if FULL else 2.4


def stopped(nodes, i):
    nodes.workers[i].signal(signal.SIGSTOP)
    time.sleep(FAULT_S)
    nodes.workers[i].signal(signal.SIGCONT)


def hung(nodes, i):
    path = os.path.join(nodes.failpoints, f"w{i}.compute")
    with open(path, "wb"):
        time.sleep(FAULT_S)
    os.unlink(path)


def cut_off(*directions):
    def fault(nodes, i):
        nodes.forwarders[i].hold(*directions)
        time.sleep(FAULT_S)
        nodes.forwarders[i].heal()
    return fault


KINDS = {"stopped": stopped, "hung": hung, "deaf": cut_off("in"), "mute": cut_off("out"), "cut off": cut_off("in", "out")}
OVER_TCP = ("deaf", "mute", "cut off")


def run_cluster(kinds, tcp, pauses, totals):
    """One fault after another, each on the next worker, each once every worker has work again."""
    with Nodes(WORKERS, tcp=tcp) as nodes:
        router = nodes.routers[0]
        wait_for(nodes.healed, "two replicas of every expert")
        with Streams([router], CLIENTS) as streams:
            wait_for(lambda: streams.done >= 2 * CLIENTS, "load")
            windows = []
            for n, kind in enumerate(kinds):
                time.sleep(random.uniform(0.0, 0.2))
                began = time.monotonic()
                KINDS[kind](nodes, n % WORKERS)
                windows.append((kind, began, time.monotonic() + 0.2))
                wait_for(nodes.healed, f"service of w{n % WORKERS} after it was {kind}")
                streams.check()
            time.sleep(0.3)
        streams.check()
        check(streams.done > len(kinds), f"only {streams.done} requests ended")
        for kind, began, ended in windows:
            pauses[kind].append(streams.pause(began, ended))
        totals["requests"] += streams.done
        for name in ("stale_replies", "peers_suspected", "hedges_won"):
            totals[name] += router.metric(f"moesaic_{name}_total")


def run_kinds(kinds, tcp):
    pauses, totals = {kind: [] for kind in kinds}, dict.fromkeys(("requests", "stale_replies", "peers_suspected", "hedges_won"), 0)
    faults = [kind for _ in range(FAULTS) for kind in kinds]
    for at in range(0, len(faults), FAULTS_A_CLUSTER):
        run_cluster(faults[at:at + FAULTS_A_CLUSTER], tcp, pauses, totals)
    for kind in kinds:
        p50, p99 = percentile(pauses[kind], 50), percentile(pauses[kind], 99)
        print(f"figure: a worker {kind} for {FAULT_S:.0f} s, {FAULTS} times: pause p50 {1000 * p50:.0f} ms, p99 {1000 * p99:.0f} ms")
    print(f"figure: {totals['requests']} requests, 0 failed, 0 wrong tokens; {totals['stale_replies']:.0f} late replies dropped, workers suspected "
          f"{totals['peers_suspected']:.0f} times, {totals['hedges_won']:.0f} hedges won")
    check(not tcp or totals["stale_replies"] > 0, "no late reply was dropped: was anything held back?")
    for kind in kinds:
        check(percentile(pauses[kind], 99) <= MAX_P99_S, f"{kind}: pauses {sorted(pauses[kind])}")


WANTED = sys.argv[1:] or list(KINDS)


def workers_that_stall():
    run_kinds([kind for kind in WANTED if kind not in OVER_TCP], False)


def workers_cut_off():
    run_kinds([kind for kind in WANTED if kind in OVER_TCP], True)


main([test for test, tcp in ((workers_that_stall, False), (workers_cut_off, True)) if any((kind in OVER_TCP) == tcp for kind in WANTED)])
