"""deploy/compose.yaml on a Docker engine: tokens equal the goldens while containers are added, killed, paused, cut off, restarted and
replaced under load; what should be closed is closed; `down` leaves nothing. Called by run.sh, which makes engine and images."""
import concurrent.futures
import http.client
import json
import os
import shutil
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import time

ROOT = os.path.abspath(os.path.join(os.path.dirname(__file__), "..", ".."))
sys.path.insert(0, os.path.join(ROOT, "tests", "e2e"))
from harness import check, free_port, golden, main  # noqa: E402

DEPLOY = os.path.join(ROOT, "deploy")
DOCKER = os.environ.get("DOCKER", "docker")
PROJECT = f"moesaic-test-{os.getpid()}"
DIR = tempfile.mkdtemp(prefix="moesaic-deploy-")
PORT = free_port()
READY_S, HEAL_S = 60, 40
CLIENTS = 3
ENV = dict(os.environ, MODEL_DIR=os.path.join(ROOT, "models", "demo"), SECRETS_DIR=os.path.join(DIR, "secrets"),
           MOESAIC_PUBLISH=f"127.0.0.1:{PORT}", MOESAIC_SHUTDOWN_TIMEOUT="5s", MOESAIC_HAND_OVER_TIMEOUT="20s", MOESAIC_SERVED_MODEL_NAME="demo",
           MOESAIC_HEAL_AFTER="2s", MOESAIC_REBALANCE_INTERVAL="1s", MOESAIC_ROUTER_THREADS="1", MOESAIC_WORKER_THREADS="1",
           REDIS_IMAGE="moesaic-test-redis", HAPROXY_IMAGE="moesaic-test-haproxy", ROUTER_IMAGE="moesaic-router",
           WORKER_IMAGE="moesaic-worker", CLI_IMAGE="moesaic")
COMPOSE = [*os.environ.get("COMPOSE", "docker compose").split(), "-p", PROJECT, "-f", os.path.join(DEPLOY, "compose.yaml")]


def figure(text):
    print(f"figure: deploy: {text}", flush=True)


def run(*argv, ok=True, timeout=120):
    done = subprocess.run(argv, capture_output=True, text=True, timeout=timeout, env=ENV)
    check(not ok or done.returncode == 0, f"{' '.join(argv)}: {done.returncode}: {(done.stdout + done.stderr)[-2000:]}")
    return done


def docker(*argv, **more):
    return run(DOCKER, *argv, **more).stdout.strip()


def compose(*argv, **more):
    return run(*COMPOSE, *argv, **more).stdout.strip()


def containers(service, running=True):
    return docker("ps", *([] if running else ["-a"]), "-q", "--filter", f"label=com.docker.compose.project={PROJECT}",
                  "--filter", f"label=com.docker.compose.service={service}").split()


def inspect(container):
    return json.loads(docker("inspect", container))[0]


def address(container, network):
    return inspect(container)["NetworkSettings"]["Networks"][f"{PROJECT}_{network}"]["IPAddress"]


def api_key():
    with open(os.path.join(ENV["SECRETS_DIR"], "api-key"), encoding="utf-8") as f:
        return f.readline().strip()


def request(method, path, body=None, key=None, timeout_s=120, tls=None):
    if tls:
        connection = http.client.HTTPSConnection("127.0.0.1", PORT, timeout=timeout_s, context=tls)
    else:
        connection = http.client.HTTPConnection("127.0.0.1", PORT, timeout=timeout_s)
    try:
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {api_key() if key is None else key}"}
        connection.request(method, path, json.dumps(body) if body is not None else None, headers)
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def status(**more):
    code, text = request("GET", "/cluster/status", timeout_s=5, **more)
    check(code == 200, f"/cluster/status: {code} {text[:300]}")
    return json.loads(text)


def wait_for(condition, what, timeout_s):
    began, last = time.monotonic(), None
    while time.monotonic() - began < timeout_s:
        try:
            if condition():
                return time.monotonic() - began
        except (OSError, http.client.HTTPException, AssertionError, KeyError, ValueError) as error:
            last = error
        time.sleep(0.1)
    raise AssertionError(f"no {what} within {timeout_s} s; last: {last}")


def whole(workers=None, **more):
    """Every expert has its replicas, and that many workers are in the cluster."""
    now = status(**more)
    up = [w for w in now["workers"] if w["state"] in ("up", "joining")]
    return now["ready"] and now["redis"]["up"] and all(layer["min_replicas"] >= now["replicas"] for layer in now["layers"]) and \
        (workers is None or len(up) == workers)


def complete(case, **more):
    code, text = request("POST", "/v1/completions", {"prompt": case["ids"], "max_tokens": len(case["greedy"]), "temperature": 0,
                                                     "return_token_ids": True}, **more)
    check(code == 200, f"HTTP {code}: {text[:300]}")
    tokens = json.loads(text)["choices"][0]["token_ids"]
    check(tokens == case["greedy"], f"{case['prompt']!r}: other tokens: {tokens}")


