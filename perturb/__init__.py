"""What-if experiments on a GE2Hist model: edit genes, draw both niches from the same noise, compare, report."""
