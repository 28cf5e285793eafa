"""Channel groups, and everything else that torch-pruning does for us; the only part that imports it.

What is worked around here, each with a test in `tests/unit/`: its group objects are turned into
plain `Coupling` records; its Hessian importance keeps only the last gradient (`accumulate_grad` looks up names in a
dictionary of parameters), so squared gradients are summed here; importances that know nothing of a group return
None, where the group's L2 norm stands in; importances of a group of zeros are 0/0, where 0 stands in; groups in which
one channel takes another along (a map concatenated with a function of itself) are not told apart, so a probe does;
it follows some sums and shuffles of parts of maps without end, so that its groups are bounded; it takes the n-th reader
of a split for the reader of its n-th part and guesses widths (`joints`), takes channel shuffles for elementwise
(`shuffles`), a gate's convolution along the channels for one of a single channel, and numbers the parts of a
concatenation anew after every cut, so that all channels leave at once, by `removal`.
"""

from se_prune.channels.groups import couplings
from se_prune.channels.importances import IMPORTANCES, importance
from se_prune.channels.removal import remove

__all__ = ["IMPORTANCES", "couplings", "importance", "remove"]
