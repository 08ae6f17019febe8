"""Real clusters for the end-to-end tests: `moesaic serve` on loopback, its HTTP API, its processes by id. Standard library only."""
import http.client
import json
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import time

ROOT = os.path.abspath(os.path.join(os.path.dirname(__file__), "..", ".."))
BIN = os.environ.get("MOESAIC_BIN", os.path.join(ROOT, "build", "release", "bin"))
DEMO = os.path.join(ROOT, "models", "demo")
FULL = os.environ.get("MOESAIC_TEST_FULL") == "1"
READY_TIMEOUT_S = 60
STOP_TIMEOUT_S = 30


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def golden():
    with open(os.path.join(DEMO, "golden.json"), encoding="utf-8") as f:
        return json.load(f)["cases"]


def check(condition, what):
    if not condition:
        raise AssertionError(what)


class Api:
    """A router's HTTP API at `port`."""
    tls = None  # an ssl.SSLContext: https

    def connect(self, timeout_s=120):
        if self.tls:
            return http.client.HTTPSConnection("127.0.0.1", self.port, timeout=timeout_s, context=self.tls)
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout_s)

    def request(self, method, path, body=None, headers=None, timeout_s=120):
        connection = self.connect(timeout_s)
        try:
            data = json.dumps(body).encode() if body is not None else None
            connection.request(method, path, data, {"Content-Type": "application/json", **(headers or {})})
            response = connection.getresponse()
            text = response.read()
            return response.status, dict(response.getheaders()), text
        finally:
            connection.close()

    def get(self, path):
        status, _, text = self.request("GET", path)
        return status, text

    def post(self, path, body):
        status, headers, text = self.request("POST", path, body)
        return status, headers, json.loads(text)

    def status(self):
        code, text = self.get("/cluster/status")
        check(code == 200, f"/cluster/status answered {code}")
        return json.loads(text)

    def metric(self, name):
        """The sum of a metric over its labels."""
        total = 0.0
        for line in self.get("/metrics")[1].decode().splitlines():
            if line.startswith(name) and line[len(name)] in " {":
                total += float(line.rsplit(" ", 1)[1])
        return total

    def complete(self, prompt_ids, max_tokens, **more):
        """Greedy token ids of a completion; raises with the status for anything but 200."""
        status, _, reply = self.post("/v1/completions", {"prompt": prompt_ids, "max_tokens": max_tokens, "temperature": 0,
                                                        "return_token_ids": True, **more})
        check(status == 200, f"HTTP {status}: {reply}")
        return reply["choices"][0]["token_ids"]

    def stream_events(self, prompt_ids, max_tokens, on_event=None, **more):
        """The data of every SSE event of a streamed completion, parsed where it is JSON. `on_event` gets the seconds since the last."""
        connection = self.connect()
        events = []
        try:
            body = {"prompt": prompt_ids, "max_tokens": max_tokens, "temperature": 0, "stream": True, "return_token_ids": True, **more}
            connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
            response = connection.getresponse()
            check(response.status == 200, f"HTTP {response.status}: {response.read() if response.status != 200 else ''}")
            last = time.monotonic()
            for line in response:
                if not line.startswith(b"data: "):
                    continue
                now = time.monotonic()
                if on_event:
                    on_event(now - last)
                last = now
                data = line[6:].strip().decode()
                events.append(json.loads(data) if data.startswith("{") else data)
            return events
        finally:
            connection.close()

    def stream_tokens(self, prompt_ids, max_tokens, on_event=None):
        """Greedy token ids of a streamed completion that must end well."""
        events = self.stream_events(prompt_ids, max_tokens, on_event)
        check(events and events[-1] == "[DONE]", f"the stream ended with {events[-1:]}")
        return [t for e in events[:-1] for c in e["choices"] for t in c.get("token_ids") or []]


class Cluster(Api):
    """`moesaic serve` as a context manager. Everything it starts is stopped at exit; its log is shown when a test fails. With
    `ca_file` the API is asked over TLS and must have a certificate that this file trusts."""

    def __init__(self, *args, model=DEMO, workers=2, env=None, ca_file=None):
        self.tls = ssl.create_default_context(cafile=ca_file) if ca_file else None
        self.port = free_port()
        self.dir = tempfile.mkdtemp(prefix="moesaic-e2e-")
        self.log_path = os.path.join(self.dir, "serve.log")
        self.run_dir = os.path.join(self.dir, "run")
        self.argv = [os.path.join(BIN, "moesaic"), "serve", model, "--workers", str(workers), "--port", str(self.port),
                     "--run-dir", self.run_dir, *args]
        self.env = dict(os.environ, **(env or {}))
        self.process = None

    def __enter__(self):
        self.log = open(self.log_path, "wb")
        self.process = subprocess.Popen(self.argv, stdout=self.log, stderr=subprocess.STDOUT, env=self.env)
        try:
            self.wait_ready()
        except BaseException:
            self.__exit__(*sys.exc_info())
            raise
        return self

    def __exit__(self, kind, error, trace):
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
                if kind is None:
                    kind = error = AssertionError("serve did not stop after SIGTERM")
        self.log.close()
        if kind is not None:
            with open(self.log_path, encoding="utf-8", errors="replace") as f:
                print("--- serve log:\n" + f.read()[-6000:])
            if isinstance(kind, BaseException):
                raise kind
        else:
            shutil.rmtree(self.dir, ignore_errors=True)

    def log_text(self):
        with open(self.log_path, encoding="utf-8", errors="replace") as f:
            return f.read()

    def wait_ready(self, timeout_s=READY_TIMEOUT_S):
        self.wait_for(lambda: self.get("/readiness")[0] == 200, "readiness", timeout_s)

    def wait_for(self, condition, what, timeout_s=READY_TIMEOUT_S):
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            check(self.process.poll() is None, f"serve ended with {self.process.returncode} while waiting for {what}")
            try:
                if condition():
                    return
            except OSError:
                pass
            time.sleep(0.02)
        raise AssertionError(f"no {what} within {timeout_s} s")

    def rpc_generate(self, prompt_ids, max_tokens, keys="-"):
        """Greedy token ids from InferenceService/Generate over ZeroMQ."""
        with open(os.path.join(self.run_dir, "cluster.json"), encoding="utf-8") as f:
            endpoint = json.load(f)["router"]
        run = subprocess.run([os.path.join(BIN, "..", "tests", "rpc_generate"), endpoint, keys, str(max_tokens), ",".join(map(str, prompt_ids))],
                             capture_output=True, text=True, timeout=120)
        check(run.returncode == 0, f"Generate failed with {run.returncode}: {run.stderr}")
        ids, _reason = run.stdout.split()
        return [int(i) for i in ids.split(",")]


def main(tests):
    """Runs test functions in order; prints one line each; exit status 1 when any failed."""
    failed = 0
    for test in tests:
        began = time.monotonic()
        try:
            test()
            print(f"ok   {test.__name__} ({time.monotonic() - began:.1f} s)", flush=True)
        except Exception as error:  # each test reports, the rest still run
            failed += 1
            print(f"FAIL {test.__name__}: {type(error).__name__}: {error}", flush=True)
    sys.exit(1 if failed else 0)
