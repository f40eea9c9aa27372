"""Floor 2. What is minimised and how: losses per sample, optimizers, schedules, averages."""
