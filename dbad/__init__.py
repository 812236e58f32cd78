"""Visual anomaly detection with diffusion models: the parts that the scripts share."""
