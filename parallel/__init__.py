"""Who holds what: mesh algebra, topology, sharding, model descriptions (torch-free), groups and collectives (torch)."""
