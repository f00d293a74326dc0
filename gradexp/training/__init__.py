"""LightningModules, schedules, dropout and stored teacher targets."""
