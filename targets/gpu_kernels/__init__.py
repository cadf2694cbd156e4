"""GPU kernels in portable TIR: no lock-step threads, no vendor's extension."""
