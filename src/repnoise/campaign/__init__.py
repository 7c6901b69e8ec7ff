"""Many studies at once: sweeps of defences under one budget, and an attacker's search for the worst cell."""
