"""Models as pure functions over pytrees."""
