"""The gRPC server of a host: starts, watches and stops its ranks. It never imports torch."""
