"""What a response is worth: by a learned model, or by a rule."""
