"""`python -m evaluation.robot --ros-args ...`"""

import sys

from evaluation.robot.node import main

if __name__ == "__main__":
    sys.exit(main())
