"""The report on a sweep: what the quantization of RoI coordinates costs, how sure that is, and why."""

from roi_quantization.detection.report.write import write_report

__all__ = ["write_report"]
