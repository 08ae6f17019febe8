"""`moesaic digest` hashes what Python's hashlib hashes; with its manifest a worker whose checkpoint is damaged inside one expert is
refused although it is the first to report that expert, and the router's log names worker, layer and expert."""
import hashlib
import http.client
import json
import os
import shutil
import struct
import subprocess
import tempfile
import time

from harness import BIN, ROOT, check, free_port, main

FIXTURE = os.path.join(ROOT, "tests", "data", "checkpoints", "olmoe")
LAYER, EXPERT = 1, 2  # neither the first nor the last of its kind: the model's digest does not see it
LIMIT_S = 60


def tensors(folder):
    """name -> (file, offset, size), from the safetensors' own headers."""
    found = {}
    for name in sorted(os.listdir(folder)):
        if name.endswith(".safetensors"):
            path = os.path.join(folder, name)
            with open(path, "rb") as f:
                size = struct.unpack("<Q", f.read(8))[0]
                for key, t in json.loads(f.read(size)).items():
                    if key != "__metadata__":
                        begin, end = t["data_offsets"]
                        found[key] = (path, 8 + size + begin, end - begin)
    return found


def expert_key(layer, expert, part):
    return f"model.layers.{layer}.mlp.experts.{expert}.{part}_proj.weight"


def digest_of(found, layer, expert):
    sha = hashlib.sha256()
    for part in ("gate", "up", "down"):
        path, offset, size = found[expert_key(layer, expert, part)]
        with open(path, "rb") as f:
            f.seek(offset)
            sha.update(f.read(size))
    return sha.hexdigest()[:16]


def manifest_is_right(folder):
    run = subprocess.run([os.path.join(BIN, "moesaic"), "digest", folder], capture_output=True, text=True, timeout=LIMIT_S)
    check(run.returncode == 0, run.stderr)
    with open(os.path.join(folder, "expert-digests.json"), encoding="utf-8") as f:
        manifest = json.load(f)
    found = tensors(folder)
    for layer, row in enumerate(manifest["experts"]):
        for expert, digest in enumerate(row):
            check(digest == digest_of(found, layer, expert), f"layer {layer} expert {expert}: {digest}")


class Parts:
    """Redis, a router and workers, each a process of its own; all are killed at exit."""

    def __init__(self, folder):
        self.folder, self.processes = folder, []
        self.store, self.port = "unix:" + os.path.join(folder, "redis"), free_port()

    def start(self, name, *argv):
        with open(os.path.join(self.folder, name + ".log"), "wb") as log:
            self.processes.append(subprocess.Popen(argv, stdout=log, stderr=subprocess.STDOUT))

    def worker(self, name, model):
        self.start(name, os.path.join(BIN, "moesaic"), "worker", model, "--store", self.store, "--id", name, "--threads", "1",
                   "--listen", "ipc://" + os.path.join(self.folder, name))

    def log(self, name):
        if not os.path.exists(os.path.join(self.folder, name + ".log")):
            return ""
        with open(os.path.join(self.folder, name + ".log"), encoding="utf-8", errors="replace") as f:
            return f.read()

    def request(self, method, path, body=None):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=LIMIT_S)
        try:
            connection.request(method, path, body and json.dumps(body), {"Content-Type": "application/json"})
            response = connection.getresponse()
            return response.status, json.loads(response.read() or b"{}")
        except OSError:
            return 0, {}
        finally:
            connection.close()

    def wait(self, condition, what):
        deadline = time.monotonic() + LIMIT_S
        while not condition():
            check(time.monotonic() < deadline, f"no {what} within {LIMIT_S} s; router:\n{self.log('router')[-3000:]}")
            time.sleep(0.05)

    def close(self):
        for process in self.processes:
            process.kill()
            process.wait()


def damaged_worker_is_refused():
    folder = tempfile.mkdtemp(prefix="moesaic-digest-")
    good, bad = os.path.join(folder, "good"), os.path.join(folder, "bad")
    parts = Parts(folder)
    try:
        shutil.copytree(FIXTURE, good)
        shutil.copytree(FIXTURE, bad)
        path, offset, size = tensors(bad)[expert_key(LAYER, EXPERT, "down")]
        with open(path, "r+b") as f:
            f.seek(offset + size // 2)
            byte = f.read(1)[0]
            f.seek(offset + size // 2)
            f.write(bytes([byte ^ 1]))
        manifest_is_right(good)
        parts.start("redis", "redis-server", "--port", "0", "--unixsocket", parts.store[5:], "--save", "", "--dir", folder)
        parts.wait(lambda: os.path.exists(parts.store[5:]), "Redis")
        parts.start("router", os.path.join(BIN, "moesaic"), "router", good, "--store", parts.store, "--port", str(parts.port),
                    "--replicas", "2", "--initial-workers", "2", "--skip-tokenizer-init")
        parts.worker("w0", bad)
        parts.worker("w1", good)
        words = f"worker w0: layer {LAYER} expert {EXPERT} has digest"
        parts.wait(lambda: words in parts.log("router"), f"'{words}'")
        check(parts.request("GET", "/readiness")[0] == 503, "ready with one sound worker")
        parts.worker("w2", good)
        parts.wait(lambda: parts.request("GET", "/readiness")[0] == 200, "readiness")
        states = {w["id"]: w["state"] for w in parts.request("GET", "/cluster/status")[1]["workers"]}
        check(states == {"w0": "refused", "w1": "up", "w2": "up"}, states)
        with open(os.path.join(FIXTURE, "expected.json"), encoding="utf-8") as f:
            expected = json.load(f)
        status, reply = parts.request("POST", "/v1/completions",
                                      {"prompt": expected["ids"], "max_tokens": len(expected["greedy"]), "temperature": 0,
                                       "ignore_eos": True, "return_token_ids": True})
        check(status == 200 and reply["choices"][0]["token_ids"] == expected["greedy"], f"HTTP {status}: {reply}")
    finally:
        parts.close()
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main([damaged_worker_is_refused])
