"""Floor 3: what runs a recipe. The only folder (with the commands) that knows Accelerate or W&B."""
