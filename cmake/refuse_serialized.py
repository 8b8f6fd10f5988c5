"""Runs a compiler, and fails where ptxas had to serialise wgmma (its notes C7500 to C7599).

Such a kernel is right and takes twice the time; to ptxas that is information, not a warning.
"""

import re
import subprocess
import sys

result = subprocess.run(sys.argv[1:], stderr=subprocess.PIPE, text=True)
sys.stderr.write(result.stderr)
if re.search(r"\(C75\d\d\)", result.stderr):
    sys.stderr.write(
        "jax_flashattn: wgmma is serialised here; csrc/README.md says what may cause it.\n"
    )
    sys.exit(result.returncode or 1)
sys.exit(result.returncode)
