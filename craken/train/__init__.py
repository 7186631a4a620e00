"""The training command: finds text, trains a model on it through the library, shows and reports the run."""
