"""COCO's metrics of detections, statistics of their differences, and pictures. Depends on no model."""
