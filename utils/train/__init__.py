"""Training: options and recipes, devices and processes, objective, engine, trainer, resumption, the run folder."""
