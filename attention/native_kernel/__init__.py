"""Attention over paged KV in C++, for ranks on a CPU: pages are read where they lie."""
