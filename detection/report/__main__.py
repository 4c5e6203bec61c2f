"""`python -m roi_quantization.detection.report runs/<sweep>`"""

import argparse
import sys

from roi_quantization.detection.report.write import write_report

parser = argparse.ArgumentParser(
    prog="python -m roi_quantization.detection.report", description="Write <sweep>/report/ from the runs of a sweep."
)
parser.add_argument("sweep", help="folder of the sweep, with a folder <arm>_seed<seed> for each run")
parser.add_argument("--reference", default="align", help="the arm that others are compared with (align)")
arguments = parser.parse_args()
try:
    print(write_report(arguments.sweep, arguments.reference))
except (OSError, ValueError) as error:
    sys.exit(f"report: {error}")
