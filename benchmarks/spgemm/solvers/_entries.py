"""What of a product is compared: small enough to be written to disk, and still a test of every entry."""

import numpy as np
from scipy import sparse

# Entries that are compared one by one; all others are through sums over their rows.
ONE_BY_ONE = 500_000


def entries(c):
    """Of C without stored zeros (scipy stores none), columns ascending: row starts; sums of the columns of each row;
    four random sums of the values of each row; and the first entries themselves, columns and values."""
    c = sparse.csr_array(c)
    c.eliminate_zeros()
    c.sort_indices()
    sums = np.concatenate([[0], np.cumsum(c.indices, dtype=np.int64)])
    weights = np.random.default_rng(0).standard_normal((c.shape[1], 4))
    starts, some = c.indptr.astype(np.int64), slice(ONE_BY_ONE)
    return starts, np.diff(sums[starts]), c @ weights, c.indices[some].astype(np.int64), c.data[some]
