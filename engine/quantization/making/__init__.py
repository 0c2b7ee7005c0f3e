"""How `millrace quantize` makes a quantised checkpoint: rounding, the file layout, calibration, and the report."""
