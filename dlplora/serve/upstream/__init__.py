"""The same front door before another inference server: routing here, generation there."""
