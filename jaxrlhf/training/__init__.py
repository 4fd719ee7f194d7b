"""The optimizer, the one place that runs a model for a loss, the jitted step, and everything a long run needs."""
