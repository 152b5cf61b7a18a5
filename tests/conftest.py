"""What every test process needs."""

import signal

# A shell that runs the tests in the background has SIGINT ignored, and children inherit that: the tests that
# interrupt a command would then wait for ever.
signal.signal(signal.SIGINT, signal.default_int_handler)
