"""The policy node's process on a robot that has the toy family as well; everything else is the product."""

import sys

from tests.toy_family import registered
from vla_policy.nodes.policy_node import main

if __name__ == "__main__":
    with registered("vla_policy.core.families"):
        sys.exit(main())
