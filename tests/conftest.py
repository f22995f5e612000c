"""What holds for every test."""

import signal

# A shell that starts a job in the background, and nohup, let it begin with SIGINT ignored, and Python keeps that: Ctrl-C
# would reach neither the tests that send it nor the programs they start.
signal.signal(signal.SIGINT, signal.default_int_handler)
