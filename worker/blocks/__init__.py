"""The parallel parts that forwards are made of: embedding, attention, feed-forward, experts, output."""
