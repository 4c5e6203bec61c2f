"""A GPU that this machine lacks, for which Triton compiles all the same."""

from triton.backends.compiler import GPUTarget


class AbsentGPU:
    """What Triton asks its driver before it compiles: `triton.runtime.driver.set_active(AbsentGPU(90))`."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_device(self) -> int:
        return self.capability  # compiled kernels are kept by device

    def get_current_stream(self, _: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)
