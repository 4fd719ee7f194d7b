"""The policy as a service: an OpenAI-compatible interface over the rollout engine, and a chat page."""
