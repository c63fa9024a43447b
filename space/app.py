"""Starts the demo as a Hugging Face Space does: `python app.py`. The page itself is `ppow_hf.demo`, in the package.

The models and limits come from the Space's variables (PPOW_DEMO_TARGET, PPOW_DEMO_DRAFTER, ...); without any, the
embedded pair is shown. `ppow_hf` is installed, or lies beside this file or above it.
"""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
for folder in (HERE, HERE.parent):
    if (folder / "ppow_hf").is_dir():
        sys.path.insert(0, str(folder))
        break

from ppow_hf.demo.app import launch  # noqa: E402

if __name__ == "__main__":
    launch()
