"""Many short requests with random ends, and what the service holds after them."""
