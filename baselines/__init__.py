"""Published methods to compare with, one module each. They are imported as ``dlplora.baselines.NAME``, in a clone and from a wheel."""

raise ImportError("import dlplora.baselines.NAME instead of baselines.NAME: every method has one module name.")
