"""Workers come and go under load of two routers, and no request fails: from one to four and back to two, from two to five and back, those
that leave all at one moment; operators move, replicate, drain, take back and rebalance. Greedy tokens stay those of the golden file."""
import json
import os
import subprocess
import time

from harness import BIN, FULL, Cluster, check, main
from load import Load, Router, percentile, start_worker

TOTAL = 6 * 16  # experts of the demo model
FILL_TIMEOUT_S = 60
LEAVE_TIMEOUT_S = 60
HEAL_S = 15


def experts(cluster):
    return {w["id"]: w["experts"] for w in cluster.status()["workers"] if w["state"] in ("up", "leaving", "suspect")}


def operate(cluster, *args):
    run = subprocess.run([os.path.join(BIN, "moesaic"), *args, "--cluster", cluster.run_dir], capture_output=True, text=True, timeout=120)
    check(run.returncode == 0, f"moesaic {args}: {run.stderr}{run.stdout}")
    return run.stdout


def leave_together(workers, cluster, other, load):
    """SIGTERM to all at one moment; both routers stay ready until they are gone. Seconds."""
    began = time.monotonic()
    for worker in workers:
        worker.terminate()
    while any(worker.process.poll() is None for worker in workers):
        check(cluster.get("/readiness")[0] == 200 and other.ready(), "a router was not ready while workers left")
        check(time.monotonic() - began < LEAVE_TIMEOUT_S, f"workers did not leave within {LEAVE_TIMEOUT_S} s")
        load.check()
        time.sleep(0.05)
    check(all(worker.wait() == 0 for worker in workers), "a worker that left ended badly")
    return time.monotonic() - began


def scale_out_and_in(first, most, leaving, replicas):
    """`most` workers from `first`, then without `leaving` of them, under load of two routers."""
    options = ["--redundant-experts", "0", "--replicas", str(replicas)]
    with Cluster(*options, workers=first) as cluster:
        other, workers = Router(cluster, "r1", *options), []
        try:
            cluster.wait_for(other.ready, "the second router")
            with Load([cluster.port, other.port]) as load:
                cluster.wait_for(lambda: load.finished > 10, "load")
                began = time.monotonic()
                workers = [start_worker(cluster, f"n{i}") for i in range(most - first)]
                share = TOTAL * replicas // most // 2
                cluster.wait_for(lambda: len([n for n in experts(cluster).values() if n >= share]) == most,
                                 f"experts on {most} workers", FILL_TIMEOUT_S)
                filled = time.monotonic() - began
                load.check()
                at_most = load.finished
                left = leave_together(workers[:leaving], cluster, other, load)
                cluster.wait_for(lambda: sum(experts(cluster).values()) == TOTAL * replicas and len(experts(cluster)) == most - leaving,
                                 f"{most - leaving} workers")
                after = load.finished
                cluster.wait_for(lambda: load.finished > after + 20, "service on those that stay")
            load.check()
            check(load.passed_on == 0, f"{load.passed_on} requests were refused by a router")
            status = cluster.status()
            check(all(layer["min_replicas"] == replicas for layer in status["layers"]), status["layers"])
            check(len(status["routers"]) == 2, status["routers"])
            print(f"figure: {first} to {most} workers in {filled:.1f} s; {leaving} told to stop at one moment were gone after {left:.1f} s; load of two "
                  f"routers, R={replicas}: {load.finished} requests ({at_most} until then), 0 failed, epoch {status['epoch']}")
        finally:
            for worker in workers:
                worker.stop()
            other.stop()


def scale_1_4_2():
    scale_out_and_in(1, 4, 2, replicas=1)


def scale_2_5_2():
    scale_out_and_in(2, 5, 3, replicas=2)


