"""What a run tells about itself, independent of the training framework."""

from poprisk_integrations.diagnostics.gradient_window import GradientWindow, window_fits
from poprisk_integrations.diagnostics.run_length import SHORTEST_WINDOW, auto_window_steps
from poprisk_integrations.diagnostics.sitting_out import SittingOut

__all__ = ["SHORTEST_WINDOW", "GradientWindow", "SittingOut", "auto_window_steps", "window_fits"]
