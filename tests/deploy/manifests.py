"""What can be said of deploy/'s files without running them: both Kubernetes overlays build (`kubectl kustomize`), what refers to something
else in them finds it, and every object fits Kubernetes' schema; compose files fit the Compose Specification's schema, which is what
Docker Compose 2 reads, and pass on every option; systemd takes the units."""
import glob
import os
import shutil
import subprocess
import sys
import tempfile

import yaml

ROOT = os.path.abspath(os.path.join(os.path.dirname(__file__), "..", ".."))
KUBECTL = os.environ.get("KUBECTL", "kubectl")
DEPLOY = os.path.join(ROOT, "deploy")
SCHEMAS = os.path.join(ROOT, "tests", "deploy", "schemas")
BUILT = os.path.join(ROOT, "build", "deploy-schemas")
# Options that make no sense in a container, or are given by file.
NOT_PASSED_ON = {"router": {"id", "api-key", "config"}, "worker": {"id", "advertise", "cluster", "config"}}
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
    with open(os.path.join(BUILT, overlay + ".yaml"), "w", encoding="utf-8") as f:
        f.write(built.stdout)
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


def check_options():
    """compose.yaml has a variable for each option of routers and workers in README.md's table, which a test keeps true."""
    with open(os.path.join(ROOT, "README.md"), encoding="utf-8") as f:
        rows = [line.replace("\\|", "/").split("|") for line in f if line.startswith("| `--")]
    with open(os.path.join(DEPLOY, "compose.yaml"), encoding="utf-8") as f:
        services = yaml.safe_load(f)["services"]
    for service, command in (("router", "router"), ("expert-worker", "worker")):
        options = {row[1].split("`")[1].split()[0][2:] for row in rows if command in row[4].strip().split(", ")} - NOT_PASSED_ON[command]
        lacking = {o for o in options if "MOESAIC_" + o.upper().replace("-", "_") not in services[service]["environment"]}
        check(len(options) > 15 and not lacking, f"compose.yaml: {service}: no variable for {sorted(lacking)}")
        print(f"compose.yaml: {service}: {len(options)} options have a variable")


def check_schemas():
    """npm's packages of schemas, as locked in tests/deploy/schemas."""
    for name in ("package.json", "package-lock.json", ".npmrc", "check.mjs"):
        shutil.copy(os.path.join(SCHEMAS, name), BUILT)
    subprocess.run(["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--loglevel=error"], cwd=BUILT, check=True)
    for kind, files in (("compose", sorted(glob.glob(os.path.join(DEPLOY, "compose*.yaml")))),
                        ("kubernetes", sorted(glob.glob(os.path.join(BUILT, "*.yaml"))))):
        told = subprocess.run(["node", "check.mjs", kind, *files], cwd=BUILT, capture_output=True, text=True, timeout=60)
        print(told.stdout, end="")
        check(told.returncode == 0 and f"{len(files)} files" in told.stdout, f"schemas: {kind}: {told.stdout}{told.stderr}")


def check_units():
    if not shutil.which("systemd-analyze"):
        print("systemd units: not checked, there is no systemd-analyze")
        return
    with tempfile.TemporaryDirectory() as folder:  # with a program that exists, which the units of a host that runs them have
        for unit in glob.glob(os.path.join(DEPLOY, "systemd", "*.service")):
            with open(unit, encoding="utf-8") as f, open(os.path.join(folder, os.path.basename(unit)), "w", encoding="utf-8") as out:
                out.write(f.read().replace("/usr/local/bin/moesaic", "/bin/true"))
        units = sorted(glob.glob(os.path.join(folder, "*.service")))
        told = subprocess.run(["systemd-analyze", "verify", *units], capture_output=True, text=True, timeout=60)
        faults = [line for line in told.stderr.splitlines() if "moesaic" in line]
        check(told.returncode == 0 and not faults, f"systemd units: {told.returncode} {told.stderr}")
        print(f"systemd: {len(units)} units")


os.makedirs(BUILT, exist_ok=True)
for each in ("demo", "cuda"):
    check_overlay(each)
check_options()
check_schemas()
check_units()
sys.exit(1 if failed else 0)
