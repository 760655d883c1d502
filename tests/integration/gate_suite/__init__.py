"""The gate studies: harness against the optimizer itself, tasks, tables."""
