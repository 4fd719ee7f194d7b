"""From prompts to rollouts: filters, the draw, the decode loop, and what a learner needs to know of the result."""
