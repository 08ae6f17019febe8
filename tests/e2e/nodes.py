"""A cluster whose processes the test starts one by one, so that it can pause, cut off, kill and restart each of them: Redis, routers,
workers (over shared memory and ipc, or over tcp behind forwarders of the test's own), and clients that stream golden prompts meanwhile."""
import os
import select
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time

from harness import BIN, DEMO, READY_TIMEOUT_S, Api, check, free_port, golden

STOP_TIMEOUT_S = 20


class Node:
    """One process; `start` again after it was killed. Its log grows over its lives."""

    def __init__(self, name, argv, log_dir, env=None):
        self.name, self.argv, self.env = name, argv, dict(os.environ, **(env or {}))
        self.log_path = os.path.join(log_dir, f"{name}.log")
        self.process = None

    def start(self):
        with open(self.log_path, "ab") as log:
            self.process = subprocess.Popen(self.argv, stdout=log, stderr=subprocess.STDOUT, env=self.env)

    @property
    def pid(self):
        return self.process.pid

    def alive(self):
        return self.process is not None and self.process.poll() is None

    def signal(self, number):
        self.process.send_signal(number)

    def kill(self):
        self.process.kill()
        self.process.wait()

    def stop(self):
        if not self.alive():
            return
        self.process.send_signal(signal.SIGCONT)
        self.process.kill()
        self.process.wait(STOP_TIMEOUT_S)


class Router(Node, Api):
    def __init__(self, name, port, argv, log_dir, env):
        super().__init__(name, argv, log_dir, env)
        self.port = port


class Forwarder:
    """Passes bytes between those who connect to `port` and `target` (an address of a tcp or Unix socket). While a direction is held nothing of it passes, as
    in a partition: no end of the connection hears of it, and what was on its way comes late."""

    def __init__(self, target):
        self.target, self.family = target, socket.AF_UNIX if isinstance(target, str) else socket.AF_INET
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.open = {"in": threading.Event(), "out": threading.Event()}  # in: towards the target
        self.heal()
        threading.Thread(target=self.accept, daemon=True).start()

    def hold(self, *directions):
        for direction in directions:
            self.open[direction].clear()

    def heal(self):
        for event in self.open.values():
            event.set()

    def accept(self):
        while True:
            try:
                near, _ = self.listener.accept()
            except OSError:
                return
            far = socket.socket(self.family)
            try:
                far.connect(self.target)
            except OSError:
                near.close()  # the target is not there (any more), and so is the connection
                continue
            for s in (near, far):
                if s.family == socket.AF_INET:
                    s.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for source, sink, direction in ((near, far, "in"), (far, near, "out")):
                threading.Thread(target=self.pump, args=(source, sink, self.open[direction]), daemon=True).start()

    @staticmethod
    def pump(source, sink, is_open):
        try:
            while True:
                select.select([source], [], [])
                is_open.wait()
                data = source.recv(65536)
                if not data:
                    break
                sink.sendall(data)
        except OSError:
            pass
        for s in (source, sink):
            try:
                s.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass

    def close(self):
        self.heal()
        self.listener.close()


