"""Workers come and go under load, and no request fails: from one worker to four and back to two, with two routers; operators move,
replicate, drain and rebalance. Greedy tokens stay those of the golden file."""
import json
import os
import signal
import subprocess
import threading
import time

from harness import BIN, FULL, Cluster, check, free_port, golden, main

CLIENTS = 3
FILL_TIMEOUT_S = 60


class Process:
    """A `moesaic worker` or `moesaic router` beside a cluster, started and stopped by its id."""

    def __init__(self, cluster, name, *args):
        self.name = name
        self.log = open(os.path.join(cluster.dir, f"{name}.log"), "wb")
        self.process = subprocess.Popen([os.path.join(BIN, "moesaic"), *args, "--id", name], stdout=self.log, stderr=subprocess.STDOUT)

    def stop(self, timeout_s=40):
        """SIGTERM; how long it took to leave."""
        began = time.monotonic()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(timeout_s)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
                raise AssertionError(f"{self.name} did not leave within {timeout_s} s")
        self.log.close()
        return time.monotonic() - began


class Client(threading.Thread):
    """Golden prompts one after another, against one router after another."""

    def __init__(self, clusters, stop, first):
        super().__init__(daemon=True)
        self.clusters, self.stopped, self.first = clusters, stop, first
        self.done, self.error = 0, None

    def run(self):
        cases = golden()
        try:
            for i in range(self.first, 1000000):
                if self.stopped.is_set():
                    return
                case = cases[i % len(cases)]
                cluster = self.clusters[i % len(self.clusters)]
                got = cluster.complete(case["ids"], len(case["greedy"]))
                check(got == case["greedy"], f"{case['prompt']!r}: got {got}, expected {case['greedy']}")
                self.done += 1
        except Exception as error:
            self.error = error


class Load:
    def __init__(self, clusters):
        self.stopped = threading.Event()
        self.clients = [Client(clusters, self.stopped, i) for i in range(CLIENTS)]

    def __enter__(self):
        for client in self.clients:
            client.start()
        return self

    def __exit__(self, *_):
        self.stopped.set()
        for client in self.clients:
            client.join(60)

    def check(self):
        errors = [c.error for c in self.clients if c.error]
        check(not errors, f"a client saw: {errors}")

    def done(self):
        return sum(c.done for c in self.clients)


class OtherRouter:
    """A second router's HTTP API, as the harness's methods see it."""
    request, get, post, complete, status = Cluster.request, Cluster.get, Cluster.post, Cluster.complete, Cluster.status

    def __init__(self, port):
        self.port = port


def start_worker(cluster, name, *args):
    return Process(cluster, name, "worker", "--cluster", cluster.run_dir, "--threads", "1", *args)


def experts(cluster):
    return {w["id"]: w["experts"] for w in cluster.status()["workers"] if w["state"] in ("up", "leaving", "suspect")}


def operate(cluster, *args):
    run = subprocess.run([os.path.join(BIN, "moesaic"), *args, "--cluster", cluster.run_dir], capture_output=True, text=True, timeout=120)
    check(run.returncode == 0, f"moesaic {args}: {run.stderr}{run.stdout}")
    return run.stdout


