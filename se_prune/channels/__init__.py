"""Channel groups, and everything else that torch-pruning does for us; the only part that imports it.

What is worked around here, each with a test in `tests/unit/test_channels.py`: its group objects are turned into
plain `Coupling` records; its Hessian importance keeps only the last gradient (`accumulate_grad` looks up names in a
dictionary of parameters), so squared gradients are summed here; importances that know nothing of a group return
None, where the group's L2 norm stands in; importances of a group of zeros are 0/0, where 0 stands in; groups in which
one channel takes another along (a map concatenated with a function of itself) are not told apart, so a probe does;
it follows a sum with a part of another map without end, so that its groups are bounded.
"""

from se_prune.channels.groups import couplings
from se_prune.channels.importances import IMPORTANCES, importance
from se_prune.channels.removal import remove

__all__ = ["IMPORTANCES", "couplings", "importance", "remove"]
