"""Expert workers and GPUs: a lease that passes from worker to worker; on two GPUs one worker a GPU under `serve`, two of them in one
process, and two processes that lease one each. Golden tokens from all. Skipped, with the reason, where there is no GPU, or only one. The backend and its element type come from MOESAIC_BACKEND and MOESAIC_DTYPE (gpu_test.sh)."""
import re
import signal
import subprocess
import sys

from harness import Cluster, check, golden, main
from nodes import Node, Nodes, wait_for


def gpus():
    try:
        return subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=20).stdout.count("GPU ")
    except OSError:
        return 0


def expect_golden(router):
    for case in golden():
        reply = router.complete(case["ids"], len(case["greedy"]))
        check(reply == case["greedy"], f"{case['prompt']!r}: got {reply}, expected {case['greedy']}")


def a_worker_on_each_gpu():
    for combine in ("exact", "partial"):
        with Cluster("--devices", "0,1", "--combine", combine, "--micro-batches", "2", workers=2) as cluster:
            expect_golden(cluster)


def two_workers_in_one_process():
    nodes = Nodes(workers=1, replicas=1, worker_args=("--devices", "0,1"))
    argv = nodes.routers[0].argv
    argv[argv.index("--initial-workers") + 1] = "2"
    with nodes:
        router = nodes.routers[0]
        wait_for(lambda: len(router.status()["workers"]) == 2, "both workers")
        names = sorted(w["id"] for w in router.status()["workers"])
        check(names == ["w0-0", "w0-1"], f"workers are {names}")
        check(all(w["experts"] > 0 for w in router.status()["workers"]), "a worker has no experts")
        expect_golden(router)


def read(node):
    with open(node.log_path, encoding="utf-8") as f:
        return f.read()


def leased(node):
    """The GPU that a worker's log says it has: number and UUID."""
    found = re.findall(r"GPU (\d+) \((\S+)\) of \d+ is this worker's", read(node))
    return found[-1] if found else None


def a_lease_for_each_worker():
    nodes = Nodes(workers=2, replicas=2, worker_args=("--devices", "auto"))
    with nodes:
        router, (first, second) = nodes.routers[0], nodes.workers
        expect_golden(router)
        mine, other = leased(first), leased(second)
        known = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=20).stdout
        check(mine and other and mine != other, f"leased: {mine} and {other}")
        check(all(uuid.removeprefix("GPU-") in known for _, uuid in (mine, other)), f"{mine} and {other} are not of {known}")
        listen = first.argv.index("--listen")
        third = Node("w9", [*first.argv[:listen], "--listen", f"ipc://{nodes.dir}/w9.sock", "--id", "w9", "--devices", "auto"], nodes.dir)
        third.start()
        try:
            wait_for(lambda: "other workers have all 2 GPUs" in read(third), "word that the third worker waits")
            check(third.alive() and not leased(third), f"the third worker: {leased(third)}")
        finally:
            third.stop()
        first.signal(signal.SIGTERM)  # gives its lease back, and takes the same one again
        first.process.wait(30)
        first.start()
        wait_for(lambda: nodes.healed(), "both workers again", timeout_s=60)
        check(leased(first) == mine, f"{leased(first)} after {mine}")
        second.kill()  # its lease is still its own, by its id
        second.start()
        wait_for(lambda: nodes.healed(), "both workers after a kill", timeout_s=60)
        check(leased(second) == other, f"{leased(second)} after {other}")
        expect_golden(router)


def a_lease_passes_on():
    """Each worker but the last holds a GPU; the last waits until another ends, and has its GPU then."""
    count = gpus()
    nodes = Nodes(workers=count, replicas=1, worker_args=("--devices", "auto", "--hand-over-timeout", "1s"))
    with nodes:
        router, first = nodes.routers[0], nodes.workers[0]
        expect_golden(router)
        mine = leased(first)
        known = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=20).stdout
        check(mine and mine[1].removeprefix("GPU-") in known, f"leased: {mine} of {known}")
        listen = first.argv.index("--listen")
        last = Node("w9", [*first.argv[:listen], "--listen", f"ipc://{nodes.dir}/w9.sock", "--id", "w9", "--devices", "auto"], nodes.dir)
        last.start()
        try:
            wait_for(lambda: f"other workers have all {count} GPUs" in read(last), "word that the last worker waits")
            check(last.alive() and not leased(last), f"the last worker: {leased(last)}")
            first.signal(signal.SIGTERM)
            wait_for(lambda: leased(last) == mine, "the lease to pass on", timeout_s=60)
            first.process.wait(30)
            wait_for(lambda: router.status()["ready"] and "w9" in [w["id"] for w in router.status()["workers"] if w["experts"] > 0], "w9's experts", timeout_s=60)
            expect_golden(router)
        finally:
            last.stop()


if gpus() == 0:
    print("a GPU is needed")
    sys.exit(77)
if gpus() == 1:
    print("not run: what needs two GPUs")
main([a_lease_passes_on] + ([a_worker_on_each_gpu, two_workers_in_one_process, a_lease_for_each_worker] if gpus() > 1 else []))
