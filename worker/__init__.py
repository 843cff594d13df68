"""The worker: the launcher of a host (torch-free) and the rank processes that it starts."""
