"""Attention over paged KV: the kernel interface, its torch and FlashInfer implementations, and the exchange over cp."""