def hand_over_that_is_cut_short():
    """A second signal ends two leaving workers with their experts: what only they had is loaded by others at once, not after --heal-after."""
    with Cluster("--replicas", "2", "--heal-after", "300s", workers=2) as cluster:
        workers = [start_worker(cluster, f"n{i}") for i in range(2)]
        try:
            cluster.wait_for(lambda: len([n for n in experts(cluster).values() if n >= TOTAL // 4]) == 4, "experts on four workers", FILL_TIMEOUT_S)
            for worker in workers:
                worker.terminate()
            cluster.wait_for(lambda: [w["state"] for w in cluster.status()["workers"]].count("leaving") == 2, "two that leave")
            held = sum(experts(cluster)[w.name] for w in workers)
            for worker in workers:
                worker.terminate()
            check(all(worker.wait(5) == 0 for worker in workers), "a worker that left ended badly")
            began = time.monotonic()
            cluster.wait_for(lambda: all(layer["min_replicas"] >= 2 for layer in cluster.status()["layers"]) and len(experts(cluster)) == 2,
                             "two replicas of every expert", HEAL_S)
            healed = time.monotonic() - began
            with Load([cluster.port]) as load:
                cluster.wait_for(lambda: load.finished > 10, "service")
            load.check()
            print(f"figure: two of four workers ended with {held} replicas left on them: two of everything again after {healed:.1f} s")
        finally:
            for worker in workers:
                worker.stop()


def operators_move_experts(*transport):
    """Experts are copied from worker to worker, through shared memory or over tcp with keys."""
    with Cluster("--no-auto-placement", "--copy-from", "peer", *transport, workers=3) as cluster:
        with Load([cluster.port]) as load:
            out = operate(cluster, "move", "--layer", "0", "--expert", "0", "--from", "w0", "--to", "w1", "--operation", "first")
            check("first: done" in out and "1 of 1 moves, safe to stop" in out, out)
            again = operate(cluster, "move", "--layer", "0", "--expert", "0", "--from", "w0", "--to", "w1", "--operation", "first")
            check("first: done" in again, again)
            holders = json.loads(cluster.get("/debug/experts")[1])["layers"][0]["replicas"][0]
            check(holders == ["w1"], holders)
            operate(cluster, "replicate", "--layer", "0", "--expert", "0")
            check(len(json.loads(cluster.get("/debug/experts")[1])["layers"][0]["replicas"][0]) == 2, "not replicated")
            out = operate(cluster, "drain", "w2")
            *before, last = out.strip().splitlines()
            check("done" in last and ", safe to stop" in last and all("not safe" in line for line in before), out)
            check(experts(cluster)["w2"] == 0, experts(cluster))
            check("epoch" in operate(cluster, "placement", "plan"), "no plan")
            operate(cluster, "rebalance")
            check(experts(cluster)["w2"] == 0, "a drained worker was given experts")
            out = operate(cluster, "undrain", "w2", "--operation", "back")
            last = out.strip().splitlines()[-1]
            check(last.startswith("back: done") and ", safe to stop" in last and "0 of 0" not in last, out)
            check("back: done" in operate(cluster, "undrain", "w2", "--operation", "back"), "asked again")
            check(experts(cluster)["w2"] >= TOTAL // 6, f"little came back: {experts(cluster)}")
            operations = cluster.status()["operations"]
            check([o["kind"] for o in operations] == ["move", "replicate", "drain", "rebalance", "undrain"], operations)
            check(operations[2]["state"] == "cancelled" and not operations[2]["safe_to_stop"] and operations[2]["error"] == "cancelled by back",
                  operations[2])
            bad = subprocess.run([os.path.join(BIN, "moesaic"), "drain", "w9", "--cluster", cluster.run_dir], capture_output=True, text=True)
            check(bad.returncode == 1 and "no worker is called 'w9'" in bad.stderr, bad.stderr)
            text = subprocess.run([os.path.join(BIN, "moesaic"), "status", "--url", f"http://127.0.0.1:{cluster.port}"], capture_output=True, text=True).stdout
            check("OPERATION" in text and "drain" in text, text)
            check("could not be copied" not in cluster.log_text(), "a worker fell back to its file")
        load.check()
        check(load.finished > 0, "no request ended")


def operators_move_experts_over_tcp():
    operators_move_experts("--listen", "tcp://127.0.0.1:0")


def moves_under_load():
    """One move a second, quiet and moving phases in turn: the tokens stay the same, and so does the 99th percentile of latency."""
    phases, seconds = (6, (10, 20)) if FULL else (2, (5, 5))
    with Cluster("--no-auto-placement", workers=2) as cluster:
        quiet, moving, slowest, moves = [], [], 0.0, 0
        with Load([cluster.port]) as load:
            cluster.wait_for(lambda: load.finished > 5, "load")
            for phase in range(2 * phases):
                load.clear()
                until = time.monotonic() + seconds[phase % 2]
                while time.monotonic() < until:
                    began = time.monotonic()
                    if phase % 2 == 0:
                        operate(cluster, "placement", "plan")  # the same load from the command itself
                    else:
                        layer, expert = moves % 6, (moves // 6) % 16
                        source = json.loads(cluster.get("/debug/experts")[1])["layers"][layer]["replicas"][expert][0]
                        target = "w1" if source == "w0" else "w0"
                        operate(cluster, "move", "--layer", str(layer), "--expert", str(expert), "--from", source, "--to", target)
                        slowest = max(slowest, time.monotonic() - began)
                        moves += 1
                    load.check()
                    time.sleep(max(0.0, 1.0 - (time.monotonic() - began)))
                (moving if phase % 2 else quiet).extend(load.clear())
        load.check()
        p99 = [percentile(latencies, 0.99) for latencies in (quiet, moving)]
        print(f"figure: {moves} moves, one a second, the slowest took {slowest:.2f} s; {len(quiet)} requests quiet and {len(moving)} moving, 0 failed; "
              f"p99 latency {1000 * p99[0]:.0f} and {1000 * p99[1]:.0f} ms, ratio {p99[1] / p99[0]:.2f}")
        check(moves >= phases * seconds[1] // 2, f"only {moves} moves")
        check(p99[1] <= p99[0] * (1.2 if FULL else 3.6), f"p99 latency {p99[1] / p99[0]:.2f} times the quiet one")


if __name__ == "__main__":
    main([scale_1_4_2, scale_2_5_2, hand_over_that_is_cut_short, operators_move_experts, operators_move_experts_over_tcp,
          moves_under_load])
