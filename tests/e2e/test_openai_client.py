"""OpenAI's own npm client against a real cluster, with and without an API key."""
import os
import shutil
import subprocess

from harness import ROOT, Cluster, check, main

SOURCE = os.path.join(ROOT, "tests", "e2e", "openai_client")
BUILT = os.path.join(ROOT, "build", "openai-client")
CLIENT_TIMEOUT_S = 300


def install():
    os.makedirs(BUILT, exist_ok=True)
    for name in ("package.json", "package-lock.json", ".npmrc", "openai_client.mjs"):
        shutil.copy(os.path.join(SOURCE, name), BUILT)
    subprocess.run(["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--loglevel=error"], cwd=BUILT, check=True)


def run_client(cluster, *key):
    done = subprocess.run(["node", "openai_client.mjs", f"http://127.0.0.1:{cluster.port}/v1", "demo", *key], cwd=BUILT,
                          capture_output=True, text=True, timeout=CLIENT_TIMEOUT_S)
    check(done.returncode == 0, f"the client failed:\n{done.stdout}{done.stderr}")


def openai_client():
    install()
    with Cluster(workers=2) as cluster:
        run_client(cluster)


def openai_client_with_key():
    with Cluster("--api-key", "secret", workers=0) as cluster:
        check(cluster.get("/v1/models")[0] == 401, "/v1/models answers without the key")
        run_client(cluster, "secret")


main([openai_client, openai_client_with_key])
