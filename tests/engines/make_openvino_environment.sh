#!/usr/bin/env bash
# Make the virtual environment in which the engine tests start a real OpenVINO GenAI on a CPU, and optimum's converter.
#
#   tests/engines/make_openvino_environment.sh FOLDER        (2 to 6 GB, by the torch that pip finds; outside the repository)
#   PPOW_OPENVINO_PYTHON=FOLDER/bin/python pytest -m engines -n 0 tests/engines/test_openvino.py
set -euo pipefail
folder=${1:?usage: make_openvino_environment.sh FOLDER}
base=${PPOW_ENGINE_BASE_PYTHON:-python3}

"$base" -m venv "$folder"
"$folder/bin/python" -m pip install --quiet "openvino-genai==2026.4.1.0" "optimum-intel==2.2.0" "diffusers==0.37.0" \
    einops "huggingface-hub<1.22"
# Text needs no torchvision, and one for another torch breaks the import.
"$folder/bin/python" -m pip uninstall --quiet --yes torchvision
"$folder/bin/python" -c "import openvino_genai; print(openvino_genai.__version__)"
