"""The hand-off of KV from prefill to decode: what to write when layers are computed, and who writes it."""
