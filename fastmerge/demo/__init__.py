"""The demo: a real MiniLM and six real text-classification tasks, method beside method."""

import os

# Read when torch first loads OpenMP. Threads that wait actively make two threads on a busy machine
# up to ten times slower than one (measured on experts' training); waiting passively costs little.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
