"""The parts of benchmarks/model_comparison.py: what is compared, on which clips, the record of runs, and the page."""
