"""What holds for every test."""

import signal
import sys
from pathlib import Path

# A shell that starts a job in the background, and nohup, let it begin with SIGINT ignored, and Python keeps that: Ctrl-C
# would reach neither the tests that send it nor the programs they start.
signal.signal(signal.SIGINT, signal.default_int_handler)

# For examples/; behind an installed pyllava, which is the one to be tested.
sys.path.append(str(Path(__file__).resolve().parents[1]))
