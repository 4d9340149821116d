"""Analysis: what the files of a run say. Compare, locate, report, suggested names."""
