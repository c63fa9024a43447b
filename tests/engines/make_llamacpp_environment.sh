#!/usr/bin/env bash
# Make the virtual environment in which the engine tests start a real llama.cpp on a CPU.
#
#   tests/engines/make_llamacpp_environment.sh FOLDER        (200 MB; outside the repository)
#   PPOW_LLAMACPP_PYTHON=FOLDER/bin/python pytest -m engines -n 0 tests/engines/test_llamacpp.py
#
# The wheel holds llama.cpp's server, built for any CPU; nothing is compiled.
set -euo pipefail
folder=${1:?usage: make_llamacpp_environment.sh FOLDER}
base=${PPOW_ENGINE_BASE_PYTHON:-python3}

"$base" -m venv "$folder"
"$folder/bin/python" -m pip install --quiet "xllamacpp==2026.10.11549"
"$folder/bin/python" -c "import importlib.metadata, xllamacpp; print(importlib.metadata.version('xllamacpp'))"
