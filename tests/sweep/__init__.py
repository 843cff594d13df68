"""The sweep: any exact factorisation in either pool gives transformers' tokens, on real processes."""
