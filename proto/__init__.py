"""The wire: Muster's protocol buffers. The generated modules are built by `make proto`, never committed."""

#: Tells this package from another of its name that was installed over it (proto-plus has it).
OWNER = "muster"
