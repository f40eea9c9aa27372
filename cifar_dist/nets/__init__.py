"""Floor 1. The model: uint8 pictures in, `Outputs` out: pixels, then a backbone, then a head."""