class Nodes:
    """A context manager: everything it starts is killed at exit; the ends of all logs are shown when a test fails.

    Workers w0, w1, … listen in shared memory, the last one at an ipc socket, or with `tcp` behind a forwarder each (self.forwarders). Routers r0, r1, …; those named in
    `own_redis_path` reach Redis through a forwarder each (self.redis_paths)."""

    def __init__(self, workers, routers=1, replicas=2, tcp=False, own_redis_path=(), router_args=(), worker_args=()):
        self.dir = tempfile.mkdtemp(prefix="moesaic-e2e-")
        self.failpoints = os.path.join(self.dir, "failpoints")
        os.mkdir(self.failpoints)
        env = {"MOESAIC_FAILPOINTS": self.failpoints}
        moesaic, store, keys = os.path.join(BIN, "moesaic"), f"unix:{self.dir}/redis.sock", []
        if tcp:
            subprocess.run([moesaic, "keygen", f"{self.dir}/keys"], check=True, capture_output=True)
            keys = ["--keys", f"{self.dir}/keys"]
        self.redis = Node("redis", ["redis-server", "--port", "0", "--unixsocket", f"{self.dir}/redis.sock", "--save", "", "--dir", self.dir],
                          self.dir)
        self.redis_paths = {name: Forwarder(f"{self.dir}/redis.sock") for name in own_redis_path}
        self.forwarders, self.workers, self.routers = [], [], []
        for i in range(workers):
            listen = ["--listen", f"{'ipc://' if i == workers - 1 else 'shm:'}{self.dir}/w{i}.sock"]
            if tcp:
                port = free_port()
                self.forwarders.append(Forwarder(("127.0.0.1", port)))
                listen = ["--listen", f"tcp://127.0.0.1:{port}", "--advertise", f"tcp://127.0.0.1:{self.forwarders[i].port}"]
            self.workers.append(Node(f"w{i}", [moesaic, "worker", DEMO, "--store", store, *keys, *listen, "--id", f"w{i}", "--threads", "1",
                                               *worker_args], self.dir, env))
        for i in range(routers):
            port, path = free_port(), self.redis_paths.get(f"r{i}")
            own_store = f"127.0.0.1:{path.port}" if path else store
            self.routers.append(Router(f"r{i}", port, [moesaic, "router", DEMO, "--store", own_store, *keys, "--id", f"r{i}", "--port", str(port),
                                                       "--replicas", str(replicas), "--initial-workers", str(workers), "--threads", "1",
                                                       "--listen", f"ipc://{self.dir}/r{i}.sock", *router_args], self.dir, env))
        self.replicas = replicas

    def all(self):
        return [self.redis, *self.routers, *self.workers]

    def node(self, name):
        return next(node for node in self.all() if node.name == name)

    def __enter__(self):
        try:
            self.redis.start()
            wait_for(lambda: os.path.exists(f"{self.dir}/redis.sock"), "Redis")
            for node in self.routers + self.workers:
                node.start()
            for router in self.routers:
                wait_for(lambda r=router: r.get("/readiness")[0] == 200, f"readiness of {router.name}")
        except BaseException:
            self.__exit__(*sys.exc_info())
            raise
        return self

    def __exit__(self, kind, error, trace):
        for node in reversed(self.all()):
            node.stop()
        for forwarder in [*self.forwarders, *self.redis_paths.values()]:
            forwarder.close()
        if kind is None:
            shutil.rmtree(self.dir, ignore_errors=True)
            return
        for node in self.all():
            if os.path.exists(node.log_path):
                with open(node.log_path, encoding="utf-8", errors="replace") as f:
                    print(f"--- {node.name} log:\n" + f.read()[-2500:])

    def healed(self, router=None):
        """Every process serves, and every expert has its replicas again."""
        status = (router or self.routers[0]).status()
        return status["ready"] and status["redis"]["up"] and all(layer["min_replicas"] >= self.replicas for layer in status["layers"]) and \
            all(w["state"] == "up" for w in status["workers"]) and len(status["workers"]) == len(self.workers)

    def redis_command(self, *command):
        run = subprocess.run(["redis-cli", "-s", f"{self.dir}/redis.sock", *command], capture_output=True, text=True, timeout=10)
        return run.stdout.strip()


def wait_for(condition, what, timeout_s=READY_TIMEOUT_S, period_s=0.02):
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        try:
            if condition():
                return
        except OSError:
            pass
        time.sleep(period_s)
    raise AssertionError(f"no {what} within {timeout_s} s")


class Streams:
    """Clients that stream golden prompts, one after another, until told to stop. What fails or differs from the golden tokens is kept,
    and for every gap between two tokens how much longer it was than the median of its stream."""

    def __init__(self, routers, clients):
        self.routers, self.cases = routers, golden()
        self.stopped, self.errors, self.done = threading.Event(), [], 0
        self.excesses = []  # (when the gap ended, seconds beyond the stream's median)
        self.threads = [threading.Thread(target=self.run, args=(i,), daemon=True) for i in range(clients)]

    def __enter__(self):
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self.stopped.set()
        for thread in self.threads:
            thread.join(60)

    def run(self, number):
        for i in range(number, 1000000):
            if self.stopped.is_set():
                return
            case, router, gaps = self.cases[i % len(self.cases)], self.choose(i), []
            try:
                got = router.stream_tokens(case["ids"], len(case["greedy"]), lambda gap, gaps=gaps: gaps.append((time.monotonic(), gap)))
                check(got == case["greedy"], f"{case['prompt']!r}: got {got}, expected {case['greedy']}")
            except Exception as error:
                if not self.excused(router, error):
                    self.errors.append(f"{router.name}: {type(error).__name__}: {error}")
                    return
                time.sleep(0.05)
                continue
            self.done += 1
            usual = statistics.median(gap for _, gap in gaps)
            self.excesses += [(at, gap - usual) for at, gap in gaps]

    def choose(self, number):
        return self.routers[number % len(self.routers)]

    def excused(self, router, error):
        """Whether a failed request is none of the cluster's failures; for tests that kill routers."""
        return False

    def check(self):
        check(not self.errors, f"a client saw: {self.errors[:3]}")

    def pause(self, began, ended):
        """The longest gap that ended in that time, beyond its stream's median; call it when the streams of that time have ended."""
        return max([excess for at, excess in self.excesses if began <= at <= ended], default=0.0)


def percentile(values, p):
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * p / 100))]