def scale_out_and_in():
    total = 6 * 16
    with Cluster("--redundant-experts", "0", workers=1) as cluster:
        with open(os.path.join(cluster.run_dir, "cluster.json"), encoding="utf-8") as f:
            file = json.load(f)
        port = free_port()
        second = Process(cluster, "r1", "router", file["model"], "--store", file["redis"], "--listen",
                         f"ipc://{cluster.run_dir}/r1.sock", "--port", str(port), "--threads", "1", "--redundant-experts", "0")
        other = OtherRouter(port)
        workers = {}
        try:
            cluster.wait_for(lambda: other.get("/readiness")[0] == 200, "the second router")
            with Load([cluster, other]) as load:
                cluster.wait_for(lambda: load.done() > 10, "load")
                began = time.monotonic()
                for name in ("n1", "n2", "n3"):
                    workers[name] = start_worker(cluster, name)
                cluster.wait_for(lambda: len([n for n in experts(cluster).values() if n >= total // 8]) == 4,
                                 "experts on four workers", FILL_TIMEOUT_S)
                filled = time.monotonic() - began
                load.check()
                at_four = load.done()
                # Two leave, one of them the worker that was there first: what they hold goes to the others before they end.
                left = [workers.pop("n2").stop(), workers.pop("n3").stop()]
                load.check()
                cluster.wait_for(lambda: sum(experts(cluster).values()) == total and len(experts(cluster)) == 2, "two workers")
                load.check()
                after = load.done()
                cluster.wait_for(lambda: load.done() > after + 20, "service on two workers")
                load.check()
            load.check()
            status = cluster.status()
            check(all(layer["min_replicas"] == 1 for layer in status["layers"]), status["layers"])
            check(len(status["routers"]) == 2, status["routers"])
            print(f"figure: 1 to 4 workers in {filled:.1f} s, two of four left in {left[0]:.1f} and {left[1]:.1f} s under load of two routers; "
                  f"{load.done()} requests ({at_four} until then), 0 failed, epoch {status['epoch']}")
        finally:
            for worker in workers.values():
                worker.stop()
            second.stop()


def operators_move_experts(*transport):
    """Experts are copied from worker to worker, over ipc or over tcp with keys."""
    with Cluster("--no-auto-placement", "--copy-from", "peer", *transport, workers=3) as cluster:
        with Load([cluster]) as load:
            out = operate(cluster, "move", "--layer", "0", "--expert", "0", "--from", "w0", "--to", "w1", "--operation", "first")
            check("first: done" in out and "1 of 1 moves, safe to stop" in out, out)
            again = operate(cluster, "move", "--layer", "0", "--expert", "0", "--from", "w0", "--to", "w1", "--operation", "first")
            check("first: done" in again, again)
            holders = json.loads(cluster.get("/debug/experts")[1])["layers"][0]["replicas"][0]
            check(holders == ["w1"], holders)
            operate(cluster, "replicate", "--layer", "0", "--expert", "0")
            check(len(json.loads(cluster.get("/debug/experts")[1])["layers"][0]["replicas"][0]) == 2, "not replicated")
            out = operate(cluster, "drain", "w2")
            check("done" in out and "safe to stop" in out, out)
            check(experts(cluster)["w2"] == 0, experts(cluster))
            check("epoch" in operate(cluster, "placement", "plan"), "no plan")
            operate(cluster, "rebalance")
            check(experts(cluster)["w2"] == 0, "a drained worker was given experts")
            kinds = [o["kind"] for o in cluster.status()["operations"]]
            check(kinds == ["move", "replicate", "drain", "rebalance"], kinds)
            bad = subprocess.run([os.path.join(BIN, "moesaic"), "drain", "w9", "--cluster", cluster.run_dir], capture_output=True, text=True)
            check(bad.returncode == 1 and "no worker is called 'w9'" in bad.stderr, bad.stderr)
            text = subprocess.run([os.path.join(BIN, "moesaic"), "status", "--url", f"http://127.0.0.1:{cluster.port}"], capture_output=True, text=True).stdout
            check("OPERATION" in text and "drain" in text, text)
            check("could not be copied" not in cluster.log_text(), "a worker fell back to its file")
        load.check()
        check(load.done() > 0, "no request ended")


def operators_move_experts_over_tcp():
    operators_move_experts("--listen", "tcp://127.0.0.1:0")


def moves_under_load():
    """One move a second: the tokens stay the same."""
    moves = 120 if FULL else 8
    with Cluster("--no-auto-placement", workers=2) as cluster:
        with Load([cluster]) as load:
            cluster.wait_for(lambda: load.done() > 5, "load")
            slowest = 0.0
            for i in range(moves):
                began = time.monotonic()
                layer, expert = i % 6, (i // 6) % 16
                source = json.loads(cluster.get("/debug/experts")[1])["layers"][layer]["replicas"][expert][0]
                target = "w1" if source == "w0" else "w0"
                operate(cluster, "move", "--layer", str(layer), "--expert", str(expert), "--from", source, "--to", target)
                slowest = max(slowest, time.monotonic() - began)
                load.check()
                time.sleep(max(0.0, 1.0 - (time.monotonic() - began)))
        load.check()
        print(f"figure: {moves} moves under load, the slowest took {slowest:.2f} s; {load.done()} requests, 0 failed")


if __name__ == "__main__":
    main([scale_out_and_in, operators_move_experts, operators_move_experts_over_tcp, moves_under_load])
