"""A trained model to predict with."""