class Load:
    """Clients that complete golden prompts in turn until the end; every one must succeed with the golden tokens."""

    def __init__(self, what):
        self.what, self.done, self.failures, self.slowest = what, 0, [], 0.0
        self.stop, self.lock = threading.Event(), threading.Lock()

    def client(self, first):
        cases, i = golden(), first
        while not self.stop.is_set():
            began = time.monotonic()
            failure = None
            try:
                complete(cases[i % len(cases)])
            except Exception as error:  # whatever a client sees is the result
                failure = f"{type(error).__name__}: {error}"
            with self.lock:
                self.done += 1
                self.slowest = max(self.slowest, time.monotonic() - began)
                if failure:
                    self.failures.append(failure)
            i += 1

    def __enter__(self):
        self.threads = [threading.Thread(target=self.client, args=(i,)) for i in range(CLIENTS)]
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, kind, error, trace):
        self.stop.set()
        for thread in self.threads:
            thread.join()
        if kind is None:
            figure(f"{self.what}: {self.done} requests, {len(self.failures)} failed, slowest {self.slowest:.1f} s")
            check(not self.failures, f"{self.what}: {len(self.failures)} of {self.done} requests failed: {self.failures[:3]}")
            check(self.done >= CLIENTS, f"{self.what}: only {self.done} requests were made")


def up_serves_the_golden_tokens():
    began = time.monotonic()
    compose("up", "-d")
    figure(f"compose up returned after {time.monotonic() - began:.1f} s")
    wait_for(lambda: request("GET", "/readiness")[0] == 200 and whole(2), "ready cluster", READY_S)
    figure(f"a ready cluster of 2 routers and 2 workers {time.monotonic() - began:.1f} s after compose up")
    for case in golden():
        complete(case)
    code, text = request("POST", "/v1/chat/completions", {"messages": [{"role": "user", "content": "What is nginx?"}], "temperature": 0,
                                                          "max_tokens": len(golden()[0]["greedy"]), "return_token_ids": True})
    check(code == 200 and json.loads(text)["choices"][0]["token_ids"] == golden()[0]["greedy"], f"chat: {code} {text[:300]}")


def health_checks_by_role():
    for service in ("redis", "router", "expert-worker"):
        for container in containers(service):
            wait_for(lambda c=container: inspect(c)["State"]["Health"]["Status"] == "healthy", f"healthy {service}", 30)
    router, worker = containers("router")[0], containers("expert-worker")[0]
    docker("exec", router, "moesaic", "health", "router")
    docker("exec", router, "moesaic", "health", "cluster", "--client-key-file", "/run/secrets/api-key")
    began = time.monotonic()
    docker("exec", worker, "moesaic", "health", "worker")
    figure(f"moesaic health worker by docker exec: {time.monotonic() - began:.2f} s")
    bad = run(DOCKER, "exec", worker, "moesaic", "health", "worker", "--listen", "tcp://127.0.0.1:7001", ok=False)
    check(bad.returncode == 1 and "no answer" in bad.stderr, f"health of nobody: {bad.returncode} {bad.stderr}")


def containers_are_hardened():
    for service in ("redis", "router", "expert-worker", "front"):
        for container in containers(service):
            seen = inspect(container)
            check(seen["HostConfig"]["ReadonlyRootfs"], f"{service}: the root is writable")
            check(docker("exec", container, "id", "-u") != "0", f"{service} runs as root")
            process = docker("exec", container, "cat", "/proc/1/status")
            check("\nCapEff:\t0000000000000000\n" in process and "\nNoNewPrivs:\t1\n" in process, f"{service}: {process}")
            check(run(DOCKER, "exec", container, "touch", "/usr/written", ok=False).returncode != 0, f"{service} writes to its root")
            published = [p for p in seen["NetworkSettings"]["Ports"].values() if p]
            check(bool(published) == (service == "front"), f"{service} publishes {published}")
            memory, cpus = seen["HostConfig"]["Memory"], seen["HostConfig"]["NanoCpus"]
            check(memory > 0 and cpus > 0, f"{service} has no limits: {memory} {cpus}")
            check(api_key() not in json.dumps(seen["Config"]), f"{service}: the API key is in the container's settings")
    for service in ("router", "expert-worker"):
        container = containers(service)[0]
        check(run(DOCKER, "exec", container, "touch", "/model/written", ok=False).returncode != 0, "the model is writable")
        check(run(DOCKER, "exec", container, "sh", "-c", "command -v gcc cc ld cmake curl", ok=False).returncode != 0, "tools in the image")


