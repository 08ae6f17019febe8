"""Expert workers on two GPUs: one worker a GPU under `serve`, and two of them in one process. Golden tokens from both. Skipped, with
the reason, where there are not two GPUs. The backend and its element type come from MOESAIC_BACKEND and MOESAIC_DTYPE (gpu_test.sh)."""
import subprocess
import sys

from harness import Cluster, check, golden, main
from nodes import Nodes, wait_for


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


if gpus() < 2:
    print("two GPUs are needed")
    sys.exit(77)
main([a_worker_on_each_gpu, two_workers_in_one_process])
