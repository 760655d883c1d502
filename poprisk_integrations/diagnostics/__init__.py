"""What a run tells about itself, independent of the training framework."""

from poprisk_integrations.diagnostics.gradient_window import GradientWindow, window_fits
from poprisk_integrations.diagnostics.window_length import auto_window_steps

__all__ = ["GradientWindow", "auto_window_steps", "window_fits"]
