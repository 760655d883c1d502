"""Parts of `poprisk probe`: it watches a training, then tells what gates and a stop would do."""
