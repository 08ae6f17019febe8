"""One replica: a dead worker's experts are missing. Requests get 503 with Retry-After, nothing hangs, and all works again once a
worker returns; within --replica-wait a quick restart is not even noticed."""
import os
import signal
import subprocess
import time

from harness import BIN, Cluster, check, golden, main


def dead_worker_means_503_until_one_returns():
    case = golden()[0]
    with Cluster("--replicas", "1", "--restart", "never", "--replica-wait", "300ms", workers=2) as cluster:
        check(cluster.complete(case["ids"], len(case["greedy"])) == case["greedy"], "wrong tokens before the kill")
        victim = cluster.status()["workers"][1]
        os.kill(victim["pid"], signal.SIGKILL)
        began = time.monotonic()
        status, headers, body = cluster.post("/v1/completions", {"prompt": case["ids"], "max_tokens": 4, "temperature": 0})
        took = time.monotonic() - began
        check(status == 503, f"HTTP {status}: {body}")
        check(int({k.lower(): v for k, v in headers.items()}["retry-after"]) >= 1, f"no Retry-After in {headers}")
        check("replica" in body["error"]["message"], f"the error does not say why: {body}")
        check(took < 10, f"the 503 took {took:.1f} s")
        check(cluster.get("/readiness")[0] == 503, "ready with experts missing")
        check(cluster.get("/health")[0] == 200, "not healthy because a worker died")
        worker = subprocess.Popen([os.path.join(BIN, "moesaic"), "worker", "--cluster", cluster.run_dir],
                                  stdout=cluster.log, stderr=subprocess.STDOUT)
        try:
            cluster.wait_ready()
            check(cluster.complete(case["ids"], len(case["greedy"])) == case["greedy"], "wrong tokens after the newcomer took over")
        finally:
            worker.terminate()
            worker.wait(30)


def quick_restart_is_waited_for():
    case = golden()[1]
    with Cluster("--replicas", "1", "--replica-wait", "30s", workers=2) as cluster:
        os.kill(cluster.status()["workers"][0]["pid"], signal.SIGKILL)
        check(cluster.complete(case["ids"], len(case["greedy"])) == case["greedy"], "wrong tokens across a restart")


def stream_that_began_ends_with_an_error_event():
    case = golden()[0]
    with Cluster("--replicas", "1", "--restart", "never", "--replica-wait", "200ms", workers=2) as cluster:
        killed = []

        def kill_once(_pause):
            if not killed:
                killed.append(cluster.status()["workers"][0]["pid"])
                os.kill(killed[0], signal.SIGKILL)
        events = cluster.stream_events(case["ids"], 1500, kill_once, ignore_eos=True)
        check("error" in events[-1], f"the last event is {events[-1]}")
        check("[DONE]" not in events, "[DONE] after an error")


def bad_arguments_are_refused_at_start():
    for arguments, word in ((["--workers", "2", "--replicas", "3"], "replica"), (["--transport", "shm", "--workers", "0"], "--workers 1"),
                            (["--transport", "shm", "--listen", "tcp://127.0.0.1:0"], "--listen"),
                            (["--wokers", "2"], "--workers"), (["--workers", "many"], "many"), (["--port", "70000"], "70000")):
        result = subprocess.run([os.path.join(BIN, "moesaic"), "serve", "models/demo", *arguments], capture_output=True, text=True, timeout=30)
        check(result.returncode != 0 and word in result.stderr, f"{arguments}: {result.returncode} {result.stderr!r}")


main([dead_worker_means_503_until_one_returns, quick_restart_is_waited_for, stream_that_began_ends_with_an_error_event,
      bad_arguments_are_refused_at_start])
