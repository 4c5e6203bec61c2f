"""How good are the detections: COCO's metrics, and pictures. Knows no model."""
