"""How the builtin bundle is made: `python -m training.train_builtin`."""
