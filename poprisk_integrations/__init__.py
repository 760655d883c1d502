"""Population-risk gated AdamW and validation-free early stopping.

| layer         | holds                                                            |
|---------------|------------------------------------------------------------------|
| core          | pure functions and frozen dataclasses                            |
| distributed   | reductions over ranks and shards                                 |
| optim         | PopRiskAdamW                                                     |
| diagnostics   | what a run tells about itself, for any framework                 |
| huggingface   | optimizer names and callbacks for Trainer                        |
| lightning     | callbacks for Lightning                                          |
| trl           | DPO on preference data with wrong labels                         |
| cli           | the `poprisk` command                                            |

A file imports only from its own row or rows above it. This module imports torch only.
"""

from poprisk_integrations.optim import PopRiskAdamW

__version__ = "0.2.0"

__all__ = ["PopRiskAdamW", "__version__"]
