"""--ssl-certfile and --ssl-keyfile: the whole HTTP API over TLS, asked by Python's ssl, curl, openssl, OpenAI's client and moesaic's own
commands; what must be refused is refused."""
import json
import os
import shutil
import subprocess
import tempfile
import time

from harness import BIN, DEMO, ROOT, Cluster, check, free_port, golden, main

DIR = tempfile.mkdtemp(prefix="moesaic-tls-")
CERT, KEY, BOTH, OTHER_CERT, OTHER_KEY = (os.path.join(DIR, n) for n in ("cert.pem", "key.pem", "both.pem", "other.pem", "otherkey.pem"))
MOESAIC = os.path.join(BIN, "moesaic")


def run(*argv, env=None, text=""):
    done = subprocess.run(argv, capture_output=True, text=True, input=text, timeout=60, env={**os.environ, **(env or {})})
    return done.returncode, done.stdout, done.stderr


def make_certificate(cert, key):
    code, _, told = run("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2",
                        "-subj", "/CN=moesaic test", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1", "-keyout", key, "-out", cert)
    check(code == 0, told)


def curl(cluster, path, *more, ca=True):
    return run("curl", "-sS", "--max-time", "30", *(["--cacert", CERT] if ca else []), *more, f"https://localhost:{cluster.port}{path}")


def every_endpoint(cluster):
    case = golden()[0]
    check(cluster.complete(case["ids"], len(case["greedy"])) == case["greedy"], "other tokens over TLS")
    check(cluster.stream_tokens(case["ids"], len(case["greedy"])) == case["greedy"], "other tokens of a stream over TLS")
    chat = {"messages": [{"role": "user", "content": "What is nginx?"}], "temperature": 0, "max_tokens": 8}
    for path, body in (("/v1/chat/completions", chat), ("/tokenize", {"prompt": "hello"}), ("/detokenize", {"tokens": [1, 2]})):
        check(cluster.post(path, body)[0] == 200, path)
    for path in ("/health", "/liveness", "/readiness", "/version", "/metrics", "/v1/models", "/cluster/status", "/debug/experts"):
        code, body = cluster.get(path)
        check(code == 200 and body, f"{path}: {code}")
    check(cluster.post("/v1/completions", {"prompt": "word " * 300000, "max_tokens": 1})[0] == 400, "1.5 MB of a prompt that is too long")


def connections_are_kept(cluster):
    connection = cluster.connect()
    for _ in range(50):
        connection.request("GET", "/health")
        check(connection.getresponse().read() == b'{"status":"ok"}', "a kept connection")
    connection.close()


def a_client_that_leaves_is_noticed(cluster):
    before = cluster.metric("moesaic_requests_total{status=\"cancelled\"}")
    connection = cluster.connect()
    body = {"prompt": golden()[0]["ids"], "max_tokens": 400, "temperature": 0, "stream": True, "ignore_eos": True}
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    response.readline()
    response.close()
    connection.close()
    cluster.wait_for(lambda: cluster.metric("moesaic_requests_total{status=\"cancelled\"}") > before, "cancellation", 20)


def other_programs(cluster):
    code, told, _ = curl(cluster, "/v1/models")
    check(code == 0 and "demo" in told, f"curl: {code} {told}")
    for version, good in (("1.1", False), ("1.2", True), ("1.3", True)):
        code, _, told = curl(cluster, "/health", "--tls-max", version, "--ciphers", "DEFAULT:@SECLEVEL=0")
        check((code == 0) == good, f"curl with TLS {version}: {code} {told}")
    code, told, _ = run("openssl", "s_client", "-connect", f"127.0.0.1:{cluster.port}", "-CAfile", CERT, "-verify_return_error", "-brief")
    check(code == 0, f"openssl s_client: {code} {told}")
    check(curl(cluster, "/health", ca=False)[0] == 60, "curl trusts an unknown certificate")
    check(run("curl", "-sS", "--max-time", "10", f"http://127.0.0.1:{cluster.port}/health")[0] != 0, "plain HTTP is answered")


def openai_client(cluster):
    """OpenAI's own client, installed by test_openai_client.py's lock file."""
    built = os.path.join(ROOT, "build", "openai-client")
    source = os.path.join(ROOT, "tests", "e2e", "openai_client")
    os.makedirs(built, exist_ok=True)
    for name in ("package.json", "package-lock.json", ".npmrc", "openai_client.mjs"):
        shutil.copy(os.path.join(source, name), built)
    subprocess.run(["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--loglevel=error"], cwd=built, check=True)
    done = subprocess.run(["node", "openai_client.mjs", f"https://localhost:{cluster.port}/v1", "demo"], cwd=built, capture_output=True,
                          text=True, timeout=300, env={**os.environ, "NODE_EXTRA_CA_CERTS": CERT})
    check(done.returncode == 0, f"OpenAI's client over TLS:\n{done.stdout}{done.stderr}")


def own_commands(cluster):
    url = ["--url", f"https://localhost:{cluster.port}"]
    code, told, error = run(MOESAIC, "status", *url, "--ssl-ca-certs", CERT, "--json")
    check(code == 0 and json.loads(told)["ready"], f"status: {code} {error}")
    code, _, error = run(MOESAIC, "status", *url)
    check(code == 1 and "certificate is refused" in error, f"status without the certificate: {code} {error}")
    code, _, error = run(MOESAIC, "status", "--url", f"https://127.0.0.2:{cluster.port}", "--ssl-ca-certs", CERT)
    check(code == 1, f"an address that the certificate does not name: {code} {error}")
    code, told, error = run(MOESAIC, "chat", *url, "--ssl-ca-certs", CERT, "--temperature", "0", text="What is nginx?\n/exit\n")
    check(code == 0 and len(told) > 20, f"chat: {code} {told} {error}")
    asked = {"MOESAIC_PORT": str(cluster.port), "MOESAIC_SSL_CERTFILE": CERT, "MOESAIC_SSL_KEYFILE": KEY}
    for role in ("router", "cluster"):
        code, _, error = run(MOESAIC, "health", role, env=asked)
        check(code == 0, f"health {role}: {code} {error}")
    check(run(MOESAIC, "health", "router", env={**asked, "MOESAIC_SSL_CERTFILE": OTHER_CERT})[0] == 1, "health trusts another certificate")


def serves_over_tls():
    with Cluster("--ssl-certfile", CERT, "--ssl-keyfile", KEY, workers=0, ca_file=CERT) as cluster:
        for part in (every_endpoint, connections_are_kept, a_client_that_leaves_is_noticed, other_programs, own_commands, openai_client):
            began = time.monotonic()
            part(cluster)
            print(f"     {part.__name__} ({time.monotonic() - began:.1f} s)", flush=True)


def certificate_and_key_in_one_file():
    with Cluster("--ssl-certfile", BOTH, workers=0, ca_file=CERT) as cluster:
        check(cluster.get("/health")[0] == 200, "no answer")


def bad_files_are_named():
    for arguments, words in (((f"{DIR}/none", KEY), "cannot read"), ((CERT, f"{DIR}/none"), "cannot read"),
                             ((KEY, KEY), "is not a certificate in PEM"), ((CERT, CERT), "is not the key"),
                             ((CERT, OTHER_KEY), "is not the key")):
        code, _, error = run(MOESAIC, "router", DEMO, "--port", str(free_port()), "--ssl-certfile", arguments[0], "--ssl-keyfile", arguments[1])
        check(code == 1 and words in error and DIR in error, f"{arguments}: {code} {error}")
    code, _, error = run(MOESAIC, "router", DEMO, "--ssl-keyfile", KEY)
    check(code == 1 and "--ssl-certfile is missing" in error, f"a key alone: {code} {error}")


try:
    make_certificate(CERT, KEY)
    make_certificate(OTHER_CERT, OTHER_KEY)
    with open(BOTH, "w", encoding="utf-8") as both:
        for part_of in (KEY, CERT):
            with open(part_of, encoding="utf-8") as f:
                both.write(f.read())
    main([serves_over_tls, certificate_and_key_in_one_file, bad_files_are_named])
finally:
    shutil.rmtree(DIR, ignore_errors=True)
