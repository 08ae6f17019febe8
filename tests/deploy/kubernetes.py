"""deploy/kubernetes through `kubectl kustomize`: both overlays build, and what refers to something else in them finds it."""
import os
import subprocess
import sys

import yaml

ROOT = os.path.abspath(os.path.join(os.path.dirname(__file__), "..", ".."))
KUBECTL = os.environ.get("KUBECTL", "kubectl")
MADE_BY_HAND = {"moesaic-keys", "moesaic-secrets"}  # secrets
failed = 0


def check(condition, what):
    global failed
    if not condition:
        failed += 1
        print("FAIL", what)


def selects(selector, labels):
    for entry in selector.get("matchExpressions", []):
        if entry["operator"] != "In" or labels.get(entry["key"]) not in entry["values"]:
            return False
    return all(labels.get(k) == v for k, v in selector.get("matchLabels", {}).items())


def check_pods(overlay, name, pod, names):
    volumes = {v["name"]: v for v in pod["volumes"]}
    check(pod["securityContext"]["runAsNonRoot"] and not pod["automountServiceAccountToken"], f"{overlay} {name}: pod security")
    for volume in volumes.values():
        claim = volume.get("persistentVolumeClaim", {}).get("claimName")
        check(claim is None or ("PersistentVolumeClaim", claim) in names, f"{overlay} {name}: no claim {claim}")
        secrets = [s["secret"]["name"] for s in volume.get("projected", {}).get("sources", [])]
        secrets += [volume["secret"]["secretName"]] if "secret" in volume else []
        check(set(secrets) <= MADE_BY_HAND, f"{overlay} {name}: secrets {secrets}")
    for container in pod["containers"] + pod.get("initContainers", []):
        where, security = f"{overlay} {name}/{container['name']}", container["securityContext"]
        check(security["readOnlyRootFilesystem"] and not security["allowPrivilegeEscalation"], f"{where}: security")
        check(security["capabilities"]["drop"] == ["ALL"], f"{where}: capabilities")
        check({"requests", "limits"} <= set(container["resources"]), f"{where}: resources")
        mounts = {m["name"] for m in container["volumeMounts"]}
        check(mounts - set(volumes) <= {"data"}, f"{where}: mounts {mounts - set(volumes)}")
        for source in container.get("envFrom", []):
            check(("ConfigMap", source["configMapRef"]["name"]) in names, f"{where}: {source}")
    for container in pod["containers"]:
        check({"readinessProbe", "livenessProbe"} <= set(container), f"{overlay} {name}: probes")


def check_overlay(overlay):
    built = subprocess.run([KUBECTL, "kustomize", os.path.join(ROOT, "deploy", "kubernetes", "overlays", overlay)], capture_output=True,
                           text=True, timeout=60)
    check(built.returncode == 0, f"{overlay}: {built.stderr}")
    items = [i for i in yaml.safe_load_all(built.stdout) if i]
    names = {(i["kind"], i["metadata"]["name"]) for i in items}
    check(len(items) == len(names) >= 16, f"{overlay}: {sorted(names)}")
    pods = {i["metadata"]["name"]: i["spec"]["template"] for i in items if i["kind"] in ("Deployment", "StatefulSet")}
    check(set(pods) == {"redis", "moesaic-router", "expert-worker"}, f"{overlay}: {set(pods)}")
    labels = [p["metadata"]["labels"] for p in pods.values()]
    for item in items:
        name, spec = item["metadata"]["name"], item.get("spec", {})
        check(item["kind"] == "Namespace" or item["metadata"].get("namespace") == "moesaic", f"{overlay} {name}: no namespace")
        if item["kind"] == "Service":
            check(sum(selects({"matchLabels": spec["selector"]}, l) for l in labels) == 1, f"{overlay} service {name}")
        if item["kind"] in ("PodDisruptionBudget", "NetworkPolicy"):
            check(sum(selects(spec.get("selector") or spec["podSelector"], l) for l in labels) == 1, f"{overlay} {item['kind']} {name}")
        if item["kind"] == "HorizontalPodAutoscaler":
            target = spec["scaleTargetRef"]
            check((target["kind"], target["name"]) in names and len(spec["metrics"]) == 1, f"{overlay} HPA {name}: {spec}")
        if item["kind"] in ("Deployment", "StatefulSet"):
            check(selects(spec["selector"], spec["template"]["metadata"]["labels"]), f"{overlay} {name}: selector")
            check_pods(overlay, name, spec["template"]["spec"], names)
    gpus = [c["resources"]["limits"].get("nvidia.com/gpu") for p in pods.values() for c in p["spec"]["containers"]]
    check(gpus.count("1") == (2 if overlay == "cuda" else 0), f"{overlay}: GPUs {gpus}")
    print(f"{overlay}: {len(items)} objects")


for each in ("demo", "cuda"):
    check_overlay(each)
sys.exit(1 if failed else 0)
