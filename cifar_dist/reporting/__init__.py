"""Floor 5. What the page of `report` is made of: runs compared, charts, pictures."""
