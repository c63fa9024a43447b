"""What vLLM, SGLang, OpenVINO, llama.cpp and speculators serve as it is, and the way back from published drafters."""

from .gguf_files import write_causal_lm
from .importing import import_drafter
from .writing import FORMATS, ExportReport, export_drafter

__all__ = ["FORMATS", "ExportReport", "export_drafter", "import_drafter", "write_causal_lm"]
