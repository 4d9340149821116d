"""Config: what the user set. GRAFTER_* variables, the plan file, names, options, changes during a run."""
