"""Training and evaluation of the models in a bundle."""
