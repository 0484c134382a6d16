"""Programs that measure burnish on real models and build the models they need; not part of the wheel."""
