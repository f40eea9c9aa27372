"""Process groups, collectives, and error handling across ranks."""
