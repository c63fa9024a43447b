"""Tokenizes texts with llama.cpp inside its own environment: `llamacpp_tokenize_job.py MODEL TEXTS RESULT` (JSON)."""

import json
import sys
import urllib.request
from pathlib import Path


def main(model, texts_path, result_path):
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.warmup, params.verbosity = model, 256, False, 0
    server = xllamacpp.Server(params)
    found = []
    for text in json.loads(Path(texts_path).read_text()):
        body = json.dumps({"content": text, "add_special": True, "parse_special": True}).encode()
        address = f"{server.listening_address}/tokenize"
        request = urllib.request.Request(address, body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request) as response:
            found.append(json.load(response)["tokens"])
    Path(result_path).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
