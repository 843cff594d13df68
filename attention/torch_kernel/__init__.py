"""Attention over paged KV in torch: for ranks on a CPU, and the reference for every other kernel."""
