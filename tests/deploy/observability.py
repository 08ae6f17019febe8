"""deploy/compose.observability.yaml: Prometheus scrapes every router, rules load, each query of the dashboard returns data, and alerts
fire in their faults. Grafana is in no Debian package: its dashboard is checked query by query against Prometheus. Called by run.sh."""
import json
import os
import sys
import urllib.parse
import urllib.request

os.environ["PROMETHEUS_IMAGE"] = "moesaic-test-prometheus"
from cluster import COMPOSE, DEPLOY, ENV, Load, check, compose, containers, docker, figure, finish, free_port, request, wait_for, whole  # noqa: E402

PROMETHEUS = free_port()
ENV["PROMETHEUS_PUBLISH"] = f"127.0.0.1:{PROMETHEUS}"
COMPOSE += ["-f", os.path.join(DEPLOY, "compose.observability.yaml")]
SERVICES = ["redis", "router", "expert-worker", "front", "prometheus"]


def ask(path, **query):
    with urllib.request.urlopen(f"http://127.0.0.1:{PROMETHEUS}/api/v1/{path}?{urllib.parse.urlencode(query)}", timeout=10) as reply:
        return json.load(reply)["data"]


def firing():
    return {a["labels"]["alertname"] for a in ask("alerts")["alerts"] if a["state"] == "firing"}


def targets_are_up_and_rules_load():
    compose("up", "-d", *SERVICES)
    wait_for(lambda: request("GET", "/readiness")[0] == 200 and whole(2), "ready cluster", 60)
    docker("exec", containers("prometheus")[0], "promtool", "check", "config", "/etc/prometheus/prometheus.yml")
    wait_for(lambda: sorted(t["labels"]["job"] for t in ask("targets")["activeTargets"] if t["health"] == "up") ==
             ["moesaic-front", "moesaic-router", "moesaic-router", "prometheus"], "all targets up", 40)
    rules = [r for g in ask("rules")["groups"] for r in g["rules"]]
    check(len(rules) >= 12 and all(r["health"] in ("ok", "unknown") for r in rules), f"rules: {rules}")


def the_dashboard_has_data():
    with open(os.path.join(DEPLOY, "grafana", "dashboards", "moesaic.json"), encoding="utf-8") as f:
        queries = [t["expr"] for p in json.load(f)["panels"] for t in p["targets"]]
    with Load("under Prometheus"):
        for query in queries:
            wait_for(lambda q=query: any(v["value"][1] != "NaN" for v in ask("query", query=q)["result"]), f"data of {query}", 30)
    figure(f"all {len(queries)} queries of the dashboard return data")


def fires(alert, timeout_s=40):
    figure(f"{alert} fired after {wait_for(lambda: alert in firing(), alert, timeout_s):.0f} s")


def alerts_fire_in_their_faults():
    check(not firing(), f"alerts without a fault: {firing()}")
    with Load("Redis stopped, then a worker killed, then a router stopped"):
        redis = containers("redis")[0]
        docker("stop", "-t", "5", redis)
        fires("MoesaicRedisDown")
        docker("start", redis)
        wait_for(whole, "Redis again", 40)
        worker = containers("expert-worker")[0]
        docker("pause", worker)
        fires("MoesaicWorkerSuspected")
        docker("unpause", worker)
        wait_for(whole, "all replicas", 40)
        docker("kill", worker)
        fires("MoesaicWorkerLost")
        docker("start", worker)
        wait_for(whole, "all replicas", 40)
        router = containers("router")[0]
        docker("stop", "-t", "30", router)
        fires("MoesaicRouterMissing")
        docker("start", router)
    for worker in containers("expert-worker"):
        docker("kill", worker)
    fires("MoesaicNoRouterReady")


if __name__ == "__main__":
    finish([targets_are_up_and_rules_load, the_dashboard_has_data, alerts_fire_in_their_faults], sys.argv[1:])
