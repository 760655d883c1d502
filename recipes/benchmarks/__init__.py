"""Studies, one question each, on one harness; `python -m benchmarks NAME` from `recipes/`."""
