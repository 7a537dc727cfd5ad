"""A proxy in front of another inference server: routing here, generation there."""
