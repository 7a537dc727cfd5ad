"""The conformance suite, for authors of methods."""
