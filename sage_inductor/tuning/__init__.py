"""The choice of a kernel for a site with kernel="auto": by measurement while compiling, or by the shipped tables.

comparison.py   what is compared: the problem for the kernels, and the SDPA call that it would replace
measure.py      the times of one comparison on this device
machine.py      the hardware and software that times hold for
store.py        results on disk
choice.py       the decision
agreement.py    one decision for all ranks of a process group
"""

from sage_inductor.tuning.agreement import Choice
from sage_inductor.tuning.choice import choose
from sage_inductor.tuning.comparison import Comparison, SdpaCall

__all__ = ["Choice", "Comparison", "SdpaCall", "choose"]