def probe(network, host, port):
    """Whether a fresh container in that network can connect."""
    done = run(DOCKER, "run", "--rm", "--network", network, "--entrypoint", "timeout", "moesaic-test-redis", "2", "bash", "-c",
               f"exec 3<>/dev/tcp/{host}/{port}", ok=False)
    return done.returncode == 0


def networks_are_closed():
    probes = []
    for service, port in (("redis", 6379), ("expert-worker", 7000), ("expert-worker", 9100)):
        ip = address(containers(service)[0], "cluster")
        probes += [(f"{PROJECT}_{n}", service, ip, port, n == "cluster") for n in ("cluster", "public", "api")]
        probes.append(("bridge", service, ip, port, False))
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        reached = list(pool.map(lambda p: probe(p[0], p[2], p[3]), probes))
    for (network, service, _, port, wanted), got in zip(probes, reached):
        check(got == wanted, f"{service}:{port} is {'reached' if got else 'not reached'} from {network}")


def keys_are_needed():
    for key in ("", "wrong"):
        code, text = request("POST", "/v1/completions", {"prompt": [1], "max_tokens": 1}, key=key)
        check(code == 401, f"key {key!r}: {code} {text[:200]}")
        check(request("GET", "/cluster/status", key=key)[0] == 401, f"status with key {key!r}")
    redis = containers("redis")[0]
    for user, command, refusal in (("default", "GET", "WRONGPASS"), ("health", "GET", "NOPERM")):
        told = run(DOCKER, "exec", redis, "redis-cli", "--no-auth-warning", "--user", user, "--pass", "x", command, "moe:x", ok=False)
        check(refusal in told.stdout + told.stderr or "NOAUTH" in told.stdout + told.stderr, f"{user}: {told.stdout} {told.stderr}")
    others = os.path.join(DIR, "others")
    run(os.path.join(DEPLOY, "secrets.sh"), others)
    endpoint = f"tcp://{address(containers('expert-worker')[0], 'cluster')}:7000"
    for keys, good in ((ENV["SECRETS_DIR"], True), (others, False)):
        asked = run(DOCKER, "run", "--rm", "--network", f"{PROJECT}_cluster", "-v", f"{keys}:/keys:ro", "--user", "0:0", "moesaic",
                    "health", "worker", "--listen", endpoint, "--keys", "/keys", ok=False)
        check((asked.returncode == 0) == good, f"a worker asked with {'its own' if good else 'other'} keys: {asked.returncode} {asked.stderr}")


def scale_up_under_load():
    with Load("--scale expert-worker=4"):
        began = time.monotonic()
        compose("up", "-d", "--no-recreate", "--scale", "expert-worker=4")
        wait_for(lambda: whole(4), "4 workers", HEAL_S)
        took = time.monotonic() - began
        time.sleep(3)
        holding = sum(w["experts"] > 0 for w in status()["workers"])
        figure(f"4 workers known {took:.1f} s after --scale (compose itself included); {holding} hold experts 3 s later")
        check(took < 10, f"joining took {took:.1f} s")


def busy_worker():
    """The container of a worker that holds experts."""
    ids = {w["host"]: w["experts"] for w in status()["workers"] if w["state"] == "up"}
    held = {c: ids.get(c[:12], 0) for c in containers("expert-worker")}
    best = max(held, key=held.get)
    check(held[best] > 0, f"no worker holds experts: {ids}")
    return best


def kill_and_start():
    with Load("docker kill of a worker"):
        victim = busy_worker()
        time.sleep(1)
        docker("kill", victim)
        took = wait_for(lambda: whole(3), "all replicas after a kill", HEAL_S)
        figure(f"all replicas again {took:.1f} s after docker kill")
        docker("start", victim)
        wait_for(lambda: whole(4), "the killed worker's return", HEAL_S)


def pause():
    with Load("docker pause of a worker for 5 s"):
        victim = busy_worker()
        time.sleep(1)
        docker("pause", victim)
        time.sleep(5)
        docker("unpause", victim)
        wait_for(lambda: whole(4), "all replicas after a pause", HEAL_S)


def cut_off():
    with Load("network disconnect of a worker for 5 s"):
        victim = busy_worker()
        time.sleep(1)
        docker("network", "disconnect", f"{PROJECT}_cluster", victim)
        time.sleep(5)
        docker("network", "connect", f"{PROJECT}_cluster", victim)
        wait_for(lambda: whole(4), "all replicas after a disconnect", HEAL_S)


def redis_restart():
    epoch = status()["epoch"]
    with Load("Redis restarted"):
        time.sleep(1)
        docker("restart", "-t", "5", containers("redis")[0])
        wait_for(lambda: whole(4), "Redis again", HEAL_S)
        time.sleep(1)
    check(status()["epoch"] >= epoch, "the epoch fell")


