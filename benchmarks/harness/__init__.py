"""Problems x solvers x measures: one small file each. See benchmarks/README.md for how to add one.

Nothing here may import more than numpy at the top: workers of foreign environments (`benchmarks/environments/`) have no
torch, and read this package too.
"""

from .contract import Case, Prepared

__all__ = ["Case", "Prepared"]
