"""The wire: Muster's protocol buffers. The generated modules are built by `make proto`, never committed."""
