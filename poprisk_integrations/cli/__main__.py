"""`python -m poprisk_integrations.cli`, for launchers that want a module name."""

import sys

from poprisk_integrations.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
