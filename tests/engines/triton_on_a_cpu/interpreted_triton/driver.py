"""The driver of a CPU on which kernels are interpreted."""

import torch
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase


class InterpretedDriver(DriverBase):
    @staticmethod
    def is_active():
        return True

    def get_current_target(self):
        return GPUTarget("cpu", 0, 1)

    def get_active_torch_device(self):
        return torch.device("cpu")

    def map_python_to_cpp_type(self, ty):
        raise NotImplementedError("set TRITON_INTERPRET=1: this backend compiles nothing.")

    get_benchmarker = map_python_to_cpp_type
