"""The studies: harness against the optimizer itself, tasks, rules, committed results."""
