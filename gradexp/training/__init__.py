"""LightningModules and what a training loop needs."""
