"""What every test process needs."""

import os
import signal

# A shell that runs the tests in the background has SIGINT ignored, and children inherit that: the tests that
# interrupt a command would then wait for ever.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Tiny policies gain nothing from a second thread, and on a busy machine threads that wait for each other are ten times
# slower than one. Set before torch is imported, so that child processes have it too.
os.environ.setdefault("OMP_NUM_THREADS", "1")
