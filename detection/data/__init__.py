"""Images, annotations and proposals: COCO's layout on disk -> batches. Knows no model.

Boxes are float32 `(x1, y1, x2, y2)` in pixels, continuous: pixel `i` covers `[i, i + 1)`, and `x2, y2` are edges of the box,
not the last pixel inside. COCO's `[x, y, width, height]` becomes `[x, y, x + width, y + height]`.
"""
