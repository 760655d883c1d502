"""Entry points for frameworks that build Trainer themselves: one module per framework.

Each registers the optimizer names and adds the stop, with its options from the framework's own
configuration where that allows. No framework is imported unless its module is.
"""
