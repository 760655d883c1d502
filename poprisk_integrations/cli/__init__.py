"""The `poprisk` command: one module per subcommand, frameworks imported only when one runs."""
