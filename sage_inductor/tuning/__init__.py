"""Which kernel a site gets when "auto" chooses: by measurement while compiling, or by the shipped tables.

comparison.py   what is compared: the problem for the kernels, and the SDPA call that it would replace
measure.py      the times of one comparison on this GPU
store.py        results on disk, and the machine that they hold for
choice.py       the decision
"""

from sage_inductor.tuning.choice import Choice, choose
from sage_inductor.tuning.comparison import Comparison, SdpaCall

__all__ = ["Choice", "Comparison", "SdpaCall", "choose"]
