#!/usr/bin/env bash
# Make the virtual environment in which the engine tests start a real SGLang on a CPU.
#
#   tests/engines/make_sglang_environment.sh FOLDER     (Python 3.11, 2.7 GB; outside the repository)
#   PPOW_SGLANG_PYTHON=FOLDER/bin/python pytest -m engines -n 0 tests/engines/test_sglang.py
#
# torch must be a build for CPUs; where pip finds another, install one into FOLDER's environment first.
# PPOW_ENGINE_BASE_PYTHON names the interpreter to make it with (default python3).
set -euo pipefail
folder=${1:?usage: make_sglang_environment.sh FOLDER}
base=${PPOW_ENGINE_BASE_PYTHON:-python3}
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

"$base" -m venv "$folder"
# Without dependencies: SGLang's metadata asks for CUDA packages and another torch.
"$folder/bin/python" -m pip install --quiet --no-deps -r "$here/sglang_requirements.txt"
"$folder/bin/python" -c "import importlib.metadata as m; print('sglang', m.version('sglang'), 'torch', m.version('torch'))"
