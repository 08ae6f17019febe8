"""The files that the commands write, read by their formats' rules alone. Standard library only."""
import json
import struct

from harness import check

GATE, HINT, PRE_GATE = range(3)  # planes of a trace


def read_safetensors(path):
    """{name: (dtype, shape, bytes)}, by the format's rules."""
    with open(path, "rb") as f:
        data = f.read()
    size = struct.unpack("<Q", data[:8])[0]
    check(size % 8 == 0 and data[8:9] == b"{", f"{path}: a header of {size} bytes")
    header, body, at, tensors = json.loads(data[8:8 + size]), data[8 + size:], 0, {}
    check(set(map(type, header.pop("__metadata__", {}).values())) <= {str}, f"{path}: metadata are texts")
    for name, t in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        begin, end = t["data_offsets"]
        elements = 1
        for n in t["shape"]:
            elements *= n
        check(begin == at and end - begin == elements * {"F32": 4, "BF16": 2}[t["dtype"]], f"{path}: {name}: {t}")
        tensors[name] = (t["dtype"], t["shape"], body[begin:end])
        at = end
    check(at == len(body), f"{path}: {len(body)} bytes of tensors, the header names {at}")
    return tensors


def write_safetensors(path, tensors):
    header, at = {}, 0
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + len(data)]}
        at += len(data)
    text = json.dumps(header).encode()
    with open(path, "wb") as f:
        f.write(struct.pack("<Q", len(text)) + text + b"".join(data for _, _, data in tensors.values()))


def read_trace(path):
    """(layers, experts, top_k), and for each text its planes, [tokens][layers][top_k]."""
    with open(path, "rb") as f:
        data = f.read()
    magic, version, layers, experts, top_k, planes, texts, _ = struct.unpack_from("<8s6IQ", data)
    check(magic == b"MOETRACE" and version == 1 and planes in (2, 3), f"{path}: {data[:40]}")
    at, out = 40, []
    for _ in range(texts):
        tokens, = struct.unpack_from("<I", data, at)
        at, read = at + 4, []
        for _ in range(planes):
            flat = struct.unpack_from(f"<{tokens * layers * top_k}H", data, at)
            at += 2 * len(flat)
            read.append([[flat[(t * layers + l) * top_k:(t * layers + l + 1) * top_k] for l in range(layers)] for t in range(tokens)])
        out.append(read)
    check(at == len(data), f"{path}: {len(data)} bytes, {at} are used")
    return (layers, experts, top_k), out
