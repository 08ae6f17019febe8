"""The command line as its user meets it: status, chat, keygen, help, and a cluster over tcp with CURVE."""
import json
import os
import signal
import stat
import subprocess
import tempfile
import threading
import time

from harness import BIN, Cluster, check, golden, main

MOESAIC = os.path.join(BIN, "moesaic")


def run(*arguments, stdin="", timeout=120):
    return subprocess.run([MOESAIC, *arguments], input=stdin, capture_output=True, text=True, timeout=timeout)


def status_and_chat():
    with Cluster(workers=2) as cluster:
        url = f"http://127.0.0.1:{cluster.port}"
        shown = run("status", "--url", url)
        check(shown.returncode == 0 and "w0" in shown.stdout and "w1" in shown.stdout, f"status: {shown.stdout}{shown.stderr}")
        told = json.loads(run("status", "--url", url, "--json").stdout)
        check(told["ready"] and told["epoch"] >= 1 and len(told["workers"]) == 2, f"status --json: {told}")
        for key in ("id", "pid", "host", "state", "experts", "load"):
            check(key in told["workers"][0], f"workers[] has no {key}")
        check(sum(w["experts"] for w in told["workers"]) == 6 * 16, f"experts: {told['workers']}")
        check(told["redis"]["up"] and told["redis"]["pid"] > 0, f"redis: {told['redis']}")
        check(len(told["layers"]) == 6 and told["routers"], f"layers, routers: {told}")
        answer = run("chat", "--url", url, "--temperature", "0", stdin="What is nginx?\n/exit\n")
        check(answer.returncode == 0 and "nginx" in answer.stdout, f"chat: {answer.stdout}{answer.stderr}")
        check(run("chat", "--url", url, "--temperature", "0", stdin="What is nginx?\n/exit\n").stdout == answer.stdout, "greedy chat differs")


def tcp_with_keys():
    with tempfile.TemporaryDirectory() as folder:
        keys = os.path.join(folder, "keys")
        made = run("keygen", keys)
        check(made.returncode == 0, f"keygen: {made.stderr}")
        for name in os.listdir(keys):
            mode = stat.S_IMODE(os.stat(os.path.join(keys, name)).st_mode)
            check(not name.endswith(".key") or mode == 0o600, f"{name} has mode {mode:o}")
        check(run("keygen", keys).returncode != 0, "keygen overwrites keys")
        case = golden()[2]
        with Cluster("--listen", "tcp://127.0.0.1:0", "--keys", keys, workers=2) as cluster:
            check(cluster.complete(case["ids"], len(case["greedy"])) == case["greedy"], "wrong tokens over tcp with CURVE")
            endpoints = run("status", "--url", f"http://127.0.0.1:{cluster.port}", "--json").stdout
            check("tcp://" in endpoints or "w0" in endpoints, endpoints)


def health_and_secrets_by_file():
    with tempfile.TemporaryDirectory() as folder:
        keys, other, secret, empty = (os.path.join(folder, n) for n in ("keys", "other", "secret", "empty"))
        check(run("keygen", keys).returncode == 0 and run("keygen", other).returncode == 0, "keygen")
        for path, text in ((secret, "sesame\nignored\n"), (empty, "\n")):
            with open(path, "w", encoding="utf-8") as f:
                f.write(text)
        with Cluster("--listen", "tcp://127.0.0.1:0", "--keys", keys, "--api-key-file", secret, workers=2) as cluster:
            port, url = ("--port", str(cluster.port)), ("--url", f"http://127.0.0.1:{cluster.port}")
            check(run("status", *url).returncode == 1, "status without the key")
            told = json.loads(run("status", *url, "--client-key-file", secret, "--json").stdout)
            check(run("health", "router", *port).returncode == 0 and run("health", "router", "--live", *port).returncode == 0, "router")
            check(run("health", "cluster", *port, "--client-key", "sesame").returncode == 0, "cluster")
            check("401" in run("health", "cluster", *port).stderr, "health of the cluster without the key")
            worker = ("health", "worker", "--listen", told["workers"][0]["endpoint"].split("?")[0], "--keys")
            check(run(*worker, keys).returncode == 0, f"{worker}: {run(*worker, keys).stderr}")
            check(run(*worker, other).returncode == 1, "a worker answers a stranger's key")
            os.kill(told["workers"][1]["pid"], signal.SIGSTOP)
            try:
                stopped = ("health", "worker", "--listen", told["workers"][1]["endpoint"].split("?")[0], "--keys", keys)
                check(run(*stopped).returncode == 1, "a stopped worker is healthy")
            finally:
                os.kill(told["workers"][1]["pid"], signal.SIGCONT)
        check(run("health", "router", *port).returncode == 1, "health of a router that is gone")
        check(run("health", "nobody").returncode == 2 and run("health", "worker").returncode == 2, "mistakes")
        for options in (("--api-key-file", empty), ("--api-key-file", os.path.join(folder, "none")),
                        ("--api-key", "a", "--api-key-file", secret)):
            refused = run("router", "models/demo", "--port", "0", *options)
            check(refused.returncode == 1 and "api-key" in refused.stderr, f"{options}: {refused.returncode} {refused.stderr}")


