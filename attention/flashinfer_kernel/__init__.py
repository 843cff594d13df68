"""Attention over paged KV in FlashInfer: for ranks on an NVIDIA GPU."""
