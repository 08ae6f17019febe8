"""deploy/local.sh as a newcomer uses it: --once, --detach, --stop, mistakes."""
import glob
import os
import subprocess
import urllib.request

from harness import ROOT, check, free_port, main

SCRIPT = os.path.join(ROOT, "deploy", "local.sh")


def local(*arguments):
    return subprocess.run([SCRIPT, *arguments], capture_output=True, text=True, timeout=600)


def once():
    folders = set(glob.glob("/tmp/moesaic-*"))
    shown = local("--once", "--port", str(free_port()))
    check(shown.returncode == 0, f"--once ended with {shown.returncode}: {shown.stdout}{shown.stderr}")
    check("nginx" in shown.stdout.split("4/4", 1)[1].split("\n", 1)[1], f"no answer shown: {shown.stdout}")
    check(set(glob.glob("/tmp/moesaic-*")) <= folders | set(glob.glob("/tmp/moesaic-e2e-*")), "a run folder is left behind")


def detach_and_stop():
    port = free_port()
    shown = local("--detach", "--port", str(port), "--workers", "1")
    try:
        check(shown.returncode == 0, f"--detach ended with {shown.returncode}: {shown.stdout}{shown.stderr}")
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/readiness", timeout=10) as reply:
            check(reply.status == 200, "not ready after --detach")
        check(local("--once", "--port", str(free_port())).returncode != 0, "a second cluster was started over the first")
    finally:
        stopped = local("--stop")
    check(stopped.returncode == 0 and "stopped" in stopped.stdout, f"--stop: {stopped.stdout}{stopped.stderr}")
    check("nothing is running" in local("--stop").stdout, "--stop twice")


def mistakes():
    check(local("--wat").returncode == 2, "an unknown option is accepted")
    check("--once" in local("--help").stdout, "--help says nothing")
    refused = local("--once", "--port", str(free_port()), "--model", "/nonexistent")
    check(refused.returncode != 0 and "/nonexistent" in refused.stdout + refused.stderr, f"{refused.stdout}{refused.stderr}")


main([once, detach_and_stop, mistakes])
