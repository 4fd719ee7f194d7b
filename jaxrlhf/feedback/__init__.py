"""People's choices: where they are kept, who makes them, and how far people agree."""
