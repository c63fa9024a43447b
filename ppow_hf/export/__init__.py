"""Directories that vLLM, SGLang and speculators serve as they are, and the way back from published drafters."""

from .importing import import_drafter, import_eagle3
from .writing import FORMATS, ExportReport, export_drafter

__all__ = ["FORMATS", "ExportReport", "export_drafter", "import_drafter", "import_eagle3"]
