"""What a run tells about itself, independent of the training framework."""

from poprisk_integrations.diagnostics.gradient_window import GradientWindow

__all__ = ["GradientWindow"]
