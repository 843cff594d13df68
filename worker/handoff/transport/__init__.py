"""Transports that execute a hand-off."""
