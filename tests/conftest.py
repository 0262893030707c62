"""What every test may rely on."""

import os

# Tests neither read nor change what was measured for the user.
os.environ.setdefault("GOSSAMER_TUNING", "0")
