"""Mixture of experts: the gate, the experts' kernels, and the dispatchers that bring rows to them and back."""
