"""The router: owns the topology, brings launchers up, answers clients. It never imports torch."""
