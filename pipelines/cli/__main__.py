# SPDX-License-Identifier: Apache-2.0
"""``python -m pipelines.cli VERB ...`` is ``recsys VERB ...``."""

import sys

from pipelines.cli import main

if __name__ == "__main__":
    sys.exit(main())
