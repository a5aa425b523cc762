"""The time path: what depends on the timestep alone, kept exact."""
