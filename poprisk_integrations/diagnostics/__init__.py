"""What a run tells about itself, independent of the training framework."""

from poprisk_integrations.diagnostics.gradient_window import SHORTEST_WINDOW, GradientWindow
from poprisk_integrations.diagnostics.window_length import auto_window_steps
from poprisk_integrations.diagnostics.window_state import window_fits

__all__ = ["SHORTEST_WINDOW", "GradientWindow", "auto_window_steps", "window_fits"]