def sigterm_drains_and_a_second_stops():
    case = golden()[0]
    with Cluster(workers=2) as cluster:
        began = threading.Event()
        events = []

        def stream():
            events.extend(cluster.stream_events(case["ids"], 300, lambda _pause: began.set(), ignore_eos=True))
        client = threading.Thread(target=stream)
        client.start()
        check(began.wait(30), "no token")
        cluster.process.send_signal(signal.SIGTERM)
        client.join(60)
        check(events and events[-1] == "[DONE]", f"a request in flight did not end well: {events[-1:]}")
        check(cluster.process.wait(30) == 0, "serve did not end well")
    with Cluster(workers=1) as cluster:
        client = threading.Thread(target=lambda: cluster.stream_events(case["ids"], 1900, lambda _pause: began.set(), ignore_eos=True))
        began.clear()
        client.start()
        check(began.wait(30), "no token")
        cluster.process.send_signal(signal.SIGTERM)
        time.sleep(0.2)  # two signals in the same instant count as one
        at = time.monotonic()
        cluster.process.send_signal(signal.SIGTERM)
        cluster.process.wait(30)
        check(time.monotonic() - at < 5, "the second SIGTERM did not stop at once")
        client.join(30)


def metrics_under_both_names():
    with Cluster("--metrics-compat", "vllm", workers=1) as cluster:
        cluster.complete(golden()[0]["ids"], 5)
        cluster.wait_for(lambda: cluster.metric("moesaic_requests_total") == 1, "the request to be counted")
        check(cluster.metric("moesaic_generation_tokens_total") == 5, "generated tokens")
        check(cluster.metric("vllm:generation_tokens_total") == 5, "generated tokens under vLLM's name")
        check('vllm:time_to_first_token_seconds_count{model_name="demo"} 1' in cluster.get("/metrics")[1].decode(), "vLLM's label")
        check(cluster.metric("moesaic_expert_calls_total") >= 6 * 5, "expert calls")


def help_and_mistakes():
    for command in ("serve", "router", "worker", "chat", "status", "eval", "keygen", "bench"):
        text = run(command, "--help")
        check(text.returncode == 0 and "usage: moesaic " + command in text.stdout, f"{command} --help: {text}")
    check("did you mean 'status'" in run("statsu").stderr, "no suggestion for a command")
    check("did you mean '--replicas'" in run("serve", "x", "--replcias", "2").stderr, "no suggestion for an option")
    check(run("--version").stdout.startswith("moesaic "), "no version")
    missing = run("serve", "/nonexistent", "--workers", "1")
    check(missing.returncode != 0 and "/nonexistent" in missing.stderr, f"missing model: {missing}")


def readme_has_the_option_table():
    from harness import ROOT
    readme = open(os.path.join(ROOT, "README.md"), encoding="utf-8").read()
    table = run("--options-markdown").stdout
    check(table.strip() and table.strip() in readme, "README.md lacks the option table as `moesaic --options-markdown` prints it")


main([status_and_chat, tcp_with_keys, health_and_secrets_by_file, sigterm_drains_and_a_second_stops, metrics_under_both_names, help_and_mistakes, readme_has_the_option_table])
