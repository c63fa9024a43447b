"""The compiler that is never asked to compile."""

from triton.backends.compiler import BaseBackend


class InterpretedBackend(BaseBackend):
    @staticmethod
    def supports_target(target):
        return target.backend == "cpu"

    def hash(self):
        return "interpreted"

    def parse_options(self, options):
        raise NotImplementedError("set TRITON_INTERPRET=1: this backend compiles nothing.")

    add_stages = load_dialects = get_module_map = parse_options
