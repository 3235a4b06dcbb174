"""Learn a mask: the module, its optimizers, schedules, validation and numerics."""
