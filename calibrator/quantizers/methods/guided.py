"""GPTQ on the rows that the decision depends on: in place of E[x x^T] a mean in which rows have the weights of
`calibrator.data.guidance`, so that errors are made up for where they would reach the action.

After GuidedQuant (Kim et al., 2025, arXiv:2505.07004). Otherwise `methods.gptq`.
"""

from calibrator.quantizers.base import Needs
from calibrator.quantizers.methods.gptq import Gptq


class Guided(Gptq):
    """See the module."""

    version = 1
    needs = Needs.GUIDED_INPUTS


QUANTIZER = Guided()
