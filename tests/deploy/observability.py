"""deploy/compose.observability.yaml: Prometheus scrapes every router and worker, rules load, each query of the dashboard returns data, and
every alert fires in its fault. Grafana is in no Debian package: its dashboard is checked query by query against Prometheus. Called by
run.sh."""
import json
import os
import re
import sys
import threading
import urllib.parse
import urllib.request

os.environ["PROMETHEUS_IMAGE"] = "moesaic-test-prometheus"
from cluster import (COMPOSE, DEPLOY, DIR, ENV, PROJECT, Load, address, check, compose, containers, docker, figure, finish, free_port,  # noqa: E402
                     golden, request, wait_for, whole)

PROMETHEUS = free_port()
ENV.update(PROMETHEUS_PUBLISH=f"127.0.0.1:{PROMETHEUS}", MOESAIC_REPLICA_WAIT="3s", MOESAIC_MAX_NUM_SEQS="4", MOESAIC_MAX_WAITING="4")
SERVICES = ["redis", "router", "expert-worker", "front", "prometheus"]
FLOOD = 24  # clients, more than both routers take
STRANGER = """
import sys, zmq
def key(path, name):
    return next(l.split('"')[1] for l in open(path) if name in l).encode()
socket = zmq.Context().socket(zmq.DEALER)
socket.curve_publickey, socket.curve_secretkey = key("/keys/worker.key", "public-key"), key("/keys/worker.key", "secret-key")
socket.curve_serverkey = key("/keys/worker.pub", "public-key")
socket.linger = 3000
socket.connect(sys.argv[1])
for _ in range(5):
    socket.send(b"\\xff this is no envelope")
socket.poll(2000)
"""


def fast_intervals():
    """prometheus.yml as it is, but asking each second, so that the test takes minutes, not quarters of an hour."""
    with open(os.path.join(DEPLOY, "prometheus", "prometheus.yml"), encoding="utf-8") as f:
        text = re.sub(r"(_interval): 5s", r"\1: 1s", f.read())
    for name, content in (("prometheus.yml", text), ("fast.yaml", json.dumps(
            {"services": {"prometheus": {"volumes": [f"{DIR}/prometheus.yml:/etc/prometheus/prometheus.yml:ro"]}}}))):
        with open(os.path.join(DIR, name), "w", encoding="utf-8") as f:
            f.write(content)
    os.chmod(DIR, 0o755)
    COMPOSE.extend(["-f", os.path.join(DEPLOY, "compose.observability.yaml"), "-f", os.path.join(DIR, "fast.yaml")])


def ask(path, **query):
    with urllib.request.urlopen(f"http://127.0.0.1:{PROMETHEUS}/api/v1/{path}?{urllib.parse.urlencode(query)}", timeout=10) as reply:
        return json.load(reply)["data"]


def firing():
    return {a["labels"]["alertname"] for a in ask("alerts")["alerts"] if a["state"] == "firing"}


def rules():
    return [r for g in ask("rules")["groups"] for r in g["rules"]]


def targets_are_up_and_rules_load():
    compose("up", "-d", *SERVICES)
    wait_for(lambda: request("GET", "/readiness")[0] == 200 and whole(2), "ready cluster", 60)
    docker("exec", containers("prometheus")[0], "promtool", "check", "config", "/etc/prometheus/prometheus.yml")
    wait_for(lambda: sorted(t["labels"]["job"] for t in ask("targets")["activeTargets"] if t["health"] == "up") ==
             ["moesaic-front", *["moesaic-router"] * 2, *["moesaic-worker"] * 2, "prometheus"], "all targets up", 40)
    wait_for(lambda: all(r["health"] == "ok" for r in rules()), "evaluated rules", 20)
    figure(f"{len(rules())} rules are evaluated, all targets are up")


def the_dashboard_has_data():
    with open(os.path.join(DEPLOY, "grafana", "dashboards", "moesaic.json"), encoding="utf-8") as f:
        queries = [t["expr"] for p in json.load(f)["panels"] for t in p["targets"]]
    with Load("under Prometheus"):
        for query in queries:
            wait_for(lambda q=query: any(v["value"][1] != "NaN" for v in ask("query", query=q)["result"]), f"data of {query}", 30)
    figure(f"all {len(queries)} queries of the dashboard return data")


class Flood:
    """More clients than the cluster takes; what they get does not matter."""

    def __init__(self):
        self.stop = threading.Event()

    def client(self):
        body = {"prompt": golden()[0]["ids"], "max_tokens": 64, "temperature": 0}
        while not self.stop.is_set():
            try:
                if request("POST", "/v1/completions", body, timeout_s=30)[0] != 200:
                    self.stop.wait(0.5)
            except OSError:
                self.stop.wait(0.5)

    def __enter__(self):
        self.threads = [threading.Thread(target=self.client) for _ in range(FLOOD)]
        for thread in self.threads:
            thread.start()

    def __exit__(self, *_):
        self.stop.set()
        for thread in self.threads:
            thread.join()


def every_alert_fires_in_its_fault():
    awaited = {r["name"] for r in rules() if r["type"] == "alerting"}
    check(not firing(), f"alerts without a fault: {firing()}")

    def fires(alert, timeout_s=60):
        figure(f"{alert} fired after {wait_for(lambda: alert in firing(), alert, timeout_s):.0f} s")
        awaited.discard(alert)

    redis, worker, router = (containers(s)[0] for s in ("redis", "expert-worker", "router"))
    with Flood():
        docker("pause", worker)
        fires("MoesaicWorkerSuspected")
        docker("unpause", worker)
        endpoint = f"tcp://{address(worker, 'cluster')}:7000"
        docker("run", "--rm", "--network", f"{PROJECT}_cluster", "-v", f"{ENV['SECRETS_DIR']}:/keys:ro", "moesaic-test-stranger", "-c",
               STRANGER, endpoint)
        fires("MoesaicBadMessages")
        docker("stop", "-t", "5", redis)
        fires("MoesaicRedisDown")
        fires("MoesaicOverloaded")
        docker("start", redis)
    wait_for(whole, "Redis again", 40)
    docker("kill", worker)
    docker("stop", "-t", "30", router)
    fires("MoesaicWorkerLost")
    fires("MoesaicRouterMissing")
    for each in containers("expert-worker"):
        docker("kill", each)
    check(request("POST", "/v1/completions", {"prompt": [1], "max_tokens": 1})[0] == 503, "a request without experts")
    fires("MoesaicRequestsFail")
    fires("MoesaicNoRouterReady")
    check(not awaited, f"no test brings about {awaited}")


if __name__ == "__main__":
    fast_intervals()
    finish([targets_are_up_and_rules_load, the_dashboard_has_data, every_alert_fires_in_its_fault], sys.argv[1:])
