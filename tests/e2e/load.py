"""Clients under load beside a cluster, and the processes that join it, for the end-to-end tests. A request that no router has begun to
answer goes on to the next one, as a front (HAProxy, a Kubernetes service with retries) would send it; once a byte of the answer has
come, it must end well there."""
import http.client
import json
import os
import signal
import subprocess
import threading
import time

from harness import BIN, DEMO, Api, check, free_port, golden

STOP_TIMEOUT_S = 60


class Process:
    """A `moesaic worker` or `moesaic router` beside a cluster, started and stopped by its id."""

    def __init__(self, cluster, name, *args):
        self.name = name
        self.log_path = os.path.join(cluster.dir, f"{name}.log")
        with open(self.log_path, "ab") as log:
            self.process = subprocess.Popen([os.path.join(BIN, "moesaic"), *args, "--id", name], stdout=log, stderr=subprocess.STDOUT)

    def terminate(self):
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)

    def wait(self, timeout_s=STOP_TIMEOUT_S):
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise AssertionError(f"{self.name} did not leave within {timeout_s} s") from None

    def stop(self):
        """SIGTERM; how long it took to leave."""
        began = time.monotonic()
        self.terminate()
        self.wait()
        return time.monotonic() - began


def start_worker(cluster, name, *args):
    return Process(cluster, name, "worker", "--cluster", cluster.run_dir, "--threads", "1", *args)


class Router(Process, Api):
    """A further router of the cluster, with an HTTP API of its own. `store`: instead of the cluster's."""

    def __init__(self, cluster, name, *args, port=None, store=None):
        self.port = port or free_port()
        if not store:
            with open(os.path.join(cluster.run_dir, "cluster.json"), encoding="utf-8") as f:
                store = json.load(f)["redis"]
        super().__init__(cluster, name, "router", DEMO, "--store", store, "--listen", f"ipc://{cluster.run_dir}/{name}.sock",
                         "--port", str(self.port), "--threads", "1", *args)

    def ready(self):
        try:
            return self.get("/readiness")[0] == 200
        except OSError:
            return False


class NotBegun(Exception):
    """A router refused before the first byte of an answer."""


def ask(port, case, tokens, stream, timeout_s=120):
    """The first `tokens` greedy token ids from one router."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout_s)
    body = {"prompt": case["ids"], "max_tokens": tokens, "temperature": 0, "return_token_ids": True, "stream": stream}
    try:
        try:
            connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
            response = connection.getresponse()
        except (ConnectionError, http.client.RemoteDisconnected) as error:
            raise NotBegun(f"{type(error).__name__}: {error}") from None
        text = response.read()
        if response.status == 503:
            raise NotBegun(f"HTTP 503: {text[:200]}")
        check(response.status == 200, f"HTTP {response.status}: {text[:300]}")
        if not stream:
            return json.loads(text)["choices"][0]["token_ids"]
        data = [line[6:] for line in text.decode().splitlines() if line.startswith("data: ")]
        check(data and data[-1] == "[DONE]", f"the stream ended with {data[-1:]}")
        return [t for d in data[:-1] for c in json.loads(d)["choices"] for t in c.get("token_ids") or []]
    finally:
        connection.close()


class Load:
    """Golden prompts, every other one streamed, one after another from each of `clients` threads against the routers at `ports` in turn.
    Every answer must be the golden one, of at most `max_tokens`. `latencies` are in seconds; `clear` begins them anew."""

    def __init__(self, ports, clients=3, max_tokens=1000):
        self.ports, self.max_tokens, self.stopped, self.lock = list(ports), max_tokens, threading.Event(), threading.Lock()
        self.errors, self.latencies, self.finished, self.passed_on = [], [], 0, 0
        self.threads = [threading.Thread(target=self.run, args=(i,), daemon=True) for i in range(clients)]

    def request(self, i):
        cases = golden_cases()
        case, refusals = cases[i % len(cases)], []
        expected = case["greedy"][:self.max_tokens]
        for k in range(len(self.ports)):
            try:
                got = ask(self.ports[(i + k) % len(self.ports)], case, len(expected), i % 2 == 0)
                check(got == expected, f"{case['prompt']!r}: got {got}, expected {expected}")
                self.passed_on += k > 0
                return
            except NotBegun as refusal:
                refusals.append(str(refusal))
        raise AssertionError(f"no router took the request: {refusals}")

    def run(self, i):
        while not self.stopped.is_set():
            began = time.monotonic()
            try:
                self.request(i)
            except Exception as error:  # whatever a client sees is the result
                self.errors.append(f"{type(error).__name__}: {error}")
                time.sleep(0.1)
            with self.lock:
                self.finished += 1
                self.latencies.append(time.monotonic() - began)
            i += len(self.threads)

    def __enter__(self):
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self.stopped.set()
        for thread in self.threads:
            thread.join(120)

    def check(self):
        check(not self.errors, f"{len(self.errors)} of {self.finished} requests failed: {self.errors[:3]}")

    def clear(self):
        with self.lock:
            self.latencies, before = [], self.latencies
        return before


CASES = []


def golden_cases():
    if not CASES:
        CASES.extend(golden())
    return CASES


def percentile(values, p):
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(p * len(ordered)))]
