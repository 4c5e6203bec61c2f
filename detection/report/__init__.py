"""The report of a sweep: the cost of quantizing RoI coordinates, its confidence intervals, and its causes."""

from roi_quantization.detection.report.write import write_report

__all__ = ["write_report"]
