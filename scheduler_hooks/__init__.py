"""Engine-side hooks of dp-balancer."""
