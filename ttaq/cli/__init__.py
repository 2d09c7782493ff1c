"""The command line: ttaq demo | quantize | evaluate | adapt | inspect | compare | export | report | doctor.

`_root` holds the application and the options that commands share; `making`, `running` and `showing` hold the commands,
in the order in which the help lists them.
"""

import os
import sys

from . import making, running, showing
from ._root import app

__all__ = ["app", "main", "making", "running", "showing"]


def main() -> None:
    """Run the command line: the console script `ttaq`."""
    sys.path.insert(0, os.getcwd())  # "package.module:function" may lie where the user stands
    app()