def rolling():
    services = ("redis", "router", "expert-worker")
    before = {c for s in services for c in containers(s)}
    with Load("deploy/rolling.sh over redis, expert-worker, router"):
        began = time.monotonic()
        told = run(os.path.join(DEPLOY, "rolling.sh"), "--compose", " ".join(COMPOSE), timeout=240)
        figure(f"rolling.sh replaced {told.stdout.count('->')} containers in {time.monotonic() - began:.0f} s")
    after = {c for s in services for c in containers(s)}
    check(len(after) == len(before) and not after & before, f"not all were replaced: {before & after}")


def scale_up_and_down_under_load():
    """Up by one and down by three at once: those that leave hand their experts over first."""
    with Load("--scale expert-worker=5, then 2"):
        compose("up", "-d", "--no-recreate", "--scale", "expert-worker=5")
        wait_for(lambda: whole(5), "5 workers", HEAL_S)
        began = time.monotonic()
        compose("up", "-d", "--no-recreate", "--scale", "expert-worker=2", timeout=180)
        figure(f"three workers handed over and ended within {time.monotonic() - began:.1f} s")
        wait_for(lambda: whole(2), "all replicas on 2 workers", HEAL_S)


def tls():
    """compose.tls.yaml: the same API over TLS, verified, and nothing else at the port."""
    crt, key = os.path.join(ENV["SECRETS_DIR"], "tls.crt"), os.path.join(ENV["SECRETS_DIR"], "tls.key")
    run("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2", "-subj", "/CN=moesaic",
        "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", key, "-out", crt)
    run(os.path.join(DEPLOY, "secrets.sh"), ENV["SECRETS_DIR"])
    context = ssl.create_default_context(cafile=crt)
    plain = list(COMPOSE)
    COMPOSE.extend(["-f", os.path.join(DEPLOY, "compose.tls.yaml")])
    try:
        compose("up", "-d", timeout=180)
        wait_for(lambda: request("GET", "/readiness", tls=context)[0] == 200 and whole(2, tls=context), "ready cluster over TLS", READY_S)
        for case in golden()[:3]:
            complete(case, tls=context)
        for router in containers("router"):
            docker("exec", router, "moesaic", "health", "router")
        try:
            check(request("GET", "/health")[0] == 400, "plain HTTP is answered")
        except (OSError, http.client.HTTPException):
            pass
        try:
            request("GET", "/health", tls=ssl.create_default_context())
            check(False, "an unknown certificate is trusted")
        except ssl.SSLCertVerificationError:
            pass
    finally:
        COMPOSE[:] = plain


def force_recreate_recovers():
    told = status()
    compose("up", "-d", "--force-recreate", "-t", "5", timeout=180)
    took = wait_for(lambda: request("GET", "/readiness")[0] == 200 and whole(2), "recovery", READY_S)
    figure(f"ready {took:.1f} s after up --force-recreate returned")
    now = status()
    check(now["cluster_uuid"] == told["cluster_uuid"] and now["epoch"] >= told["epoch"], f"another cluster: {told} {now}")
    for case in golden():
        complete(case)


def down_leaves_nothing():
    compose("down", "-v", "-t", "10", timeout=180)
    label = f"label=com.docker.compose.project={PROJECT}"
    left = [docker("ps", "-aq", "--filter", label), docker("network", "ls", "-q", "--filter", label),
            docker("volume", "ls", "-q", "--filter", label)]
    check(not any(left), f"down leaves {left}")
    with socket.socket() as s:
        check(s.connect_ex(("127.0.0.1", PORT)) != 0, "the port is still open")


TESTS = [up_serves_the_golden_tokens, health_checks_by_role, containers_are_hardened, networks_are_closed, keys_are_needed,
         scale_up_under_load, rolling, kill_and_start, pause, cut_off, redis_restart, scale_up_and_down_under_load, force_recreate_recovers, tls,
         down_leaves_nothing]


def logs():
    """What the containers said, where a test failed."""
    for service in ("redis", "router", "expert-worker", "front"):
        for container in containers(service, running=False):
            said = run(DOCKER, "logs", "--tail", "40", container, ok=False)
            print(f"--- {service} {container}\n{(said.stdout + said.stderr)[-5000:]}", flush=True)


def finish(tests, names):
    """Runs the tests (those named, or all) and takes everything away."""
    try:
        run(os.path.join(DEPLOY, "secrets.sh"), ENV["SECRETS_DIR"])
        main([t for t in tests if not names or t.__name__ in names])
    except SystemExit as end:
        if end.code:
            logs()
        raise
    finally:
        run(*COMPOSE, "down", "-v", "-t", "5", ok=False, timeout=180)
        shutil.rmtree(DIR, ignore_errors=True)


if __name__ == "__main__":
    finish(TESTS, sys.argv[1:])
