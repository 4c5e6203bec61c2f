"""An operator, a backbone, a data set and a callback, used by roi_quantization through the files in configs/."""
