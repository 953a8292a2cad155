"""GE2Hist: a model of tissue. Expression -> scGPT -> z_c, z_e -> H&E of the niche -> numbers."""
