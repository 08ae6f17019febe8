"""The tree checks itself: include direction, banned calls, function length, open ends, size. Prints each fault; exit 1 if any."""
import os
import re
import subprocess
import sys

ROOT = os.path.abspath(os.path.join(os.path.dirname(__file__), "..", ".."))
MAX_TRACKED_BYTES = 48 << 20
MAX_FUNCTION_LINES = 90
MAX_LINE_COLUMNS = 140

# folder -> first path components it may include (its own folder is always allowed)
MAY_INCLUDE = {
    "common": [],
    "proto": ["common", "moesaic.pb-c.h"],
    "cpu": ["common"],
    "cuda": ["common"],
    "router": ["common", "proto"],
    "expert-worker": ["common", "proto"],
    "training": ["common"],
    "cli": ["common", "proto", "cpu", "cuda", "router", "expert-worker", "training"],
}
# library header -> the folders that alone may include it
OWNED_HEADERS = {
    r"zmq": ["common/zmq"],
    r"hiredis/": ["common/redis"],
    r"protobuf-c/": ["proto"],
    r"moesaic\.pb-c\.h": ["proto"],
    r"event2/|event\.h|evhttp\.h": ["router/http", "cli"],
    r"cuda\w*\.h|cublas": ["cuda"],
    r"openssl/": ["common"],
    r"pcre2\.h": ["router/tokenizer"],
}
BANNED = {
    r"\b(strcpy|strcat|sprintf|vsprintf|gets|strtok|atoi|atol|atof|alloca)\s*\(": "unbounded or error-hiding call",
    r"(?<![_\w])(malloc|calloc|realloc|aligned_alloc|free|strdup|strndup)\s*\(": "allocate through common/alloc.h",
    r"(?<![_\w])assert\s*\(": "MOE_ASSERT for our bugs, moe_fail for everything else",
    r"\b(TODO|FIXME|XXX|HACK)\b": "open end",
}
BANNED_EXCEPT = {"common/alloc.c": [1]}  # the allocation site itself

faults = []


def fault(path, line, what):
    faults.append(f"{path}:{line}: {what}")


def tracked():
    out = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    return [p for p in out.decode().split("\0") if p and os.path.exists(os.path.join(ROOT, p))]


def strip_code(text):
    """Comments and literals blanked, line structure kept."""
    def blank(match):
        return re.sub(r"[^\n]", " ", match.group(0))
    return re.sub(r'/\*.*?\*/|//[^\n]*|"(?:\\.|[^"\\\n])*"|\'(?:\\.|[^\'\\\n])*\'', blank, text, flags=re.S)


def check_includes(path, text):
    top = path.split("/")[0]
    for number, line in enumerate(text.split("\n"), 1):
        match = re.match(r'\s*#\s*include\s+([<"])([^>"]+)[>"]', line)
        if not match:
            continue
        header = match.group(2)
        for pattern, owners in OWNED_HEADERS.items():
            if re.match(pattern, header) and top in MAY_INCLUDE and not any(path.startswith(o + "/") for o in owners):
                fault(path, number, f"{header} belongs to {', '.join(owners)}")
        first = header.split("/")[0]
        if match.group(1) == '"' and top in MAY_INCLUDE and "/" in header and first != top and first not in MAY_INCLUDE[top]:
            fault(path, number, f"{top}/ may not include {header}")
        if top in ("router", "expert-worker", "training", "proto", "cpu", "cuda") and re.match(r"common/(inproc|shm|zmq|memory|redis)/", header):
            fault(path, number, f"only cli/ and tests/ name implementations: {header}")


def check_banned(path, code, raw):
    for index, (pattern, why) in enumerate(BANNED.items()):
        if index in BANNED_EXCEPT.get(path, []):
            continue
        source = raw if why == "open end" else code
        for match in re.finditer(pattern, source):
            fault(path, source.count("\n", 0, match.start()) + 1, f"{match.group(0).strip()} — {why}")


def check_functions(path, code):
    depth, start, lines = 0, None, code.split("\n")
    for number, line in enumerate(lines, 1):
        if depth == 0 and "{" in line and re.search(r"\)\s*\{", line):
            start = number
        depth += line.count("{") - line.count("}")
        if depth == 0 and start:
            if number - start + 1 > MAX_FUNCTION_LINES:
                fault(path, start, f"function of {number - start + 1} lines (at most {MAX_FUNCTION_LINES})")
            start = None


def main():
    files = tracked()
    size = sum(os.path.getsize(os.path.join(ROOT, p)) for p in files)
    if size > MAX_TRACKED_BYTES:
        fault(".", 0, f"tracked files take {size} bytes (at most {MAX_TRACKED_BYTES})")
    sources = [p for p in files if re.search(r"\.(c|h|cu|cuh)$", p)]
    for path in sources:
        raw = open(os.path.join(ROOT, path), encoding="utf-8").read()
        code = strip_code(raw)
        check_includes(path, raw)
        if not path.startswith("tests/"):
            check_banned(path, code, raw)
            check_functions(path, code)
            for number, line in enumerate(raw.split("\n"), 1):
                if len(line) > MAX_LINE_COLUMNS:
                    fault(path, number, f"line of {len(line)} columns (at most {MAX_LINE_COLUMNS})")
    if not sources:
        fault(".", 0, "no sources found")
    print("\n".join(faults) or f"lint: {len(sources)} files, {size} bytes tracked, no faults")
    return 1 if faults else 0


sys.exit(main())
