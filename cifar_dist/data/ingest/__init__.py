"""From the published archive to Arrow."""
