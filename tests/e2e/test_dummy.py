"""Models of generated weights, served: nothing but a config.json, the same tokens wherever the experts are; GPU options on machines
without one."""
import os
import shutil
import subprocess
import tempfile

from harness import BIN, ROOT, Cluster, check, main

MOESAIC = os.path.join(BIN, "moesaic")
CONFIG = os.path.join(ROOT, "tests", "data", "checkpoints", "qwen3_moe", "config.json")
PROMPT, TOKENS = [5, 80, 11, 300, 42, 7], 24
DUMMY = ("--load-format", "dummy", "--skip-tokenizer-init")


def greedy(folder, *options, workers):
    with Cluster(*DUMMY, *options, model=folder, workers=workers) as cluster:
        tokens = cluster.complete(PROMPT, TOKENS, ignore_eos=True)
        check(len(tokens) == TOKENS and cluster.complete(PROMPT, TOKENS, ignore_eos=True) == tokens, f"not repeatable: {tokens}")
        if workers:
            status = cluster.status()
            check(len(status["workers"]) == workers and all(w["state"] != "refused" for w in status["workers"]), f"workers: {status}")
        return tokens


def the_same_everywhere():
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(CONFIG, folder)
        first = greedy(folder, workers=0)
        check(greedy(folder, "--seed", "0", workers=2) == first, "other tokens with the experts in workers")
        check(greedy(folder, "--combine", "exact", "--replicas", "2", workers=2) == first, "other tokens with replicas")
        check(len(set(first)) > 1, f"one token over and over: {first}")
        check(greedy(folder, "--seed", "1", workers=0) != first, "another seed gives the same tokens")
        check(greedy(folder, "--layers", "1", workers=1) != first, "fewer layers give the same tokens")


def run(*arguments):
    return subprocess.run([MOESAIC, *arguments], capture_output=True, text=True, timeout=120)


def mistakes_are_told():
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(CONFIG, folder)
        bench = ("bench", folder, "--experts", "inproc")
        for arguments, word in (((*bench, "--skip-tokenizer-init"), "safetensors"), ((*bench, "--layers", "2", "--load-format", "auto"), "--layers"),
                                ((*bench, "--load-format", "dummy", "--layers", "4"), "it has 3"),
                                ((*bench, "--load-format", "dummy", "--devices", "0,x"), "--devices"), ((*bench, "--load-format", "dummy", "--tune"), "--backend cuda"),
                                (("worker", folder, "--load-format", "dummy", "--store", "unix:/nonexistent", "--listen", f"ipc://{folder}/s",
                                  "--devices", "0,1"), "--backend cuda")):
            answer = run(*arguments)
            expected = 64 if arguments[0] == "worker" else 1  # 64: `serve` must not start it again
            check(answer.returncode == expected and word in answer.stderr, f"{arguments}: {answer.returncode} {answer.stderr}")


def without_a_gpu():
    if os.path.exists("/dev/nvidiactl"):
        print("skipped: this machine has a GPU")
        return
    answer = run("bench", os.path.dirname(CONFIG), "--load-format", "dummy", "--experts", "inproc", "--backend", "cuda")
    check(answer.returncode == 1 and answer.stderr.startswith("moesaic: ") and "--backend cpu" in answer.stderr, f"cuda: {answer}")


main([the_same_everywhere, mistakes_are_told, without_a_gpu])
