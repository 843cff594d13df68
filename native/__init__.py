"""Kernels in C++ behind a plain C interface: built once a machine, loaded with ctypes. It knows no torch."""
